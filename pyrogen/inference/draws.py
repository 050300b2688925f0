"""What one step has drawn, as objectives and their critics look at it."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogen.distributions.implicit import is_implicit
from pyrogen.inference.guides import flattened
from pyrogen.inference.programs import (
    Site,
    before,
    data_frame,
    global_draws,
    latent_sites,
    observed_sites,
    repeat,
    row_axis,
    sample_sites,
    trace_of,
)
from pyrogen.inference.terms import Traces, trace_programs

__all__ = ["Draws", "by_value", "draw_only", "elements", "from_elements", "is_masked"]


class Draws:
    """One run of the programs on K copies of a batch, and what else of it a critic may need, run when asked for.

    Args:
        model: The model's program.
        guide: The guide's, or None where an objective uses none.
        batch: Tensors of B rows.
        particles: The number K.
    """

    def __init__(self, model: Callable, guide: Callable | None, batch: tuple[Tensor, ...], particles: int = 1) -> None:
        self.program = model
        self.batch = batch
        self.particles = particles
        self.rows = repeat(batch, particles)
        self.with_guide = guide is not None
        self.gradients = torch.is_grad_enabled()  # what is run later has gradients where this has
        self._known: dict[str, Any] = {}
        if guide is not None:
            self.traces: Traces = trace_programs(model, guide, batch, particles)

    @cached_property
    def guide(self) -> dict[str, dict[str, Any]]:
        """The guide's sites."""
        return sample_sites(self.traces.guide)

    @cached_property
    def model(self) -> dict[str, dict[str, Any]]:
        """The model's sites on the guide's draws."""
        return sample_sites(self.traces.model)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The model's latent sites, in its order."""
        return latent_sites(self.traces.model if self.with_guide else self.prior_trace)

    @cached_property
    def local(self) -> list[str]:
        """The names of the per-observation latent sites."""
        return [name for name, site in self.sites.items() if not site.is_global]

    @cached_property
    def detached(self) -> dict[str, dict[str, Any]]:
        """The model's sites, run on the guide's draws without their gradients."""
        with torch.set_grad_enabled(self.gradients):
            return sample_sites(trace_of(self._on(_constants(self.traces.guide)), *self.rows))

    @cached_property
    def detached_latents(self) -> dict[str, dict[str, Any]]:
        """Of :attr:`detached` the per-observation latent sites, without what the model does after them."""
        with torch.set_grad_enabled(self.gradients):
            return draw_only(self._on(_constants(self.traces.guide)), self.local, self.rows)

    @cached_property
    def detached_local_latents(self) -> dict[str, dict[str, Any]]:
        """The same where the guide's draws of global sites keep their gradients."""
        with torch.set_grad_enabled(self.gradients):
            return draw_only(self._on(_constants(self.traces.model, self.local)), self.local, self.rows)

    @cached_property
    def prior_trace(self) -> poutine.Trace:
        """The model run on its own with nothing observed, at the guide's global sites without their gradients."""
        shared = _constants(self._globals)
        with torch.set_grad_enabled(self.gradients):
            return trace_of(poutine.uncondition(self._on(shared)), *self.rows)

    @cached_property
    def prior_latents(self) -> dict[str, dict[str, Any]]:
        """The per-observation latent sites of another such run, with the gradients of global sites, and without what
        the model does after them."""
        with torch.set_grad_enabled(self.gradients):
            return draw_only(poutine.uncondition(self._on(self._globals)), self.local, self.rows)

    @property
    def _globals(self) -> poutine.Trace:
        """The guide's draws of global sites."""
        return global_draws(self.traces.model) if self.with_guide else poutine.Trace()

    def _on(self, held: poutine.Trace) -> Callable:
        """The model at the values of some sites."""
        return poutine.replay(self.program, trace=held)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device that critics shall have: observations, or where these are whole
        numbers, latent values."""
        drawn = self.model if self.with_guide else self.prior
        values: list[Tensor] = [*self.rows, *(drawn[name]["value"] for name in self.sites)]
        return next((x for x in values if x.is_floating_point()), torch.zeros((), device=self.rows[0].device))

    @cached_property
    def prior(self) -> dict[str, dict[str, Any]]:
        """The model's sites, run on its own."""
        return sample_sites(self.prior_trace)

    def latents(self, nodes: dict[str, dict[str, Any]], names: list[str]) -> Tensor:
        """The unconstrained values of latent sites for each row, ``(K * B, n)``."""
        rows = len(self.rows[0])
        return torch.cat([flattened(self.sites[name], nodes[name]["value"], rows) for name in names], -1)

    def context(self, name: str) -> Tensor:
        """What the guide's site is drawn given, ``(K * B, C)``: the observation and the latent sites drawn before.

        The observation stands as the encoder's features, on which alone the guide depends, as constants.
        """
        if self.traces.features is not None:
            seen = self.traces.features.detach()
        else:
            seen = torch.cat([x.reshape(len(x), -1).to(self.like.dtype) for x in self.rows], -1)
        earlier = [other for other in before(self.guide, name) if other in self.sites]
        return torch.cat([seen, self.latents(self.model, earlier)], -1) if earlier else seen

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What is computed when first asked for, and is the same for program and critics."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def parents(self, name: str) -> Tensor | None:
        """The latent sites that the model draws before a site, ``(K * B, C)``; None if there are none."""
        earlier = before(self.sites, name)
        return self.latents(self.model, earlier) if earlier else None

    def visible_names(self) -> list[str]:
        """The names of the observed sites in the plate ``"data"``."""
        trace = self.traces.model if self.with_guide else self.prior_trace
        return [name for name, node in observed_sites(trace).items() if data_frame(node) is not None]

    def data(self) -> Tensor:
        """What is observed, once for each of B rows.

        Raises:
            ValueError: If some of it is masked.
        """
        nodes = self.model if self.with_guide else self.prior
        seen = {}
        for name in self.visible_names():
            if is_masked(nodes[name]):
                raise ValueError(
                    f"the observed site '{name}' is masked, and what stands at its missing places would be taken for "
                    "data; train by the likelihood, which leaves it out (ELBO, AVB, AAE), or fill it in"
                )
            seen[name] = nodes[name]["value"] if self.with_guide else nodes[name]["infer"]["obs"]
        return self._visible(nodes, seen)[: len(self.batch[0])]

    def visible(self, nodes: dict[str, dict[str, Any]]) -> Tensor:
        """What a run of the model shows at its observed sites, ``(K * B, *event_shape)``, with gradients."""
        with torch.set_grad_enabled(self.gradients):
            return self._visible(nodes, {name: _shown(name, nodes[name]) for name in self.visible_names()})

    @cached_property
    def reconstructions(self) -> Tensor:
        """What the model shows at the guide's draws."""
        return self.visible(self.model)

    @cached_property
    def samples(self) -> Tensor:
        """What the model shows on its own."""
        return self.visible(self.prior)

    def _visible(self, nodes: dict[str, dict[str, Any]], values: dict[str, Tensor]) -> Tensor:
        by_row = [value.movedim(row_axis(nodes[name]), 0).to(self.like.dtype) for name, value in values.items()]
        if len(by_row) > 1:
            return torch.cat([value.reshape(len(value), -1) for value in by_row], -1)
        return by_row[0].unsqueeze(-1) if by_row[0].dim() == 1 else by_row[0]


def _constants(trace: poutine.Trace, names: Iterable[str] | None = None) -> poutine.Trace:
    """The latent sites of a trace, all of them or those named without their gradients."""
    held = poutine.Trace()
    for name, node in sample_sites(trace).items():
        if not node["is_observed"]:
            value = node["value"].detach() if names is None or name in names else node["value"]
            held.add_node(name, **node | {"value": value})
    return held


def is_masked(node: dict[str, Any]) -> bool:
    """Whether some of a site's elements may be idle."""
    return node["mask"] is not None or isinstance(by_value(node["fn"]), dist.MaskedDistribution)


def _shown(name: str, node: dict[str, Any]) -> Tensor:
    """A draw with gradients from the distribution of an observed site; of a discrete one its mean.

    Raises:
        ValueError: If it has neither.
    """
    fn = node["fn"]
    if is_implicit(fn) or fn.has_rsample:
        return fn.rsample() if node["is_observed"] else node["value"]
    if isinstance(by_value(fn), torch.distributions.Categorical):
        raise ValueError(
            f"a critic sees the mean of a discrete observed site, and the Categorical at '{name}' has none: its values "
            "are mere names. Observe it one-hot, by OneHotCategorical"
        )
    if not fn.support.is_discrete:
        raise ValueError(
            f"draws of the {type(by_value(fn)).__name__} at the observed site '{name}' have no gradients, from which a "
            "critic could teach it; use a likelihood with rsample, or Implicit"
        )
    return fn.mean


class _AllDrawn(Exception):
    """All the sites that were wanted have been drawn."""


def _stop(message: Any) -> None:
    raise _AllDrawn


class _Drawing(Messenger):
    """Keep some sites as a program draws them, and end it with the last."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.waiting = set(names)
        self.nodes: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.waiting:
            self.waiting.remove(msg["name"])
            self.nodes[msg["name"]] = msg
            if not self.waiting:
                msg["continuation"] = _stop


def draw_only(program: Callable, names: Sequence[str], rows: tuple[Tensor, ...]) -> dict[str, dict[str, Any]]:
    """Some sites as a program draws them, which ends with the last of them: what would follow is a decoder, whose
    result is not needed and whose running statistics should not see these draws.

    Raises:
        ValueError: If the program ends before all of them are drawn.
    """
    drawing = _Drawing(names)
    try:
        with drawing:
            program(*rows)
    except _AllDrawn:
        return {name: drawing.nodes[name] for name in names}
    raise ValueError(
        f"the model draws the latent sites {sorted(drawing.waiting)} only when something is observed; draw them always"
    )


def by_value(fn: Any) -> Any:
    """A distribution without the declaration that its independent values are one event."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def elements(node: dict[str, Any], value: Tensor, particles: int) -> Tensor:
    """A latent site's values with particles, rows and elements of nested plates in front: ``(K, B, P, *event)``."""
    frame = data_frame(node)
    event = value.dim() - len(node["fn"].batch_shape)
    assert frame is not None and frame.dim is not None
    front = value.movedim(frame.dim - event, 0)
    rows, shape = len(front), front.shape[front.dim() - event :]
    return front.reshape(particles, rows // particles, -1, *shape)


def from_elements(node: dict[str, Any], values: Tensor) -> Tensor:
    """Numbers of shape ``(K, B, P)`` in the batch shape of their site."""
    frame = data_frame(node)
    assert frame is not None and frame.dim is not None
    shape = list(node["fn"].batch_shape)
    rows = shape.pop(frame.dim)
    return values.reshape(rows, *shape).movedim(0, frame.dim)

"""Running programs outside of training: checked rows, a mode and a random state of their own, and bounded memory."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrogen.arguments import check_are, check_counts
from pyrogen.distributions.implicit import NoDensityError, is_implicit
from pyrogen.inference.batches import Batches, as_batch, check_data
from pyrogen.inference.checks import check_objects, check_programs, check_values, check_weights, first_parameter
from pyrogen.inference.divergences import is_point_mass
from pyrogen.inference.draws import is_masked
from pyrogen.inference.programs import (
    Copies,
    Site,
    before,
    data_frame,
    evaluation_mode,
    global_draws,
    latent_sites,
    no_sites,
    prototype,
    repeat,
    sample_sites,
    trace_of,
)
from pyrogen.inference.terms import Terms, compare_sites, nothing, trace_programs
from pyrogen.inference.turns import seeded, turn
from pyrogen.inference.units import by_row, means

__all__ = [
    "ROWS",
    "Prepared",
    "by_row",
    "groups",
    "means",
    "pair_passes",
    "parts",
    "passes",
    "prepared",
]

ROWS = 4096
"""How many rows, copies counted, go through a program at once."""

GLOBAL_DRAWS = 100
"""How often, at least where there are as many particles, an average over particles draws global sites anew."""


@dataclass(frozen=True)
class Prepared:
    """A model and its guide with checked rows, ready to be run.

    Attributes:
        model, guide: Programs.
        batch: The rows, on the programs' device.
        latents: The model's latent sites.
        nodes: The model's sites in a trace of one or two rows.
        point_masses: The latent sites at which the guide is a point mass.
        implicit_guide: The per-observation sites at which the guide can only be sampled.
        implicit_prior: The per-observation latent sites at which the model can.
        implicit_likelihood: The observed sites at which the model can.
        implicit_global: The global sites at which one of them can.
        order: The guide's sites in its order.
    """

    model: Callable
    guide: Callable
    batch: tuple[Tensor, ...]
    latents: dict[str, Site]
    nodes: dict[str, dict[str, Any]]
    point_masses: tuple[str, ...]
    implicit_guide: tuple[str, ...]
    implicit_prior: tuple[str, ...]
    implicit_likelihood: tuple[str, ...]
    implicit_global: tuple[str, ...]
    order: tuple[str, ...]

    @property
    def observed(self) -> list[str]:
        """The names of the observed sites."""
        return [name for name in self.nodes if name not in self.latents]

    @property
    def local(self) -> list[str]:
        """The names of the per-observation latent sites."""
        return [name for name, site in self.latents.items() if not site.is_global]

    @property
    def local_point_masses(self) -> list[str]:
        """The per-observation sites at which the guide is a point mass."""
        return [name for name in self.point_masses if not self.latents[name].is_global]

    @property
    def has_global(self) -> bool:
        """Whether a latent site stands outside the plate ``"data"``."""
        return any(site.is_global for site in self.latents.values())

    def copies_of(self, particles: int) -> int | None:
        """How many copies may share one draw of the global sites; None without such sites."""
        return math.ceil(particles / GLOBAL_DRAWS) if self.has_global else None

    @property
    def has_rate(self) -> bool:
        """Whether log q(z|x) and log p(z) are known at every per-observation site."""
        return not (self.local_point_masses or self.implicit_guide or self.implicit_prior)

    @property
    def has_global_rate(self) -> bool:
        """Whether log q(θ) and log p(θ) are known at every global site."""
        return len(self.point_masses) == len(self.local_point_masses) and not self.implicit_global

    def before(self, name: str) -> list[str]:
        """The latent sites that the guide draws before one of them."""
        return [other for other in before(self.order, name) if other in self.latents]

    def why_no_rate_estimate(self) -> str | None:
        """What keeps critics from estimating the rate, or None."""
        if self.local_point_masses:
            return (
                f"the guide's distribution at the latent sites {self.local_point_masses} is a point mass (Delta), "
                "whose rate is infinite; use another family"
            )
        if helpers := [name for name in self.implicit_guide if name not in self.latents]:
            return f"the guide's helper sites {helpers} are implicit; give them an explicit family"
        implicit = {*self.implicit_guide, *self.implicit_prior}
        if masked := [name for name in self.latents if name in implicit and is_masked(self.nodes[name])]:
            return f"the implicit sites {masked} are masked, so some of their draws are idle"
        for name in self.implicit_prior:
            late = set(before(self.latents, name)) - set(self.before(name))
            if late:
                return (
                    f"the model's site '{name}' is implicit given {sorted(late)}, which the guide draws after it; draw "
                    "the sites in the model's order"
                )
        return None

    def need_joint_density(self, what: str) -> None:
        """Raise a ``NoDensityError``, which is a ``ValueError``, if the model has an implicit site."""
        if names := [*self.implicit_prior, *self.implicit_likelihood]:
            raise NoDensityError(
                f"{what} needs log p(x, z), but the model's distribution at the sites {names} is implicit: it can only "
                "be sampled, and no guide changes that; judge the model by its samples (sample, prior_samples), or "
                "give these sites a family with a density"
            )

    def need_density(self, what: str) -> None:
        """Raise a ``ValueError`` if log p(x, z) − log q(z|x) is not known: for implicit sites and point masses."""
        self.need_joint_density(what)
        if self.implicit_guide:
            raise NoDensityError(
                f"{what} needs the guide's density, but its distribution at the latent sites "
                f"{[*self.implicit_guide]} is implicit: it can only be sampled. For a log-likelihood use "
                "annealed_importance_sampling(model, x), which needs no guide density; or an explicit guide fitted "
                "afterwards to the frozen model: explicit_guide(model, guide, x) gives one, and evaluate(run, x) does "
                "so by itself"
            )
        if self.local_point_masses:
            raise ValueError(
                f"{what} needs the guide's density, but its distribution at the latent sites "
                f"{self.local_point_masses} is a point mass (Delta), which has none; fit an explicit guide, such as "
                "AmortizedGuide(model, encoder, family=Normal), to the frozen model and pass that"
            )


@contextmanager
def prepared(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    seed: int,
    particles: int = 1,
    rows: int = ROWS,
    guided: bool = True,
    values: bool = True,
) -> Iterator[Prepared]:
    """Check programs, rows and options; meanwhile run in evaluation mode, without gradients, from ``seed``.

    Modes, Pyro's parameter store and the random state are given back afterwards. Plain functions see the parameters
    that Pyro's store holds; modules only their own. Without ``guided`` a guide may be missing, and without ``values``
    x only says how many rows there are.

    Sites may be implicit: nothing here asks for a density.

    Raises:
        TypeError: If ``x`` is neither a tensor nor a sequence of tensors.
        ValueError: If a weight is NaN or infinite.
        ValueError: If x is empty, not finite or not what the model observes; if model and guide do not fit, or there
            is no guide and ``guided`` asks for one; if ``particles`` or ``rows`` is below 1.
    """
    check_counts(or_none=False, **{"the number of particles or draws": particles, "the number of rows": rows})
    with turn():
        check_objects(model=model, guide=guide)
        check_weights(model, guide)
        batch = _placed(x, first_parameter(model, guide))
        check_data(batch)
        still = evaluation_mode(model, guide)
        state = pyro.get_param_store().get_state()
        model, guide = _with_parameters(model, state), guide if guide is None else _with_parameters(guide, state)
        if values:
            check_values(model, Batches(batch, None, len(batch[0]), 0))
        first = tuple(tensor[:2] for tensor in batch)
        if guide is not None:
            check_programs(model, guide, *first)
        elif guided:
            _check_guideless(model, first)
        with (
            still,
            torch.no_grad(),
            pyro.validation_enabled(False),
            pyro.get_param_store().scope(),
            seeded(seed, batch[0].device),
        ):
            yield _prepare(model, guide, batch, first)


def _check_guideless(model: Callable, first: tuple[Tensor, ...]) -> None:
    if latents := latent_sites(prototype(model, *first)):
        raise ValueError(
            f"the model has the latent sites {[*latents]} but there is no guide for them, as after training a GAN, so "
            "nothing is known of them given observations. Fit a guide to the frozen model, such as "
            "AmortizedGuide(model, encoder), and pass that; sample and prior_samples need none"
        )
    check_programs(model, None, *first)


def _prepare(model: Callable, guide: Callable | None, batch: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> Prepared:
    trace = prototype(model, *first)
    nodes, latents = sample_sites(trace), latent_sites(trace)
    for name, node in nodes.items():
        if name not in latents and data_frame(node) is None:
            raise ValueError(
                f"the observed site '{name}' stands outside the plate \"data\", so what it says of one observation is "
                'not clear; put it in `with pyro.plate("data", len(x)):`'
            )
    masses: tuple[str, ...] = ()
    drawn: dict[str, dict[str, Any]] = {}
    if guide is not None:
        drawn = sample_sites(prototype(guide, *first))
        masses = tuple(name for name in latents if is_point_mass(drawn[name]["fn"]))
    locally = [{name: node for name, node in of.items() if data_frame(node) is not None} for of in (drawn, nodes)]
    globally = [{name: node for name, node in of.items() if data_frame(node) is None} for of in (drawn, nodes)]
    return Prepared(
        model,
        guide or no_sites,
        batch,
        latents,
        nodes,
        masses,
        implicit_guide=_sampled(locally[0]),
        implicit_prior=tuple(name for name in _sampled(locally[1]) if name in latents),
        implicit_likelihood=tuple(name for name in _sampled(nodes) if name not in latents),
        implicit_global=_sampled(globally[0] | globally[1]),
        order=tuple(drawn),
    )


def _sampled(nodes: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The sites that can only be sampled."""
    return tuple(name for name, node in nodes.items() if is_implicit(node["fn"]))


def _placed(x: Tensor | Sequence[Tensor], parameter: Tensor | None) -> tuple[Tensor, ...]:
    """Stored tensors as floats on the device and in the precision of a parameter."""
    if not isinstance(x, Tensor) and not (
        isinstance(x, (tuple, list)) and x and all(isinstance(tensor, Tensor) for tensor in x)
    ):
        raise TypeError(
            f"expected x as a tensor (B, *event_shape) or a tuple of tensors, got {type(x).__name__}; of what "
            "pyrogen.data.load returns pass a split, such as data.test"
        )
    check_are(tuple[Tensor, ...], x=(x,) if isinstance(x, Tensor) else x)
    if parameter is None:
        return as_batch(x)
    batch = as_batch(x, parameter.device)
    return tuple(tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor for tensor in batch)


def _with_parameters(program: Callable, state: Any) -> Callable:
    """A plain function with the parameters of a store; a module owns its own."""
    if isinstance(program, nn.Module):
        return program

    @functools.wraps(program)
    def function(*batch: Tensor) -> Any:
        with pyro.get_param_store().scope(state):
            return program(*batch)

    with contextlib.suppress(TypeError, ValueError):  # of what is not written in Python
        function.__signature__ = inspect.signature(program, follow_wrapped=False)  # type: ignore[attr-defined]

    return function


def pair_passes(
    pair: Prepared, particles: int, rows: int, *, copies: int | None = None, closed_form: bool = False
) -> Iterator[tuple[slice, int, Terms]]:
    """Guide and model on ``particles`` copies of each row, in passes of at most ``rows`` rows.

    Copies come first: the encoder sees a row once in a pass, however many its copies. Global sites are drawn once for
    each group of ``copies`` copies, and held while the group goes through the rows. The ratio of an
    implicit latent site counts as 0, and an implicit observed one is left out.

    Yields:
        The rows of a pass, how many copies of them, and its terms.
    """
    for group in groups(particles, rows, copies):
        held: poutine.Trace | None = None
        for part in parts(len(pair.batch[0]), group, rows):
            guide = pair.guide if held is None else poutine.replay(pair.guide, trace=held)
            batch = tuple(tensor[part] for tensor in pair.batch)
            traces = trace_programs(pair.model, guide, batch, group)
            held = held or global_draws(traces.guide)
            unknown = nothing(traces, (*pair.implicit_guide, *pair.implicit_prior, *pair.implicit_global))
            yield part, group, compare_sites(traces, closed_form=closed_form, estimates=unknown)


def passes(
    program: Callable, batch: tuple[Tensor, ...], particles: int, rows: int, *, copies: int | None = None
) -> Iterator[tuple[slice, int, poutine.Trace]]:
    """As :func:`pair_passes` for a single program.

    Yields:
        The rows of a pass, how many copies of them, and the trace.
    """
    for group in groups(particles, rows, copies):
        held: poutine.Trace | None = None
        for part in parts(len(batch[0]), group, rows):
            replayed = program if held is None else poutine.replay(program, trace=held)
            with Copies(group):
                copied = repeat(tuple(tensor[part] for tensor in batch), group)
                trace = trace_of(replayed, *copied)
            held = held or global_draws(trace)
            yield part, group, trace


def groups(particles: int, rows: int, copies: int | None = None) -> Iterator[int]:
    """How many copies at once, so that they are so many particles together."""
    size = min(particles, rows, copies or particles)
    for start in range(0, particles, size):
        yield min(size, particles - start)


def parts(total: int, copies: int, rows: int) -> Iterator[slice]:
    """All of so many rows, as many at once as their copies allow."""
    size = max(1, rows // copies)
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))

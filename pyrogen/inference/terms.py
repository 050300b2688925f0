"""One run of guide and model, and what it says site by site: the log-weights from which every bound is made."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrogen.distributions.implicit import NoDensityError, is_implicit
from pyrogen.distributions.semi_implicit import has_stochastic_density
from pyrogen.inference.divergences import closed_form_kl
from pyrogen.inference.programs import (
    Copies,
    data_frame,
    no_sites,
    observed_sites,
    per_row,
    repeat,
    sample_sites,
    stored_parameters,
    trace_of,
    unregistered,
)

__all__ = [
    "Terms",
    "Traces",
    "compare_sites",
    "frozen",
    "has_no_density",
    "local_sites",
    "nothing",
    "parameters_of",
    "run_programs",
    "trace_programs",
    "unmasked",
    "without_density",
    "without_mask",
]


@dataclass(frozen=True)
class Terms:
    """What one run of guide and model says, site by site, in nats.

    Attributes:
        log_likelihoods: log p(x | z) at each observed site, ``(K, B)``.
        ratios: log q − log p at each per-observation latent site, ``(K, B)``; its expectation where a closed form was
            used.
        global_ratios: The same at each global latent site, and −log p at each global observed site, ``()``.
        observations: How many observations the whole data set has.
        guide_trace, model_trace: The traces themselves, of ``K * B`` rows.
        closed_form: Whether closed-form divergences were asked for and are valid, guide and model drawing their sites
            in the same order.
    """

    log_likelihoods: dict[str, Tensor]
    ratios: dict[str, Tensor]
    global_ratios: dict[str, Tensor]
    observations: int
    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    closed_form: bool

    @property
    def log_likelihood(self) -> Tensor:
        return _total(self.log_likelihoods)

    @property
    def ratio(self) -> Tensor:
        return _total(self.ratios) if self.ratios else torch.zeros_like(self.log_likelihood)

    @cached_property
    def distortion(self) -> Tensor:
        """The mean of -log p(x | z) over particles and rows."""
        return -self.log_likelihood.mean()

    @cached_property
    def rate(self) -> Tensor:
        """The mean of the ratio over particles and rows."""
        return self.ratio.mean()

    @property
    def log_weights(self) -> Tensor:
        """log w of shape ``(K, B)``, without global sites."""
        return self.log_likelihood - self.ratio

    @property
    def global_rate(self) -> Tensor | float:
        """What the global sites add to the loss of each observation: divergences, less log-densities observed."""
        return _total(self.global_ratios) / self.observations if self.global_ratios else 0.0

    def origin_of_nan(self) -> str:
        """Where a value that is not finite appears first."""
        for name, node in sample_sites(self.guide_trace).items():
            if not torch.isfinite(node["value"]).all():
                return f"the draw of the guide's site '{name}'"
            if name in self.ratios and not torch.isfinite(self.ratios[name]).all():
                return f"the log-density ratio of the latent site '{name}'"
            if name in self.global_ratios and not torch.isfinite(self.global_ratios[name]).all():
                return f"the log-density ratio of the global site '{name}'"
        for name, value in self.log_likelihoods.items():
            if not torch.isfinite(value).all():
                return f"the log-likelihood of the observed site '{name}'"
        return "the objective itself, with every site finite"


@dataclass(frozen=True)
class Traces:
    """One run of both programs on K copies of a batch.

    Attributes:
        guide, model: The traces, of ``K * B`` rows; the model's on the guide's draws.
        rows: The tensors that the programs were called with, ``K * B`` rows each.
        features: What the guide's encoder gave for these, ``(K * B, C)``, or None without one.
        particles: The number K.
    """

    guide: poutine.Trace
    model: poutine.Trace
    rows: tuple[Tensor, ...]
    features: Tensor | None
    particles: int


def run_programs(
    model: Callable,
    guide: Callable | None,
    batch: tuple[Tensor, ...],
    particles: int = 1,
    *,
    observations: int | None = None,
    closed_form: bool = False,
    frozen_guide: bool = False,
    through: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Terms:
    """Draw from the guide, run the model on the draws, and compare the two site by site.

    Args:
        model, guide: Programs with the same latent sites.
        batch: Tensors of B rows.
        particles: Number K of copies of each row.
        observations: How many observations the whole data set has; by default what the ``"data"`` plate says.
        closed_form: Use closed-form divergences where they exist and are valid.
        frozen_guide: Evaluate log q with the guide's parameters detached, in a second run of the guide; where there
            are no gradients nothing needs to be.
        through: What the guide's draws pass through before model and log q see them.

    Raises:
        ValueError: If the guide's sites are not the model's latent ones, or one has no reparameterised sample; if a
            site has no density, or one of a frozen guide an estimated density.
    """
    traces = trace_programs(model, guide, batch, particles, frozen_guide=frozen_guide, through=through)
    return compare_sites(traces, observations=observations, closed_form=closed_form)


def trace_programs(
    model: Callable,
    guide: Callable | None,
    batch: tuple[Tensor, ...],
    particles: int = 1,
    *,
    frozen_guide: bool = False,
    through: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Traces:
    """Draw from the guide and run the model on the draws; see :func:`run_programs`."""
    rows, guide = repeat(batch, particles), guide or no_sites
    with Copies(particles) as copies:
        guide_trace = trace_of(guide, *rows)
        if frozen_guide:
            _check_densities_repeat(guide_trace)
        if frozen_guide and torch.is_grad_enabled():
            with copies.again():
                guide_trace = _frozen_replay(guide, guide_trace, rows, through)
        model_trace = trace_of(poutine.replay(model, trace=guide_trace), *rows)
    _check_latents(guide_trace, model_trace)
    parts = [each.flatten(1) for each in copies.features]
    features = torch.cat(parts, -1) if len(parts) > 1 else next(iter(parts), None)
    return Traces(guide_trace, model_trace, rows, features, particles)


def compare_sites(
    traces: Traces,
    *,
    observations: int | None = None,
    closed_form: bool = False,
    estimates: Mapping[str, Tensor] | None = None,
) -> Terms:
    """Compare guide and model site by site.

    Args:
        traces: Of both.
        observations, closed_form: As for :func:`run_programs`.
        estimates: Ratios log q − log p in the batch shape of their sites, in place of what densities say. Where they
            are given, observed sites without a density count as nothing.

    Raises:
        ValueError: If a site has neither a density nor an estimate.
    """
    drawn, modelled = sample_sites(traces.guide), sample_sites(traces.model)
    latents = [name for name, node in modelled.items() if not node["is_observed"]]
    same_order = closed_form and [name for name in drawn if name in modelled] == latents
    given = estimates or {}
    ratios, global_ratios, log_likelihoods = {}, {}, {}
    for name, q in drawn.items():
        if q["is_observed"]:
            continue
        p = modelled.get(name)
        if name not in given and has_no_density(q, p):
            raise NoDensityError(_why_no_ratio(name, p))
        ratio = per_row(p or q, _masked(given[name], p)) if name in given else _ratio(q, p, same_order)
        if data_frame(p or q) is None:
            global_ratios[name] = ratio
        else:
            ratios[name] = ratio.view(traces.particles, -1)
    for name, node in observed_sites(traces.model).items():
        if is_implicit(node["fn"]):
            if estimates is None:
                raise NoDensityError(without_density(name, observed=True))
            continue
        log_prob = per_row(node, node["fn"].log_prob(node["value"]))
        if data_frame(node) is None:
            global_ratios[name] = -log_prob
        else:
            log_likelihoods[name] = log_prob.view(traces.particles, -1)
    if not log_likelihoods and estimates is None:
        raise ValueError('the model observes nothing in the plate "data"; give a site in it obs=x')
    total = observations or _observations(traces.model, modelled, len(traces.rows[0]) // traces.particles)
    return Terms(log_likelihoods, ratios, global_ratios, total, traces.guide, traces.model, same_order)


def has_no_density(*nodes: dict[str, Any] | None) -> bool:
    """Whether a side of a site is implicit."""
    return any(node is not None and is_implicit(node["fn"]) for node in nodes)


def without_density(name: str, *, observed: bool = False) -> str:
    """What to say of a site without a density where one is needed."""
    if observed:
        return (
            f"the observed site '{name}' has no density: its distribution is implicit and can only be sampled. Train "
            "with an objective whose critic sees the data (VGH, VGHPlusPlus, AlphaGAN, VAEGAN, ALI; GAN for a model "
            "without a guide), or by WAE(cost='squared error'), or give it a likelihood with a density"
        )
    return (
        f"site '{name}' has no density: its distribution is implicit and can only be sampled. Train with an objective "
        "that estimates the ratio (AVB, AAE, WAE, VGH, VGHPlusPlus, AlphaGAN, VAEGAN, ALI; GAN for a model without a "
        "guide), or use an explicit family such as Normal or Flow"
    )


def _why_no_ratio(name: str, p: dict[str, Any] | None) -> str:
    if p is None:
        return f"the guide's helper site '{name}' is implicit, and no critic is for it; give it an explicit family"
    if data_frame(p) is None:
        return (
            f"the global site '{name}' is implicit; one draw of it in a step is too little for a critic. Give it an "
            "explicit family such as Normal or Flow"
        )
    return without_density(name)


def local_sites(traces: Traces) -> list[str]:
    """The guide's sites, helpers counted, that are drawn for each observation."""
    modelled = sample_sites(traces.model)
    return [
        name
        for name, node in sample_sites(traces.guide).items()
        if not node["is_observed"] and data_frame(modelled.get(name, node)) is not None
    ]


def nothing(traces: Traces, names: Iterable[str]) -> dict[str, Tensor]:
    """Ratios of nothing, for sites whose densities shall not be asked for."""
    nodes: dict[str, Any] = {name: traces.model.nodes.get(name) or traces.guide.nodes[name] for name in names}
    return {name: node["value"].new_zeros(node["fn"].batch_shape) for name, node in nodes.items()}


def unmasked(fn: Any) -> tuple[Any, Any]:
    """A distribution without its mask, and that mask or None."""
    return (fn.base_dist, fn._mask) if isinstance(fn, dist.MaskedDistribution) else (fn, None)


def without_mask(node: dict[str, Any]) -> dict[str, Any]:
    """A site with nothing masked, nor single values of an event: what a mask leaves idle is drawn from its prior all
    the same, and only the likelihood leaves it out."""

    def bare(fn: Any) -> Any:
        if isinstance(fn, dist.Independent):
            return bare(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
        return bare(fn.base_dist) if isinstance(fn, dist.MaskedDistribution) else fn

    return node | {"mask": None, "fn": bare(node["fn"])}


def _masked(ratio: Tensor, p: dict[str, Any] | None) -> Tensor:
    """Where the model masks a site out, as at the observed rows of one with obs_mask, the guide's draw is idle."""
    mask = None if p is None else unmasked(p["fn"])[1]
    return ratio if mask is None else scale_and_mask(ratio, mask=mask)


def _ratio(q: dict[str, Any], p: dict[str, Any] | None, closed_form: bool) -> Tensor:
    """log q − log p at one site, per row; its expectation where the closed form may be used."""
    if p is None:  # a helper site of the guide
        return per_row(q, q["fn"].log_prob(q["value"]))
    prior, _ = unmasked(p["fn"])
    kl = closed_form_kl(q["fn"], prior) if closed_form else None
    if kl is None:
        kl = q["fn"].log_prob(q["value"]) - prior.log_prob(q["value"])
    return per_row(p, _masked(kl, p))


def _observations(trace: poutine.Trace, sites: dict[str, dict[str, Any]], rows: int) -> int:
    frame = next((frame for frame in map(data_frame, sites.values()) if frame is not None), None)
    if frame is None:
        raise ValueError('no site stands in the plate "data"; write `with pyro.plate("data", len(x)):`')
    if frame.full_size is None:
        return rows
    subsamples = getattr(trace.nodes["data"]["fn"], "subsample_size", None) is not None
    return rows if frame.full_size == frame.size and not subsamples else frame.full_size


def _check_latents(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    drawn = {name: node for name, node in sample_sites(guide_trace).items() if not node["is_observed"]}
    latents = [name for name, node in sample_sites(model_trace).items() if not node["is_observed"]]
    needed = {name for name, node in drawn.items() if not node["infer"].get("is_auxiliary")}
    if needed != set(latents):
        raise ValueError(
            f"the guide must draw exactly the model's latent sites {latents}; missing: "
            f"{sorted(set(latents) - needed) or 'none'}, extra: {sorted(needed - set(latents)) or 'none'}"
        )
    if torch.is_grad_enabled():
        for name, node in drawn.items():
            if not node["fn"].has_rsample:
                raise ValueError(
                    f"the guide's distribution at site '{name}', a {type(node['fn']).__name__}, has no reparameterised "
                    "sample, so it gets no gradient; use a continuous family with rsample"
                )


def _check_densities_repeat(guide_trace: poutine.Trace) -> None:
    """Raise a ``ValueError`` where a second run of the guide can't give its draws the densities of the first."""
    for name, node in sample_sites(guide_trace).items():
        # Held at fixed noise, the gradient would be as right as elsewhere: given all the noise a draw comes from the
        # very mixture that scores it. But the second run has noise of its own, so its estimate bounds nothing.
        if not node["is_observed"] and has_stochastic_density(node["fn"]):
            raise ValueError(
                f"the guide's density at site '{name}' is an estimate that needs the noise of the draw (SemiImplicit); "
                "gradients with the guide's parameters held fixed (sticking_the_landing=True, "
                "gradient='doubly reparameterised') score the draw in a second run, which does not know that noise. "
                "Use ELBO() or IWAE(gradient='standard')"
            )


def _frozen_replay(
    guide: Callable,
    trace: poutine.Trace,
    rows: tuple[Tensor, ...],
    through: Callable[[dict[str, Any]], Tensor] | None,
) -> poutine.Trace:
    """The guide run again on its own draws, its parameters taken as constants.

    Where draws pass through something, global ones are constants in what follows from them, and keep the density of
    the first run: the weights are of per-observation sites, whose gradient reaches global ones along the draws alone.
    """
    held, fixed = trace, dict[str, dict[str, Any]]()
    if through is not None:
        held = poutine.Trace()
        for name, node in sample_sites(trace).items():
            fixed |= {name: node} if data_frame(node) is None else {}
            held.add_node(name, **node | {"value": node["value"].detach() if name in fixed else through(node)})
    with frozen(parameters_of(guide, trace)):
        scored: Any = trace_of(poutine.replay(unregistered(guide), trace=held), *rows)
    for name, node in fixed.items():
        scored.nodes[name] = node
    return scored


def parameters_of(program: Any, trace: poutine.Trace) -> list[Tensor]:
    """The parameters of a program: those in a trace of it, and its own where it is a module."""
    found = stored_parameters(trace)
    return [*found, *program.parameters()] if hasattr(program, "parameters") else found


@contextmanager
def frozen(parameters: list[Tensor]) -> Iterator[None]:
    """Leaves that are constants in whatever graph is built meanwhile; graphs already built keep their gradients."""
    trained = [p for p in {id(p): p for p in parameters}.values() if p.is_leaf and p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # pyro.module warns of every parameter that needs no gradient.
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _total(values: dict[str, Tensor]) -> Tensor:
    total, *others = values.values()
    for value in others:
        total = total + value
    return total

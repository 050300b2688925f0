"""Posteriors for ArviZ: draws, densities and importance weights in named dimensions."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
import xarray
from pyro import poutine
from torch import Tensor

from pyrogen.evaluation.running import ROWS, Prepared, by_row, pair_passes, passes, prepared
from pyrogen.inference.programs import data_frame, sample_sites
from pyrogen.inference.run import Run
from pyrogen.inference.terms import Terms

__all__ = ["assemble", "to_arviz"]

Groups: TypeAlias = dict[str, xarray.Dataset]
Variables: TypeAlias = dict[str, tuple[tuple[str, ...], Tensor]]

_FEWEST_FOR_PARETO = 25
"""Draws below which the tail, a fifth of them, has fewer than the five values that a fit takes."""
_EQUAL = 1e-3
"""Log-weights that differ by less, in nats, are equal as far as any estimate can show."""


def to_arviz(
    run: Run,
    x: Tensor | Sequence[Tensor],
    *,
    draws: int = 1000,
    chains: int = 4,
    prior_draws: int = 500,
    predictive_draws: int = 25,
    seed: int = 0,
    rows: int = ROWS,
) -> Any:
    r"""Draw from a run's posterior and prior, for every analysis and plot that ArviZ has.

    ==================== ===================================================================================
    group                variables and their dimensions
    ==================== ===================================================================================
    posterior            each latent site ``(chain, draw, observation, ...)``; a global one without observation
    posterior_predictive each observed site, for ``predictive_draws`` evenly spaced draws of each chain
    log_likelihood       log p(x | z) at each observed site in nats, ``(chain, draw, observation)``
    sample_stats         ``log_weight`` ``(chain, draw, observation)`` in nats and ``pareto_k`` ``(observation)``
    prior                each latent site for ``prior_draws`` draws in one chain
    prior_predictive     each observed site for the first ``predictive_draws`` of these
    observed_data        x, ``(observation, ...)``
    ==================== ===================================================================================

    Dimensions are named after the site: ``z_dim``; ``x_channel, x_row, x_column`` for an observation of three
    dimensions; ``z_dim_0, z_dim_1, ...`` for other shapes. Nested plates give theirs their own names. Predictive draws
    keep the numbers of the draws that they belong to.

    A guide's draws are independent, so chains are only parts of one sample; with several of them R̂ and effective
    sample sizes are defined, and tell nothing about whether the guide fits. That is told by the importance weights

    .. math:: \log w = \log p(x, z \mid \theta) - \log q(z \mid x, \theta)

    and by the shape k̂ of their tail, fitted by Pareto smoothing over all draws: below 0.5 the guide is good, above 0.7
    it is not to be trusted (Yao, Vehtari, Simpson & Gelman 2018, *Yes, but did it work?*, 1802.02538). Weights that
    are all equal have no tail, and get 0. k̂ needs 25 draws in all. Neither is defined where the guide has a point
    mass, nor known where guide or model have an implicit site: both are left out then, and the rest of ``sample_stats``
    with them. What a critic makes of the ratio is no weight. An implicit observed site has no ``log_likelihood``. With
    global sites a weight is that of the observation's own latents given θ, and ``log_weight_global``
    ``(chain, draw)``, log p(θ) − log q(θ), stands beside it.

    Memory: besides posterior and densities, ``(chains * predictive_draws + predictive_draws) * B`` observations are
    kept.

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        draws: Draws of each chain.
        chains: Number of chains.
        prior_draws: Draws from the prior; 0 leaves the prior's groups out.
        predictive_draws: Predictive draws of each chain; 0 leaves the predictive groups out.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: If a number of draws is out of range, there is no guide, as after training a GAN, or programs and
            observations do not fit.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(), data, epochs=1, progress=False)
        >>> tree = to_arviz(run, data.test[:3], draws=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 4, 'draw': 10, 'observation': 3, 'z_dim': 2}
    """
    for name, value, least in (
        ("draws", draws, 1),
        ("chains", chains, 1),
        ("prior_draws", prior_draws, 0),
        ("predictive_draws", predictive_draws, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    with prepared(run.model, run.guide, x, seed=seed, rows=rows) as pair:
        frame = _Frame(pair, chains, draws)
        posterior = _Posterior(frame, min(predictive_draws, draws))
        posterior.collect(rows)
        groups = posterior.groups()
        if prior_draws:
            groups |= _prior_groups(frame, prior_draws, min(predictive_draws, prior_draws), rows)
    attributes = _attributes(run)
    filled = {name: group.assign_attrs(attributes) for name, group in groups.items() if group.data_vars}
    return assemble(filled, major=_arviz_major())


def assemble(groups: Mapping[str, xarray.Dataset], *, major: int) -> Any:
    """Put groups together into what a major version of ArviZ works with.

    Args:
        groups: Data sets by the names that ArviZ gives to groups.
        major: 0 for an ``arviz.InferenceData``, 1 or more for an ``xarray.DataTree``.

    Example:
        >>> tree = assemble({"posterior": xarray.Dataset({"z": ("draw", [1.0, 2.0])})}, major=1)
        >>> tree["posterior/z"].sizes["draw"]
        2
    """
    if major >= 1:
        return xarray.DataTree.from_dict(dict(groups))
    return _import("arviz").InferenceData(**groups)


def _arviz_major() -> int:
    """The installed ArviZ's major version; its parts without the whole count as 1."""
    for package in ("arviz", "arviz-base"):
        try:
            number = int(version(package).split(".")[0])
        except PackageNotFoundError:
            continue
        return number if package == "arviz" else 1
    raise ModuleNotFoundError("to_arviz needs ArviZ; install it with: pip install arviz")


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        # ArviZ 0.x announces 1.x once a day; both are served here, so there is nothing for the user to do.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        return importlib.import_module(name)


@dataclass(frozen=True)
class _Frame:
    """The dimensions in which the draws of the sites stand."""

    pair: Prepared
    chains: int
    draws: int

    def is_global(self, name: str) -> bool:
        return data_frame(self.pair.nodes[name]) is None

    def of_draws(self, name: str) -> tuple[str, ...]:
        """The dimensions of a site's draws."""
        rows = () if self.is_global(name) else ("observation",)
        return ("chain", "draw", *rows, *_dims(name, self.pair.nodes[name]))

    def by_chain(self, values: Tensor) -> Tensor:
        """``(chains * draws, ...)`` gives ``(chains, draws, ...)``."""
        return values.unflatten(0, (self.chains, -1))

    def dataset(self, variables: Variables, draw: np.ndarray | None = None) -> xarray.Dataset:
        """Tensors in named dimensions, with coordinates that count, but for the draws' numbers where given."""
        arrays = {name: (dims, value.detach().cpu().numpy()) for name, (dims, value) in variables.items()}
        sizes = {dim: size for dims, array in arrays.values() for dim, size in zip(dims, array.shape, strict=True)}
        coordinates = {dim: np.arange(size) for dim, size in sizes.items()}
        if draw is not None and "draw" in coordinates:
            coordinates["draw"] = draw
        return xarray.Dataset(arrays, coords=coordinates)


def _dims(name: str, node: dict[str, Any]) -> tuple[str, ...]:
    """Names for the nested plates around a site, and for its event."""
    plates = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.vectorized and frame.name != "data"}
    event_dim = node["fn"].event_dim
    batch = len(node["value"].shape) - event_dim
    data = data_frame(node)
    outer = [
        plates.get(dim, f"{name}_batch_{dim + batch}") for dim in range(-batch, 0) if data is None or dim != data.dim
    ]
    outer = [f"{plate}_plate" if plate in ("chain", "draw", "observation") else plate for plate in outer]
    if event_dim == 3 and node["is_observed"]:
        return (*outer, f"{name}_channel", f"{name}_row", f"{name}_column")
    if event_dim == 1:
        return (*outer, f"{name}_dim")
    return (*outer, *(f"{name}_dim_{axis}" for axis in range(event_dim)))


class _Draws:
    """Draws of one variable, collected pass by pass into one tensor on the CPU."""

    def __init__(self, draws: int, observations: int | None) -> None:
        self.leading = (draws,) if observations is None else (draws, observations)
        self.values: Tensor | None = None

    def put(self, value: Tensor, start: int, part: slice) -> None:
        """Put in ``(K, B, ...)``, or ``(...)`` of a global site."""
        value = value.detach().cpu()
        local = len(self.leading) == 2
        if self.values is None:
            self.values = value.new_empty(*self.leading, *value.shape[2 if local else 0 :])
        if local:
            self.values[start : start + len(value), part] = value
        else:
            self.values[start] = value

    @property
    def all(self) -> Tensor:
        if self.values is None:
            raise RuntimeError("no pass has put anything in")
        return self.values


class _Posterior:
    """All that rests on draws from the guide, collected pass by pass."""

    def __init__(self, frame: _Frame, predictive: int) -> None:
        pair, draws = frame.pair, frame.chains * frame.draws
        self.frame, self.count = frame, len(pair.batch[0])
        self.kept = np.arange(predictive) * (frame.draws // max(predictive, 1))
        self.numbers = (np.arange(frame.chains)[:, None] * frame.draws + self.kept).ravel()
        self.latents = {name: _Draws(draws, None if frame.is_global(name) else self.count) for name in pair.latents}
        self.densities = {
            name: _Draws(draws, self.count) for name in pair.observed if name not in pair.implicit_likelihood
        }
        self.predicted = {name: _Draws(len(self.numbers), self.count) for name in pair.observed}
        self.observed = {name: _Draws(1, self.count) for name in pair.observed}
        self.weighted = pair.has_rate and not pair.implicit_likelihood
        self.weights, self.global_weights = _Draws(draws, self.count), _Draws(draws, None)

    def collect(self, rows: int) -> None:
        pair, draws = self.frame.pair, self.frame.chains * self.frame.draws
        start = 0
        for part, copies, terms in pair_passes(pair, draws, rows, copies=1 if pair.has_global else None):
            self._put(terms, copies, start, part)
            start += copies if part.stop == self.count else 0

    def _put(self, terms: Terms, copies: int, start: int, part: slice) -> None:
        nodes = sample_sites(terms.model_trace)
        for name, into in self.latents.items():
            into.put(by_row(nodes[name], nodes[name]["value"], copies), start, part)
        for name, into in self.densities.items():
            into.put(terms.log_likelihoods[name], start, part)
        if start == 0:
            for name, into in self.observed.items():
                into.put(by_row(nodes[name], nodes[name]["value"], copies)[:1], 0, part)
        if self.weighted:
            self.weights.put(terms.log_weights, start, part)
        if terms.global_ratios:
            self.global_weights.put(-sum(terms.global_ratios.values(), start=torch.zeros(())), start, part)
        first, last = np.searchsorted(self.numbers, [start, start + copies])
        if first < last:
            wanted = torch.as_tensor(self.numbers[first:last] - start)
            for name, into in self.predicted.items():
                value = by_row(nodes[name], nodes[name]["fn"].sample(), copies)
                into.put(value[wanted.to(value.device)], int(first), part)

    def groups(self) -> Groups:
        frame, by_chain = self.frame, self.frame.by_chain
        groups: dict[str, Variables] = {
            "posterior": {name: (frame.of_draws(name), by_chain(v.all)) for name, v in self.latents.items()},
            "log_likelihood": {
                name: (("chain", "draw", "observation"), by_chain(v.all)) for name, v in self.densities.items()
            },
            "sample_stats": self._statistics(),
            "observed_data": {name: (frame.of_draws(name)[2:], v.all[0]) for name, v in self.observed.items()},
        }
        datasets = {name: frame.dataset(variables) for name, variables in groups.items()}
        if len(self.kept):
            predicted = {name: (frame.of_draws(name), by_chain(v.all)) for name, v in self.predicted.items()}
            datasets["posterior_predictive"] = frame.dataset(predicted, draw=self.kept)
        return datasets

    def _statistics(self) -> Variables:
        """Importance weights and the shape of their tails."""
        pair, by_chain = self.frame.pair, self.frame.by_chain
        found: Variables = {}
        if not self.weighted:
            return found
        log_w = self.weights.all
        if pair.local:
            found["log_weight"] = (("chain", "draw", "observation"), by_chain(log_w))
            if len(log_w) >= _FEWEST_FOR_PARETO:
                k = pareto_k(log_w.T.double().numpy(), major=_arviz_major())
                if k is not None:
                    found["pareto_k"] = (("observation",), torch.as_tensor(k))
        if pair.has_global and pair.has_global_rate:
            found["log_weight_global"] = (("chain", "draw"), by_chain(self.global_weights.all))
        return found


def pareto_k(log_weights: np.ndarray, *, major: int) -> np.ndarray | None:
    """Shape k̂ of the generalised Pareto tail of importance weights, by ArviZ of a major version.

    Args:
        log_weights: ``(B, S)`` in nats.
        major: Of ArviZ.

    Returns:
        ``(B,)``; infinite where a fit failed; None if ArviZ's statistics are not installed.
    """
    equal = log_weights.max(-1) - log_weights.min(-1) < _EQUAL
    shapes = np.zeros(len(log_weights))
    try:
        for row in np.flatnonzero(~equal):
            shapes[row] = _fit_tail(log_weights[row], major)
    except ModuleNotFoundError:
        return None
    return shapes


def _fit_tail(log_weights: np.ndarray, major: int) -> float:
    if major < 1:
        return float(_import("arviz").psislw(log_weights)[1])
    try:
        # ArviZ 1.x takes log-likelihoods, whose negatives are its log-weights.
        return float(_import("arviz_stats.base").array_stats.psislw(-log_weights)[1])
    except ValueError:  # a tail of equal values, of which ArviZ 0.x makes infinity
        return np.inf


def _prior_groups(frame: _Frame, draws: int, predictive: int, rows: int) -> Groups:
    """Draws of every site from the model alone."""
    pair = frame.pair
    count = len(pair.batch[0])
    latents = {name: _Draws(draws, None if frame.is_global(name) else count) for name in pair.latents}
    predicted = {name: _Draws(predictive, count) for name in pair.observed}
    program, start = poutine.uncondition(pair.model), 0
    for part, copies, trace in passes(program, pair.batch, draws, rows, copies=1 if pair.has_global else None):
        nodes = sample_sites(trace)
        for name, into in latents.items():
            into.put(by_row(nodes[name], nodes[name]["value"], copies), start, part)
        if start < predictive:
            for name, into in predicted.items():
                into.put(by_row(nodes[name], nodes[name]["value"], copies)[: predictive - start], start, part)
        start += copies if part.stop == count else 0
    groups = {"prior": frame.dataset({name: (frame.of_draws(name), v.all[None]) for name, v in latents.items()})}
    if predictive:
        variables = {name: (frame.of_draws(name), v.all[None]) for name, v in predicted.items()}
        groups["prior_predictive"] = frame.dataset(variables)
    return groups


def _attributes(run: Run) -> dict[str, str]:
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyrogen",
        "creation_library_version": version("pyrogen"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "objective": repr(run.objective),
    }

"""Whether a guide's draws are those of the posterior, by simulations from the model; its density is not asked for."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to
from scipy import stats
from torch import Tensor

from pyrogen.evaluation.running import ROWS, Prepared, by_row, check_counts, parts, passes, prepared
from pyrogen.inference.checkpoints import seeded
from pyrogen.inference.draws import is_masked
from pyrogen.inference.programs import is_real, per_row, repeat, row_axis, sample_sites

__all__ = ["TARP", "SimulationBasedCalibration", "UnitRanks", "ecdf_band", "simulation_based_calibration", "tarp"]

LEVEL = 0.05
"""The p-value up to which a unit is said to fail."""

FEWEST = 20
"""Simulations below which hardly any error could be seen."""

SHIFT = 2.0
"""How far, in standard deviations of each unit, reference points are moved from the posterior."""

_SPREAD_DRAWS = 16
"""Draws of each of some observations from which the guide's standard deviations come."""

Quantity = Callable[..., Tensor]
Reference = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class UnitRanks:
    """The ranks of one unit.

    Attributes:
        ranks: ``(simulations,)``.
        draws: Number L of the guide's draws for each simulation.
        p_value, adjusted: Of their uniformity, by itself and among all units.
    """

    ranks: Tensor
    draws: int
    p_value: float
    adjusted: float

    @property
    def fault(self) -> str:
        """In a word what is wrong with the draws, by the mean or the spread of ranks, whichever is farther off."""
        u = (self.ranks.double() + 0.5) / (self.draws + 1)
        off = (u.mean() - 0.5) * math.sqrt(12)
        spread = ((u - 0.5).square().mean() - 1 / 12) * math.sqrt(180)
        if off.abs() >= spread.abs():
            return "draws too low" if off > 0 else "draws too high"
        return "draws too narrow" if spread > 0 else "draws too wide"

    @property
    def shares(self) -> Tensor:
        """The share of ranks that are below 0, ..., L + 1, ``(L + 2,)``."""
        return _below(self.ranks, self.draws) / len(self.ranks)


@dataclass(frozen=True, eq=False)
class SimulationBasedCalibration:
    """Ranks of what the model drew among the guide's draws; uniform on 0, ..., L if the guide is exact.

    Attributes:
        ranks: By site, and by test quantity, ``(simulations, *unit)``, with the shape of a site's value for one
            observation.
        draws: Number L of the guide's draws for each simulation.
    """

    ranks: dict[str, Tensor]
    draws: int

    @property
    def simulations(self) -> int:
        """How many simulations there are."""
        return len(next(iter(self.ranks.values())))

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """Of the uniformity of each unit's ranks, ``(*unit)``; each has its nominal level by itself."""
        uniform = _UniformRanks(self.simulations, self.draws)
        return {name: uniform.p_values(ranks) for name, ranks in self.ranks.items()}

    @cached_property
    def adjusted(self) -> dict[str, Tensor]:
        """The same, adjusted for their number by Holm's procedure, which holds however units depend on each other."""
        flat = torch.cat([p.flatten() for p in self.p_values.values()])
        order = flat.argsort()
        steps = (flat[order] * torch.arange(len(flat), 0, -1)).cummax(0).values.clamp(max=1)
        pieces = torch.empty_like(flat).scatter(0, order, steps).split([p.numel() for p in self.p_values.values()])
        named = zip(self.p_values.items(), pieces, strict=True)
        return {name: piece.view_as(p) for (name, p), piece in named}

    @cached_property
    def units(self) -> dict[str, UnitRanks]:
        """Every unit by its name, such as ``"z[0]"``."""
        found = {}
        for name, p in self.p_values.items():
            for place in np.ndindex(*p.shape):
                ranks = self.ranks[name][(slice(None), *place)]
                values = float(p[place]), float(self.adjusted[name][place])
                found[f"{name}{[*place]}" if place else name] = UnitRanks(ranks, self.draws, *values)
        return found

    @property
    def p_value(self) -> float:
        """Of all units together: the smallest p-value times their number (Bonferroni), at most 1."""
        return min(unit.adjusted for unit in self.units.values())

    @property
    def failing(self) -> dict[str, str]:
        """The units with an adjusted p-value up to 0.05, worst first, and what is wrong with the draws there."""
        found = {at: unit for at, unit in self.units.items() if unit.adjusted <= LEVEL}
        return {at: unit.fault for at, unit in sorted(found.items(), key=lambda item: item[1].p_value)}

    def __str__(self) -> str:
        failing = [f"{at} ({fault})" for at, fault in self.failing.items()]
        more = f" and {len(failing) - 8} more" if len(failing) > 8 else ""
        return (
            f"simulation-based calibration p = {self.p_value:.3g} for all of {len(self.units)} units; "
            f"{'failing: ' + ', '.join(failing[:8]) + more if failing else 'none fails'}; "
            f"{self.simulations} simulations with {self.draws} draws"
        )


@dataclass(frozen=True, eq=False)
class TARP:
    """How often credible regions around random reference points cover what the model drew.

    Attributes:
        ranks: How many of a simulation's draws are closer to its reference than what the model drew,
            ``(simulations,)``; uniform on 0, ..., L if the guide is exact.
        draws: Number L of the guide's draws for each simulation.
    """

    ranks: Tensor
    draws: int

    @property
    def simulations(self) -> int:
        """How many simulations there are."""
        return len(self.ranks)

    @property
    def levels(self) -> Tensor:
        """Credibility levels, ``(L + 2,)``, from 0 to 1."""
        return torch.arange(self.draws + 2, dtype=torch.float64) / (self.draws + 1)

    @property
    def coverage(self) -> Tensor:
        """The share of simulations that regions of these levels cover, ``(L + 2,)``; by an exact guide the level."""
        return _below(self.ranks, self.draws) / self.simulations

    @cached_property
    def p_value(self) -> float:
        """Of the coverage being that of an exact guide."""
        return float(_UniformRanks(self.simulations, self.draws).p_values(self.ranks))

    def __str__(self) -> str:
        off = self.coverage - self.levels
        worst = int(off.abs().argmax())
        return (
            f"expected coverage p = {self.p_value:.3g}: {self.coverage[worst]:.3f} at credibility "
            f"{self.levels[worst]:.3f}, where it is farthest off; {self.simulations} simulations with "
            f"{self.draws} draws"
        )


def simulation_based_calibration(
    model: Callable,
    guide: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    simulations: int = 1000,
    draws: int = 99,
    log_likelihood: bool = True,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> SimulationBasedCalibration:
    r"""Rank what the model draws among the guide's draws given what it shows: all ranks are as likely, if it is exact.

    .. math:: (z^*, x^*) \sim p(z, x), \quad z_1, \dots, z_L \sim q(z \mid x^*), \quad
        r = \sum_{l=1}^{L} 1[f(z_l, x^*) < f(z^*, x^*)] \sim \text{uniform on } \{0, \dots, L\}

    for every f, where q(z|x) = p(z|x). Here f is each unit of each latent site, the log-likelihood log p(x|z), and what
    ``quantities`` names. Talts, Betancourt, Simpson, Vehtari & Gelman 2018, *Validating Bayesian inference algorithms
    with simulation-based calibration*, 1804.06788. Units alone can't tell a guide that gives the prior, nor one whose
    marginals are right and whose correlations are not; functions of the data, such as the likelihood, can (Modrák,
    Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari 2023, 2211.02383), and so can :func:`tarp`.

    Only draws are asked for, so guides may be implicit. It is the model's own observations that a guide is judged by:
    of a model that does not fit its data the guide may be right here and wrong there, and the other way round.

    The p-value is that of the largest departure of the ranks' distribution function, as measured by its binomial tail
    probability at each of the L values of a rank (Säilynoja, Bürkner & Vehtari 2022, *Graphical test for discrete
    uniformity*, 2103.10522); it is exact, by a recursion over these values. By the numbers of simulations and
    draws that are the default, a scale off by a fifth, in two units, was found in 200 of 200 runs.

    Each row is a simulation of its own, and all are run in batches. With global sites a whole data set of N rows is
    one simulation, in which the ranks are those of the global sites and of one row chosen at random; the guide has to
    read its global sites off the data set, and is run once for each draw.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take. The observations are
            replaced by simulated ones and only say how many rows a data set has; other tensors, such as covariates, are
            used, their rows in random order and as often as needed.
        simulations: Their number, at least 20.
        draws: Number L of the guide's draws for each simulation. L + 1 is best divisible by many numbers.
        log_likelihood: Whether log p(x|z) is ranked as well, under the name ``"log_likelihood"``, where the model has
            one. It costs a run of the model for each draw.
        quantities: By name, further functions: from the latents by site, ``(K, B, *unit)``, and the tensors that the
            programs take, ``(B, ...)``, to ``(K, B, *shape)``. They are called as ``f(latents, x, ...)``.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Raises:
        ValueError: If the guide has a point mass, a site is masked, what is observed is computed from the data, there
            are too few simulations, the guide's global sites do not depend on the data, or programs and observations do
            not fit.
        ArithmeticError: If a draw or a quantity is not finite.

    Example:
        >>> import pyro
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", toy.posterior(x))
        >>> found = simulation_based_calibration(toy.model, guide, toy.x, simulations=200)
        >>> found.ranks["z"].shape, found.failing
        (torch.Size([200, 2]), {})
    """
    with _prepared(model, guide, x, simulations, draws, seed, rows) as pair:
        if taken := {"log_likelihood", *pair.latents} & (quantities or {}).keys():
            raise ValueError(
                f"the quantities {sorted(taken)} have the names of sites or of log_likelihood; rename them"
            )
        known = log_likelihood and not pair.implicit_likelihood
        found = _Quantities(pair, known, quantities or {})
        ranks: dict[str, list[Tensor]] = {}
        for simulated in _simulated(pair, simulations, rows):
            truth = found(simulated.latents, simulated.trace, simulated, slice(None), 1)
            less = {name: value.new_zeros(value.shape[1:], dtype=torch.long) for name, value in truth.items()}
            equal = {name: value.clone() for name, value in less.items()}
            for part, copies, latents, trace in _draws(pair, simulated, draws, rows):
                for name, value in found(latents, trace, simulated, part, copies).items():
                    less[name][part] += (value < truth[name][:, part]).sum(0)
                    equal[name][part] += (value == truth[name][:, part]).sum(0)
            for name, value in less.items():
                ranks.setdefault(name, []).append(_broken(value, equal[name]).cpu())
        return SimulationBasedCalibration({name: torch.cat(pieces) for name, pieces in ranks.items()}, draws)


def tarp(
    model: Callable,
    guide: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    simulations: int = 1000,
    draws: int = 99,
    reference: Reference | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> TARP:
    r"""Test the coverage of credible regions around random reference points, of all latents of an observation together.

    .. math:: (z^*, x^*) \sim p(z, x), \quad z_1, \dots, z_L \sim q(z \mid x^*), \quad
        r = \sum_{l=1}^{L} 1[d(z_l, \bar z) < d(z^*, \bar z)], \quad
        \text{coverage}(\tfrac{j}{L+1}) = \Pr(r < j)

    A region of credibility j / (L + 1) is the ball around the reference :math:`\bar z` that the j-th closest draw
    ends, and the ranks of an exact guide are uniform for every choice of a reference that does not know z*; were they
    uniform for all choices, the guide would be exact. Lemos, Coogan, Hezaveh & Perreault-Levasseur 2023,
    *Sampling-based accuracy testing of posterior estimators for general inference*, 2302.03026. The p-value is that of
    :func:`simulation_based_calibration`.

    **References.** Points that do not depend on x can't tell the prior from the posterior, and points that the guide
    draws can't either, if it gives the prior; points that lie on all sides of a posterior alike do not show that it is
    shifted. So here a reference is what the model drew together with another observation, the closest to x of as many
    as there are simulations: about a draw from the posterior, by no means of the guide. It is then moved by two
    standard deviations of every unit, up or down as was drawn once for all simulations. From there the scale shows
    most, then correlations, and a shift as far as it is along that direction (for shifts of single units
    :func:`simulation_based_calibration` has more power).

    **Distances** are Euclidean, of all units on unconstrained scales, each divided by the guide's standard deviation
    given x on average, which other simulations tell; so a unit that the data say nothing of does not hide the others.

    With global sites, the vector is that of the global sites and of one row of a data set chosen at random.

    Args:
        model, guide, x, simulations, draws, seed, rows: See :func:`simulation_based_calibration`.
        reference: Another choice: a function of the tensors that the programs take, of B simulated rows, that returns
            the latents by site, ``(B, *nested plates, *event)``, or ``(*plates, *event)`` of a global site.

    Raises:
        ValueError, ArithmeticError: As :func:`simulation_based_calibration`.

    Example:
        >>> import pyro
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", toy.posterior(x))
        >>> tarp(toy.model, guide, toy.x, simulations=200).p_value > 0.05
        True
    """
    with _prepared(model, guide, x, simulations, draws, seed, rows) as pair:
        pilot = _Pilot(pair, simulations, rows)
        ranks = []
        for simulated in _simulated(pair, simulations, rows):
            if reference is None:
                points = pilot.near(simulated)
            else:
                points = _vector(pair, _chosen(pair, reference(*simulated.batch), simulated))
            truth = pilot.distance(_vector(pair, simulated.latents), points)
            less = truth.new_zeros(truth.shape[1], dtype=torch.long)
            equal = less.clone()
            for part, _, latents, _ in _draws(pair, simulated, draws, rows):
                away = pilot.distance(_vector(pair, latents), points[:, part])
                less[part] += (away < truth[:, part]).sum(0)
                equal[part] += (away == truth[:, part]).sum(0)
            ranks.append(_broken(less, equal).cpu())
        return TARP(torch.cat(ranks), draws)


def ecdf_band(simulations: int, draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Where the distribution function of uniform ranks stays, as a whole, with this probability or a little more.

    Returns:
        The least and the largest share of ranks below 1, ..., L, each ``(L,)``. Ranks leave the band if their p-value
        is at most 1 − level.

    Example:
        >>> lower, upper = ecdf_band(100, 3)
        >>> [round(float(share), 2) for share in lower], [round(float(share), 2) for share in upper]
        ([0.15, 0.39, 0.65], [0.35, 0.61, 0.85])
    """
    uniform = _UniformRanks(simulations, draws)
    tails = np.unique(uniform.log_tails)
    count = bisect_right(tails, -level, key=lambda tail: -uniform.inside(tail))
    bottom, top = uniform.between(tails[count - 1] if count else -math.inf)
    return torch.from_numpy(bottom / simulations), torch.from_numpy(top / simulations)


class _UniformRanks:
    """How many of S ranks that are uniform on 0, ..., L are below each of 1, ..., L."""

    def __init__(self, simulations: int, draws: int) -> None:
        self.simulations, self.draws = simulations, draws
        shares = np.arange(1, draws + 1)[:, None] / (draws + 1)
        counts = np.arange(simulations + 1)
        below = stats.binom.logcdf(counts, simulations, shares)
        above = stats.binom.logsf(counts - 1, simulations, shares)
        # (L, S + 1), of both sides; rounded, for those of one side and of the other may be equal.
        self.log_tails = np.minimum(below, above).round(9) + math.log(2)
        self.steps = stats.poisson.pmf(counts, simulations / (draws + 1))
        self.total = stats.poisson.pmf(simulations, simulations)

    def between(self, log_tail: float) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest counts whose tail probability is above this."""
        kept = self.log_tails > log_tail
        return kept.argmax(1), self.simulations - kept[:, ::-1].argmax(1)

    def inside(self, log_tail: float) -> float:
        """The probability that the counts are above this tail probability everywhere.

        Counts of uniform ranks are sums of Poisson numbers whose total is known, which a convolution adds one by one.
        """
        if not (self.log_tails > log_tail).any(1).all():
            return 0.0
        start, state = 0, np.ones(1)
        for bottom, top in zip(*self.between(log_tail), strict=True):
            state = np.convolve(state, self.steps[: top - start + 1])[bottom - start : top - start + 1]
            start = bottom
        rest = self.simulations - start - np.arange(len(state))
        return float(self.steps[rest] @ state / self.total)

    def p_values(self, ranks: Tensor) -> Tensor:
        """Of ranks ``(S, *unit)``, ``(*unit)``."""
        counts = _below(ranks, self.draws)[..., 1:-1].reshape(-1, self.draws).long().numpy()
        tails, places = np.unique(self.log_tails[np.arange(self.draws), counts].min(1), return_inverse=True)
        # What is smaller than rounding makes of it is at least the tail at a single value, of one side.
        p = np.array([max(1 - self.inside(tail), math.exp(tail) / 2) for tail in tails])
        return torch.from_numpy(p[places]).view(ranks.shape[1:])


def _below(ranks: Tensor, draws: int) -> Tensor:
    """How many of the ranks ``(S, *unit)`` are below 0, ..., L + 1, ``(*unit, L + 2)``."""
    counts = torch.zeros(*ranks.shape[1:], draws + 2, dtype=torch.float64)
    moved = ranks.movedim(0, -1) + 1
    return counts.scatter_add(-1, moved, torch.ones(moved.shape, dtype=torch.float64)).cumsum(-1)


def _broken(less: Tensor, equal: Tensor) -> Tensor:
    """Ranks whose ties are broken at random."""
    return less + (torch.rand(equal.shape, device=equal.device) * (equal + 1)).long()


@dataclass(frozen=True, eq=False)
class _Simulated:
    """Draws from the model, of b observations or of one data set.

    Attributes:
        latents: By site ``(1, b, *unit)``.
        batch: The tensors that the programs take, with simulated observations.
        trace: The model on these.
        row: The row that stands for a data set, or None where each row is a simulation.
    """

    latents: dict[str, Tensor]
    batch: tuple[Tensor, ...]
    trace: poutine.Trace
    row: int | None


@contextmanager
def _prepared(
    model: Callable, guide: Callable, x: Any, simulations: int, draws: int, seed: int, rows: int
) -> Iterator[Prepared]:
    check_counts(simulations=simulations, draws=draws)
    if simulations < FEWEST:
        raise ValueError(f"expected at least {FEWEST} simulations, got {simulations}: fewer show no error of a guide")
    with prepared(model, guide, x, seed=seed, particles=draws, rows=rows, values=False) as pair:
        if not pair.latents:
            raise ValueError("the model has no latent sites, so there is no posterior to be tested")
        if pair.point_masses:
            raise ValueError(
                f"the guide's distribution at the latent sites {[*pair.point_masses]} is a point mass (Delta), whose "
                "draws tell nothing of a posterior; use another family"
            )
        if masked := [name for name, node in pair.nodes.items() if is_masked(node)]:
            raise ValueError(
                f"the sites {masked} are masked, and what is idle has no posterior; use a model without masks"
            )
        if pair.has_global:
            _check_global(pair, rows)
        yield pair


def _check_global(pair: Prepared, rows: int) -> None:
    """Raise a ``ValueError`` where a data set is too large, or does not matter to the guide's global sites."""
    if len(pair.batch[0]) > rows:
        raise ValueError(
            f"the model has global sites, for which the guide has to see all {len(pair.batch[0])} rows of a data set "
            f"at once, and rows={rows} allows fewer; pass fewer observations or more rows"
        )
    names = [name for name, site in pair.latents.items() if site.is_global]
    found = []
    for simulated in _simulated(pair, 2, rows):
        with seeded(0, pair.batch[0].device):  # the same noise for two data sets
            nodes = sample_sites(poutine.trace(pair.guide).get_trace(*simulated.batch))
        found.append([nodes[name]["value"] for name in names])
    if all(torch.equal(first, second) for first, second in zip(*found, strict=True)):
        raise ValueError(
            f"the guide draws the global sites {names} alike for all data sets: it is fitted to one, and not "
            "right for others. Hold these sites at a value in both programs and test the other sites, by "
            f"poutine.block(poutine.condition(program, data={{{names[0]!r}: value}}), hide={names}), or pass a guide "
            "that reads them off its arguments"
        )


def _simulated(pair: Prepared, simulations: int, rows: int) -> Iterator[_Simulated]:
    """So many simulations: as many rows at a time as may be run, or with global sites a data set at a time."""
    count = len(pair.batch[0])
    if pair.has_global:
        for _ in range(simulations):
            yield _simulate(pair, pair.batch, int(torch.randint(count, ())))
        return
    order = torch.cat([torch.randperm(count) for _ in range(math.ceil(simulations / count))])[:simulations]
    for part in parts(simulations, 1, rows):
        yield _simulate(pair, tuple(x[order[part].to(x.device)] for x in pair.batch), None)


def _simulate(pair: Prepared, batch: tuple[Tensor, ...], row: int | None) -> _Simulated:
    drawn = poutine.trace(poutine.uncondition(pair.model)).get_trace(*batch)
    nodes, shown, values = sample_sites(drawn), [*batch], {}
    for name in pair.observed:
        place = _place(pair, name)
        values[name] = nodes[name]["value"]
        by_rows = values[name].movedim(row_axis(nodes[name]), 0)
        if by_rows.numel() != shown[place].numel():
            raise ValueError(_COMPUTED.format(name))
        shown[place] = by_rows.reshape(shown[place].shape).to(shown[place].dtype)
    trace = poutine.trace(poutine.replay(pair.model, trace=drawn)).get_trace(*shown)
    for name, value in values.items():
        if not torch.equal(torch.as_tensor(trace.nodes[name]["value"]).to(value), value):
            raise ValueError(_COMPUTED.format(name))
    return _Simulated(_latents(pair, trace, 1, row), tuple(shown), trace, row)


_COMPUTED = (
    "the observed site '{}' is computed from the data that the model is called with, so it is not clear which data "
    "would show what is simulated; observe one of the tensors as it is, or reshaped"
)


def _place(pair: Prepared, name: str) -> int:
    """Which of the batch's tensors a site observes: the one whose memory it shares, else the first of its size."""
    value = pair.nodes[name]["value"]
    sized = [place for place, x in enumerate(pair.batch) if x[:2].numel() == value.numel()]
    memory = value.untyped_storage().data_ptr()
    shared = [place for place in sized if pair.batch[place].untyped_storage().data_ptr() == memory]
    if not sized:
        raise ValueError(_COMPUTED.format(name))
    return (shared or sized)[0]


def _latents(pair: Prepared, trace: poutine.Trace, copies: int, row: int | None) -> dict[str, Tensor]:
    """By site ``(K, b, *unit)``."""
    nodes, found = sample_sites(trace), {}
    for name, site in pair.latents.items():
        value = by_row(nodes[name], nodes[name]["value"], copies)
        if not torch.isfinite(value).all():
            raise ArithmeticError(f"a draw of the latent site '{name}' is not finite, by the model or by the guide")
        if site.is_global:
            value = value[None, None]
        elif row is not None:
            value = value[:, row : row + 1]
        found[name] = value
    return found


def _draws(
    pair: Prepared, simulated: _Simulated, draws: int, rows: int
) -> Iterator[tuple[slice, int, dict[str, Tensor], poutine.Trace]]:
    """The guide's draws: simulations, copies of them, latents ``(K, b, *unit)``, and the trace."""
    alone = simulated.row is None
    for part, copies, trace in passes(pair.guide, simulated.batch, draws, rows, copies=None if alone else 1):
        latents = _latents(pair, trace, copies, simulated.row)
        yield part if alone else slice(0, 1), copies, latents, trace


@dataclass(frozen=True)
class _Quantities:
    """What is ranked: units, the log-likelihood if it is known, and a user's quantities; each ``(K, b, *unit)``."""

    pair: Prepared
    with_likelihood: bool
    others: Mapping[str, Quantity]

    def __call__(
        self, latents: dict[str, Tensor], trace: poutine.Trace, simulated: _Simulated, part: slice, copies: int
    ) -> dict[str, Tensor]:
        found = dict(latents)
        if self.with_likelihood:
            found["log_likelihood"] = self._log_likelihood(trace, simulated, part, copies)
        shown = part if simulated.row is None else slice(simulated.row, simulated.row + 1)
        for name, function in self.others.items():
            found[name] = function(latents, *(x[shown] for x in simulated.batch))
            expected = next(iter(latents.values())).shape[:2]
            if found[name].shape[:2] != expected:
                raise ValueError(
                    f"the quantity '{name}' has shape {tuple(found[name].shape)}; expected {(*expected,)} in front, "
                    "draws and rows"
                )
        for name, value in found.items():
            if torch.isnan(value).any():
                raise ArithmeticError(f"the quantity '{name}' is NaN at a draw, by the model or by the guide")
        return found

    def _log_likelihood(self, trace: poutine.Trace, simulated: _Simulated, part: slice, copies: int) -> Tensor:
        """Of a row, or of a whole data set."""
        if trace is not simulated.trace:
            batch = simulated.batch if simulated.row is not None else tuple(x[part] for x in simulated.batch)
            trace = poutine.trace(poutine.replay(self.pair.model, trace=trace)).get_trace(*repeat(batch, copies))
        nodes = sample_sites(trace)
        each = [per_row(nodes[name], nodes[name]["fn"].log_prob(nodes[name]["value"])) for name in self.pair.observed]
        total = torch.stack(each).sum(0).view(copies, -1)
        return total if simulated.row is None else total.sum(1, keepdim=True)


def _vector(pair: Prepared, latents: Mapping[str, Tensor]) -> Tensor:
    """All sites ``(K, b, *unit)`` on unconstrained scales, ``(K, b, D)``."""
    flat = []
    for name, site in pair.latents.items():
        value = latents[name] if is_real(site.support) else biject_to(site.support).inv(latents[name])
        flat.append(value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1))
    vector = torch.cat(flat, -1)
    if not torch.isfinite(vector).all():
        raise ArithmeticError("a draw of the model or of the guide lies on the boundary of its site's support")
    return vector


def _chosen(pair: Prepared, reference: Mapping[str, Tensor], simulated: _Simulated) -> dict[str, Tensor]:
    """A user's reference points as the latents of simulations are shaped."""
    if missing := [name for name in pair.latents if name not in reference]:
        raise ValueError(f"the reference has no values for the latent sites {missing}")
    points = {}
    for name, truth in simulated.latents.items():
        value = reference[name].to(truth)
        if pair.latents[name].is_global:
            value = value.unsqueeze(0)
        elif simulated.row is not None:
            value = value[simulated.row : simulated.row + 1]
        if value.shape != truth.shape[1:]:
            came, expected = tuple(value.shape), tuple(truth.shape[1:])
            raise ValueError(f"the reference at site '{name}' has shape {came}, expected {expected}")
        points[name] = value.unsqueeze(0)
    return points


class _Pilot:
    """Simulations beside those that are ranked, from which references and scales come."""

    def __init__(self, pair: Prepared, simulations: int, rows: int) -> None:
        self.pair = pair
        latents, features, spread = [], [], []
        for count, simulated in enumerate(_simulated(pair, simulations, rows)):
            latents.append(_vector(pair, simulated.latents)[0])
            features.append(_features(simulated))
            if count == 0 or (pair.has_global and count < 32):
                spread.append(self._spread(simulated, rows))
        self.latents, seen = torch.cat(latents), torch.cat(features)
        self.centre, self.width = seen.mean(0), seen.std(0)
        self.features = self._standardised(seen)
        scale = torch.cat(spread).mean(0).clamp(min=0).sqrt()
        # A unit at which the guide has collapsed shall not outweigh all others.
        scale = torch.maximum(scale, 1e-3 * self.latents.std(0))
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.shift = SHIFT * (2 * torch.randint_like(self.scale, 2) - 1)

    def _spread(self, simulated: _Simulated, rows: int) -> Tensor:
        """The variances of some of the guide's draws, ``(b, D)``."""
        few = 256 if simulated.row is None else len(simulated.batch[0])
        some = replace(
            simulated,
            batch=tuple(x[:few] for x in simulated.batch),
            latents={name: value[:, :few] for name, value in simulated.latents.items()},
        )
        truth = _vector(self.pair, some.latents)[0]
        sums = torch.zeros(2, *truth.shape, dtype=torch.float64)  # of the draws' distances from a point, and squares
        for part, _, latents, _ in _draws(self.pair, some, _SPREAD_DRAWS, rows):
            away = (_vector(self.pair, latents) - truth[part]).double().cpu()
            sums[:, part] += torch.stack([away.sum(0), away.square().sum(0)])
        mean, square = sums / _SPREAD_DRAWS
        return (square - mean.square()).to(truth)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.centre) / torch.where(self.width > 0, self.width, torch.ones_like(self.width))

    def near(self, simulated: _Simulated) -> Tensor:
        """The reference points of simulations, ``(1, b, D)``."""
        away = torch.cdist(self._standardised(_features(simulated)), self.features)
        return (self.latents[away.argmin(1)] + self.shift * self.scale).unsqueeze(0)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        return ((first - second) / self.scale).square().sum(-1)


def _features(simulated: _Simulated) -> Tensor:
    """Simulations as vectors, ``(b, F)``; of a data set its means and standard deviations, and the row."""
    like = next(iter(simulated.latents.values()))
    flat = torch.cat(
        [x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in (x.to(like) for x in simulated.batch)], 1
    )
    if simulated.row is None:
        return flat
    return torch.cat([flat.mean(0), flat.std(0, correction=0), flat[simulated.row]]).unsqueeze(0)

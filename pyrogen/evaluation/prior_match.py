"""Where the aggregate posterior and the prior part: holes of the prior, and a test on samples alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.aggregate import aggregated
from pyrogen.evaluation.errors import share_error
from pyrogen.evaluation.running import ROWS
from pyrogen.inference.kernels import InverseMultiquadraticKernel, Kernel

__all__ = ["MeanDiscrepancy", "PriorHoles", "mmd", "prior_holes"]

RESAMPLES = 200
"""Bootstrap samples behind a standard error."""


@dataclass(frozen=True)
class PriorHoles:
    """How much of each of prior and aggregate posterior lies where the other is negligible.

    Attributes:
        mass: Of the prior where q(z) is negligible, between 0 and 1; ``level`` where both are equal.
        outside: Of q(z) where the prior is negligible, likewise; NaN where the prior's density is not known.
        level: What counts as negligible: all that is less dense than this share of the own mass is.
        error, outside_error: Standard errors.
        observations: Number N of the observations, of which one half made q(z) and the other judged it.
        samples: Number M of draws of either side.
    """

    mass: float
    outside: float
    level: float
    error: float
    outside_error: float
    observations: int
    samples: int

    def __str__(self) -> str:
        outside = f"{100 * self.outside:.2f} ± {100 * self.outside_error:.2f} % of q(z) where the prior is; "
        return (
            f"{100 * self.mass:.2f} ± {100 * self.error:.2f} % of the prior lies where q(z) is negligible, "
            f"{'' if math.isnan(self.outside) else outside}"
            f"{100 * self.level:g} % where they are equal; {self.observations} observations, {self.samples} samples"
        )


@checked()
def prior_holes(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 2000,
    level: float = 0.01,
    seed: int = 0,
    rows: int = ROWS,
) -> PriorHoles:
    r"""Measure how much of the prior lies where the aggregate posterior is negligible: where it makes z that no
    observation ever led to.

    .. math:: P_{z \sim p(z)} \big( \log q_A(z) < t \big), \quad
        t: \; P_{z \sim q_B(z)} \big( \log q_A(z) < t \big) = \alpha, \quad
        q_A(z) = \frac{1}{|A|} \sum_{n \in A} q(z \mid x_n)

    with A and B random halves of the observations and α the ``level``. Negligible is what is less dense, under the
    mixture over A, than all but a share α of q's own draws; these are draws of B's posteriors, for each draw of A's
    would be judged by its own component, and t be too high. Where prior and aggregate posterior are equal the mass is
    α, whatever the number of observations; a prior with holes has more, up to 1. It can be below α, where q(z) is the
    wider of both; the converse, the mass of q(z) where the prior is negligible by the same rule, then shows it:

    .. math:: P_{z \sim q_B(z)} \big( \log p(z) < t' \big), \quad t': \; P_{z \sim p(z)} ( \log p(z) < t' ) = \alpha

    The smoother the mixture over A the smaller the holes that show; of few observations in many dimensions each
    posterior is an island, and only holes wider than the gaps between them are seen. That samples of such places are
    bad ones: Rosca, Lakshminarayanan & Mohamed 2018, *Distribution matching in variational inference*, 1802.06847; the
    measure is ours.

    The standard errors are those of binomial counts, and of t by a bootstrap over the observations of B, or t' over
    draws. They leave out which observations fell into A. With global sites, one draw of these from the guide is held
    throughout.

    Args:
        model, guide: Programs; the prior may be implicit.
        x: Observations ``(N, *event_shape)``, at least two, or a tuple of tensors that the programs take.
        samples: Number M of draws of either side, at least 1/level − 1. Where both are equal the error is about
            √(2 level/M).
        level: α, between 0 and 1.
        seed: Of halves and draws; the caller's random state is left as it was.
        rows: How many pairs of a draw and an observation are scored at once; memory is bounded by it.

    Raises:
        NoDensityError: A ``ValueError``: if a per-observation site of the guide is implicit, or has a density that is
            an estimate.
        ValueError: For a level that is not between 0 and 1, fewer samples than it needs or a single observation; if the
            guide has a point mass or a helper site, a site is masked, the prior is not the same for all observations,
            or programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> found = prior_holes(toy.model, guide, toy.x[:100], samples=200)
        >>> 0 <= found.mass <= 1 and found.level == 0.01
        True
    """
    check_counts(samples=samples)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if level * (samples + 1) < 1:
        raise ValueError(f"a level of {level} needs at least {math.ceil(1 / level - 1)} samples, got {samples}")
    with aggregated(model, guide, x, seed=seed, rows=rows) as aggregate:
        aggregate.need_posterior_density("a mixture of posteriors", "mmd compares samples alone")
        count = aggregate.observations
        if count < 2:
            raise ValueError("halves to make q(z) of and to judge it by need at least 2 observations, got 1")
        order = torch.randperm(count)
        made, judging = order[: count // 2], order[count // 2 :]
        chosen = judging.repeat(math.ceil(samples / len(judging)))[:samples]
        aggregate.check_common_prior(chosen)
        q, p = aggregate.posterior(chosen), aggregate.prior(samples)
        mass, error = _below(
            aggregate.log_prob(q, made), aggregate.log_prob(p, made), level, min(samples, len(judging))
        )
        outside = outside_error = math.nan
        if aggregate.has_prior_density:
            own, other = aggregate.prior_log_prob(p), aggregate.prior_log_prob(q)
            outside, outside_error = _below(own, other, level, samples)
        return PriorHoles(mass, outside, level, error, outside_error, count, samples)


def _below(own: Tensor, other: Tensor, level: float, units: int) -> tuple[float, float]:
    """Which share of log-densities is below the level's quantile of the own ones, and its standard error; ``own`` are
    of so many independent units in turn."""
    ordered, order = own.sort()
    # The k-th of M draws has k/(M + 1) of the mass below it in the mean.
    place = torch.tensor(level * (len(own) + 1), dtype=torch.float64).clamp(max=len(own))
    low, high = ordered[int(place) - 1], ordered[min(int(place), len(own) - 1)]
    threshold = torch.lerp(low, high, place.frac())
    share = float((other < threshold).double().mean())
    unit = torch.arange(len(own)) % units
    times = torch.distributions.Multinomial(units, torch.ones(units)).sample((RESAMPLES,))
    mass = times[:, unit[order]].cumsum(1)
    first = (mass < level * (mass[:, -1:] + 1)).sum(1).clamp(max=len(own) - 1)
    others = other.sort().values
    shares = torch.searchsorted(others, ordered[first]).double() / len(other)
    return share, math.hypot(share_error(share, len(other)), float(shares.std()))


@dataclass(frozen=True)
class MeanDiscrepancy:
    """The maximum mean discrepancy of aggregate posterior and prior, and whether it could be chance.

    Attributes:
        squared: MMD², unbiased; so it may be negative where both are about equal.
        p_value: The share of permutations of the draws with as large a discrepancy; below 0.05 in one of 20 cases where
            both are equal.
        spread: The standard deviation of MMD² over these permutations, what chance makes of equal laws; NaN for one.
        observations: Number N of the observations.
        samples: Number of draws of either side, at most one of an observation.
    """

    squared: float
    p_value: float
    spread: float
    observations: int
    samples: int

    def __str__(self) -> str:
        return (
            f"MMD² {self.squared:.3g} (± {self.spread:.2g} where they are equal), p = {self.p_value:.3g}; "
            f"{self.observations} observations, {self.samples} samples"
        )


@checked()
def mmd(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 1000,
    kernel: Kernel | None = None,
    permutations: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> MeanDiscrepancy:
    r"""Compare draws of the aggregate posterior with draws of the prior by their maximum mean discrepancy.

    .. math:: \widehat{\operatorname{MMD}}^2 = \frac{1}{M(M-1)} \sum_{i \ne j} \big( k(z_i, z_j) + k(z'_i, z'_j) \big)
              - \frac{2}{M^2} \sum_{i, j} k(z_i, z'_j), \quad z_i \sim q(z), \; z'_i \sim p(z)

    of the unconstrained values of all per-observation latent sites together. No density is asked for, so guide and
    prior may be implicit, and the guide a point mass. With equal laws all permutations of the 2M draws are alike, and
    the p-value, the share of them with as large a discrepancy, is uniform. Gretton et al. 2012, *A kernel two-sample
    test*.

    At most one draw is made for an observation, for several would not be independent draws of q(z): M is ``samples`` or
    N, whichever is less. With global sites, one draw of these from the guide is held throughout.

    Args:
        model, guide: Programs.
        x: Observations ``(N, *event_shape)``, at least two, or a tuple of tensors that the programs take.
        samples: Number M of draws of either side, at least two. Memory grows with its square.
        kernel: By default :class:`~pyrogen.inference.kernels.InverseMultiquadraticKernel`, whose widths suit values of
            unit scale; :class:`~pyrogen.inference.kernels.GaussianKernel` takes its width from the draws.
        permutations: How many.
        seed: Of draws and permutations; the caller's random state is left as it was.
        rows: How many rows go through the programs at once.

    Raises:
        ValueError: For fewer than two observations or samples; if the kernel gives no matrix of the points, a site is
            masked, the prior is not the same for all observations, or programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> found = mmd(toy.model, guide, toy.x, samples=100, permutations=99)
        >>> 0.01 <= found.p_value <= 1 and found.samples == 100
        True
    """
    check_counts(samples=samples, permutations=permutations)
    with aggregated(model, guide, x, seed=seed, rows=rows) as aggregate:
        count = min(samples, aggregate.observations)
        if count < 2:
            raise ValueError(
                "a discrepancy needs at least 2 draws of either side, and at most one is made for an observation; got "
                f"{aggregate.observations} observations and {samples} samples"
            )
        chosen = aggregate.choose(count)
        aggregate.check_common_prior(chosen)
        draws = (aggregate.posterior(chosen), aggregate.prior(count))
        points = torch.cat([aggregate.latents.vectors(values) for values in draws])
        gram = (kernel or InverseMultiquadraticKernel())(points)
        if gram.shape != (len(points), len(points)):
            raise ValueError(
                f"expected a kernel from points {tuple(points.shape)} to their Gram matrix "
                f"{(len(points), len(points))}, got {tuple(gram.shape)}"
            )
        squared, by_chance = _discrepancies(gram.double().cpu(), permutations)
        return MeanDiscrepancy(
            float(squared),
            (1 + int((by_chance >= squared).sum())) / (1 + permutations),
            float(by_chance.std()) if permutations > 1 else math.nan,
            aggregate.observations,
            count,
        )


def _discrepancies(gram: Tensor, permutations: int) -> tuple[Tensor, Tensor]:
    """MMD² of the first half of the points and the second, and of random halves, ``(P,)``."""
    half = len(gram) // 2
    inside = torch.zeros(1 + permutations, 2 * half, dtype=gram.dtype)
    inside[0, :half] = 1
    inside[1:].scatter_(1, torch.rand(permutations, 2 * half).argsort(1)[:, :half], 1.0)
    apart = gram - gram.diagonal().diag()
    near = inside @ apart
    first = (near * inside).sum(1)
    across = near.sum(1) - first
    second = apart.sum() - first - 2 * across
    squared = (first + second) / (half * (half - 1)) - 2 * across / half**2
    return squared[0], squared[1:]

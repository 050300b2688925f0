"""Distances between samples and data in the features of a network, and the Inception Score."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as InceptionScoreMetric
from torchmetrics.image.kid import KernelInceptionDistance

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.errors import shuffle, with_error
from pyrogen.evaluation.features import ROWS, class_probabilities, features_of
from pyrogen.inference.turns import seeded

__all__ = [
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
]

MOST_FEATURES = 1000
"""With how many features the jackknife is run unasked: with 2048 a distance takes ten seconds."""
GROUPS = 10


@dataclass(frozen=True)
class InceptionScore:
    """An Inception Score, from 1 to the number of classes.

    Attributes:
        score: Its mean over the splits.
        deviation: Its standard deviation over the splits; NaN for one.
        samples: Number of samples.
        splits: Number of splits.
        classes: Number of classes.
    """

    score: float
    deviation: float
    samples: int
    splits: int
    classes: int

    @property
    def error(self) -> float:
        """The standard error of the mean over the splits; NaN for one."""
        return self.deviation / math.sqrt(self.splits)

    def __str__(self) -> str:
        return (
            f"Inception Score {with_error(self.score, self.error)} of at most {self.classes} ({self.samples} samples "
            f"in {self.splits} splits)"
        )


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance, 0 or more, in squared units of the features.

    Attributes:
        distance: The distance.
        error: Its standard error, by the jackknife; NaN where it is not defined.
        samples: Number of samples.
        observations: Number of rows of data.
        features: Number D of features.
    """

    distance: float
    error: float
    samples: int
    observations: int
    features: int

    def __str__(self) -> str:
        return (
            f"Fréchet distance {with_error(self.distance, self.error)} ({self.samples} samples, {self.observations} "
            f"observations, {self.features} features)"
        )


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance: a squared maximum mean discrepancy, 0 on average where both laws are one.

    Attributes:
        distance: Its mean over the subsets.
        deviation: Its standard deviation over the subsets. They overlap, so that it is no standard error of the mean.
        samples: Number of samples.
        observations: Number of rows of data.
        subsets: Number of subsets.
        subset_size: Number of rows of each side in a subset.
        features: Number D of features.
    """

    distance: float
    deviation: float
    samples: int
    observations: int
    subsets: int
    subset_size: int
    features: int

    @property
    def error(self) -> float:
        r"""A standard error: the deviation times :math:`\sqrt{m / (n - m)}`, for subsets of m out of n rows.

        So it is for a mean (Shao & Wu 1989, *A general theory for jackknife variance estimation*); where both laws are
        about one it is larger than the truth. NaN for subsets of all rows.
        """
        rest = min(self.samples, self.observations) - self.subset_size
        return self.deviation * math.sqrt(self.subset_size / rest) if rest else math.nan

    def __str__(self) -> str:
        distance = with_error(self.distance, self.error, ".4g", ".2g")
        return (
            f"kernel distance {distance} over {self.subsets} subsets of {self.subset_size} ({self.samples} samples, "
            f"{self.observations} observations, {self.features} features)"
        )


@checked()
def inception_score(
    samples: Tensor,
    classifier: Callable | Tensor,
    *,
    splits: int = 10,
    seed: int = 0,
    rows: int = ROWS,
) -> InceptionScore:
    r"""How sure a classifier is of each of the samples, and how evenly they fall into its classes.

    .. math:: \operatorname{IS} = \exp \left( \mathbb{E}_x \operatorname{KL}(p(k \mid x) \| p(k)) \right), \quad
        p(k) = \mathbb{E}_x \, p(k \mid x)

    over each of several splits of the samples. Salimans et al. 2016, *Improved techniques for training GANs*,
    1606.03498. It sees no data: copies of one image of each class score best. A split of few samples scores low.

    Args:
        samples: ``(N, *event_shape)``.
        classifier: A module with a method ``probabilities``, such as
            :func:`~pyrogen.evaluation.features.feature_classifier` gives, a callable from ``(n, *event_shape)`` to
            probabilities ``(n, K)``, or probabilities ``(N, K)`` of the samples.
        splits: Number of splits, into which the samples fall at random.
        seed: Of the splits; the caller's random state is left as it was.
        rows: How many rows go through the classifier at once.

    Raises:
        TypeError: If samples are no tensor of values whose meaning is known.
        ValueError: If samples are empty, not finite or fewer than the square of ``splits``, or these are no
            probabilities.

    Example:
        >>> one_hot = torch.eye(4).repeat(25, 1)
        >>> print(inception_score(torch.rand(100, 1, 8, 8), one_hot, splits=1))
        Inception Score 4.000 of at most 4 (100 samples in 1 splits)
    """
    check_counts(splits=splits)
    probabilities = class_probabilities(classifier, samples, rows=rows)
    if len(probabilities) < max(2, splits**2):
        raise ValueError(
            f"an Inception Score in {splits} splits needs as many samples in each, {max(2, splits**2)} in all, got "
            f"{len(probabilities)}; draw more samples or pass a smaller splits="
        )
    # The metric takes logits; log 0 would give it 0 · ∞.
    logits = probabilities.clamp(min=torch.finfo(torch.float64).tiny).log()
    with seeded(seed, logits.device), _quiet():
        metric = _metric(InceptionScoreMetric, logits, splits=splits)
        metric.update(logits)
        score, deviation = metric.compute()
    return InceptionScore(float(score), float(deviation), len(logits), splits, logits.shape[1])


@checked(but=("groups",))
def frechet_distance(
    samples: Tensor, data: Tensor, features: Callable | None, *, groups: int | None = None, rows: int = ROWS
) -> FrechetDistance:
    r"""The Fréchet distance of normal distributions with the features' moments; with Inception features, the FID.

    .. math:: \| m_1 - m_0 \|^2 + \operatorname{tr} \left( S_1 + S_0 - 2 (S_1 S_0)^{1/2} \right)

    Heusel et al. 2017, *GANs trained by a two time-scale update rule converge to a local Nash equilibrium*, 1706.08500.
    In double precision. It is biased upwards, the more so the fewer samples there are (Bińkowski et al. 2018,
    1801.01401): compare figures of equal sizes and of one network only. FIDs of papers are of 10 000 to 50 000 samples.
    The standard error is the jackknife's, over random groups of rows g of both sides that are left out in turn,

    .. math:: s^2 = \frac{G - 1}{G} \sum_g \left( d_{-g} - \bar d \right)^2 .

    Args:
        samples: ``(M, *event_shape)``.
        data: ``(N, *event_shape)``.
        features: A feature network: any callable from ``(n, *event_shape)`` to ``(n, D)``, such as
            :func:`~pyrogen.evaluation.feature_classifier` or :func:`~pyrogen.evaluation.inception`
            give. None takes the flattened values themselves.
        groups: Number G of groups, each of which costs as much as the distance: ten seconds with 2048 features. None
            is 10 of up to 1000 features, and 1 of more. The error is NaN for one group, and where without a group
            there are no more rows than features.
        rows: How many rows go through the network at once.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If a side has no more rows than there are features, so that its covariance is singular; if a side is
            not finite, shapes differ, or ``groups`` is no whole number of at least 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> data, other = torch.randn(2, 2000, 4, generator=generator)
        >>> print(frechet_distance(other + torch.tensor([30.0, 0.0, 0.0, 0.0]), data, None))  # 30² = 900
        Fréchet distance 897... ± 1.6... (2000 samples, 2000 observations, 4 features)
    """
    check_counts(or_none=True, groups=groups)
    u, v = features_of(features, rows=rows, samples=samples, data=data)
    width = u.shape[1]
    if groups is None:
        groups = GROUPS if width <= MOST_FEATURES else 1
    if min(len(u), len(v)) <= width:
        raise ValueError(
            f"the covariance of {width} features has full rank only for more than {width} rows, got {len(u)} samples "
            f"and {len(v)} rows of data; the Fréchet distance isn't defined otherwise. Take more of both, or features "
            "that are fewer; kernel_distance needs no more than two"
        )
    # It is the same around any point; around this one sums of squares keep their digits.
    centre = v.mean(0)
    u, v = u - centre, v - centre
    fewest = min(len(u), len(v))
    left = fewest - math.ceil(fewest / groups)
    error = _jackknife(u, v, groups, rows) if groups > 1 and left > width else math.nan
    return FrechetDistance(_frechet(u, v, rows), error, len(u), len(v), width)


def _frechet(u: Tensor, v: Tensor, rows: int) -> float:
    metric = _metric(FrechetInceptionDistance, u)
    for real, side in ((False, u), (True, v)):
        for part in side.split(rows):
            metric.update(part, real=real)
    return float(metric.compute())


def _jackknife(u: Tensor, v: Tensor, groups: int, rows: int) -> float:
    """The standard error of the distance by leaving groups of both sides out, at random as rows may come in cycles."""
    group_u, group_v = (shuffle(len(side)).to(side.device) % groups for side in (u, v))
    left = [_frechet(u[group_u != g], v[group_v != g], rows) for g in range(groups)]
    return math.sqrt((groups - 1) / groups * sum((each - sum(left) / groups) ** 2 for each in left))


@checked()
def kernel_distance(
    samples: Tensor,
    data: Tensor,
    features: Callable | None,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    seed: int = 0,
    rows: int = ROWS,
) -> KernelDistance:
    r"""The kernel distance with a polynomial kernel; with Inception features, the KID.

    .. math:: \mathbb{E}\, k(u, u') + \mathbb{E}\, k(v, v') - 2\, \mathbb{E}\, k(u, v), \quad
        k(u, v) = \left( \tfrac{1}{D} u^\top v + 1 \right)^3

    without the pairs of a row and itself, and so unbiased, at any number of samples: where both laws are one it is as
    often negative. The mean over random subsets, in double precision. Bińkowski, Sutherland, Arbel & Gretton 2018,
    *Demystifying MMD GANs*, 1801.01401.

    Args:
        samples, data, features, rows: See :func:`frechet_distance`.
        subsets: Number of random subsets, each drawn anew without replacement.
        subset_size: Rows of each side in a subset, at least 2.
        degree: Degree of the polynomial.
        seed: Of the subsets; the caller's random state is left as it was.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If a side has fewer rows than a subset, is not finite, or shapes differ.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> data, other = torch.randn(2, 500, 4, generator=generator)
        >>> found = kernel_distance(other + 1, data, None, subset_size=400)
        >>> print(found)
        kernel distance ... over 100 subsets of 400 (500 samples, 500 observations, 4 features)
        >>> abs(kernel_distance(other, data, None, subset_size=400).distance) < found.distance / 10
        True
    """
    check_counts(subsets=subsets, subset_size=subset_size, degree=degree)
    if subset_size < 2:
        raise ValueError("a kernel distance is over pairs of different rows: subset_size must be at least 2, got 1")
    u, v = features_of(features, rows=rows, samples=samples, data=data)
    if min(len(u), len(v)) < subset_size:
        raise ValueError(
            f"a subset takes {subset_size} rows of each side, got {len(u)} samples and {len(v)} rows of data; take "
            f"more of them, or pass subset_size={min(len(u), len(v))} or less"
        )
    with seeded(seed, u.device), _quiet():
        metric = _metric(KernelInceptionDistance, u, subsets=subsets, subset_size=subset_size, degree=degree)
        metric.update(v, real=True)
        metric.update(u, real=False)
        distance, deviation = metric.compute()
    return KernelDistance(float(distance), float(deviation), len(u), len(v), subsets, subset_size, u.shape[1])


def _metric(kind: Callable[..., Metric], features: Tensor, **options: int) -> Metric:
    """A metric of torchmetrics that takes features as they are, where they are."""
    given: Any = nn.Identity()
    given.num_features = features.shape[1]
    return kind(given, **options).to(features.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchmetrics says of the memory that features take, and torch of a deviation over one split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield

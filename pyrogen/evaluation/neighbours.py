"""Nearest neighbours: precision and recall, density and coverage, and whether samples copy training rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.stats import mannwhitneyu
from sklearn.cluster import KMeans
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.errors import share_error, shuffle, with_error
from pyrogen.evaluation.features import ROWS, features_of
from pyrogen.evaluation.running import parts

__all__ = [
    "DataCopying",
    "Neighbours",
    "PrecisionRecall",
    "data_copying",
    "nearest_neighbours",
    "precision_recall",
]

PAIRS = 2**24
"""Of how many pairs of rows distances are held at once, 128 MiB."""
SPLIT_ROWS = 2000
"""How many rows of a side are split for standard errors, which then cost less than figures of 5000 rows do."""
TIE = 1e-9
"""Squared distances whose relative difference is at most this count as equal, which rounding would else decide."""
SMALLEST_CELL = 20
"""With how many samples and held-out rows a cell counts: from here on U is about normal."""


@dataclass(frozen=True)
class PrecisionRecall:
    """How many samples look like data and how much of the data is covered, in the features of a network.

    Attributes:
        precision: The share of samples that lie among the data.
        recall: The share of data that lie among the samples.
        density: How many balls around data a sample lies in, over k; about 1 where both laws are one.
        coverage: The share of balls around data that hold a sample; about 1 − 2⁻ᵏ where both laws are one, of as many
            samples as data.
        precision_error, recall_error, coverage_error: Their standard errors over fresh draws of both sides; NaN where
            they are not defined.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        samples: Number of samples.
        observations: Number of rows of data.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    precision_error: float
    recall_error: float
    coverage_error: float
    neighbours: int
    density_neighbours: int
    samples: int
    observations: int

    def __str__(self) -> str:
        precision = with_error(self.precision, self.precision_error)
        recall = with_error(self.recall, self.recall_error)
        coverage = with_error(self.coverage, self.coverage_error)
        return (
            f"precision {precision}, recall {recall} (k = {self.neighbours}), density {self.density:.3f}, coverage "
            f"{coverage} (k = {self.density_neighbours}); {self.samples} samples, {self.observations} observations"
        )


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training rows that are nearest to samples, the nearest first.

    Attributes:
        indices: Their rows in the training data, ``(N, count)``.
        distances: How far they are, ``(N, count)``, in double precision.
        training: Number of training rows.
    """

    indices: Tensor
    distances: Tensor
    training: int

    def __str__(self) -> str:
        nearest = self.distances[:, 0]
        return (
            f"the nearest training row is {float(nearest.min()):.4g} to {float(nearest.max()):.4g} away, "
            f"{float(nearest.median()):.4g} in the median ({len(nearest)} samples, {self.training} training rows)"
        )


@dataclass(frozen=True)
class DataCopying:
    """Whether samples lie closer to the training rows than fresh data do.

    Attributes:
        z: The statistic in standard deviations, about N(0, 1) for fresh draws; far below 0 where rows are copied, far
            above it where samples are off the data.
        closer: How probable it is that a sample lies closer to a training row than a held-out row does; ½ for fresh
            draws, 1 for copies. Over the cells that count, weighted as z is.
        cells: In how many cells.
        samples: Number of samples.
        training: Number of training rows.
        held_out: Number of held-out rows.
    """

    z: float
    closer: float
    cells: int
    samples: int
    training: int
    held_out: int

    @property
    def copied(self) -> bool:
        """Whether z is below −3, which it is for one in 700 sets of fresh draws."""
        return self.z < -3

    def __str__(self) -> str:
        verdict = "samples copy training rows" if self.copied else "no sign of copied training rows"
        cells = f" in {self.cells} cells" if self.cells > 1 else ""
        return (
            f"{verdict}: z = {self.z:.2f}{cells}, closer than held-out rows with probability {self.closer:.3f} "
            f"({self.samples} samples, {self.training} training and {self.held_out} held-out rows)"
        )


@checked()
def precision_recall(
    samples: Tensor,
    data: Tensor,
    features: Callable | None = None,
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
    splits: int | None = 10,
    rows: int = ROWS,
) -> PrecisionRecall:
    r"""Precision and recall, density and coverage, by balls that reach to each row's k-th nearest neighbour.

    With :math:`B_k(v)` the open ball around a row v whose radius is the distance to the k-th nearest other row of its
    own set, samples u of number M and data v of number N,

    .. math::
        \text{precision} &= \tfrac{1}{M} \sum_u \mathbb{1}[\exists v : u \in B_k(v)], \quad
        \text{recall} = \tfrac{1}{N} \sum_v \mathbb{1}[\exists u : v \in B_k(u)], \\
        \text{density} &= \tfrac{1}{k M} \sum_u \sum_v \mathbb{1}[u \in B_k(v)], \quad
        \text{coverage} = \tfrac{1}{N} \sum_v \mathbb{1}[\exists u : u \in B_k(v)] .

    Kynkäänniemi et al. 2019, *Improved precision and recall metric for assessing generative models*, 1904.06991, with
    k = 3; Naeem et al. 2020, *Reliable fidelity and diversity metrics for generative models*, 2002.09797, with k = 5.
    Where both laws are one, density is about 1, and coverage :math:`1 - 2^{-k}` for as many samples as data; precision
    and recall have no such value. All depend on the numbers of both: compare figures of equal numbers only.

    Standard errors come of S random splits of both sides into halves a and b,

    .. math:: s^2 = \frac{1}{4 S} \sum_s (p_a - p_b)^2,

    a jackknife that leaves half of the rows out (Shao & Wu 1989, *A general theory for jackknife variance estimation*):
    of neighbours, one that leaves out a tenth says up to twice too much. Of more than 2000 rows a side, each split
    takes 2000 at random, and s shrinks by the root of their share. Errors are at least about that of half a draw, so
    that none or all of a few is not certainty.

    Args:
        samples: ``(M, *event_shape)``.
        data: ``(N, *event_shape)``.
        features: A feature network: any callable from ``(n, *event_shape)`` to ``(n, D)``; None takes the flattened
            values themselves.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        splits: Number S of splits. None gives no errors, as does a half with no more than k rows.
        rows: How many rows go through the network at once. Distances are taken in blocks of 2²⁴ pairs.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If a side has no more rows than ``neighbours`` or ``density_neighbours``, is not finite, or shapes
            differ.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> data, other = torch.randn(2, 1000, 2, generator=generator)
        >>> found = precision_recall(other, data)
        >>> abs(found.density - 1) < 0.1, abs(found.coverage - 31 / 32) < 0.03
        (True, True)
    """
    check_counts(neighbours=neighbours, density_neighbours=density_neighbours)
    check_counts(or_none=True, splits=splits)
    u, v = features_of(features, rows=rows, samples=samples, data=data)
    most = max(neighbours, density_neighbours)
    if min(len(u), len(v)) <= most:
        raise ValueError(
            f"a {most}-th nearest other row needs more than {most} rows of both sides, got {len(u)} samples and "
            f"{len(v)} rows of data; take more of them or a smaller number of neighbours"
        )
    precision, recall, coverage, density = _shares(u, v, neighbours, density_neighbours)
    errors = _errors(u, v, neighbours, density_neighbours, splits or 0)
    sizes = (neighbours, density_neighbours, len(u), len(v))
    return PrecisionRecall(precision, recall, density, coverage, *errors, *sizes)


@checked()
def nearest_neighbours(
    samples: Tensor,
    training: Tensor,
    *,
    features: Callable | None = None,
    count: int = 1,
    rows: int = ROWS,
) -> Neighbours:
    """Find the training rows that are nearest to each of the samples, to be shown beside them.

    Args:
        samples: ``(N, *event_shape)``.
        training: ``(T, *event_shape)``.
        features: A feature network, as :func:`precision_recall`; None takes the flattened values themselves.
        count: How many for each of the samples.
        rows: How many rows go through the network at once. Distances are taken in blocks of 2²⁴ pairs.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If there are fewer than ``count`` training rows, a side is not finite, or shapes differ.

    Example:
        >>> training = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
        >>> found = nearest_neighbours(torch.tensor([[1.0, 0.5]]), training, count=2)
        >>> found.indices, found.distances[0, 0]
        (tensor([[1, 0]]), tensor(0.5000, dtype=torch.float64))
    """
    check_counts(count=count)
    u, v = features_of(features, rows=rows, samples=samples, training=training)
    if len(v) < count:
        raise ValueError(f"expected at least count={count} training rows, got {len(v)}; ask for fewer neighbours")
    return _nearest(u, v, count)


@checked()
def data_copying(
    samples: Tensor,
    training: Tensor,
    held_out: Tensor,
    *,
    features: Callable | None = None,
    cells: int = 1,
    seed: int = 0,
    rows: int = ROWS,
) -> DataCopying:
    r"""Test whether samples lie closer to the training rows than held-out rows of the same law do.

    With d the distance to the nearest training row, of samples u of number M and held-out rows v of number N,

    .. math:: U = \sum_{u, v} \mathbb{1}[d(u) > d(v)] + \tfrac12 \mathbb{1}[d(u) = d(v)], \quad
        z = \frac{U - MN/2}{\sqrt{MN (M + N + 1) / 12}}

    (with the variance less where distances tie). For fresh draws from the law of the data z is about N(0, 1).
    With several cells, those of k-means on the training rows, it is the mean of z over cells with at least 20 samples
    and 20 held-out rows, weighted by their held-out rows, and so finds copying in one region that a distance in another
    would hide. Meehan, Chaudhuri & Dasgupta 2020, *A non-parametric test to detect data-copying in generative models*,
    2004.05675. It can't tell copies from samples that are close to training rows for another reason: samples that are
    smoother than data are, among values more than among features.

    Args:
        samples: ``(M, *event_shape)``.
        training: ``(T, *event_shape)``, the rows that the model was trained on.
        held_out: ``(N, *event_shape)``, rows of the same law that it was not trained on.
        features: A feature network, as :func:`precision_recall`; None takes the flattened values themselves.
        cells: Into how many cells the space is divided.
        seed: Of k-means.
        rows: How many rows go through the network at once. Distances are taken in blocks of 2²⁴ pairs.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If there are fewer than 20 samples or held-out rows, in every cell, a side is not finite, or shapes
            differ.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> training, held_out, fresh = torch.randn(3, 500, 2, generator=generator)
        >>> data_copying(fresh, training, held_out).copied
        False
        >>> print(data_copying(training[:100] + 0.001, training, held_out))
        samples copy training rows: z = -15.80, closer than held-out rows with probability 1.000 (100 samples, ...
    """
    check_counts(cells=cells)
    u, t, v = features_of(features, rows=rows, samples=samples, training=training, held_out=held_out)
    if len(t) < cells:
        raise ValueError(f"expected at least one training row a cell, got {len(t)} for cells={cells}")
    near_u, near_v = _nearest(u, t, 1).distances[:, 0], _nearest(v, t, 1).distances[:, 0]
    cell_u, cell_v = _cells(u, t, v, cells, seed)
    found = []
    for cell in range(cells):
        mine, theirs = near_u[cell_u == cell], near_v[cell_v == cell]
        if min(len(mine), len(theirs)) >= SMALLEST_CELL:
            found.append((len(theirs), *_mann_whitney(mine, theirs)))
    if not found:
        raise ValueError(
            f"the test needs at least {SMALLEST_CELL} samples and {SMALLEST_CELL} held-out rows in a cell, got "
            f"{len(u)} and {len(v)} in {cells} cells; take more of them or fewer cells"
        )
    weight = sum(each[0] for each in found)
    z, closer = (sum(each[0] * each[k] for each in found) / weight for k in (1, 2))
    return DataCopying(z, closer, len(found), len(u), len(t), len(v))


def _cells(u: Tensor, t: Tensor, v: Tensor, cells: int, seed: int) -> tuple[Tensor, Tensor]:
    """The cell of each of the samples and of each of the held-out rows."""
    if cells == 1:
        return torch.zeros(len(u), device=u.device), torch.zeros(len(v), device=v.device)
    centres = KMeans(cells, n_init=1, random_state=seed).fit(t.cpu().numpy()).cluster_centers_
    middle = torch.from_numpy(centres).to(t)
    return _nearest(u, middle, 1).indices[:, 0], _nearest(v, middle, 1).indices[:, 0]


def _mann_whitney(u: Tensor, v: Tensor) -> tuple[float, float]:
    """z of U over u and v, and how probable it is that the first is smaller, a tie counting one half."""
    m, n = len(u), len(v)
    above = float(mannwhitneyu(u.cpu().numpy(), v.cpu().numpy(), method="asymptotic").statistic)
    ties = torch.cat([u, v]).unique(return_counts=True)[1].double()
    total = m + n
    variance = m * n / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    # Where all distances are one there is nothing to tell.
    z = (above - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0
    return z, 1 - above / (m * n)


def _shares(u: Tensor, v: Tensor, neighbours: int, density_neighbours: int) -> tuple[float, float, float, float]:
    """Precision, recall, coverage and density of samples u and data v."""
    around_u = _radii(u, [neighbours])[:, 0]
    around_v, dense_v = _radii(v, [neighbours, density_neighbours]).unbind(1)
    precise = balls = 0
    recalled = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    nearest = torch.full_like(around_v, math.inf)
    for part, squares in _blocks(u, v):
        precise += int((squares < around_v).any(1).sum())
        recalled |= (squares < around_u[part].unsqueeze(1)).any(0)
        balls += int((squares < dense_v).sum())
        nearest = torch.minimum(nearest, squares.amin(0))
    covered = float((nearest < dense_v).double().mean())
    return precise / len(u), float(recalled.double().mean()), covered, balls / (density_neighbours * len(u))


def _errors(u: Tensor, v: Tensor, neighbours: int, density_neighbours: int, splits: int) -> tuple[float, float, float]:
    """Standard errors of precision, recall and coverage by splits of both sides into halves."""
    part = min(1, SPLIT_ROWS / max(len(u), len(v)))
    m, n = (int(part * len(side)) // 2 for side in (u, v))
    if not splits or min(m, n) <= max(neighbours, density_neighbours):
        return math.nan, math.nan, math.nan
    squares = torch.zeros(3, dtype=torch.float64)
    for split in range(splits):
        i, j = (shuffle(len(side), split).to(side.device) for side in (u, v))
        a = _shares(u[i[:m]], v[j[:n]], neighbours, density_neighbours)
        b = _shares(u[i[m : 2 * m]], v[j[n : 2 * n]], neighbours, density_neighbours)
        squares += (torch.tensor(a[:3]).double() - torch.tensor(b[:3]).double()).square()
    found = (squares / (2 * splits) * (n / len(v))).sqrt().tolist()
    least = (share_error(0.0, count) for count in (len(u), len(v), len(v)))
    precision, recall, coverage = (max(pair) for pair in zip(found, least, strict=True))
    return precision, recall, coverage


def _nearest(u: Tensor, v: Tensor, count: int) -> Neighbours:
    """The rows of v that are nearest to those of u."""
    indices = torch.cat([squares.topk(count, largest=False).indices for _, squares in _blocks(u, v)])
    distances = torch.empty(indices.shape, dtype=u.dtype, device=u.device)
    # By differences, so that the distance of a copy is 0.
    for part in parts(len(u), count * u.shape[1], PAIRS):
        distances[part] = (u[part].unsqueeze(1) - v[indices[part]]).norm(dim=2)
    order = distances.argsort(dim=1, stable=True)
    return Neighbours(indices.gather(1, order), distances.gather(1, order), len(v))


def _radii(u: Tensor, neighbours: list[int]) -> Tensor:
    """The squared radii of balls that reach to the k-th nearest other row, for each k, ``(N, number of k)``.

    A little less, so that rows at the radius, as the k-th neighbour is, are outside whatever rounding says.
    """
    found = []
    for part, squares in _blocks(u, u):
        own = torch.arange(part.start, part.stop, device=u.device)
        squares[own - part.start, own] = math.inf
        nearest = squares.topk(max(neighbours), largest=False).values
        found.append(nearest[:, [k - 1 for k in neighbours]])
    return torch.cat(found) * (1 - TIE)


def _blocks(u: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of rows of u to all rows of v, ``(rows, N)``, and which rows."""
    # Around a point amid them, so that the difference of squares keeps its digits.
    centre = v.mean(0)
    v = v - centre
    squares_v = v.square().sum(1)
    for part in parts(len(u), len(v), PAIRS):
        near = u[part] - centre
        squares = torch.addmm(squares_v, near, v.T, alpha=-2).add_(near.square().sum(1, keepdim=True))
        yield part, squares.clamp_(min=0)

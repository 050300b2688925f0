r"""Kernels and the maximum mean discrepancy between two samples.

A *kernel* is a callable from points ``(..., N, D)`` to their Gram matrix ``(..., N, N)``. The discrepancy calls it
once, on the points of both samples together, so that a kernel may choose its width from the points it sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import checked

__all__ = [
    "EnergyKernel",
    "GaussianKernel",
    "InverseMultiquadraticKernel",
    "Kernel",
    "LaplacianKernel",
    "maximum_mean_discrepancy",
]

Kernel = Callable[[Tensor], Tensor]
"""From points ``(..., N, D)`` to their Gram matrix ``(..., N, N)``."""


@checked()
@dataclass(frozen=True)
class InverseMultiquadraticKernel:
    r"""The inverse multiquadratic kernel, summed over several widths.

    .. math:: k(a, b) = \sum_s \frac{s C}{s C + \|a - b\|^2}, \quad C = 2 D \sigma^2

    C is the expected squared distance of two draws from N(0, σ² I). Its tails are heavy, so that points far from all
    others still feel them. Tolstikhin et al. 2018, *Wasserstein auto-encoders*, 1711.01558; the sum, at its default
    factors, is that of their code, the paper has s = 1 alone.

    Args:
        scale: σ, the scale of a single value; 1 for a standard normal prior.
        factors: The values of s.

    Example:
        >>> InverseMultiquadraticKernel(factors=(1.0,))(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.6667],
                [0.6667, 1.0000]])
    """

    scale: float = 1.0
    factors: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __post_init__(self) -> None:
        _check_positive("scale", self.scale)
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"expected one or more positive factors, got {self.factors}")

    def __call__(self, points: Tensor) -> Tensor:
        squared = _distances(points).square()
        gram = torch.zeros_like(squared)
        for factor in self.factors:
            width = factor * 2 * points.shape[-1] * self.scale**2
            gram = gram + width / (width + squared)
        return gram


@checked()
@dataclass(frozen=True)
class GaussianKernel:
    r"""The Gaussian kernel, of one width.

    .. math:: k(a, b) = \exp(-\|a - b\|^2 / 2 h^2)

    Args:
        bandwidth: h; None takes the median distance between the points, without gradient (Gretton et al. 2012, *A
            kernel two-sample test*).

    Example:
        >>> GaussianKernel(1.0)(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_positive("bandwidth", self.bandwidth)

    def __call__(self, points: Tensor) -> Tensor:
        distances = _distances(points)
        return torch.exp(-0.5 * (distances / _width(self.bandwidth, distances)).square())


@checked()
@dataclass(frozen=True)
class LaplacianKernel:
    r"""The Laplacian kernel, of one width.

    .. math:: k(a, b) = \exp(-\|a - b\|_1 / h)

    Args:
        bandwidth: h; None takes the median distance in this norm between the points, without gradient.

    Example:
        >>> LaplacianKernel(1.0)(torch.tensor([[0.0], [1.0]]))
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_positive("bandwidth", self.bandwidth)

    def __call__(self, points: Tensor) -> Tensor:
        distances = _distances(points, norm=1.0)
        return torch.exp(-distances / _width(self.bandwidth, distances))


@dataclass(frozen=True)
class EnergyKernel:
    r"""The kernel whose discrepancy is the energy distance; it has no width to choose.

    .. math:: k(a, b) = -\|a - b\|, \quad \operatorname{MMD}^2 = 2 \mathbb{E} \|x - y\| - \mathbb{E} \|x - x'\|
              - \mathbb{E} \|y - y'\|

    Sejdinovic et al. 2013, *Equivalence of distance-based and RKHS-based statistics*, 1207.6076.

    Example:
        >>> EnergyKernel()(torch.tensor([[0.0], [3.0]]))
        tensor([[-0., -3.],
                [-3., -0.]])
    """

    def __call__(self, points: Tensor) -> Tensor:
        return -_distances(points)


@checked()
def maximum_mean_discrepancy(x: Tensor, y: Tensor, kernel: Kernel | None = None, *, unbiased: bool = True) -> Tensor:
    r"""The squared maximum mean discrepancy between the laws of two samples.

    .. math:: \widehat{\operatorname{MMD}}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j)
              + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)

    It is zero in the mean where the laws are equal, and so negative for about half of such samples. A kernel that
    takes its width from the points makes it biased a little. Gretton et al. 2012, *A kernel two-sample test*.

    Args:
        x, y: Samples of points, with gradients.
        kernel: By default :class:`InverseMultiquadraticKernel`.
        unbiased: Leave each point's kernel with itself out; else the mean over all pairs is taken, which is never
            negative.

    Shapes:
        x ``(..., n, D)`` and y ``(..., m, D)`` give ``(...)``.

    Raises:
        ValueError: If the shapes do not fit, or a sample has one point only where ``unbiased`` needs two.

    Example:
        >>> same = maximum_mean_discrepancy(torch.randn(500, 2), torch.randn(500, 2))
        >>> other = maximum_mean_discrepancy(torch.randn(500, 2), torch.randn(500, 2) + 2)
        >>> bool(same < other)
        True
    """
    if x.dim() < 2 or y.dim() != x.dim() or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"expected samples (..., n, D) and (..., m, D), got shapes {tuple(x.shape)} and {tuple(y.shape)}; give "
            "single values a last dimension of one, x[:, None]"
        )
    n, m = x.shape[-2], y.shape[-2]
    if min(n, m) < 1 + unbiased:
        raise ValueError(
            f"expected at least {1 + unbiased} points in each sample, got {n} and {m}; the unbiased estimate compares "
            "the points of a sample with each other"
        )
    gram = (kernel or InverseMultiquadraticKernel())(torch.cat([x, y], -2))
    within_x, within_y = _mean_within(gram[..., :n, :n], unbiased), _mean_within(gram[..., n:, n:], unbiased)
    return within_x + within_y - 2 * gram[..., :n, n:].mean((-2, -1))


def _mean_within(gram: Tensor, unbiased: bool) -> Tensor:
    n = gram.shape[-1]
    if not unbiased:
        return gram.mean((-2, -1))
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))


def _distances(points: Tensor, norm: float = 2.0) -> Tensor:
    """Distances between all pairs; the gradient at a distance of zero is zero."""
    # By differences: through products of the points, or in half precision, small distances would be lost in rounding.
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    return torch.cdist(points, points, p=norm, compute_mode="donot_use_mm_for_euclid_dist")


def _width(bandwidth: float | None, distances: Tensor) -> Tensor | float:
    """The bandwidth, or the median distance between different points, in the shape ``(..., 1, 1)``."""
    if bandwidth is not None:
        return bandwidth
    n = distances.shape[-1]
    first, second = torch.triu_indices(n, n, 1, device=distances.device)
    median = distances.detach()[..., first, second].median(-1).values
    return median.clamp(min=torch.finfo(median.dtype).tiny)[..., None, None]


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")

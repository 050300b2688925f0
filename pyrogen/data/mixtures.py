"""Gaussian mixtures in the plane, for seeing which modes a model loses."""

import math
from dataclasses import dataclass
from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogen.arguments import checked

__all__ = ["GaussianMixture2d", "grid", "ring"]

_HIGH_QUALITY = 3.0  # standard deviations


@checked()
@dataclass(frozen=True, eq=False)
class GaussianMixture2d:
    """An even mixture of round Gaussians of one width in the plane.

    The protocol is that of PacGAN (Lin, Khetan, Fanti and Oh 2018, arXiv 1712.04086): train on 100 000
    observations, then judge 2 500 samples of the model by :meth:`mode_coverage`.

    Args:
        means: The centres, shape ``(M, 2)``.
        scale: The standard deviation in each direction.
        observations: The number N of observations in :attr:`x`.
        seed: The seed of :attr:`x`.

    Raises:
        ValueError: If ``means`` has another shape, or ``scale`` or ``observations`` is not positive.

    Example:
        >>> toy = ring(modes=8)
        >>> toy.sample(5, seed=0).shape, toy.log_prob(toy.means).shape
        (torch.Size([5, 2]), torch.Size([8]))
    """

    means: Tensor
    scale: float
    observations: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.means.shape[0] == 0 or self.means.shape[1] != 2:
            raise ValueError(f"expected means of shape (modes, 2), got {tuple(self.means.shape)}")
        if not self.means.isfinite().all():
            raise ValueError("expected finite means, got NaN or infinity")
        if not self.scale > 0:
            raise ValueError(f"expected scale, a standard deviation, to be positive, got {self.scale}")
        if self.observations < 1:
            raise ValueError(f"expected observations to be at least 1, got {self.observations}")

    @cached_property
    def x(self) -> Tensor:
        """The observations, shape ``(N, 2)``."""
        return self.sample(self.observations, self.seed)

    def model(self, x: Tensor) -> None:
        """The true program, which has no latent site: ``x`` (2,) in the plate ``data`` of size B.

        Args:
            x: Observations, shape ``(B, 2)``.
        """
        means = self.means.to(x) if x.is_floating_point() else self.means.to(x.device)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self._distribution(means), obs=x)

    def _distribution(self, means: Tensor) -> dist.MixtureSameFamily:
        modes = dist.Categorical(logits=means.new_zeros(len(means)))
        return dist.MixtureSameFamily(modes, dist.Normal(means, self.scale).to_event(1))

    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log density in nats.

        Args:
            x: Points, shape ``(..., 2)``.

        Returns:
            Shape ``(...)``.
        """
        return self._distribution(self.means.to(x)).log_prob(x)

    def sample(self, n: int, seed: int) -> Tensor:
        """Draw n points.

        Args:
            n: How many.
            seed: The seed.

        Returns:
            Shape ``(n, 2)``.
        """
        generator = torch.Generator().manual_seed(seed)
        modes = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[modes] + self.scale * torch.randn(n, 2, generator=generator)

    def mode_coverage(self, samples: Tensor) -> tuple[int, float]:
        """How many modes a model's samples cover, and the share of samples of high quality.

        By PacGAN's rule, a sample is of high quality if it lies within three standard deviations of its
        nearest mode, and a mode is covered if a sample of high quality is nearest to it. Of samples of the
        mixture itself, 1 - exp(-4.5) = 98.9 % are of high quality where modes lie far apart.

        Args:
            samples: Points, shape ``(n, 2)``.

        Returns:
            The number of modes covered, and the share in [0, 1].

        Raises:
            ValueError: If the shape is another, or there are no samples.

        Example:
            >>> toy = grid()
            >>> toy.mode_coverage(torch.tensor([[0.0, 0.1], [2.0, 2.0], [2.0, 2.1], [1.0, 1.0]]))
            (2, 0.75)
        """
        if samples.ndim != 2 or samples.shape[1] != 2 or len(samples) == 0:
            raise ValueError(f"expected samples of shape (n, 2) with n at least 1, got {tuple(samples.shape)}")
        mode, good = self.nearest_modes(samples)
        return len(mode[good].unique()), float(good.double().mean())

    def nearest_modes(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest mode of each of the points ``(n, 2)``, and whether it is of high quality, both ``(n,)``."""
        # By differences: the matrix-product form of cdist loses the digits that decide about narrow modes.
        distances = torch.cdist(samples, self.means.to(samples), compute_mode="donot_use_mm_for_euclid_dist")
        nearest, mode = distances.min(dim=1)
        return mode, nearest < _HIGH_QUALITY * self.scale


@checked()
def ring(modes: int = 8, *, radius: float = 1.0, scale: float = 0.01) -> GaussianMixture2d:
    r"""Gaussians evenly on a circle; by default PacGAN's 2D-ring.

    .. math:: \mu_i = r \, (\cos 2 \pi i / M, \; \sin 2 \pi i / M), \quad i = 0, \ldots, M - 1

    Args:
        modes: The number M of modes.
        radius: The radius r of the circle.
        scale: The standard deviation of each.

    Raises:
        ValueError: If ``modes`` is below 1, or ``radius`` or ``scale`` is not positive.

    Example:
        >>> ring(modes=4, radius=2.0).means[0]
        tensor([2., 0.])
    """
    if modes < 1 or not radius > 0:
        raise ValueError(f"expected at least one mode and a positive radius, got modes={modes}, radius={radius}")
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture2d(means.float(), scale)


@checked()
def grid(side: int = 5, *, spacing: float = 2.0, scale: float = 0.05) -> GaussianMixture2d:
    """Gaussians on a square grid around the origin; by default PacGAN's 2D-grid, {-4, -2, 0, 2, 4}².

    Args:
        side: The number of modes on a side.
        spacing: The distance between neighbours.
        scale: The standard deviation of each.

    Raises:
        ValueError: If ``side`` is below 1, or ``spacing`` or ``scale`` is not positive.

    Example:
        >>> grid(side=2).means.tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    if side < 1 or not spacing > 0:
        raise ValueError(f"expected at least one mode and a positive spacing, got side={side}, spacing={spacing}")
    line = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    return GaussianMixture2d(torch.cartesian_prod(line, line).float().reshape(-1, 2), scale)

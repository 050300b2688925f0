"""Adaptive contrast: the density of an implicit distribution from a critic that compares it with a fitted normal."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.inference.ratios import Ratio, at_least_single

__all__ = ["AdaptiveContrast", "Covariance", "Reference"]

Covariance = Literal["diagonal", "full"]

SMALLEST_VARIANCE = 1e-8
"""Floor of the variance of a reference, so that draws which have collapsed onto a point still have one."""


@dataclass(frozen=True)
class Reference:
    """The normal distribution with the moments of some draws, as constants.

    Attributes:
        mean: ``(..., n)``.
        lower: The standard deviations ``(..., n)``, or for full covariances the Cholesky factors ``(..., n, n)``.
        event_dim: How many dimensions of a draw make up the n values.
    """

    mean: Tensor
    lower: Tensor
    event_dim: int

    @classmethod
    @torch.no_grad()
    def of(cls, draws: Tensor, event_dim: int, covariance: Covariance) -> "Reference":
        """The moments over the first dimension of draws ``(M, ..., *event_shape)``.

        Raises:
            ValueError: For too few draws.
        """
        flat = at_least_single(draws.flatten(-event_dim))
        count, needed = len(flat), 2 if covariance == "diagonal" else flat.shape[-1] + 1
        if count < needed:
            raise ValueError(
                f"adaptive contrast takes {covariance} moments over the particles and needs at least {needed} of them "
                f"here, got {count}; raise particles, or use contrast='none'"
            )
        mean = flat.mean(0)
        centred = flat - mean
        if covariance == "diagonal":
            return cls(mean, (centred.square().sum(0) / (count - 1) + SMALLEST_VARIANCE).sqrt(), event_dim)
        matrix = torch.einsum("k...i,k...j->...ij", centred, centred) / (count - 1)
        floor = 1e-4 * matrix.diagonal(dim1=-2, dim2=-1) + SMALLEST_VARIANCE
        return cls(mean, torch.linalg.cholesky(matrix + torch.diag_embed(floor)), event_dim)

    @property
    def is_full(self) -> bool:
        return self.lower.dim() > self.mean.dim()

    def whiten(self, z: Tensor) -> Tensor:
        """L⁻¹ (z − μ), in the shape of z."""
        centred = z.flatten(-self.event_dim) - self.mean
        if not self.is_full:
            white = centred / self.lower
        else:
            white = torch.linalg.solve_triangular(self.lower, centred.unsqueeze(-1), upper=False)
        return white.reshape(z.shape).to(z.dtype)

    def log_prob(self, white: Tensor) -> Tensor:
        """The log-density of the draws which are whitened to these, in nats."""
        scale = self.lower.diagonal(dim1=-2, dim2=-1) if self.is_full else self.lower
        size = scale.shape[-1]
        squares = at_least_single(white).flatten(-self.event_dim).square().sum(-1)
        return -0.5 * squares - scale.log().sum(-1) - 0.5 * size * math.log(2 * math.pi)


@checked()
class AdaptiveContrast(nn.Module):
    r"""The log-density of an implicit distribution, by its ratio to a normal one with the same moments.

    .. math::
        \log q(z \mid c) \approx \log r(z \mid c) + T(\tilde z, c), \quad
        \tilde z = L^{-1} (z - \mu), \quad r = \mathcal{N}(\mu, L L^\top)

    with μ and L the moments of the draws of each observation, taken as constants. The critic T contrasts the
    whitened draws with N(0, I): what it has to estimate is only their shape, and stays small where q(z|x) is far from
    the prior. Mescheder, Nowozin & Geiger 2017, *Adversarial variational Bayes*, 1701.04722.

    Args:
        ratio: Estimates the log-ratio of whitened draws to standard normal ones.
        covariance: ``"diagonal"``, or ``"full"``, which needs more draws than the event has values.

    Shapes:
        draws ``(..., *event_shape)`` and context ``(..., C)`` or None give ``(...)``; a reference's moments are
        broadcast against the draws.
    """

    def __init__(self, ratio: Ratio, covariance: Covariance = "diagonal") -> None:
        super().__init__()
        if covariance not in ("diagonal", "full"):
            raise ValueError(f"covariance is 'diagonal' or 'full', got {covariance!r}")
        self.ratio = ratio
        self.covariance = covariance

    def log_density(self, z: Tensor, context: Tensor | None, reference: Reference) -> Tensor:
        """The estimate of log q(z|c) in nats; its gradient is that along z, at fixed moments."""
        white = reference.whiten(z)
        return self.ratio.log_ratio(white, context) + reference.log_prob(white)

    def loss_and_accuracy(self, z: Tensor, context: Tensor | None, reference: Reference) -> tuple[Tensor, Tensor]:
        """What the critic minimises, for draws taken as constants, and how often it tells them from normal ones."""
        white = reference.whiten(z.detach())
        return self.ratio.loss_and_accuracy(white, torch.randn_like(white), context)

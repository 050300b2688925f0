"""Adaptive contrast: the density of an implicit distribution from a critic that compares it with a fitted normal."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pyrogen.inference.ratios import Ratio

__all__ = ["AdaptiveContrast", "Covariance"]

Covariance = Literal["diagonal", "full"]

SMALLEST_VARIANCE = 1e-8
"""Floor of the variance of a reference, so that draws which have collapsed onto a point still have one."""


class AdaptiveContrast(nn.Module):
    r"""The log-density of an implicit distribution, by its ratio to a normal one with the same moments.

    .. math::
        \log q(z \mid c) \approx \log r(z \mid c) + T(\tilde z, c), \quad
        \tilde z = L^{-1} (z - \mu), \quad r = \mathcal{N}(\mu, L L^\top)

    with μ and L the moments of the particles of each observation, taken as constants. The critic T contrasts the
    whitened draws with N(0, I): what it has to estimate is only their shape, and stays small where q(z|x) is far from
    the prior. Mescheder, Nowozin & Geiger 2017, *Adversarial variational Bayes*, 1701.04722.

    Args:
        ratio: Estimates the log-ratio of whitened draws to standard normal ones.
        covariance: ``"diagonal"``, or ``"full"``, which needs more particles than the event has values.
        pooled: Over how many leading dimensions of the draws the moments are taken: 1 for the particles.

    Shapes:
        draws ``(K, ..., *event_shape)`` and context ``(K, ..., C)`` or None give ``(K, ...)``.

    Raises:
        ValueError: When called with too few draws for their moments.
    """

    def __init__(self, ratio: Ratio, covariance: Covariance = "diagonal", *, pooled: int = 1) -> None:
        super().__init__()
        if covariance not in ("diagonal", "full"):
            raise ValueError(f"covariance is 'diagonal' or 'full', got {covariance!r}")
        self.ratio = ratio
        self.covariance = covariance
        self.pooled = pooled

    def log_density(self, z: Tensor, context: Tensor | None, event_dim: int) -> Tensor:
        """The estimate of log q(z|c) in nats; its gradient is that along z, at fixed moments."""
        white, log_scale = self._whitened(z, event_dim)
        log_r = -0.5 * white.square().flatten(-event_dim).sum(-1) - log_scale
        size = math.prod(z.shape[z.dim() - event_dim :])
        return self.ratio.log_ratio(white, context) + log_r - 0.5 * size * math.log(2 * math.pi)

    def log_ratio(self, z: Tensor, context: Tensor | None, event_dim: int) -> Tensor:
        """The estimate of log q(z|c) − log r(z|c) in nats: how far the shape is from a normal one."""
        return self.ratio.log_ratio(self._whitened(z, event_dim)[0], context)

    def loss(self, z: Tensor, context: Tensor | None, event_dim: int) -> Tensor:
        """What the critic minimises, for draws taken as constants."""
        white = self._whitened(z.detach(), event_dim)[0]
        return self.ratio.loss(white, torch.randn_like(white), context)

    def accuracy(self, z: Tensor, context: Tensor | None, event_dim: int) -> Tensor:
        """How often the critic tells whitened draws from normal ones."""
        white = self._whitened(z.detach(), event_dim)[0]
        return self.ratio.accuracy(white, torch.randn_like(white), context)

    def _whitened(self, z: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
        """Whitened draws, and log |L|."""
        flat = z.flatten(-event_dim).flatten(0, self.pooled - 1)
        fixed, count = flat.detach(), len(flat)
        needed = 2 if self.covariance == "diagonal" else flat.shape[-1] + 1
        if count < needed:
            raise ValueError(
                f"adaptive contrast takes {self.covariance} moments over the particles and needs at least {needed} of "
                f"them here, got {count}; raise particles, or use contrast='none'"
            )
        centred = fixed - fixed.mean(0)
        if self.covariance == "diagonal":
            scale = (centred.square().sum(0) / (count - 1) + SMALLEST_VARIANCE).sqrt()
            white, log_scale = (flat - fixed.mean(0)) / scale, scale.log().sum(-1)
        else:
            covariance = torch.einsum("k...i,k...j->...ij", centred, centred) / (count - 1)
            floor = 1e-4 * covariance.diagonal(dim1=-2, dim2=-1) + SMALLEST_VARIANCE
            lower = torch.linalg.cholesky(covariance + torch.diag_embed(floor))
            white = torch.linalg.solve_triangular(lower, (flat - fixed.mean(0)).unsqueeze(-1), upper=False).squeeze(-1)
            log_scale = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return white.reshape(z.shape), log_scale

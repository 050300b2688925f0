r"""What keeps numbers finite in single precision: gradients that saturate, smooth bounds, sums of densities."""

import torch
from torch import Tensor

__all__ = ["bounded", "finite_gradient", "log_slope", "log_sum_exp", "unbounded", "widest"]

STEEPEST = 1e30
"""The largest slope that :func:`finite_gradient` passes on: many of these can be added, and multiplied by weights."""

POWER = 16
"""How sharply :func:`bounded` bends."""

LEAST_MARGIN = 2.0**-20
"""How far from its bounds, as a share, :func:`unbounded` reads a number: 6 times what single precision tells apart."""


def finite_gradient(x: Tensor, *, of_draws: bool = False) -> Tensor:
    r"""The same numbers, with a gradient that is finite: at most 1e30, and where it is NaN for 0 · ∞, 0.

    The chain rule multiplies what overflows (:math:`z^2 / \sigma`) by what underflows (:math:`d\sigma / dr`), and makes
    their moderate product infinite or NaN. Put this around what a density alone reads. A NaN that comes back through
    draws is the model's own, and training has to see it: ``of_draws`` leaves it. Half precision is left as it is, for
    the scaler of its gradients looks for what overflows.
    """
    if x.requires_grad and x.dtype != torch.float16:
        x = x.view_as(x)  # so that no hook stays on a parameter
        x.register_hook(lambda slope: _clamped(slope) if of_draws else _clamped(slope).nan_to_num())
    return x


def _clamped(slope: Tensor) -> Tensor:
    return slope.clamp(-STEEPEST, STEEPEST)


def bounded(x: Tensor, limit: float) -> Tensor:
    r"""Numbers held smoothly between ±limit.

    .. math:: x \, \bigl(1 + |x / l|^{16}\bigr)^{-1/16}

    Up to 0.35 of the limit that is x itself in single precision; up to 0.6 the difference is below 2e-5 of it.

    Example:
        >>> bounded(torch.tensor([-1e30, -3.0, 0.0, 70.0, 100.0]), 80.0)
        tensor([-80.0000,  -3.0000,   0.0000,  69.5134,  79.8613])
    """
    beyond = x.abs() > limit
    # |x / l| or its inverse, whichever is below 1: the factor is the same function of both.
    share = torch.where(beyond, limit / torch.where(beyond, x, limit), torch.where(beyond, 0.0, x) / limit)
    return x.clamp(-limit, limit) * torch.exp(torch.log1p(share.pow(POWER)) / -POWER)


def unbounded(y: Tensor, limit: float) -> Tensor:
    """The inverse of :func:`bounded`; finite at the bounds too, where rounding has made the numbers equal.

    Example:
        >>> unbounded(bounded(torch.tensor([-3.0, 0.0, 70.0]), 80.0), 80.0).round(decimals=3)
        tensor([-3.,  0., 70.])
    """
    most = limit * (1 - LEAST_MARGIN)
    y = y.clamp(-most, most)
    return y * torch.exp(torch.log1p(-(y / limit).pow(POWER)) / -POWER)


def log_slope(x: Tensor, limit: float) -> Tensor:
    r"""The logarithm of the derivative of :func:`bounded`, :math:`-\tfrac{17}{16} \log(1 + |x / l|^{16})`."""
    t = x.abs() / limit
    inside, beyond = t.clamp(max=1.0), t.clamp(min=1.0)
    power = (inside / beyond).pow(POWER)
    return -(POWER + 1) * (torch.log1p(power) / POWER + beyond.log())


def log_sum_exp(log_p: Tensor, dim: int) -> Tensor:
    """The logarithm of a sum of densities, whose gradient is 0 instead of NaN where all of them are zero."""
    return torch.logsumexp(log_p.clamp(min=torch.finfo(log_p.dtype).min), dim)


def widest(x: Tensor) -> torch.dtype:
    """Double precision where the device of a tensor has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64

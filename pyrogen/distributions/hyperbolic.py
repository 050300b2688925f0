r"""Hyperbolic functions that stay exact near zero, where they are 0/0, and far out, where they overflow."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["langevin_ratio", "log_sinhc"]

# Powers of s^2 in coth(s) / s - 1 / s^2. Up to 0.5 these are exact to 2e-12; beyond, the closed forms lose
# at most five bits to cancellation.
_SERIES = (1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555, -1382 / 638512875, 4 / 18243225)
_SERIES_BELOW = 0.5


def _power_series(coefficients: Sequence[float], t: Tensor) -> Tensor:
    total = torch.zeros_like(t)
    for coefficient in reversed(coefficients):
        total = total * t + coefficient
    return total


def langevin_ratio(s: Tensor) -> Tensor:
    r"""Langevin's function over its argument, :math:`(\coth s - 1/s)/s`, an even function, 1/3 at 0.

    Args:
        s: any real numbers, shape (...).

    Returns:
        The ratio, shape (...), with finite derivatives everywhere.

    Example:
        >>> langevin_ratio(torch.tensor([0.0, 1.0, 100.0]))
        tensor([0.3333, 0.3130, 0.0099])
    """
    small = s.abs() < _SERIES_BELOW
    t = torch.where(small, s, 0.0).square()
    series = _power_series(_SERIES, t)
    u = torch.where(small, 1.0, s)
    return torch.where(small, series, (1 / torch.tanh(u) - 1 / u) / u)


def log_sinhc(s: Tensor) -> Tensor:
    r"""The logarithm of :math:`\sinh(s)/s`, an even function with value 0 at 0.

    Args:
        s: any real numbers, shape (...).

    Returns:
        The logarithm, shape (...), with finite derivatives everywhere.

    Example:
        >>> log_sinhc(torch.tensor([0.0, 1.0, 100.0]))
        tensor([ 0.0000,  0.1614, 94.7017])
    """
    small = s.abs() < _SERIES_BELOW
    t = torch.where(small, s, 0.0).square()
    # The derivative is Langevin's function, so this is that series, integrated.
    series = t * _power_series([c / (2 * i + 2) for i, c in enumerate(_SERIES)], t)
    u = torch.where(small, 1.0, s.abs())
    return torch.where(small, series, u + torch.log(-torch.expm1(-2 * u) / (2 * u)))

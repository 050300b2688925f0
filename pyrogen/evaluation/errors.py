"""Standard errors of figures that are means or shares of draws."""

import math

import torch
from torch import Tensor

__all__ = ["share_error", "standard_error"]


def standard_error(values: Tensor, dim: int = 0) -> Tensor:
    """Of the mean over draws; NaN for one."""
    if values.shape[dim] == 1:
        return torch.full_like(values.select(dim, 0), math.nan)
    return values.std(dim) / math.sqrt(values.shape[dim])


def share_error(share: float, count: int) -> float:
    """Of a share of independent draws, by half a draw away from 0 and 1, so that none of a few is not certainty.

    Example:
        >>> round(share_error(0.5, 100), 3), round(share_error(0.0, 100), 3)
        (0.05, 0.007)
    """
    chance = (share * count + 0.5) / (count + 1)
    return math.sqrt(chance * (1 - chance) / count)

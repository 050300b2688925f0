"""Standard errors of figures that are means or shares of draws, and what chance does not explain."""

import math

import torch
from scipy import stats
from torch import Tensor

__all__ = ["check_not_negative", "share_error", "shuffle", "standard_error", "with_error"]


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


def check_not_negative(name: str, value: float, error: float, samples: int, why: str) -> None:
    """Raise an ``ArithmeticError`` at a figure further below 0 than chance explains, to one in three million."""
    # Of few draws the error is itself uncertain: Student's t, which is 5 standard errors for many.
    if samples > 1 and value < -1e-3 - float(stats.t.isf(3e-7, samples - 1)) * error:
        raise ArithmeticError(
            f"{name} came out as {value:.3f} nats (standard error {error:.3f}), and {why}: the densities of the guide "
            "or of the prior are not those of their draws"
        )


def shuffle(count: int, seed: int = 0) -> Tensor:
    """So many rows in random order; the same one for sides of as many rows, which leaves pairs of them together."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def with_error(value: float, error: float, digits: str = ".3f", error_digits: str = ".3f") -> str:
    """A figure and its standard error as they are printed; the figure alone where that is not defined."""
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ± {error:{error_digits}}")

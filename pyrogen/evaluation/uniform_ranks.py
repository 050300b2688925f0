"""Ranks of values among draws, and an exact test of whether they are uniform."""

import math
from bisect import bisect_right

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyrogen.arguments import check_counts, checked

__all__ = ["LEVEL", "Ranking", "UniformRanks", "counts_below", "ecdf_band"]

LEVEL = 0.05
"""The p-value up to which ranks are said not to be uniform."""


class Ranking:
    """The ranks of values among draws that come part by part; ties are broken at random.

    Args:
        truth: What is ranked, ``(1, b, *shape)``.
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.less = truth.new_zeros(truth.shape[1:], dtype=torch.long)
        self.equal = self.less.clone()

    def add(self, part: slice, draws: Tensor) -> None:
        """Take account of draws ``(K, n, *shape)`` for a part of the b."""
        self.less[part] += (draws < self.truth[:, part]).sum(0)
        self.equal[part] += (draws == self.truth[:, part]).sum(0)

    def ranks(self) -> Tensor:
        """How many draws are below, ``(b, *shape)``."""
        ties = torch.rand(self.equal.shape, device=self.equal.device) * (self.equal + 1)
        return (self.less + ties.long()).cpu()


@checked()
def ecdf_band(simulations: int, draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Where the distribution function of uniform ranks stays, as a whole, with this probability or a little more.

    Returns:
        The least and the largest share of ranks below 1, ..., L, each ``(L,)``. Ranks leave the band if their p-value
        is at most 1 − level.

    Example:
        >>> lower, upper = ecdf_band(100, 3)
        >>> [round(float(share), 2) for share in lower], [round(float(share), 2) for share in upper]
        ([0.15, 0.39, 0.65], [0.35, 0.61, 0.85])
    """
    check_counts(simulations=simulations, draws=draws)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    uniform = UniformRanks(simulations, draws)
    tails = np.unique(uniform.log_tails)
    count = bisect_right(tails, -level, key=lambda tail: -uniform.inside(tail))
    bottom, top = uniform.between(tails[count - 1] if count else -math.inf)
    return torch.from_numpy(bottom / simulations), torch.from_numpy(top / simulations)


class UniformRanks:
    """How many of S ranks that are uniform on 0, ..., L are below each of 1, ..., L."""

    def __init__(self, simulations: int, draws: int) -> None:
        self.simulations, self.draws = simulations, draws
        shares = np.arange(1, draws + 1)[:, None] / (draws + 1)
        counts = np.arange(simulations + 1)
        below = stats.binom.logcdf(counts, simulations, shares)
        above = stats.binom.logsf(counts - 1, simulations, shares)
        # (L, S + 1), of both sides; rounded, for those of one side and of the other may be equal.
        self.log_tails = np.minimum(below, above).round(9) + math.log(2)
        self.steps = stats.poisson.pmf(counts, simulations / (draws + 1))
        self.total = stats.poisson.pmf(simulations, simulations)

    def between(self, log_tail: float) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest counts whose tail probability is above this."""
        kept = self.log_tails > log_tail
        return kept.argmax(1), self.simulations - kept[:, ::-1].argmax(1)

    def inside(self, log_tail: float) -> float:
        """The probability that the counts are above this tail probability everywhere.

        Counts of uniform ranks are sums of Poisson numbers whose total is known, which a convolution adds one by one.
        """
        if not (self.log_tails > log_tail).any(1).all():
            return 0.0
        start, state = 0, np.ones(1)
        for bottom, top in zip(*self.between(log_tail), strict=True):
            state = np.convolve(state, self.steps[: top - start + 1])[bottom - start : top - start + 1]
            start = bottom
        rest = self.simulations - start - np.arange(len(state))
        return float(self.steps[rest] @ state / self.total)

    def p_values(self, ranks: Tensor) -> Tensor:
        """Of ranks ``(S, *unit)``, ``(*unit)``."""
        counts = counts_below(ranks, self.draws)[..., 1:-1].reshape(-1, self.draws).long().numpy()
        tails, places = np.unique(self.log_tails[np.arange(self.draws), counts].min(1), return_inverse=True)
        # What is smaller than rounding makes of it is at least the tail at a single value, of one side.
        p = np.array([max(1 - self.inside(tail), math.exp(tail) / 2) for tail in tails])
        return torch.from_numpy(p[places]).view(ranks.shape[1:])


def counts_below(ranks: Tensor, draws: int) -> Tensor:
    """How many of the ranks ``(S, *unit)`` are below 0, ..., L + 1, ``(*unit, L + 2)``."""
    counts = torch.zeros(*ranks.shape[1:], draws + 2, dtype=torch.float64)
    moved = ranks.movedim(0, -1) + 1
    return counts.scatter_add(-1, moved, torch.ones(moved.shape, dtype=torch.float64)).cumsum(-1)

"""Whether ranks are uniform: probabilities by enumeration, levels by simulation. Seeds are fixed."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyrogen.evaluation.uniform_ranks import UniformRanks, ecdf_band


def test_the_probability_of_a_band_by_enumeration():
    """Of four ranks on 0, 1, 2 there are 81 possibilities."""
    uniform = UniformRanks(4, 2)
    tails = []
    for ranks in itertools.product(range(3), repeat=4):
        counts = [sum(rank < j for rank in ranks) for j in (1, 2)]
        sides = [
            2 * min(stats.binom.cdf(c, 4, j / 3), stats.binom.sf(c - 1, 4, j / 3))
            for j, c in zip((1, 2), counts, strict=True)
        ]
        tails.append(min(sides))
        found = uniform.p_values(torch.tensor(ranks))
        assert 0 < found <= 1
    for tail in (1e-9, 0.05, 0.2, 0.5, 0.9, 2.0):
        expected = np.mean([value > tail for value in tails])
        assert uniform.inside(math.log(tail)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("simulations", "draws"), [(200, 19), (1000, 99)])
def test_p_values_have_their_level(simulations, draws):
    """Of 800 sets of uniform ranks: three in 1000 seeds leave the bounds of three standard errors."""
    ranks = torch.randint(draws + 1, (simulations, 800))
    p = UniformRanks(simulations, draws).p_values(ranks)
    for level in (0.05, 0.2):
        error = (level * (1 - level) / 800) ** 0.5
        assert abs((p <= level).double().mean() - level) < 3 * error


def test_the_band_is_where_p_values_are_large():
    ranks = (20 * torch.rand(100, 300) ** torch.linspace(1.0, 1.6, 300)).long()  # more and more uneven
    lower, upper = ecdf_band(100, 19)
    shares = torch.stack([(ranks < j).double().mean(0) for j in range(1, 20)], 1)
    outside = ((shares < lower) | (shares > upper)).any(1)
    p = UniformRanks(100, 19).p_values(ranks)
    assert 30 < outside.sum() < 300
    assert torch.equal(outside, p <= 0.05)

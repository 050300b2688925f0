"""Modes that are covered, of mixtures and of stacked images."""

import math

import pytest
import torch
from torch.nn import functional as F

from pyrogen.data import grid, ring
from pyrogen.evaluation.modes import mode_coverage


@pytest.mark.parametrize("make", [ring, grid])
def test_the_rule_of_the_mixtures(make):
    """Of 2500 draws 98.9 % are of high quality with a deviation of 0.2 %, and 2n KL is about χ² with M − 1 degrees."""
    toy = make()
    samples = toy.sample(2500, seed=1)
    found, modes = mode_coverage(samples, toy), len(toy.means)
    assert (found.covered, found.high_quality) == toy.mode_coverage(samples)
    assert found.covered == found.modes == modes and found.high_quality == pytest.approx(0.989, abs=0.01)
    assert found.even_kl == (modes - 1) / 5000
    assert found.kl == pytest.approx(found.even_kl, abs=5 * math.sqrt(2 * (modes - 1)) / 5000)
    some = torch.cat([samples[samples[:, 0] > 0.1], torch.rand(300, 2)])
    assert (mode_coverage(some, toy).covered, mode_coverage(some, toy).high_quality) == toy.mode_coverage(some)
    assert f"{modes} of {modes} modes, {100 * found.high_quality:.1f} % of high quality" in str(found)


def test_shares_by_hand():
    """One sample at the first mode, two at the second, and one nearest to the third that is of low quality."""
    toy = ring()
    samples = torch.cat([toy.means[:2], toy.means[1:2], 1.5 * toy.means[2:3]])
    found = mode_coverage(samples, toy)
    assert (found.covered, found.high_quality, found.samples) == (2, 0.75, 4)
    assert found.kl == pytest.approx(2 * 0.25 * math.log(8 / 4) + 0.5 * math.log(8 / 2))
    assert mode_coverage(100 + samples, toy).covered == 0


def brightness(x):
    """Ten classes of single channels by how bright they are."""
    assert x.shape[1:] == (1, 4, 4)
    return F.one_hot((10 * x.mean((1, 2, 3))).long().clamp(max=9), 10)


def test_stacked_images():
    digits = torch.cartesian_prod(*3 * [torch.arange(10)])
    every = ((digits + 0.5) / 10).view(1000, 3, 1, 1).expand(-1, -1, 4, 4)
    found = mode_coverage(every, brightness, rows=77)
    assert (found.covered, found.modes, found.kl) == (1000, 1000, pytest.approx(0, abs=1e-12))
    assert math.isnan(found.high_quality) and "quality" not in str(found) and "1000 of 1000 modes" in str(found)
    same = mode_coverage(every[:100], brightness)  # the first channel is 0
    assert same.covered == 100 and same.kl == pytest.approx(math.log(10))
    assert mode_coverage(every[:1], brightness).kl == pytest.approx(math.log(1000))
    swapped = mode_coverage(torch.cat([every[1:2], every[100:101]]), brightness)
    assert swapped.covered == 2  # 001 and 100


def test_errors():
    with pytest.raises(ValueError, match=r"points \(n, 2\), as the mixture's, got \(5, 3\)"):
        mode_coverage(torch.rand(5, 3), ring())
    with pytest.raises(ValueError, match=r"images \(n, C, H, W\) for a classifier, got \(5, 2\)"):
        mode_coverage(torch.rand(5, 2), brightness)
    with pytest.raises(ValueError, match="at least one row"):
        mode_coverage(torch.rand(0, 2), ring())
    with pytest.raises(ValueError, match="expected samples to be finite"):
        mode_coverage(torch.full((5, 2), math.nan), ring())
    with pytest.raises(ValueError, match="expected probabilities"):
        mode_coverage(torch.rand(5, 2, 4, 4), lambda x: x.flatten(1))

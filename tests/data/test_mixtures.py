import math

import pytest
import torch

from pyrogen.data import GaussianMixture2d, grid, ring


def test_grid_is_that_of_pacgan():
    toy = grid()
    line = [-4.0, -2.0, 0.0, 2.0, 4.0]
    assert sorted(toy.means.tolist()) == [[a, b] for a in line for b in line]
    assert toy.scale == 0.05 and toy.x.shape == (100_000, 2)


def test_ring_is_that_of_pacgan():
    toy = ring()
    assert toy.means.shape == (8, 2) and toy.scale == 0.01
    expected = [[math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)] for i in range(8)]
    torch.testing.assert_close(toy.means, torch.tensor(expected))
    torch.testing.assert_close(ring(5, radius=3.0).means.norm(dim=1), torch.full((5,), 3.0))


def test_log_prob_is_the_even_mixture():
    toy = GaussianMixture2d(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), scale=0.7)
    x = torch.tensor([[0.3, -0.2], [1.0, 1.0]], dtype=torch.float64)
    for point, value in zip(x.tolist(), toy.log_prob(x).tolist(), strict=True):
        parts = [
            math.exp(-((point[0] - a) ** 2 + (point[1] - b) ** 2) / (2 * 0.49)) / (2 * math.pi * 0.49)
            for a, b in ((0, 0), (1, 2))
        ]
        assert value == pytest.approx(math.log(sum(parts) / 2), abs=1e-12)


def test_samples_follow_the_mixture():
    toy, n = grid(), 100_000
    x = toy.x
    assert torch.equal(x, grid().x) and not torch.equal(x[:100], toy.sample(100, seed=1))
    modes_covered, share = toy.mode_coverage(x)
    # A squared distance over variance is exponential with mean 2; five standard deviations fail once in 2e6.
    exact = 1 - math.exp(-4.5)
    assert modes_covered == 25
    assert abs(share - exact) < 5 * math.sqrt(exact * (1 - exact) / n)
    counts = torch.cdist(x, toy.means).argmin(1).bincount(minlength=25)
    # 25 counts within five standard deviations: fails once in 7e4.
    assert (counts - n / 25).abs().max() < 5 * math.sqrt(n * 0.04 * 0.96)
    # The entropy of 25 distant Gaussians is log 25 + log(2 pi e var); -log p has a deviation of 1.
    entropy = math.log(25) + math.log(2 * math.pi * math.e * 0.05**2)
    assert abs(-toy.log_prob(x.double()).mean().item() - entropy) < 5 / math.sqrt(n)


def test_mode_coverage_by_hand():
    toy = GaussianMixture2d(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), scale=1.0)
    inside, outside = [2.1, 2.1], [2.2, 2.2]  # 2.97 and 3.11 from the first mode
    assert toy.mode_coverage(torch.tensor([inside])) == (1, 1.0)
    assert toy.mode_coverage(torch.tensor([outside])) == (0, 0.0)
    samples = torch.tensor([inside, inside, outside, [10.0, 2.9], [5.0, 5.0]])
    assert toy.mode_coverage(samples) == (2, 0.6)


def test_mode_coverage_is_exact_for_narrow_modes_far_out():
    toy = GaussianMixture2d(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]), scale=0.01)
    offsets = torch.linspace(0, 0.0625, 64)  # binary fractions near 1000 are exact to 6e-5
    samples = torch.stack([1000 + offsets, torch.zeros(64)], dim=1)
    exact = ((samples[:, 0].double() - 1000) < 0.03).double().mean().item()
    assert 0.3 < exact < 0.7
    assert toy.mode_coverage(samples) == (1, exact)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture2d(torch.zeros(3), 1.0), r"means of shape \(modes, 2\), got \(3,\)"),
        (lambda: GaussianMixture2d(torch.zeros(3, 2), 0.0), "scale, a standard deviation, to be positive"),
        (lambda: GaussianMixture2d(torch.zeros(3, 2), 1.0, observations=0), "observations to be at least 1"),
        (lambda: ring(0), "at least one mode and a positive radius, got modes=0"),
        (lambda: ring(radius=0.0), "got modes=8, radius=0.0"),
        (lambda: grid(0), "at least one mode and a positive spacing, got side=0"),
        (lambda: grid(spacing=-1.0), "got side=5, spacing=-1.0"),
        (lambda: grid().mode_coverage(torch.zeros(0, 2)), r"shape \(n, 2\) with n at least 1, got \(0, 2\)"),
        (lambda: grid().mode_coverage(torch.zeros(4, 3)), r"got \(4, 3\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""The critic against distances that are known."""

import math

import pytest
import torch
from torch import nn

from pyrogen.evaluation.wasserstein import wasserstein_critic
from pyrogen.networks import Critic


def small(shape):
    return Critic(shape, hidden=(128, 128))


@pytest.mark.parametrize("shift", [0.5, 3.0, 30.0])
def test_shifted_gaussians(shift):
    """W₁ = ‖m‖. 5 % are for the critic's training, five standard errors for the draws."""
    samples, data = torch.randn(2, 3000, 2) + torch.tensor([[[shift]], [[0.0]]]) * torch.tensor([0.6, 0.8])
    found = wasserstein_critic(samples, data, steps=300, critic=small)
    assert found.estimate == pytest.approx(shift, abs=0.05 * shift + 5 * found.error)
    assert 0.01 < found.error < 0.06


def test_point_masses():
    """Two points, 0.03 apart in a picture of four values: exact but for the training."""
    point = torch.full((500, 1, 2, 2), 0.5)
    found = wasserstein_critic(point + 0.015, point, steps=300, critic=small)
    assert found.estimate == pytest.approx(0.03, rel=0.03) and found.error < 1e-6


def test_scaled_gaussians():
    """W₁ of N(0, 4 I) and N(0, I) in the plane is E ‖x‖ = √(π/2), for every x moves to 2x."""
    samples, data = torch.tensor([2.0, 1.0]).view(2, 1, 1) * torch.randn(2, 3000, 2)
    found = wasserstein_critic(samples, data, steps=300, critic=small)
    assert found.estimate == pytest.approx(math.sqrt(math.pi / 2), abs=0.06 + 5 * found.error)


def test_half_of_the_mass_moves():
    """Where one of two modes moves by 5 and the other stays, W₁ = 2.5: slopes need not be even."""
    mode = (torch.arange(3000) % 2).unsqueeze(1)
    data = torch.cat([10.0 * mode, 0.0 * mode], 1)
    samples = data + torch.cat([0.0 * mode, 5.0 * mode], 1)
    noise = 0.3 * torch.randn(2, 3000, 2)
    found = wasserstein_critic(samples + noise[0], data + noise[1], steps=300, critic=small)
    assert found.estimate == pytest.approx(2.5, abs=0.05 * 2.5 + 5 * found.error) and found.error < 0.08


def test_equal_laws_are_zero_within_the_error():
    """Four standard errors, over three seeds: it fails for one in 5000 sets of seeds."""
    for seed in range(3):
        samples, data = torch.randn(2, 1000, 3)
        found = wasserstein_critic(samples, data, steps=100, critic=small, seed=seed)
        assert abs(found.estimate) < 4 * found.error


def test_sizes_seeds_and_the_random_state():
    samples, data = torch.randn(41, 1, 8, 8), torch.rand(30, 1, 8, 8)
    state = torch.get_rng_state()
    first, again, other = (wasserstein_critic(samples, data, steps=2, seed=seed, rows=7) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other
    assert (first.samples, first.observations, first.steps) == (20, 15, 2)
    assert "after 2 steps, read on 20 samples and 15 observations" in str(first)


def test_bytes_numbers_and_constants():
    levels = torch.randint(256, (40, 4), dtype=torch.uint8)
    assert wasserstein_critic(levels, levels / 255, steps=1, critic=small) == wasserstein_critic(
        levels / 255, levels, steps=1, critic=small
    )
    assert wasserstein_critic(torch.zeros(20), torch.zeros(20), steps=1).estimate == 0


def test_errors():
    samples = torch.randn(10, 2)
    with pytest.raises(ValueError, match="at least 4 rows of each side, got 3 samples and 10 rows of data"):
        wasserstein_critic(samples[:3], samples)
    with pytest.raises(ValueError, match="one event shape"):
        wasserstein_critic(samples, samples[:, :1])
    with pytest.raises(ValueError, match="expected data to be finite"):
        wasserstein_critic(samples, samples / 0)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        wasserstein_critic(samples, samples, steps=0)
    with pytest.raises(ValueError, match="gradient_penalty is a weight and can't be negative"):
        wasserstein_critic(samples, samples, gradient_penalty=-1.0)
    with pytest.raises(ValueError, match="the critic must return one score for each sample"):
        wasserstein_critic(samples, samples, steps=1, critic=lambda shape: TwoScores())


class TwoScores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, z, context=None):
        return self.linear(z)

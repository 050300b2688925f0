"""Fréchet and kernel distances and the Inception Score against their formulas written out in double precision."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from pyrogen.evaluation import visible
from pyrogen.evaluation.visible import frechet_distance, inception_score, kernel_distance


@pytest.fixture
def sides():
    """Samples (400, 1, 4, 4) of another law than the data (300, 1, 4, 4), far from zero."""
    samples = 3 + torch.randn(400, 1, 4, 4) * torch.linspace(0.1, 1.0, 4)
    return samples, 3.2 + 0.5 * torch.randn(300, 1, 4, 4)


@pytest.fixture
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.BatchNorm1d(12))


def features(network, x):
    network.eval()
    found = network(x).detach().double()
    network.train()
    return found


def test_frechet_distance_by_the_matrix_root(sides, network):
    samples, data = sides
    u, v = features(network, samples), features(network, data)
    s, t = torch.cov(u.T), torch.cov(v.T)
    means = (u.mean(0) - v.mean(0)).square().sum()
    expected = float(means + s.trace() + t.trace()) - 2 * sqrtm(s.numpy() @ t.numpy()).real.trace()
    found = frechet_distance(samples, data, network, rows=70)
    assert found.distance == pytest.approx(expected, rel=1e-6) and expected > 0.01
    sizes = "(400 samples, 300 observations, 12 features)"
    assert str(found) == f"Fréchet distance {expected:.3f} ± {found.error:.3f} {sizes}"
    assert frechet_distance(data, data, network).distance == pytest.approx(0, abs=1e-6)
    assert network.training


def test_frechet_distance_of_normal_laws():
    """‖m‖² + Σ (1 − s)² for N(m, diag s²) and N(0, I); both parts have a deviation of about 0.02 here."""
    scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    found = frechet_distance(shift + scale * torch.randn(20_000, 3), torch.randn(20_000, 3), None)
    assert found.distance == pytest.approx(1 + 0.25 + 1, abs=0.1)


def test_kernel_distance_by_its_sums(sides, network):
    """Over the whole sets, of which the subsets are: the mean over pairs of different rows."""
    u, v = (features(network, side)[:300] for side in sides)
    found = kernel_distance(sides[0][:300], sides[1], network, subsets=2, subset_size=300)

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    n, off = 300, ~torch.eye(300, dtype=torch.bool)
    expected = (kernel(u, u)[off].sum() + kernel(v, v)[off].sum()) / (n * (n - 1)) - 2 * kernel(u, v).mean()
    assert found.distance == pytest.approx(float(expected), rel=1e-6) and expected > 1e-3
    assert found.deviation < 1e-9
    assert "over 2 subsets of 300 (300 samples, 300 observations, 12 features)" in str(found)
    parted = kernel_distance(sides[0], sides[1], network, subset_size=100)
    assert f"{parted.distance:.4g} ± {parted.error:.2g} over 100 subsets" in str(parted)


def test_kernel_distance_is_unbiased():
    """Of one law, 200 subsets of 20: 5 standard errors, were these subsets independent, which fails once in 10⁶."""
    u, v = torch.randn(2, 4000, 5)
    found = kernel_distance(u, v, None, subsets=200, subset_size=20)
    assert abs(found.distance) < 5 * found.deviation / math.sqrt(200)


@pytest.mark.parametrize("measure", ["frechet", "kernel", "inception"])
def test_standard_errors_are_the_spread_over_fresh_draws(measure):
    """The deviation over 40 draws, known to 11 %, beside the root mean square of what each says of itself."""

    def found():
        samples, data = 0.5 + torch.randn(400, 3) * 1.5, torch.randn(500, 3)
        if measure == "frechet":
            distance = frechet_distance(samples, data, None)
            return distance.distance, distance.error
        if measure == "kernel":
            kernel = kernel_distance(samples, data, None, subset_size=200)
            return kernel.distance, kernel.error
        score = inception_score(samples, samples.softmax(1))
        return score.score, score.error

    values, errors = torch.tensor([found() for _ in range(40)], dtype=torch.float64).T
    assert 0.65 < errors.square().mean().sqrt() / values.std() < 1.5


def test_standard_errors_that_are_not_defined(sides):
    samples, data = sides
    for found in (
        frechet_distance(samples, data, None, groups=1),
        frechet_distance(samples[:17], data, None),  # none may be left out of 16 features
        kernel_distance(samples[:300], data, None, subset_size=300),
    ):
        assert math.isnan(found.error) and "±" not in str(found)


def test_the_jackknife_of_many_features_is_asked_for(sides, monkeypatch):
    samples, data = sides
    monkeypatch.setattr(visible, "MOST_FEATURES", 15)
    assert math.isnan(frechet_distance(samples, data, None).error)
    asked = frechet_distance(samples, data, None, groups=10)
    monkeypatch.undo()
    assert frechet_distance(samples, data, None) == asked and asked.error > 0


def test_the_jackknife_of_classes_in_cycles():
    """Rows by turns of ten classes far from each other, of which groups of every tenth row would each leave one out.

    In random order groups are others, and either error is known to a quarter; by classes it is about √50 times larger.
    """
    steps = torch.arange(10.0).repeat(50).unsqueeze(1)
    samples, data = 10 * steps + torch.randn(500, 1), 9 * steps + torch.randn(500, 1)
    order = torch.randperm(500)
    cycles, mixed = frechet_distance(samples, data, None), frechet_distance(samples[order], data[order], None)
    assert 0.3 < cycles.error / mixed.error < 3


@pytest.mark.parametrize("groups", [0, 2.5])
def test_groups_are_a_whole_number(sides, groups):
    samples, data = sides
    with pytest.raises(ValueError, match=f"groups must be a whole number of at least 1, got {groups}"):
        frechet_distance(samples, data, None, groups=groups)


def test_inception_score_by_hand():
    logits = 3 * torch.randn(1000, 6, dtype=torch.float64)
    x, p = torch.rand(1000, 2), logits.softmax(1)

    def score(p):
        return (p * (p / p.mean(0)).log()).sum(1).mean().exp()

    found = inception_score(x, p, splits=1)
    assert found.score == pytest.approx(float(score(p)), rel=1e-9) and math.isnan(found.deviation)
    splits = inception_score(x, p, splits=10, seed=3)
    torch.manual_seed(3)
    each = torch.stack([score(part) for part in p[torch.randperm(1000)].chunk(10)])
    assert splits.score == pytest.approx(float(each.mean()), rel=1e-9)
    assert splits.deviation == pytest.approx(float(each.std()), rel=1e-9)
    assert splits.error == pytest.approx(splits.deviation / math.sqrt(10))
    assert f"{splits.score:.3f} ± {splits.error:.3f} of at most 6 (1000 samples in 10 splits)" in str(splits)
    assert str(found) == f"Inception Score {found.score:.3f} of at most 6 (1000 samples in 1 splits)"


def test_inception_score_of_classifiers():
    x = torch.eye(3).repeat(40, 1)

    class Sure(nn.Module):
        def forward(self, x):
            raise AssertionError("features were asked for")

        def probabilities(self, x):
            return x

    assert inception_score(x, Sure(), splits=1).score == pytest.approx(3)
    assert inception_score(x, lambda x: x * 0 + 1 / 3, splits=1).score == pytest.approx(1)


def test_seeds_and_the_random_state(sides):
    (samples, data), p = sides, torch.rand(400, 5).softmax(1)
    state = torch.get_rng_state()
    for measure in (
        lambda seed: kernel_distance(samples, data, None, subset_size=50, seed=seed),
        lambda seed: inception_score(samples, p, seed=seed),
    ):
        assert measure(1) == measure(1) != measure(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_samples(sides):
    samples, data = sides
    with pytest.raises(ValueError, match="full rank only for more than 16 rows, got 16 samples and 300 rows of data"):
        frechet_distance(samples[:16], data, None)
    assert math.isfinite(frechet_distance(samples[:17], data, None).distance)
    with pytest.raises(ValueError, match=r"takes 1000 rows of each side, got 400 samples and 300 .* subset_size=300"):
        kernel_distance(samples, data, None)
    with pytest.raises(ValueError, match="subset_size must be at least 2"):
        kernel_distance(samples, data, None, subset_size=1)
    with pytest.raises(ValueError, match="in 10 splits needs as many samples in each, 100 in all, got 99"):
        inception_score(samples[:99], torch.ones(99, 1))
    with pytest.raises(ValueError, match="got 1;"):
        inception_score(samples[:1], torch.ones(1, 1), splits=1)
    with pytest.raises(ValueError, match="splits must be a whole number"):
        inception_score(samples, torch.ones(400, 1), splits=0)
    for measure in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="one event shape"):
            measure(samples, data.flatten(1), None)
        with pytest.raises(ValueError, match="expected samples to be finite"):
            measure(samples / 0, data, None)

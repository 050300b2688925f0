"""Two sets of draws: what is told apart, at which rate equal laws are, and distances against closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator

from pyrogen.evaluation.two_samples import c2st, sliced_wasserstein


class NearestMean(BaseEstimator):
    """A classifier that is fast."""

    def fit(self, x, y):
        self.means = [x[~y].mean(0), x[y].mean(0)]
        return self

    def predict(self, x):
        first, second = (np.square(x - mean).sum(1) for mean in self.means)
        return second < first


def fast_c2st(first, second, **options):
    return c2st(first, second, classifier=NearestMean(), **options)


BOTH = pytest.mark.parametrize("compare", [fast_c2st, sliced_wasserstein])


@pytest.mark.parametrize("folds", [2, 5])
def test_equal_laws_are_rejected_at_the_nominal_rate(folds):
    """Of 400 pairs at level 0.05 more than 33 or fewer than 8 would be rejected in 4 of 1000 cases.

    A binomial p-value of the cross-validated accuracy rejects 0.11 of such pairs: that is why it is not used.
    """
    found = [fast_c2st(torch.randn(60, 2), torch.randn(60, 2), folds=folds, seed=seed) for seed in range(400)]
    assert 8 <= sum(each.p_value <= 0.05 for each in found) <= 33
    # The accuracy's standard deviation was up to 1.4 times the binomial one, 0.046: four standard errors.
    assert np.mean([each.accuracy for each in found]) == pytest.approx(0.5, abs=0.013)
    binomial = [stats.norm.sf((each.accuracy - 0.5) / each.standard_error) for each in found]
    assert sum(p <= 0.05 for p in binomial) > 33


def ideal_accuracy(scale, dimensions):
    """Of the best classifier of N(0, I) and N(0, scale² I): their densities are equal on a sphere."""
    squared = 2 * dimensions * math.log(scale) / (1 - scale**-2)
    return 0.5 + abs(stats.chi2.cdf(squared, dimensions) - stats.chi2.cdf(squared / scale**2, dimensions)) / 2


@pytest.mark.parametrize(("scale", "ideal"), [(1.2, 0.567), (0.8, 0.581)])
def test_a_scale_off_by_a_fifth_is_found(scale, ideal):
    """By 1000 draws of each set, with the classifier that is the default."""
    assert ideal_accuracy(scale, 2) == pytest.approx(ideal, abs=1e-3)
    for seed in range(2):
        found = c2st(torch.randn(1000, 2), scale * torch.randn(1000, 2), seed=seed)
        assert found.p_value <= 0.05
        assert abs(found.accuracy - ideal) < 4 * found.standard_error


def test_what_nothing_tells_and_what_everything_tells():
    u = torch.randn(60, 3)
    far = c2st(u, u + 20.0)
    assert far.accuracy == 1.0 and far.standard_error == 0.0 and far.p_value < 1e-10
    nothing = c2st(torch.ones(20, 2), torch.ones(30, 2))
    assert nothing.p_value == 1.0 and nothing.draws == 20
    assert "of the draws, p = 1; 20 draws of each set, 5 folds" in str(nothing)


def test_correlations_are_told():
    u = torch.randn(300, 2)
    v = torch.randn(300, 2) @ torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]])).T
    assert c2st(u, v).p_value < 0.001


def test_units_do_not_matter_to_a_classifier():
    u, v = torch.randn(50, 2), torch.randn(50, 2) + 1
    factor, offset = torch.tensor([1e-3, 1e4]), torch.tensor([5.0, -300.0])
    assert fast_c2st(u, v) == fast_c2st(u * factor + offset, v * factor + offset)


@BOTH
def test_draws_by_site_are_put_side_by_side(compare):
    u, v = torch.randn(40, 5), torch.randn(30, 5) + 1
    by_site = [{"a": x[:, :4].reshape(-1, 2, 2), "b": x[:, 4]} for x in (u, v)]
    assert compare(*by_site) == compare(u, v)
    second = {"b": by_site[1]["b"], "a": by_site[1]["a"]}  # sites are matched by name
    assert compare(by_site[0], second) == compare(u, v)


@BOTH
def test_states_and_seeds(compare):
    u, v = torch.randn(30, 2), torch.randn(30, 2)
    compare = c2st if compare is fast_c2st else compare
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(u, v, seed=3) == compare(u, v, seed=3) != compare(u, v, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@BOTH
@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ([1.0], torch.zeros(20), TypeError, "a tensor .N, .shape. or by site, got list"),
        ({}, {}, TypeError, "by site, got dict"),
        (torch.zeros(()), torch.zeros(20), ValueError, r"got shape \(\)"),
        (torch.zeros(0, 2), torch.zeros(20, 2), ValueError, r"of the first set, got shape \(0, 2\)"),
        (torch.zeros(20, 2), torch.zeros(20, 3), ValueError, r"of the second set has shape \(3,\), one of the first"),
        (torch.zeros(20), torch.full((20,), math.nan), ValueError, "the draws of the second set hold NaN"),
        ({"a": torch.zeros(20)}, {"b": torch.zeros(20)}, ValueError, r"same sites, got \['a'\] and \['b'\]"),
        (
            {"a": torch.zeros(20), "b": torch.zeros(9)},
            {"a": torch.zeros(20), "b": torch.zeros(20)},
            ValueError,
            r"first set have different numbers of draws, \[9, 20\]",
        ),
    ],
)
def test_bad_draws_are_refused(compare, first, second, error, message):
    with pytest.raises(error, match=message):
        compare(first, second)


def test_bad_numbers_are_refused():
    u = torch.randn(9, 2)
    with pytest.raises(ValueError, match="2 draws of each set in each, got 5 folds for 9 and 9"):
        c2st(u, u)
    with pytest.raises(ValueError, match="expected at least 2 folds"):
        c2st(u, u, folds=1)
    with pytest.raises(ValueError, match="expected order 1 or 2, got 3"):
        sliced_wasserstein(u, u, order=3)
    with pytest.raises(ValueError, match="projections must be a whole number of at least 1"):
        sliced_wasserstein(u, u, projections=0)


@pytest.mark.parametrize("sizes", [(50, 50), (50, 33), (7, 100), (1, 10)])
def test_a_single_dimension_is_exact(sizes):
    u, v = (torch.randn(n, dtype=torch.float64) for n in sizes)
    first = stats.wasserstein_distance(u.numpy(), v.numpy())
    assert sliced_wasserstein(u, v, order=1, projections=3) == pytest.approx(first, rel=1e-12)
    # Repeated until both are as many, sorted values are matched one by one.
    n, m = sizes
    many = [x.sort().values.repeat_interleave(k) for x, k in ((u, m), (v, n))]
    second = (many[0] - many[1]).square().mean().sqrt().item()
    assert sliced_wasserstein(u, v, projections=3) == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("dimensions", [2, 5])
def test_closed_forms_of_gaussians(dimensions):
    """Along a line the distance of two shifted samples is |ω·m|, and E |ω·m|² = |m|² / D."""
    u, shift = torch.randn(300, dimensions), torch.linspace(0.5, 2.0, dimensions)
    length = shift.norm().item()
    first = length * math.gamma(dimensions / 2) / (math.sqrt(math.pi) * math.gamma((dimensions + 1) / 2))
    # Over 4000 lines the standard errors are below 1 %.
    options = {"projections": 4000}
    assert sliced_wasserstein(u, u + shift, **options) == pytest.approx(length / dimensions**0.5, rel=0.03)
    assert sliced_wasserstein(u, u + shift, order=1, **options) == pytest.approx(first, rel=0.03)
    # N(0, I) and N(0, s² I) are |s − 1| apart along every line; the standard error of a sample's scale is 0.5 %.
    u, v = torch.randn(20_000, dimensions), 1.5 * torch.randn(15_000, dimensions)
    assert sliced_wasserstein(u, v, projections=20) == pytest.approx(0.5, rel=0.05)


def test_parts_of_the_lines_add_up(monkeypatch):
    u, v = torch.randn(20, 3), torch.randn(30, 3)
    whole = sliced_wasserstein(u, v, projections=31)
    monkeypatch.setattr("pyrogen.evaluation.two_samples.NUMBERS", 200)
    assert sliced_wasserstein(u, v, projections=31) == pytest.approx(whole, rel=1e-12)

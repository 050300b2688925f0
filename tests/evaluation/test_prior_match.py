"""Holes of the prior against quadrature, and the discrepancy of samples against its sum written out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyrogen.distributions import Delta
from pyrogen.distributions.implicit import ImplicitDistribution, NoDensityError
from pyrogen.evaluation.prior_match import mmd, prior_holes
from pyrogen.inference import AmortizedGuide
from pyrogen.inference.kernels import GaussianKernel, InverseMultiquadraticKernel, maximum_mean_discrepancy


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def exact(x):
    """With x from the model, q(z) is the prior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5).to_event(1))


def sampled_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", ImplicitDistribution(lambda s: torch.randn(*s, 2), (len(x),), (2,)))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def sampled(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", ImplicitDistribution(lambda s: 0.5 * x + 0.5**0.5 * torch.randn(*s, 2), (len(x),), (2,)))


def line(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def around(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.5))


def test_equal_laws_give_the_level():
    """Also of 40 observations, of whose mixture q(z) is only a rough picture. Means over 40 seeds, of one of which the
    standard error is about 0.02: five of a fortieth's root."""
    found = []
    for seed in range(40):
        torch.manual_seed(seed)
        found.append(prior_holes(model, exact, 2**0.5 * torch.randn(40, 2), samples=400, level=0.1, seed=seed))
    masses, outside = (torch.tensor([getattr(each, name) for each in found]) for name in ("mass", "outside"))
    errors = torch.tensor([each.error for each in found])
    for share in (masses, outside):
        assert share.mean() == pytest.approx(0.1, abs=5 * float(share.std()) / 40**0.5)
    # What the errors say is what estimates vary by, up to the choice of halves: the ratio of standard deviations, of 40
    # draws, has an error of 11 %.
    assert 0.6 < float(errors.mean() / masses.std()) < 1.5


def quadrature(level):
    """Of q = (N(−3, ¼) + N(3, ¼))/2 and p = N(0, 1): the prior's mass in the holes, and the converse."""
    z = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    q = 0.5 * (dist.Normal(-3.0, 0.5).log_prob(z).exp() + dist.Normal(3.0, 0.5).log_prob(z).exp())
    p = dist.Normal(0.0, 1.0).log_prob(z).exp()
    found = []
    for own, other in ((q, p), (p, q)):
        order = own.argsort()
        below = (own[order].cumsum(0) / own.sum()) < level
        found.append(float(other[order][below].sum() / other.sum()))
    return found


@pytest.mark.parametrize("level", [0.01, 0.1])
def test_a_known_hole(level):
    x = torch.cat([torch.full((2000,), -3.0), torch.full((2000,), 3.0)])
    found = prior_holes(line, around, x, samples=2000, level=level)
    mass, outside = quadrature(level)
    assert mass > 0.9 and outside > 0.6  # there is something to find
    # Five standard errors, one in a million. Halves of 4000 have both modes to ± 3 %, which moves t little.
    assert found.mass == pytest.approx(mass, abs=5 * found.error)
    assert found.outside == pytest.approx(outside, abs=5 * found.outside_error)
    assert "of the prior lies where q(z) is negligible" in str(found)


def test_a_draw_is_not_judged_by_its_own_posterior():
    """Narrow posteriors, far from each other: to the others' mixture their draws are as strange as the prior's."""
    x = 2**0.5 * torch.randn(40, 2)

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2**0.5, 0.01).to_event(1))

    found = prior_holes(model, narrow, x, samples=400, level=0.1)
    # 20 observations judge, one in ten of them below t: a standard error of 0.07. Judged by itself, none would be as
    # improbable as the prior's draws: a mass of about one.
    assert found.mass < 0.4


def test_an_implicit_prior_has_holes_but_no_converse():
    x = 2**0.5 * torch.randn(60, 2)
    found = prior_holes(sampled_model, exact, x, samples=200, level=0.1)
    assert math.isnan(found.outside) and math.isnan(found.outside_error)
    assert found.mass == pytest.approx(0.1, abs=5 * found.error)


def test_holes_that_are_not_defined():
    x = torch.zeros(10, 2)
    with pytest.raises(NoDensityError, match=r"the sites \['z'\] are implicit; mmd compares samples alone"):
        prior_holes(model, sampled, x)
    with pytest.raises(ValueError, match=r"a level of 0\.01 needs at least 99 samples, got 98"):
        prior_holes(model, exact, x, samples=98)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        prior_holes(model, exact, x, level=1)
    with pytest.raises(ValueError, match="need at least 2 observations, got 1"):
        prior_holes(model, exact, x[:1])


@pytest.mark.parametrize("kernel", [None, GaussianKernel(), GaussianKernel(0.7)])
def test_the_discrepancy_written_out(kernel):
    seen = []

    def watched(points):
        seen.append(points)
        return (kernel or InverseMultiquadraticKernel())(points)

    x = torch.randn(30, 2)
    found = mmd(model, exact, x, samples=20, kernel=watched, permutations=50)
    (points,) = seen
    gram = watched(points).double()
    q, p = range(20), range(20, 40)
    total = sum((gram[i, j] + gram[i + 20, j + 20]) / (20 * 19) for i in q for j in q if i != j)
    total = total - 2 * sum(gram[i, j] / 400 for i in q for j in p)
    assert found.squared == pytest.approx(float(total), abs=1e-9)
    expected = maximum_mean_discrepancy(points[:20], points[20:], watched)
    assert found.squared == pytest.approx(float(expected), abs=1e-5)
    if kernel is None:
        assert found.squared == pytest.approx(mmd(model, exact, x, samples=20, permutations=50).squared, abs=1e-9)


def test_p_values_of_equal_laws_are_uniform():
    """With implicit guide and prior. Kolmogorov and Smirnov's test on 60 of them fails in one of 1000 cases."""
    values = []
    for seed in range(60):
        torch.manual_seed(seed)
        values.append(mmd(sampled_model, sampled, 2**0.5 * torch.randn(40, 2), permutations=199, seed=seed).p_value)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert min(values) < 0.1 and max(values) > 0.9


def test_unequal_laws_are_told_apart():
    found = mmd(sampled_model, sampled, 2**0.5 * torch.randn(200, 2) + 1.0, permutations=199)
    assert found.p_value == 1 / 200 and found.squared > 5 * found.spread
    assert "200 observations, 200 samples" in str(found)


def test_a_draw_of_each_observation_at_most():
    x = 2**0.5 * torch.randn(30, 2)
    assert mmd(model, exact, x, permutations=9).samples == 30
    assert mmd(model, exact, x, samples=10, permutations=9).samples == 10
    with pytest.raises(ValueError, match=r"at least 2 draws of either side.* got 1 observations"):
        mmd(model, exact, x[:1])
    with pytest.raises(ValueError, match=r"expected a kernel from points \(60, 2\) to their Gram matrix \(60, 60\)"):
        mmd(model, exact, x, kernel=lambda points: points)


def test_a_point_mass_has_draws():
    guide = AmortizedGuide(model, nn.Linear(2, 4), Delta, example=torch.zeros(2, 2))
    assert mmd(model, guide, torch.randn(100, 2), permutations=99).p_value == 0.01

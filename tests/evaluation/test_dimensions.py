"""The marginal divergence by dimension against closed forms, and against the double sum written out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from torch import nn

from pyrogen.distributions import Delta, Flow, SemiImplicit
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.evaluation.dimensions import total_correlation
from pyrogen.evaluation.marginals import marginal_kl
from pyrogen.inference import AmortizedGuide

SLOPE = torch.tensor([[1.0, 0.8, 0.0], [0.4, 0.9, 0.2], [0.0, -0.7, 1.2]])
MEAN = torch.tensor([1.5, -0.5, 0.0])
COVARIANCE = torch.tensor([[0.3, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.2]])
LOWER = torch.linalg.cholesky(COVARIANCE)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def correlated(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(MEAN + x @ SLOPE.T, scale_tril=LOWER))


def implicit(x):
    with pyro.plate("data", len(x)):
        pyro.sample(
            "z", ImplicitDistribution(lambda s: MEAN + x @ SLOPE.T + torch.randn(*s, 3) @ LOWER.T, (len(x),), (3,))
        )


def whitened(count):
    """Draws of N(0, I) whose mean and covariance are exactly these."""
    x = torch.randn(count, 3, dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / count), x.T, upper=False).T.float()


def gaussian():
    """For x ~ N(0, I): KL, total correlation and divergences of single values."""
    v = SLOPE @ SLOPE.T + COVARIANCE
    divergence = 0.5 * (v.trace() + MEAN @ MEAN - 3 - v.logdet())
    correlation = 0.5 * (v.diagonal().log().sum() - v.logdet())
    return float(divergence), float(correlation), 0.5 * (v.diagonal() + MEAN**2 - 1 - v.diagonal().log())


def test_closed_form_of_a_linear_gaussian():
    divergence, correlation, each = gaussian()
    found = total_correlation(model, correlated, whitened(500), samples=6000)
    # 5 % are 2.4 standard errors of the total correlation and 3.4 of the others.
    assert found.marginal_kl == pytest.approx(divergence, rel=0.05)
    assert found.total_correlation == pytest.approx(correlation, rel=0.05)
    assert found.dimension_wise_kl == pytest.approx(float(each.sum()), rel=0.05)
    # Five standard errors, of each of five figures: 3 in a million.
    assert abs(found.marginal_kl - divergence) < 5 * found.marginal_kl_error
    assert abs(found.total_correlation - correlation) < 5 * found.total_correlation_error
    assert ((found.dimensions["z"] - each).abs() < 5 * found.dimension_errors["z"]).all()
    assert abs(found.remainder) < 1e-5 and found.held_out is None
    assert found.posterior_by == {"z": "mixture"} and found.prior_by == {"z": "closed form"}
    assert "total correlation 0.5" in str(found) and "500 observations, 6000 samples" in str(found)


def test_an_implicit_guide_of_the_same_law():
    divergence, correlation, each = gaussian()
    found = total_correlation(model, implicit, whitened(2000), samples=2000, steps=200)
    assert found.posterior_by == {"z": "nearest neighbours"} and found.prior_by == {"z": "closed form"}
    # The bias of ten neighbours among 10 000 is below 0.01.
    assert ((found.dimensions["z"] - each).abs() < 5 * found.dimension_errors["z"] + 0.01).all()
    # The critic has seen 1000 observations, and is asked about 500 others: a standard error of about 0.04, a bias of
    # 5 %. Three of the former and twice the latter.
    assert found.total_correlation == pytest.approx(correlation, abs=0.12 + 0.1 * correlation)
    assert found.held_out.estimate == found.total_correlation and math.isnan(found.total_correlation_error)
    assert found.marginal_kl == pytest.approx(divergence, rel=0.15) and abs(found.remainder) < 1e-5
    assert "critic, an estimate" in str(found)


def hierarchy(x):
    with pyro.plate("data", len(x), dim=-1):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        loc, lower = torch.zeros(2, dtype=x.dtype), torch.tensor([[1.0, 0.0], [0.9, 0.5]], dtype=x.dtype)
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=lower))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(s.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)


def of_hierarchy(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("s", dist.LogNormal(0.3 * x[:, 0], 0.5))
        lower = torch.tensor([[0.5, 0.0], [-0.2, 0.3]], dtype=x.dtype)
        pyro.sample("w", dist.MultivariateNormal(x, scale_tril=lower))
        with pyro.plate("repeats", 3, dim=-2):
            loc = torch.stack([x.roll(k, 1) for k in range(3)])
            pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rows", [4096, 7])
def test_the_double_sum_written_out(rows):
    """Sites of each kind: a constrained one, a correlated one under both programs, and one in a nested plate."""
    torch.manual_seed(1)
    x = torch.randn(7, 2)
    found = total_correlation(hierarchy, of_hierarchy, x, samples=7, rows=rows)
    torch.manual_seed(0)
    order = torch.randperm(7)
    nodes = pyro.poutine.trace(of_hierarchy).get_trace(x[order]).nodes
    s, w, z = (nodes[name]["value"] for name in ("s", "w", "z"))
    of_s, of_w, of_z = (torch.empty(7, 7, *shape) for shape in ((), (2,), (3, 2)))
    joint = torch.empty(7, 7)
    lower = torch.tensor([[0.5, 0.0], [-0.2, 0.3]])
    for m in range(7):
        for n in range(7):
            of_s[m, n] = dist.LogNormal(0.3 * x[n, 0], 0.5).log_prob(s[m])
            of_w[m, n] = dist.Normal(x[n], (lower @ lower.T).diagonal().sqrt()).log_prob(w[m])
            of_z[m, n] = dist.Normal(torch.stack([x[n].roll(k) for k in range(3)]), 0.4).log_prob(z[:, m])
            in_w = dist.MultivariateNormal(x[n], scale_tril=lower).log_prob(w[m])
            joint[m, n] = of_s[m, n] + in_w + of_z[m, n].sum()
    log_q = [each.logsumexp(1) - math.log(7) for each in (joint, of_s, of_w, of_z)]
    covariance = torch.tensor([[1.0, 0.0], [0.9, 0.5]])
    prior_w = dist.MultivariateNormal(torch.zeros(2), scale_tril=covariance).log_prob(w)
    deviations = (covariance @ covariance.T).diagonal().sqrt()
    log_p = [
        dist.Gamma(2.0, 1.0).log_prob(s),
        dist.Normal(0.0, deviations).log_prob(w),
        dist.Normal(0.0, 1.0).log_prob(z.movedim(1, 0)),
    ]
    together = log_q[1] + log_q[2].sum(1) + log_q[3].sum((1, 2))
    for name, q, p in zip(("s", "w", "z"), log_q[1:], log_p, strict=True):
        assert torch.allclose(found.dimensions[name], (q - p).mean(0), rtol=1e-9)
        assert torch.allclose(found.dimension_errors[name], (q - p).std(0) / 7**0.5, rtol=1e-9)
    assert found.total_correlation == pytest.approx((log_q[0] - together).mean().item(), rel=1e-9)
    assert found.remainder == pytest.approx((log_p[1].sum(1) - prior_w).mean().item(), rel=1e-9)
    whole = found.total_correlation + found.dimension_wise_kl + found.remainder
    assert found.marginal_kl == pytest.approx(whole, rel=1e-9)
    assert found.marginal_kl == pytest.approx(marginal_kl(hierarchy, of_hierarchy, x, samples=7, rows=rows).marginal_kl)


def test_sites_that_depend_on_each_other_are_taken_by_draws():
    """s ~ N(0, 1) and t = s/2 + noise under both programs: t is N(0, 1/4 + 1) apart from N(0, 2), its own prior."""

    def chain(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("t", dist.Normal(s, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("t", dist.Normal(0.5 * s, 1.0))

    found = total_correlation(chain, guide, torch.zeros(20), samples=3000, rows=2**14)
    assert found.posterior_by == {"s": "mixture", "t": "nearest neighbours"}
    assert found.prior_by == {"s": "closed form", "t": "mixture"}
    assert found.dimensions["s"] == pytest.approx(0.0, abs=1e-6)
    ratio = 1.25 / 2
    expected = 0.5 * (ratio - 1 - math.log(ratio))
    assert found.dimensions["t"] == pytest.approx(expected, abs=5 * float(found.dimension_errors["t"]) + 0.01)
    # Correlation of s and t is 0.5/√1.25 under the guide.
    expected = -0.5 * math.log(1 - 0.25 / 1.25)
    assert found.total_correlation == pytest.approx(expected, abs=5 * found.total_correlation_error + 0.01)
    # KL of t given s: a mean of s²/8.
    assert found.marginal_kl == pytest.approx(1 / 8, abs=5 * found.marginal_kl_error)


def test_a_simplex_counts_by_its_unconstrained_values():
    """Stick-breaking of a correlated normal: the total correlation is that of the normal, whatever the map."""
    rho = 0.8

    def proportions(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]), obs=x)

    def guide(x):
        normal = dist.MultivariateNormal(torch.zeros(len(x), 2), torch.tensor([[1.0, rho], [rho, 1.0]]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(normal, [T.StickBreakingTransform()]))

    found = total_correlation(proportions, guide, torch.zeros(5), samples=2000)
    assert found.dimensions["z"].shape == (2,) and found.posterior_by == {"z": "nearest neighbours"}
    expected = -0.5 * math.log(1 - rho**2)
    assert found.total_correlation == pytest.approx(expected, abs=5 * found.total_correlation_error + 0.01)
    exact = marginal_kl(proportions, guide, torch.zeros(5), samples=2000).marginal_kl
    assert found.marginal_kl == pytest.approx(exact, abs=1e-4)


def test_flows_have_their_joint_density_and_single_values_by_draws():
    guide = AmortizedGuide(model, nn.Linear(3, 6), Flow, example=torch.zeros(2, 3))
    x = torch.randn(40, 3)
    found = total_correlation(model, guide, x, samples=300)
    assert found.posterior_by == {"z": "nearest neighbours"} and found.held_out is None
    assert found.marginal_kl == pytest.approx(marginal_kl(model, guide, x, samples=300).marginal_kl, abs=1e-4)


def test_what_a_prior_without_density_leaves_unknown():
    def sampled(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ImplicitDistribution(lambda s: torch.randn(*s, 3), (len(x),), (3,)))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    def inside(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor([0.0, 0.3, -0.3]) + 0.3 * x, 0.4).to_event(1))

    x = whitened(500)
    found, known = total_correlation(sampled, inside, x), total_correlation(model, inside, x)
    assert found.prior_by == {"z": "nearest neighbours"} and found.posterior_by == {"z": "mixture"}
    assert math.isnan(found.marginal_kl) and math.isnan(found.remainder)
    assert found.total_correlation == known.total_correlation
    # The same draws of q, where draws of the prior are near: ten of these say log p to 0.3, of 1000 to about 0.02.
    assert torch.allclose(found.dimensions["z"], known.dimensions["z"], atol=0.1)


def test_one_value_has_no_total_correlation():
    def single(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ImplicitDistribution(lambda s: x + 0.5 * torch.randn(s), (len(x),)))

    found = total_correlation(single, guide, torch.randn(50))
    assert found.total_correlation == 0.0 and found.held_out is None
    assert found.marginal_kl == pytest.approx(found.dimension_wise_kl, abs=1e-6)


def test_what_is_refused():
    x = torch.randn(9, 3)
    with pytest.raises(ValueError, match="is a point mass"):
        total_correlation(model, AmortizedGuide(model, nn.Linear(3, 6), Delta, example=x), x)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        total_correlation(model, correlated, x, samples=0)
    with pytest.raises(ValueError, match="at least 3 observations, got 2"):
        total_correlation(model, implicit, x[:2])
    semi_implicit = AmortizedGuide(model, nn.Linear(3, 6), SemiImplicit, example=x)
    assert total_correlation(model, semi_implicit, x, samples=50, steps=5).held_out is not None

    class TooWide(dist.Normal):
        """Its density is that of a narrower distribution than its draws'."""

        def rsample(self, sample_shape=()):
            return self.loc + 100 * self.scale * torch.randn(self._extended_shape(sample_shape))

    def wrong(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", TooWide(0.1 * x, 0.1).to_event(1))

    with pytest.raises(ArithmeticError, match="no divergence is negative"):
        total_correlation(model, wrong, x, samples=200)

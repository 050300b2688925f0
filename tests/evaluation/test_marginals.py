"""The two parts of the rate against closed forms, and against the double sum written out."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.data import LinearGaussian
from pyrogen.distributions import (
    Delta,
    Flow,
    Implicit,
    Mixture,
    MultivariateNormal,
    Normal,
    NormalLikelihood,
    SemiImplicit,
    StandardNormal,
)
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation.aggregate import Aggregate, aggregated
from pyrogen.evaluation.marginals import marginal_kl, mutual_information
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel

SLOPE, SCALE = 0.9, 0.4


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def line(x, scale=SCALE):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(SLOPE * x, scale).to_event(1))


def test_closed_form_of_a_linear_gaussian():
    """x ~ N(m, 4 I) and z | x ~ N(0.9 x, 0.16 I) make z ~ N(0.9 m, (3.24 + 0.16) I)."""
    torch.manual_seed(0)
    mean, count = torch.tensor([1.0, -0.5]), 4000
    found = marginal_kl(model, line, mean + 2 * torch.randn(count, 2), samples=2000)
    variance = 4 * SLOPE**2 + SCALE**2
    divergence = 0.5 * (2 * (variance - 1 - math.log(variance)) + SLOPE**2 * mean.square().sum().item())
    information = math.log(variance / SCALE**2)
    assert found.marginal_kl == pytest.approx(divergence, rel=0.05)
    assert found.mutual_information == pytest.approx(information, rel=0.05)
    assert found.rate == pytest.approx(divergence + information, rel=0.05)
    assert abs(found.marginal_kl - divergence) < 5 * found.marginal_kl_error
    assert found.rate - math.log(count) < found.marginal_kl < found.rate


@pytest.mark.parametrize(("rows", "features", "scale"), [(180, 4, 0.6), (180, 3, 0.4), (3, 1, 1.0)])
def test_the_divergence_of_all_data_is_within_the_excess(rows, features, scale):
    """Of x ~ N(0, 4 I) and z | x ~ N(0.9 x, s² I), over 20 sets of rows: the mean of both bounds has an error of a few
    hundredths; the third case, of three rows, has a spread of a tenth."""

    def few(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(features), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(features), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(SLOPE * x, scale).to_event(1))

    variance = 4 * SLOPE**2 + scale**2
    truth = 0.5 * features * (variance - 1 - math.log(variance))
    found = [marginal_kl(few, guide, 2 * torch.randn(rows, features), samples=500, seed=seed) for seed in range(20)]
    upper = sum(each.marginal_kl for each in found) / 20
    lower = sum(each.marginal_kl - each.excess for each in found) / 20
    assert lower - 0.1 < truth < upper + 0.1
    assert upper - lower > 0.5


def hierarchy(x):
    with pyro.plate("data", len(x), dim=-1):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("x", dist.Normal(s.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1), obs=x)


@pytest.mark.usefixtures("parameter_store")
@pytest.mark.parametrize("rows", [4096, 10, 3])
@pytest.mark.parametrize("family", [Normal, Flow])
def test_the_double_sum_written_out(family, rows):
    """Constrained sites, one drawn given another, in a nested plate to the left."""
    torch.manual_seed(1)
    x = torch.randn(7, 2, dtype=torch.float64)
    guide = AmortizedGuide(hierarchy, nn.Linear(2, 4).double(), family, example=x).double()
    found = marginal_kl(hierarchy, guide, x, samples=7, rows=rows)
    whole = marginal_kl(hierarchy, guide, x, samples=7)
    if rows < 7:  # other draws, but of the same seven posteriors
        assert abs(found.mutual_information - whole.mutual_information) < 5 * whole.mutual_information_error
    with torch.no_grad():
        torch.manual_seed(0)
        order = torch.randperm(7)
        if rows >= 7:
            trace = pyro.poutine.trace(guide).get_trace(x[order])
            s, z = (torch.as_tensor(trace.nodes[name]["value"]) for name in ("s", "z"))
            log_q = torch.empty(7, 7, dtype=torch.float64)
            for n in range(7):
                held = pyro.condition(guide, data={"s": s, "z": z})
                nodes = pyro.poutine.trace(held).get_trace(x[n].expand(7, 2)).nodes
                log_q[:, n] = nodes["s"]["fn"].log_prob(s) + nodes["z"]["fn"].log_prob(z).sum(0)
            log_p = dist.Gamma(2.0, 1.0).log_prob(s) + dist.Normal(0.0, s).log_prob(z).sum(0)
            aggregate = log_q.logsumexp(1) - math.log(7)
            assert found.marginal_kl == pytest.approx((aggregate - log_p).mean().item(), rel=1e-9)
            information = (log_q[torch.arange(7), order] - aggregate).mean().item()
            assert found.mutual_information == pytest.approx(information, rel=1e-9)


def test_one_observation_is_not_told_from_others():
    found = marginal_kl(model, line, torch.ones(1, 2), samples=20)
    assert found.mutual_information == pytest.approx(0.0, abs=1e-5) and found.marginal_kl == pytest.approx(found.rate)
    assert "of one observation it is not known how much" in str(found) and "nan" not in str(found)
    one_sample = marginal_kl(model, line, torch.ones(3, 2), samples=1)
    assert math.isnan(one_sample.marginal_kl_error) and "nan" not in str(one_sample)


def test_far_posteriors_are_told_apart():
    x = 100.0 * torch.arange(8.0).unsqueeze(-1).expand(-1, 2)
    assert mutual_information(model, line, x, samples=30) == pytest.approx(math.log(8), abs=1e-4)


def test_a_global_site_is_held():
    def shifted(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        t = pyro.sample("t", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(t, SCALE).expand([len(x), 2]).to_event(1))

    found = marginal_kl(shifted, guide, torch.randn(10, 2), samples=50, rows=20)
    # z does not depend on x, and is drawn around the t that its prior has.
    assert found.mutual_information == pytest.approx(0.0, abs=1e-5)
    # KL(N(t, s² I) ‖ N(t, I)), a mean of 50 draws whose deviation is 1 − s².
    assert found.rate == pytest.approx(SCALE**2 - 1 - 2 * math.log(SCALE), abs=5 * (1 - SCALE**2) / 50**0.5)


def test_seeds_and_the_random_state():
    x, state = torch.randn(20, 2), torch.get_rng_state()
    first = marginal_kl(model, line, x, samples=10, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == marginal_kl(model, line, x, samples=10, seed=2) != marginal_kl(model, line, x, samples=10)
    assert "mutual information" in str(first) and "20 observations, 10 samples" in str(first)


def test_what_has_no_mixture_is_refused():
    toy, x = LinearGaussian(), LinearGaussian().x[:5]
    for family, message in (
        (Implicit, r"the sites \['z'\] are implicit; held_out_marginal_kl_estimate"),
        (SemiImplicit, "density at site 'z' is an estimate|helper sites"),
        (Delta, "is a point mass"),
    ):
        with pytest.raises(ValueError, match=message):
            marginal_kl(toy.model, AmortizedGuide(toy.model, nn.Linear(4, 8), family), x)
    with pytest.raises(NoDensityError):
        marginal_kl(toy.model, AmortizedGuide(toy.model, nn.Linear(4, 8), Implicit), x)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        marginal_kl(model, line, torch.zeros(3, 2), samples=0)

    def wrong(x):
        """Its density is that of a wider distribution than its draws'."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", TooWide(SLOPE * x, SCALE).to_event(1))

    class TooWide(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc + 100 * self.scale * torch.randn(self._extended_shape(sample_shape))

    def of_its_own(x):
        """A prior around each observation."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="the prior of the latent sites is not the same for all observations"):
        marginal_kl(of_its_own, line, torch.randn(9, 2), samples=5)
    with pytest.raises(ArithmeticError, match="no divergence is negative"):
        marginal_kl(model, wrong, torch.zeros(50, 2) + 0.01 * torch.arange(50.0).unsqueeze(-1), samples=200)


def test_a_posterior_that_differs_from_batch_to_batch_breaks_the_upper_bound():
    def standardised(x):
        """Where the posteriors of a batch stand depends on the whole of it."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - x.mean(0), SCALE).to_event(1))

    x = 100.0 * torch.arange(8.0).unsqueeze(-1).expand(-1, 2)
    with pytest.raises(ArithmeticError, match=r"log N = 2.079 less the mutual information .* rate − log N ≤ KL"):
        marginal_kl(model, standardised, x, samples=30)


PRIORS = {
    "standard": lambda: StandardNormal(2),
    "correlated": lambda: MultivariateNormal(2),
    "mixture": lambda: Mixture(2, components=3),
    "flow": lambda: Flow(2),
}
FAMILIES = {
    "normal": Normal,
    "multivariate": MultivariateNormal,
    "mixture": Mixture,
    "coupling": partial(Flow, transform="spline_coupling", layers=2),
    "autoregressive": Flow,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_inside_the_bounds_everywhere(prior, family, spread):
    """Each draw has a posterior of its own in the mixture, so the lower bound holds draw by draw, and for their mean
    up to rounding; the upper one in the mean, to five standard errors."""
    program = LatentVariableModel(PRIORS[prior](), NormalLikelihood(nn.Linear(2, 3)))
    x = spread * torch.randn(25, 3)
    guide = AmortizedGuide(program, nn.Linear(3, 4), FAMILIES[family])
    with torch.no_grad():
        for parameter in guide.conditionals.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    found = marginal_kl(program, guide, x, samples=100)
    assert found.rate - math.log(25) - 1e-4 <= found.marginal_kl <= found.rate + 5 * found.mutual_information_error
    assert found.marginal_kl > -5 * found.marginal_kl_error
    assert found.mutual_information + found.marginal_kl == pytest.approx(found.rate, abs=1e-5)


def two_sites(x):
    with pyro.plate("data", len(x)):
        pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)


def two_apart(x):
    with pyro.plate("data", len(x)):
        pyro.sample("s", dist.LogNormal(x[:, 0], 0.5))
        pyro.sample("z", dist.Normal(x, SCALE).to_event(1))


def two_together(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(x[:, 0], 0.5))
        pyro.sample("z", dist.Normal(x + s.unsqueeze(-1), SCALE).to_event(1))


def test_sites_that_do_not_depend_on_each_other_are_scored_by_one_pass(monkeypatch):
    x = torch.randn(30, 2)
    with aggregated(two_sites, two_apart, x, seed=0, rows=100) as aggregate:
        assert aggregate.separate
    with aggregated(two_sites, two_together, x, seed=0, rows=100) as aggregate:
        assert not aggregate.separate
    fast = marginal_kl(two_sites, two_apart, x, samples=40, rows=100)
    monkeypatch.setattr(Aggregate, "separate", False)
    slow = marginal_kl(two_sites, two_apart, x, samples=40, rows=100)
    assert fast.marginal_kl == pytest.approx(slow.marginal_kl, abs=1e-5)
    assert fast.mutual_information == pytest.approx(slow.mutual_information, abs=1e-5)


def test_memory_is_bounded_and_the_encoder_sees_a_row_once_for_all_draws():
    seen, scored = [], []

    class Watched(dist.Normal):
        def log_prob(self, value):
            scored.append(value.numel())
            return super().log_prob(value)

        def expand(self, batch_shape, _instance=None):
            return Watched(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def watched(x):
        seen.append(len(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Watched(SLOPE * x, torch.tensor(SCALE)).to_event(1))

    marginal_kl(model, watched, torch.randn(1000, 2), samples=500, rows=128)
    assert max(seen) <= 128 and max(scored) <= 128 * 2
    # The mixture, the draws and their own densities; and a few rows to check programs by.
    assert sum(seen) <= 1000 + 500 + 500 + 20

"""What everything that looks at the aggregate posterior has in common."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Flow, SemiImplicit
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.evaluation.aggregate import aggregated
from pyrogen.evaluation.dimensions import total_correlation
from pyrogen.evaluation.errors import check_not_negative
from pyrogen.evaluation.marginals import marginal_kl
from pyrogen.evaluation.prior_match import mmd, prior_holes
from pyrogen.inference import AmortizedGuide

FUNCTIONS = [marginal_kl, total_correlation, prior_holes, mmd]


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.9 * x, 0.4).to_event(1))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prior_of_each_observation_s_own_is_refused(function):
    def of_its_own(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def sampled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ImplicitDistribution(lambda s: x + torch.randn(*s, 2), (len(x),), (2,)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for own in (of_its_own, sampled):
        if function is not marginal_kl or own is of_its_own:
            with pytest.raises(ValueError, match="the prior of the latent sites is not the same for all observations"):
                function(own, guide, torch.randn(9, 2), samples=100)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_has_no_aggregate_is_refused(function):
    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def masking(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1).mask(x[:, 0] > 0))

    x = torch.randn(9, 2)
    for programs in ((masked, guide), (model, masking)):
        with pytest.raises(ValueError, match="the latent site 'z' is masked"):
            function(*programs, x, samples=100)

    def only_global(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1), obs=x)

    with pytest.raises(ValueError, match='no latent site in the plate "data"'):
        function(only_global, lambda x: pyro.sample("t", dist.Normal(0.0, 1.0)), x, samples=100)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_global_site_is_held_and_random_numbers_are_given_back(function):
    """Around whatever t the guide drew, the prior and the posteriors are the same."""

    def shifted(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def of_shifted(x):
        t = pyro.sample("t", dist.Normal(0.0, 50.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1))

    x, state = torch.randn(300, 2), torch.get_rng_state()
    first = function(shifted, of_shifted, x, samples=200, seed=3, rows=256)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(first) == str(function(shifted, of_shifted, x, samples=200, seed=3, rows=256))
    if function in (marginal_kl, total_correlation):
        # The same density but for rounding at |t| of some tens.
        assert first.marginal_kl == pytest.approx(0.0, abs=1e-4)
    elif function is prior_holes:
        assert first.mass == pytest.approx(0.01, abs=5 * first.error)
    else:
        assert first.p_value > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", [None, Flow])
def test_densities_of_some_observations_written_out(family):
    """Values from anywhere, such as the prior, under the mixture over a part of the observations."""
    q = guide if family is None else AmortizedGuide(model, nn.Linear(2, 4), family, example=torch.zeros(2, 2))
    x, some = torch.randn(9, 2), torch.tensor([1, 3, 4, 8])
    with aggregated(model, q, x, seed=0, rows=5) as aggregate:
        z = aggregate.prior(12)
        found, prior = aggregate.log_prob(z, some), aggregate.prior_log_prob(z)
    assert torch.allclose(prior, dist.Normal(0.0, 1.0).log_prob(z["z"]).sum(1))
    with torch.no_grad(), pyro.get_param_store().scope():
        fn = pyro.poutine.trace(q).get_trace(x[some]).nodes["z"]["fn"]
        expected = fn.log_prob(z["z"].unsqueeze(1).expand(12, 4, 2)).logsumexp(1) - math.log(4)
    assert torch.allclose(found, expected)


def test_observations_in_turn():
    with aggregated(model, guide, torch.randn(5, 2), seed=0, rows=8) as aggregate:
        chosen = aggregate.choose(12)
    assert torch.equal(chosen[:5].sort().values, torch.arange(5)) and len(chosen) == 12
    assert torch.equal(chosen[5:10].sort().values, torch.arange(5))


def test_a_density_that_is_an_estimate_is_none():
    semi_implicit = AmortizedGuide(model, nn.Linear(2, 4), SemiImplicit, example=torch.zeros(2, 2))
    with aggregated(model, semi_implicit, torch.zeros(5, 2), seed=0, rows=8) as aggregate:
        assert not aggregate.has_posterior_density and aggregate.has_prior_density
        with pytest.raises(ValueError, match=r"is an estimate \(SemiImplicit\)"):
            aggregate.need_posterior_density("this", "that")


def test_chance_is_no_error():
    check_not_negative("it", -0.4, 0.1, 1000, "no")
    check_not_negative("it", -5.0, 0.1, 2, "no")
    with pytest.raises(ArithmeticError, match=r"it came out as -0.600 nats \(standard error 0.100\), and no"):
        check_not_negative("it", -0.6, 0.1, 1000, "no")

"""Draws from exact posteriors against closed forms and quadrature; what is no reference says so."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import biject_to

from pyrogen.data import EightSchools, LinearGaussian
from pyrogen.distributions import Bernoulli, Implicit, StandardNormal
from pyrogen.distributions.implicit import ImplicitDistribution, NoDensityError
from pyrogen.evaluation import reference as module
from pyrogen.evaluation.reference import ReferencePosterior, _Density, nuts
from pyrogen.evaluation.running import prepared
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


def within(found, truth, deviation, size):
    """Means of so many draws with such a standard deviation: five standard errors are exceeded once in 10^6."""
    torch.testing.assert_close(found, truth, atol=float(5 * deviation / math.sqrt(size)), rtol=0)


def test_moments_of_a_correlated_posterior():
    toy = LinearGaussian(latent=2, observed=3, scale=1.0, seed=7)
    x = toy.x[:1].double()
    found = nuts(toy.model, None, x, draws=100, warmup=150, chains=2)
    assert found.samples["z"].shape == (2, 100, 1, 2) and found.samples["z"].dtype == torch.float64
    assert found.r_hat["z"].shape == found.effective_sample_size["z"].shape == (1, 2)
    assert found.divergent.shape == (2, 100, 1) and found.acceptance.shape == (2, 1)
    size = float(found.effective_sample_size["z"].min())
    assert size > 25 and found.r_hat["z"].max() < 1.05 and found.acceptance.min() > 0.5 and found.divergences == 0
    z, posterior = found.samples["z"].flatten(0, 2), toy.posterior(x)
    covariance = posterior.covariance_matrix.squeeze(0)
    scale = covariance.diagonal().sqrt()
    correlation = covariance[0, 1] / scale.prod()
    assert correlation > 0.6
    within((z.mean(0) - posterior.mean[0]) / scale, torch.zeros(2).double(), 1.0, size)
    within(z.std(0) / scale, torch.ones(2).double(), 1 / math.sqrt(2), size)
    within(torch.corrcoef(z.T)[0, 1], correlation, 1 - correlation**2, size)


def test_global_sites_are_sampled_with_all_observations(global_mean):
    found = nuts(global_mean.model, global_mean.guide, global_mean.x, draws=150, warmup=50, chains=2)
    assert found.samples["theta"].shape == (2, 150) and found.r_hat["theta"].shape == ()
    assert found.divergent.shape == (2, 150) and found.acceptance.shape == (2,)
    size, scale = float(found.effective_sample_size["theta"]), global_mean.variance.sqrt()
    assert size > 25
    within(found.samples["theta"].mean(), global_mean.loc, scale, size)
    within(found.samples["theta"].std() / scale, torch.tensor(1.0).double(), 1 / math.sqrt(2), size)


def test_eight_schools_from_a_guide_on_one_of_the_modes():
    """Both signs of τ come out of starting points with τ > 0, and moments are those of quadrature.

    η is integrated out, as it is there: with it, chains cross between the modes some ten times in a thousand draws.
    """
    toy = EightSchools()

    def model(x):
        with pyro.plate("data", len(x)):
            mu, tau = (pyro.sample(name, dist.Normal(torch.tensor(0.0), 1.0)) for name in ("mu", "tau"))
            scale = (toy.scale.square() + tau.unsqueeze(-1).square()).sqrt()
            pyro.sample("x", dist.Normal(mu.unsqueeze(-1), scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("mu", dist.Normal(torch.tensor(0.7), 0.2))
            pyro.sample("tau", dist.Normal(torch.tensor(0.5), 0.1))

    found = nuts(model, guide, toy.x, draws=150, warmup=60, chains=2)
    tau, mu, exact = found.samples["tau"], found.samples["mu"], toy.exact
    assert found.r_hat["mu"] < 1.05
    assert all(((tau > 0.2).any(1) & (tau < -0.2).any(1)).flatten())
    size = float(found.effective_sample_size["mu"])
    assert size > 25
    within(mu.mean(), torch.tensor(exact.mean_mu), exact.sd_mu, size)
    within(mu.std() / exact.sd_mu, torch.tensor(1.0), 1 / math.sqrt(2), size)
    # The deviation of |τ| is at most that of its prior, 0.6; it does not cross, so it moves as fast as μ.
    within(tau.abs().mean(), torch.tensor(exact.mean_abs_tau), 0.6, size)


def program(x, covariate):
    """Constrained sites, one in a nested plate to the left and one masked, and a covariate."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("data", len(x), dim=-1):
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]).double()))
        with pyro.poutine.mask(mask=covariate > 0):
            idle = pyro.sample("idle", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("parts", 2, dim=-2):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(()).double(), 0.5))
        loc = covariate * s.sum(0) + share[..., 0] + idle
        pyro.sample("x", dist.Normal(loc, rate), obs=x)


def test_the_density_written_out():
    x, covariate = torch.randn(3).double(), torch.tensor([1.0, -1.0, 0.5]).double()
    with prepared(program, None, (x, covariate), seed=0, guided=False) as pair:
        density = _Density(pair, slice(0, 3))
        flat = torch.randn(sum(shape.numel() for shape in density.latents.shapes.values())).double()
        values = density.latents.values(flat)
        assert {name: tuple(value.shape) for name, value in values.items()} == {
            "rate": (), "share": (3, 3), "idle": (3,), "s": (3, 2)
        }  # fmt: skip
        rate, share, idle, s = values.values()
        simplex = biject_to(dist.Dirichlet(torch.ones(3)).support)
        loc = covariate * s.sum(1) + share[:, 0] + idle
        log_p = (
            dist.Gamma(2.0, 1.0).log_prob(rate) + rate.log()
            + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]).double()).log_prob(share).sum()
            + simplex.log_abs_det_jacobian(simplex.inv(share), share).sum()
            + dist.Normal(0.0, 1.0).log_prob(idle).sum()  # masked out in one row, and its prior there all the same
            + dist.LogNormal(0.0, 0.5).log_prob(s).sum() + s.log().sum()
            + dist.Normal(loc, rate).log_prob(x).sum()
        )  # fmt: skip
        torch.testing.assert_close(density.potential({"z": flat}), -log_p)
        assert density.potential({"z": flat}).requires_grad is False
    drawn = nuts(program, None, (x, covariate), draws=4, warmup=1, chains=2).samples
    assert drawn["rate"].shape == (2, 4) and drawn["share"].shape == (2, 4, 3, 3) and drawn["s"].shape == (2, 4, 3, 2)
    torch.testing.assert_close(drawn["share"].sum(-1), torch.ones(2, 4, 3).double())


@pytest.fixture
def decoder():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (4,))))
    return model, (torch.rand(2, 4) > 0.5).float()


def test_an_implicit_guide_gives_starting_points_and_nothing_is_left_changed(decoder):
    model, x = decoder
    guide = AmortizedGuide(model, MLP(4, 8), Implicit)
    parameters = copy.deepcopy(model.state_dict())
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    first = nuts(model, guide, x, draws=6, warmup=4, chains=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = nuts(model, guide, x, draws=6, warmup=4, chains=2, seed=1)
    other = nuts(model, guide, x, draws=6, warmup=4, chains=2, seed=2)
    assert torch.equal(first.samples["z"], again.samples["z"])
    assert not torch.equal(first.samples["z"], other.samples["z"])
    assert not first.samples["z"].requires_grad and first.samples["z"].shape == (2, 6, 2, 2)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in (*model.parameters(), *guide.parameters()))
    assert all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def made(z, chains=2, draws=1000):
    """A reference of one scalar site with given draws, ``(chains, draws, B)``."""
    r_hat, size = module._diagnostics(z, is_global=False)
    divergent = torch.zeros(z.shape, dtype=torch.bool)
    return ReferencePosterior({"z": z}, {"z": r_hat}, {"z": size}, divergent, torch.ones(2, 3), (z[0, 0],), 100)


def test_what_is_no_reference_says_so():
    z = torch.randn(2, 1000, 3)
    good = made(z)
    assert good.converged and "NOT A REFERENCE" not in str(good) and (good.chains, good.draws) == (2, 1000)
    apart = made(z + torch.tensor([[0.0], [1.0]])[..., None] * torch.tensor([0.0, 1.0, 0.0]))
    assert not apart.converged and apart.doubtful["z"].tolist() == [False, True, False]
    assert "NOT A REFERENCE" in str(apart) and "z 1 of 3" in str(apart)
    slow = made(z[:, :150])
    assert not slow.converged and (slow.effective_sample_size["z"] < 400).all()
    stuck = made(z * torch.tensor([1.0, 0.0, 1.0]))
    assert stuck.r_hat["z"][1] == math.inf and stuck.effective_sample_size["z"][1] == 0
    assert stuck.doubtful["z"].tolist() == [False, True, False]


def test_a_unit_that_the_support_holds_is_not_stuck():
    factors = torch.randn(2, 1000, 1, 2, 2).tril()
    factors[..., 0, 0] = 1.0
    for is_global, draws in ((False, factors), (True, factors[:, :, 0])):
        r_hat, size = module._diagnostics(draws, is_global)
        assert r_hat.isnan().sum() == size.isnan().sum() == 2
        assert r_hat[r_hat.isfinite()].max() < 1.01


@pytest.mark.parametrize("major", [0, 1])
def test_diagnostics_of_both_versions_of_arviz(major, monkeypatch):
    pytest.importorskip("arviz_stats" if major else "arviz")
    monkeypatch.setattr(module, "arviz_major", lambda: major)
    units = torch.randn(4, 500, 2).double()
    units[0, :, 1] += 2
    r_hat, size = module._arviz_diagnostics(units.numpy())
    assert r_hat[0] < 1.01 and r_hat[1] > 1.2
    # 2000 independent draws; the estimate has a relative error of about 5 %, that of the tails more.
    assert 1400 < size[0] < 2600 and size[1] < 100
    assert isinstance(r_hat, np.ndarray)


def test_what_cannot_be_sampled_is_refused(decoder):
    model, x = decoder
    for implicit in (
        LatentVariableModel(Implicit(2), Bernoulli(MLP(2, (4,)))),
        lambda x: globally_implicit(x),
    ):
        with pytest.raises(NoDensityError, match="NUTS needs log p"):
            nuts(implicit, None, x)
    with pytest.raises(ValueError, match="the model has none"):
        nuts(without_latents, None, x)
    with pytest.raises(ValueError, match="expected at least 2 of 4 draws, got 1 of 500"):
        nuts(model, None, x, chains=1)
    with pytest.raises(ValueError, match="draws must be a whole number of at least 1"):
        nuts(model, None, x, draws=0)
    with pytest.raises(ValueError, match="target_acceptance must be between 0 and 1, got 1"):
        nuts(model, None, x, target_acceptance=1)
    with pytest.raises(ValueError, match="exactly the model's latent sites"):
        nuts(model, without_latents, x)


def globally_implicit(x):
    noise = pyro.sample("noise", ImplicitDistribution(torch.randn, (1,)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(noise, 1.0).expand([4]).to_event(1), obs=x)


def without_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=x)


def test_where_no_start_is_possible_it_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z, z + 1.0), obs=x)

    with pytest.raises(ArithmeticError, match=r"not finite at 100 starting points of the observations \[1\]"):
        nuts(model, None, torch.tensor([1.0, 5.0]))


def test_a_start_is_drawn_again_where_it_is_impossible():
    """The guide's draws are possible every other time."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("half", torch.where(z > 0, 0.0, -math.inf), has_rsample=False)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = nuts(model, None, torch.tensor([0.5, 1.0]), draws=4, warmup=2, chains=3)
    assert (found.samples["z"] > 0).all()


def test_a_linear_layer_as_a_likelihood_of_plain_functions():
    weight = nn.Linear(2, 3)

    def model(x):
        pyro.module("weight", weight)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(weight(z), scale).to_event(1), obs=x)

    found = nuts(model, None, torch.randn(1, 3), draws=4, warmup=2, chains=2)
    assert found.samples["z"].shape == (2, 4, 1, 2)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in weight.parameters())

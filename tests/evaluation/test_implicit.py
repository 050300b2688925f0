"""Implicit guides, priors and likelihoods: what is still known of them, what is refused, what is only estimated."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.data import LinearGaussian
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal, Vamp
from pyrogen.distributions.implicit import ImplicitDistribution, NoDensityError
from pyrogen.evaluation import (
    active_units,
    critic_estimates,
    evaluate,
    explicit_guide,
    importance_sampling,
    log_likelihood,
    posterior_samples,
    rate_distortion,
    reconstruct,
    sample,
    to_arviz,
)
from pyrogen.experiment.table import Comparison
from pyrogen.inference import AAE, AVB, ELBO, GAN, AmortizedGuide
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP, Critic

SHAPE = (1, 4, 4)
FEW = {"explicit_steps": 5, "ratio_steps": 5, "particles": 10}


def small(features, context):
    return Critic(features, context, hidden=(16,))


@pytest.fixture
def toy():
    return LinearGaussian()


@pytest.fixture
def implicit(toy):
    """The exact posterior of :func:`toy`, of which only draws are shown."""
    inverse = torch.linalg.inv(toy.weight.T @ toy.weight + toy.scale**2 * torch.eye(2))
    network = nn.Linear(6, 2, bias=False)
    with torch.no_grad():
        network.weight[:] = torch.cat([inverse @ toy.weight.T, torch.linalg.cholesky(toy.scale**2 * inverse)], 1)
    return AmortizedGuide(toy.model, nn.Identity(), lambda f, c: Implicit(f, c, noise=2, network=network))


def images(prior=None, likelihood=None, family=Implicit):
    model = LatentVariableModel(prior or StandardNormal(2), likelihood or Bernoulli(MLP(2, SHAPE, (8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, (8,)), family), (torch.rand(6, *SHAPE) > 0.5).float()


def generator():
    return Implicit(SHAPE, context=2, noise=0, network=MLP(2, SHAPE, (8,)))


def fitted(model, guide, objective, x):
    return pg.fit(model, guide, objective, x, epochs=1, batch_size=6, progress=False)


class TestExplicitGuide:
    def test_gives_the_exact_evidence(self, toy, implicit):
        """The mean of 50 errors over its standard error is about standard normal; 5 of these fail once in 10^6. The
        bias of the logarithm, −s²/2 for each, is added to what is allowed."""
        x = toy.x[:50]
        found = importance_sampling(toy.model, explicit_guide(toy.model, implicit, x, steps=800), x, particles=2000)
        error = float((found.log_likelihood - toy.log_likelihood(x)).mean())
        spread = float(found.standard_error.square().sum().sqrt()) / 50
        bias = float(found.standard_error.square().mean()) / 2
        assert spread < 0.01
        assert abs(error) < 5 * spread + bias

    def test_model_guide_and_random_state_stay_as_they_are(self):
        decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), MLP(8, SHAPE))
        model, guide, x = images(likelihood=Bernoulli(decoder))
        programs = nn.ModuleList([model, guide]).train()
        programs[0].likelihood.decoder[0].weight.requires_grad_(False)
        before, flags = copy.deepcopy(programs.state_dict()), [p.requires_grad for p in programs.parameters()]
        state = torch.get_rng_state()
        explicit_guide(model, guide, x, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in programs.state_dict().items())
        assert all(p.grad is None for p in programs.parameters())
        assert flags == [p.requires_grad for p in programs.parameters()]
        assert all(module.training for module in programs.modules())

    def test_its_draws_do_not_depend_on_the_callers_random_state(self, toy, implicit):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(explicit_guide(toy.model, implicit, toy.x[:9], steps=3).state_dict())
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())

    def test_a_vamp_prior_stays_bound_to_its_own_guide(self):
        """Two sites, of which the first, on which the prior hangs, is explicit."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.prior, self.decoder = Vamp(2, inputs=(4,), components=3), nn.Linear(4, 4)

            def forward(self, x):
                pyro.module("two", self)
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", self.prior())
                    y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(self.decoder(torch.cat([z, y], -1)), 1.0).to_event(1), obs=x)

        model = Two()
        guide = AmortizedGuide(model, nn.Linear(4, 3), {"y": Implicit}, example=torch.zeros(2, 4))
        z = torch.randn(5, 2)
        before = model.prior().log_prob(z).detach()
        explicit_guide(model, guide, torch.randn(5, 4), steps=2)
        torch.testing.assert_close(model.prior().log_prob(z).detach(), before)

    def test_global_sites_come_from_the_guide_itself(self):
        def model(x):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(theta + z, 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.sample("theta", dist.Normal(3.0, 1e-4))
            with pyro.plate("data", len(x)):
                pyro.sample("z", ImplicitDistribution(lambda s: torch.randn(*s, 1), (len(x),), (1,)))

        x = torch.randn(20, 1) + 3
        found = importance_sampling(model, explicit_guide(model, guide, x, steps=200), x, particles=2000)
        expected = dist.Normal(3.0, 2**0.5).log_prob(x[:, 0])
        # Weights between draws of θ are independent; 6 standard errors in each of 20 fail once in 10^7.
        assert ((found.log_likelihood - expected).abs() < 6 * found.standard_error + 1e-3).all()

    @pytest.mark.parametrize("case", ["prior", "likelihood"])
    def test_an_implicit_model_is_refused(self, case):
        model, guide, x = images(**{case: Implicit(2) if case == "prior" else generator()})
        with pytest.raises(
            NoDensityError, match=rf"sites \['{'z' if case == 'prior' else 'x'}'\] is implicit.*no guide"
        ):
            explicit_guide(model, guide, x)

    def test_bad_input_is_refused(self, toy, implicit, global_mean):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            explicit_guide(toy.model, implicit, toy.x[:3], steps=0)
        with pytest.raises(ValueError, match="no per-observation latent site"):
            explicit_guide(global_mean.model, global_mean.guide, global_mean.x)


class TestRefused:
    def test_log_likelihood_of_an_implicit_guide(self, toy, implicit):
        for function in (log_likelihood, importance_sampling):
            with pytest.raises(NoDensityError, match=r"latent sites \['z'\] is implicit.*explicit_guide") as raised:
                function(toy.model, implicit, toy.x[:4], particles=3)
            assert isinstance(raised.value, ValueError) and "no guide density" in str(raised.value)

    @pytest.mark.parametrize("case", ["prior", "likelihood"])
    def test_log_likelihood_of_an_implicit_model(self, case):
        part = Implicit(2) if case == "prior" else generator()
        model, guide, x = images(**{case: part}, family=Normal)
        with pytest.raises(NoDensityError, match=r"log p\(x, z\)"):
            log_likelihood(model, guide, x, 3)

    def test_helper_sites_of_the_guide_count(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                noise = ImplicitDistribution(torch.randn, (len(x),))
                helper = pyro.sample("helper", noise, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Normal(helper, 1.0))

        with pytest.raises(NoDensityError, match="helper"):
            log_likelihood(model, guide, torch.zeros(3), 2)
        assert rate_distortion(model, guide, torch.zeros(3)).rate.isnan().all()

    def test_what_a_gan_has_no_guide_for(self):
        model, _, x = images(likelihood=generator())
        run = fitted(model, None, GAN(critic=small), x)
        for call in (
            lambda: to_arviz(run, x),
            lambda: reconstruct(run.model, run.guide, x),
            lambda: posterior_samples(run.model, run.guide, x, 2),
        ):
            with pytest.raises(ValueError, match=r"latent sites \['z'\] but there is no guide for them, as after.*GAN"):
                call()


class TestWhatNeedsNoDensity:
    def test_rate_is_not_known_and_distortion_is(self, toy, implicit):
        found = rate_distortion(toy.model, implicit, toy.x[:20], particles=400)
        assert found.rate.isnan().all() and found.elbo.isnan().all()
        z = toy.posterior(toy.x[:20]).sample((400,))
        expected = -dist.Normal(z @ toy.weight.T, toy.scale).log_prob(toy.x[:20]).sum(-1).mean(0)
        # Each is a mean of 400 draws of about χ²₂ / 2, a standard error of 0.05 in either: 6 of √2 · 0.05.
        torch.testing.assert_close(found.distortion, expected, atol=0.5, rtol=0)

    def test_with_an_implicit_prior_or_likelihood(self):
        model, guide, x = images(prior=Implicit(2), family=Normal)
        found = rate_distortion(model, guide, x)
        assert found.rate.isnan().all() and found.distortion.isfinite().all()
        model, guide, x = images(likelihood=generator(), family=Normal)
        found = rate_distortion(model, guide, x)
        assert found.rate.isfinite().all() and found.distortion.isnan().all()
        assert reconstruct(model, guide, x).shape == x.shape

    def test_active_units_are_those_of_the_exact_posterior(self, toy, implicit):
        """Posterior means are A x with known A; 200 particles leave noise of s²/200 in each, which is taken off."""
        found = active_units(toy.model, implicit, toy.x, particles=200)
        expected = toy.posterior(toy.x).mean.var(0)
        torch.testing.assert_close(found.variances["z"], expected, atol=0.02, rtol=0)

    def test_arviz_leaves_out_what_needs_log_q(self):
        model, guide, x = images()
        tree = to_arviz(fitted(model, guide, AVB(3, critic=small), x), x, draws=20, chains=2, predictive_draws=3)
        names = {group.strip("/") for group in tree.groups()} - {""}
        assert names == {
            *("posterior", "posterior_predictive", "log_likelihood", "sample_stats"),
            *("prior", "prior_predictive", "observed_data"),
        }
        assert {*tree["sample_stats"].data_vars} == {"log_prior_z", "lp"}
        assert tree["posterior"]["z"].shape == (2, 20, 6, 2)

    def test_arviz_of_an_implicit_likelihood_has_no_log_likelihood(self):
        model, guide, x = images(likelihood=generator())
        tree = to_arviz(fitted(model, guide, pg.inference.VGH(critic=small), x), x, draws=4, chains=1)
        names = {group.strip("/") for group in tree.groups()}
        assert "posterior_predictive" in names and "log_likelihood" not in names

    def test_a_gan_is_sampled(self):
        model, _, x = images(likelihood=generator())
        run = fitted(model, None, GAN(critic=small), x)
        assert torch.equal(sample(run, 3), sample(run, 3, mean=True))
        assert sample(run, 3).shape == (3, *SHAPE)


class TestEvaluate:
    def test_linear_gaussian(self, toy, implicit, make_run):
        x = toy.x[:60]
        found = evaluate(make_run(toy.model, implicit, x), x, ratio_steps=100)
        truth = float(toy.log_likelihood(x).mean())
        # As for the guide itself: 5 standard errors of the mean, and the bias of the logarithm.
        allowed = 5 * found.monte_carlo_error + 60 * found.monte_carlo_error**2
        assert found.monte_carlo_error < 0.02
        assert abs(found.log_likelihood - truth) < allowed
        assert found.explicit_guide == "normal" and "likelihood" not in found.reasons
        prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        rate = float(torch.distributions.kl_divergence(toy.posterior(x), prior).mean())
        # Of 60 · 256 draws of log q/p, with a standard deviation of about 2, and critics that find nothing to add.
        assert found.held_out_rate_estimate == pytest.approx(rate, abs=0.15)
        assert found.held_out_rate_estimate_shown == f"{found.held_out_rate_estimate:.1f}"
        assert math.isnan(found.rate) and math.isnan(found.elbo) and math.isnan(found.rate_estimate)
        assert found.active_units == 2

    def test_columns_of_adversarial_variational_bayes(self):
        model, guide, x = images()
        run = fitted(model, guide, AVB(3, critic=small), x)
        state = torch.get_rng_state()
        before = copy.deepcopy(run.programs.state_dict())
        found = evaluate(run, x, **FEW)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in run.programs.state_dict().items())
        assert found.rate_estimate == critic_estimates(run, x).rate_estimate
        assert math.isfinite(found.rate_estimate) and math.isfinite(found.held_out_rate_estimate)
        assert math.isnan(found.marginal_kl_estimate) and found.held_out_marginal_kl_estimate_shown is None
        assert found.bits_per_dimension == pytest.approx(-found.log_likelihood / 16 / math.log(2))
        text = str(found)
        assert "rate, estimate" in text and "rate, held-out estimate" in text and "explicit guide (normal)" in text

    def test_columns_of_an_adversarial_autoencoder(self):
        model, guide, x = images(family=Normal)
        found = evaluate(fitted(model, guide, AAE(critic=small), x), x, **FEW)
        assert math.isfinite(found.rate) and found.explicit_guide is None
        assert math.isfinite(found.marginal_kl_estimate) and math.isfinite(found.held_out_marginal_kl_estimate)
        assert math.isnan(found.rate_estimate) and found.held_out_rate_estimate_shown is None

    def test_without_critics_and_without_a_guide_of_its_own(self):
        model, guide, x = images()
        run = fitted(model, guide, AVB(3, critic=small), x)
        found = evaluate(run, x, explicit_steps=0, ratio_steps=0)
        assert math.isnan(found.log_likelihood) and "explicit_steps=0" in found.reasons["likelihood"]
        assert math.isnan(found.held_out_rate_estimate)
        with pytest.raises(ValueError, match="ratio_steps must be a whole number, 0 or more"):
            evaluate(run, x, ratio_steps=-1)

    @pytest.mark.parametrize("case", ["prior", "likelihood"])
    def test_of_an_implicit_model_there_is_no_likelihood(self, case, make_run):
        model, guide, x = images(**{case: Implicit(2) if case == "prior" else generator()}, family=Normal)
        found = evaluate(make_run(model, guide, x), x, **FEW)
        assert math.isnan(found.log_likelihood) and "no log p(x, z)" in found.reasons["likelihood"]
        assert math.isfinite(found.rate) == (case == "likelihood")
        assert math.isfinite(found.distortion) == (case == "prior")
        assert math.isfinite(found.held_out_rate_estimate) == (case == "prior")

    def test_a_gan_says_why_nothing_is_known(self):
        model, _, x = images(likelihood=generator())
        found = evaluate(fitted(model, None, GAN(critic=small), x), x)
        of_samples = {"precision", "recall", "density", "coverage"}
        known = {k for k, v in found.to_dict().items() if isinstance(v, float) and math.isfinite(v)}
        assert of_samples <= known
        distances = {"frechet_distance", "kernel_distance"}
        errors = {f"{name}_error" for name in of_samples | distances}
        assert known - of_samples <= {"seconds"} | distances | errors
        assert "there is no guide" in found.reasons["likelihood"] and "there is no guide" in str(found)

    def test_explicit_runs_are_as_before(self, ppca, wide, make_run):
        model, x = ppca
        found = evaluate(make_run(model, wide, x), x[:20], particles=20)
        assert found.explicit_guide is None and "likelihood" not in found.reasons
        assert math.isnan(found.rate_estimate) and found.held_out_rate_estimate_shown is None
        assert "estimate" not in str(found)

    def test_the_table_names_estimates(self):
        model, guide, x = images()
        run = fitted(model, guide, AVB(3, critic=small), x)
        table = Comparison.of([evaluate(run, x, **FEW).to_dict() | {"parameters": 1}], {"implicit": run}, "test rows")
        text = repr(table)
        for shown in ("rate (estimate)", "rate (held-out estimate)", "log p(x) by", "normal guide, fitted afterwards"):
            assert shown in text
        assert "bound nothing" in text.splitlines()[-1]
        explicit = Comparison.of([{"rate": 1.0, "explicit_guide": None}], {"a": run}, "test rows")
        assert "estimate" not in repr(explicit) and "log p(x) by" not in repr(explicit)


def test_critic_estimates_of_other_objectives_are_not_there(ppca, wide, make_run):
    model, x = ppca
    assert isinstance(model, ProbabilisticPCA)
    found = critic_estimates(make_run(model, wide, x, objective=ELBO()), x)
    assert math.isnan(found.rate_estimate) and math.isnan(found.marginal_kl_estimate)

"""Priors fitted afterwards, against aggregate posteriors that are known, and what they must leave alone."""

import copy
import math
from functools import partial

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

import pyrogen as pg
from pyrogen.data import Data
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
    Vamp,
)
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation import importance_sampling, rate_distortion
from pyrogen.inference import AAE, ELBO, GAN, AmortizedGuide, FitOptions, NonFiniteLoss, Run
from pyrogen.inference.expectation_maximisation import expectation_maximisation
from pyrogen.inference.programs import Copies, as_module, describe_example, no_sites, unregistered
from pyrogen.inference.refit import refit_prior
from pyrogen.inference.with_prior import TwoStageGuide, WithPrior
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP

SHAPE = (1, 4, 4)
QUICK = {"epochs": 2, "batch_size": 8, "progress": False}


class Line(nn.Module):
    """q(z|x) = N(slope x, scale² I)."""

    def __init__(self, slope=0.9, scale=0.4):
        super().__init__()
        self.slope = slope
        self.scale = scale

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.scale).to_event(1))


def as_run(model, guide, *batch):
    """A run made by hand, of programs that were not fitted."""
    example = describe_example(tuple(x[:2] for x in batch))
    return Run(model, guide, ELBO(), pd.DataFrame(), FitOptions(epochs=1), example=example)


def linear(count=2000):
    """A linear model with a prior that is far off, the moments of its aggregate posterior, and observations."""
    torch.manual_seed(5)  # not the seed of the draws, which would be of the same noise
    x = torch.tensor([1.0, -0.5]) + torch.randn(count, 2) @ torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 2), scale=1.0))
    with torch.no_grad():
        model.likelihood.decoder.weight.copy_(torch.eye(2))
        model.likelihood.decoder.bias.zero_()
    run = as_run(model, Line(), x)
    cov = 0.81 * torch.cov(x.T, correction=0) + 0.16 * torch.eye(2)
    return run, dist.MultivariateNormal(0.9 * x.mean(0), cov), x


def small(family=Normal, objective=None):
    """A run of a small model of images with batch normalisation on both sides, and its data."""
    torch.manual_seed(0)
    x = torch.rand(40, *SHAPE)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 16), nn.Unflatten(1, SHAPE))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(decoder, "optimal"))
    guide = AmortizedGuide(model, encoder, family)
    return pg.fit(model, guide, objective or ELBO(), x, steps=1, progress=False), x


def second_stage(features=2):
    model = LatentVariableModel(StandardNormal(features), NormalLikelihood(MLP(features, features, (8,)), "shared"))
    return model, AmortizedGuide(model, MLP(features, 8, (8,)))


PRIORS = {
    "normal": partial(Normal, 2),
    "multivariate normal": partial(MultivariateNormal, 2),
    "mixture": partial(Mixture, 2, components=3),
    "flow": partial(Flow, 2, layers=2),
    "vamp": partial(Vamp, 2, SHAPE, components=3),
}


ALL = [*PRIORS, "second stage"]


def make(name):
    """A prior by its name, and its guide."""
    return second_stage() if name == "second stage" else (PRIORS[name](), None)


def refitted(run, x, name):
    prior, guide = make(name)
    return refit_prior(run, prior, x, guide=guide, **QUICK)


def test_a_normal_reaches_the_moments_of_the_aggregate_posterior():
    """20 000 draws: 2 n KL is χ² of 5 degrees of freedom at most, beyond 30 with a chance of 2e-5."""
    run, target, x = linear()
    again = refit_prior(run, MultivariateNormal(2), x, progress=False)
    prior, standard = again.model.prior(), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    divergence, remains = (torch.distributions.kl_divergence(target, p).item() for p in (standard, prior))
    assert remains < 30 / (2 * 20_000) < divergence / 1000
    assert again.guide is run.guide and run.guide.training and run.model.training

    # The rate falls by the marginal divergence that is gone, exactly so: both priors are normal, and of q(z) their
    # expectations see the moments alone, which are the target's.
    before, after = (rate_distortion(each.model, each.guide, x) for each in (run, again))
    assert (before.rate - after.rate).mean().item() == pytest.approx(divergence - remains, abs=1e-4)
    assert torch.equal(before.distortion, after.distortion)

    # The model is now x ~ N(m, C + I), whose log-likelihood is known, and higher than it was.
    marginal = dist.MultivariateNormal(prior.mean, prior.covariance_matrix + torch.eye(2))
    found = importance_sampling(again.model, Line(0.9, 1.2), x[:50], particles=2000)
    error = (found.log_likelihood - marginal.log_prob(x[:50])) / found.standard_error
    assert error.abs().max() < 5  # of 50, with a chance of 3e-5
    earlier = dist.MultivariateNormal(torch.zeros(2), 2 * torch.eye(2))
    assert (marginal.log_prob(x) - earlier.log_prob(x)).mean() > 0.5


def test_a_flow_comes_as_near():
    """By Adam on fresh draws, here in the mean over 20 000 others."""
    run, target, x = linear()
    again = refit_prior(run, Flow(2, layers=2, hidden=(16,)), x, epochs=10, learning_rate=3e-3, progress=False)
    z = target.sample((20_000,))
    with torch.no_grad():
        log_q, log_p = target.log_prob(z), again.model.prior().log_prob(z)
    assert (log_q - log_p).mean() == pytest.approx(0.0, abs=0.02)
    assert again.history["loss"].iloc[-1] == pytest.approx(target.entropy().item(), abs=0.1)


def test_expectation_maximisation_has_the_density_of_what_was_found():
    """Of a mixture of three, far from the origin and of very different scales, in double precision."""
    torch.manual_seed(0)
    loc = torch.tensor([[100.0, 0.0], [130.0, 1e-3], [100.0, 2e-3]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 1e-4], [3.0, 1e-4], [1.0, 2e-4]], dtype=torch.float64)
    truth = dist.MixtureOfDiagNormals(loc, scale, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log())
    z, other = truth.sample((20_000,)), truth.sample((20_000,))
    prior = Mixture(2, components=3).double()
    assert 1 < expectation_maximisation(prior, z) < 100
    # 14 parameters: 2 n KL is χ² of 14 degrees of freedom, beyond 50 with a chance of 6e-6; and the mean over other
    # draws has a variance of 2 KL / n.
    found = (truth.log_prob(other) - prior().log_prob(other)).mean()
    assert found.abs() < 50 / 40_000 + 5 * math.sqrt(14) / 20_000
    with pytest.raises(ValueError, match="3 components need as many draws at least, got 2"):
        expectation_maximisation(prior, z[:2])


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_expectation_maximisation_of_one_normal_is_exact(shape):
    torch.manual_seed(0)
    size = math.prod(shape)
    z = (torch.randn(500, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)).reshape(-1, *shape)
    full, free = MultivariateNormal(shape).double(), Normal(shape).double()
    for prior in (full, free):
        expectation_maximisation(prior, z)
    cov = torch.cov(z.flatten(1).T, correction=0)
    exact = dist.MultivariateNormal(z.flatten(1).mean(0), cov).log_prob(z.flatten(1))
    torch.testing.assert_close(full().log_prob(z), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(free().mean, z.mean(0))
    torch.testing.assert_close(free().stddev, z.std(0, correction=0), rtol=1e-5, atol=0)


def test_a_value_that_never_changes_is_no_obstacle():
    z = torch.cat([torch.randn(50, 1), torch.full((50, 1), 7.0)], -1)
    for prior in (MultivariateNormal(2), Mixture(2, components=2)):
        expectation_maximisation(prior, z)
        assert prior().sample((100,))[:, 1].sub(7).abs().max() < 0.01


def snapshot(run):
    """All there is of a run's programs and of the random state."""
    gradients = {name: p.grad.clone() for name, p in run.programs.named_parameters() if p.grad is not None}
    wanted = {name: p.requires_grad for name, p in run.programs.named_parameters()}
    modes = {name: module.training for name, module in run.programs.named_modules()}
    state = {name: value.clone() for name, value in run.programs.state_dict().items()}
    return state, gradients, wanted, modes, torch.get_rng_state()


@pytest.mark.usefixtures("parameter_store")
@pytest.mark.parametrize("name", ALL)
def test_all_else_stays_as_it_is(name):
    run, x = small()
    run.model.train()
    run.guide.contexts.train()
    for p in run.programs.parameters():
        p.grad = torch.ones_like(p)
    next(run.guide.encoder.parameters()).requires_grad_(False)
    parts, history = (run.model, run.guide, run.model.prior, run.objective, run.guide.model), run.history.copy()
    prior, guide = make(name)
    before = snapshot(run)
    again = refit_prior(run, prior, x, guide=guide, **QUICK)
    for was, now in zip(before[:2], snapshot(run)[:2], strict=True):
        assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)
    assert before[2:4] == snapshot(run)[2:4] and torch.equal(before[4], torch.get_rng_state())
    now = (run.model, run.guide, run.model.prior, run.objective, run.guide.model)
    assert all(a is b for a, b in zip(parts, now, strict=True)) and history.equals(run.history)

    # What is returned has the same decoder and the same guide.
    frozen = {id(p) for p in [*run.model.likelihood.parameters(), *run.guide.parameters()]}
    assert frozen < {id(p) for p in again.programs.parameters()}
    assert again.history["loss"].notna().all() and not again.model.training
    torch.manual_seed(1)
    expected = poutine.trace(unregistered(run.guide.eval())).get_trace(x).nodes["z"]["value"]
    torch.manual_seed(1)
    assert torch.equal(poutine.trace(unregistered(again.guide)).get_trace(x).nodes["z"]["value"], expected)


@pytest.mark.parametrize("name", ALL)
def test_saves_and_loads_as_any_other(name, tmp_path):
    run, x = small()
    again = refitted(run, x, name)
    pg.save(again, tmp_path / "run")
    loaded = pg.load(tmp_path / "run")
    ours, theirs = again.programs.state_dict(), loaded.programs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert loaded.history.equals(again.history) and repr(loaded) == repr(again)
    assert torch.equal(pg.sample(loaded, 10), pg.sample(again, 10))
    theirs, ours = (importance_sampling(each.model, each.guide, x, particles=5) for each in (loaded, again))
    assert torch.equal(theirs.log_likelihood, ours.log_likelihood)


class PyroLinear(PyroModule):
    """A decoder that is a module of Pyro's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 5)

    def forward(self, z):
        return self.linear(z)


def test_any_program_takes_another_prior(tmp_path):
    """One of Pyro's modules, which can't be taken apart; no code of a stranger's is needed to load it."""
    x = torch.randn(60, 5) @ torch.randn(5, 5)
    model = ProbabilisticPCA.maximum_likelihood(x, latent=2)
    run = pg.fit(model, AmortizedGuide(model, nn.Linear(5, 8)), ELBO(), x, steps=1, progress=False)
    again = refit_prior(run, Mixture(2, components=3), x, progress=False)
    assert again.model.model is run.model and again.guide.model is again.model
    pg.save(again, tmp_path / "run")
    assert torch.equal(pg.sample(pg.load(tmp_path / "run"), 10), pg.sample(again, 10))
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(PyroLinear()))
    run = pg.fit(model, AmortizedGuide(model, nn.Linear(5, 8)), ELBO(), x, steps=1, progress=False)
    again = refit_prior(run, Mixture(2, components=3), x, progress=False)
    assert isinstance(again.model, WithPrior) and pg.sample(again, 10).shape == (10, 5)


def decoder(z):
    net = pyro.module("net", NET)
    loc = pyro.param("loc", lambda: torch.zeros(3))
    return loc + net(z)


NET = nn.Linear(2, 3)


def function_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


def function_guide(x):
    loc = pyro.param("slope", lambda: torch.zeros(3, 2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ loc, 0.5).to_event(1))


@pytest.mark.parametrize("name", ["mixture", "second stage"])
def test_functions_keep_what_they_have_learned(name, tmp_path):
    x = torch.randn(30, 3)
    run = pg.fit(function_model, function_guide, ELBO(), x, steps=5, learning_rate=0.1, progress=False)
    again = refitted(run, x, name)
    ours, theirs = ({n.rpartition(".")[2]: v for n, v in each.programs.state_dict().items()} for each in (run, again))
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    assert ours["loc"].abs().min() > 0 and ours["slope"].abs().min() > 0  # they began at 0
    pg.save(again, tmp_path / "run")
    with pytest.raises(ValueError, match="trust=True"):
        pg.load(tmp_path / "run")
    prior, guide = make(name)
    programs = {"model": WithPrior(function_model, "z", prior)}
    programs["guide"] = function_guide if guide is None else TwoStageGuide(function_guide, guide, "z")
    for loaded in (pg.load(tmp_path / "run", trust=True), pg.load(tmp_path / "run", **programs)):
        theirs, ours = (importance_sampling(each.model, each.guide, x, particles=5) for each in (loaded, again))
        assert torch.equal(theirs.log_likelihood, ours.log_likelihood)


def distance(first, second):
    """The squared Fréchet distance of the normals with the moments of two samples."""
    first, second = first.flatten(1).double(), second.flatten(1).double()
    a, b = torch.cov(first.T), torch.cov(second.T)
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return ((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def test_a_plain_autoencoder_can_be_sampled():
    """Samples are about as far from the data as reconstructions are, where N(0, I) gave some that are far off."""
    torch.manual_seed(0)
    data = pg.data.load("digits", binarize=None)
    model = LatentVariableModel(StandardNormal(8), NormalLikelihood(MLP(8, data.event_shape, (64,)), 0.1))
    guide = AmortizedGuide(model, MLP(data.event_shape, 32, (64,)), Delta)
    run = pg.fit(model, guide, ELBO(beta=0.0), data, epochs=15, learning_rate=3e-3, progress=False)
    again = refit_prior(run, Mixture(8, components=10), progress=False)
    far, near = (distance(pg.sample(each, 1000, mean=True), data.test) for each in (run, again))
    rebuilt = distance(pg.evaluation.reconstruct(run.model, run.guide, data.train), data.test)
    assert far > 10 * near and near < 2 * rebuilt
    assert again.data == run.data and again.history["validation"].iloc[0] == pytest.approx(
        -again.history["loss"].iloc[0], abs=2.0
    )


def test_two_levels_have_the_log_likelihood_of_the_double_integral():
    """z, u and x have one value each, so that p(x) is a sum over a grid, in double precision."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(150, 1) - 3, 0.5 * torch.randn(150, 1) + 2]).double()
    model = LatentVariableModel(StandardNormal(1), NormalLikelihood(MLP(1, 1, (8,)), 0.7)).double()
    guide = AmortizedGuide(model, MLP(1, 8, (8,)).double()).double()
    run = pg.fit(model, guide, ELBO(), x, epochs=30, learning_rate=1e-2, precision="64-true", progress=False)
    second, its_guide = second_stage(1)
    again = refit_prior(run, second, x, guide=its_guide, epochs=30, batch_size=64, learning_rate=1e-2, progress=False)
    assert again.history["loss"].iloc[-1] < again.history["loss"].iloc[0]

    u, z = torch.linspace(-6, 6, 601, dtype=torch.float64), torch.linspace(-8, 8, 1601, dtype=torch.float64)
    with torch.no_grad():
        log_u = dist.Normal(0.0, 1.0).log_prob(u)
        log_z = second.likelihood(u[:, None]).log_prob(z[:, None, None])  # (z, u)
        log_z = (log_z + log_u).logsumexp(1) + math.log(0.02)
        assert log_z.logsumexp(0) + math.log(0.01) == pytest.approx(0.0, abs=1e-3)
        rows = x[::30]
        log_x = model.likelihood(z[:, None]).log_prob(rows[:, None])  # (x, z)
        exact = (log_x + log_z).logsumexp(1) + math.log(0.01)
    found = importance_sampling(again.model, again.guide, rows, particles=10_000)
    # The largest of ten errors, beyond 5 with a chance of 6e-6.
    assert ((found.log_likelihood - exact) / found.standard_error).abs().max() < 5
    assert found.standard_error.max() < 0.1


def test_the_second_encoder_sees_every_copy():
    """Copies of an observation have draws of their own, and so features of their own in the second stage."""
    run, x = small()
    _, guide = second_stage()
    with Copies(3), torch.no_grad():
        nodes = poutine.trace(TwoStageGuide(unregistered(run.guide), guide, "z")).get_trace(x.repeat(3, 1, 1, 1)).nodes
    with torch.no_grad():
        expected = poutine.trace(unregistered(guide)).get_trace(nodes["z"]["value"])
    torch.testing.assert_close(nodes["u"]["fn"].mean, expected.nodes["z"]["fn"].mean)


@pytest.mark.parametrize("name", ["mixture", "second stage"])
def test_whatever_takes_a_run_takes_it(name):
    run, x = small()
    again = refitted(run, x, name)
    found = pg.evaluate(again, x[:10], particles=10)
    assert math.isfinite(found.log_likelihood) and found.latent_units == (4 if name == "second stage" else 2)
    tree = pg.to_arviz(again, x[:3], draws=4)
    assert tree["posterior"]["z"].shape[-1] == 2
    assert pg.sample(again, 5).shape == (5, *SHAPE)
    more = pg.fit(again.model, again.guide, ELBO(), x, steps=2, progress=False)
    assert math.isfinite(more.history["loss"].iloc[-1])


@pytest.mark.usefixtures("parameter_store")
def test_a_prior_of_a_prior():
    """The latent of the second stage is then the one site whose distribution depends on nothing."""
    run, x = small()
    again = refitted(refitted(run, x, "second stage"), x, "mixture")
    nodes = poutine.trace(unregistered(again.model)).get_trace(x).nodes
    assert isinstance(nodes["u"]["fn"], dist.MixtureOfDiagNormals) and again.model.site == "u"
    assert importance_sampling(again.model, again.guide, x, particles=5).log_likelihood.isfinite().all()


@pytest.mark.parametrize("family", [Implicit, SemiImplicit])
def test_a_guide_need_only_be_sampled(family):
    run, x = small(family, objective=AAE() if family is Implicit else None)
    again = refitted(run, x, "mixture")
    assert again.history["loss"].notna().all() and not len(again.objective.critics)
    assert refitted(run, x, "flow").history["loss"].notna().all()


def test_seeds():
    run, x = small()
    prior = Flow(2, layers=2)
    losses = [refit_prior(run, copy.deepcopy(prior), x, seed=seed, **QUICK).history["loss"] for seed in (1, 1, 2)]
    assert losses[0].equals(losses[1]) and not losses[0].equals(losses[2])


def test_the_best_epoch_on_validation_rows_is_kept():
    """A flow of many parameters learns the few codes by heart; of the epochs it keeps the one before that."""
    torch.manual_seed(0)
    x = torch.randn(96, 2)
    data = Data("normal", train=x[:32], validation=x[32:64], test=x[64:], values="real")
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 2)))
    run, prior = as_run(model, Line(1.0, 1e-3), x), Flow(2, transform="spline_coupling", layers=2)
    again = refit_prior(run, prior, data, epochs=60, batch_size=32, learning_rate=2e-2, progress=False)
    validation = again.history["validation"]
    assert validation.max() > validation.iloc[-1] + 0.1
    with torch.no_grad():
        assert prior().log_prob(x[32:64]).mean() == pytest.approx(validation.max(), abs=0.05)


def chain(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(s, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def two_roots(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(a + b.unsqueeze(-1), 1.0).to_event(1), obs=x)


def of_its_row(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def masked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def shared(x):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        with pyro.plate("copies", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.T + theta, 1.0).to_event(1), obs=x)


def named_u(x):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=x)


def rates(x):
    with pyro.plate("data", len(x)):
        r = pyro.sample("r", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(r, 1.0).to_event(1), obs=x)


def observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)


def guided(model, x):
    return as_run(as_module(model, x), AmortizedGuide(model, nn.Linear(2, 4), example=x), x)


def test_the_site_is_the_root():
    x = torch.randn(30, 2)
    again = refit_prior(guided(chain, x), Mixture(2, components=2), x, progress=False)
    nodes = poutine.trace(unregistered(again.model)).get_trace(x).nodes
    assert isinstance(nodes["s"]["fn"], dist.MixtureOfDiagNormals) and nodes["s"]["fn"].batch_shape == (30,)
    assert isinstance(nodes["z"]["fn"].base_dist, dist.Normal)
    run = guided(two_roots, x)
    with pytest.raises(ValueError, match=r"latent sites \['a', 'b'\] have a prior each; say by site="):
        refit_prior(run, Mixture(2), x, progress=False)
    again = refit_prior(run, Mixture(2, components=2), x, site="a", progress=False)
    assert isinstance(poutine.trace(unregistered(again.model)).get_trace(x).nodes["b"]["fn"], dist.Gamma)
    assert importance_sampling(again.model, again.guide, x, particles=5).log_likelihood.isfinite().all()


@pytest.mark.parametrize(
    ("model", "site", "message"),
    [
        (chain, "z", "'z' has a distribution that depends on the observations or on sites drawn before it"),
        (of_its_row, None, "'z' has a distribution that depends on the observations"),
        (masked, None, "'z' is masked"),
        (shared, None, r"'theta' stands outside the plate \"data\".*'z' stands in the plates \['data', 'copies'\]"),
        (chain, "t", r"no latent site 't'; its sites are \['s', 'z'\]"),
        (two_roots, "b", r"values of shape \(2,\), but the latent site 'b' has shape \(\)"),
        (rates, None, "the prior has draws on the whole space, but the latent site 'r' has support"),
    ],
)
def test_sites_that_can_have_no_other_prior(model, site, message):
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match=message):
        refit_prior(guided(model, x), Normal(2), x, site=site, progress=False)


class Several(nn.Module):
    """A prior that is one distribution for each of two."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, 2))

    def forward(self):
        return dist.Normal(self.loc, 1.0).to_event(1)


class Positive(nn.Module):
    """A prior of positive values."""

    def __init__(self, event_shape=()):
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(event_shape))

    def forward(self):
        return dist.Gamma(2.0, self.log_rate.exp()).to_event(self.log_rate.dim())


def test_a_prior_has_the_support_of_its_site():
    x = torch.randn(30, 2)
    again = refit_prior(guided(two_roots, x), Positive(), x, site="b", **QUICK)
    assert again.history["loss"].notna().all()
    with pytest.raises(ValueError, match=r"site 'a' has support .* in the model but"):
        refit_prior(guided(two_roots, x), Positive((2,)), x, site="a", **QUICK)


def test_what_has_no_density_to_fit_is_refused():
    run, x = small()
    for prior in (Implicit(2), SemiImplicit(2), Delta(2)):
        with pytest.raises(NoDensityError, match=f"the prior, a {type(prior).__name__}, has no density"):
            refit_prior(run, prior, x, progress=False)
    with pytest.raises(ValueError, match="StandardNormal has no parameter to fit"):
        refit_prior(run, StandardNormal(2), x, progress=False)
    point, _ = small(Delta)
    with pytest.raises(ValueError, match="a mixture of point masses has no density"):
        refit_prior(point, Vamp(2, SHAPE, components=3), x, progress=False)


def test_what_does_not_fit_is_refused():
    run, x = small()
    model, guide = second_stage()
    for prior, options, message in (
        (Mixture(3), {}, r"values of shape \(3,\), but the latent site 'z' has shape \(2,\)"),
        (second_stage(3)[0], {"guide": guide}, r"values of shape \(3,\), but the latent site 'z'"),
        (Mixture(2, context=4), {}, "expected a context"),
        (model, {}, "LatentVariableModel is trained with a guide of its own; pass guide="),
        (Mixture(2), {"guide": guide}, "guide= is that of a second stage"),
        (model, {"guide": run.guide}, "share parameters with the run"),
        (Flow(2), {"epochs": 0}, "epochs must be a whole number of at least 1"),
        (Positive((2, 2)), {}, r"values of shape \(2, 2\)"),
        (Several(), {}, r"the prior is \(2,\) distributions, and one for all observations is expected"),
    ):
        with pytest.raises(ValueError, match=message):
            refit_prior(run, prior, x, progress=False, **options)
    with pytest.raises(TypeError, match=r"such as Mixture\(8, components=10\), got the class Mixture"):
        refit_prior(run, Mixture, x)
    with pytest.raises(TypeError, match="expected a run, what fit or load returns, got a LatentVariableModel"):
        refit_prior(run.model, Mixture(2), x)
    with pytest.raises(ValueError, match="pass data=, what it was fitted to"):
        refit_prior(run, Mixture(2))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for 2 rows, but the model draws"):
        refit_prior(run, Mixture(2), torch.zeros(5, 3))
    gan = pg.fit(run.model, None, GAN(), x, steps=1, progress=False)
    with pytest.raises(ValueError, match="the run has no guide, as after training a GAN"):
        refit_prior(gan, Mixture(2), x)
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match="has a site 'u' already"):
        refit_prior(guided(named_u, x), model, x, guide=guide, progress=False)


def test_what_has_no_draws_is_refused():
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match="the model has no latent site, so it has no prior to fit"):
        refit_prior(as_run(as_module(observed, x), as_module(no_sites, x), x), Mixture(2), x, progress=False)
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 2)))
    with pytest.raises(NonFiniteLoss, match="the guide's draws of site 'z' are not all finite"):
        refit_prior(as_run(model, Line(float("inf")), x), Mixture(2, components=2), x, progress=False)


@pytest.mark.usefixtures("parameter_store")
def test_a_prior_of_another_shape_is_seen_when_the_model_runs():
    model = WithPrior(ProbabilisticPCA(2, 5), "z", Mixture(3))
    with pytest.raises(ValueError, match=r"values of shape \(3,\), but the latent site 'z' has shape \(2,\)"):
        model(torch.zeros(4, 5))

"""Walks through the latents: against programs whose every decoded value can be computed by hand."""

from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrogen as pg
from pyrogen.distributions import Implicit, Mixture
from pyrogen.experiment.latent_walks import decode, interpolation, latents_of, prior_density, traversal
from pyrogen.inference import ELBO, AmortizedGuide, FitOptions, Run
from pyrogen.inference.programs import as_module, describe_example
from pyrogen.networks import MLP

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def run_of(model: Any, *batch: torch.Tensor, guide: Any = "amortised") -> Run:
    module = as_module(model, *batch)
    made = AmortizedGuide(module, MLP(batch[0].shape[1:], 8, hidden=(8,))) if guide == "amortised" else guide
    example = describe_example(tuple(x[:2] for x in batch))
    return Run(module, made, ELBO(), pd.DataFrame(), FitOptions(epochs=1), example=example)


def draws_of(run: Run, *batch: torch.Tensor, **options: int) -> Any:
    return latents_of(run, batch, **({"draws": 4, "prior_draws": 50} | options))


def linear(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)


def test_draws_have_names_and_shapes_and_the_priors_moments():
    latents = draws_of(run_of(linear, X), X, prior_draws=20_000)
    assert latents.names == ("z[0]", "z[1]")
    assert latents.posterior.shape == (4, 12, 2) and latents.prior.shape == (20_000, 2)
    # Standard errors are 0.5 / √20000 = 0.0035 and 0.014 of the means, and half a percent of the deviations.
    torch.testing.assert_close(latents.prior.mean(0), torch.tensor([1.0, 0.0]).double(), atol=0.06, rtol=0)
    torch.testing.assert_close(latents.prior.std(0), torch.tensor([0.5, 2.0]).double(), atol=0, rtol=0.025)


def test_decoding_gives_the_means_of_the_likelihood():
    z = torch.randn(12, 2).double()
    decoded = decode(run_of(linear, X), z, (X,))
    torch.testing.assert_close(decoded, z.float() @ WEIGHT)


def test_activity_is_the_variance_of_means_in_units_of_the_priors():
    run = run_of(linear, X)
    with torch.no_grad():
        latents = draws_of(run, X, draws=2000, prior_draws=20_000)
    units = pg.evaluation.active_units(run.model, run.guide, X).variances["z"].double()
    torch.testing.assert_close(latents.activity, units / torch.tensor([0.25, 4.0]), rtol=0.1, atol=0.005)
    assert latents.most_active(1) == [int(latents.activity.argmax())]


def test_density_of_the_prior_is_exact():
    points = torch.randn(7, 2).double()
    expected = dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])).to_event(1).log_prob(points).exp()
    torch.testing.assert_close(prior_density(run_of(linear, X), (X,), points), expected, rtol=1e-5, atol=0)


def test_an_implicit_prior_has_no_density_but_draws(digits):
    prior = Implicit(2, noise=2, hidden=(8,))
    model = pg.models.LatentVariableModel(prior, pg.distributions.Bernoulli(MLP(2, digits.event_shape, hidden=(8,))))
    x = digits.test.float()
    run = run_of(model, x)
    assert prior_density(run, (x,), torch.zeros(3, 2)) is None
    assert draws_of(run, x).prior.shape == (50, 2)


def hierarchy(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(3 * top, 1.0).to_event(1))
        free = pyro.sample("free", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([z, free, top], 1), 1.0).to_event(1), obs=x)


def test_sites_below_go_along_with_their_means_and_others_stay():
    start = torch.tensor([[1.0, 5.0, 7.0]]).double()
    moved = traversal(start[0], [0, 1], torch.ones(3).double(), 3).flatten(0, 1)
    decoded = decode(run_of(hierarchy, X), moved, (X[:6],), start=start.expand_as(moved))
    # By two of the top, z goes by six; x is (z, free, top).
    expected = [[-1, 7, -1], [5, 7, 1], [11, 7, 3], [3, 7, 1], [5, 7, 1], [7, 7, 1]]
    torch.testing.assert_close(decoded, torch.tensor(expected).float())
    held = decode(run_of(hierarchy, X), moved, (X[:6],))
    torch.testing.assert_close(held[:3, 0], torch.full((3,), 5.0))


def constrained(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("two", 2, dim=-2):
            inner = pyro.sample("inner", dist.Normal(0.0, 1.0))
        shown = torch.stack([rate, inner[0], inner[1]], -1)
        pyro.sample("x", dist.Normal(shown, scale).to_event(1), obs=x)


def test_constrained_nested_and_global_sites():
    run = run_of(constrained, X)
    latents = draws_of(run, X)
    assert latents.names == ("rate", "inner[0]", "inner[1]")
    z = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, -2.0]]).double()
    decoded = decode(run, z, (X[:2],))
    torch.testing.assert_close(decoded[:, 1:], z[:, 1:].float())
    torch.testing.assert_close(decoded[:, 0], z[:, 0].exp().float())
    assert prior_density(run, (X,), z) is None


def test_interpolations_keep_their_ends():
    a, b = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    for spherical in (False, True):
        path = interpolation(a, b, 7, spherical=spherical)
        assert path.shape == (5, 7, 4)
        torch.testing.assert_close(path[:, 0], a)
        torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(interpolation(a, b, 3)[:, 1], (a + b) / 2)


def test_great_circles_keep_the_length_and_go_evenly():
    a = torch.nn.functional.normalize(torch.randn(5, 4).double(), dim=1)
    b = torch.nn.functional.normalize(torch.randn(5, 4).double(), dim=1)
    path = interpolation(a, b, 9, spherical=True)
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(5, 9).double())
    steps = (path[:, 1:] * path[:, :-1]).sum(-1).arccos()
    torch.testing.assert_close(steps, steps[:, :1].expand(5, 8))


def test_a_fit_without_a_guide_walks_between_draws_of_the_prior():
    run = run_of(linear, X, guide=None)
    latents = draws_of(run, X)
    assert latents.posterior is None and latents.means is latents.prior
    assert decode(run, latents.means[:3], (X[:3],)).shape == (3, 3)


def covariates(x, c):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)


def test_further_tensors_are_used():
    c = torch.arange(24.0).reshape(12, 2)
    run = run_of(covariates, X, c, guide=None)
    latents = draws_of(run, X, c, prior_draws=12_000)
    torch.testing.assert_close(latents.prior.mean(0), c.mean(0).double(), atol=0.3, rtol=0)  # sd 7 / √12000 = 0.06
    assert prior_density(run, (X, c), torch.zeros(3, 2)) is None


def idle(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)


def test_a_masked_prior_is_not_the_same_for_all_observations():
    assert prior_density(run_of(idle, X, guide=None), (X,), torch.zeros(3, 2)) is None


def two_observed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(len(x)))


def test_several_observed_sites_have_no_one_picture():
    with pytest.raises(ValueError, match=r"observes the sites \['x', 'y'\]"):
        decode(run_of(two_observed, X, guide=None), torch.zeros(3, 2), (X[:3],))


def only_global(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(3), scale).to_event(1), obs=x)


def test_a_model_without_latents_of_observations():
    with pytest.raises(ValueError, match="no latent site that belongs to an observation"):
        draws_of(run_of(only_global, X), X)


def test_modes_and_random_state_are_given_back():
    run = run_of(linear, X)
    run.programs.train()
    state = torch.get_rng_state()
    decode(run, draws_of(run, X).means, (X,))
    prior_density(run, (X,), torch.zeros(3, 2))
    assert torch.get_rng_state().equal(state) and all(m.training for m in run.programs.modules())


def test_a_mixture_as_prior_has_a_density(digits):
    prior = Mixture(2, components=3)
    model = pg.models.LatentVariableModel(prior, pg.distributions.Bernoulli(MLP(2, digits.event_shape, hidden=(8,))))
    x = digits.test.float()
    points = torch.randn(5, 2)
    found = prior_density(run_of(model, x), (x,), points.double())
    torch.testing.assert_close(found, prior().log_prob(points).exp().detach().double(), rtol=1e-5, atol=0)

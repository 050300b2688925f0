import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrogen.evaluation import posterior_samples, prior_samples, reconstruct, sample


def nested(x, shift):
    """A global site, a local one in a nested plate, two observed sites and a covariate."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("parts", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(theta[:2], 1e-4).to_event(1))
        pyro.sample("x", dist.Normal(z.sum((0, -1)).unsqueeze(-1) + shift, 1e-4).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(theta[2] * torch.ones(len(x)), 1e-4), obs=x[:, 0])


def nested_guide(x, shift):
    theta = pyro.sample("theta", dist.Normal(torch.full((3,), 5.0), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 4, dim=-2):
        pyro.sample("z", dist.Normal(theta[:2].expand(4, len(x), 2), 1e-4).to_event(1))


BATCH = (torch.randn(6, 1), torch.arange(6.0).reshape(6, 1))


def test_a_run_without_an_example_is_refused(ppca, exact, make_run):
    model, x = ppca
    run = dataclasses.replace(make_run(model, exact, x), example=[])
    with pytest.raises(ValueError, match="this run has no example, by which the shape of an observation is known"):
        sample(run, 3)


@pytest.mark.parametrize("rows", [1, 4, 4096])
def test_draws_of_the_guide_share_their_global_sites(rows):
    draws = posterior_samples(nested, nested_guide, BATCH, 7, rows=rows)
    assert {name: tuple(v.shape) for name, v in draws.items()} == {"theta": (7, 3), "z": (7, 6, 4, 2)}
    expected = draws["theta"][:, None, None, :2].expand(7, 6, 4, 2)
    torch.testing.assert_close(draws["z"], expected, atol=1e-3, rtol=0)
    assert draws["theta"].unique().numel() == 21


@pytest.mark.parametrize("rows", [1, 4, 4096])
def test_draws_of_the_prior(rows):
    draws = prior_samples(nested, BATCH, 7, rows=rows)
    shapes = {name: tuple(v.shape) for name, v in draws.items()}
    assert shapes == {"theta": (7, 3), "z": (7, 6, 4, 2), "x": (7, 6, 1), "y": (7, 6)}
    expected = 4 * draws["theta"][:, :2].sum(1)[:, None, None] + BATCH[1]
    torch.testing.assert_close(draws["x"], expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("rows", [50, 4096])
def test_moments_of_posterior_draws(ppca, exact, rows):
    """20 000 draws; errors over their standard errors, of which the largest of 20 exceeds 5 once in 10^5."""
    model, x = ppca
    z = posterior_samples(model, exact, x[:10], 20_000, rows=rows * 100)["z"]
    posterior = model.posterior(x[:10])
    assert ((z.mean(0) - posterior.mean) / (posterior.stddev / 20_000**0.5)).abs().max() < 5
    ratio = z.var(0) / posterior.variance
    assert ((ratio - 1) / (2 / 20_000) ** 0.5).abs().max() < 5


def test_a_reconstruction_is_the_mean_at_a_draw(ppca, exact):
    model, x = ppca
    reconstructed = reconstruct(model, exact, x, rows=33)
    assert isinstance(reconstructed, Tensor)
    z = torch.linalg.lstsq(model.weight, (reconstructed - model.mean).T).solution.T
    torch.testing.assert_close(z @ model.weight.T + model.mean, reconstructed)  # no noise of the likelihood
    # Draws of the latents, not their means: whitened they are standard normal. 400 squares; fails once in 10^6.
    posterior = model.posterior(x)
    white = torch.linalg.solve_triangular(posterior.scale_tril, (z - posterior.mean).unsqueeze(-1), upper=False)
    assert 270 < white.square().sum() < 550


def test_reconstructions_of_several_sites_are_named():
    found = reconstruct(nested, nested_guide, BATCH)
    assert isinstance(found, dict)
    assert {name: tuple(v.shape) for name, v in found.items()} == {"x": (6, 1), "y": (6,)}


def test_new_observations_follow_the_model(ppca, exact, make_run):
    """Whitened by the model's exact law, 4000 rows have mean 0 and covariance I; each check fails once in 10^5."""
    model, x = ppca
    run = make_run(model, exact, x)
    new = sample(run, 4000, rows=999)
    assert isinstance(new, Tensor)
    covariance = model.weight @ model.weight.T + model.scale**2 * torch.eye(5).double()
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (new - model.mean).T, upper=False)
    assert (white.mean(1) * 4000**0.5).abs().max() < 5
    assert ((torch.cov(white) - torch.eye(5)) * 4000**0.5 / (1 + torch.eye(5)).sqrt()).abs().max() < 5.2
    again, other = sample(run, 4000, rows=999), sample(run, 4000, rows=999, seed=1)
    assert torch.equal(new, again) and not torch.equal(new, other)  # type: ignore[arg-type]


def test_means_of_new_observations_have_no_noise(ppca, exact, make_run):
    model, x = ppca
    new = sample(make_run(model, exact, x), 64, mean=True)
    assert isinstance(new, Tensor)
    assert torch.linalg.matrix_rank(new - model.mean, atol=1e-8) == 2


def test_new_observations_take_global_sites_from_the_guide_and_covariates_as_given(make_run):
    run = make_run(nested, nested_guide, *BATCH)
    new = sample(run, 250, given=BATCH[1])
    assert isinstance(new, dict)
    assert {name: tuple(v.shape) for name, v in new.items()} == {"x": (250, 1), "y": (250,)}
    # θ ~ N(5, 1), not N(0, 1), drawn for every 3 observations: 84 of them, so the mean has error 0.11.
    assert 4.4 < new["y"].mean() < 5.6
    assert new["y"].mul(100).round().unique().numel() > 60
    # Within three rows that share θ, x differs by the covariate alone.
    torch.testing.assert_close(new["x"][1:3, 0] - new["x"][0, 0], torch.tensor([1.0, 2.0]), atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match=r"1 tensors beside x, but 0 came"):
        sample(run, 4)
    with pytest.raises(ValueError, match="no rows"):
        sample(run, 4, given=BATCH[1][:0])


def test_a_model_without_guide_can_be_sampled(ppca, make_run):
    model, x = ppca
    new = sample(make_run(model, None, x), 3)
    assert isinstance(new, Tensor) and new.shape == (3, 5)


def test_what_cannot_be_sampled_is_refused(ppca, exact, make_run):
    model, x = ppca
    run = make_run(model, exact, x)
    with pytest.raises(ValueError, match="whole number of at least 1, got 0"):
        sample(run, 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        posterior_samples(model, exact, x, 0)

    def meanless(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            exp = torch.distributions.transforms.ExpTransform()
            base = dist.Normal(z[:, :1].expand(-1, 5), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [exp]), obs=x)

    with pytest.raises(ValueError, match=r"observed site 'x'.*no mean"):
        sample(make_run(meanless, None, x.exp()), 3, mean=True)

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

from pyrogen.evaluation import rate_distortion


def _expected(model, x, q_mean, q_covariance):
    """Rate and distortion of a normal guide of probabilistic PCA, in closed form."""
    q = dist.MultivariateNormal(q_mean, q_covariance)
    prior = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    left = x - q_mean @ model.weight.T - model.mean
    spread = torch.einsum("di,bij,dj->b", model.weight, q_covariance, model.weight)
    variance = model.scale**2
    distortion = 2.5 * torch.log(2 * torch.pi * variance) + (left.square().sum(1) + spread) / (2 * variance)
    return kl_divergence(q, prior).detach(), distortion.detach()


def test_rate_is_the_divergence_in_closed_form(ppca, exact):
    model, x = ppca
    posterior = model.posterior(x)
    rate, _ = _expected(model, x, posterior.mean, posterior.covariance_matrix)
    torch.testing.assert_close(rate_distortion(model, exact, x, particles=1).rate, rate)


def test_distortion_is_its_expectation(ppca, wide):
    """Means over 200 observations from 16 seeds against the truth: a t test that fails once in 10^4."""
    model, x = ppca
    posterior = model.posterior(x)
    covariance = torch.diag_embed((1.5 * posterior.stddev).square())
    rate, distortion = _expected(model, x, posterior.mean, covariance)
    errors = []
    for seed in range(16):
        found = rate_distortion(model, wide, x, particles=4, seed=seed, rows=101)
        torch.testing.assert_close(found.rate, rate)
        torch.testing.assert_close(found.elbo, -found.rate - found.distortion)
        errors.append((found.distortion - distortion).mean())
    means = torch.stack(errors)
    assert means.mean().abs() / (means.std() / 4) < 5.2


def test_with_the_exact_posterior_the_bound_is_the_likelihood(ppca):
    """Where the rate is Monte Carlo too, for want of a closed form, draws of an exact posterior leave no noise."""
    model, x = ppca
    identity = torch.distributions.transforms.AffineTransform(0.0, 1.0, event_dim=1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(model.posterior(x), [identity]))

    found = rate_distortion(model, guide, x, particles=3, rows=50)
    torch.testing.assert_close(found.elbo, model.log_likelihood(x).detach(), atol=1e-9, rtol=0)


def test_a_point_mass_has_no_rate(ppca, point_mass):
    model, x = ppca
    found = rate_distortion(model, point_mass, x)
    assert found.rate.isnan().all() and found.elbo.isnan().all()
    posterior = model.posterior(x)
    _, distortion = _expected(model, x, posterior.mean, torch.zeros(200, 2, 2).double() + 1e-12 * torch.eye(2))
    torch.testing.assert_close(found.distortion, distortion)


def test_global_sites_have_a_rate_of_their_own(global_mean):
    found = rate_distortion(global_mean.model, global_mean.guide, global_mean.x, particles=2000)
    q, p = dist.Normal(global_mean.loc, global_mean.variance.sqrt()), dist.Normal(torch.zeros(()).double(), 1.0)
    torch.testing.assert_close(found.global_rate, float(kl_divergence(q, p)))
    assert torch.equal(found.rate, torch.zeros(8).double())
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * ((global_mean.x - global_mean.loc).square() + global_mean.variance)
    # 100 draws of θ; the error of x_i is about |x_i - loc| sd(θ) / 10 <= 0.07; five of these fail once in 10^5.
    assert (found.distortion - expected).abs().max() < 0.4

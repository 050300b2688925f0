"""The linear model on real data: variational training against the closed form."""

import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import MultivariateNormal
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.models import ProbabilisticPCA


def test_training_reaches_the_closed_form_on_digits():
    data = pg.data.load("digits", binarize=None)
    x = data.train
    optimum = ProbabilisticPCA.maximum_likelihood(x, latent=5).log_likelihood(x).mean()
    model = ProbabilisticPCA(5, data.event_shape)
    guide = AmortizedGuide(model, nn.Flatten(), MultivariateNormal)
    pg.fit(model, guide, ELBO(), data, steps=2000, learning_rate=1e-2, schedule="cosine", progress=False)
    with torch.no_grad():
        exact = model.log_likelihood(x).mean()
        torch.manual_seed(0)
        # Means over 1437 observations and 64 draws: standard errors are below 0.01 nats.
        elbo = ELBO(64)(model, guide).bound(x).mean()
        iwae = IWAE(64)(model, guide).bound(x).mean()
    assert optimum - elbo < 0.5
    assert elbo <= iwae + 0.01 and iwae <= exact + 0.01 and exact <= optimum + 1e-3


def test_maximum_likelihood_is_the_known_optimum():
    """Tipping & Bishop: at the optimum the mean log-likelihood is −½[D log 2π + Σ log λ_i + (D−k) log σ² + D]."""
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model = ProbabilisticPCA.maximum_likelihood(x, latent=2)
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    variance = values[2:].mean()
    expected = -0.5 * (6 * torch.log(torch.tensor(2 * torch.pi)) + values[:2].log().sum() + 4 * variance.log() + 6)
    torch.testing.assert_close(model.log_likelihood(x).mean(), expected, rtol=1e-6, atol=1e-6)
    # Any other parameters are worse.
    with torch.no_grad():
        best = model.log_likelihood(x).mean()
        for parameter in model.parameters():
            kept = parameter.clone()
            parameter.add_(0.01 * torch.randn_like(parameter))
            assert model.log_likelihood(x).mean() < best
            parameter.copy_(kept)


def test_posterior_is_bayes_rule():
    model, x = ProbabilisticPCA(2, 5), torch.randn(3, 5)
    z = torch.randn(3, 2)
    log_joint = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_joint = log_joint + torch.distributions.Normal(z @ model.weight.T + model.mean, model.scale).log_prob(x).sum(-1)
    torch.testing.assert_close(
        log_joint - model.posterior(x).log_prob(z), model.log_likelihood(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("latent", [0, 4])
def test_latent_size_is_checked(latent):
    with pytest.raises(ValueError, match="between 1 and 3"):
        ProbabilisticPCA(latent, 4)


def test_data_without_noise_have_no_maximum():
    with pytest.raises(ValueError, match="smaller latent"):
        ProbabilisticPCA.maximum_likelihood(
            torch.randn(50, 1) @ torch.ones(1, 4) * torch.tensor([1.0, 0, 0, 0]), latent=1
        )

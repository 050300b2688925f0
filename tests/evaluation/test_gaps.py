"""The two parts of the inference gap where they are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Delta, Implicit, MultivariateNormal, Normal
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation import inference_gap
from pyrogen.inference import AmortizedGuide
from pyrogen.models import ProbabilisticPCA

pytestmark = pytest.mark.usefixtures("parameter_store")


def ppca():
    torch.manual_seed(0)
    model = ProbabilisticPCA(3, 6)
    with torch.no_grad():
        model.log_scale.fill_(math.log(0.5))
    return model, torch.randn(12, 6)


def test_a_mean_field_guide_lacks_the_correlations():
    r"""The best mean-field normal is off by ½ (Σ log Λ_dd − log det Λ), with Λ the posterior's precision."""
    model, x = ppca()
    gap = inference_gap(model, AmortizedGuide(model, nn.Linear(6, 16), Normal), x, particles=20_000)
    precision = model.posterior(x).precision_matrix[0].detach()
    exact = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    assert gap.approximation.mean().item() == pytest.approx(exact, rel=0.03)
    torch.testing.assert_close(gap.log_likelihood, model.log_likelihood(x).detach(), atol=0.1, rtol=0)
    assert gap.amortization.mean() > 1.0  # the guide is not trained
    assert "inference gap" in str(gap) and "12 observations" in str(gap)


def test_a_family_that_holds_the_posterior_has_no_approximation_gap():
    model, x = ppca()
    gap = inference_gap(model, AmortizedGuide(model, nn.Linear(6, 16), MultivariateNormal), x)
    assert gap.approximation.abs().max() < 0.02


class Exact(nn.Module):
    """A normal whose parameters are the features."""

    def forward(self, features):
        loc, log_scale = features.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class Line(nn.Module):
    """The best mean-field posterior of a pPCA, or one that is off by so much."""

    def __init__(self, model, off=0.0):
        super().__init__()
        self.model, self.off = [model], off

    def forward(self, x):
        posterior = self.model[0].posterior(x)
        scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return torch.cat([posterior.mean + self.off * scale, scale.log()], -1).detach()


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_an_optimal_encoder_has_no_amortisation_gap(off):
    """One that is off by δ standard deviations in each of three directions has ½ δ² Σ Λ_ij / √(Λ_ii Λ_jj) more."""
    model, x = ppca()
    guide = AmortizedGuide(model, Line(model, off), lambda features, context: Exact(), example=x)
    state = torch.get_rng_state()
    gap = inference_gap(model, guide, x, steps=300, particles=4000)
    assert torch.equal(torch.get_rng_state(), state)
    precision = model.posterior(x).precision_matrix[0].detach()
    scale = precision.diagonal().rsqrt()
    exact = 0.5 * off**2 * (scale @ precision @ scale).item()
    assert gap.amortization.mean().item() == pytest.approx(exact, abs=0.03)


def test_rows_at_a_time_and_the_guide_as_it_was():
    model, x = ppca()
    guide = AmortizedGuide(model, nn.Linear(6, 16), Normal)
    before = [p.clone() for p in guide.parameters()]
    gap = inference_gap(model, guide, x, steps=3, particles=7, rows=16)
    assert gap.approximation.shape == gap.amortization.shape == (12,)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(before, guide.parameters(), strict=True))
    assert all(p.grad is None for p in (*guide.parameters(), *model.parameters()))


def test_what_has_no_gap_is_refused():
    model, x = ppca()
    with pytest.raises(NoDensityError, match="an inference gap needs the guide's density"):
        inference_gap(model, AmortizedGuide(model, nn.Linear(6, 8), Implicit), x)
    with pytest.raises(ValueError, match="point mass"):
        inference_gap(model, AmortizedGuide(model, nn.Linear(6, 8), Delta), x)
    with pytest.raises(TypeError, match="expected an AmortizedGuide, whose encoder can be set aside, got a function"):
        inference_gap(model, lambda x: None, x)  # type: ignore[arg-type]
    for name in ("steps", "gradient_particles"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            inference_gap(model, AmortizedGuide(model, nn.Linear(6, 8)), x, **{name: 0})

    def shared(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="given the model's global latent sites"):
        inference_gap(shared, AmortizedGuide(shared, nn.Linear(6, 8), example=x), x)

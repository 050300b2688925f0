"""Binary and continuous likelihoods against values by hand, float64 closed forms and quadrature."""

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogen.distributions.decoding import SMALLEST_SCALE, decode, parameter_shape
from pyrogen.distributions.hyperbolic import langevin_ratio, log_sinhc
from pyrogen.distributions.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    LaplaceLikelihood,
    NormalLikelihood,
)

FAR_LOGITS = [0.0, 1e-8, 1e-4, 1e-2, 0.3, 0.9, 1.1, 3.0, 17.0, 30.0, 100.0, 1e4]
LOGITS = torch.tensor([sign * value for value in FAR_LOGITS for sign in (-1, 1)], dtype=torch.float64)
PIXELS = torch.linspace(0, 1, 11, dtype=torch.float64)


class Fixed(nn.Module):
    """A decoder that gives the same output for every row."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    @property
    def gradient(self) -> Tensor:
        assert self.output.grad is not None
        return self.output.grad

    def forward(self, z: Tensor) -> Tensor:
        return self.output.expand(z.shape[0], *self.output.shape)


def row(likelihood: nn.Module) -> dist.TorchDistribution:
    return likelihood(torch.zeros(1))


def test_bernoulli_by_hand():
    likelihood = Bernoulli(Fixed(torch.tensor([0.0, math.log(3.0)])))
    x = torch.tensor([1.0, 0.0])
    assert row(likelihood).log_prob(x).item() == pytest.approx(math.log(0.5) + math.log(0.25), abs=1e-6)
    torch.testing.assert_close(row(likelihood).mean, torch.tensor([0.5, 0.75]))


def test_bernoulli_far_logits_agree_with_float64():
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]
    exact = -torch.nn.functional.softplus((1 - 2 * x) * LOGITS).sum(-1)
    decoder = Fixed(LOGITS.float())
    got = Bernoulli(decoder)(torch.zeros(2, 1)).log_prob(x.float().expand(2, len(LOGITS)))
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    got.sum().backward()
    assert decoder.gradient.isfinite().all()


def test_bernoulli_is_that_of_pyro_expanded_and_checked_too():
    images = nn.Unflatten(-1, (2, 2))
    got: Any = Bernoulli(nn.Sequential(nn.Linear(3, 4), images))(torch.randn(5, 3, dtype=torch.float32))
    known = dist.Bernoulli(logits=got.base_dist.logits).to_event(2)
    assert isinstance(got, dist.Independent) and (got.batch_shape, got.event_shape) == ((5,), (2, 2))
    for a, b in ((got, known), (got.expand((6, 5)), known.expand((6, 5)))):
        x = b.sample()
        (gained,), (expected,) = (torch.autograd.grad(d.log_prob(x).sum(), d.base_dist.logits) for d in (a, b))
        torch.testing.assert_close(a.log_prob(x), b.log_prob(x))
        torch.testing.assert_close(gained, expected)
        torch.testing.assert_close(a.log_prob(x[..., :1, :, :]), b.log_prob(x[..., :1, :, :]))
    with pytest.raises(ValueError, match="within the support"):
        got.log_prob(torch.full((5, 2, 2), 0.5))


def continuous_bernoulli_log_density(logits: Tensor, x: Tensor) -> Tensor:
    """The closed form in float64, reflected so that nothing overflows; a series at tiny logits."""
    u = logits.abs()
    distance = torch.where(logits < 0, x, 1 - x)
    closed = -u * distance - torch.log(-torch.expm1(-u) / u.clamp_min(1e-300))
    return torch.where(u < 1e-6, logits * (x - 0.5) - logits**2 / 24, closed)


def test_continuous_bernoulli_by_hand():
    likelihood = ContinuousBernoulli(Fixed(torch.tensor([0.0, 2.0])))
    x = torch.tensor([0.9, 0.25])
    by_hand = 0.0 + 0.5 - math.log((math.exp(2.0) - 1) / 2)
    assert row(likelihood).log_prob(x).item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_continuous_bernoulli_log_density_at_all_logits(dtype, tolerance):
    # The reference reads the rounded numbers, so that only the arithmetic is compared.
    logits, x = LOGITS.to(dtype), PIXELS.to(dtype)[:, None]
    exact = continuous_bernoulli_log_density(logits.double(), x.double())
    got = row(ContinuousBernoulli(Fixed(logits))).base_dist.log_prob(x)
    torch.testing.assert_close(got.double(), exact, rtol=2 * tolerance, atol=tolerance)


def test_continuous_bernoulli_gradient_is_pixel_minus_mean():
    decoder = Fixed(LOGITS.float())
    d = row(ContinuousBernoulli(decoder)).base_dist
    d.log_prob(torch.tensor(0.25)).sum().backward()
    # At small logits the mean is a half plus logit / 12; far out it is 1 / |logit| from an end.
    u = LOGITS.abs().clamp_min(1e-3)
    mean = 1 / -torch.expm1(-u) - 1 / u
    mean = torch.where(LOGITS.abs() < 1e-3, 0.5 + LOGITS.abs() / 12, mean)
    mean = torch.where(LOGITS < 0, 1 - mean, mean)
    torch.testing.assert_close(decoder.gradient.double(), 0.25 - mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(d.mean.double(), mean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("logit", [-40.0, -1.0, -9.9e-3, -1e-3, 0.0, 9.9e-3, 0.7, 1.3, 12.0, 40.0])
def test_continuous_bernoulli_moments_by_quadrature(logit):
    nodes, weights = np.polynomial.legendre.leggauss(80)
    x, w = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)
    d = row(ContinuousBernoulli(Fixed(torch.tensor([logit], dtype=torch.float64)))).base_dist
    p = d.log_prob(x).exp() * w
    mean = (p * x).sum()
    assert p.sum().item() == pytest.approx(1, abs=1e-11)
    assert d.mean.item() == pytest.approx(mean.item(), abs=1e-10)
    assert d.variance.item() == pytest.approx((p * (x - mean) ** 2).sum().item(), rel=1e-7)
    assert d.entropy().item() == pytest.approx(-(p * d.log_prob(x)).sum().item(), abs=1e-9)
    assert d.cdf(d.icdf(PIXELS[1:-1])).sub(PIXELS[1:-1]).abs().max() < 2e-8  # the series near logit 0 is cubic
    for end in (0.0, 0.13, 0.5, 0.87, 1.0):
        mass = (d.log_prob(end * x).exp() * w).sum() * end
        assert d.cdf(torch.tensor(end, dtype=torch.float64)).item() == pytest.approx(mass.item(), abs=3e-9)


def test_quantiles_of_continuous_bernoulli_are_finite_at_the_ends():
    """Of the largest probability below 1, whose distance to 1 is half of eps."""
    d = row(ContinuousBernoulli(Fixed(torch.tensor([-40.0, 40.0])))).base_dist
    last = -math.log(torch.finfo(torch.float32).eps / 2) / 40
    expected = torch.tensor([[0.0, 1 - last], [last, 1.0]])
    torch.testing.assert_close(d.icdf(torch.tensor([[0.0], [1.0]])), expected)


@pytest.mark.parametrize("logit", [-300.0, -3.0, 0.0, 5.0, 300.0])
def test_continuous_bernoulli_samples_have_its_mean(logit):
    torch.manual_seed(0)
    d = row(ContinuousBernoulli(Fixed(torch.tensor([logit])))).base_dist
    x = d.rsample((20_000,))
    assert x.min() >= 0 and x.max() <= 1
    # Five standard errors: a true sampler fails once in 1.7 million runs for each logit.
    assert (x.mean() - d.mean).abs() < 5 * (d.variance / 20_000).sqrt()


def test_rsample_gradient_of_continuous_bernoulli_is_that_of_its_quantiles():
    logits = torch.tensor([-8.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 8.0], dtype=torch.float64, requires_grad=True)
    u = torch.full((7,), 0.3, dtype=torch.float64)

    def quantile(logits: Tensor) -> Tensor:
        return row(ContinuousBernoulli(Fixed(torch.zeros(7)))).base_dist.__class__(logits=logits).icdf(u)

    # The series for |logit| < 0.01 leaves out a cubic term: its derivative is right to 1e-6.
    assert torch.autograd.gradcheck(quantile, (logits,), atol=1e-5)


def test_hyperbolic_functions_join_their_series():
    s = torch.tensor([0.4999, 0.5001, -0.3, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    reference = (1 / torch.tanh(s) - 1 / s) / s
    torch.testing.assert_close(langevin_ratio(s), reference, rtol=0, atol=1e-11)
    torch.testing.assert_close(log_sinhc(s), torch.log(torch.sinh(s) / s), rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(langevin_ratio, (s,)) and torch.autograd.gradcheck(log_sinhc, (s,))
    # d/ds log(sinh s / s) is Langevin's function: one of them wrong would show.
    (slope,) = torch.autograd.grad(log_sinhc(s).sum(), s)
    torch.testing.assert_close(slope, s * langevin_ratio(s), rtol=0, atol=1e-9)


def test_normal_and_laplace_by_hand():
    x = torch.tensor([1.0, -2.0])
    normal = row(NormalLikelihood(Fixed(torch.zeros(2)), scale=2.0)).log_prob(x)
    assert normal.item() == pytest.approx(-5 / 8 - 2 * math.log(2) - math.log(2 * math.pi), abs=1e-6)
    laplace = row(LaplaceLikelihood(Fixed(torch.zeros(2)), scale=2.0)).log_prob(x)
    assert laplace.item() == pytest.approx(-3 / 2 - 2 * math.log(4), abs=1e-6)


@pytest.mark.parametrize(("family", "kind"), [(NormalLikelihood, dist.Normal), (LaplaceLikelihood, dist.Laplace)])
def test_learned_scales(family, kind):
    output = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-1.0, 0.0, 1.0, 200.0]])
    d = row(family(Fixed(output.reshape(8)), scale="per pixel")).base_dist
    expected = 1e-3 + torch.log1p(torch.exp(torch.tensor([-1.0, 0.0, 1.0, 200.0], dtype=torch.float64)))
    torch.testing.assert_close(d.loc, output[0])
    torch.testing.assert_close(d.scale.double(), expected, rtol=1e-6, atol=0)
    shared = family(Fixed(output[0]), scale="shared")
    assert isinstance(row(shared).base_dist, kind)
    torch.testing.assert_close(row(shared).base_dist.scale, torch.full((4,), 1e-3 + math.log(2)))
    row(shared).log_prob(torch.zeros(4)).backward()
    assert shared.raw_scale.grad.abs() > 0


@pytest.mark.parametrize("family", [NormalLikelihood, LaplaceLikelihood])
@pytest.mark.parametrize("loc", [-50.0, 50.0])
@pytest.mark.parametrize("raw", [-100.0, 100.0])
def test_extreme_locations_and_scales_stay_finite(family, loc, raw):
    decoder = Fixed(torch.tensor([loc, raw]))
    log_p = row(family(decoder, scale="per pixel")).log_prob(torch.zeros(1))
    log_p.backward()
    assert log_p.isfinite() and decoder.gradient.isfinite().all()


def test_optimal_scale_in_training_is_the_batch_error():
    torch.manual_seed(0)
    decoder = Fixed(torch.randn(3, 2))
    likelihood = NormalLikelihood(decoder, scale="optimal")
    x = torch.randn(7, 3, 2)
    errors = x - decoder.output.detach()
    sigma2 = errors.square().mean()
    log_p = likelihood(torch.zeros(7, 1)).log_prob(x)
    expected = dist.Normal(decoder.output.detach(), sigma2.sqrt()).log_prob(x).sum((1, 2))
    torch.testing.assert_close(log_p, expected)
    # At the optimum -log p is n/2 (1 + log 2 pi sigma^2), and the gradient is that of a fixed scale.
    assert log_p.sum().item() == pytest.approx(-21 * (1 + math.log(2 * math.pi * sigma2)), rel=1e-5)
    log_p.sum().backward()
    torch.testing.assert_close(decoder.gradient, errors.sum(0) / sigma2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(likelihood.variance, sigma2)


def test_optimal_scale_averages_batches_and_is_fixed_in_evaluation():
    likelihood = NormalLikelihood(Fixed(torch.zeros(4)), scale="optimal")
    z = torch.zeros(2, 1)
    likelihood(z).log_prob(torch.full((2, 4), 3.0))
    assert likelihood.variance.item() == pytest.approx(9.0)  # the first batch sets it
    likelihood(z).log_prob(torch.full((2, 4), 1.0))
    assert likelihood.variance.item() == pytest.approx(0.9 * 9.0 + 0.1 * 1.0)
    training_sample_scale = likelihood(z).base_dist.scale
    likelihood.eval()
    x = torch.full((2, 4), 100.0)
    expected = 4 * dist.Normal(0.0, math.sqrt(8.2)).log_prob(torch.tensor(100.0))
    torch.testing.assert_close(likelihood(z).log_prob(x), expected.expand(2))
    torch.testing.assert_close(likelihood(z).base_dist.scale, training_sample_scale)
    assert likelihood.variance.item() == pytest.approx(8.2) and likelihood.batches == 2


def test_optimal_scale_survives_expansion_particles_and_a_perfect_fit():
    decoder = Fixed(torch.zeros(4))
    likelihood = NormalLikelihood(decoder, scale="optimal")
    d = likelihood(torch.zeros(5, 1)).expand((3, 5))
    assert d.log_prob(torch.full((3, 5, 4), 2.0)).shape == (3, 5)
    assert likelihood.variance.item() == pytest.approx(4.0)
    log_p = likelihood(torch.zeros(5, 1)).log_prob(torch.zeros(5, 4)).sum()
    log_p.backward()
    assert log_p.item() == pytest.approx(-20 * (math.log(SMALLEST_SCALE) + 0.5 * math.log(2 * math.pi)), rel=1e-5)
    assert decoder.gradient.isfinite().all()


def test_half_precision_outputs_are_raised():
    d = row(Bernoulli(Fixed(torch.zeros(2, dtype=torch.bfloat16))))
    assert d.mean.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "per-pixel", "optimal"])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale must be"):
        LaplaceLikelihood(nn.Linear(1, 1), scale=scale)


def test_bad_decoders_and_shapes_are_refused():
    with pytest.raises(TypeError, match=r"decoder must be a torch\.nn\.Module"):
        Bernoulli(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        NormalLikelihood(nn.Linear(1, 3), scale="per pixel")(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="the decoder must map latents"):
        Bernoulli(nn.Flatten(0))(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="the decoder must map latents"):
        decode(nn.Flatten(0), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="latents must have shape"):
        decode(nn.Linear(1, 1), torch.tensor(0.0))
    shapes: list[Any] = [(), (0,), (3, -1), (2.0,), 0]
    for shape in shapes:
        with pytest.raises(ValueError, match="event_shape must be"):
            parameter_shape(shape, 1)

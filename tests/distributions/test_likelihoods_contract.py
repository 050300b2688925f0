"""What every likelihood keeps to, over a catalogue: a new one joins by one line."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrogen.distributions.level_likelihoods import (
    CategoricalLikelihood,
    DiscretizedLogisticMixture,
    QuantizedNormal,
)
from pyrogen.distributions.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    LaplaceLikelihood,
    NormalLikelihood,
)

LATENTS = 2


def binary(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape).round()


def level(shape: tuple[int, ...], levels: int = 256) -> Tensor:
    """Random levels, of which both ends are some."""
    x = torch.randint(levels, shape) / (levels - 1)
    x.view(-1)[0], x.view(-1)[-1] = 0.0, 1.0
    return x


# class, its options, data that it models, data that it does not
CATALOGUE: list[tuple[Any, dict[str, Any], Callable, float | None]] = [
    (Bernoulli, {}, binary, 0.5),
    (ContinuousBernoulli, {}, torch.rand, -0.1),
    (NormalLikelihood, {}, torch.randn, math.nan),
    (NormalLikelihood, {"scale": 0.1}, torch.randn, math.nan),
    (NormalLikelihood, {"scale": "shared"}, torch.randn, math.nan),
    (NormalLikelihood, {"scale": "per pixel"}, torch.randn, math.nan),
    (NormalLikelihood, {"scale": "optimal"}, torch.randn, math.nan),
    (LaplaceLikelihood, {}, torch.randn, math.nan),
    (LaplaceLikelihood, {"scale": "shared"}, torch.randn, math.nan),
    (LaplaceLikelihood, {"scale": "per pixel"}, torch.randn, math.nan),
    (QuantizedNormal, {}, level, 0.5),
    (QuantizedNormal, {"scale": 0.05}, level, 0.5),
    (QuantizedNormal, {"scale": "per pixel"}, level, 0.5),
    (QuantizedNormal, {"levels": 17}, lambda shape: level(shape, 17), 0.49),
    (DiscretizedLogisticMixture, {}, level, 0.5),
    (DiscretizedLogisticMixture, {"components": 2, "levels": 4}, lambda shape: level(shape, 4), 0.5),
    (CategoricalLikelihood, {}, level, 0.5),
    (CategoricalLikelihood, {"levels": 17}, lambda shape: level(shape, 17), 0.49),
]
EVENTS = [(6,), (1, 4, 4), (3, 2, 4)]

catalogue = pytest.mark.parametrize(
    ("family", "options", "data", "outside"),
    CATALOGUE,
    ids=[f"{family.__name__}-{options}" for family, options, _, _ in CATALOGUE],
)
events = pytest.mark.parametrize("event", EVENTS, ids=str)


class Rows(nn.Module):
    """A user's decoder: it takes (B, D) and nothing else."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.linear = nn.Linear(LATENTS, math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2:
            raise RuntimeError("only (B, D)")
        return self.linear(z).reshape(len(z), *self.shape)


def build(family: Any, options: dict[str, Any], event: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    return family(Rows(family.decoder_shape(event, **options)), **options)


@catalogue
@events
def test_shapes_and_supports(family, options, data, outside, event):
    likelihood = build(family, options, event)
    for batch in [(), (5,), (3, 5), (3, 1, 5), (0,)]:
        d = likelihood(torch.randn(*batch, LATENTS))
        assert isinstance(d, TorchDistributionMixin)
        assert d.batch_shape == batch and d.event_shape == event
        assert d.event_dim == len(event) and d.support.event_dim == len(event)
        assert d.mean.shape == batch + event
        x = d.sample()
        assert x.shape == batch + event and x.dtype == torch.float32 and not x.requires_grad
        assert d.sample((2,)).shape == (2, *batch, *event)
        if x.numel():  # torch's Independent cannot score an empty batch
            assert d.support.check(x).all() and d.log_prob(x).shape == batch
            assert d.expand((4, *batch)).log_prob(x).shape == (4, *batch)
        assert d.has_rsample == (not d.support.is_discrete)


@catalogue
@events
def test_leading_dimensions_are_independent(family, options, data, outside, event):
    likelihood = build(family, options, event).eval()
    z, x = torch.randn(3, 5, LATENTS), data((3, 5, *event))
    together = likelihood(z).log_prob(x)
    apart = torch.stack([torch.stack([likelihood(z[i, j]).log_prob(x[i, j]) for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(likelihood(z).mean[1, 2], likelihood(z[1, 2]).mean)


@catalogue
@events
def test_every_parameter_gets_a_finite_gradient(family, options, data, outside, event):
    likelihood = build(family, options, event)
    likelihood(torch.randn(7, LATENTS)).log_prob(data((7, *event))).sum().backward()
    for name, parameter in likelihood.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
        # Of 256 levels most are in no observation and get next to nothing; elsewhere dead outputs would show.
        if parameter.dim() and family is not CategoricalLikelihood:
            assert (parameter.grad != 0).float().mean() > 0.9, name


@catalogue
def test_the_mean_has_gradients(family, options, data, outside):
    likelihood = build(family, options, (3, 2, 4))
    likelihood(torch.randn(5, LATENTS)).mean.sum().backward()
    gradient = likelihood.decoder.linear.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@catalogue
def test_options_are_kept_and_state_is_saved(family, options, data, outside, tmp_path):
    event = (3, 2, 4)
    likelihood = build(family, options, event)
    for name in inspect.signature(family).parameters:
        assert name == "decoder" or getattr(likelihood, name) == options.get(
            name, inspect.signature(family).parameters[name].default
        )
    z, x = torch.randn(4, LATENTS), data((4, *event))
    likelihood(z).log_prob(x)  # fills the optimal scale's buffer
    torch.save(likelihood.state_dict(), tmp_path / "likelihood.pt")
    torch.manual_seed(1)
    other = family(Rows(family.decoder_shape(event, **options)), **options)
    before = other.eval()(z).log_prob(x)
    other.load_state_dict(torch.load(tmp_path / "likelihood.pt", weights_only=True))  # noqa: TID251 (as users do)
    likelihood.eval()
    assert not torch.equal(before, likelihood(z).log_prob(x))
    torch.testing.assert_close(other(z).log_prob(x), likelihood(z).log_prob(x), rtol=0, atol=0)
    assert len(repr(likelihood)) < 300 and family.__name__ in repr(likelihood)
    assert len(repr(likelihood(z))) < 500


@catalogue
@events
def test_in_a_program_with_particles_and_a_mask(family, options, data, outside, event):
    likelihood = build(family, options, event).eval()
    z, x = torch.randn(3, 5, LATENTS), data((5, *event))

    def program(x: Tensor | None) -> Tensor:
        with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("x", likelihood(z), obs=x)

    trace = poutine.trace(program).get_trace(x)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], likelihood(z).log_prob(x))
    assert program(None).shape == (3, 5, *event)
    masked = likelihood(z).mask(torch.tensor([True, False, True, True, True])).log_prob(x)
    assert (masked[:, 1] == 0).all() and (masked[:, 0] != 0).all()


class Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, z: Tensor) -> Tensor:
        return self.output.expand(len(z), *self.output.shape)


@catalogue
@events
def test_a_decoder_of_zeros_gives_every_value_a_moderate_density(family, options, data, outside, event):
    likelihood = family(Constant(torch.zeros(family.decoder_shape(event, **options))), **options)
    log_p = likelihood(torch.zeros(50, LATENTS)).log_prob(data((50, *event))) / math.prod(event)
    # The worst is the fixed scale of 0.05: a level at 1 lies 20 deviations from 0, -200 nats.
    assert log_p.min() > -250 and log_p.max() < 10


@catalogue
@pytest.mark.parametrize("sign", [-1, 1, 0])
@pytest.mark.parametrize("event", [(1, 4, 4), (3, 2, 4)], ids=str)
def test_extreme_outputs_stay_finite(family, options, data, outside, sign, event):
    torch.manual_seed(0)
    shape = family.decoder_shape(event, **options)
    output = torch.full(shape, 100.0 * sign) if sign else torch.where(torch.rand(shape) < 0.5, -100.0, 100.0)
    likelihood = family(Constant(output), **options)
    d = likelihood(torch.zeros(6, LATENTS))
    log_p = d.log_prob(data((6, *event)))
    log_p.sum().backward()
    assert log_p.isfinite().all() and d.mean.isfinite().all() and d.sample().isfinite().all()
    assert likelihood.decoder.output.grad.isfinite().all()


@catalogue
def test_values_outside_the_support_are_refused(family, options, data, outside):
    event = (1, 4, 4)
    d = build(family, options, event)(torch.zeros(2, LATENTS))
    x = data((2, *event))
    assert d.support.check(x).all()
    x[1, 0, 2, 3] = outside
    assert d.support.check(x).tolist() == [True, False]
    with pytest.raises(ValueError, match="support"):
        d.log_prob(x)


@catalogue
@pytest.mark.parametrize("event", [(1, 2, 2), (3, 2, 2)], ids=str)
def test_sample_averages_match_the_mean(family, options, data, outside, event):
    likelihood = build(family, options, event)
    d = likelihood(torch.randn(LATENTS))
    torch.manual_seed(2)
    x = d.sample((4000,))
    error = 5 * x.std(0) / math.sqrt(4000)
    # Five standard errors: a true mean fails once in 1.7 million runs for each value. The means of
    # rounded normals and logistics are documented to half a level; of coupled colours only red's is exact.
    half = 0.5 / (options.get("levels", 256) - 1) if family in (QuantizedNormal, DiscretizedLogisticMixture) else 0
    coupled = family is DiscretizedLogisticMixture and event[0] == 3
    assert ((x.mean(0) - d.mean).abs() <= error + half)[: 1 if coupled else None].all()


@pytest.mark.parametrize("family", [Bernoulli, ContinuousBernoulli, NormalLikelihood, LaplaceLikelihood])
def test_decoder_shape_takes_an_integer(family):
    assert family.decoder_shape(7) == (7,)


def test_decoder_shapes():
    assert NormalLikelihood.decoder_shape((1, 28, 28), scale="per pixel") == (2, 28, 28)
    assert LaplaceLikelihood.decoder_shape(5, scale="per pixel") == (10,)
    assert QuantizedNormal.decoder_shape((3, 32, 32), 256, scale="per pixel") == (6, 32, 32)
    assert QuantizedNormal.decoder_shape((3, 32, 32)) == (3, 32, 32)
    assert DiscretizedLogisticMixture.decoder_shape((3, 32, 32), 10) == (100, 32, 32)
    assert DiscretizedLogisticMixture.decoder_shape((1, 28, 28)) == (15, 28, 28)
    assert DiscretizedLogisticMixture.decoder_shape(4, 2) == (24,)
    assert CategoricalLikelihood.decoder_shape((1, 8, 8), levels=17) == (17, 8, 8)


@pytest.mark.parametrize("family", [QuantizedNormal, DiscretizedLogisticMixture, CategoricalLikelihood])
def test_an_output_of_the_wrong_size_is_explained(family):
    options = {"scale": "per pixel"} if family is QuantizedNormal else {}
    with pytest.raises(ValueError, match=r"build the decoder with the shape that decoder_shape\(event_shape\) gives"):
        family(nn.Linear(LATENTS, 7), **options)(torch.zeros(3, LATENTS))

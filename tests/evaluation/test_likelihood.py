import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyrogen.distributions import Bernoulli, Delta, StandardNormal
from pyrogen.evaluation import bits_per_dimension, importance_sampling, log_likelihood, rate_distortion
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


def test_with_the_exact_posterior_every_weight_is_the_likelihood(ppca, exact):
    model, x = ppca
    result = importance_sampling(model, exact, x[:20], particles=50)
    torch.testing.assert_close(result.log_likelihood, model.log_likelihood(x[:20]).detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(result.effective_sample_size, torch.full((20,), 50.0).double())
    assert result.standard_error.max() < 1e-6
    assert "50 particles" in str(result)


@pytest.mark.parametrize("rows", [1, 7, 30, 4096])
def test_chunks_change_nothing_with_the_exact_posterior(ppca, exact, rows):
    model, x = ppca
    found = log_likelihood(model, exact, x[:11], 13, rows=rows)
    torch.testing.assert_close(found, model.log_likelihood(x[:11]).detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("rows", [512, 4096])
def test_standard_errors_cover_the_truth(ppca, wide, rows):
    """The squared errors over their variances sum to a chi-squared; 1e-6 is cut off on either side."""
    model, x = ppca
    x = x[:60]
    result = importance_sampling(model, wide, x, particles=2000, rows=rows)
    z = (result.log_likelihood - model.log_likelihood(x).detach()) / result.standard_error
    assert stats.chi2.ppf(1e-6, 60) < z.square().sum() < stats.chi2.ppf(1 - 1e-6, 60)
    assert (result.effective_sample_size < 2000).all() and (result.effective_sample_size > 200).all()


def test_the_figures_are_those_of_the_weights_themselves():
    """One latent, drawn by the guide from N(1, 1): weights and their moments by hand from the same draws."""
    x = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("z", dist.Normal(torch.ones(1).double(), 1.0).to_event(1)))

    result = importance_sampling(model, guide, x, particles=6, rows=4)
    w = _log_weights(x, *seen[-3:]).exp()
    torch.testing.assert_close(result.log_likelihood, w.mean(0).log())
    torch.testing.assert_close(result.standard_error, w.std(0) / w.mean(0) / math.sqrt(6))
    torch.testing.assert_close(result.effective_sample_size, w.sum(0).square() / w.square().sum(0))


def _log_weights(x, first, second, last):
    """From the passes of six particles over two rows, four at a time: four copies of each row, then two of both."""
    z = torch.stack([torch.cat([first, last[0::2]]), torch.cat([second, last[1::2]])], 1)[..., 0]
    log_p = dist.Normal(torch.zeros(()).double(), 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x[:, 0])
    return log_p - dist.Normal(torch.ones(()).double(), 1.0).log_prob(z)


def test_memory_is_bounded_and_every_particle_counts(ppca, wide):
    model, x = ppca
    seen = []

    def spy(x):
        seen.append(len(x))
        return wide(x)

    importance_sampling(model, spy, x[:10], particles=101, rows=32)
    passes = [rows for rows in seen if rows > 2]  # what is less are the checks, on two rows
    assert max(passes) <= 32
    assert sum(passes) == 10 * 101


def test_an_encoder_works_once_for_each_row():
    encoder = MLP((1, 4, 4), 8)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 4))))
    guide = AmortizedGuide(model, encoder)
    rows = []
    encoder.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    log_likelihood(model, guide, torch.zeros(6, 1, 4, 4), 100, rows=200)
    assert sum(rows) == 6 + (2 + 1 + 2)  # and the checks


def test_global_sites_give_the_predictive_density(global_mean):
    """Errors over their standard errors, one draw of θ for each particle; each fails once in 10^5."""
    for seed, particles in enumerate((100, 1000, 1001)):
        result = importance_sampling(
            global_mean.model, global_mean.guide, global_mean.x, particles=particles, seed=seed
        )
        z = (result.log_likelihood - global_mean.log_predictive(global_mean.x)) / result.standard_error
        # Eight observations share the draws, so this is one test rather than eight; t with 90 degrees.
        assert z.abs().mean() < stats.t.isf(5e-6, 90)
        assert (result.effective_sample_size <= 100).all()


def test_a_model_without_latents_needs_no_guide():
    x = torch.randn(7, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(log_likelihood(model, None, x, 5), expected)


def test_stored_values_are_what_they_mean():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6)))
    guide = AmortizedGuide(model, MLP(6, 8))
    bits = torch.rand(4, 6) > 0.5
    assert torch.equal(log_likelihood(model, guide, bits, 5), log_likelihood(model, guide, bits.float(), 5))
    assert log_likelihood(model.double(), guide.double(), bits, 5).dtype == torch.float64


def test_nothing_is_left_behind_and_the_seed_decides(ppca):
    model = LatentVariableModel(StandardNormal(2), Bernoulli(nn.Sequential(MLP(2, 6), nn.Dropout(0.5))))
    guide = AmortizedGuide(model, MLP(6, 8))
    x = (torch.rand(4, 6) > 0.5).float()
    state = torch.get_rng_state()
    first = log_likelihood(model, guide, x, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, log_likelihood(model, guide, x, 5))
    assert not torch.equal(first, log_likelihood(model, guide, x, 5, seed=1))
    assert all(module.training for module in [*model.modules(), *guide.modules()])
    assert not first.requires_grad


def test_plain_functions_keep_the_parameters_that_training_gave_them(parameter_store):
    x = torch.randn(5, 2)

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    model(x)
    pyro.param("loc").data.fill_(3.0)
    torch.testing.assert_close(log_likelihood(model, None, x, 2), dist.Normal(3.0, 1.0).log_prob(x).sum(1))
    assert torch.equal(pyro.param("loc"), torch.full((2,), 3.0))


def test_a_module_of_a_plain_function_is_in_evaluation_mode():
    dropout = nn.Dropout(0.5)

    def model(x):
        assert not dropout.training or len(x) <= 2  # the checks may run in either mode
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(dropout(torch.ones(2)), 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    torch.testing.assert_close(log_likelihood(model, None, x, 2), dist.Normal(1.0, 1.0).log_prob(x).sum(1))
    assert dropout.training


def test_what_cannot_be_evaluated_is_refused(ppca, exact, point_mass):
    model, x = ppca
    with pytest.raises(ValueError, match=r"point mass.*fit an explicit guide"):
        log_likelihood(model, point_mass, x)
    with pytest.raises(ValueError, match=r"latent sites \['z'\] but there is no guide"):
        log_likelihood(model, None, x)
    with pytest.raises(ValueError, match=r"shape \(2, 4\) for 2 rows, but the model draws \(2, 5\)"):
        log_likelihood(model, exact, x[:, :4])
    with pytest.raises(ValueError, match="are empty"):
        log_likelihood(model, exact, x[:0])
    with pytest.raises(ValueError, match="NaN or infinity, first in row 3"):
        log_likelihood(model, exact, torch.where(torch.arange(200)[:, None] == 3, torch.nan, x))
    with pytest.raises(TypeError, match="expected x as a tensor"):
        log_likelihood(model, exact, x.numpy())
    with pytest.raises(ValueError, match=r"single number"):
        log_likelihood(model, exact, x.sum())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        log_likelihood(model, exact, x, 0)
    with pytest.raises(ValueError, match=r"observed site 'x' stands outside the plate"):
        log_likelihood(_without_plate, None, x)
    with pytest.raises(ValueError, match="rows must be a whole number"):
        log_likelihood(model, exact, x, rows=0)


def _without_plate(x):
    pyro.sample("x", dist.Normal(x.new_zeros(x.shape), 1.0).to_event(2), obs=x)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])


def test_values_outside_the_support_are_refused():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6)))
    with pytest.raises(ValueError, match="outside the support"):
        log_likelihood(model, AmortizedGuide(model, MLP(6, 8)), torch.rand(4, 6))


def test_a_weight_that_is_not_a_number_is_named():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6)))
    guide = AmortizedGuide(model, MLP(6, 8))
    with torch.no_grad():
        next(model.parameters()).fill_(3e38)  # finite, but not what becomes of it
    with pyro.validation_enabled(False), pytest.raises(ArithmeticError, match="observed site 'x'"):
        log_likelihood(model, guide, torch.zeros(4, 6))


def test_a_point_mass_at_a_global_site_takes_it_as_known(global_mean):
    def guide(x):
        pyro.sample("theta", dist.Delta(torch.ones(()).double()))

    found = log_likelihood(global_mean.model, guide, global_mean.x, 3)
    torch.testing.assert_close(found, dist.Normal(1.0, 1.0).log_prob(global_mean.x))


def test_the_bound_is_below(ppca, wide):
    """The gap of this guide is KL(q || posterior) > 0.3 nats, ten times the error of either side."""
    model, x = ppca
    bound = rate_distortion(model, wide, x[:50], particles=500).elbo
    estimate = importance_sampling(model, wide, x[:50], particles=500)
    assert (bound < estimate.log_likelihood).all()


def test_delta_family_is_recognised():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6)))
    with pytest.raises(ValueError, match="point mass"):
        log_likelihood(model, AmortizedGuide(model, MLP(6, 8), family=Delta), torch.zeros(4, 6))


def test_bits_of_a_density_and_of_the_levels_themselves_agree():
    """Where levels are much closer than the scale of the normal that both are of."""
    x = torch.randint(0, 256, (4, 3, 2, 2)) / 255
    loc = torch.full_like(x, 0.5)
    density = dist.Normal(loc, 0.3).to_event(3).log_prob(x)
    mass = (dist.Normal(loc, 0.3).cdf(x + 0.5 / 255) - dist.Normal(loc, 0.3).cdf(x - 0.5 / 255)).log().sum((1, 2, 3))
    bits = bits_per_dimension(density, (3, 2, 2), levels=255)  # 255 spaces between 256 levels
    torch.testing.assert_close(bits, bits_per_dimension(mass, 12), rtol=1e-4, atol=1e-4)
    assert bits_per_dimension(torch.tensor(-12 * math.log(2)), (3, 2, 2)) == 1.0
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        bits_per_dimension(density, 12, levels=1)
    with pytest.raises(ValueError, match="a size must be positive"):
        bits_per_dimension(density, 0)

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrogen as pg
from pyrogen.data import Data, LinearGaussian
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.evaluation import Evaluation, diagnose, evaluate, marginal_kl
from pyrogen.evaluation import parts as parts_of_an_evaluation
from pyrogen.evaluation.dimensions import total_correlation
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


def test_figures_of_an_exact_posterior(ppca, exact, make_run):
    model, x = ppca
    found = evaluate(make_run(model, exact, x), x, particles=50)
    truth = model.log_likelihood(x).detach()
    assert found.log_likelihood == pytest.approx(float(truth.mean()), abs=1e-9)
    assert found.log_likelihood_error == pytest.approx(float(truth.std()) / 200**0.5)
    assert found.monte_carlo_error < 1e-6
    assert found.effective_sample_size == pytest.approx(50)
    assert found.elbo == pytest.approx(-found.rate - found.distortion)
    # The gap is 0, and what the bound has of noise comes from 200 * 16 draws of two squares at 1/2 each, less
    # what they share with the rate: at most 1 / sqrt(3200) = 0.018. Five of these fail once in 10^6.
    assert found.elbo == pytest.approx(found.log_likelihood, abs=0.09)
    assert (found.observations, found.particles, found.latent_units) == (200, 50, 2)
    assert found.active_units == 2
    assert found.bits_per_dimension is None
    assert found.seconds > 0
    assert found.to_dict()["rate"] == found.rate


def test_the_objective_does_not_matter(ppca, wide, make_run):
    model, x = ppca
    runs = [make_run(model, wide, x, objective=objective) for objective in (ELBO(beta=0.0), IWAE(5))]
    first, second = (evaluate(run, x[:20], particles=20).to_dict() for run in runs)
    assert str({**first, "seconds": 0}) == str({**second, "seconds": 0})  # NaN is not equal to itself


def test_of_a_data_set_the_test_split_is_used(make_run):
    bits = torch.rand(30, 6) > 0.5
    data = Data("bits", train=bits[:10], validation=bits[10:15], test=bits[15:], values="binary")
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6)))
    run = make_run(model, AmortizedGuide(model, MLP(6, 8)), bits[:2].float())
    found = evaluate(run, data, particles=10)
    assert found.observations == 15
    expected = evaluate(run, bits[15:].float(), particles=10)
    assert found.log_likelihood == expected.log_likelihood
    assert found.bits_per_dimension == pytest.approx(-found.log_likelihood / 6 / math.log(2))


def test_what_a_point_mass_leaves_undefined(ppca, point_mass, make_run):
    model, x = ppca
    found = evaluate(make_run(model, point_mass, x), x)
    undefined = ("rate", "elbo", "log_likelihood", "log_likelihood_error", "monte_carlo_error")
    assert all(math.isnan(getattr(found, name)) for name in undefined)
    assert math.isfinite(found.distortion) and found.active_units == 2
    lines = {line.split("  ")[0]: line for line in str(found).splitlines()}
    assert all("not defined" in lines[name] for name in ("log-likelihood", "ELBO", "rate"))
    assert "not defined" not in lines["distortion"]


def test_without_a_guide_nothing_is_defined(ppca, make_run):
    model, x = ppca
    found = evaluate(make_run(model, None, x), x)
    assert math.isnan(found.distortion) and math.isnan(found.log_likelihood) and found.active_units is None
    assert "active units" in str(found) and "of 2" in str(found)
    assert "no guide" in found.reasons["likelihood"] and "no guide" in found.reasons["calibration"]


def test_one_observation_has_no_spread(ppca, exact, make_run):
    model, x = ppca
    found = evaluate(make_run(model, exact, x), x[:1], particles=10)
    assert math.isnan(found.log_likelihood_error) and found.active_units is None
    assert "(data)" not in str(found) and "(particles)" in str(found)


def test_a_model_without_latents_is_exact(make_run):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    x = torch.randn(9, 3)
    found = evaluate(make_run(model, None, x), x, particles=4)
    expected = float(dist.Normal(0.0, 1.0).log_prob(x).sum(1).mean())
    assert found.log_likelihood == pytest.approx(expected, abs=1e-5)
    assert found.elbo == pytest.approx(expected, abs=1e-5)
    assert (found.rate, found.latent_units, found.active_units) == (0.0, 0, 0)


def test_errors_that_observations_share_do_not_average_out(global_mean, make_run):
    run = make_run(global_mean.model, global_mean.guide, global_mean.x)
    few, many = (evaluate(run, global_mean.x.repeat(n), particles=100) for n in (1, 50))
    assert many.monte_carlo_error == pytest.approx(few.monte_carlo_error, rel=1e-6)


def test_the_table_is_aligned(ppca, wide, make_run):
    model, x = ppca
    heading, *rows = str(evaluate(make_run(model, wide, x), x[:30], particles=10)).splitlines()
    assert heading.startswith("Evaluation on 30 observations")
    assert len({row.index(" nats") for row in rows if " nats" in row}) == 1
    first = next(row for row in rows if row)
    assert "± " in first and "(data)" in first and "(particles)" in first


def test_weights_that_are_not_finite_are_named(ppca, make_run):
    model, x = ppca
    guide = AmortizedGuide(model, MLP(x.shape[1:], 4).to(x.dtype)).to(x.dtype)
    run = make_run(model, guide, x)
    with torch.no_grad():
        next(guide.parameters()).fill_(torch.nan)
    name = next(name for name, _ in guide.named_parameters())
    for look in (evaluate, diagnose, pg.to_arviz, lambda run, x: marginal_kl(run.model, run.guide, x)):
        with pytest.raises(ValueError, match=f"the weights '{name}' of model or guide are NaN or infinite"):
            look(run, x)


def test_what_does_not_fit_is_refused(ppca, exact, make_run):
    model, x = ppca
    run = make_run(model, exact, x)
    with pytest.raises(ValueError, match=r"model draws \(2, 5\)"):
        evaluate(run, x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        evaluate(run, x * torch.nan)
    with pytest.raises(ValueError, match="empty"):
        evaluate(run, x[:0])
    with pytest.raises(TypeError, match="expected x"):
        evaluate(run, x.numpy())
    with pytest.raises(ValueError, match="got 0"):
        evaluate(run, x, particles=0)


class TestParts:
    def test_only_those_asked_for_are_made(self, ppca, wide, make_run):
        model, x = ppca
        found = evaluate(make_run(model, wide, x), x[:20], parts=["aggregate", "bound"], particles=10)
        assert [*found.seconds_of] == ["bound", "aggregate"]
        assert math.isfinite(found.rate) and math.isfinite(found.marginal_kl) and math.isnan(found.log_likelihood)
        assert "aggregate" in str(found).splitlines()[0] or "bound" in str(found).splitlines()[0]
        assert "log-likelihood" not in str(found)

    def test_what_was_found_is_handed_over_after_each(self, ppca, wide, make_run):
        model, x = ppca
        seen: list[Evaluation] = []
        found = evaluate(make_run(model, wide, x), x[:20], parts=["aggregate", "bound"], after_part=seen.append)
        assert [[*each.seconds_of] for each in seen] == [["bound"], ["bound", "aggregate"]]
        assert seen[0].rate == found.rate and math.isnan(seen[0].marginal_kl) and seen[1] is found

    def test_a_divergence_for_want_of_observations_is_said(self, ppca, exact, make_run):
        model, x = ppca
        run = make_run(model, exact, x)
        for count in (3, 200):
            found = evaluate(run, x[:count], parts="aggregate")
            large = found.marginal_kl_excess > 2 * found.marginal_kl_error
            assert (f"up to {found.marginal_kl_excess:.2f} of it for want of more" in str(found)) == large
        assert math.isnan(evaluate(run, x[:1], parts="aggregate").marginal_kl_excess)

    def test_each_gives_what_its_function_gives(self, ppca, wide, make_run):
        model, x = ppca
        found = evaluate(make_run(model, wide, x), x, parts="aggregate", seed=3)
        alone = marginal_kl(model, wide, x, samples=500, seed=3)
        assert (found.marginal_kl, found.mutual_information) == (alone.marginal_kl, alone.mutual_information)
        assert found.total_correlation + found.dimension_wise_kl == pytest.approx(
            total_correlation(model, wide, x, samples=500, seed=3).marginal_kl
        )

    def test_what_is_not_defined_is_said_and_stops_nothing(self, ppca, point_mass, make_run):
        model, x = ppca
        found = evaluate(make_run(model, point_mass, x), x[:50], parts=["aggregate", "gap", "bound"])
        assert math.isnan(found.marginal_kl) and math.isnan(found.approximation_gap)
        assert "point mass" in found.reasons["aggregate"] and "AmortizedGuide" in found.reasons["gap"]
        assert math.isfinite(found.distortion) and math.isfinite(found.mmd)

    def test_too_few_samples_for_a_figure(self, ppca, wide, make_run):
        model, x = ppca
        found = evaluate(make_run(model, wide, x), x[:3], parts="samples")
        assert math.isnan(found.frechet_distance) and found.reasons["samples"]

    def test_a_gap_and_annealing(self, make_run, monkeypatch):
        monkeypatch.setattr(parts_of_an_evaluation, "TEMPERATURES", 40)
        monkeypatch.setattr(parts_of_an_evaluation, "GAP_ROWS", 4)
        toy = LinearGaussian(observations=8)
        guide = AmortizedGuide(toy.model, MLP(4, 16))
        found = evaluate(make_run(toy.model, guide, toy.x), toy.x, parts=["gap", "annealing"], particles=100)
        exact = float(toy.log_likelihood(toy.x).double().mean())
        # Both are means over 8 observations; the bounds of annealing say how far it may be off.
        assert (
            abs(found.annealed_log_likelihood - exact) < 5 * found.annealed_log_likelihood_error + found.annealing_gap
        )
        assert found.amortization_gap > 0 and found.gap_observations == 4 and found.annealed_observations == 8

    def test_a_reference_tells_a_right_guide_from_a_wide_one(self, ppca, exact, wide, make_run, monkeypatch):
        monkeypatch.setattr(parts_of_an_evaluation, "REFERENCES", 1)
        monkeypatch.setattr(parts_of_an_evaluation, "REFERENCE_DRAWS", 250)
        model, x = ppca
        right, wrong = (evaluate(make_run(model, each, x), x[:8], parts="reference") for each in (exact, wide))
        # Of some 500 draws on each side a classifier that can't tell is right in a half, and errs by 0.03 at most.
        assert 0.42 < right.c2st < 0.58 < wrong.c2st and right.sliced_wasserstein < 0.5 * wrong.sliced_wasserstein
        assert right.reference_r_hat < 1.05 and right.reference_observations == 1

    def test_what_a_reference_is_not_for(self, ppca, exact, global_mean, make_run, monkeypatch):
        model, x = ppca
        assert "no guide" in evaluate(make_run(model, None, x), x[:8], parts="reference").reasons["reference"]
        run = make_run(global_mean.model, global_mean.guide, global_mean.x)
        assert "global sites" in evaluate(run, global_mean.x, parts="reference").reasons["reference"]
        monkeypatch.setattr(parts_of_an_evaluation, "FEWEST_DRAWS", 10**6)
        monkeypatch.setattr(parts_of_an_evaluation, "REFERENCES", 1)
        monkeypatch.setattr(parts_of_an_evaluation, "REFERENCE_DRAWS", 20)
        found = evaluate(make_run(model, exact, x), x[:4], parts="reference")
        assert "NUTS has not converged" in found.reasons["reference"] and math.isnan(found.c2st)

    def test_parts_that_need_a_guide_or_one_visible_space(self, ppca, make_run):
        model, x = ppca
        found = evaluate(make_run(model, None, x), x[:20], parts=["gap", "aggregate"])
        assert found.reasons == {"gap": "there is no guide", "aggregate": "there is no guide"}

        def two(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(5, dtype=x.dtype), 1.0).to_event(1))
                pyro.sample("a", dist.Normal(z, 1.0).to_event(1), obs=x)
                pyro.sample("b", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

        found = evaluate(make_run(two, None, x), x[:20], parts=["samples", "wasserstein"])
        assert "sites ['a', 'b']" in found.reasons["samples"] and found.reasons["wasserstein"]

    @pytest.mark.parametrize("parts", [["bounds"], [], "everything"])
    def test_unknown_ones_are_refused(self, ppca, wide, make_run, parts):
        model, x = ppca
        with pytest.raises(ValueError, match="expected 'all' or some of"):
            evaluate(make_run(model, wide, x), x, parts=parts)

"""What arviz.loo and arviz.compare make of a run: against leave-one-out densities in closed form."""

import math
import warnings
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrogen.evaluation import frames, to_arviz
from pyrogen.evaluation.posterior_groups import _means_of_halves
from pyrogen.inference import AmortizedGuide
from pyrogen.networks import MLP

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x once a day
    import arviz

OLD = int(arviz.__version__.split(".")[0]) == 0
needs_old = pytest.mark.skipif(not OLD, reason="checks functions as ArviZ 0.x has them")
needs_stats = pytest.mark.skipif(find_spec("arviz_stats") is None, reason="arviz-stats is not installed")


@needs_old
def test_leave_one_out_is_exact_for_global_sites(global_mean, make_run):
    """The eight leave-one-out predictive densities in closed form; their sum lies well below the in-sample one.

    1600 draws: the error of each log-density is about 0.5 / sqrt(1600), of the sum, whose parts partly cancel, under
    0.05; four of these fail once in 10^4.
    """
    run = make_run(global_mean.model, global_mean.guide, global_mean.x)
    data = to_arviz(run, global_mean.x, draws=400, prior_draws=10)
    x = global_mean.x
    loc, variance = (x.sum() - x) / 8, 1 / 8
    exact = dist.Normal(loc, (1 + variance) ** 0.5).log_prob(x).sum()
    inside = global_mean.log_predictive(x).sum()
    assert inside - exact > 1.0
    assert arviz.loo(data).elpd_loo == pytest.approx(float(exact), abs=0.2)
    # Joint weights are the evidence where the guide is exact: all equal.
    joint = data["log_likelihood"]["x"].sum("observation") + data["sample_stats"]["log_weight_global"]
    assert float(joint.std()) < 1e-9
    assert "marginal" not in data["log_likelihood"]
    assert data["log_likelihood"].attrs["leave_one_out"].startswith("observations from the global sites")


@needs_old
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 with pandas 3.1
def test_leave_one_out_with_latents_of_the_observation_itself(ppca, wide, exact, make_run):
    """The conditional likelihood would mislead, for a narrow guide without a word; it is never taken by default."""
    model, x = ppca
    truth = float(model.log_likelihood(x[:30]).detach().sum())

    def narrow(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean, 0.5 * posterior.stddev).to_event(1))

    trees = {
        name: to_arviz(make_run(model, guide, x), x[:30], draws=500, prior_draws=0, predictive_draws=1)
        for name, guide in {"exact": exact, "wide": wide, "narrow": narrow}.items()
    }
    with pytest.raises(TypeError, match=r"Found several log likelihood arrays \['x', 'marginal'\]"):
        arviz.loo(trees["narrow"])
    assert "latents that know the observation" in trees["narrow"]["log_likelihood"].attrs["leave_one_out"]
    conditional = arviz.loo(trees["narrow"], var_name="x", pointwise=True)
    assert conditional.elpd_loo > truth + 50 and float(conditional.pareto_k.median()) < 0.5
    for name, allowed in (("exact", 1e-3), ("wide", 0.3)):
        # Weights of the wide guide have a relative variance of 0.6, so each log p has an error of about 0.02.
        found = arviz.loo(trees[name], var_name="marginal", pointwise=True)
        assert found.elpd_loo == pytest.approx(truth, abs=allowed)
        assert found.p_loo == pytest.approx(0.0, abs=0.1) and not found.warning
    table = arviz.compare({name: trees[name] for name in ("exact", "wide")}, var_name="marginal")
    assert set(table.index) == {"exact", "wide"} and abs(table["elpd_diff"]).max() < 0.3


def hierarchy(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("major", [pytest.param(0, marks=needs_old), pytest.param(1, marks=needs_stats)])
def test_leave_one_out_of_global_sites_integrates_the_others_out(major, make_run, monkeypatch):
    """x_i | θ ~ N(θ, 2): what is left out has a closed form. The guide of z is too wide by a factor 1.2.

    800 draws of θ: an error of 0.05 in the sum of the eight, and K = 32 weights of relative variance 0.15 each.
    """
    monkeypatch.setattr(frames, "version", lambda package: f"{major}.3.0")
    x = torch.linspace(-1.0, 3.0, 8).double()
    precision = 1 + 8 / 2
    loc = x.sum() / 2 / precision

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(loc, precision**-0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((theta + x) / 2, 1.2 * 0.5**0.5))

    tree = to_arviz(make_run(hierarchy, guide, x), x, draws=200, prior_draws=0, predictive_draws=1)
    theta = torch.as_tensor(tree["posterior"]["theta"].values)
    exact = dist.Normal(theta[..., None], 2**0.5).log_prob(x)
    error = tree["log_likelihood"]["marginal"].values - exact.numpy()
    assert 0.01 < error.std() < 0.15
    left_out = precision - 0.5
    predictive = dist.Normal((x.sum() - x) / 2 / left_out, (2 + 1 / left_out) ** 0.5).log_prob(x).sum()
    found = _stats(major).loo(tree, var_name="marginal")
    assert getattr(found, "elpd_loo" if major == 0 else "elpd") == pytest.approx(float(predictive), abs=0.25)


@needs_stats
def test_a_guide_of_global_sites_is_made_up_for(global_mean, make_run, monkeypatch):
    """ArviZ 1.x weights by p / q: the guide's scale, too large by a quarter, does not matter."""
    monkeypatch.setattr(frames, "version", lambda package: "1.2.0")

    def guide(x):
        pyro.sample("theta", dist.Normal(global_mean.loc, 1.25 * global_mean.variance.sqrt()))

    x = global_mean.x
    tree = to_arviz(make_run(global_mean.model, guide, x), x, draws=250, prior_draws=0)
    stats = tree["sample_stats"]
    loc, variance = (x.sum() - x) / 8, 1 / 8
    exact = float(dist.Normal(loc, (1 + variance) ** 0.5).log_prob(x).sum())
    found = _stats(1).loo_approximate_posterior(tree, log_p=stats["lp"], log_q=stats["log_guide_theta"])
    assert found.elpd == pytest.approx(exact, abs=0.2)
    assert _stats(1).loo(tree).elpd < exact - 0.5


def _stats(major):
    if major == 0:
        return arviz
    import arviz_stats

    return arviz_stats


def test_two_observed_sites_are_left_out_together(make_run):
    def model(x, y):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)
            pyro.sample("y", dist.Normal(-theta, 1.0), obs=y)

    def guide(x, y):
        pyro.sample("theta", dist.Normal(0.0, 0.5))

    x, y = torch.randn(2, 4)
    found = to_arviz(make_run(model, guide, x, y), (x, y), draws=10)["log_likelihood"]
    np.testing.assert_allclose(found["marginal"], found["x"] + found["y"], rtol=1e-5)

    def unlucky(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("marginal", dist.Normal(z, 1.0), obs=x)

    run = make_run(unlucky, AmortizedGuide(unlucky, MLP((), 4), example=x), x)
    with pytest.raises(ValueError, match="an observed site is called 'marginal'"):
        to_arviz(run, x, draws=10)


@pytest.mark.parametrize("draws", [1, 2, 7, 8])
def test_each_draw_has_the_mean_of_half_of_the_weights(draws):
    log_w = 5 * torch.randn(draws, 3).double()
    found, longer = _means_of_halves(log_w), (draws + 1) // 2
    for start in range(draws):
        # From a draw on, in a circle: as many as its own half has.
        chosen = [(start + step) % draws for step in range(longer if start < longer else draws - longer)]
        expected = log_w[chosen].logsumexp(0) - math.log(len(chosen))
        torch.testing.assert_close(found[start], expected, atol=1e-7, rtol=0)

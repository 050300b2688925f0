"""The tail of importance weights: against weights whose tail is known, and as to_arviz has it."""

import math
import warnings
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.data import LinearGaussian
from pyrogen.distributions import Implicit
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation import pareto, to_arviz
from pyrogen.evaluation.pareto import pareto_diagnostic, pareto_k, tail_shapes
from pyrogen.inference import AmortizedGuide

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x once a day
    import arviz

OLD = int(arviz.__version__.split(".")[0]) == 0
MAJORS = [
    pytest.param(0, marks=pytest.mark.skipif(not OLD, reason="ArviZ 0.x is not installed")),
    pytest.param(1, marks=pytest.mark.skipif(find_spec("arviz_stats") is None, reason="arviz-stats is not installed")),
]


def scaled(model, factor):
    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean, factor * posterior.stddev).to_event(1))

    return guide


def test_good_and_bad_guides(ppca, exact, wide):
    """Scales too small by a factor s leave tails with k = 1 − s², here 0.91; too large ones leave none."""
    model, x = ppca
    assert (pareto_k(model, exact, x[:6]) == 0).all()
    good = pareto_diagnostic(model, wide, x[:20])
    assert good.pareto_k.dtype == torch.float64 and good.pareto_k.shape == (20,)
    assert good.pareto_k.max() < 0.5 and good.good == 1.0 and good.untrusted == 0.0
    bad = pareto_diagnostic(model, scaled(model, 0.3), x[:20])
    # 1000 draws tell k by about (1 + k) / sqrt(95) = 0.2; of 20 more than half lie above 0.7.
    assert bad.pareto_k.median() > 0.7 and bad.untrusted > 0.5
    assert "Pareto k of 20 observations, 1000 draws each" in str(bad) and "above 0.7" in str(bad)


@pytest.mark.parametrize("rows", [7, 4096])
def test_they_are_those_of_to_arviz(rows, ppca, wide, make_run):
    model, x = ppca
    tree = to_arviz(make_run(model, wide, x), x[:5], draws=10, prior_draws=0, predictive_draws=0, rows=rows)
    found = pareto_k(model, wide, x[:5], draws=40, rows=rows)
    np.testing.assert_allclose(found, tree["sample_stats"]["pareto_k"])


def test_global_sites_are_drawn_anew():
    x = torch.randn(4)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((theta + x) / 2, 0.5**0.5))

    # The guide is exact given θ, so log p(x | θ) is all that differs: bounded weights, without a tail.
    assert pareto_k(model, guide, x, draws=200).max() < 0.5


@pytest.mark.parametrize("major", MAJORS)
def test_the_shape_of_pareto_weights_is_theirs(major):
    """The mean over 100 fits to a tail of 190 values each has an error of about (1 + k) / sqrt(19 000) = 0.014.

    ArviZ's weak prior pulls k by up to 0.02 towards 0.5; 0.08 beside that fails once in 10^7.
    """
    exponential = np.random.default_rng(0).exponential(size=(100, 4000))
    for k in (0.2, 0.5, 0.9):
        assert tail_shapes(k * exponential, major=major).mean() == pytest.approx(k, abs=0.1)


@pytest.mark.parametrize("major", MAJORS)
def test_weights_that_have_no_such_tail(major):
    normal = np.random.default_rng(0).normal(size=(1, 1000))
    none = np.full((1, 1000), -np.inf)
    few, half = none.copy(), none.copy()
    few[:, :5], half[:, :500] = 0.1 * normal[:, :5], 0.1 * normal[:, :500]
    np.testing.assert_equal(tail_shapes(np.concatenate([none, few, -none]), major=major), 3 * [np.inf])
    assert tail_shapes(half, major=major)[0] < 0.5
    np.testing.assert_equal(tail_shapes(np.repeat([[0.0, 5.0]], 50, axis=1), major=major), [np.inf])
    np.testing.assert_equal(tail_shapes(np.stack([np.zeros(50), np.linspace(0, 1e-4, 50)]), major=major), [0.0, 0.0])


def test_what_has_no_weights_is_refused(ppca, point_mass, exact, global_mean):
    model, x = ppca
    toy = LinearGaussian()
    with pytest.raises(NoDensityError, match="Pareto k needs the guide's density"):
        pareto_k(toy.model, AmortizedGuide(toy.model, nn.Linear(4, 8), Implicit), toy.x[:3])
    with pytest.raises(ValueError, match="point mass"):
        pareto_k(model, point_mass, x[:3])
    with pytest.raises(ValueError, match="no latent site in the plate"):
        pareto_k(global_mean.model, global_mean.guide, global_mean.x)
    for draws in (24, 30.0):
        with pytest.raises(ValueError, match=f"at least 25 draws, got {draws}"):
            pareto_k(model, exact, x[:3], draws=draws)


def test_a_weight_that_is_no_number_is_an_error(ppca, make_run):
    model, x = ppca

    def broken(x):
        with pyro.plate("data", len(x)):
            loc = torch.full((len(x), 2), math.nan, dtype=torch.float64)
            pyro.sample("z", dist.Normal(loc, 1.0, validate_args=False).to_event(1))

    for call in (
        lambda: pareto_k(model, broken, x[:3]),
        lambda: to_arviz(make_run(model, broken, x), x[:3], draws=5),
    ):
        with pytest.raises(ArithmeticError, match=r"an importance weight is NaN; it began at the draw of .* 'z'"):
            call()


def test_seeds_and_the_random_state(ppca, wide):
    model, x = ppca
    state = torch.get_rng_state()
    first = pareto_k(model, wide, x[:3], draws=50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, pareto_k(model, wide, x[:3], draws=50, seed=3))
    assert not torch.equal(first, pareto_k(model, wide, x[:3], draws=50))
    assert pareto.FEWEST_DRAWS == 25

"""Checks by simulation, on models whose posterior is known: their level, and which errors they find.

Seeds are fixed; the failure rates are those of other seeds. The p-value of an exact guide would be below 0.01 in one of
100 cases.
"""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrogen.data import LinearGaussian
from pyrogen.distributions import Delta
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.evaluation.simulation_based import SimulationBasedCalibration, simulation_based_calibration
from pyrogen.evaluation.tarp import TARP, tarp
from pyrogen.inference import AmortizedGuide

TOY = LinearGaussian()
CHECKS = pytest.mark.parametrize("check", [simulation_based_calibration, tarp])


def guide_of(scale=1.0, bias=0.0, correlation=None):
    """The exact posterior of the toy, or one whose scale, mean or correlation is off."""

    def guide(x):
        posterior = TOY.posterior(x)
        tril = posterior.scale_tril
        if correlation is not None:
            unit = torch.tensor([[1.0, 0.0], [correlation, (1 - correlation**2) ** 0.5]])
            tril = posterior.stddev.unsqueeze(-1) * unit
        loc = posterior.mean + bias * posterior.stddev * torch.tensor([1.0, 0.0])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale * tril))

    return guide


def prior(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@CHECKS
def test_an_exact_guide_is_rejected_at_the_nominal_rate(check):
    """Of 100 runs at level 0.05 more than 11 would be rejected in 4 of 1000 cases."""
    p = [check(TOY.model, guide_of(), TOY.x, simulations=200, draws=19, seed=seed).p_value for seed in range(100)]
    assert 1 <= sum(value <= 0.05 for value in p) <= 11
    assert 0.3 < np.mean(p) < 0.75


@CHECKS
@pytest.mark.parametrize("scale", [1.2, 0.8])
def test_a_scale_off_by_a_fifth_is_found(check, scale):
    """At the defaults; measured in 50 of 50 runs."""
    found = [check(TOY.model, guide_of(scale=scale), TOY.x, seed=seed) for seed in range(20)]
    assert all(each.p_value <= 0.05 for each in found)
    if check is simulation_based_calibration:
        fault = "draws too wide" if scale > 1 else "draws too narrow"
        assert found[0].failing["z[0]"] == found[0].failing["z[1]"] == fault


@CHECKS
def test_a_bias_is_found(check):
    """By 0.4 standard deviations in one unit of two."""
    found = check(TOY.model, guide_of(bias=0.4), TOY.x)
    assert found.p_value <= 0.01
    if check is simulation_based_calibration:
        assert found.failing["z[0]"] == "draws too high" and "z[1]" not in found.failing


def test_correlations_are_found_by_coverage_and_not_by_units():
    guide = guide_of(correlation=0.7)  # the posterior's is −0.03
    units = simulation_based_calibration(TOY.model, guide, TOY.x, log_likelihood=False)
    assert units.failing == {} and units.p_value > 0.01
    assert tarp(TOY.model, guide, TOY.x).p_value < 0.001
    assert [*simulation_based_calibration(TOY.model, guide, TOY.x).failing] == ["log_likelihood"]
    product = {"product": lambda latents, x: latents["z"].prod(-1)}
    found = simulation_based_calibration(TOY.model, guide_of(), TOY.x, quantities=product)
    assert found.ranks["product"].shape == (1000,) and found.p_value > 0.01


def test_the_prior_is_found_by_what_depends_on_the_data():
    units = simulation_based_calibration(TOY.model, prior, TOY.x)
    assert [*units.failing] == ["log_likelihood"]
    assert tarp(TOY.model, prior, TOY.x).p_value < 1e-10
    # A reference that knows nothing of x hides it.
    assert tarp(TOY.model, prior, TOY.x, reference=lambda x: {"z": torch.zeros(len(x), 2)}).p_value > 0.01


@CHECKS
def test_implicit_guides(check):
    def guide(x, scale=1.0):
        posterior = TOY.posterior(x)
        with pyro.plate("data", len(x)):
            noise = lambda shape: torch.randn(*shape, 2, 1)  # noqa: E731
            sampler = lambda shape: posterior.mean + scale * (posterior.scale_tril @ noise(shape)).squeeze(-1)  # noqa: E731
            pyro.sample("z", ImplicitDistribution(sampler, (len(x),), (2,)))

    assert check(TOY.model, guide, TOY.x).p_value > 0.01
    assert check(TOY.model, lambda x: guide(x, 1.2), TOY.x).p_value < 0.01


def normal_gamma(x):
    """Means in a nested plate to the left, and a precision; ``x`` is ``(B, 3)``."""
    with pyro.plate("data", len(x), dim=-1):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(3.0), 2.0))
        with pyro.plate("repeats", 3, dim=-2):
            mean = pyro.sample("mean", dist.Normal(0.0, precision.rsqrt()))
            pyro.sample("x", dist.Normal(mean, precision.rsqrt()), obs=x.T)


def normal_gamma_posterior(x, scale=1.0):
    with pyro.plate("data", len(x), dim=-1):
        precision = pyro.sample("precision", dist.Gamma(3.0 + 1.5, 2.0 + x.square().sum(1) / 4))
        with pyro.plate("repeats", 3, dim=-2):
            pyro.sample("mean", dist.Normal(x.T / 2, scale * (2 * precision).rsqrt()))


@CHECKS
@pytest.mark.parametrize("rows", [4096, 130, 12])
def test_two_sites_nested_plates_and_constraints(check, rows):
    x = torch.zeros(7, 3)  # only their number counts
    count = 1000 if rows == 4096 else rows // 2 + 20
    found = check(normal_gamma, normal_gamma_posterior, x, rows=rows, simulations=count)
    assert found.p_value > 0.01 and found.simulations == count
    if check is simulation_based_calibration:
        shapes = {name: tuple(ranks.shape) for name, ranks in found.ranks.items()}
        assert shapes == {"precision": (count,), "mean": (count, 3), "log_likelihood": (count,)}
    if rows != 4096:
        return
    wide = check(normal_gamma, lambda x: normal_gamma_posterior(x, 1.2), x)
    assert wide.p_value < 0.01
    if check is simulation_based_calibration:
        assert "precision" not in wide.failing and {"mean[0]", "mean[1]", "mean[2]"} <= wide.failing.keys()


@CHECKS
def test_covariates(check):
    def model(x, slope):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)

    def guide(x, slope):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x / (1 + slope**2), (1 + slope**2).rsqrt()))

    def careless(x, slope):
        guide(x, torch.full_like(slope, slope.mean().item()))

    batch = (torch.zeros(30), torch.linspace(0.2, 3.0, 30))
    assert check(model, guide, batch).p_value > 0.01
    assert check(model, careless, batch).p_value < 0.01


@CHECKS
def test_observations_that_are_copies_and_several_of_them(check):
    """Names of classes as whole numbers, and a second observed site: z ~ Beta(1, 1) given one success each way."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(torch.ones(len(x)), 1.0))
            pyro.sample("x", dist.Categorical(torch.stack([1 - z, z], -1)), obs=x.long())
            pyro.sample("y", dist.Bernoulli(z), obs=y)

    def guide(x, y, counted=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(1.0 + x + counted * y, 3.0 - x - counted * y))

    batch = (torch.zeros(5), torch.ones(5))
    assert check(model, guide, batch).p_value > 0.01
    assert check(model, lambda x, y: guide(x, y, 0.0), batch).p_value < 0.01  # does not look at y


def grouped(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_posterior(x, theta):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((theta + x) / 2, 0.5**0.5))


@CHECKS
def test_with_global_sites_a_data_set_is_a_simulation(check):
    def guide(x, scale=1.0):
        precision = 1 + len(x) / 2
        theta = pyro.sample("theta", dist.Normal(x.sum() / 2 / precision, scale * precision**-0.5))
        local_posterior(x, theta)

    options = {"simulations": 60, "draws": 9}
    found = check(grouped, guide, torch.zeros(4), **options)
    assert found.p_value > 0.01
    if check is simulation_based_calibration:
        assert {name: tuple(r.shape) for name, r in found.ranks.items()} == dict.fromkeys(
            ("theta", "z", "log_likelihood"), (60,)
        )
    assert check(grouped, lambda x: guide(x, 0.3), torch.zeros(4), **options).p_value < 0.01
    with pytest.raises(ValueError, match="has to see all 4 rows of a data set at once, and rows=3 allows fewer"):
        check(grouped, guide, torch.zeros(4), rows=3)


@CHECKS
def test_global_sites_fitted_to_one_data_set_are_held(check):
    def guide(x):
        local_posterior(x, pyro.sample("theta", dist.Normal(0.3, 0.1)))

    with pytest.raises(ValueError, match=r"draws the global sites \['theta'\] alike for all data sets"):
        check(grouped, guide, torch.zeros(4))
    held = [
        poutine.block(poutine.condition(program, data={"theta": torch.tensor(0.3)}), hide=["theta"])
        for program in (grouped, guide)
    ]
    found = check(*held, torch.zeros(4))
    assert found.p_value > 0.01 and found.simulations == 1000


def test_ties_are_broken_at_random():
    constant = {"constant": lambda latents, x: torch.zeros(latents["z"].shape[:2])}
    found = simulation_based_calibration(TOY.model, guide_of(), TOY.x, quantities=constant, log_likelihood=False)
    assert found.p_values["constant"] > 0.01
    assert len(found.ranks["constant"].unique()) > 90


def test_adjusted_p_values_are_holms():
    ranks = {"a": torch.randint(10, (60, 2, 2)), "b": torch.randint(8, (60,))}
    found = SimulationBasedCalibration(ranks, draws=9)
    p = torch.cat([found.p_values["a"].flatten(), found.p_values["b"].flatten()])
    steps = [min(1.0, (5 - k) * value) for k, value in enumerate(p.sort().values.tolist())]
    expected = torch.tensor([*itertools.accumulate(steps, max)], dtype=torch.float64)
    adjusted = torch.cat([found.adjusted["a"].flatten(), found.adjusted["b"].flatten()])
    assert torch.allclose(adjusted[p.argsort()], expected)
    assert found.p_value == min(1.0, 5 * p.min().item())
    assert [*found.units] == ["a[0,0]", "a[0,1]", "a[1,0]", "a[1,1]", "b"]
    assert found.units["a[1,0]"].p_value == found.p_values["a"][1, 0].item()


def test_coverage_is_the_distribution_function_of_ranks():
    found = TARP(torch.tensor([0, 0, 1, 3]), draws=3)
    assert found.levels.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.coverage.tolist() == [0.0, 0.5, 0.75, 0.75, 1.0]


@CHECKS
def test_seeds_state_and_prints(check):
    state = torch.get_rng_state()
    options = {"simulations": 50, "draws": 9}
    found = check(TOY.model, guide_of(scale=3.0), TOY.x, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(found) == str(check(TOY.model, guide_of(scale=3.0), TOY.x, seed=1, **options))
    assert str(found) != str(check(TOY.model, guide_of(scale=3.0), TOY.x, seed=2, **options))
    assert str(found).endswith("50 simulations with 9 draws")
    if check is simulation_based_calibration:
        assert "z[0] (draws too wide)" in str(found)


@CHECKS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"simulations": 19}, "expected at least 20 simulations, got 19"),
        ({"simulations": 1.5}, "simulations must be a whole number of at least 1"),
        ({"draws": 0}, "draws must be a whole number of at least 1, got 0"),
        ({"rows": 0}, "rows must be a whole number of at least 1, got 0"),
    ],
)
def test_numbers_are_checked(check, options, message):
    with pytest.raises(ValueError, match=message):
        check(TOY.model, guide_of(), TOY.x, **options)


@CHECKS
def test_what_has_no_such_check_is_refused(check):
    def computed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 2), 1.0).to_event(1), obs=x.abs())

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.ones(len(x), dtype=torch.bool)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 2), 1.0).to_event(1), obs=x)

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x), 4]).to_event(1), obs=x)

    def of_nan(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ImplicitDistribution(lambda shape: torch.full((*shape, 2), torch.nan), (len(x),), (2,)))

    point = AmortizedGuide(TOY.model, torch.nn.Linear(4, 8), Delta)
    for program, guide, message in (
        (computed, prior, "the observed site 'x' is computed from the data"),
        (masked, prior, r"the sites \['z', 'x'\] are masked"),
        (nothing, lambda x: None, "the model has no latent sites"),
        (TOY.model, point, r"at the latent sites \['z'\] is a point mass \(Delta\)"),
        (TOY.model, None, "there is no guide for them"),
    ):
        with pytest.raises(ValueError, match=message):
            check(program, guide, TOY.x[:9])
    with pytest.raises(ValueError, match="the observed site 'x' is computed from the data"):
        check(TOY.model, prior, torch.zeros(9, 3))
    with pytest.raises(ArithmeticError, match="a draw of the latent site 'z' is not finite"):
        check(TOY.model, of_nan, TOY.x[:9])


def test_quantities_and_references_are_checked():
    def ranked(**quantities):
        return simulation_based_calibration(TOY.model, prior, TOY.x, simulations=20, quantities=quantities)

    with pytest.raises(ValueError, match=r"the quantities \['z'\] have the names of sites"):
        ranked(z=lambda latents, x: latents["z"])
    with pytest.raises(ValueError, match=r"'mean' has shape \(\); expected \(1, 20\) in front"):
        ranked(mean=lambda latents, x: latents["z"].mean())
    with pytest.raises(ArithmeticError, match="the quantity 'log' is NaN"):
        ranked(log=lambda latents, x: latents["z"].log())
    with pytest.raises(ValueError, match=r"no values for the latent sites \['z'\]"):
        tarp(TOY.model, prior, TOY.x, reference=lambda x: {})
    with pytest.raises(ValueError, match=r"at site 'z' has shape \(2,\), expected \(1000, 2\)"):
        tarp(TOY.model, prior, TOY.x, reference=lambda x: {"z": torch.zeros(2)})

"""Each sickness in a fit that has it, silence in one that hasn't, and what a finding says."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.data import LinearGaussian, ring
from pyrogen.distributions import Bernoulli, Implicit, NormalLikelihood, QuantizedNormal, StandardNormal
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.evaluation.diagnosis import Diagnosis, Finding, diagnose
from pyrogen.evaluation.findings import _silent_loss
from pyrogen.inference import AAE, AVB, ELBO, GAN, VGH, WAE, AmortizedGuide, CriticOptions, LinearSchedule
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

TOY = LinearGaussian(observations=1000)
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits():
    return pg.data.load("digits")


def exact(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", TOY.posterior(x))


def normal_guide(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc(x), scale).to_event(1))

    return guide


def named(make_run, model, guide, x, **options):
    return diagnose(make_run(model, guide, *([x] if isinstance(x, torch.Tensor) else x), **options), x)


def with_history(run, **columns):
    """A run with epochs of 100 steps; a column may be one value."""
    length = max(len(column) for column in columns.values() if isinstance(column, list))
    epochs = np.arange(1, length + 1)
    history = pd.DataFrame({"epoch": epochs, "step": 100 * epochs, "loss": 1.0, "validation": math.nan} | columns)
    return dataclasses.replace(run, history=history)


# Healthy


def test_an_exact_posterior_of_the_true_model_is_sound(make_run):
    found = named(make_run, TOY.model, exact, TOY.x)
    assert not found and len(found) == 0 and not found.unchecked and str(found) == "nothing found"


def test_a_few_epochs_of_a_vae_are_sound(digits, tmp_path):
    """Fifteen epochs, with twice as many latent units as it has use for."""
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(16), Bernoulli(MLP(16, SHAPE, (128,))))
    guide = AmortizedGuide(model, nn.Sequential(MLP(SHAPE, 128, (128,)), nn.ReLU()))
    run = pg.fit(model, guide, ELBO(), digits, epochs=15, learning_rate=3e-3, progress=False)
    state = torch.get_rng_state()
    found = diagnose(run)
    assert not found and not found.unchecked, str(found)
    assert torch.equal(torch.get_rng_state(), state)
    assert diagnose(run, digits, seed=1) == found
    assert not diagnose(pg.load(pg.save(run, tmp_path / "run")))


@pytest.mark.parametrize("family", ["implicit", "point mass"])
def test_guides_without_a_density_are_looked_at_too(family, make_run):
    """Draws of the exact posterior, and its means, whose variance is too small by a fifth: no hole by that."""

    def guide(x):
        q = TOY.posterior(x)
        with pyro.plate("data", len(x)):
            if family == "point mass":
                pyro.sample("z", dist.Delta(q.mean, event_dim=1))
            else:
                pyro.sample("z", ImplicitDistribution(lambda shape: q.rsample(), (len(x),), (2,)))

    found = named(make_run, TOY.model, guide, TOY.x)
    assert not found and not found.unchecked, str(found)


# Posterior collapse


def test_a_weight_far_too_large(digits):
    """From the sixth epoch on; the units are lost then."""
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(4), Bernoulli(MLP(4, SHAPE, (64,))))
    objective = ELBO(beta=lambda step: 0.1 if step < 60 else 100.0)
    run = pg.fit(
        model, AmortizedGuide(model, MLP(SHAPE, 64)), objective, digits, epochs=15, learning_rate=3e-3, progress=False
    )
    (finding,) = diagnose(run).findings
    assert finding.name == "posterior collapse" and finding.units == ("z[0]", "z[1]", "z[2]", "z[3]")
    alive = run.history["epoch"][run.history["inactive_units"] != "z[0] z[1] z[2] z[3]"]
    assert finding.epoch == 1 + alive.max() > 5
    assert "the rate is 0.0" in finding.evidence and "ELBO(free_bits=0.1)" in finding.advice
    assert str(finding).startswith(
        f"posterior collapse since epoch {finding.epoch}: 4 of 4 latent units (z[0] z[1] z[2]"
    )


def test_an_implicit_guide_that_ignores_its_observation(make_run):
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 4)))
    encoder = nn.Linear(4, 8)
    nn.init.zeros_(encoder.weight)
    run = make_run(model, AmortizedGuide(model, encoder, Implicit), TOY.x, objective=AVB())
    run = with_history(run, inactive_units=["none", "z[0]", "z[0] z[1]", "z[1]", *9 * ["z[0] z[1]"]])
    found = diagnose(run, TOY.x)
    assert found.names[0] == "posterior collapse" and found.findings[0].units == ("z[0]", "z[1]")
    assert found.findings[0].epoch == 3  # one epoch in which noise took a unit for active is let pass


def two(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("parts", 2, dim=-2):
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([b[0], b[1]], -1) + a, 0.5).to_event(1), obs=x)


def guide_of_two(slope):
    def guide(x):
        pyro.sample("unused", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(slope * x[:, :1], 0.6).to_event(1))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("b", dist.Normal(0.5 * x.unflatten(-1, (2, 2)).transpose(0, 1), 0.5).to_event(1))

    return guide


def test_a_whole_site_that_says_nothing_is_named(make_run):
    """Of two sites one; the five units of both count, also in a nested plate."""
    x = pyro.poutine.trace(pyro.poutine.uncondition(two)).get_trace(torch.zeros(1000, 4)).nodes["x"]["value"]
    collapsed = named(make_run, two, guide_of_two(0.0), x, objective=ELBO(beta=4.0))
    assert [finding.units for finding in collapsed if finding.name == "posterior collapse"] == [("a[0]",)]
    assert "1 of 5 latent units" in collapsed.findings[0].evidence and "than 4," in collapsed.findings[0].advice
    assert "posterior collapse" not in named(make_run, two, guide_of_two(0.3), x).names


def test_pruned_units_are_no_collapse_unless_next_to_nothing_is_left(make_run):
    """Eight units: two that carry much, then two that carry a tenth of a nat."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, :2], 0.5).to_event(1), obs=x)

    x = 1.118 * torch.randn(1000, 2)

    def pruned(slope):
        scale = math.sqrt(1 - 1.25 * slope**2)
        return normal_guide(lambda x: slope * x @ torch.eye(8)[:2], torch.tensor([scale, scale] + 6 * [1.0]))

    assert not named(make_run, model, pruned(0.8), x)  # the exact posterior
    found = named(make_run, model, pruned(0.15), x)
    assert len(found.findings[0].units) == 8 and "8 of 8" in found.findings[0].evidence


def test_a_narrow_prior_asks_for_less_variance(make_run):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(1), 0.05).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.02).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.862 * x.log(), 0.0186).to_event(1))

    x = torch.exp(0.05 * torch.randn(1000, 1)) + 0.02 * torch.randn(1000, 1)
    assert not named(make_run, model, guide, x)


@pytest.mark.parametrize(("slope", "scale", "said"), [(0.05, 0.01, False), (0.05, 1.0, True), (0.0, 0.01, True)])
def test_codes_in_a_corner_of_the_prior_are_no_collapse(slope, scale, said, make_run):
    """Posterior means with a variance of 0.003 tell observations apart where q(z|x) is as narrow."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(20 * z, 0.5).to_event(1), obs=x)

    guide = normal_guide(lambda x: slope * x + 1.0, scale)
    assert ("posterior collapse" in named(make_run, model, guide, 1.118 * torch.randn(1000, 1)).names) == said


@pytest.mark.parametrize(("falls", "said"), [(True, ["posterior collapse"]), (False, [])])
def test_units_that_are_lost_together_with_the_bound(falls, said, make_run):
    """Three of four units were active for ten epochs and one is left; warm-up of a weight does that too, but gains."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, :1], 0.5).to_event(1), obs=x)

    guide = normal_guide(lambda x: 0.8 * x @ torch.eye(4)[:1], torch.tensor([0.4472, 1.0, 1.0, 1.0]))
    run = make_run(model, guide, torch.zeros(2, 1))
    bound = [-9.0, *9 * [-5.0], *10 * [-7.0 if falls else -4.0]]
    idle = ["none", *9 * ["z[3]"], *10 * ["z[1] z[2] z[3]"]]
    found = diagnose(with_history(run, validation=bound, inactive_units=idle), 1.118 * torch.randn(1000, 1))
    assert [*found.names] == said, str(found)
    if falls:
        assert found.findings[0].units == ("z[1]", "z[2]", "z[3]") and found.findings[0].epoch == 11
        assert "fell by 2.00 nats" in found.findings[0].evidence


# Critics


def generator_run(make_run, samples, objective=None, **columns):
    """A GAN whose samples are ``samples``."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(samples(len(x)), 1e-3).to_event(1), obs=x)

    objective = objective or GAN()
    run = make_run(model, None, torch.zeros(2, 2), objective=objective)
    objective.prepare(run.model, None, torch.zeros(2, 2))
    return with_history(run, **({"critic_loss": 1.3, "accuracy_visible": 10 * [0.6]} | columns))


DATA = torch.randn(1000, 2, generator=torch.Generator().manual_seed(5))


def same(n):
    return torch.randn(n, 2)


def far(n):
    return torch.randn(n, 2) + 6


@pytest.mark.parametrize(
    ("samples", "columns", "epoch"),
    [
        (same, {}, None),
        (same, {"accuracy_visible": [0.6, *9 * [0.995]]}, 2),
        (same, {"accuracy_visible": [*8 * [0.995], 0.6, 0.6]}, 0),  # of late it isn't
        (same, {"accuracy_visible": 10 * [0.5]}, None),  # both sides have come to match
        (far, {"accuracy_visible": [0.9, 0.9, *8 * [0.3]]}, 3),
        (same, {"critic_loss": [1.3, 1.3, 9.0, 1.4, *6 * [3.0]]}, 3),
        (same, {"critic_loss": 10 * [1.5]}, None),
    ],
)
def test_critics_by_their_history(samples, columns, epoch, make_run):
    found = diagnose(generator_run(make_run, samples, **columns), DATA)
    failures = [finding for finding in found if finding.name == "critic failure"]
    if epoch is None:
        assert not failures
    elif epoch:
        assert [finding.epoch for finding in failures] == [epoch]
    else:
        assert len(failures) == 1 and failures[0].epoch is None  # the median of the second half is, the end isn't


def test_critics_that_settle_at_chance_and_short_trainings(make_run):
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 4)))
    guide, objective = AmortizedGuide(model, nn.Linear(4, 8), Implicit), AVB()
    run = make_run(model, guide, TOY.x, objective=objective)
    objective.prepare(run.model, run.guide, TOY.x)
    run = with_history(run, critic_loss=1.386, accuracy_z=10 * [0.5])
    assert "critic failure" not in diagnose(run, TOY.x).names
    found = diagnose(generator_run(make_run, same, accuracy_visible=[1.0]), DATA)
    assert "there were 100" in found.unchecked["critic failure"] and "not looked for: critic failure" in str(found)


def test_a_critic_that_does_not_learn():
    """The generator runs off to where the critic happens to score high."""
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), Implicit(2, context=2, noise=0))
    run = pg.fit(
        model,
        None,
        GAN(),
        DATA,
        steps=250,
        learning_rate=2e-3,
        critic=CriticOptions(learning_rate=1e-9),
        progress=False,
    )
    found = diagnose(run, DATA)
    assert found.names == ("critic failure", "mode dropping")
    assert "than 1e-09 (the program's is 0.002)" in found.findings[0].advice


@pytest.mark.usefixtures("parameter_store")
def test_what_a_silent_critic_loses():
    x = torch.zeros(2, 2)
    model = LatentVariableModel(StandardNormal(2), Implicit(2, context=2, noise=0))
    for loss, silent in (
        ("non-saturating", 2 * math.log(2)),
        ("hinge", 2.0),
        ("least-squares", 0.25),
        ("wasserstein-gp", 10.0),
    ):
        objective = GAN(loss)
        objective.prepare(model, None, x)
        for parameter in objective.critics.parameters():
            nn.init.zeros_(parameter)
        own = objective.critic_loss(model, None, x)
        assert _silent_loss(objective.critics) == pytest.approx(silent, rel=1e-5) == pytest.approx(own.item(), rel=1e-3)
    objective = GAN("wasserstein-gp", gradient_penalty=0.0)
    objective.prepare(model, None, x)
    assert _silent_loss(objective.critics) is None


# Modes


@pytest.mark.parametrize(("kept", "dropped"), [(8, False), (7, False), (6, True), (4, True)])
def test_modes_that_are_missing(kept, dropped, make_run):
    """An eighth of the data is below the fifth from which on it is said; a quarter is above."""
    toy = ring(scale=0.05)
    some = dataclasses.replace(toy, means=toy.means[:kept])
    found = named(make_run, some.model, None, toy.sample(2000, seed=1))
    assert [*found.names][:1] == (["mode dropping"] if dropped else []) and not found.unchecked
    if dropped:
        share = int(found.findings[0].evidence.split(" %")[0])
        # Of 1000 rows at random, 3.5 standard deviations.
        assert share == pytest.approx(100 * (1 - kept / 8), abs=6)


def test_blur_drops_no_modes(make_run):
    """Samples half as wide again, or in their means far narrower, reach all of the data."""
    toy = ring(scale=0.05)
    wide = dataclasses.replace(toy, scale=0.075)
    assert "mode dropping" not in named(make_run, wide.model, None, toy.sample(2000, seed=1)).names


# The prior


@pytest.mark.parametrize("family", ["normal", "implicit", "point mass"])
def test_a_prior_with_holes(family, make_run):
    """Codes ten times as far apart as the prior has room for, so that hardly any is near it."""

    def guide(x):
        mean = 10 * TOY.posterior(x).mean
        with pyro.plate("data", len(x)):
            if family == "normal":
                pyro.sample("z", dist.Normal(mean, 0.01).to_event(1))
            elif family == "point mass":
                pyro.sample("z", dist.Delta(mean, event_dim=1))
            else:
                pyro.sample(
                    "z", ImplicitDistribution(lambda shape: mean + 0.01 * torch.randn(*shape, 2), (len(x),), (2,))
                )

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ TOY.weight.T / 10, 0.5).to_event(1), obs=x)

    found = named(make_run, model, guide, TOY.x)
    hole = next(finding for finding in found if finding.name == "prior hole")
    assert ("by densities" in hole.evidence) == (family == "normal") and not found.unchecked


def test_a_shift_of_the_aggregate_is_a_hole_and_a_slight_one_none(make_run):
    for shift, said in ((0.3, False), (2.5, True)):
        guide = normal_guide(lambda x, shift=shift: TOY.posterior(x).mean + shift, 0.3)
        assert ("prior hole" in named(make_run, TOY.model, guide, TOY.x).names) == said


def test_many_dimensions_are_no_hole(make_run):
    """In fifty dimensions an aggregate that is wider by a fifth leaves balls around draws of the prior empty."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = normal_guide(lambda x: x, 0.5)
    assert "prior hole" not in named(make_run, model, guide, 1.1 * torch.randn(1000, 50)).names


# Likelihoods


@pytest.mark.parametrize(
    ("scale", "said"), [(0.5, "overconfident"), (0.8, None), (1.0, None), (2.0, None), (4.0, "uninformative")]
)
def test_scales_that_do_not_fit(scale, said, make_run):
    """Squared errors are 1/scale² times those expected: 4, 1.6, 1, 0.25, 0.06."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(len(x), 3), scale).to_event(1), obs=x)

    found = named(make_run, model, None, torch.randn(1000, 3))
    likelihoods = [name for name in found.names if name.endswith("likelihood")]
    assert likelihoods == ([] if said is None else [f"{said} likelihood"])
    if said:
        times = re.search(r"data are ([\d.]+) times", found.findings[-1].evidence)
        # Of 3000 squares the error of a mean is 2.6 %, of the draws' too.
        assert times is not None and float(times[1]) == pytest.approx(1 / scale**2, rel=0.15)


def of_scale(scale, x=TOY.x, shrunk=1.0):
    """The true model but for the scale of its observations, which is 0.5, and means that are nearer to 0."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shrunk * z @ TOY.weight.T, scale).to_event(1), obs=x)

    return model, pg.data.Data("mine", train=x[:600], validation=x[600:800], test=x[800:], values="real")


@pytest.mark.parametrize(("scale", "said"), [(0.05, "overconfident likelihood"), (5.0, "uninformative likelihood")])
def test_a_scale_that_is_as_wrong_on_training_data_is_no_overfitting(scale, said, make_run):
    model, data = of_scale(scale)
    found = diagnose(make_run(model, exact, data.train), data)
    assert found.names == (said,)
    assert "a scale of the size of the errors" in found.findings[0].advice
    assert "more data" not in found.findings[0].advice and "patience" not in found.findings[0].advice


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_samples_that_miss_the_data_for_their_scale_drop_no_modes(scale, make_run):
    """Those of the prior are a fifth as far apart as the data, of which reconstructions are as good as can be."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(5 * TOY.posterior(x).mean, 0.1).to_event(1))

    model, data = of_scale(scale, shrunk=0.2)
    found = diagnose(make_run(model, guide, data.train), data)
    if scale == 0.05:
        assert found.names == ("overconfident likelihood", "prior hole")
        assert "of the data have no sample near, but on those of" in found.unchecked["mode dropping"]
    else:
        assert found.names == ("mode dropping", "prior hole") and not found.unchecked


def test_errors_that_are_larger_on_held_out_data_are_overfitting(make_run):
    model, data = of_scale(0.3, torch.cat([0.4 * TOY.x[:600], TOY.x[600:]]))
    (finding,) = (each for each in diagnose(make_run(model, exact, data.train), data) if "likelihood" in each.name)
    assert finding.name == "overconfident likelihood" and "more data" in finding.advice


def test_a_scale_at_its_floor_and_levels_without_harm(make_run):
    x = torch.cat([torch.rand(500, 3).mul(16).round().div(16), torch.zeros(500, 1)], 1)

    class Fixed(nn.Module):
        def forward(self, z):
            loc, raw = torch.tensor([0.5, 0.5, 0.5, 0.0]), torch.tensor([-1.0, -1.0, -1.0, -20.0])
            return torch.cat([loc, raw]).expand(len(z), 8)

    for likelihood, said in (
        (NormalLikelihood(Fixed(), "per pixel"), True),
        (QuantizedNormal(Fixed(), 17, scale="per pixel"), False),
    ):
        model = LatentVariableModel(StandardNormal(2), likelihood)
        found = named(make_run, model, normal_guide(lambda x: x[:, :2], 0.1), x)
        floors = [finding for finding in found if "at its floor" in finding.evidence]
        assert bool(floors) == said
        if said:
            assert floors[0].name == "overconfident likelihood" and "at 25 % of the values" in floors[0].evidence


def test_a_likelihood_that_is_not_trained_is_not_judged(make_run):
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 4), 50.0))
    guide = AmortizedGuide(model, nn.Linear(4, 8))
    squared = WAE(cost="squared error")
    for objective, said in ((ELBO(), True), (squared, False), (AAE(), True), (VGH(), False)):
        found = named(make_run, model, guide, TOY.x, objective=objective)
        assert ("uninformative likelihood" in found.names) == said


# Curves


RISING = [-10 + 5 * (1 - 0.7**n) for n in range(20)]
FALLING = np.linspace(9.0, 2.0, 30)
BACK = [10.0, 7.0, 5.5, 5.0, 4.9, 4.8, *np.linspace(4.9, 7.0, 12)]


@pytest.mark.parametrize(
    ("columns", "name", "epoch"),
    [
        ({"loss": [-v for v in RISING]}, None, None),
        ({"loss": [-v for v in RISING], "validation": RISING}, None, None),
        ({"validation": [*RISING, *np.linspace(-5, -8, 10)], "distortion": FALLING, "rate": 1.0}, "overfitting", 22),
        ({"validation": [*RISING, *np.linspace(-5, -5.5, 10)], "distortion": FALLING, "rate": 1.0}, None, None),
        # Held-out data have no less than those of the training have.
        ({"validation": [*RISING, *np.linspace(-5, -8, 10)], "distortion": FALLING + 6, "rate": 1.0}, None, None),
        # With beta far below 1 the bound falls on training data too.
        ({"validation": [*RISING, *np.linspace(-5, -8, 10)], "distortion": 2.0, "rate": 10 - FALLING}, None, None),
        ({"loss": BACK}, "divergence", 7),
        ({"loss": [10.0, 10.2, 9.9, 10.1, 9.8, 10.3, 9.9, 10.2, 10.1]}, None, None),
        ({"loss": np.linspace(30.0, 1.0, 40)}, "not converged", None),
        ({"loss": np.linspace(12.0, 1.0, 12) + 0.1 * np.cos(np.arange(12))}, "not converged", None),
        ({"loss": [800.0, *np.linspace(30.0, 1.0, 39)]}, "not converged", None),
        ({"loss": [10.0, 9.9, 10.1, 9.8, 10.1, 9.9, 9.8, 9.9, 10.0, 9.7, 9.7, 9.6]}, None, None),
    ],
)
def test_curves(columns, name, epoch, make_run):
    columns = {key: [*value] if not isinstance(value, float) else value for key, value in columns.items()}
    run = with_history(make_run(TOY.model, exact, TOY.x), **columns)
    found = diagnose(run, TOY.x)
    assert found.names == (() if name is None else (name,))
    if name and epoch:
        assert found.findings[0].epoch == epoch
    waited = dataclasses.replace(run, options=pg.inference.FitOptions(epochs=50, patience=3))
    assert not diagnose(waited, TOY.x)


def test_a_training_that_was_stopped_is_said_first_and_one_too_short_is_not_judged(make_run):
    model, data = of_scale(0.05)
    run = make_run(model, exact, data.train)
    found = diagnose(with_history(run, loss=[*np.linspace(30.0, 1.0, 20)]), data)
    assert found.names == ("not converged", "overconfident likelihood")
    found = diagnose(with_history(run, loss=[3.0, 2.0, 1.0]), data)
    assert found.names == ("overconfident likelihood",)
    assert found.unchecked["the curves of the training"] == "curves are judged from 8 epochs on, and there were 3"


def test_schedules_raise_a_loss_by_themselves(make_run):
    for beta in (1.0, LinearSchedule(steps=10)):
        run = make_run(TOY.model, exact, TOY.x, objective=ELBO(beta=beta))
        run = with_history(run, loss=BACK)
        assert diagnose(run, TOY.x).names == (("divergence",) if beta == 1.0 else ())


# What it takes and gives


def test_rows_that_are_held_out_and_data_that_are_loaded(digits, make_run):
    """A likelihood fitted to its training rows, and data of which it is told by the run."""
    x = torch.randn(400, 3)
    data = pg.data.Data("mine", train=0.4 * x[:200], validation=x[200:300], test=x[300:], values="real")

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(len(x), 3), 0.4).to_event(1), obs=x)

    run = make_run(model, None, x)
    assert diagnose(run, data).names == ("overconfident likelihood",) and not diagnose(run, data.train)
    with pytest.raises(ValueError, match="data of your own, which a run doesn't keep; pass them as data"):
        diagnose(run)
    with pytest.raises(ValueError, match="observations must be a whole number of at least 1, got 0"):
        diagnose(run, data, observations=0)
    with pytest.raises(TypeError, match="expected data as a tensor"):
        diagnose(run, "digits")
    with pytest.raises(ValueError):
        diagnose(run, torch.randn(100, 4))


@pytest.mark.parametrize("rows", [1, 2, 10, 49, 50])
def test_of_few_rows_nothing_is_said(rows, make_run):
    found = named(make_run, TOY.model, exact, TOY.x[:rows])
    assert not found
    if rows == 50:
        assert not found.unchecked
        return
    assert {*found.unchecked} == {"posterior collapse", "mode dropping", "prior hole", "saturated likelihood"}
    assert all("at least 50 rows are needed" in why and f"got {rows}" in why for why in found.unchecked.values())


def test_few_rows_that_are_held_out_are_said_to_be_few(make_run):
    data = pg.data.Data("mine", train=TOY.x[:900], validation=TOY.x[900:920], test=TOY.x[920:], values="real")
    found = diagnose(make_run(TOY.model, exact, data.train), data)
    assert not found and [*found.unchecked] == ["saturated likelihood"]
    assert "at least 50 held-out rows are needed to say something of the whole, got 20" in str(found)


def test_covariates_and_masks_are_said_to_be_unchecked(make_run):
    def with_covariates(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + 0.2 * c, 0.4472).to_event(1))

    c = torch.randn(1000, 1)
    found = named(make_run, with_covariates, guide, (c + 1.118 * torch.randn(1000, 1), c))
    assert (
        not found and [*found.unchecked] == ["prior hole"] and "not the same for all" in found.unchecked["prior hole"]
    )

    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", dist.Normal(z @ TOY.weight.T, 0.5).to_event(1), obs=x)

    found = named(make_run, masked, exact, TOY.x)
    assert {"mode dropping", "saturated likelihood"} == {*found.unchecked} and not found


def test_a_diagnosis_reads_well():
    finding = Finding("prior hole", "40 % of the prior", "more weight", epoch=7)
    found = Diagnosis((finding,), {"mode dropping": "the site is masked"})
    assert found and [*found] == [finding] and found.names == ("prior hole",)
    assert str(found) == (
        "prior hole since epoch 7: 40 % of the prior.\n    Try more weight.\n"
        "not looked for: mode dropping (the site is masked)"
    )

"""Held-out estimates against divergences that are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Implicit
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.evaluation import (
    HeldOutEstimate,
    RatioCalibration,
    held_out,
    held_out_marginal_kl_estimate,
    held_out_rate_estimate,
)
from pyrogen.evaluation.held_out_dimensions import (
    held_out_dimension_kl_estimate,
    held_out_total_correlation_estimate,
)
from pyrogen.inference import AmortizedGuide


def linear(features, context, spread):
    """z = first values of the context + spread · noise, of which only draws are shown."""
    network = nn.Linear(context + features, features, bias=False)
    with torch.no_grad():
        network.weight[:] = torch.cat([torch.eye(features, context), spread * torch.eye(features)], 1)
    return Implicit(features, context, noise=features, network=network)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def implicit_guide(spread=0.5):
    return AmortizedGuide(model, nn.Identity(), lambda f, c: linear(f, c, spread), example=torch.zeros(2, 2))


def known_rate(x, spread=0.5):
    """KL(N(x, s² I) ‖ N(0, I)), a mean over rows."""
    return float((0.5 * x.square().sum(-1)).mean() + 2 * (0.5 * spread**2 - 0.5 - math.log(spread)))


CALIBRATION = RatioCalibration((1.0, 5.0, 20.0, 50.0), (1.05, 4.8, 14.0, 16.0))


def test_shown_past_the_range():
    def shown(known, learned):
        return HeldOutEstimate(known, {"z": learned}, {"z": CALIBRATION}, 1).shown

    assert shown(3.0, 1.0) == "4.0"
    assert shown(0.0, 4.8) == "4.8"
    assert shown(2.0, 10.0) == "> 6.8"
    assert shown(0.0, 17.0) == "> 4.8"
    # An error of the critic's that is small beside what is known does not matter.
    assert shown(200.0, 10.0) == "210.0"
    assert shown(-0.01, 0.0) == "0.0"


def test_rate_of_a_normal_guide():
    x = 2 * torch.randn(40, 2)
    found = held_out_rate_estimate(model, implicit_guide(), x, steps=100)
    # 40 · 256 draws of log q/p with a standard deviation below 2: 5 of 0.02; the critics find nothing, to 0.05.
    assert found.known == pytest.approx(known_rate(x), abs=0.1)
    assert abs(found.learned["z"]) < 0.05
    assert found.shown == f"{found.estimate:.1f}" and found.observations == 40
    assert "by the critics of z" in str(found)


def test_a_shape_that_is_not_normal_is_learned():
    """Two far modes at ± 2 with a deviation of 0.25: −log 2 in the first value beside two normal ones."""

    def guide(x):
        def draw(shape):
            z = 0.25 * torch.randn(*shape, 2)
            z[..., 0] += 2 * (2.0 * torch.randint(2, tuple(shape)) - 1)
            return z

        with pyro.plate("data", len(x)):
            pyro.sample("z", ImplicitDistribution(draw, (len(x),), (2,)))

    found = held_out_rate_estimate(model, guide, torch.randn(4, 2))
    expected = 2 * (0.5 * 0.25**2 - 0.5 - math.log(0.25)) + 0.5 * 4 - math.log(2)
    # The normal of these moments: variance 4 + 1/16 in the first value.
    normal = 0.5 * (4 + 2 / 16) - 1 - 0.5 * math.log(4 + 1 / 16) - math.log(0.25)
    # 4 · 256 draws: 5 standard errors of 0.5 · √8 / √1024. The critics are held to their 10 %.
    assert found.known == pytest.approx(normal, abs=0.25)
    assert found.learned["z"] == pytest.approx(expected - normal, rel=0.1)
    assert found.calibrations["z"].trusted > found.learned["z"]


def test_an_implicit_prior_is_contrasted_directly():
    """The prior is N(0, I) again, and the guide N(x, s² I) with its density: all of the rate comes from critics."""

    def sampled(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ImplicitDistribution(lambda s: torch.randn(*s, 2), (len(x),), (2,)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = torch.randn(16, 2)
    found = held_out_rate_estimate(sampled, guide, x)
    assert found.known == 0.0
    assert found.estimate == pytest.approx(known_rate(x), rel=0.1)


def test_several_sites_explicit_ones_exact_and_supports_mapped():
    """z ~ N(x, ¼ I) shown by draws only, given which log s ~ N(0.5 z₁, ½), explicit; then a second implicit one."""

    def chain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("t", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ImplicitDistribution(lambda s: x + 0.5 * torch.randn(*s, 2), (len(x),), (2,)))
            pyro.sample("s", dist.LogNormal(0.5 * z[..., 0], 0.5))
            t = ImplicitDistribution(lambda s: 0.3 * torch.randn(*s) + 1.0, (len(x),))
            pyro.sample("t", dist.TransformedDistribution(t, [dist.transforms.ExpTransform()]))

    x = torch.randn(30, 2)
    found = held_out_rate_estimate(chain, guide, x, steps=100)
    of_s = 0.5 * (0.25 + 0.25 * (x[:, 0].square() + 0.25)).mean() - 0.5 - math.log(0.5)
    of_t = 0.5 * (0.3**2 + 1.0) - 0.5 - math.log(0.3)
    # 30 · 256 draws with a standard deviation below 2.5: 5 of 0.03; and critics of two sites, to 0.05 each.
    assert found.estimate == pytest.approx(known_rate(x) + float(of_s) + of_t, abs=0.25)
    assert {*found.learned} == {"z", "t"}


def test_what_critics_cannot_estimate_is_refused():
    def late(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", ImplicitDistribution(lambda s: a + torch.randn(*s), (len(x),)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def other_order(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'b' is implicit given \['a'\], which the guide draws after it"):
        held_out_rate_estimate(late, other_order, torch.zeros(3))

    def mass(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x, event_dim=1))

    with pytest.raises(ValueError, match="point mass"):
        held_out_rate_estimate(model, mass, torch.zeros(3, 2))


def test_masked_sites_are_refused():
    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(8, 2)
    guide = AmortizedGuide(masked, nn.Identity(), lambda f, c: linear(f, c, 0.5), example=x)
    with pytest.raises(ValueError, match=r"the implicit sites \['z'\] are masked"):
        held_out_rate_estimate(masked, guide, x)
    with pytest.raises(ValueError, match="the latent site 'z' is masked"):
        held_out_marginal_kl_estimate(masked, guide, x)


@pytest.mark.parametrize(
    ("estimate", "sound", "asked"),
    [
        (6.4, 50.0, {5.0, 10.0, 50.0}),
        (1.9, 50.0, {1.0, 2.0, 5.0, 50.0}),
        (0.3, 50.0, {1.0, 50.0}),
        (60.0, 50.0, {50.0}),
        (6.4, 2.0, {2.0, 5.0, 10.0, 50.0}),
        (6.4, 0.0, {1.0, 2.0, 5.0, 10.0, 50.0}),
    ],
)
def test_critics_are_calibrated_around_an_estimate_and_down_to_what_they_judge(monkeypatch, estimate, sound, asked):
    def known(critic, *, divergences, **options):
        estimated = (value if value <= sound else 1.5 * value for value in divergences)
        return RatioCalibration(tuple(divergences), tuple(estimated))

    monkeypatch.setattr(held_out, "calibrate_ratio", known)
    found = held_out.calibrated_around(estimate, 2, 1, 0, 1e-3)
    assert {*found.known} == asked and [*found.known] == sorted(asked)
    assert found.trusted == (max(value for value in asked if value <= sound) if sound else 0.0)


def test_marginal_divergence_of_an_aggregate_that_is_normal():
    """x ~ N((1, 0), ¾ I) and z ~ N(x, ¼ I) give z ~ N((1, 0), I): ½ nat from the prior."""
    x = 0.75**0.5 * torch.randn(2000, 2) + torch.tensor([1.0, 0.0])
    guide = implicit_guide()
    state = torch.get_rng_state()
    found = held_out_marginal_kl_estimate(model, guide, x, steps=300)
    assert torch.equal(torch.get_rng_state(), state)
    # The log ratio z₁ − ½ has deviation 1 over 500 observations: 5 of 0.045.
    assert found.estimate == pytest.approx(0.5, abs=0.23)
    assert found.observations == 500 and found.known == 0.0


def test_each_dimension_of_an_aggregate_that_is_normal():
    """The same: half a nat in the first value, nothing in the second."""
    x, guide = 0.75**0.5 * torch.randn(2000, 2) + torch.tensor([1.0, 0.0]), implicit_guide()
    state = torch.get_rng_state()
    found = held_out_dimension_kl_estimate(model, guide, x, steps=300)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.dimensions["z"].tolist() == pytest.approx([0.5, 0.0], abs=0.23)
    assert abs(found.dimensions["z"][1]) < 0.05  # where q/p is 1 nothing varies but the critic
    assert found.observations == 500 and found.calibration.known[0] == 1.0
    assert found.shown["z"][1] == "0.0" and "of each value" in str(found)


def test_dimensions_of_a_hole():
    """Of two far modes in a positive value, log z = ±2 with a deviation of ¼ against N(0, 1): 3.2 nats less log 2."""

    def positive(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            draws = ImplicitDistribution(lambda s: 2 * x + 0.25 * torch.randn(*s, 1), (len(x),), (1,))
            pyro.sample("z", dist.TransformedDistribution(draws, [dist.transforms.ExpTransform()]))

    x = 2.0 * torch.randint(2, (1000, 1)) - 1
    found = held_out_dimension_kl_estimate(positive, guide, x, steps=300)
    expected = 0.5 * (0.25**2 + 4 - 1) - math.log(0.25) - math.log(2)
    # A single value of 500 draws has a deviation of about 0.7 nats, of 250 observations; the critic its 10 %.
    assert found.dimensions["z"].tolist() == pytest.approx([expected], rel=0.1)


def test_total_correlation_of_an_aggregate_that_is_normal():
    """z ~ N(0, I + ρ) with a correlation of 0.8 between its two values: −½ log(1 − 0.64)."""
    lower = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    found = held_out_total_correlation_estimate(model, implicit_guide(), 3 * torch.randn(2000, 2) @ lower.T, steps=200)
    covariance = 9 * lower @ lower.T + 0.25 * torch.eye(2)
    expected = float(0.5 * (covariance.diagonal().log().sum() - covariance.logdet()))
    # The log ratio has deviation 0.8, over 500 observations: five of 0.035, and the critic's 5 %.
    assert found.estimate == pytest.approx(expected, abs=0.2)
    assert found.observations == 500 and found.known == 0.0
    apart = held_out_total_correlation_estimate(model, implicit_guide(), torch.randn(2000, 2), steps=50)
    assert abs(apart.estimate) < 0.05


def test_global_sites_are_held_while_dimensions_are_compared():
    """Both values stand around the same t: were it drawn anew for each pass, that would correlate them."""

    def shifted(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    def guide(x):
        t = pyro.sample("t", dist.Normal(0.0, 30.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(t, 1.0).expand([len(x), 2]).to_event(1))

    x = torch.zeros(200, 2)
    assert abs(held_out_total_correlation_estimate(shifted, guide, x, steps=50).estimate) < 0.05
    assert held_out_dimension_kl_estimate(shifted, guide, x, steps=50).dimensions["z"].abs().max() < 0.05


def test_one_value_has_no_total_correlation():
    def single(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="two or more latent values of an observation, and the model has 1"):
        held_out_total_correlation_estimate(single, guide, torch.zeros(5))
    assert held_out_dimension_kl_estimate(single, guide, torch.zeros(5), steps=5).dimensions["z"].shape == ()


def test_few_observations_do_not_make_a_marginal_divergence_large():
    """Narrow posteriors around 40 points of N(0, I): q(z) is near the prior, while the 20 points that a critic sees
    are known to it by heart. Were it asked about those, it would report some nats."""
    found = held_out_marginal_kl_estimate(model, implicit_guide(0.05), torch.randn(40, 2))
    assert -1.0 < found.estimate < 1.0


def test_a_marginal_divergence_needs_parts():
    with pytest.raises(ValueError, match="at least 3 observations, got 2"):
        held_out_marginal_kl_estimate(model, implicit_guide(), torch.zeros(2, 2))

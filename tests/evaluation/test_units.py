import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.evaluation import active_units
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

X = torch.linspace(-2.0, 2.0, 400).reshape(-1, 1)
SLOPES = torch.tensor([1.0, 0.5, 0.05, 0.0])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)


def with_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x * SLOPES, 1.0).to_event(1))


def without_mean(x):
    identity = torch.distributions.transforms.AffineTransform(0.0, 1.0, event_dim=1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(x * SLOPES, 1.0).to_event(1), [identity]))


def test_means_in_closed_form_leave_no_noise():
    found = active_units(model, with_mean, X, particles=2, rows=33)
    torch.testing.assert_close(found.variances["z"], (X * SLOPES).var(0))
    assert (found.count, found.total, found.per_site) == (2, 4, {"z": 2})
    assert str(found) == "2 of 4 units are active (z 2 of 4)"


def test_noise_of_draws_is_taken_off():
    """Ten draws of unit variance add 0.1, ten times the threshold.

    What is left has a standard deviation of 0.1 * sqrt(2 / 400) = 0.007 at most at the last two units and 0.02 at the
    first; five of these fail once in 10^6.
    """
    found = active_units(model, without_mean, X, particles=10, threshold=0.05, rows=33)
    error = (found.variances["z"] - (X * SLOPES).var(0)).abs()
    assert (error < torch.tensor([0.2, 0.1, 0.04, 0.04])).all()
    assert found.active["z"].tolist() == [True, True, False, False]


def test_later_sites_are_averaged_over_earlier_ones():
    """u ~ N(x, 1), then v ~ N(u - x, 1e-3): v's mean given u has unit variance, but E[v | x] = 0 for every x."""

    def two(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            v = pyro.sample("v", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(u + v, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("v", dist.Normal(u - x, 1e-3).to_event(1))

    found = active_units(two, guide, X, particles=50, threshold=0.02)
    assert found.per_site == {"u": 1, "v": 0}


def test_nested_plates_count_and_global_sites_do_not():
    def nested(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum((0, -1)).unsqueeze(-1), scale).to_event(1), obs=x)

    guide = AmortizedGuide(nested, nn.Linear(1, 4), example=X[:2])
    found = active_units(nested, guide, X[:20])
    assert {name: tuple(v.shape) for name, v in found.variances.items()} == {"z": (3, 2)}
    assert found.total == 6


def test_too_few_observations_or_particles():
    with pytest.raises(ValueError, match="at least two observations"):
        active_units(model, with_mean, X[:1])
    with pytest.raises(ValueError, match="two particles"):
        active_units(model, with_mean, X, particles=1)


def test_a_collapsed_posterior_has_none():
    model = LatentVariableModel(StandardNormal(3), Bernoulli(MLP(3, 6)))
    guide = AmortizedGuide(model, MLP(6, 8))
    for parameter in guide.parameters():
        nn.init.zeros_(parameter)
    found = active_units(model, guide, (torch.rand(30, 6) > 0.5).float())
    assert found.count == 0 and found.variances["z"].eq(0).all()

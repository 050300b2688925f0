"""Which units an epoch of training finds idle, against guides of which it is known."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Delta, Flow, Implicit, Normal, NormalLikelihood, StandardNormal
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.inference import ELBO, GAN, AmortizedGuide
from pyrogen.inference.loop import Training
from pyrogen.inference.units import inactive_units, names_of_units
from pyrogen.models import LatentVariableModel

X = torch.linspace(-2.0, 2.0, 200).reshape(-1, 1)
SLOPES = torch.tensor([1.0, 0.0, 0.5, 0.0])


def with_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x * SLOPES, 1.0).to_event(1))


def implicit(x):
    with pyro.plate("data", len(x)):
        draws = ImplicitDistribution(lambda shape: x * SLOPES + torch.randn(*shape, 4), (len(x),), (4,))
        pyro.sample("z", draws)


def point_mass(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x * SLOPES, event_dim=1))


@pytest.mark.parametrize("guide", [with_mean, implicit, point_mass])
def test_units_that_do_not_follow_x(guide):
    """Drawn units have an error of 0.003 around 0, three times less than the limit: one in 700 is taken for active."""
    assert inactive_units(guide, ["z"], (X,)) == ["z[1]", "z[3]"]


def test_a_later_site_is_averaged_over_an_earlier_one():
    """v's mean given u varies as widely as u does, but E[v | x] = 0; with a helper and a global site beside."""

    def guide(x):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("helper", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("v", dist.Normal(u - x, 1e-3).to_event(1))

    assert inactive_units(guide, ["u", "v"], (X,)) == ["v[0]"]


def test_nested_plates_and_names():
    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 3, dim=-1):
            pyro.sample(
                "z", dist.Normal(x.unsqueeze(-1) * torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), 1.0).to_event(1)
            )

    assert inactive_units(guide, ["z"], (X,)) == ["z[0,1]", "z[1,0]", "z[1,1]", "z[2,0]"]
    assert names_of_units("a site", (2,)) == ["a_site[0]", "a_site[1]"] and names_of_units("z", ()) == ["z"]


def linear(features=2):
    return LatentVariableModel(StandardNormal(features), NormalLikelihood(nn.Linear(features, 1)))


def fit(model, guide, objective=None, data=X, **options):
    return pg.fit(model, guide, objective or ELBO(), data, epochs=3, progress=False, **options)


@pytest.mark.parametrize("family", [Normal, Flow, Implicit, Delta])
def test_the_history_names_the_idle_units(family, tmp_path):
    """A guide whose encoder is a constant says nothing of anything."""
    model, encoder = linear(), nn.Linear(1, 4)
    nn.init.zeros_(encoder.weight)
    encoder.weight.requires_grad_(False)
    objective = {Implicit: pg.inference.AVB(2), Delta: pg.inference.ELBO(beta=0.0)}.get(family, ELBO())
    run = fit(model, AmortizedGuide(model, encoder, family), objective, out=tmp_path / "run")
    assert [*run.history["inactive_units"]] == 3 * ["z[0] z[1]"]
    assert [*pg.load(tmp_path / "run").history["inactive_units"]] == 3 * ["z[0] z[1]"]
    assert [*pd.read_csv(tmp_path / "run" / "history.csv")["inactive_units"]] == 3 * ["z[0] z[1]"]
    assert not encoder.weight.requires_grad


def test_nothing_is_noted_where_there_is_nothing_to_note():
    generator = LatentVariableModel(StandardNormal(2), Implicit(1, context=2, noise=0))
    assert "inactive_units" not in fit(generator, None, GAN()).history
    model = linear()
    assert (
        "inactive_units" not in fit(model, AmortizedGuide(model, nn.Linear(1, 4)), data=X[:1]).history
    )  # one row has no variance

    def only_global(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0).expand([1]).to_event(1), obs=x)

    assert "inactive_units" not in fit(only_global, AmortizedGuide(only_global, nn.Linear(1, 4), example=X[:2])).history


def test_looking_leaves_the_training_as_it_is(monkeypatch):
    weights = []
    for looks in (True, False):
        torch.manual_seed(0)
        model = linear()
        encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        guide = AmortizedGuide(model, encoder, Implicit)
        with monkeypatch.context() as patch:
            if not looks:
                patch.setattr(Training, "_inactive_units", lambda self: "none")
            run = fit(model, guide, pg.inference.AVB(2), average=0.9, batch_size=64)
        weights.append({name: value.clone() for name, value in run.programs.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

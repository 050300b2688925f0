"""Gradients that score the guide's draws in a second run refuse densities that only the first run can estimate."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Normal, SemiImplicit
from pyrogen.inference import ELBO, IWAE, AmortizedGuide

HELD = [ELBO(sticking_the_landing=True), IWAE(3, gradient="doubly reparameterised")]
FREE = [ELBO(), IWAE(3)]
REFUSAL = r"guide's density at site 'rate' is an estimate.*second run.*Use ELBO\(\) or IWAE\(gradient='standard'\)"


class Model(nn.Module):
    """Two latent sites: a positive one, whose family the tests choose, and one with the prior that they choose."""

    def __init__(self, prior=None):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1) if self.prior is None else self.prior())
            pyro.sample("x", dist.Normal(z.sum(-1), rate), obs=x)


def guide_of(model, family):
    return AmortizedGuide(model, nn.Unflatten(0, (-1, 1)), {"rate": family, "z": Normal})


def masked_guide(model):
    """A guide by hand, whose estimated density stands behind a transform and a mask."""
    family = SemiImplicit((), 1, draws=2)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.TransformedDistribution(family(x.unsqueeze(-1)), [dist.transforms.ExpTransform()])
            pyro.sample("rate", q.mask(torch.ones(len(x)).bool()))
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return guide


@pytest.mark.parametrize("objective", HELD, ids=repr)
@pytest.mark.parametrize("make", [partial(guide_of, family=partial(SemiImplicit, draws=2)), masked_guide])
def test_estimated_densities_of_the_guide_are_refused(objective, make):
    model, x = Model(), torch.randn(6)
    guide = make(model)
    with pytest.raises(ValueError, match=REFUSAL):
        objective.prepare(model, guide, x)
    with pytest.raises(ValueError, match=REFUSAL):
        objective(model, guide)(x)
    with pytest.raises(ValueError, match=REFUSAL), torch.no_grad():
        objective(model, guide).bound(x)


def test_fit_and_compare_refuse_before_the_first_step(tmp_path):
    model, x = Model(), torch.randn(6)
    family = partial(SemiImplicit, draws=2)
    guide = guide_of(model, family)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    with pytest.raises(ValueError, match=REFUSAL):
        pg.fit(model, guide, HELD[0], x, steps=1, out=tmp_path / "fit", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    guides = {"normal": (Normal, ELBO()), "held": ({"rate": family}, HELD[1])}
    with pytest.raises(ValueError, match=REFUSAL):
        pg.compare(
            model,
            guides,
            encoder=lambda: nn.Unflatten(0, (-1, 1)),
            data=x,
            steps=1,
            out=tmp_path / "compare",
            progress=False,
        )
    assert not (tmp_path / "compare" / "normal").exists()


@pytest.mark.parametrize("objective", FREE, ids=repr)
def test_other_gradients_serve_them(objective):
    model, x = Model(), torch.randn(6)
    guide = guide_of(model, partial(SemiImplicit, draws=2))
    objective.prepare(model, guide, x)
    assert objective(model, guide)(x).isfinite()


@pytest.mark.parametrize("objective", HELD, ids=repr)
def test_priors_with_an_estimated_density_are_served(objective):
    """The model runs once, so what it says of the draws holds."""
    model, x = Model(SemiImplicit(2, draws=2)), torch.randn(6)
    guide = guide_of(model, Normal)
    objective.prepare(model, guide, x)
    objective(model, guide)(x).backward()
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.grad.isfinite().all()
    assert any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("objective", HELD, ids=repr)
def test_a_bound_without_gradients_runs_the_guide_once(objective):
    model, x = Model(), torch.randn(6)
    calls = []
    inner = guide_of(model, Normal)

    def guide(x):
        calls.append(torch.is_grad_enabled())
        return inner(x)

    with torch.no_grad():
        objective(model, guide).bound(x)
    assert calls == [False]
    objective(model, guide)(x)
    assert calls == [False, True, True]

"""Objectives with critics on programs of many forms: names, plates, global sites, whole numbers, precisions."""

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Bernoulli, Implicit, StandardNormal
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.inference import AAE, ALI, AVB, ELBO, GAN, VAEGAN, VGH, AmortizedGuide, Hybrid, VGHPlusPlus
from pyrogen.inference.draws import Draws
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

SMALL = partial(Critic, hidden=(8,))
pytestmark = pytest.mark.usefixtures("parameter_store")


def model_of(name):
    """Two latent sites, the first under this name."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w, 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("name", ["latent", "visible", "values", "type", "a.b"])
@pytest.mark.parametrize("visible_samples", [0.0, 1.0])
def test_latent_sites_have_any_name(name, visible_samples):
    """Names of other critics, of methods and with dots, all with the figures of the site named z."""
    x, found = torch.randn(6, 2), []
    for each in ("z", name):
        torch.manual_seed(0)
        model = model_of(each)
        guide = AmortizedGuide(model, nn.Linear(2, 4), {each: Implicit, "w": pg.distributions.Normal}, example=x)
        objective = Hybrid(3, visible_samples=visible_samples, critic=SMALL)
        module = objective(model, guide)
        torch.manual_seed(1)
        module(x)
        assert objective.validates_as == "validation_estimate" and module.bound(x).shape == (6,)
        metrics = module.latest.metrics
        found.append({key: metrics[key] for key in ("rate_estimate", "distortion", "critic_loss")})
    torch.testing.assert_close(*found)


class Hierarchy(nn.Module):
    """A normal guide of t, on which the prior of z depends, and of z given x alone."""

    def __init__(self):
        super().__init__()
        self.location, self.encoder = nn.Parameter(torch.tensor([0.5])), nn.Linear(1, 1)

    def forward(self, x):
        pyro.sample("t", dist.Normal(self.location, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))
            if self.two:
                pyro.sample("w", dist.Normal(z, 1.0).to_event(1))


def hierarchy(prior, *, two=False):
    def model(x):
        t = pyro.sample("t", dist.Normal(torch.zeros(1), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(t))
            if two:
                pyro.sample("w", dist.Normal(t + z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)

    guide = Hierarchy()
    guide.two = two
    return model, guide


@pytest.mark.parametrize("two", [False, True])
def test_a_marginal_term_teaches_the_global_sites_that_the_prior_depends_on(two):
    r"""The gradient of −E log p(z | t) − E log p(w | t, z) along t, by hand, where z and w are constants."""
    torch.manual_seed(0)
    model, guide = hierarchy(lambda t: dist.Normal(t, 1.0).to_event(1), two=two)
    objective, x = AAE(critic=SMALL), torch.randn(20, 1)
    objective.prepare(model, guide, x)
    draws = Draws(model, guide, (x,))
    (slope,) = torch.autograd.grad(objective.critics["latent"].prior_term(draws), [guide.location])
    z, t = draws.model["z"]["value"], draws.model["t"]["value"]
    expected = -(z - t).mean()
    if two:
        expected = expected - (draws.model["w"]["value"] - t - z).mean()
    torch.testing.assert_close(slope.sum(), expected.detach())


def test_an_implicit_prior_teaches_the_global_sites_that_it_depends_on():
    torch.manual_seed(0)
    model, guide = hierarchy(lambda t: ImplicitDistribution(lambda shape: t + torch.randn(*shape, 1), (), (1,)))
    objective, x = AAE(critic=SMALL), torch.randn(20, 1)
    objective.prepare(model, guide, x)
    term = objective.critics["latent"].prior_term(Draws(model, guide, (x,)))
    (slope,) = torch.autograd.grad(term, [guide.location])
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("left", [False, True])
def test_observations_in_a_nested_plate_are_read_by_row(left):
    """Repeats on either side of the plate of the data; what a critic sees of bits is their mean."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1 if left else -2):
            shape = (2,) if left else (1, 2)
            z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).to_event(1))
            with pyro.plate("repeats", 3, dim=-2 if left else -1):
                pyro.sample("x", dist.Bernoulli(logits=z.sum(-1)), obs=x.T if left else x)
                pyro.sample("y", dist.Bernoulli(logits=z.prod(-1)), obs=1 - (x.T if left else x))

    torch.manual_seed(0)
    x = torch.rand(5, 3).round()
    guide = AmortizedGuide(model, nn.Linear(3, 4), example=x)
    draws = Draws(model, guide, (x,), 2)
    assert torch.equal(draws.data(), torch.cat([x, 1 - x], -1))
    z = draws.model["z"]["value"].view(10, 2)
    shown = torch.stack([z.sum(-1), z.prod(-1)], -1).sigmoid().repeat_interleave(3, -1)
    torch.testing.assert_close(draws.reconstructions, shown)
    for objective in (Hybrid(log_likelihood=0.0, reconstruction=1.0), VGH(critic=SMALL), ALI(critic=SMALL), VAEGAN()):
        assert objective(model, guide)(x).isfinite()


@pytest.mark.parametrize("objective", [AVB(beta=0.0), Hybrid(latent=0.0, visible_samples=1.0)], ids=["AVB", "Hybrid"])
def test_without_a_latent_term_there_is_no_bound(objective):
    toy = pg.data.LinearGaussian()
    guide = AmortizedGuide(toy.model, nn.Linear(4, 8), Implicit)
    module = objective(toy.model, guide)
    assert module(toy.x[:8]).isfinite() and objective.validates_as is None
    with pytest.raises(ValueError, match="gives the latent term no weight, so it knows no bound"):
        module.bound(toy.x[:8])


class Numbers(nn.Module):
    """A guide of one's own with an implicit site, of observations (B,)."""

    def __init__(self):
        super().__init__()
        self.q = Implicit(1, context=1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x.unsqueeze(-1).to(self.q.zero.dtype)))


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1).to(torch.get_default_dtype()), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z.squeeze(-1).exp()), obs=x)


@pytest.mark.parametrize("objective", [AVB(4), AAE(), VGHPlusPlus()], ids=["AVB", "AAE", "VGH++"])
def test_whole_numbers_one_for_each_row_under_svi(objective):
    x, guide = torch.tensor([0, 3, 1, 2, 7, 0]), Numbers()
    objective.prepare(counts, guide, x)
    svi = pyro.infer.SVI(counts, guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    assert math.isfinite(svi.step(x))


def test_several_observed_numbers_are_seen_side_by_side():
    def pair(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(-z, 1.0), obs=b)

    a, b = torch.randn(2, 6)
    objective = GAN(critic=SMALL)
    objective.prepare(pair, None, a, b)
    assert torch.equal(Draws(pair, None, (a, b)).data(), torch.stack([a, b], -1))
    assert objective(pair, None)(a, b).isfinite()


def test_critics_that_are_kept_follow_the_programs():
    objective, x = AVB(4, critic=SMALL), torch.rand(12, 4).round()
    for dtype in (torch.float32, torch.float64):
        model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (4,), (8,)))).to(dtype)
        guide = AmortizedGuide(model, MLP(4, 6).to(dtype), Implicit).to(dtype)
        assert objective(model, guide)(x.to(dtype)).isfinite()
        assert {p.dtype for p in objective.critics.parameters()} == {dtype}


@pytest.mark.filterwarnings("ignore:You passed")  # half precision on the CPU
@pytest.mark.parametrize(
    ("objective", "precision"),
    [
        (GAN("wasserstein-gp", critic=SMALL), "bf16-mixed"),
        (ALI("wasserstein-gp", critic=SMALL), "bf16-mixed"),
        (VGHPlusPlus(critic=SMALL), "bf16-true"),
        (VAEGAN(2, critic=SMALL), "bf16-true"),
        (AVB(8, covariance="full", critic=SMALL), "bf16-true"),
    ],
    ids=["GAN", "ALI", "VGH++", "VAEGAN", "AVB"],
)
def test_half_precision(objective, precision):
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (4,), (8,))))
    guide = AmortizedGuide(model, MLP(4, 6), Implicit) if objective.uses_guide else None
    run = pg.fit(model, guide, objective, torch.rand(12, 4).round(), steps=3, precision=precision, progress=False)
    assert run.history["loss"].map(math.isfinite).all()


class Helped(nn.Module):
    """A guide with an implicit helper site."""

    def __init__(self):
        super().__init__()
        self.helper, self.location = Implicit(1, hidden=(4,)), nn.Linear(1, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", self.helper(), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(self.location(a), 1.0).to_event(1))


def test_matching_marginals_asks_for_no_density_of_a_guide():
    """Neither of its sites, nor of the helpers that these are drawn given."""
    toy = pg.data.LinearGaussian(latent=2, observed=3)
    run = pg.fit(toy.model, Helped(), AAE(critic=SMALL), toy.x[:16], steps=2, progress=False)
    assert "marginal_kl_estimate" in run.history


def test_each_critic_of_a_site_is_watched():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    prior, x = Implicit(2, hidden=(4,)), torch.randn(8, 2)
    for contrast, critics in (("adaptive", {"", "_model", "_prior"}), ("none", {"", "_prior"})):
        guide = AmortizedGuide(model, nn.Linear(2, 4), Implicit, example=x)
        module = AVB(4, contrast=contrast, critic=SMALL)(model, guide)
        module(x)
        assert {f"accuracy_z{critic}" for critic in critics} < {*module.latest.metrics}
        contrasts: Any = module.elbo.critics
        assert contrasts["z"].settles == (("", "_model") if contrast == "adaptive" else ())


def test_explicit_objectives_know_their_names():
    assert repr(GAN("hinge", r1=1.0)) == "GAN(loss='hinge', r1=1.0)"
    assert repr(AVB(4, beta=0.5)) == "AVB(particles=4, beta=0.5)" and repr(ELBO()) == "ELBO(particles=1)"

"""Short trainings by AVB recover posteriors that are known: an implicit guide, one beside an explicit, a learned prior.

Bounds are a half more than the worst of five seeds. What long trainings reach stands in ``benchmarks/posteriors.py``.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

import pyrogen as pg
from pyrogen.data import LinearGaussian
from pyrogen.distributions import Implicit, Normal
from pyrogen.evaluation import posterior_samples
from pyrogen.inference import AVB, AmortizedGuide, CriticOptions
from pyrogen.networks import Critic

FAMILY = partial(Implicit, hidden=(32,))
ROWS = 100


def train(model, guide, x, steps, seed=0):
    run = pg.fit(
        model,
        guide,
        AVB(8, critic=partial(Critic, hidden=(32,))),
        x,
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        schedule="linear",
        optimizer=partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True),
        critic=CriticOptions(learning_rate=1e-2),
        average=0.99,
        seed=seed,
        progress=False,
    )
    drawn = posterior_samples(run.model, run.guide, x[:ROWS], 1000)
    return torch.cat([*drawn.values()], -1)


def errors(z, mean, covariance):
    """Of posterior means and covariances, relative to the exact ones."""
    centred = z - z.mean(0)
    found = torch.einsum("nbi,nbj->bij", centred, centred) / (len(z) - 1)
    of_covariance = (found - covariance).flatten(1).norm(dim=1).mean() / covariance.norm()
    return float((z.mean(0) - mean).norm(dim=1).mean() / mean.norm(dim=1).mean()), float(of_covariance)


def test_an_implicit_guide():
    torch.manual_seed(0)
    toy = LinearGaussian()
    z = train(toy.model, AmortizedGuide(toy.model, nn.Linear(4, 8), FAMILY), toy.x, 400)
    exact = toy.posterior(toy.x[:ROWS])
    mean, covariance = errors(z, exact.mean, exact.covariance_matrix)
    assert mean < 0.04 and covariance < 0.03


class TwoSites(PyroModule):
    """a ~ N(0, 1), b ~ N(a, 1), x ~ N((a + b, b), 0.5²)."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([a + b, b], -1), 0.5).to_event(1), obs=x)

    @staticmethod
    def posterior(x):
        prior = torch.linalg.inv(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
        shown = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        covariance = torch.linalg.inv(prior + shown.T @ shown / 0.25)
        return x @ shown @ covariance / 0.25, covariance


def test_an_implicit_site_beside_an_explicit_one():
    torch.manual_seed(0)
    model, a = TwoSites(), torch.randn(1000, 1)
    b = a + torch.randn(1000, 1)
    x = torch.cat([a + b, b], -1) + 0.5 * torch.randn(1000, 2)
    z = train(model, AmortizedGuide(model, nn.Linear(2, 8), {"a": Normal, "b": FAMILY}), x, 500)
    mean, covariance = errors(z, *model.posterior(x[:ROWS]))
    assert mean < 0.12 and covariance < 0.2


class ImplicitPrior(PyroModule):
    """z ~ p(z), a learned implicit distribution; x ~ N(z, 0.5²)."""

    def __init__(self):
        super().__init__()
        self.prior = Implicit(2, hidden=(16,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_an_implicit_prior_is_learned():
    torch.manual_seed(0)
    location, scale = torch.tensor([1.0, -1.0]), torch.tensor([0.6, 1.0])
    model, x = ImplicitPrior(), location + scale * torch.randn(2000, 2) + 0.5 * torch.randn(2000, 2)
    z = train(model, AmortizedGuide(model, nn.Linear(2, 8), Normal), x, 800)
    with torch.no_grad():
        drawn = model.prior().sample((10_000,))
    precision = 1 / scale.square() + 4
    mean, covariance = errors(z, (location / scale.square() + 4 * x[:ROWS]) / precision, (1 / precision).diag())
    assert (drawn.mean(0) - location).abs().max() < 0.2 and (drawn.std(0) / scale - 1).abs().max() < 0.2
    assert mean < 0.05 and covariance < 0.3

"""Runs made by hand from programs whose every answer is known."""

from collections.abc import Callable

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrogen.inference import ELBO, FitOptions, Run
from pyrogen.inference.programs import as_module, describe_example
from pyrogen.models import ProbabilisticPCA


@pytest.fixture
def ppca():
    """A probabilistic PCA fitted exactly in double precision, and its data ``(200, 5)``."""
    x = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    return ProbabilisticPCA.maximum_likelihood(x, latent=2), x


@pytest.fixture
def exact(ppca):
    """The exact posterior of :func:`ppca` as a guide."""
    model, _ = ppca

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    return guide


@pytest.fixture
def wide(ppca):
    """A mean-field guide whose scales are 1.5 times too large, so that the weights have every moment."""
    model, _ = ppca

    def guide(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean, 1.5 * posterior.stddev).to_event(1))

    return guide


@pytest.fixture
def point_mass(ppca):
    """A guide that is a point mass at the posterior's mean."""
    model, _ = ppca

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(model.posterior(x).mean, event_dim=1))

    return guide


class GlobalMean:
    """x_i ~ N(θ, 1) with θ ~ N(0, 1), its exact posterior given eight observations, and its predictive density."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1.0, 3.0, 8, dtype=torch.float64)
        self.loc, self.variance = self.x.sum() / 9, torch.tensor(1 / 9, dtype=torch.float64)

    def model(self, x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(self, x):
        pyro.sample("theta", dist.Normal(self.loc, self.variance.sqrt()))

    def log_predictive(self, x):
        return dist.Normal(self.loc, (1 + self.variance).sqrt()).log_prob(x)


@pytest.fixture
def global_mean():
    return GlobalMean()


@pytest.fixture
def make_run() -> Callable[..., Run]:
    def make(model, guide, *batch, objective=None) -> Run:
        return Run(
            model=as_module(model, *batch),
            guide=None if guide is None else as_module(guide, *batch),
            objective=objective or ELBO(),
            history=pd.DataFrame(),
            options=FitOptions(epochs=1),
            example=describe_example(tuple(x[:2] for x in batch)),
        )

    return make

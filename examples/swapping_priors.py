"""Swapping priors: the same model and the same guide under four priors, each an object passed in another's place.

The latents of the data come from four clusters and are observed through a linear map. A decoder that is linear too
can't make up for a prior that is wrong, so the price of each prior shows in the log-likelihood, and the distribution of
the data, a mixture of four normals, is known to compare with.
"""

import argparse

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyrogen as pg
from pyrogen.distributions import Flow, Mixture, NormalLikelihood, StandardNormal, Vamp
from pyrogen.inference import ELBO, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

LATENT, OBSERVED = 2, 5


def truth() -> dist.MixtureSameFamily:
    """The distribution of x: z from four clusters, x = W z + noise."""
    weight = torch.randn(OBSERVED, LATENT, generator=torch.Generator().manual_seed(1))
    centres = 2.5 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    covariance = 0.2 * weight @ weight.T + 0.3**2 * torch.eye(OBSERVED)
    return dist.MixtureSameFamily(
        dist.Categorical(torch.ones(4)), dist.MultivariateNormal(centres @ weight.T, covariance_matrix=covariance)
    )


def priors(train: Tensor) -> dict[str, nn.Module]:
    """Conditional distributions that nothing is asked of but a call without a context."""
    return {
        "standard normal": StandardNormal(LATENT),
        "mixture": Mixture(LATENT, components=8),
        # Its components are the guide's own posteriors at learned pseudo-observations, at first rows of the data.
        "VampPrior": Vamp(LATENT, train, components=50),
        "flow": Flow(LATENT, transform="spline_coupling", layers=2),
    }


def main(steps: int = 1500) -> pd.DataFrame:
    """Fit each prior; returns log-likelihoods of test data in nats."""
    torch.manual_seed(0)
    target = truth()
    train, test = target.sample((4000,)), target.sample((1000,))
    exact = target.log_prob(test).mean().item()

    rows = {}
    for name, prior in priors(train).items():
        torch.manual_seed(0)
        likelihood = NormalLikelihood(MLP(LATENT, OBSERVED, hidden=()), scale="shared")
        model = LatentVariableModel(prior, likelihood)
        guide = AmortizedGuide(model, encoder=MLP(OBSERVED, 32, hidden=(64,)))
        run = pg.fit(model, guide, ELBO(), train, steps=steps, learning_rate=1e-2, schedule="cosine", seed=0)
        # log p(x) by importance sampling, so that the guide's own gap is not counted against the prior.
        found = pg.evaluate(run, test, parts=["likelihood", "bound"], particles=500)
        rows[name] = (found.log_likelihood, found.log_likelihood - exact, found.rate)
    rows["the true distribution"] = (exact, 0.0, float("nan"))

    table = pd.DataFrame.from_dict(rows, orient="index", columns=["log p(x)", "less than the truth", "rate"])
    print(table.round(3).to_string(na_rep=""))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)

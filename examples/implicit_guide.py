"""A guide without a density: four images that a normal guide can't keep apart, after Mescheder et al. (2017).

There are four binary images, each with one pixel on, and a prior of two normal dimensions. The best model gives each
image a quarter of the prior, -log 4 = -1.386 nats, and its posteriors are then normal distributions cut to a quarter:
no normal guide has that shape. An implicit one, a network of noise, has any shape. It has no density for the ELBO's
rate, so adversarial variational Bayes (``AVB``) learns that from a critic.

Two dimensions are few enough for log p(x) by quadrature. Where they are not, ``evaluate`` fits an explicit guide to the
frozen model to estimate it, and puts the rate of a critic fitted afterwards beside that of the training's.
"""

import argparse
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import pyrogen as pg
from pyrogen.data import FourPoints
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.inference import AVB, ELBO, AmortizedGuide, CriticOptions, Objective
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

GUIDES: dict[str, tuple[Any, Objective]] = {
    "normal, ELBO": (Normal, ELBO(particles=8)),
    "implicit, AVB": (Implicit, AVB(particles=8)),
}


@torch.no_grad()
def exact_log_likelihood(model: LatentVariableModel, x: Tensor) -> float:
    """The mean of log p(x) in nats, by quadrature over a grid of both latents."""
    axis = torch.linspace(-6.0, 6.0, 241)
    z = torch.cartesian_prod(axis, axis)
    log_prior = model.prior().log_prob(z) + 2 * (axis[1] - axis[0]).log()
    likelihood = model.likelihood(z)
    return float(torch.stack([torch.logsumexp(likelihood.log_prob(row) + log_prior, 0) for row in x]).mean())


def main(steps: int = 2000) -> pd.DataFrame:
    """Fit the model with both guides; returns the figures of each."""
    toy = FourPoints()
    rows = {}
    for name, (family, objective) in GUIDES.items():
        torch.manual_seed(0)
        model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 2, 2), hidden=(64, 64))))
        guide = AmortizedGuide(model, encoder=MLP((1, 2, 2), 16, hidden=(32,)), family=family)
        run = pg.fit(
            model,
            guide,
            objective,
            toy.x,
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            schedule="linear",
            critic=CriticOptions(learning_rate=5e-3),
            average=0.99,
        )
        found = pg.evaluate(run, toy.x[:4], parts=["likelihood", "bound", "critics"], particles=10_000)
        rows[name] = {
            "log p(x), exact": exact_log_likelihood(model, toy.x[:4].float()),
            "log p(x), estimate": found.log_likelihood,
            "rate": found.rate,
            "rate, critic": found.rate_estimate,
            "rate, held out": found.held_out_rate_estimate,
        }
    table = pd.DataFrame(rows).T
    print(f"{table.round(3).to_string(na_rep='')}\nno model is better than {toy.log_likelihood_bound:.3f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)

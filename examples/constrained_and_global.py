"""A constrained and a global site: counts whose rates are positive, and scatter as one shared parameter says.

The guide reads both off the program: it maps its normal draws to the positive numbers, and gives the site outside the
plate ``"data"`` one posterior for the whole data set. Gamma and Poisson are conjugate, so each rate's posterior is
known given the shared parameter, and that one's own is a matter of one dimension, which quadrature settles.
"""

import argparse

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyrogen as pg
from pyrogen.evaluation import posterior_samples
from pyrogen.inference import ELBO, AmortizedGuide
from pyrogen.networks import MLP

SHAPE, COUNTS, OBSERVATIONS = 3.0, 5, 50


def model(x: Tensor) -> None:
    """b ~ Gamma(2, 1); for each observation rate ~ Gamma(3, b), and five counts x ~ Poisson(rate)."""
    b = pyro.sample("b", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(SHAPE), b))
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, COUNTS)).to_event(1), obs=x)


def exact_posterior_of_b(x: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """Mean and standard deviation of b, and the grid with the weights that they come from.

    With its rate integrated out, the total of an observation is negative binomial given b.
    """
    b = torch.linspace(0.2, 3.0, 2801, dtype=torch.float64)
    total = x.sum(-1, keepdim=True).double()
    log_p = (SHAPE * b.log() - (SHAPE + total) * (b + COUNTS).log()).sum(0) + dist.Gamma(2.0, 1.0).log_prob(b)
    weights = torch.softmax(log_p, 0)
    mean = (weights * b).sum()
    return mean.item(), (weights * (b - mean) ** 2).sum().sqrt().item(), b, weights


def main(steps: int = 2500) -> pd.DataFrame:
    """Fit the guide; returns posterior means and standard deviations beside the exact ones."""
    torch.manual_seed(0)
    x = torch.poisson(dist.Gamma(SHAPE, 1.0).sample((OBSERVATIONS, 1)).expand(-1, COUNTS))
    guide = AmortizedGuide(model, encoder=MLP(COUNTS, 32, hidden=(64,)))
    # Each step has one draw of b, on which all rows depend: a rare one would give a gradient as large as all others.
    run = pg.fit(
        model, guide, ELBO(particles=4), x, steps=steps, learning_rate=1e-2, schedule="cosine", gradient_clip=1.0
    )

    draws = posterior_samples(run.model, guide, x, 2000)
    mean, spread, grid, weights = exact_posterior_of_b(x)
    rows = {"b": (draws["b"].mean().item(), mean, draws["b"].std().item(), spread)}
    for i in (int(x.sum(-1).argmin()), int(x.sum(-1).argmax())):
        # rate | x, b ~ Gamma(3 + total, b + 5): its moments are averaged over b.
        shape = SHAPE + x[i].sum().double()
        first, second = ((weights * m).sum() for m in (shape / (grid + 5), shape * (shape + 1) / (grid + 5) ** 2))
        found = draws["rate"][:, i]
        exact = (second - first**2).sqrt().item()
        rows[f"rate, counts {x[i].int().tolist()}"] = (found.mean().item(), first.item(), found.std().item(), exact)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "exact mean", "sd", "exact sd"])
    print(table.round(3).to_string())
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    main(parser.parse_args().steps)

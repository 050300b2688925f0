"""Comparing guides: one program, five ways to approximate its posterior, one call, the exact answer beside them.

Only a product of the two latents is observed, so their posterior has two curved branches, one in each of two opposite
quadrants. What a guide can't bend to costs it nats: the gap between its bound and log p(x), which is known here by
quadrature.
"""

import argparse
import math

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyrogen as pg
from pyrogen.distributions import Flow, Mixture, MultivariateNormal, Normal
from pyrogen.inference import ELBO, IWAE
from pyrogen.networks import MLP

NOISE = 0.3


def model(x: Tensor) -> None:
    """A plain function: z ~ N(0, I), x ~ N(z_1 z_2, 0.3). There is nothing to learn but the guide."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.prod(-1, keepdim=True), NOISE).to_event(1), obs=x)


def exact_log_likelihood(x: Tensor, *, step: float = 0.02, edge: float = 6.0) -> Tensor:
    """log p(x), ``(B, 1)`` to ``(B,)``: one latent integrated out by hand, x | z_1 ~ N(0, z_1^2 + 0.3^2)."""
    grid = torch.arange(-edge, edge + step, step, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros_like(grid), (grid**2 + NOISE**2).sqrt())
    log_p = normal.log_prob(x.double()) - 0.5 * grid**2 - 0.5 * math.log(2 * math.pi)
    return log_p.logsumexp(-1) + math.log(step)


def main(steps: int = 2000) -> pd.DataFrame:
    """Compare the guides; returns their figures in nats, with the gap to log p(x)."""
    torch.manual_seed(0)
    z = torch.randn(4500, 2)
    x = z.prod(-1, keepdim=True) + NOISE * torch.randn(4500, 1)
    train, test = x[:4000], x[4000:]
    exact = exact_log_likelihood(test).mean().item()

    comparison = pg.compare(
        model,
        guides={
            "mean field": (Normal, ELBO()),
            # The same family under another objective: IWAE spreads it out, for its draws shall cover the posterior.
            "mean field, IWAE": (Normal, IWAE(particles=16)),
            "full covariance": (MultivariateNormal, ELBO()),
            "mixture": (Mixture, ELBO()),
            "flow": (Flow, ELBO()),
        },
        encoder=lambda: MLP(1, 64, hidden=(64,)),
        data=train,
        test=test,
        steps=steps,
        learning_rate=3e-3,
        schedule="cosine",
        parts=["likelihood", "bound"],
    )
    table = pd.DataFrame(comparison[["elbo", "log_likelihood", "effective_sample_size"]])
    table.insert(1, "gap", exact - table["elbo"])
    print(table.round(3).to_string())
    print(f"exact log p(x): {exact:.3f} nats; effective sample size of 1000 draws")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args().steps)

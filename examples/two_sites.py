"""Your own program: a Pyro model with two latent sites, one above the other, and nothing of pyrogen's in it.

The program is linear and Gaussian, so the distribution of x is known. Its four parameters are learned from data that
the same program made, and the guide, which reads both sites off the program, gives a bound on log p(x). Both are
compared with the truth.
"""

import argparse
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

import pyrogen as pg
from pyrogen.inference import ELBO, AmortizedGuide
from pyrogen.networks import MLP

LOADINGS = torch.tensor([[1.0, 0.0], [0.8, 0.0], [0.0, 1.0], [0.0, -1.0]])


class TwoLevels(PyroModule):
    """Two group effects scatter around what they share; each is seen in two noisy measurements."""

    def __init__(self, share: tuple[float, float] = (0.1, 0.1), spread: float = 1.0, noise: float = 1.0) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(share))
        # PyroParam keeps a parameter where it belongs: scales stay positive whatever the optimizer does.
        self.spread: Any = PyroParam(torch.tensor(spread), constraints.positive)
        self.noise: Any = PyroParam(torch.tensor(noise), constraints.positive)

    def forward(self, x: Tensor) -> Tensor:
        # Only the length of x is read: with the observation removed, the same program samples new data.
        with pyro.plate("data", len(x)):
            common = pyro.sample("common", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            groups = pyro.sample("groups", dist.Normal(common * self.share, self.spread).to_event(1))
            return pyro.sample("x", dist.Normal(groups @ LOADINGS.T, self.noise).to_event(1), obs=x)

    def exact(self) -> dist.MultivariateNormal:
        """The distribution of x with both sites integrated out."""
        groups = torch.outer(self.share, self.share) + self.spread**2 * torch.eye(2)
        covariance = LOADINGS @ groups @ LOADINGS.T + self.noise**2 * torch.eye(4)
        return dist.MultivariateNormal(torch.zeros(4), covariance)


def main(steps: int = 3000) -> pd.DataFrame:
    """Fit the program to its own data; returns what was found beside what is true."""
    torch.manual_seed(0)
    truth, model = TwoLevels(share=(1.5, 1.0), spread=0.6, noise=0.5), TwoLevels()
    with torch.no_grad():
        x = truth.exact().sample((5000,))
    train, test = x[:4000], x[4000:]

    guide = AmortizedGuide(model, encoder=MLP(4, 32, hidden=(64,)))
    run = pg.fit(model, guide, ELBO(particles=4), train, steps=steps, learning_rate=3e-3, schedule="cosine", seed=0)
    found = pg.evaluate(run, test, parts=["likelihood", "bound"])
    with torch.no_grad():
        rows = {
            # x and -x are as likely, and so are share and -share: the sign is not identified, the product is.
            "share[0] * share[1]": (model.share.prod().item(), truth.share.prod().item()),
            "spread": (model.spread.item(), truth.spread.item()),
            "noise": (model.noise.item(), truth.noise.item()),
            "ELBO of test data": (found.elbo, truth.exact().log_prob(test).mean().item()),
            "log p(x) of test data": (found.log_likelihood, truth.exact().log_prob(test).mean().item()),
        }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["found", "true"])
    print(table.round(3).to_string())
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    main(parser.parse_args().steps)

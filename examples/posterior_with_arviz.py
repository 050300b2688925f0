"""Posterior analysis with ArviZ: the eight schools, whose posterior has two mirrored modes in the site ``tau``.

The sign of ``tau`` is not identified, so a normal guide settles on one mode; a flow at that one site covers both.
ArviZ summarises the draws; the Pareto k of the importance weights says how far each guide is to be trusted (below 0.5
it is good, above 0.7 it is not); and the weights themselves correct the moments. The exact ones are known by
quadrature.
"""

import argparse
from functools import partial
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import torch

import pyrogen as pg
from pyrogen.data import EightSchools
from pyrogen.distributions import Flow, Normal
from pyrogen.inference import ELBO, IWAE, AmortizedGuide, Objective
from pyrogen.networks import MLP

# A family for each site by name; sites left out get Normal. Each site is conditioned on those drawn before it.
FLOW_AT_TAU = {"tau": partial(Flow, transform="spline_autoregressive", layers=2)}
GUIDES: dict[str, tuple[Any, Objective]] = {
    "normal": (Normal, ELBO(particles=32)),
    "flow": (FLOW_AT_TAU, IWAE(particles=32)),
}


def moments(mu: np.ndarray, tau: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Moments under normalised weights; equal ones are the guide's own."""
    mean = (weights * mu).sum()
    spread = np.sqrt((weights * (mu - mean) ** 2).sum())
    return {"E mu": mean, "sd mu": spread, "E tau": (weights * tau).sum(), "E |tau|": (weights * abs(tau)).sum()}


def main(steps: int = 2500) -> pd.DataFrame:
    """Fit two guides and analyse them; returns the moments of each beside the exact ones."""
    toy = EightSchools()
    columns = {}
    for name, (family, objective) in GUIDES.items():
        torch.manual_seed(0)
        guide = AmortizedGuide(toy.model, encoder=MLP(8, 16, hidden=(16,)), family=family)
        run = pg.fit(toy.model, guide, objective, toy.x, steps=steps, learning_rate=5e-3, schedule="cosine", seed=0)
        tree = pg.to_arviz(run, toy.x, draws=2500, predictive_draws=1)

        # From here on all is ArviZ's own: named dimensions, and whatever it has of summaries, diagnostics and plots.
        print(f"{name} guide\n{az.summary(tree, var_names=['mu', 'tau', 'eta'], kind='stats')}\n")
        draws = tree["posterior"]
        mu, tau = (draws[site].values.ravel() for site in ("mu", "tau"))
        log_weight = tree["sample_stats"]["log_weight"].values.ravel()
        weights = np.exp(log_weight - log_weight.max())
        pareto_k = {"Pareto k": tree["sample_stats"]["pareto_k"].item()}
        columns[name] = moments(mu, tau, np.full(mu.size, 1 / mu.size)) | pareto_k
        columns[f"{name}, weighted"] = moments(mu, tau, weights / weights.sum()) | pareto_k

    exact = toy.exact
    known = (exact.mean_mu, exact.sd_mu, exact.mean_tau, exact.mean_abs_tau)
    columns["exact"] = dict(zip(("E mu", "sd mu", "E tau", "E |tau|"), known, strict=True))
    table = pd.DataFrame(columns)
    print(table.round(2).to_string(na_rep=""))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    main(parser.parse_args().steps)

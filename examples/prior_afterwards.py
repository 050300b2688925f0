"""A prior fitted afterwards: what makes a plain autoencoder a generative model, and a VAE often a better one.

An autoencoder, whose guide is a point mass, and a VAE are fitted to the digits. The samples of both are judged under
the prior of the training, N(0, I), and under others, which are fitted to the latents of the training data while all
else stays as it is. The Fréchet distance is that of the pixels' means and covariances; its yardstick is that of
reconstructions.
"""

import argparse
from typing import Any

import pandas as pd
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Delta, Flow, Mixture, MultivariateNormal, Normal, NormalLikelihood, StandardNormal
from pyrogen.evaluation import frechet_distance, precision_recall, reconstruct
from pyrogen.inference import ELBO, AmortizedGuide, Run, refit_prior
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

LATENT = 8


def priors() -> dict[str, nn.Module]:
    return {
        "full normal": MultivariateNormal(LATENT),
        "mixture of ten": Mixture(LATENT, components=10),
        "flow": Flow(LATENT, transform="spline_coupling", layers=2),
    }


def figures(made: Any, x: torch.Tensor) -> dict[str, float]:
    quality = precision_recall(made, x)
    return {
        "Fréchet distance": frechet_distance(made, x, None).distance,
        "density": quality.density,
        "coverage": quality.coverage,
    }


def main(steps: int = 3000) -> pd.DataFrame:
    """Fit both, refit each prior, and compare samples with the data."""
    data = pg.data.load("digits", binarize=None)
    x = pg.data.as_float(data.train)
    rows = {}
    for name, family, objective in (("autoencoder", Delta, ELBO(beta=0.0)), ("VAE", Normal, ELBO())):
        torch.manual_seed(0)
        likelihood = NormalLikelihood(MLP(LATENT, data.event_shape), scale=0.2)
        model = LatentVariableModel(StandardNormal(LATENT), likelihood)
        guide = AmortizedGuide(model, MLP(data.event_shape, 128), family)
        run = pg.fit(model, guide, objective, data, steps=steps, schedule="cosine", progress=False)
        runs: dict[str, Run] = {"N(0, I)": run}
        for title, prior in priors().items():
            runs[title] = refit_prior(run, prior, data, epochs=1 + steps // 150, progress=False)
        for title, each in runs.items():
            rows[f"{name}, {title}"] = figures(pg.sample(each, len(x), mean=True), x)
        rows[f"{name}, reconstructions"] = figures(reconstruct(run.model, guide, x), x)
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.round(2).to_string())
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    main(parser.parse_args().steps)

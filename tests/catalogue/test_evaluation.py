"""Everything that is measured, with wrong arguments."""

from collections import namedtuple
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from pyrogen import data, evaluation
from pyrogen.distributions import NormalLikelihood, StandardNormal
from pyrogen.inference import ELBO, AmortizedGuide, FitOptions, Logistic, Run
from pyrogen.inference.programs import describe_example
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

X = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
MODEL = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
GUIDE = AmortizedGuide(MODEL, MLP(3, 4, (4,)))
RUN = Run(MODEL, GUIDE, ELBO(), pd.DataFrame(), FitOptions(epochs=1), example=describe_example((X[:2],)))
PROGRAMS = {"model": MODEL, "guide": GUIDE, "x": X, "seed": 0, "rows": 8}
ALONE = {name: value for name, value in PROGRAMS.items() if name != "guide"}
KINDS = {"model": "function", "guide": "function"}
STILL = {"guide": ("None",)}
"""What reads no guide, or says that one is needed."""
SHORT = {"model": MODEL, "x": X[:4], "chains": 2, "steps": 2, "leapfrogs": 1}
CHAINS = ALONE | {"chains": 2, "steps": 2, "leapfrogs": 1}
SAMPLES = torch.rand(24, 3, generator=torch.Generator().manual_seed(2))
DATA = torch.rand(26, 3, generator=torch.Generator().manual_seed(3))
IMAGES = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(4))
LABELS = torch.arange(8) % 2
FIT = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}

NO_CRITICS = {"x": ("NaN", "infinite", "one number", "without rows", "an empty list")}
"""A run without critics has no estimates, whatever the data."""

ELSEWHERE = {
    **dict.fromkeys(
        ("held_out_dimension_kl_estimate", "held_out_marginal_kl_estimate", "nuts")
        + ("held_out_rate_estimate", "held_out_total_correlation_estimate"),
        "takes model, guide, x and counts as the others do, and seconds for each call",
    ),
    "reference_posterior": "takes an ArviZ tree, which tests/evaluation/test_inference_data.py damages",
    "inception": "reads weights from a file, see tests/evaluation/test_inception.py",
}
"""What has no call here, and why."""

Call = namedtuple("Call", "function arguments kinds right", defaults=({}, {}))
CALLS = {
    "FeatureClassifier": Call(
        evaluation.FeatureClassifier,
        {"shape": (1, 16, 16), "classes": 2, "features": 4},
        kinds={"features": "count"},
    ),
    "active_units": Call(
        evaluation.active_units, PROGRAMS | {"threshold": 0.1, "particles": 2}, kinds=KINDS | {"threshold": "number"}
    ),
    "annealed_importance_sampling": Call(
        evaluation.annealed_importance_sampling,
        {"model": MODEL, "x": X[:4], "chains": 2, "steps": 2, "leapfrogs": 1},
        kinds=KINDS,
    ),
    "annealing": Call(evaluation.annealing, CHAINS | {"held": None}, kinds=KINDS),
    "bidirectional_monte_carlo": Call(
        evaluation.bidirectional_monte_carlo,
        {"model": MODEL, "x": X[:4], "chains": 2, "steps": 2, "leapfrogs": 1},
        kinds=KINDS,
    ),
    "bits_per_dimension": Call(
        evaluation.bits_per_dimension,
        {"log_likelihood": torch.zeros(4), "event_shape": (3,), "levels": 256},
        right={"log_likelihood": ("NaN", "infinite", "without rows")},
    ),
    "c2st": Call(evaluation.c2st, {"first": SAMPLES[:12], "second": DATA[:12], "folds": 2, "seed": 0}),
    "sliced_wasserstein": Call(
        evaluation.sliced_wasserstein,
        {"first": SAMPLES, "second": DATA, "order": 2, "projections": 5, "seed": 0},
        kinds={"order": "count"},
    ),
    "calibrate_ratio": Call(
        evaluation.calibrate_ratio,
        {
            "ratio": lambda width: Logistic(Critic(width, hidden=(4,))),
            "features": 1,
            "samples": 20,
            "seed": 0,
            "divergences": (1.0,),
        }
        | FIT,
        kinds={"features": "count", "ratio": "function"},
    ),
    "fit_ratio": Call(
        evaluation.fit_ratio,
        {"ratio": Logistic(Critic(3, hidden=(4,))), "numerator": SAMPLES, "denominator": DATA} | FIT,
        kinds={"numerator": "rows", "denominator": "rows"},
    ),
    "critic_estimates": Call(
        evaluation.critic_estimates, {"run": RUN, "x": X, "particles": 2, "seed": 0, "rows": 8}, right=NO_CRITICS
    ),
    "data_copying": Call(
        evaluation.data_copying,
        {"samples": SAMPLES, "training": DATA, "held_out": DATA + 0.1, "cells": 1, "seed": 0, "rows": 8},
    ),
    "diagnose": Call(evaluation.diagnose, {"run": RUN, "data": X, "observations": 8, "seed": 0, "rows": 8}),
    "diversity": Call(evaluation.diversity, {"samples": IMAGES, "labels": LABELS, "pairs": 2, "seed": 0, "rows": 8}),
    "ecdf_band": Call(evaluation.ecdf_band, {"simulations": 10, "draws": 5, "level": 0.9}),
    "evaluate": Call(
        evaluation.evaluate,
        {"run": RUN, "x": X, "parts": ("bound",), "particles": 2, "explicit_steps": 1, "ratio_steps": 1}
        | {"seed": 0, "rows": 8},
        right={"explicit_steps": ("zero",), "ratio_steps": ("zero",)},
    ),
    "explicit_guide": Call(evaluation.explicit_guide, PROGRAMS | {"steps": 1}, kinds=KINDS),
    "feature_classifier": Call(
        evaluation.feature_classifier,
        {"x": IMAGES, "labels": LABELS, "epochs": 1, "seed": 0, "features": 4, "batch_size": 4, "learning_rate": 1e-3}
        | {"device": "cpu"},
        kinds={"features": "count"},
    ),
    "frechet_distance": Call(
        evaluation.frechet_distance,
        {"samples": SAMPLES, "data": DATA, "features": None, "groups": 2, "rows": 8},
        kinds={"features": "function"},
        right={"features": ("None",)},
    ),
    "kernel_distance": Call(
        evaluation.kernel_distance,
        {"samples": SAMPLES, "data": DATA, "features": None, "subsets": 2, "subset_size": 5, "degree": 3, "seed": 0}
        | {"rows": 8},
        kinds={"features": "function"},
        right={"features": ("None",)},
    ),
    "precision_recall": Call(
        evaluation.precision_recall,
        {"samples": SAMPLES, "data": DATA, "neighbours": 2, "density_neighbours": 2, "splits": 2, "rows": 8},
        right={"splits": ("None",)},
    ),
    "nearest_neighbours": Call(
        evaluation.nearest_neighbours, {"samples": SAMPLES, "training": DATA, "count": 1, "rows": 8}
    ),
    "inception_score": Call(
        evaluation.inception_score,
        {
            "samples": IMAGES,
            "classifier": nn.Sequential(MLP((1, 16, 16), 3, (4,)), nn.Softmax(-1)),
            "splits": 2,
            "seed": 0,
            "rows": 8,
        },
    ),
    "mode_coverage": Call(
        evaluation.mode_coverage,
        {"samples": SAMPLES[:, :2], "modes": data.ring(), "rows": 8},
        kinds={"modes": "part"},
    ),
    "wasserstein_critic": Call(
        evaluation.wasserstein_critic,
        {"samples": SAMPLES, "data": DATA, "gradient_penalty": 1.0, "critic": partial(Critic, hidden=(4,)), "seed": 0}
        | FIT
        | {"rows": 8},
        kinds={"critic": "function"},
    ),
    **{
        name: Call(getattr(evaluation, name), PROGRAMS | {"particles": 2}, kinds=KINDS)
        for name in ("importance_sampling", "log_likelihood", "rate_distortion")
    },
    **{
        name: Call(getattr(evaluation, name), PROGRAMS | {"samples": 20}, kinds=KINDS)
        for name in ("marginal_kl", "mutual_information")
    },
    "mmd": Call(evaluation.mmd, PROGRAMS | {"samples": 20, "permutations": 2, "kernel": None}, kinds=KINDS),
    "prior_holes": Call(evaluation.prior_holes, PROGRAMS | {"samples": 20, "level": 0.1}, kinds=KINDS),
    **{
        name: Call(getattr(evaluation, name), PROGRAMS | {"draws": 30}, kinds=KINDS)
        for name in ("pareto_diagnostic", "pareto_k", "posterior_samples")
    },
    "prior_samples": Call(evaluation.prior_samples, ALONE | {"draws": 3}, kinds=KINDS),
    "reconstruct": Call(evaluation.reconstruct, PROGRAMS, kinds=KINDS),
    "inference_gap": Call(
        evaluation.inference_gap,
        PROGRAMS | {"steps": 1, "learning_rate": 0.01, "particles": 2, "gradient_particles": 2},
        kinds={"model": "function"},
    ),
    "sample": Call(evaluation.sample, {"run": RUN, "n": 3, "seed": 0, "mean": False, "rows": 8}, kinds={"n": "count"}),
    "simulation_based_calibration": Call(
        evaluation.simulation_based_calibration,
        PROGRAMS | {"simulations": 20, "draws": 19, "log_likelihood": False, "quantities": None},
        kinds=KINDS | {"log_likelihood": "switch"},
    ),
    "tarp": Call(evaluation.tarp, PROGRAMS | {"simulations": 20, "draws": 19}, kinds=KINDS),
    "total_correlation": Call(evaluation.total_correlation, PROGRAMS | {"samples": 20, "steps": 1}, kinds=KINDS),
    "to_arviz": Call(
        evaluation.to_arviz,
        {"run": RUN, "x": X, "draws": 4, "chains": 2, "prior_draws": 2, "predictive_draws": 2, "particles": 2}
        | {"dims": None, "coords": None, "seed": 0, "rows": 8},
        right={"predictive_draws": ("zero",), "prior_draws": ("zero",)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name, catalogue):
    catalogue.try_all(name, CALLS[name])


def test_every_public_name_is_in_the_catalogue(check_complete):
    """But for the classes of figures that functions return."""
    figures = {name: "figures" for name in evaluation.__all__ if isinstance(getattr(evaluation, name), type)}
    del figures["FeatureClassifier"]
    check_complete(evaluation, CALLS, ELSEWHERE | figures)

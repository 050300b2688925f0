"""Guides, objectives and training with wrong arguments."""

from collections import namedtuple
from functools import partial, wraps

import pandas as pd
import pytest
import torch

from pyrogen import inference
from pyrogen.distributions import Implicit, Normal, NormalLikelihood, StandardNormal
from pyrogen.inference.programs import describe_example
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

X = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
MODEL = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
GUIDE = inference.AmortizedGuide(MODEL, MLP(3, 4, (4,)))
IMPLICIT = inference.AmortizedGuide(MODEL, MLP(3, 4, (4,)), Implicit)
RUN = inference.Run(
    MODEL,
    GUIDE,
    inference.ELBO(),
    pd.DataFrame(),
    inference.FitOptions(epochs=1),
    example=describe_example((X[:2],)),
)
SMALL = partial(Critic, hidden=(4,))
RATIO = {"critic": MLP(2, (), (4,))}
BUILT = {"ratio": inference.Logistic, "critic": SMALL}
OF_BOTH = BUILT | {"visible_ratio": inference.Logistic}
FUNCTIONS = {"ratio": "function", "critic": "function"}
ENDS: dict[str, tuple[str, ...]] = {"beta": ("a function", "a class"), "latent": ("a function", "a class")}
"""A schedule is a function of the step."""
ANY_SITE = {"site": ("another", "empty", "snow", "long")}
"""Whether there is such a site shows when the program runs on data."""
AT_FIT = {name: ("another", "empty", "snow", "long", "a zero byte") for name in ("device", "precision")}
"""What devices and precisions there are is seen by fit."""
UNKNOWN = {"x": ("NaN", "infinite"), "y": ("NaN", "infinite")}
"""The discrepancy of what is unknown is unknown: NaN."""
KERNELS = {"bandwidth": 1.0}
GAN = {"loss": "non-saturating", "r1": 0.0, "gradient_penalty": 10.0, "critic": SMALL}
FIT = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "seed": 0, "progress": False}


ELSEWHERE = {name: "an error" for name in ("NonFiniteLoss", "OutputExistsError", "WriteError")} | {
    "Run": "what fit and load return",
    "EnergyKernel": "takes nothing",
}


def used(objective):
    """An objective as it is made and evaluated once, before which it may take anything."""

    @wraps(objective)
    def using(**arguments):
        made = objective(**arguments)
        if not made.uses_guide:
            return made(MODEL, None)(X)
        implicit = "ratio" in arguments and objective is not inference.FactorVAE
        return made(MODEL, IMPLICIT if implicit else GUIDE)(X)

    return using


Call = namedtuple("Call", "function arguments kinds right", defaults=({}, {}))
CALLS = {
    "AAE": Call(used(inference.AAE), BUILT | {"particles": 1, "weight": 1.0, "observations": 12}, kinds=FUNCTIONS),
    "ALI": Call(used(inference.ALI), GAN, kinds=FUNCTIONS),
    "GAN": Call(used(inference.GAN), GAN, kinds=FUNCTIONS),
    "AVB": Call(
        used(inference.AVB),
        BUILT | {"particles": 8, "contrast": "adaptive", "covariance": "diagonal", "beta": 1.0, "observations": 12},
        kinds=FUNCTIONS,
        right=ENDS,
    ),
    "ELBO": Call(
        used(inference.ELBO),
        {"particles": 2, "beta": 1.0, "free_bits": 0.0, "sticking_the_landing": False, "observations": 12},
        right=ENDS,
    ),
    "IWAE": Call(used(inference.IWAE), {"particles": 4, "gradient": "standard", "observations": 12}),
    "Renyi": Call(used(inference.Renyi), {"alpha": 0.5, "particles": 4, "observations": 12}),
    "Objective": Call(inference.Objective, {"particles": 4, "observations": 12}),
    "VAEGAN": Call(
        used(inference.VAEGAN),
        OF_BOTH | {"particles": 8, "reconstruction": 0.1, "contrast": "adaptive", "covariance": "diagonal"},
        kinds=FUNCTIONS,
    ),
    "VGH": Call(used(inference.VGH), OF_BOTH | {"observations": 12}, kinds=FUNCTIONS),
    "VGHPlusPlus": Call(used(inference.VGHPlusPlus), OF_BOTH | {"reconstruction": 1.0}, kinds=FUNCTIONS),
    "AlphaGAN": Call(used(inference.AlphaGAN), OF_BOTH | {"reconstruction": 1.0}, kinds=FUNCTIONS),
    "WAE": Call(used(inference.WAE), {"weight": 1.0, "cost": None, "kernel": None, "particles": 1, "observations": 12}),
    "InfoVAE": Call(used(inference.InfoVAE), {"alpha": 0.0, "weight": 1.0, "kernel": None, "particles": 1}),
    "BetaTCVAE": Call(
        used(inference.BetaTCVAE), {"beta": 6.0, "alpha": 1.0, "gamma": 1.0, "weighting": "minibatch", "particles": 1}
    ),
    "FactorVAE": Call(used(inference.FactorVAE), BUILT | {"particles": 1, "gamma": 1.0}, kinds=FUNCTIONS),
    "Hybrid": Call(
        used(inference.Hybrid),
        OF_BOTH
        | {"particles": 8, "log_likelihood": 1.0, "reconstruction": 1.0, "latent": 1.0, "visible_samples": 1.0}
        | {"visible_reconstructions": 1.0, "match": "conditional", "contrast": "adaptive", "covariance": "diagonal"}
        | {"through_guide": True},
        kinds=FUNCTIONS | {"latent": "weight"},
        right=ENDS,
    ),
    "AdaptiveContrast": Call(
        inference.AdaptiveContrast,
        {"ratio": inference.Logistic(MLP(2, (), (4,))), "covariance": "diagonal"},
    ),
    "AmortizedGuide": Call(
        inference.AmortizedGuide,
        {"model": MODEL, "encoder": MLP(3, 4, (4,)), "family": Normal, "example": X[:2]},
        kinds={"model": "function", "family": "function"},
    ),
    "Compiled": Call(inference.Compiled, {"module": inference.ELBO()(MODEL, GUIDE)}),
    "CriticOptions": Call(
        inference.CriticOptions, {"learning_rate": 1e-3, "betas": (0.5, 0.9), "steps": 1, "warmup": 0}
    ),
    "FitOptions": Call(
        inference.FitOptions,
        {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "optimizer": torch.optim.Adam, "schedule": "constant"}
        | {"gradient_clip": 1.0, "seed": 0, "device": "cpu", "precision": "32-true", "validate_every": 1, "patience": 1}
        | {"checkpoint_every": 1, "average": 0.9, "loader_workers": 0, "matmul_precision": "highest"}
        | {"non_finite": "stop"},
        right=AT_FIT,
    ),
    "LinearSchedule": Call(inference.LinearSchedule, {"steps": 3, "start": 0.0, "end": 1.0}),
    "CyclicalSchedule": Call(inference.CyclicalSchedule, {"steps": 3, "rising": 0.5, "start": 0.0, "end": 1.0}),
    "GaussianKernel": Call(inference.GaussianKernel, KERNELS),
    "LaplacianKernel": Call(inference.LaplacianKernel, KERNELS),
    "InverseMultiquadraticKernel": Call(inference.InverseMultiquadraticKernel, {"scale": 1.0, "factors": (0.1, 1.0)}),
    "maximum_mean_discrepancy": Call(
        inference.maximum_mean_discrepancy,
        {"x": X, "y": X + 1, "kernel": inference.EnergyKernel(), "unbiased": True},
        right=UNKNOWN,
    ),
    **{
        name: Call(getattr(inference, name), RATIO | {"r1": 0.0})
        for name in ("Ratio", "NWJ", "Hinge", "JensenShannon", "LeastSquares", "Logistic")
    },
    "DonskerVaradhan": Call(inference.DonskerVaradhan, RATIO | {"r1": 0.0, "momentum": 0.9}),
    "Wasserstein": Call(inference.Wasserstein, RATIO | {"r1": 0.0, "gradient_penalty": 1.0}),
    "Telescoping": Call(inference.Telescoping, {"critic": MLP(2, 3, (4,)), "bridges": 3, "r1": 0.0}),
    "TwoStageGuide": Call(
        inference.TwoStageGuide,
        {"first": GUIDE, "second": GUIDE, "site": "z"},
        kinds={"first": "function"},
        right=ANY_SITE,
    ),
    "WithPrior": Call(
        inference.WithPrior,
        {"model": MODEL, "site": "z", "prior": StandardNormal(2)},
        kinds={"model": "function"},
        right=ANY_SITE,
    ),
    "fit": Call(
        inference.fit,
        {"model": MODEL, "guide": GUIDE, "objective": inference.ELBO(), "data": X}
        | FIT
        | {"schedule": "constant", "device": "cpu", "precision": "32-true", "resume": False, "overwrite": True}
        | {"checkpoint_every": 1, "validate_every": 1, "loader_workers": 0, "matmul_precision": "highest"}
        | {"configuration": {"latent": 2}, "out": "run"},
        kinds={"model": "function", "guide": "function", "configuration": "mapping", "out": "new path"},
        right={"configuration": ("snow", "None in it")},
    ),
    "refit_prior": Call(
        inference.refit_prior,
        {"run": RUN, "prior": Normal(2), "data": X} | FIT,
    ),
    "save": Call(inference.save, {"run": RUN, "folder": "run", "overwrite": True}, kinds={"folder": "new path"}),
    "load": Call(inference.load, {"folder": "saved", "trust": False}),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name, catalogue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inference.save(RUN, "saved")
    catalogue.try_all(name, CALLS[name])


def test_every_public_name_is_in_the_catalogue(check_complete):
    check_complete(inference, CALLS, ELSEWHERE)

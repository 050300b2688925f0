"""Comparisons with wrong arguments."""

from collections import namedtuple

import pytest
import torch

from pyrogen import experiment
from pyrogen.distributions import Normal, NormalLikelihood, StandardNormal
from pyrogen.inference import ELBO
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

X = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
MODEL = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))

Call = namedtuple("Call", "function arguments kinds right", defaults=({}, {}))
CALLS = {
    "compare": Call(
        experiment.compare,
        {"model": MODEL, "guides": {"a": (Normal, ELBO())}, "encoder": MLP(3, 4, (4,)), "data": X, "steps": 1}
        | {"batch_size": 6, "learning_rate": 1e-3, "schedule": "constant", "gradient_clip": 1.0, "seed": 0}
        | {"device": "cpu", "precision": "32-true", "matmul_precision": "highest", "non_finite": "stop"}
        | {"parts": ("bound",), "particles": 2, "overwrite": False, "resume": False, "progress": False},
        kinds={"model": "function", "guides": "mapping", "encoder": "function"},
    ),
}
ELSEWHERE = {
    **dict.fromkeys(("Settings", "FitSettings", "CompareSettings"), "options of commands, see test_commands.py"),
    "Comparison": "what compare returns",
    "join_posteriors": "takes ArviZ trees, see tests/experiment",
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name, catalogue):
    catalogue.try_all(name, CALLS[name])


def test_nothing_to_join(catalogue):
    catalogue.refused("join_posteriors({})", lambda: experiment.join_posteriors({}), "tree")


def test_every_public_name_is_in_the_catalogue(check_complete):
    check_complete(experiment, CALLS, ELSEWHERE)

"""Small data and models on which a comparison takes a second."""

import pytest
import torch

from pyrogen.data import Data, load
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


@pytest.fixture(scope="session")
def digits() -> Data:
    whole = load("digits")
    labels = whole.test_labels
    assert labels is not None
    return Data(
        "few digits",
        train=whole.train[:64],
        validation=whole.validation[:20],
        test=whole.test[:24],
        values="binary",
        binarize="dynamic",
        test_labels=labels[:24],
        classes=whole.classes,
    )


@pytest.fixture
def model(digits: Data) -> LatentVariableModel:
    torch.manual_seed(1)
    return LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, digits.event_shape, hidden=(16,))))

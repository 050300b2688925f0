"""A step that takes more memory than there is."""

from typing import Any

import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.inference import ELBO, AmortizedGuide, fit, loop
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


class Small(nn.Module):
    """An encoder on a device with room for so many rows, from some step on."""

    room, since = 0, 0

    def __init__(self):
        super().__init__()
        self.layers, self.steps = MLP(6, 8, (8,)), 0

    def forward(self, x):
        self.steps += self.training
        if self.training and self.steps > self.since and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return self.layers(x)


def fitted(room, since=0, **given) -> Any:
    Small.room, Small.since = room, since
    torch.manual_seed(1)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    guide = AmortizedGuide(model, Small(), example=torch.zeros(2, 6))
    options: dict[str, Any] = {"batch_size": 48, "epochs": 4, "progress": False, "device": "cpu"}
    return fit(model, guide, ELBO(), torch.ones(96, 6), **options | given)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (13, "batch_size=48 does not fit into the memory of cpu, but batch_size=12 does; set this"),
        (1, "but batch_size=1 does"),
        (0, "and neither does one row; try fewer particles"),
    ],
)
def test_the_size_of_a_batch_that_fits_is_named(room, said):
    with pytest.raises(torch.OutOfMemoryError, match=said) as raised:
        fitted(room)
    assert "no checkpoint was written" in str(raised.value) and "Tried to allocate 3 GiB" in str(raised.value)
    assert raised.value.__context__ is None  # which would keep what did not fit


def test_nothing_is_lost(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="the last checkpoint is"):
        fitted(10, since=3, out=tmp_path / "run")  # in the second epoch
    assert read_tensors(tmp_path / "run" / loop.CHECKPOINT)[1]["step"] == 2
    run = fitted(100, out=tmp_path / "run", resume=True)
    whole = fitted(100)
    for mine, theirs in zip(run.programs.parameters(), whole.programs.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(pg.load(tmp_path / "run", trust=True).history) == 4

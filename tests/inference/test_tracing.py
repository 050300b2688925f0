"""Functions that run programs, traced: the same figures from the same random numbers."""

import logging
import random

import pytest
import torch
from torch import nn

from pyrogen.inference import tracing
from pyrogen.inference.tracing import Traced


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(tracing, "UNCOMPILED", 0)


def test_a_graph_draws_what_the_function_draws(traced_only, at_once):
    network = nn.Linear(3, 2)
    traced = Traced(network)
    calls = []

    def function(x):
        calls.append(len(x))
        return [network(x) + torch.randn(len(x), 2), x.sum()]

    x = torch.randn(5, 3)
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(1)
            found = [*traced(function, x), torch.rand(())]
            torch.manual_seed(1)
            for a, b in zip(found, [*function(x), torch.rand(())], strict=True):
                torch.testing.assert_close(a, b)
            network.weight.mul_(2.0)  # a graph takes weights as they are when it runs
    assert traced.why_not is None
    # Twice when it is made, once to be traced and once to be compared; all others are this test's own.
    assert len(calls) == 2 + 3


def test_what_comes_seldom_is_not_traced(traced_only, monkeypatch):
    monkeypatch.setattr(tracing, "UNCOMPILED", 2)
    made = []

    def noted(self, function, inputs):
        made.append(inputs[0].shape)
        return function

    monkeypatch.setattr(Traced, "_made", noted)
    traced = Traced()
    for rows in (4, 4, 2, 4, 2, 4):
        traced(lambda x: [x], torch.zeros(rows))
    assert made == [torch.Size([4])]
    without = Traced(compile=False)
    for _ in range(5):
        without(lambda x: [x], torch.zeros(3))
    assert len(made) == 1


@pytest.mark.parametrize(
    "function, why",
    [
        (lambda x: [x * random.random()], "something else"),
        (lambda x: [x if float(x.sum()) > 0 else -x], "asks in Python"),
    ],
    ids=["numbers that change", "decisions"],
)
def test_what_cannot_be_traced_runs_as_it_is(function, why, traced_only, at_once, caplog):
    traced = Traced()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert traced(function, torch.ones(3))[0].shape == (3,)
    assert why in traced.why_not
    assert len(caplog.records) == 1


def test_infinite_values_are_no_difference(traced_only, at_once):
    traced = Traced()
    for _ in range(2):
        found = traced(lambda x: [x.log(), x / 0.0], torch.tensor([0.0, 1.0]))
    assert found[0].tolist() == [-torch.inf, 0.0]
    assert traced.why_not is None

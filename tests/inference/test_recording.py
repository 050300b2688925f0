"""What is recorded as a CUDA graph gives what it would give as it is; without a GPU this is seen with a tape."""

import logging
from functools import partial

import pytest
import torch
from torch import nn

from pyrogen.inference import recording, tracing
from pyrogen.inference.recording import MOST, Recorded, RecordedStep
from pyrogen.inference.tracing import Traced


def said(caplog):
    return [record.message for record in caplog.records if record.name.startswith("pyrogen")]


def test_a_function_runs_then_is_recorded_then_replayed(recorder):
    weight = torch.ones(3, device=recorder.device)
    calls = []

    def function(x, weight):
        calls.append(len(x))
        return [x * weight, (x + torch.randn_like(x)).sum()]

    recorded = Recorded(function, given=1)
    for call in range(5):
        x = torch.full((2, 3), float(call), device=recorder.device)
        torch.manual_seed(call)
        found = recorded(x, weight)
        torch.manual_seed(call)
        expected = [x * weight, (x + torch.randn_like(x)).sum()]
        torch.testing.assert_close([*found], expected)
        assert (len(calls), recorder.count) == [(1, 0), (2, 1), (2, 1), (2, 1), (2, 1)][call]
        weight.mul_(2.0)  # which is read where it stands
    assert recorded.why_not is None


def test_tensors_that_have_moved_are_recorded_anew(recorder):
    recorded = Recorded(lambda x, weight: [x * weight], given=1)
    for scale in (2.0, 3.0):
        x, weight = torch.ones(2, device=recorder.device), torch.full((2,), scale, device=recorder.device)
        for _ in range(3):
            assert recorded(x, weight)[0].tolist() == [scale, scale]
        kept = weight  # so that the next one is elsewhere
    assert recorder.count == 2 and kept is weight


def test_what_cannot_be_recorded_runs_as_it_is(recorder, caplog):
    recorded = Recorded(lambda x: [x * 2 if x.sum().item() > 0 else x], given=1)
    for scale in (1.0, 2.0, -3.0, 4.0):
        x = torch.full((2,), scale, device=recorder.device)
        assert recorded(x)[0][0].item() == (2 * scale if scale > 0 else scale)
    assert len(said(caplog)) == 1 and "not recorded as a CUDA graph" in said(caplog)[0]
    assert recorded.why_not is not None and recorder.count == 1


def two_networks(device):
    torch.manual_seed(0)
    networks = [nn.Linear(3, 2).to(device) for _ in range(2)]
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        b.data.copy_(a.data)
    return networks


@pytest.mark.parametrize(
    ("make", "records"),
    [
        (lambda p: torch.optim.Adam(p, fused=True), True),
        (lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.1, amsgrad=True), True),
        (lambda p: torch.optim.Adam([{"params": p}, {"params": []}], fused=True), True),
        (lambda p: torch.optim.Adam(p), False),
        (lambda p: torch.optim.SGD(p, momentum=0.9), False),
    ],
    ids=["adam", "adamw", "an empty group", "state on the CPU", "no such option"],
)
def test_steps_are_those_of_the_optimizer(make, records, recorder, caplog):
    """Learning rates that change, and gradients in two places by turns, some of them missing."""
    own, other = two_networks(recorder.device)
    optimizers = make(own.parameters()), make(other.parameters())
    step = RecordedStep(optimizers[1], optimizers[1].step)
    places = [[torch.zeros_like(p) for p in other.parameters()] for _ in range(2)]
    for turn in range(12):
        rate = 0.1 / (1 + turn)
        place = places[turn // 3 % 2]
        for p, q, gradient in zip(own.parameters(), other.parameters(), place, strict=True):
            missing = p is own.bias and turn >= 6
            gradient.copy_(torch.randn_like(p))
            p.grad, q.grad = (None, None) if missing else (gradient.clone(), gradient)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        optimizers[0].step()
        step()
        assert optimizers[1].param_groups[0]["lr"] == rate
        torch.testing.assert_close([*other.parameters()], [*own.parameters()], rtol=1e-5, atol=1e-7)
    assert recorder.count == (4 if records else 0)  # for each place, with and without the gradient that is missing
    assert not said(caplog)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


def test_gradients_that_never_stay_are_not_recorded_for_ever(recorder):
    network = nn.Linear(2, 1).to(recorder.device)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    step, kept = RecordedStep(optimizer, optimizer.step), []
    for _ in range(MOST + 3):
        for p in network.parameters():
            p.grad = torch.ones_like(p)
            kept.append(p.grad)
        for _ in range(2):
            step()
    assert recorder.count == len(step.replays) == MOST
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0 * (MOST + 3)}


def steps_of(optimizer):
    return {float(state["step"]) for state in optimizer.state.values()}


def one_step(recorder, kind=torch.optim.Adam):
    network = nn.Linear(2, 1).to(recorder.device)
    optimizer = kind(network.parameters(), fused=True)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    return optimizer, RecordedStep(optimizer, optimizer.step), network


def test_an_optimizer_that_cannot_be_recorded_steps_as_it_is(recorder, monkeypatch, caplog):
    def failing(function, device):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(recording, "capture", failing)
    optimizer, step, _ = one_step(recorder)
    for _ in range(4):
        step()
    assert steps_of(optimizer) == {4.0}
    assert said(caplog) == ["Adam is not recorded as a CUDA graph: no memory is left"]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["capturable"]) == (1e-3, False)


def test_what_an_optimizer_does_in_python_is_done_at_every_step(recorder):
    class Growing(torch.optim.Adam):
        def step(self, closure=None):
            self.param_groups[0]["weight_decay"] += 0.1
            super().step(closure)

    optimizer, step, _ = one_step(recorder, Growing)
    for _ in range(5):
        step()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.5)
    optimizer, step, _ = one_step(recorder)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for _ in range(5):
        step()
    assert len(calls) == 5 and recorder.count == 0


def test_settings_and_state_that_change_are_followed(recorder):
    optimizer, step, network = one_step(recorder)
    for _ in range(3):
        step()
    assert recorder.count == 1
    optimizer.load_state_dict(optimizer.state_dict())  # which puts other tensors in place
    for _ in range(3):
        step()
    assert steps_of(optimizer) == {6.0}
    with torch.no_grad():
        network.weight.fill_(1.0)
    optimizer.param_groups[0].update(lr=1.0, weight_decay=1e9)
    own = [{name: x.clone() for name, x in state.items()} for state in optimizer.state.values()]
    step()
    assert own[0]["exp_avg"].ne(optimizer.state[network.weight]["exp_avg"]).all()
    assert optimizer.state[network.weight]["exp_avg"].min() > 1e7  # the decay is part of the gradient


def test_gradients_in_two_places_by_turns_are_recorded_both(recorder):
    optimizer, step, network = one_step(recorder)
    places = [[torch.ones_like(p) for p in network.parameters()] for _ in range(2)]
    for turn in range(10):
        for p, gradient in zip(network.parameters(), places[turn % 2], strict=True):
            p.grad = gradient
        step()
    assert steps_of(optimizer) == {10.0} and recorder.count == len(step.replays) == 2


def test_a_replay_that_does_nothing_is_seen(recorder, traced_only, monkeypatch, caplog):
    monkeypatch.setattr(recording, "capture", lambda function, device: (lambda: None, function()))
    monkeypatch.setattr(tracing, "UNCOMPILED", 0)
    network = nn.Linear(3, 2).to(recorder.device)
    traced, x = Traced(network), torch.ones(5, 3, device=recorder.device)
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0):
            torch.testing.assert_close(traced(lambda x: [network(x)], scale * x), [network(scale * x)])
    assert traced.why_not is None and "not recorded as a CUDA graph" in said(caplog)[-1]


def test_what_a_traced_function_gives_stays(recorder, traced_only, monkeypatch, caplog):
    monkeypatch.setattr(tracing, "UNCOMPILED", 0)
    network = nn.Linear(3, 2).to(recorder.device)
    traced = Traced(network)

    def function(x):
        return [network(x) + torch.randn(len(x), 2, device=x.device), x.sum()]

    with torch.no_grad(), caplog.at_level(logging.WARNING):
        found, expected = [], []
        for call in range(4):
            x = torch.full((5, 3), float(call), device=recorder.device)
            for run, results in ((partial(traced, function), found), (function, expected)):
                torch.manual_seed(call)
                results.append([*run(x)])
            network.weight.mul_(2.0)
    torch.testing.assert_close(found, expected)
    assert recorder.count == 1 and traced.why_not is None and not said(caplog)

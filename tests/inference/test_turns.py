"""Threads that fit, evaluate and trace at the same time, and what they leave."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyro
import pytest
import torch

import pyrogen as pg
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.inference import ELBO, AmortizedGuide, Run, fit, turns
from pyrogen.inference.turns import Turn, seeded, turn
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

CPU = torch.device("cpu")


def programs() -> Any:
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    return model, AmortizedGuide(model, MLP(6, 8, (8,)), example=torch.zeros(2, 6))


def fitted(model, guide, **given) -> Run:
    x = (torch.rand(60, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    options: dict[str, Any] = {"batch_size": 8, "epochs": 6, "progress": False, "device": "cpu"} | given
    return fit(model, guide, ELBO(), x, **options)


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.programs.parameters()]


def test_fits_in_threads_give_what_each_gives_alone():
    torch.manual_seed(3)
    pairs = [programs() for _ in range(3)]
    states = [[program.state_dict() for program in pair] for pair in pairs]
    states = [[{k: v.clone() for k, v in state.items()} for state in pair] for pair in states]
    options: list[Any] = [{"seed": 0}, {"seed": 1, "precision": "64-true"}, {"seed": 2, "matmul_precision": "high"}]
    alone = []
    for pair, given in zip(pairs, options, strict=True):
        alone.append(weights(fitted(*pair, **given)))
    for pair, kept in zip(pairs, states, strict=True):
        for program, state in zip(pair, kept, strict=True):
            program.float().load_state_dict(state)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        runs = [*pool.map(lambda each: fitted(*each[0], **each[1]), zip(pairs, options, strict=True))]
    assert torch.equal(torch.get_rng_state(), before)
    for run, known in zip(runs, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights(run), known, strict=True))


def test_an_evaluation_has_its_turn_between_the_steps_of_a_fit():
    torch.manual_seed(3)
    run = fitted(*programs())
    x = torch.zeros(20, 6)
    known = pg.evaluate(run, x, parts=["likelihood"], particles=50).log_likelihood
    begun, found = threading.Event(), []

    def evaluate():
        begun.wait(60)
        found.append(pg.evaluate(run, x, parts=["likelihood"], particles=50).log_likelihood)

    thread = threading.Thread(target=evaluate)
    thread.start()
    seen = []

    def callback(_):
        begun.set()
        seen.append(len(found))

    long = fitted(*programs(), epochs=4000, callbacks=[callback, lambda _: bool(found)])
    thread.join()
    assert found == [known] and len(long.history) < 4000


def test_others_find_what_was_there_before_the_turn():
    torch.manual_seed(5)
    outside, asked = torch.get_rng_state(), threading.Event()
    found = []

    def other():
        asked.set()
        with turn():
            found.append((torch.equal(torch.get_rng_state(), outside), pyro.settings.get("validate_poutine")))
            torch.rand(1)

    validated = pyro.settings.get("validate_poutine")
    with Turn(CPU) as own, seeded(7, CPU), pyro.validation_enabled(not validated):
        first = torch.rand(1)
        thread = threading.Thread(target=other)
        thread.start()
        asked.wait(60)
        while not found:
            own.offer()
        second = torch.rand(1)
        assert pyro.settings.get("validate_poutine") is not validated
    thread.join()
    with seeded(7, CPU):
        assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(1), torch.rand(1)]))
    assert found == [(True, validated)]


def waits(order: list[int], number: int) -> threading.Thread:
    """A thread that waits for its turn."""

    def take() -> None:
        with turn():
            order.append(number)

    thread, waiting = threading.Thread(target=take), len(turns._turns.waiting)
    thread.start()
    while len(turns._turns.waiting) == waiting:
        time.sleep(0.001)
    return thread


def test_a_turn_within_another_is_not_handed_on():
    order: list[int] = []
    with Turn(CPU) as outer:
        with Turn(CPU) as inner:
            thread = waits(order, 0)
            inner.offer()
            assert not order
        outer.offer()
        assert order == [0]
    thread.join()


def test_the_first_that_waits_is_the_first_that_goes():
    order: list[int] = []
    with turn():
        threads = [waits(order, number) for number in range(4)]
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_has_turns_of_its_own():
    with turn():
        thread = waits([], 0)
        if not (child := os.fork()):
            with turn():
                os._exit(len(turns._turns.waiting))
    thread.join()
    assert os.waitpid(child, 0)[1] == 0

"""What a process has once, random numbers, settings and Pyro's handlers, and threads that take turns with it."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

__all__ = ["Turn", "random_state", "seeded", "set_random_state", "turn"]


class _Turns:
    """A lock that a thread may take several times, given in the order in which it was asked for."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.owner: int | None = None
        self.depth = 0
        self.waiting: deque[object] = deque()

    def take(self, depth: int = 1) -> None:
        me, ticket = threading.get_ident(), object()
        with self.condition:
            if self.owner == me:
                self.depth += depth
                return
            self.waiting.append(ticket)
            try:
                self.condition.wait_for(lambda: self.owner is None and self.waiting[0] is ticket)
            finally:
                self.waiting.remove(ticket)
            self.owner, self.depth = me, depth

    def give(self, depth: int = 1) -> None:
        with self.condition:
            self.depth -= depth
            if not self.depth:
                self.owner = None
                self.condition.notify_all()


_turns = _Turns()
if hasattr(os, "register_at_fork"):  # a child has none of the threads that may hold it

    def _anew() -> None:
        depth = _turns.depth if _turns.owner == threading.get_ident() else 0
        _turns.__init__()  # type: ignore[misc]
        if depth:
            _turns.take(depth)

    os.register_at_fork(after_in_child=_anew)


@contextmanager
def turn() -> Iterator[None]:
    """Within, no other thread runs programs by pyrogen."""
    _turns.take()
    try:
        yield
    finally:
        _turns.give()


class Turn:
    """The turn of what takes long, such as a fit, which lets others have theirs in between.

    Args:
        device: Whose random numbers it draws, besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> "Turn":
        _turns.take()
        self.within_another = _turns.depth > 1
        self.outside = self._state()
        return self

    def __exit__(self, *_: Any) -> None:
        _turns.give()

    def offer(self) -> None:
        """Let others go first who wait; they find random state and settings as they were before this turn began."""
        if not _turns.waiting or self.within_another:
            return
        own, depth = self._state(), _turns.depth
        self._set(self.outside)
        _turns.give(depth)
        _turns.take(depth)
        self.outside = self._state()
        self._set(own)

    def _state(self) -> Any:
        return random_state(self.device), torch.get_float32_matmul_precision(), pyro.settings.get()

    def _set(self, state: Any) -> None:
        numbers, precision, settings = state
        set_random_state(numbers, self.device)
        torch.set_float32_matmul_precision(precision)
        pyro.settings.set(**settings)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the random numbers of the CPU, and of the device where it is another."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`random_state` took; a state of another kind of device is left aside."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, or with None from where they are; the caller's state is given back.

    Other threads wait meanwhile, as in :func:`turn`.
    """
    with turn():
        state = random_state(device)
        try:
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
                elif device.type == "mps":
                    torch.mps.manual_seed(seed)
            yield
        finally:
            set_random_state(state, device)

"""What launches many small kernels on a GPU, recorded once as a CUDA graph and replayed as one."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Recorded", "RecordedStep", "is_recordable"]

MOST = 8
"""How many recordings are kept of a step, of gradients in different places."""
MANY = 64
"""How many places are remembered, to which gradients have come once."""
SETTINGS = ("betas", "weight_decay", "eps", "amsgrad", "maximize")
"""Of an Adam, besides its learning rate."""

_log = logging.getLogger(__name__)


def is_recordable(device: torch.device) -> bool:
    """Whether what runs on a device can be recorded."""
    return device.type == "cuda"


def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A replay of a function's kernels, and what the function returned, whose memory each replay fills anew.

    Nothing is computed before the first replay. Random numbers go on from the generator's state at each, as they do
    where the function runs itself. It has run before, for libraries set themselves up at the first launch of a kernel.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The (CUDA|HIP) Graph is empty")
        # Torch's own stream is of whichever device was recorded on first. Another thread may be bringing data.
        stream = _stream(device)
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = function()
    return graph.replay, found


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _waits(device: torch.device) -> Iterator[list[Any]]:
    """Within, the host's waits for a GPU are gathered: what has any can't be recorded, and must not be tried to be.

    Before version 2.12 a recording that fails leaves torch's memory and random numbers in disorder.
    """
    if device.type != "cuda":
        yield []
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".*synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class Recorded:
    """A function of tensors, which runs at the first call, is recorded at the second, and is replayed from then on.

    What a replay returns stays until the next one. Where tensors that are read in place have moved, it begins anew;
    what can't be recorded runs as it is, and a warning says why.

    Args:
        function: Which does nothing but launch kernels.
        given: How many of its inputs, the first ones, are other tensors at each call; the rest are read in place.
    """

    def __init__(self, function: Callable[..., Sequence[Any]], given: int) -> None:
        self.function, self.given = function, given
        self.why_not: str | None = None
        self.places: list[int] | None = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        places = [x.data_ptr() for x in inputs[self.given :]]
        if self.why_not is None and places == self.places and self.replay is None:
            self._record(inputs)
        if self.replay is None or places != self.places:
            self.places, self.replay = places, None
            if self.why_not is not None:
                return self.function(*inputs)
            with _waits(inputs[0].device) as waits:
                found = self.function(*inputs)
            if waits:
                self._give_up(f"it waits for the GPU ({waits[0].message})")
            return found
        torch._foreach_copy_(self.inputs, [*inputs[: self.given]])
        self.replay()
        return self.found

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        fixed = inputs[self.given :]
        self.inputs = [x.clone() for x in inputs[: self.given]]
        try:
            self.replay, self.found = capture(lambda: self.function(*self.inputs, *fixed), inputs[0].device)
        except Exception as error:  # of CUDA or of a library
            self._give_up(str(error))
            return
        # So that a replay that does nothing is seen.
        kept = {x.untyped_storage().data_ptr() for x in fixed}
        for x in tree_leaves(self.found):
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in kept:
                x.fill_(math.nan)

    def _give_up(self, why: str) -> None:
        self.why_not = why
        _log.warning("what is compiled is not recorded as a CUDA graph: %s", why)


class RecordedStep:
    """The step of an optimizer, recorded when gradients come to the same places again, as those of a recording do.

    That takes torch's own Adam or AdamW, fused or made with ``capturable=True``, so that its state is on the device,
    and without hooks; another optimizer steps as it is. Learning rates are read at every step.

    Args:
        optimizer: Of parameters on one device.
        step: What it does where it is not recorded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
        self.optimizer, self.step = optimizer, step
        groups = optimizer.param_groups
        self.parameters = [p for group in groups for p in group["params"]]
        self.records = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
            group["capturable"] or group["fused"] for group in groups
        )
        self.device = self.parameters[0].device
        # Kernels read one of this type.
        self.rates = [torch.full((), math.nan, dtype=torch.float32, device=self.device) for _ in groups]
        self.known = [math.nan for _ in groups]
        self.replays: dict[Any, Callable[[], None]] = {}
        self.seen: set[Any] = set()

    def __call__(self) -> None:
        """Take a step."""
        optimizer = self.optimizer
        if not self.records or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            self.step()
            return
        for index, group in enumerate(optimizer.param_groups):
            if group["lr"] != self.known[index]:
                self.known[index] = group["lr"]
                self.rates[index].fill_(group["lr"])
        key = self._key()
        if key not in self.replays and key in self.seen and len(self.replays) < MOST:
            self._record(key)
        if key in self.replays:
            self.replays[key]()
            return
        if len(self.seen) > MANY:
            self.seen.clear()
        self.seen.add(key)
        with self._capturable():
            self.step()

    def _key(self) -> Any:
        """What a recording depends on: places of parameters, gradients and state, and settings."""
        states = [self.optimizer.state.get(p, {}).get("exp_avg") for p in self.parameters]
        tensors = [x for each in zip(self.parameters, states, strict=True) for x in (*each, each[0].grad)]
        places = [0 if x is None else x.data_ptr() for x in tensors]
        return *places, *(group[name] for group in self.optimizer.param_groups for name in SETTINGS)

    def _record(self, key: Any) -> None:
        try:
            with self._capturable():
                self.replays[key], _ = capture(self.optimizer.step, self.device)
        except Exception as error:  # of CUDA or of the optimizer
            self.records = False
            _log.warning("%s is not recorded as a CUDA graph: %s", type(self.optimizer).__name__, error)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """Within, the optimizer reads learning rates where they are, so that a replay does; recorded or not, alike."""
        groups = self.optimizer.param_groups
        own = [(group["lr"], group["capturable"]) for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"], group["capturable"] = rate, True
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")
                yield
        finally:
            for group, (rate, capturable) in zip(groups, own, strict=True):
                group["lr"], group["capturable"] = rate, capturable

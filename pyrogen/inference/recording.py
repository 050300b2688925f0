"""What launches many small kernels on a GPU, recorded once as a CUDA graph and replayed as one."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorded", "RecordedStep", "is_recordable"]

MOST = 8
"""How many recordings are kept of a step, of gradients in different places."""

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
    # Another thread may be bringing data.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = function()
    return graph.replay, found


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
            return self.function(*inputs)
        torch._foreach_copy_(self.inputs, [*inputs[: self.given]])
        self.replay()
        return self.found

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        fixed = inputs[self.given :]
        self.inputs = [x.clone() for x in inputs[: self.given]]
        try:
            self.replay, self.found = capture(lambda: self.function(*self.inputs, *fixed), inputs[0].device)
        except Exception as error:  # of CUDA or of a library
            self.why_not = str(error)
            _log.warning("what is compiled is not recorded as a CUDA graph: %s", error)


class RecordedStep:
    """The step of an optimizer, recorded once gradients come to the same places, as those of a recorded function do.

    That takes an optimizer whose state is on the device, as a fused Adam's is; another one steps as it is. Learning
    rates are read at every step, other settings when it is recorded.

    Args:
        optimizer: Of parameters on one device.
        step: What it does where it is not recorded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
        self.optimizer, self.step = optimizer, step
        groups = optimizer.param_groups
        self.parameters = [p for group in groups for p in group["params"]]
        self.records = all("capturable" in group and (group["capturable"] or group.get("fused")) for group in groups)
        self.device = self.parameters[0].device
        # Kernels read one of this type.
        self.rates = [torch.full((), math.nan, dtype=torch.float32, device=self.device) for _ in groups]
        self.known = [math.nan for _ in groups]
        self.replays: dict[tuple[int, ...], Callable[[], None]] = {}
        self.last: tuple[int, ...] = ()

    def __call__(self) -> None:
        """Take a step."""
        if not self.records:
            self.step()
            return
        for index, group in enumerate(self.optimizer.param_groups):
            if group["lr"] != self.known[index]:
                self.known[index] = group["lr"]
                self.rates[index].fill_(group["lr"])
        tensors = [x for p in self.parameters for x in (p, p.grad)]
        places = tuple(0 if x is None else x.data_ptr() for x in tensors)
        if places not in self.replays and places == self.last and len(self.replays) < MOST:
            self._record(places)
        if places in self.replays:
            self.replays[places]()
        else:
            with self._capturable():
                self.step()
        self.last = places

    def _record(self, places: tuple[int, ...]) -> None:
        try:
            with self._capturable():
                self.replays[places], _ = capture(self.optimizer.step, self.device)
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

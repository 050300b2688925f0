"""CUDA graphs as a CPU can have them, for tests of what is recorded as one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyrogen.inference import compilation, loop, recording, tracing


class Tape(TorchDispatchMode):
    """Notes the operations within, to do them again.

    As while a CUDA graph is recorded, what was there before is not written to, and whoever asks for a value is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor | None]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        if operation.namespace == "profiler":
            return operation(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copies = [x.clone() if operation._schema.is_mutable else x for x in inputs]
        left = iter(copies)
        taken = tree_map(lambda x: next(left) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        found = operation(*taken[0], **taken[1])
        known = {copy.untyped_storage().data_ptr(): x for copy, x in zip(copies, inputs, strict=True)}
        # What was written to is the input itself; views of what there is are filled with it.
        fresh = [None if _place(x) in {None, *known} else x for x in tree_leaves(found)]
        self.operations.append((operation, args, kwargs, fresh))
        return tree_map(lambda x: known.get(_place(x), x), found) if operation._schema.is_mutable else found

    def replay(self) -> None:
        for operation, args, kwargs, fresh in self.operations:
            found = operation(*args, **kwargs)
            for x, value in zip(fresh, tree_leaves(found), strict=True):
                if x is not None:
                    x.copy_(value)


def _place(x: Any) -> int | None:
    return x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None


class Recorder:
    """The device on which what is compiled is recorded, how often it was, and what can be done there."""

    def __init__(self, device: str) -> None:
        self.device, self.count = device, 0

    def capture(self, function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        self.count += 1
        if device.type == "cuda":
            return CAPTURE(function, device)
        state = torch.get_rng_state()
        try:
            with torch.no_grad(), Tape() as tape:
                found = function()
        finally:
            torch.set_rng_state(state)
        for *_, fresh in tape.operations:
            for x in fresh:
                if x is not None and x.is_floating_point():
                    x.fill_(torch.nan)  # there are no values before the first replay
        return tape.replay, found


CAPTURE = recording.capture


@pytest.fixture(params=["cpu", "cuda"])
def recorder(request, monkeypatch):
    """What is compiled is recorded: on a GPU as a CUDA graph, on the CPU by a tape, and losses are read late."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    recorder = Recorder(request.param)
    for module in (compilation, loop, tracing):
        monkeypatch.setattr(module, "is_recordable", lambda device: True)
    monkeypatch.setattr(loop, "LOOK_EVERY", {})
    monkeypatch.setattr(recording, "capture", recorder.capture)
    return recorder

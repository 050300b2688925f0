"""Functions that run programs on tensors, traced once for each shape of these and compiled; without gradients."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyrogen.inference.programs import modules_of
from pyrogen.inference.recording import Recorded, is_recordable
from pyrogen.inference.turns import seeded

__all__ = ["Traced", "lowered", "reason"]

UNCOMPILED = 10
"""Calls with tensors of the same shapes before these are worth a graph."""
TOLERANCE = 1e-3
"""How far what a graph gives may be from what the function does, as a share of its norm."""

_log = logging.getLogger(__name__)


class Traced:
    """Runs functions of tensors, after a few calls with tensors of some shapes by a compiled graph.

    The graph has the function's operations and none of its Python, and draws the same random numbers. Once it is
    compared with the function; where they differ or the function can't be traced, it runs as it is, and a warning says
    why.

    Args:
        programs: Whose weights the functions use. A graph takes these as they are when it runs, and whatever else a
            function refers to as it was when it was traced.
        compile: Whether to; else functions run as they are.
    """

    def __init__(self, *programs: Callable | None, compile: bool = True) -> None:
        whole = nn.ModuleList([module for program in programs for module in modules_of(program)])
        self.why_not: str | None = None
        """What keeps a function from being compiled, once that is known."""
        self._compiles, self._calls = compile, Counter[Any]()
        self._state = [*whole.parameters(), *whole.buffers()]
        self._graphs: dict[Any, Any] = {}

    def __call__(
        self, function: Callable[..., Sequence[Tensor]], *inputs: Tensor, kind: Any = None
    ) -> Sequence[Tensor]:
        """What the function makes of the inputs.

        Args:
            function: Always the same one for inputs of the same shapes and the same ``kind``.
            inputs: Of which the first says on which device random numbers are drawn.
            kind: By which functions are told apart.
        """
        key = kind, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        self._calls[key] += 1
        if self._compiles and key not in self._graphs and self._calls[key] > UNCOMPILED:
            try:
                self._graphs[key] = self._made(function, inputs)
            except Exception as error:  # whatever a program, a tracer or a compiler stumbles over
                self.why_not, self._compiles = reason(error), False
                _log.warning("the programs run as they are, not compiled: %s", self.why_not)
        return self._graphs[key](*inputs, *self._state) if key in self._graphs else function(*inputs)

    def _made(self, function: Callable[..., Sequence[Tensor]], inputs: tuple[Tensor, ...]) -> Any:
        device, count = inputs[0].device, len(inputs)
        # Validation looks at values.
        with torch.no_grad(), pyro.validation_enabled(False):
            with seeded(None, device):
                graph = make_fx(lambda *all_: [*function(*all_[:count])], tracing_mode="real")(*inputs, *self._state)
            run = lowered(graph, [*inputs, *self._state])
            with seeded(None, device):
                known = function(*inputs)
            self._check(run, inputs, known)
            return self._recorded(run, inputs, known) if is_recordable(device) else run

    def _recorded(self, run: Any, inputs: tuple[Tensor, ...], known: Sequence[Tensor]) -> Any:
        """What runs as a recording, or itself where that gives something else."""
        replayed = Recorded(run, len(inputs))

        def recorded(*inputs: Tensor) -> list[Tensor]:
            return [x.clone() for x in replayed(*inputs)]

        try:
            for _ in range(3):
                self._check(recorded, inputs, known)
        except Exception as error:  # of CUDA, or that it gives something else
            _log.warning("the programs are compiled, but not recorded as a CUDA graph: %s", reason(error))
            return run
        return recorded

    def _check(self, run: Any, inputs: tuple[Tensor, ...], known: Sequence[Tensor]) -> None:
        """Raise a ``ValueError`` if from the same random numbers something else is found than what is known."""
        with seeded(None, inputs[0].device):
            found = run(*inputs, *self._state)
        for a, b in zip(known, found, strict=True):
            finite = a.isfinite()
            off = torch.where(finite, a - b, 0.0).norm()
            if not torch.equal(finite, b.isfinite()) or off > TOLERANCE * torch.where(finite, a, 0.0).norm() + 1e-6:
                raise ValueError(
                    "from the same random numbers the graph gives something else; it seems to use numbers "
                    "that change and are neither tensors nor drawn by torch"
                )


def lowered(graph: GraphModule, inputs: list[Any]) -> Any:
    """A graph as TorchInductor compiles it; itself where that fails, such as for want of a C++ compiler."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own making
            return torch._inductor.compile(graph, inputs, options={"fallback_random": True})
    except Exception as error:  # of many kinds, as compilers and machines are
        _log.warning("the traced graph runs operation by operation, for it can't be compiled: %s", reason(error))
        return graph


def reason(error: Exception) -> str:
    """Why something could not be traced or compiled, in one line."""
    if "_local_scalar_dense" in str(error):
        return "it asks in Python for the value of a tensor, as if, float() and .item() do"
    return " ".join(str(error).split())[:400] or type(error).__name__

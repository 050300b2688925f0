"""An objective traced once, programs, handlers and gradients, into one graph of tensor operations, and compiled."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from pyrogen.arguments import checked
from pyrogen.inference.objectives import Estimate, ObjectiveModule
from pyrogen.inference.programs import clear_gradients, modules_of
from pyrogen.inference.recording import Recorded, is_recordable
from pyrogen.inference.tracing import lowered, reason
from pyrogen.inference.turns import seeded

__all__ = ["Compiled"]

MOST = 8
"""How many graphs are compiled, of batches of different sizes for the most part; further ones run as they are."""
LATER = 1000
"""Steps by which the program is ahead of its graph when the two are compared."""
TOLERANCE: dict[torch.dtype | None, float] = {torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far compiled gradients may be from those of the program itself, as a share of their norm; else 0.01."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    """A compiled graph, and what it returns: loss, the program's share of it, figures, and gradients of these."""

    which: str
    run: Any
    metrics: tuple[str, ...]
    has_share: bool
    trained: tuple[nn.Parameter, ...]
    state: tuple[Tensor, ...]
    keeps: bool = False
    """Whether it writes gradients to the same places every time."""


@checked()
class Compiled:
    r"""The loss of an objective and its gradients, by a graph that was traced once and compiled.

    .. math:: x \mapsto \big( \mathcal{L}(x), \nabla \mathcal{L}(x) \big)

    At the first batch of a shape the objective runs once as it is, and with it all of Pyro: handlers, plates and
    parameters. Of that only tensor operations are kept, those of the gradients among them, and TorchInductor compiles
    them into a few loops, which it keeps for later processes. Random numbers are drawn by torch in the same order, so
    that from the same seed a compiled step gives the figures of the step itself up to rounding. Whether it does is
    looked at once; where it does not, or where a program can't be traced, it runs as it is, and a warning says why.
    On a GPU the loops are recorded as a CUDA graph, which launches them all at once.

    What a program decides, it decides while it is traced: a loop runs as often as then, and a number that it computes
    in Python stays what it was. Schedules of an objective (``beta=``, ``latent=``) and modes (``train``, ``eval``) are
    followed, and so are parameters and buffers of programs and of the modules that they refer to.

    Args:
        module: An objective with its programs, ``objective(model, guide)``.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import ELBO, AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, nn.Linear(4, 8))
        >>> loss_of = Compiled(ELBO()(toy.model, guide))
        >>> loss_of(toy.x[:16]).backward()
        >>> loss_of.why_not is None, all(parameter.grad is not None for parameter in guide.parameters())
        (True, True)
    """

    def __init__(self, module: ObjectiveModule) -> None:
        self.module = module
        self.seconds = 0.0
        """Time taken by tracing and compiling."""
        self.why_not: str | None = None
        """What keeps the objective from being compiled, once that is known."""
        self._graphs: dict[Any, _Graph | None] = {}
        # With the modules that functions refer to.
        self._whole = nn.ModuleList([module, *modules_of(module.model), *modules_of(module.guide)])
        self._modules, self._parameters = [*self._whole.modules()], [*self._whole.parameters()]
        self._critics = [*module.critics.parameters()]

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, to be differentiated; ``module.latest`` then holds the whole estimate."""
        graph = self._graph("forward", batch)
        if graph is None:
            return self.module(*batch)
        loss, gradients = self._run(graph, batch)
        if graph.keeps:
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        return _Known.apply(loss, gradients, *graph.trained)

    def backward(self, *batch: Tensor) -> Estimate:
        """The estimate of a batch, its gradients put in place of the parameters' own.

        On a GPU all is one CUDA graph, and the next call writes its gradients to the same places.
        """
        return self._filled("forward", batch)

    def critics_backward(self, *batch: Tensor) -> None:
        """The same of what critics alone minimise, for the gradients of critics."""
        self._filled("critic_loss", batch)

    def _filled(self, which: str, batch: tuple[Tensor, ...]) -> Estimate:
        graph = self._graph(which, batch)
        if graph is None:
            self._root(which).zero_grad()
            getattr(self.module, which)(*batch).backward()
        else:
            clear_gradients(self._critics if which == "critic_loss" else self._parameters)
            for parameter, gradient in zip(graph.trained, self._run(graph, batch)[1], strict=True):
                parameter.grad = gradient
        return self.module.latest  # type: ignore[return-value]

    def _run(self, graph: _Graph, batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        objective, learns = self.module.elbo, torch.is_grad_enabled()
        with torch.no_grad():
            loss, *found = graph.run(*batch, *_tensors(objective.scheduled(), graph.trained[0]), *graph.state)
        if graph.which == "forward":
            share = found.pop(0) if graph.has_share else None
            self.module.latest = Estimate(loss, dict(zip(graph.metrics, found, strict=False)), None, share)
            objective.step += learns
        return loss, found[len(graph.metrics) :]

    def _trained(self, which: str) -> list[nn.Parameter]:
        return [p for p in self._root(which).parameters() if p.requires_grad]

    def _root(self, which: str) -> nn.Module:
        return self.module.critics if which == "critic_loss" else self._whole

    def _graph(self, which: str, batch: tuple[Tensor, ...]) -> _Graph | None:
        """The graph for such a batch, compiled if need be; None where there is none."""
        if self.why_not is not None:
            return None
        key = self._key(which, batch)
        if key not in self._graphs:
            if len(self._graphs) == MOST:
                return None
            self._graphs[key] = self._made(which, batch)
        return self._graphs[key]

    def _key(self, which: str, batch: tuple[Tensor, ...]) -> Any:
        """All that a graph depends on besides the values of tensors."""
        objective = self.module.elbo
        return (
            which,
            *((x.shape, x.stride(), x.dtype, x.device) for x in batch),
            _autocast(batch[0].device),
            *(part.training for part in self._modules),
            *(p.requires_grad for p in self._parameters),
            *(id(buffer) for part in self._modules for buffer in part._buffers.values()),
            *(v for name, v in vars(objective).items() if name != "step" and isinstance(v, (int, float, str))),
            *(value == 0.0 for value in objective.scheduled().values()),
        )

    def _made(self, which: str, batch: tuple[Tensor, ...]) -> _Graph | None:
        started = time.perf_counter()
        try:
            graph = self._compiled(which, batch)
            self._check(graph, batch)
            if is_recordable(batch[0].device):
                graph = self._recorded(graph, batch)
        except Exception as error:  # whatever a program, a tracer or a compiler stumbles over
            self.why_not = reason(error)
            _log.warning("%r runs as it is, not compiled: %s", self.module.elbo, self.why_not)
            return None
        finally:
            self.seconds += time.perf_counter() - started
        seconds = time.perf_counter() - started
        _log.info("%r compiled for %s in %.1f seconds", self.module.elbo, tuple(batch[0].shape), seconds)
        return graph

    def _compiled(self, which: str, batch: tuple[Tensor, ...]) -> _Graph:
        objective, trained = self.module.elbo, self._trained(which)
        state = [*self._parameters, *self._whole.buffers()]
        now, count = objective.scheduled(), len(batch)
        names: list[str] = []
        shares: list[Tensor] = []

        def step(*inputs: Tensor) -> list[Tensor | None]:
            # A weight of 0 is no tensor: what it stands before may be infinite.
            weights = dict(zip(now, inputs[count:], strict=False))
            held = {name: weight if now[name] else 0.0 for name, weight in weights.items()}
            with torch.enable_grad(), objective.held(held):
                loss = getattr(self.module, which)(*inputs[:count])
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            figures: dict[str, Tensor] = {}
            if which == "forward":
                estimate: Any = self.module.latest
                figures = estimate.metrics
                shares[:] = [] if estimate.of_program is None else [estimate.of_program]
            names[:] = [*figures]
            return [loss.detach(), *shares, *figures.values(), *gradients]

        inputs = [*batch, *_tensors(now, trained[0]), *state]
        # Validation looks at values.
        with self._as_found(batch[0].device), pyro.validation_enabled(False):
            graph = make_fx(step, tracing_mode="real")(*inputs)
            if {id(x) for x in self._whole.buffers()} != {id(x) for x in state[len(self._parameters) :]}:
                raise ValueError(
                    "it puts new tensors in place of buffers; write into them, as self.mean.copy_(...) does"
                )
        if any(parameter.requires_grad for parameter in graph.parameters()):
            raise ValueError("it uses parameters that belong to no module which model, guide or a function refers to")
        known = {id(parameter) for parameter in self._parameters}
        if strange := sorted(name for name, p in self.module._store["params"].items() if id(p) not in known):
            raise ValueError(
                f"its parameters {strange} stand in Pyro's store alone; fit(..., compile=True) takes these"
            )
        lower = lowered(graph, inputs)
        figures = 1 + len(shares) + len(names)

        def run(*inputs: Tensor) -> list[Tensor | None]:
            found = lower(*inputs)
            return [*found[:figures], *_laid_out(found[figures:], trained)]

        return _Graph(which, run, tuple(names), bool(shares), tuple(trained), tuple(state))

    def _recorded(self, graph: _Graph, batch: tuple[Tensor, ...]) -> _Graph:
        """The graph as a recording, or itself where that gives something else."""
        count = 1 + graph.has_share + len(graph.metrics)

        def kernels(*inputs: Tensor) -> list[Any]:
            found = graph.run(*inputs)
            figures = found[:count]
            alike = len({(x.shape, x.dtype, x.device) for x in figures}) == 1
            return [torch.stack(figures) if alike else figures, *found[count:]]

        replayed = Recorded(kernels, len(batch) + len(self.module.elbo.scheduled()))

        def run(*inputs: Tensor) -> list[Tensor | None]:
            figures, *gradients = replayed(*inputs)
            # Which are read after the next replay.
            own = figures.clone().unbind() if isinstance(figures, Tensor) else [x.clone() for x in figures]
            return [*own, *gradients]

        recorded = replace(graph, run=run, keeps=True)
        try:
            with self._as_found(batch[0].device):
                for _ in range(2):
                    self._run(recorded, batch)
            self._check(recorded, batch)
        except Exception as error:  # of CUDA, or that it gives something else
            _log.warning("%r is compiled, but not recorded as a CUDA graph: %s", self.module.elbo, reason(error))
            return graph
        return recorded

    def _check(self, graph: _Graph, batch: tuple[Tensor, ...]) -> None:
        """Raise a ``ValueError`` if the graph's gradients are not those of the program."""
        objective = self.module.elbo
        with self._as_found(batch[0].device), torch.enable_grad(), objective.held(objective.scheduled()):
            objective.step += LATER  # beside its schedules nothing may follow it
            loss = getattr(self.module, graph.which)(*batch)
            known = torch.autograd.grad(loss, graph.trained, allow_unused=True, materialize_grads=True)
        with self._as_found(batch[0].device):
            again, gradients = self._run(graph, batch)
        pairs = [(a.double(), b.double()) for a, b in zip(known, gradients, strict=True) if b is not None]
        off, norm = (
            torch.stack(each).sum().sqrt()
            for each in zip(*(((a - b).square().sum(), a.square().sum()) for a, b in pairs), strict=True)
        )
        kinds = {p.dtype for p in graph.trained} | {_autocast(batch[0].device)}
        tolerance = max(TOLERANCE.get(kind, 0.01) for kind in kinds)
        if torch.isfinite(norm) and not off <= tolerance * norm + 1e-6:
            raise ValueError(
                f"from the same random numbers the program has a loss of {float(loss.detach()):.6g} and its graph one "
                f"of {float(again):.6g}, with gradients that differ by {float(off / norm):.2g} of their norm; it seems "
                "to use numbers that change and are neither tensors nor drawn by torch"
            )

    @contextmanager
    def _as_found(self, device: torch.device) -> Iterator[None]:
        """Within, the objective runs and leaves no mark: random state, buffers, number of the step."""
        objective, latest = self.module.elbo, self.module.latest
        step = objective.step
        named = [(part, name, buffer) for part in self._modules for name, buffer in part._buffers.items()]
        values = [None if buffer is None else buffer.clone() for _, _, buffer in named]
        try:
            with seeded(None, device):
                yield
        finally:
            objective.step, self.module.latest = step, latest
            with torch.no_grad():
                for (part, name, buffer), value in zip(named, values, strict=True):
                    part._buffers[name] = buffer
                    if buffer is not None and value is not None:
                        buffer.copy_(value)


def _laid_out(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Iterator[Tensor | None]:
    """Gradients laid out as their parameters, as optimizers expect, each in memory that no other one has."""
    given: set[int] = set()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            storage = gradient.untyped_storage().data_ptr()
            if gradient.stride() != parameter.stride() or storage in given:
                gradient = torch.empty_like(parameter).copy_(gradient)
            given.add(storage)
        yield gradient


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return None, None, *(None if g is None else g * outputs[0] for g in ctx.gradients)


def _tensors(weights: Mapping[str, float], like: Tensor) -> list[Tensor]:
    """Weights as inputs of a graph."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [torch.full((), weight, dtype=dtype, device=like.device) for weight in weights.values()]


def _autocast(device: torch.device) -> torch.dtype | None:
    """The type that operations are cast to."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

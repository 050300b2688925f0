"""Several processes as one fit: what started them, what they agree on, and gradients averaged over them."""

import logging
import os
import pickle  # noqa: TID251 (of an error, to see whether it can be sent)
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pyrogen.inference.events import Events
from pyrogen.inference.fabric import (
    ClusterEnvironment,
    DDPStrategy,
    Fabric,
    LightningEnvironment,
    Logger,
    MisconfigurationException,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

__all__ = ["Processes", "alone", "connect", "environment", "is_first"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_apart = False


@contextmanager
def alone() -> Iterator[None]:
    """Within, fits are of this process alone, whatever has started it beside others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def environment() -> ClusterEnvironment | None:
    """What started this process as one of several, ``torchrun`` or SLURM's ``srun``; None where it is alone.

    Raises:
        ValueError: If SLURM does not say how many tasks a machine has.
    """
    kinds: dict[str, type[ClusterEnvironment]] = {
        # torchrun goes first, for it may itself be started by SLURM.
        "TORCHELASTIC_RUN_ID": TorchElasticEnvironment,
        "SLURM_NTASKS": SLURMEnvironment,
    }
    for variable, kind in kinds.items():
        if not _apart and variable in os.environ and kind.detect():
            try:
                found = kind()
            except RuntimeError as error:
                raise ValueError(f"the tasks of this SLURM job can't be told apart: {error}") from error
            return found if found.world_size() > 1 else None
    return None


def is_first() -> bool:
    """Whether this process is alone or the first of several, the one that prints and writes."""
    around = environment()
    return around is None or around.global_rank() == 0


class _Averaging(DDPStrategy):
    """Data parallel, but the module stays as it is: :meth:`Processes.average` sees to the gradients."""

    def setup_module(self, module: nn.Module) -> Any:
        return module


def connect(device: str, precision: str, folder: Path | None = None) -> Fabric:
    """Device, precision, loggers, and the connection to other processes where there are some.

    Args:
        device: As :func:`pyrogen.fit` takes it; with several processes each gets a device of its kind.
        precision: As Lightning Fabric names it.
        folder: Of the run, for its logs.

    Raises:
        ValueError: If there is no such device, or not this precision on it.
    """
    around = environment()
    kind, _, index = device.partition(":")
    loggers: list[Logger] = []
    if folder is not None and is_first():
        loggers.append(Events(folder / "logs"))
    options: dict[str, Any] = {"accelerator": kind, "precision": precision, "loggers": loggers}
    if around is not None:
        if index:
            raise ValueError(
                f"device={device!r} is one device, and there are {around.world_size()} processes; give "
                f"device={kind!r}, of which each process of a machine takes its own"
            )
        local = _processes_of_machine(around)
        machines = around.world_size() // local
        options |= {"strategy": _Averaging(), "devices": local, "num_nodes": machines, "plugins": [around]}
    else:
        plugins = [LightningEnvironment()] if _apart else None
        options |= {"plugins": plugins}
    try:
        fabric = Fabric(**({"devices": [int(index)] if index else 1} | options))
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"device={device!r} with precision={precision!r} can't be used here: {error}") from error
    if around is not None:
        if is_first() and not distributed.is_initialized():
            _log.warning(_waiting(around))
        with _quiet("lightning_fabric"):
            fabric.launch()
    return fabric


def _processes_of_machine(around: ClusterEnvironment) -> int:
    name = "SLURM_NTASKS_PER_NODE" if isinstance(around, SLURMEnvironment) else "LOCAL_WORLD_SIZE"
    return int(os.environ[name])


def _waiting(around: ClusterEnvironment) -> str:
    which, mend = "torchrun", ""
    if isinstance(around, SLURMEnvironment):
        which, mend = "SLURM", "; start them by srun, or ask for --ntasks=1"
    return f"waiting for {around.world_size()} processes, as {which} says{mend}"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class Processes:
    """The processes that train together, as one of them sees them; often it is alone, and then nothing costs anything.

    What one does that others wait for, they all do, in the same order. Hence whatever may fail in one stands in
    :meth:`together`.

    Args:
        fabric: What connects them.

    Attributes:
        rank: The number of this process, from 0.
        count: How many there are.
        alone: Whether there is one.
        first: Whether this is the one that prints, writes and calls back.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self.alone, self.first = self.count == 1, self.rank == 0

    def seed(self, seed: int) -> int:
        """A seed for this process; the first has the one given."""
        # Of a seed the CPU's generator takes the lower 32 bits, of which this odd number changes many.
        return seed if self.first else (seed + self.rank * 0x9E3779B1) % 2**63

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, an error of one process becomes one of all, who wait for it at the end of the block, never inside."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.alone:
                raise
            own = error
        if self.alone:
            return
        errors = self.gather(None if own is None else _sendable(own))
        if own is not None:
            raise own
        if (rank := next((rank for rank, error in enumerate(errors) if error is not None), None)) is not None:
            theirs: Any = errors[rank]
            theirs.add_note(f"It was raised in process {rank} of {self.count}.")
            raise theirs

    def in_turn(self, function: Callable[[], T]) -> T:
        """What a function gives, called by one process of each machine before the others, as for a download."""
        values: list[T] = []
        for turn in (True, False):
            with self.together():
                if turn == (self.fabric.local_rank == 0):
                    values.append(function())
        return values[0]

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        return value if self.alone else self.fabric.broadcast(value)

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[Tensor] | Sequence[float]) -> list[float]:
        """Numbers summed over processes."""
        if self.alone or not values:
            return [float(value) for value in values]
        total = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.fabric.device) for x in values])
        distributed.all_reduce(total)
        return total.tolist()

    def average(
        self,
        parameters: Sequence[nn.Parameter],
        loss: Tensor,
        share: float,
        buffers: Sequence[Tensor] = (),
        *,
        asked: bool = False,
    ) -> Tensor:
        """Put the gradient of all processes in place of this one's, in one exchange.

        Args:
            parameters: The same in each process. One without a gradient here gets that of the others; one that has
                none in any is left without.
            loss: That of this process.
            share: The weight of this process's gradients.
            buffers: Floating tensors that get the value that they have in the first process.
            asked: Whether this process was asked to stop.

        Returns:
            The loss, or of several processes NaN if one of theirs is not finite, above 0 if one was asked to stop, and
            else 0; it stays on the device.
        """
        if self.alone:
            return loss
        missing = [p for p in parameters if p.grad is None]
        here = torch.ones(len(parameters), device=loss.device)
        if missing:
            here = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
            for p in missing:
                p.grad = torch.zeros_like(p)
        gradients: list[Any] = [p.grad for p in parameters]
        with torch.no_grad():
            kept = [b if self.first else torch.zeros_like(b) for b in buffers]
            whole = torch.cat([(loss * 0 + asked).reshape(1), here, *(x.reshape(-1) for x in (*gradients, *kept))])
            own = whole[: len(whole) - sum(b.numel() for b in buffers)]
            _ = own.mul_(share) if share else own.zero_()  # for 0 · NaN is not 0
            distributed.all_reduce(whole)
            targets = [*gradients, *buffers]
            trouble, anywhere, *parts = whole.split([1, len(parameters), *(x.numel() for x in targets)])
            torch._foreach_copy_(targets, [part.view(x.shape) for part, x in zip(parts, targets, strict=True)])
        if missing:
            for p, present in zip(parameters, (anywhere > 0).tolist(), strict=True):
                p.grad = p.grad if present else None
        return trouble[0]

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().clone(memory_format=torch.contiguous_format)
                distributed.broadcast(value, 0)
                tensor.copy_(value)


def _sendable(error: Exception) -> Exception:
    """An error as it can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (of our own making)
    except Exception:  # whatever a class of the user's own makes of it
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

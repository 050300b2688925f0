"""Whatever holds data, as shuffled minibatches on a device."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyrogen.data import Data, as_float

__all__ = ["Batches", "as_batch", "check_data", "training_and_validation"]

_CHUNK = 4096
"""How many rows are checked at a time, so that the check needs little memory."""


@dataclass(frozen=True)
class Batches:
    """Training rows that come as minibatches in an order of their own for each epoch.

    Attributes:
        rows: Tensors of N rows each, or a map-style data set.
        source: Where they come from; a :class:`~pyrogen.data.Data` prepares its own batches.
        batch_size: Rows of a minibatch; the last one of an epoch may be smaller.
        seed: The order of epoch e follows from seed and e alone, so that a run can go on anywhere.
    """

    rows: tuple[Tensor, ...] | Dataset
    source: Any
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows[0]) if isinstance(self.rows, tuple) else len(self.rows)  # type: ignore[arg-type]

    @property
    def per_epoch(self) -> int:
        """How many minibatches make an epoch."""
        return math.ceil(len(self) / self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The order of the rows in one epoch."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def to(self, device: torch.device) -> "Batches":
        """The same with its tensors on a device."""
        if not isinstance(self.rows, tuple):
            return self
        return Batches(tuple(x.to(device) for x in self.rows), self.source, self.batch_size, self.seed)

    def epoch(self, epoch: int, device: torch.device, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The minibatches of one epoch as a program sees them, without the first ``skip``."""
        order = self.order(epoch)[skip * self.batch_size :]
        if not isinstance(self.rows, tuple):
            loader = DataLoader(self.rows, batch_size=self.batch_size, sampler=order.tolist())
            for batch in loader:
                batch = (batch,) if isinstance(batch, Tensor) else tuple(batch)
                yield self.prepare(tuple(x.to(device) for x in batch))
            return
        order = order.to(self.rows[0].device)
        for index in order.split(self.batch_size):
            yield self.prepare(tuple(x[index].to(device) for x in self.rows))

    def prepare(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stored rows as a program sees them; dynamic binarisation draws anew."""
        if isinstance(self.source, Data):
            return (self.source.prepare(batch[0]), *batch[1:])
        return as_batch(batch)

    def first(self, rows: int = 2) -> tuple[Tensor, ...]:
        """The first rows as a batch, without drawing from the global random state."""
        with torch.random.fork_rng(devices=[]):
            if isinstance(self.rows, tuple):
                return self.prepare(tuple(x[:rows].cpu() for x in self.rows))
            return next(self.epoch(0, torch.device("cpu")))


def as_batch(data: Tensor | Sequence[Tensor], device: torch.device | None = None) -> tuple[Tensor, ...]:
    """A tensor or tensors as a program's arguments: the first as floats, integers among the others as they are."""
    batch = (data,) if isinstance(data, Tensor) else tuple(data)
    first, *others = batch
    others = [x if x.dtype in (torch.int64, torch.int32) else as_float(x) for x in others]
    return tuple(x.to(device) for x in (as_float(first), *others))


def training_and_validation(data: Any, batch_size: int, seed: int) -> tuple[Batches, tuple[Tensor, ...] | None]:
    """Minibatches for training, and a batch for validation where the data have one.

    Raises:
        TypeError: If the data are of no known kind.
        ValueError: If they are empty, of unequal lengths, or hold NaN or infinity.
    """
    validation = None
    rows: tuple[Tensor, ...] | Dataset
    if isinstance(data, Data):
        rows, validation = (data.train,), as_batch(data.validation)
    elif isinstance(data, Tensor):
        rows = (data,)
    elif isinstance(data, (tuple, list)) and data and all(isinstance(x, Tensor) for x in data):
        rows = tuple(data)
    elif isinstance(data, Dataset) and hasattr(data, "__len__"):
        rows = data
    else:
        raise TypeError(
            f"expected data as a tensor (N, *event_shape), a tuple of tensors, a torch Dataset with a length, or what "
            f"pyrogen.data.load returns, got {type(data).__name__}"
        )
    check_data(rows)
    return Batches(rows, data, batch_size, seed), validation


def check_data(rows: tuple[Tensor, ...] | Dataset) -> None:
    """Raise a ``ValueError`` for empty, unequal or non-finite data."""
    lengths = {len(x) for x in rows} if isinstance(rows, tuple) else {len(rows)}  # type: ignore[arg-type]
    if len(lengths) > 1:
        raise ValueError(f"the tensors of the data have different lengths {sorted(lengths)}; they must share one")
    if lengths == {0}:
        raise ValueError("the data are empty; expected at least one row")
    if not isinstance(rows, tuple):
        return
    for position, x in enumerate(rows):
        if x.is_floating_point():
            for start, chunk in enumerate(x.split(_CHUNK)):
                finite = torch.isfinite(chunk).flatten(1).all(1) if chunk.dim() > 1 else torch.isfinite(chunk)
                if not finite.all():
                    row = start * _CHUNK + int((~finite).nonzero()[0])
                    raise ValueError(
                        f"the data hold NaN or infinity, first in row {row} of tensor {position}; remove or impute "
                        "such rows before training"
                    )

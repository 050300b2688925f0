"""Whatever holds data, as shuffled minibatches on a device."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from pyrogen.arguments import check_are
from pyrogen.data import Data, as_float
from pyrogen.inference.fingerprints import fingerprint

__all__ = ["Batches", "as_batch", "check_data", "training_and_validation"]

CHUNK = 4096
"""How many rows are checked at a time, so that the check needs little memory."""


@dataclass(frozen=True)
class Batches:
    """Rows that come as minibatches in an order of their own for each epoch.

    Attributes:
        rows: Tensors of N rows each, or a map-style data set.
        source: Where they come from; a :class:`~pyrogen.data.Data` prepares its own batches.
        batch_size: Rows of a minibatch; the last one of an epoch may be smaller.
        seed: The order of epoch e follows from seed and e alone, so that a run can go on anywhere.
        dtype: What floats become, or None to leave them as they are.
        rank, ranks: The number of this process and how many there are. All draw the same order, and of each
            ``ranks * batch_size`` rows this one takes its part.
        workers: How many processes read a data set; 0 for this one alone.
        ahead: Whether tensors stay where they are, and batches of them are brought to the device one ahead.
    """

    rows: tuple[Tensor, ...] | Dataset
    source: Any
    batch_size: int
    seed: int
    dtype: torch.dtype | None = None
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    ahead: bool = False

    def __len__(self) -> int:
        return len(self.rows[0]) if isinstance(self.rows, tuple) else len(self.rows)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """By which other data are told apart, see :func:`~pyrogen.inference.fingerprints.fingerprint`."""
        return fingerprint(self.rows)

    @property
    def per_epoch(self) -> int:
        """How many minibatches make an epoch."""
        return math.ceil(len(self) / (self.ranks * self.batch_size))

    def rows_at(self, position: int) -> tuple[int, int]:
        """Of the minibatch at a position in an epoch the rows of this process, which may be none, and those of all."""
        size = self.ranks * self.batch_size
        whole = min(size, len(self) - position * size)
        return whole // self.ranks + (self.rank < whole % self.ranks), whole

    def order(self, epoch: int) -> Tensor:
        """The order of the rows in one epoch, the same in all processes; eight bytes for each row."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(self._seed_of(epoch)))

    def _seed_of(self, epoch: int) -> int:
        return (self.seed * 1_000_003 + epoch) % 2**63

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Batches":
        """The same with its tensors on a device, and batches whose floats have a type.

        Tensors that would take more than half of a GPU's free memory stay where they are. Batches of them are then
        gathered in pinned memory and copied, each by a thread while the one before is in use.
        """
        rows, ahead = self.rows, False
        if isinstance(rows, tuple):
            ahead = not _fits(rows, device)
            if not ahead:
                rows = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in rows)
        return dataclasses.replace(self, rows=rows, dtype=dtype, ahead=ahead)

    def epoch(self, epoch: int, device: torch.device, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The minibatches of one epoch as a program sees them, without the first ``skip``.

        A process whose part of the last minibatch would be empty gets the first one's, to which no weight is due.
        """
        order = self._own(self.order(epoch)[skip * self.ranks * self.batch_size :])
        return self._batches(order, self.batch_size, device, self._seed_of(epoch) + self.rank, self.workers, self.ahead)

    def _own(self, order: Tensor) -> Tensor:
        """Of an order of rows those that this process takes."""
        if self.ranks == 1:
            return order
        whole = len(order) // (self.ranks * self.batch_size)
        full, rest = order.tensor_split([whole * self.ranks * self.batch_size])
        parts = rest.tensor_split(self.ranks)
        last = parts[self.rank] if len(parts[self.rank]) else parts[0]
        return torch.cat([full.view(whole, self.ranks, self.batch_size)[:, self.rank].flatten(), last])

    def some(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """A batch of rows drawn at random, from the global random state."""
        return next(self._batches(torch.randint(len(self), (rows,)), rows, device))

    def in_order(self, device: torch.device, size: int = CHUNK, *, own: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """All rows once as they are stored, in batches of at most ``size``; of several processes only ``own`` ones."""
        order = torch.arange(len(self))
        return self._batches(order.tensor_split(self.ranks)[self.rank] if own else order, size, device)

    def first(self, rows: int = 2) -> tuple[Tensor, ...]:
        """The first rows as a batch on the CPU, without drawing from the global random state."""
        with torch.random.fork_rng(devices=[]):
            return next(self._batches(torch.arange(len(self))[:rows], rows, torch.device("cpu")))

    def _batches(
        self, order: Tensor, size: int, device: torch.device, seed: int = 0, workers: int = 0, ahead: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        if isinstance(self.rows, tuple):
            order = order.to(self.rows[0].device)
        parts = (order[start : start + size] for start in range(0, len(order), size))
        stored: Iterator[tuple[Tensor, ...]]
        if isinstance(self.rows, tuple):
            stored = (self._gathered(index, device) for index in parts)
            stored = _one_ahead(stored) if ahead else stored
        else:
            stored = _read(self.rows, parts, device, seed, workers)
        return (self.prepare(batch) for batch in stored)

    def _gathered(self, index: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Stored rows on a device."""
        assert isinstance(self.rows, tuple)
        if not (self.ahead and device.type == "cuda"):
            return tuple(x[index].to(device) for x in self.rows)
        # From pinned memory a copy is only ordered, and nobody waits for it.
        pinned = (torch.empty(len(index), *x.shape[1:], dtype=x.dtype, pin_memory=True) for x in self.rows)
        gathered = (torch.index_select(x, 0, index, out=out) for x, out in zip(self.rows, pinned, strict=True))
        return tuple(x.to(device, non_blocking=True) for x in gathered)

    def prepare(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stored rows as a program sees them; dynamic binarisation draws anew."""
        prepared = (self.source.prepare(batch[0]), *batch[1:]) if isinstance(self.source, Data) else as_batch(batch)
        if self.dtype is None:
            return prepared
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in prepared)


def _fits(rows: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether there is room on a device for tensors and as much again for all else."""
    if device.type != "cuda":
        return True
    needed = sum(x.numel() * x.element_size() for x in rows if x.device.type != "cuda")
    return needed == 0 or needed <= torch.cuda.mem_get_info(device)[0] / 2


def _one_ahead(batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same, each made by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def _read(
    data: Dataset, parts: Iterator[Tensor], device: torch.device, seed: int, workers: int
) -> Iterator[tuple[Tensor, ...]]:
    """Rows of a data set on a device, read by so many processes."""
    loader = DataLoader(
        data,
        batch_sampler=(part.tolist() for part in parts),
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=device.type == "cuda",
        # Of its own, for a loader draws a seed for its workers from the global one.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    return (tuple(x.to(device, non_blocking=True) for x in batch) for batch in loader)


def _collated(items: list[Any]) -> tuple[Tensor, ...]:
    try:
        batch = default_collate(items)
    except RuntimeError as error:
        shapes = [*dict.fromkeys(_shape(item) for item in items)]
        if len(shapes) == 1:
            raise
        raise ValueError(
            f"the rows of the data have different shapes, such as {shapes[0]} and {shapes[1]}; give a Dataset whose "
            "rows all have one, cropped, resized or padded to it"
        ) from error
    parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else ()
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "expected a Dataset whose items are tensors or tuples of tensors and numbers, got "
            f"{type(items[0]).__name__}; wrap it in one that gives such items"
        )
    return parts


def _shape(item: Any) -> tuple[Any, ...]:
    return tuple(map(_shape, item)) if isinstance(item, (tuple, list)) else tuple(getattr(item, "shape", ()))


def as_batch(data: Tensor | Sequence[Tensor], device: torch.device | None = None) -> tuple[Tensor, ...]:
    """A tensor or tensors as a program's arguments: the first, the observations, as floats, the others as they are."""
    first, *others = (data,) if isinstance(data, Tensor) else tuple(data)
    return tuple(x.to(device) for x in (as_float(first), *others))


def training_and_validation(data: Any, batch_size: int, seed: int) -> tuple[Batches, Batches | None]:
    """Minibatches for training, and for validation where the data have rows for it.

    Raises:
        TypeError: If the data are of no known kind.
        ValueError: If they are empty, of unequal lengths, or hold NaN or infinity.
    """
    validation = None
    rows: tuple[Tensor, ...] | Dataset
    if isinstance(data, Data):
        rows, validation = (data.train,), Batches((data.validation,), None, batch_size, seed)
        check_data((data.validation,))
    elif isinstance(data, Tensor):
        rows = (data,)
    elif isinstance(data, TensorDataset):
        rows = data.tensors
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
    if isinstance(data, Data) and data.binarize == "dynamic":
        _check_probabilities(data.train)
    return Batches(rows, data, batch_size, seed), validation


def check_data(rows: tuple[Tensor, ...] | Dataset) -> None:
    """Raise a ``ValueError`` for empty, unequal or non-finite data."""
    if isinstance(rows, tuple):
        check_are(tuple[Tensor, ...], data=rows)
    if isinstance(rows, tuple) and any(x.dim() == 0 for x in rows):
        raise ValueError("expected data of shape (N, *event_shape), got a single number; use x.reshape(1)")
    lengths = {len(x) for x in rows} if isinstance(rows, tuple) else {len(rows)}  # type: ignore[arg-type]
    if len(lengths) > 1:
        raise ValueError(f"the tensors of the data have different lengths {sorted(lengths)}; they must share one")
    if lengths == {0} or (isinstance(rows, tuple) and not rows[0].numel()):
        raise ValueError("the data are empty; expected at least one row, and one value in it")
    if not isinstance(rows, tuple):
        return
    for position, x in enumerate(rows):
        if x.is_floating_point():
            for start, chunk in enumerate(x.split(CHUNK)):
                check_finite(chunk, position, start * CHUNK)


def check_finite(x: Tensor, position: int, start: int) -> None:
    """Raise a ``ValueError`` that names the first row with NaN or infinity, counted from ``start``."""
    finite = torch.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise ValueError(
            f"the data hold NaN or infinity, first in row {row} of tensor {position}; remove or impute "
            "such rows before training"
        )


def _check_probabilities(rows: Tensor) -> None:
    low, high = (float(x) for x in (rows.min(), rows.max()))
    if rows.is_floating_point() and not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected pixels in [0, 1] to draw binary images from, got values from {low:.4g} to {high:.4g}; scale "
            "them, or use data that are not binarised"
        )

"""A bound on memory and time that a run may take to be built, since a few words of ``run.yaml`` can ask for any."""

import math
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyrogen.data.limits import size_in_words

__all__ = ["Allowance"]

_LEAST = 2**14
"""Bytes that a tensor counts for at least, for what is around it takes memory and time."""
_CALL = 100
"""Bytes that a call of a function, or the end of one, counts for: it takes time, and may leave objects behind."""


class Allowance(TorchDispatchMode):
    """Within, tensors take no more than so many bytes at a time; what would take more is refused before it is made.

    What an operation gives is foretold by the same operation on tensors without memory, wherever that can be much. What
    makes no tensors, such as copies of a module without weights, ends after a hundredth as many calls of functions; not
    so while a profiler runs, which then counts these itself.

    Args:
        most: So many bytes.
        what: What is being built, for the message.

    Example:
        >>> with Allowance(1_000_000, "the model"):
        ...     torch.nn.Linear(10_000, 10_000)
        Traceback (most recent call last):
        ValueError: the model takes over 1 MB, far more ...
    """

    def __init__(self, most: int, what: str) -> None:
        super().__init__()
        self.most, self.what = most, what
        self.taken = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls, self.counting = 0, False
        self.refusal: ValueError | None = None

    def __enter__(self) -> "Allowance":
        super().__enter__()
        self.refusal = None
        self.counting = sys.getprofile() is None
        if self.counting:
            sys.setprofile(self._count)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if self.counting:
            sys.setprofile(None)
        super().__exit__(kind, *error)
        if self.refusal is not None and kind is None:  # what was being built has caught it
            raise self.refusal

    def _count(self, *event: Any) -> None:
        self.calls += 1
        if self.calls * _CALL > self.most:
            self._refuse(f"{self.calls - 1} calls of functions")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not self.counting:
            return self._done(func, args, dict(kwargs or {}))
        if self.refusal is not None:
            raise self.refusal
        sys.setprofile(None)  # what follows is this method's own, and slow when counted
        try:
            return self._done(func, args, dict(kwargs or {}))
        finally:
            sys.setprofile(self._count)

    def _done(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operation gives, if there is room."""
        self._make_room(_foretold(func, args, kwargs, self.most))
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            known = self.storages.get(storage._cdata)
            if known is None or known[0].expired():
                taken = max(storage.nbytes(), _LEAST)
                self._make_room(taken)
                self.taken += taken - (0 if known is None else known[1])
                self.storages[storage._cdata] = StorageWeakRef(storage), taken
        return result

    def _make_room(self, wanted: int) -> None:
        """Forget tensors that are no more, if there is need, and raise a ``ValueError`` if that does not do."""
        if self.taken + wanted > self.most:
            self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
            self.taken = sum(taken for _, taken in self.storages.values())
        if self.taken + wanted > self.most:
            self._refuse(size_in_words(self.most))

    def _refuse(self, most: str) -> NoReturn:
        self.refusal = ValueError(
            f"{self.what} takes over {most}, far more than its weights; it is damaged, or made to exhaust memory. If "
            "it is right, pass trust=True (--trust on the command line)"
        )
        raise self.refusal


def _foretold(func: Any, args: Any, kwargs: dict[str, Any], most: int) -> int:
    """Bytes that an operation would take, 0 where that is little or can't be told."""
    leaves = tree_leaves((args, kwargs))
    tensors, numbers = [*_tensors(leaves)], [abs(n) for n in leaves if isinstance(n, (int, float)) and n]
    if tensors and math.prod(tensor.numel() for tensor in tensors) * math.prod(max(n, 1) for n in numbers) < most / 16:
        return 0

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    if not tensors:
        kwargs = kwargs | {"device": "meta"}
    try:
        given, named = tree_map(bare, (args, kwargs | {"generator": None} if "generator" in kwargs else kwargs))
        result = func(*given, **named)
    except Exception:  # of operations that need values, or take no device
        return 0
    storages = {storage._cdata: storage.nbytes() for storage in (each.untyped_storage() for each in _tensors(result))}
    return sum(storages.values())


def _tensors(values: Any) -> Any:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

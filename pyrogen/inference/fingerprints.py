"""Fingerprints, by which data and programs are told from others, when a training shall go on or a run is loaded."""

import ast
import contextlib
import hashlib
import inspect
import random
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pyrogen.inference.checkpoints import bytes_of
from pyrogen.inference.programs import prototype, sample_sites
from pyrogen.inference.turns import seeded

__all__ = ["fingerprint", "sites_of", "source_of"]

ITEMS = 16
"""How many items of a data set are looked at."""
NOT_OF_USERS = {"pyrogen", "pyro", "torch", *sys.stdlib_module_names}
"""Packages whose code the versions in ``run.yaml`` stand for."""


def fingerprint(data: tuple[Tensor, ...] | Dataset) -> str:
    """A SHA-256 of data: of tensors all rows with their types and shapes, of a data set less.

    Of a torch ``Dataset`` it sees the length and 16 items, from the first to the last in equal steps; what changes in
    the others goes unnoticed. Where items differ from one reading to the next, since a generator of their own draws
    them, types and shapes count alone.
    """
    if isinstance(data, tuple):
        return _hash(data)
    count: int = len(data)  # type: ignore[arg-type]
    positions = sorted({index * (count - 1) // (ITEMS - 1) for index in range(ITEMS)})
    items, again = ([_item(data, position) for position in positions] for _ in range(2))
    kinds = [[_kind_of(x) for x in item] for item in items]
    hashes = [_hash(item) for item in items]
    same = hashes == [_hash(item) for item in again]
    return hashlib.sha256(repr((count, kinds, hashes if same else None)).encode()).hexdigest()


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(_kind_of(x).encode())
        for part in bytes_of(x):
            digest.update(part)
    return digest.hexdigest()


def _kind_of(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def _item(data: Dataset, position: int) -> list[Tensor]:
    """An item's tensors, as the same random state gives them each time."""
    kept = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        with seeded(0, torch.device("cpu")):
            item = default_collate([data[position]])
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    return [x for x in ([item] if isinstance(item, Tensor) else item) if isinstance(x, Tensor)]


def sites_of(program: Callable | None, *batch: Tensor) -> dict[str, str]:
    """Of each site of a program the kind of its distribution, its event shape, whether it is observed, its plates.

    Example:
        >>> from pyrogen.models import ProbabilisticPCA
        >>> sites_of(ProbabilisticPCA(2, 5), torch.zeros(3, 5))["z"]
        'SafeNormal (2,) in data'
    """
    if program is None:
        return {}
    with seeded(0, batch[0].device):
        trace = prototype(program, *batch)
    return {name: _described(node) for name, node in sample_sites(trace).items()}


def _described(node: dict[str, Any]) -> str:
    base = node["fn"]
    while type(base).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        base = base.base_dist
    plates = " ".join(["", "in", *(frame.name for frame in node["cond_indep_stack"])])
    observed = ", observed" if node["is_observed"] else ""
    return f"{type(base).__name__} {tuple(node['fn'].event_shape)}{plates}{observed}"


def source_of(parts: Iterable[Any]) -> dict[str, str]:
    """A hash of the source of each class and function that parts are made of, by its name.

    Among them are those that a class extends, and those of the same file to which they refer by name; pyrogen, Pyro,
    torch and Python itself are not. Comments and layout do not count. What has no source of its own, as a lambda or
    what was typed at a prompt, is left out, and so are values that are defined outside of functions.
    """
    found: dict[str, str] = {}
    waiting, seen = [*parts], set()
    while waiting:
        part = waiting.pop()
        part = part.func if isinstance(part, partial) else getattr(part, "__func__", part)
        part = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
        if part in seen:
            continue
        seen.add(part)
        waiting += getattr(part, "__bases__", ())  # as PyroModule[Net], which is Pyro's, has the user's own
        if (part.__module__ or "").partition(".")[0] in NOT_OF_USERS:
            continue
        values = [part] if inspect.isfunction(part) else vars(part).values()
        waiting += [each for value in values for one in _functions_of(value) for each in _referred_to(one)]
        with contextlib.suppress(OSError, TypeError, SyntaxError, tokenize.TokenError):
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            if "<lambda>" not in part.__qualname__:
                found[part.__qualname__] = hashlib.sha256(_plain(tree).encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def _plain(node: Any) -> str:
    """A syntax tree as text, the same in every version of Python: a later one may add fields, which are empty then."""
    if isinstance(node, list):
        return f"[{' '.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    literal = isinstance(node, ast.Constant)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value or (literal and name == "value")]
    return f"{type(node).__name__}({' '.join(f'{name}={_plain(value)}' for name, value in fields)})"


def _functions_of(value: Any) -> list[Any]:
    """The functions that something in a class is made of, be it a method, a property or wrapped."""
    parts = [value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "func", "__wrapped__"))]
    return [*filter(inspect.isfunction, parts)]


def _referred_to(function: Any) -> list[Any]:
    values = [function.__globals__.get(name) for name in _names_in(function.__code__)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # what it refers to is not there yet
            values.append(cell.cell_contents)
    ours = [each for each in values if inspect.isclass(each) or inspect.isfunction(each)]
    return [each for each in ours if each.__module__ == function.__module__]


def _names_in(code: CodeType) -> Iterator[str]:
    """The names in a function's code, and in what is defined within, as comprehensions are."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names_in(part)

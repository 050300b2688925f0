"""What public functions and classes are given is checked in one place, by their annotations, before they run."""

import functools
import inspect
import math
import numbers
import operator
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "LARGEST",
    "as_device",
    "as_weight",
    "check_are",
    "check_counts",
    "check_positive",
    "checked",
    "in_words",
    "is_finite",
    "is_whole",
    "plain",
    "plain_as",
    "shown",
]

LARGEST = 2**31 - 1
"""The largest size, count or number of steps: what is beyond is a slip, and fits no memory or lifetime."""

T = TypeVar("T", bound=Callable)


def checked(*, but: Sequence[str] = ()) -> Callable[[T], T]:
    """Have a function, or the making of a class, see that its arguments are what its annotations say.

    A ``float`` is a finite number, an ``int`` a whole one of 64 bits, and a tensor one of real numbers that has memory.
    Numbers of numpy and torch come to the function as Python's own, arrays and iterators where it expects a sequence
    as tuples. What no annotation says, such as a narrower range, the function checks itself. It costs some 10 µs a
    call: for what is called once, not within a step.

    Args:
        but: Arguments that are left to the function.

    Raises:
        ValueError: For an argument that is something else, by its name; if memory runs out.

    Example:
        >>> @checked()
        ... def draw(count: int) -> None: ...
        >>> draw(2.5)
        Traceback (most recent call last):
        ValueError: draw: count must be a whole number of less than 2**63, got 2.5
    """

    def decorated(thing: Any) -> Any:
        if not isinstance(thing, type):
            return _checked(thing, thing.__name__, but)
        thing.__init__ = _checked(thing.__init__, thing.__name__, but)  # type: ignore[misc]
        return thing

    return decorated


def _checked(function: Callable, name: str, but: Sequence[str]) -> Callable:
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:  # when it is first called, for names of other modules may be missing before
        known = get_type_hints(function)
        return {key: known[key] for key in signature.parameters if key in known and key not in but}

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says it better
        for key, hint in hints().items():
            if key not in bound.arguments or bound.arguments[key] is signature.parameters[key].default:
                continue
            value = bound.arguments[key] = plain_as(bound.arguments[key], hint)
            if not _fits(value, hint):
                raise ValueError(f"{name}: {key} must be {in_words(hint)}, got {shown(value)}")
        try:
            return function(*bound.args, **bound.kwargs)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise ValueError(
                f"{name} takes more memory than there is; give smaller sizes or fewer rows ({error})"
            ) from error

    return checking


def plain(value: Any) -> Any:
    """A number of numpy or torch, or what else stands for a whole one, as Python's own; anything else as it is."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value if value.ndim or (isinstance(value, Tensor) and not _is_dense(value)) else value.item()
    return operator.index(value) if hasattr(type(value), "__index__") and not isinstance(value, int) else value


def as_weight(value: Any) -> Any:
    """A weight of an objective as Python's own number; a tensor as it is, for it may be learned or change in place."""
    return value if isinstance(value, Tensor) else plain(value)


def plain_as(value: Any, hint: Any) -> Any:
    """What an argument is given, plain where its annotation asks for numbers or a sequence."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if isinstance(value, Tensor) and Tensor in inner:
            return value
        return next((made for each in inner if (made := plain_as(value, each)) is not value), value)
    if hint in (int, float, bool):
        return plain(value)
    if origin not in (tuple, list, Sequence) or not _many(value, inner[0]):
        return value
    value = value if isinstance(value, Sequence) else tuple(value)
    if inner[0] not in (int, float) or all(type(each) in (int, float) for each in value):
        return value
    return tuple(map(plain, value))


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(isinstance(value, type(each)) and value == each for each in inner)
    if origin in (type, Callable) or hint is Callable:
        return callable(value)
    if origin in (tuple, list, Sequence):
        many = _many(value, inner[0]) and isinstance(value, Sized)
        if inner[0] is int:
            return many and all(is_whole(each) and 1 <= each <= LARGEST for each in value)
        of = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value) if many else ()
        return many and len(value) == len(of) and all(map(_fits, value, of))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(each, inner[1]) for key, each in value.items()
        )
    kind = origin or hint
    if kind in _KINDS:
        return _KINDS[kind][0](value)
    plain = isinstance(kind, type) and not getattr(kind, "_is_protocol", False)
    return isinstance(value, kind) if plain else True


def _many(value: Any, of: Any) -> bool:
    """Whether these are several things, of numbers in an array too."""
    if isinstance(value, Tensor):
        return of in (int, float) and value.ndim == 1 and _is_dense(value)
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, nn.Module))
    return several and getattr(value, "ndim", 1) == 1


def is_whole(value: Any) -> bool:
    """Whether something is a whole number that fits in 64 bits, be it of numpy or torch."""
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value: Any) -> bool:
    """Whether something is a finite number, be it of numpy or torch."""
    value = plain(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return abs(value) < 10**308 if isinstance(value, int) else math.isfinite(value)


def _is_dense(value: Any) -> bool:
    # An expanded tensor can have more values than any memory, and would be gone through forever.
    here = isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided
    return here and not value.is_complex() and value.numel() < 2**40


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, PathLike)) and "\0" not in str(value)


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (is_whole, "a whole number of less than 2**63"),
    float: (is_finite, "a finite number"),
    str: (lambda value: isinstance(value, str) and _is_path(value), "a text"),
    Path: (lambda value: isinstance(value, PathLike) and _is_path(value), "a path"),
    PathLike: (_is_path, "a path"),
    bool: (lambda value: isinstance(plain(value), bool), "True or False"),
    Any: (lambda value: True, "anything"),
    types.NoneType: (lambda value: value is None, "None"),
    Tensor: (_is_dense, "a dense tensor of real numbers in memory, fewer than 2**40"),
    nn.Module: (lambda value: isinstance(value, nn.Module), "a module"),
}
"""How to tell things of plain kinds, and what they are called."""


def in_words(hint: Any) -> str:
    """What an annotation asks for, for a message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if origin is Literal:
        return f"one of {[*inner]}"
    if origin in (type, Callable) or hint is Callable:
        return "a class" if origin is type else "a function"
    if origin in (tuple, list, Sequence):
        if inner[0] is int:
            return f"a sequence of sizes (a size must be positive and at most {LARGEST})"
        return f"a sequence with each {in_words(inner[0])}"
    if origin in (dict, Mapping):
        return f"a dictionary from {in_words(inner[0])} to {in_words(inner[1])}"
    kind = origin or hint
    return _KINDS[kind][1] if kind in _KINDS else f"a {getattr(kind, '__name__', kind)}"


def check_counts(*, or_none: bool = False, least: int = 1, **values: int | None) -> None:
    """Raise a ``ValueError`` for a number that is no whole one of at least 1, say, by its name."""
    for name, value in values.items():
        if not ((is_whole(value) and least <= int(value) <= LARGEST) or (or_none and value is None)):  # type: ignore[arg-type]
            most = f" and at most {LARGEST}" if is_finite(value) and value > LARGEST else ""  # type: ignore[operator]
            raise ValueError(f"{name} must be a whole number of at least {least}{most}, got {shown(value)}")


def check_positive(*, or_none: bool = False, **values: float | None) -> None:
    """Raise a ``ValueError`` for a number that is not above 0 and finite, by its name."""
    for name, value in values.items():
        if not ((is_finite(value) and value > 0) or (or_none and value is None)):  # type: ignore[operator]
            raise ValueError(f"{name} must be a positive number, got {shown(value)}")


def check_are(kind: Any, **values: Any) -> None:
    """Raise a ``ValueError`` for what is not of a plain kind, such as ``float`` for a finite number, by its name."""
    for name, value in values.items():
        if not _fits(value, kind):
            raise ValueError(f"{name} must be {in_words(kind)}, got {shown(value)}")


def as_device(device: torch.device | str) -> torch.device:
    """A device by its name, or a ``ValueError``."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {shown(device)}") from error


def shown(value: Any) -> str:
    """A value in a few words, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.layout}, on {value.device}"
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else reprlib.repr(value)

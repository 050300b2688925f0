"""Arrays in a numpy file."""

import math
import reprlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as header
from torch import Tensor

from pyrogen.data.dataset import Data, Values
from pyrogen.data.limits import check_claim, check_member, size_in_words
from pyrogen.data.splits import hold_out

__all__ = ["array"]

_SPLITS = ("train", "validation", "test")
_KEYS = (*_SPLITS, *(f"{split}_labels" for split in _SPLITS))
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def array(path: Path, seed: int) -> Data:
    """Arrays in an ``.npz`` file, as ``numpy.savez`` writes them.

    Keys: ``train``, shape (N, *event_shape), and optionally ``validation`` and ``test``; each of these that
    is missing is a random tenth of the training rows. Labels, if any: ``train_labels``,
    ``validation_labels``, ``test_labels``. The type says what values are: ``uint8`` 8-bit levels, ``bool``
    binary, floats the unit interval if all lie in [0, 1], otherwise real. Floats are kept as ``float32``.
    Pickled objects are never loaded, and no array that its file can't stand for, see :mod:`pyrogen.data.limits`.

    Args:
        path: The file.
        seed: The seed of the split.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or what it holds cannot be used.
    """
    arrays = _read(path)
    rows = {split: _rows(path, split, arrays[split]) for split in _SPLITS if split in arrays}
    labels = {split: _labels(path, split, arrays.get(f"{split}_labels"), rows.get(split)) for split in _SPLITS}
    values = _values(path, rows)
    missing = [split for split in _SPLITS if split not in rows]
    if missing:
        everything, every_label = rows["train"], labels["train"]
        try:
            pieces = hold_out(len(everything), parts=len(missing), seed=seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error} in train; add rows, or the arrays validation and test") from None
        for split, piece in zip(["train", *missing], pieces, strict=True):
            rows[split] = everything[piece]
            labels[split] = None if every_label is None else every_label[piece]
    return Data(
        f"array:{path}",
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        values=values,
        levels=256 if values == "levels" else None,
        train_labels=labels["train"],
        validation_labels=labels["validation"],
        test_labels=labels["test"],
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"expected a numpy .npz file at {path}, found nothing; check the path")
    try:
        if not (path.is_file() and zipfile.is_zipfile(path)):
            raise ValueError("a single array or a file cut short, not an .npz of named arrays")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if "train" in members and members.keys() <= {*_KEYS}:
                claimed = sum(info.file_size for info in members.values())
                check_claim(claimed, path.stat().st_size, "its arrays", "write them without compression")
                return {key: _array(archive, info) for key, info in members.items()}
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as plain arrays ({type(error).__name__}: {error}); write it with "
            f"np.savez({path.name!r}, train=...) from arrays of bool, uint8 or floats, not of objects"
        ) from error
    if "train" not in members:
        raise ValueError(
            f"{path}: expected an array named train, found {reprlib.repr(sorted(members))}; save it with that name"
        )
    unknown = reprlib.repr(sorted(members.keys() - {*_KEYS}))
    raise ValueError(f"{path}: expected only arrays named {list(_KEYS)}, found also {unknown}; rename or remove")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of an archive, if there is as much of it as its header says."""
    check_member(info)
    with archive.open(info) as stream:
        read_header = {(1, 0): header.read_array_header_1_0, (2, 0): header.read_array_header_2_0}
        shape, _, dtype = read_header[header.read_magic(stream)](stream)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > info.file_size:
        raise ValueError(f"{info.filename} declares {size_in_words(claimed)} and holds {size_in_words(info.file_size)}")
    with archive.open(info) as stream:
        return header.read_array(stream, allow_pickle=False)


def _rows(path: Path, split: str, values: np.ndarray) -> Tensor:
    if values.ndim < 2 or values.size == 0:
        raise ValueError(
            f"{path}: expected {split} to have the shape (rows, *event_shape) with at least one row and one "
            f"value, got {values.shape}; reshape numbers to (rows, 1)"
        )
    if values.dtype in (np.uint8, np.bool_):
        return torch.from_numpy(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{path}: expected {split} to hold bool, uint8 or floats, got {values.dtype}; use "
            f"astype(np.uint8) for 8-bit levels, astype(bool) for binary data, or astype(np.float32) for "
            f"real values"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        rows = torch.from_numpy(values.astype(np.float32))
    bad = int((~rows.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{path}: expected {split} to be finite, but {bad} of {rows.numel()} values are NaN or infinite "
            f"(or too large for float32); remove or replace them"
        )
    return rows


def _labels(path: Path, split: str, labels: np.ndarray | None, rows: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    if rows is None:
        raise ValueError(f"{path}: found {split}_labels but no {split}; add the array or remove its labels")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"{path}: expected {split}_labels to be integers of shape ({len(rows)},), one a row, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _values(path: Path, rows: dict[str, Tensor]) -> Values:
    types = {split: str(x.dtype).removeprefix("torch.") for split, x in rows.items()}
    shapes = {split: tuple(x.shape[1:]) for split, x in rows.items()}
    if len(set(types.values())) > 1:
        raise ValueError(f"{path}: expected one type in all splits, got {types}; convert them with astype")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: expected one event shape in all splits, got {shapes}; reshape them")
    match types["train"]:
        case "bool":
            return "binary"
        case "uint8":
            return "levels"
    return "unit interval" if all(x.min() >= 0 and x.max() <= 1 for x in rows.values()) else "real"

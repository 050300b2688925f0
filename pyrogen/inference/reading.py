"""What the files of a run hold, once they are seen to belong together."""

import contextlib
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from pyrogen.data.limits import TABLE, parse_table, parse_yaml, read_bytes, read_text
from pyrogen.inference.checkpoints import is_whole, read_tensors
from pyrogen.inference.folders import CHECKPOINT, HISTORY, SETTINGS, WEIGHTS
from pyrogen.inference.migration import format_of, settings_of_1

__all__ = ["INACTIVE_UNITS", "read_files", "read_history"]

INACTIVE_UNITS = "inactive_units"
"""The one column of a history that is text."""


def read_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], pd.DataFrame]:
    """Weights, settings and history of a run, once its files are seen to belong together.

    Raises:
        ValueError: If a file is missing, damaged, of a later format or not of the run that the others are of.
    """
    path = folder / WEIGHTS
    mend = "is whole: the same fit with resume=True (--resume) writes it again"
    if not path.is_file():
        if is_whole(folder / CHECKPOINT):
            raise ValueError(f"{folder} has no {WEIGHTS}, but {CHECKPOINT} {mend}")
        holds = "has" if (folder / SETTINGS).is_file() else "holds no run: there is"
        raise ValueError(f"{folder} {holds} no {WEIGHTS}; give the folder of a fit that has come to a checkpoint")
    before = path.stat()
    try:
        tensors, values = read_tensors(path)
    except ValueError as error:
        if not is_whole(folder / CHECKPOINT):
            raise
        raise ValueError(f"{path} is damaged, but {CHECKPOINT} beside it {mend}") from error
    number = format_of(values, path)
    try:
        read = _text_of if number > 1 else _text_of_1
        texts = {name: read(folder / name, values) for name in (SETTINGS, HISTORY)}
    except ValueError:
        if (path.stat().st_ino, path.stat().st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
            return read_files(folder)  # a fit under way has written meanwhile
        raise
    return tensors, _read_settings(texts[SETTINGS], folder / SETTINGS, number), read_history(texts[HISTORY], folder)


def _text_of(path: Path, values: dict[str, Any]) -> str:
    """What weights say that a file beside them holds, once this is seen to be so if the file is there."""
    texts = values.get("files")
    text = texts.get(path.name) if isinstance(texts, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path.parent / WEIGHTS} is damaged: it lacks {path.name}; restore it from a copy")
    with contextlib.suppress(FileNotFoundError):
        if not _says(path, text):
            raise ValueError(
                f"{path} and {WEIGHTS} beside it are not of one run: one was changed, cut short or taken from another. "
                f"Restore them from a copy; or if the weights are right, delete {path.name}, which they hold too"
            )
    return text


def _says(path: Path, text: str) -> bool:
    """Whether a file says what a text does, be it with other ends of lines or quotes, as an editor may write it."""
    if (content := read_bytes(path, TABLE)) == text.encode():
        return True
    parse = parse_yaml if path.name == SETTINGS else lambda text: read_history(text, path.parent).to_dict("list")
    try:
        # As text, for NaN does not equal itself, and 1 equals True.
        return repr(parse(content.decode("utf-8-sig"))) == repr(parse(text))
    except (ValueError, RecursionError):
        return False


def _text_of_1(path: Path, values: dict[str, Any]) -> str:
    """The same of the first format, whose weights hold nothing else."""
    try:
        return read_text(path, TABLE)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; restore it from a copy") from error


def _read_settings(text: str, path: Path, number: int) -> dict[str, Any]:
    """The contents of a ``run.yaml``."""
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(settings, dict) or settings.get("format") not in range(1, number + 1):
        raise ValueError(f"{path} is damaged, or not of format {number} as {WEIGHTS} beside it; restore it from a copy")
    settings = settings_of_1(settings)
    needed = {"model", "guide", "objective", "options", "example", "data", "seconds"}
    lacking = sorted(needed - settings.keys()) or [
        name for name in ("options", "source") if not isinstance(settings[name], dict)
    ]
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {lacking}; restore it from a copy")
    return settings


def _number(name: str, text: str) -> float:
    return int(text) if name in ("epoch", "step") else float(text or "nan")


def read_history(text: str, folder: Path) -> pd.DataFrame:
    """The table in the text of a folder's ``history.csv``.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        table = pd.read_csv(parse_table(text), dtype=str, keep_default_na=False)
        # Python's own float reads exactly what was written; pandas' default, in older versions, nearly.
        return pd.DataFrame(
            {
                name: [*column] if name == INACTIVE_UNITS else [_number(str(name), x) for x in column]
                for name, column in table.items()
            }
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except ValueError as error:
        raise ValueError(f"{folder / HISTORY} is damaged ({error}); restore it from a copy") from error

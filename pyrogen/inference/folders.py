"""Output folders: what a run's files are called, which folders may be written, and by one process at a time."""

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pyrogen.inference.checkpoints import WriteError, leftovers

__all__ = [
    "CHECKPOINT",
    "COMPARISON",
    "CONFIGURATION",
    "HISTORY",
    "LOCK",
    "SETTINGS",
    "WEIGHTS",
    "OutputExistsError",
    "clear_folder",
    "contents",
    "held",
    "is_run",
    "locked",
    "prepare_folder",
]

WEIGHTS = "weights.safetensors"
SETTINGS = "run.yaml"
HISTORY = "history.csv"
CHECKPOINT = "checkpoint.safetensors"
COMPARISON = "compare.yaml"
CONFIGURATION = "fit.yaml"
LOCK = ".lock"


class OutputExistsError(FileExistsError, ValueError):
    """An output folder that holds something and was not to be overwritten, or that another process writes."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what a fit has begun."""
    return any((folder / name).is_file() for name in (WEIGHTS, SETTINGS, CHECKPOINT))


def prepare_folder(out: str | Path, *, overwrite: bool, resume: bool = False) -> Path:
    """See that an output folder may be written; nothing in it changes until ``overwrite`` clears an earlier run.

    Raises:
        OutputExistsError: If it holds something and neither ``overwrite`` nor ``resume`` was asked for, if what it
            holds was left by no run, or if another process writes there.
        WriteError: If the user may not write there.
    """
    folder = Path(out)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"{folder} could not be written: {there} is read-only. Give a folder in which you may write")
    if (folder / LOCK).is_file():
        with locked(folder):
            pass
    _check_contents(folder, overwrite=overwrite, resume=resume)
    return folder


def _check_contents(folder: Path, *, overwrite: bool, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; give the path of a folder")
    if not contents(folder):
        return
    if not (overwrite or resume):
        raise OutputExistsError(
            f"the folder {folder} exists and is not empty; give another, resume the run in it (resume=True, "
            "--resume), or replace it (overwrite=True, --overwrite)"
        )
    if not is_run(folder) and not (folder / COMPARISON).is_file():
        raise OutputExistsError(
            f"{folder} holds no run of pyrogen's, so nothing in it is resumed or overwritten; empty it yourself, or "
            "give another folder"
        )


def contents(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock and for what killed writers have left."""
    if not folder.exists():
        return []
    return sorted({*folder.iterdir()} - {folder / LOCK, *leftovers(folder)})


@contextlib.contextmanager
def held(folder: Path, *, overwrite: bool, resume: bool = False) -> Iterator[None]:
    """Within, no other fit, comparison or ``save`` writes to a folder, which is made if need be.

    What killed writers have left in it is removed.

    Raises:
        OutputExistsError, WriteError: As :func:`prepare_folder`, which may have looked before another process wrote.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError.of(folder, error) from error
    with locked(folder):
        _check_contents(folder, overwrite=overwrite, resume=resume)
        for path in leftovers(folder):
            path.unlink()
        yield


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 1.0) -> Iterator[None]:
    """Within, no other process writes to a folder that is there.

    The lock is the operating system's, so it ends with its process, however that ends. Its file ``.lock`` stays, for
    who waits for it might else hold a file that nobody else finds, and says who has it.

    Args:
        folder: The folder.
        timeout: How many seconds to wait for another, who may just be noting something.

    Raises:
        OutputExistsError: If another holds it all that time.
        WriteError: If the user may not write there, or the disk knows no locks.
    """
    path = folder / LOCK
    # The soft lock that the library would fall back to outlives a process that is killed.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except Timeout as error:
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_text(encoding="utf-8", errors="replace")
        raise OutputExistsError(
            f"{folder} is being written by another fit, comparison or save ({holder or 'of a process unknown'}); wait "
            "until it ends, or give another folder"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise WriteError(
                f"{path} could not be locked: {error.strerror}. Give a folder on a disk that knows locks, for without "
                "them two processes could write there at once"
            ) from error
        raise WriteError.of(path, error) from error
    try:
        _say(path, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        _say(path, "")
        lock.release()


def _say(path: Path, who: str) -> None:
    with contextlib.suppress(OSError):  # it only serves the message
        path.write_text(who, encoding="utf-8")


def clear_folder(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete an earlier run or comparison, once :func:`prepare_folder` has allowed it and all else was checked.

    The files by which it is known go last: a clearing cut short leaves the run, or can be begun again.
    """
    last = [CHECKPOINT, WEIGHTS, HISTORY, SETTINGS, COMPARISON]
    for path in sorted(contents(folder), key=lambda path: last.index(path.name) if path.name in last else -1):
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""Output folders: what a run's files are called, which folders may be written, and by one process at a time."""

import contextlib
import errno
import os
import platform
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from pyrogen.arguments import shown
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
    "check_length",
    "clear_folder",
    "contents",
    "held",
    "is_run",
    "locked",
    "of_a_comparison",
    "prepare_folder",
]

WEIGHTS = "weights.safetensors"
SETTINGS = "run.yaml"
HISTORY = "history.csv"
CHECKPOINT = "checkpoint.safetensors"
COMPARISON = "compare.yaml"
CONFIGURATION = "fit.yaml"
LOCK = ".lock"

_OF_A_REPORT = ("report.html", "report.md", "figures/all-fits/*.png", "figures/fit-*/*.png")
_OF_A_FIT = (
    *("logs/events.out.tfevents.*", "figures.yaml", "evaluation.yaml", "error.txt", "samples.png", "samples.npz"),
    *_OF_A_REPORT,
    *(CONFIGURATION, CHECKPOINT, WEIGHTS, HISTORY, SETTINGS),
)
_OF_A_COMPARISON = (
    *("table.csv", "posteriors.nc"),
    *(f"figures/{name}.png" for name in ("samples", "reconstructions", "curves", "critics", "latents", "comparison")),
    *_OF_A_REPORT,
    COMPARISON,
)
"""All that is written into the folders of fits and comparisons; that by which one is known goes last."""


_of_a_comparison: ContextVar[bool] = ContextVar("of_a_comparison", default=False)


class OutputExistsError(FileExistsError, ValueError):
    """An output folder that holds something and was not to be overwritten, or that another process writes."""


def check_length(path: str | Path, name: str) -> Path:
    """A path of a file or a folder, once it is seen to be one that the file system takes, and for files in it too.

    Raises:
        ValueError: If it is none, or too long, by the name of the argument.
    """
    path = Path(path)
    try:
        os.lstat(path / f".{CHECKPOINT}-{'0' * 16}")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {str(path)!r} holds characters that no name of a file can have") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{name}: {shown(str(path))}, of {len(str(path))} characters, is too long a name or path for the file "
                "system; give a shorter one"
            ) from error
    return path


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what a fit has begun."""
    return any((folder / name).is_file() for name in (WEIGHTS, SETTINGS, CHECKPOINT))


def prepare_folder(out: str | Path, *, overwrite: bool, resume: bool = False, comparison: bool = False) -> Path:
    """See that an output folder may be written; nothing in it changes until ``overwrite`` clears an earlier run.

    Raises:
        OutputExistsError: If it holds something and neither ``overwrite`` nor ``resume`` was asked for, if what it
            holds was left by no run, or by a comparison where a fit shall go, or the other way round; if it lies in a
            comparison and is for none of its fits, nor to go on with one; or if another process writes there.
        ValueError: If the path is too long.
        WriteError: If the user may not write there.
    """
    folder = check_length(out, "out (--out)")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"{folder} could not be written: {there} is read-only. Give a folder in which you may write")
    if (folder / LOCK).is_file():
        with locked(folder):
            pass
    _check_contents(folder, overwrite=overwrite, resume=resume, comparison=comparison)
    return folder


def _check_contents(folder: Path, *, overwrite: bool, resume: bool, comparison: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; give the path of a folder")
    there = contents(folder)
    compared = (folder / COMPARISON).is_file()
    if compared and not comparison:
        raise OutputExistsError(f"{folder} holds a comparison, not a fit; give another folder (out=, --out)")
    if is_run(folder) and comparison and not compared:
        raise OutputExistsError(f"{folder} holds a fit, not a comparison; give another folder (out=, --out)")
    goes_on = resume and is_run(folder)
    if (folder.parent / COMPARISON).is_file() and not (_of_a_comparison.get() or goes_on):
        raise OutputExistsError(
            f"{folder} lies in a comparison, which is for its own fits alone; give a folder elsewhere (out=, --out)"
        )
    # Of a comparison's fit that was cleared, what the user has put there is left.
    if not there or (_of_a_comparison.get() and not [*_own(folder)]):
        return
    if not (overwrite or resume):
        raise OutputExistsError(
            f"the folder {folder} exists and is not empty; give another, resume the run in it (resume=True, "
            "--resume), or replace it (overwrite=True, --overwrite)"
        )
    if not is_run(folder) and not compared:
        raise OutputExistsError(
            f"{folder} holds no run of pyrogen's, so nothing in it is resumed or overwritten; empty it yourself, or "
            "give another folder"
        )


@contextlib.contextmanager
def of_a_comparison() -> Iterator[None]:
    """Within, what is written to a folder is a comparison's fit."""
    token = _of_a_comparison.set(True)
    try:
        yield
    finally:
        _of_a_comparison.reset(token)


def contents(folder: Path) -> list[Path]:
    """What is in a folder, but for the lock and for what killed writers have left."""
    if not folder.exists():
        return []
    return sorted({*folder.iterdir()} - {folder / LOCK, *leftovers(folder)})


@contextlib.contextmanager
def held(folder: Path, *, overwrite: bool, resume: bool = False, comparison: bool = False) -> Iterator[None]:
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
        _check_contents(folder, overwrite=overwrite, resume=resume, comparison=comparison)
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

    Files that were written by somebody else stay. Those by which a folder is known go last: a clearing cut short leaves
    the run, or can be begun again.
    """
    for path in _own(folder):
        if path.name in keep and path.parent == folder:
            continue
        path.unlink()
        for above in (path.parent, path.parent.parent):
            if above != folder and above.is_relative_to(folder) and not any(above.iterdir()):
                above.rmdir()


def _own(folder: Path) -> Iterator[Path]:
    """The files in a folder that a fit or a comparison has written, but for its lock; none in a linked folder."""
    patterns: tuple[str, ...] = _OF_A_FIT
    if (folder / COMPARISON).is_file():
        patterns = _OF_A_COMPARISON
        for fit in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            if is_run(fit) or (fit / LOCK).is_file():
                yield from (*leftovers(fit), *_own(fit), *fit.glob(LOCK))
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        linked = any(above.is_symlink() for above in path.parents if above != folder and above.is_relative_to(folder))
        if not linked and (path.is_file() or path.is_symlink()):
            yield path

"""Tensors and plain values in one safetensors file that verifies itself; a crash leaves the old file or the new one."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "WriteError",
    "atomically",
    "bytes_of",
    "check_writable",
    "is_whole",
    "leftovers",
    "load_optimizer",
    "load_weights",
    "misfit",
    "optimizer_state",
    "read_tensors",
    "unique_tensors",
    "write_tensors",
]


CHUNK = 2**24
"""Bytes of a tensor that are read at a time."""


class WriteError(OSError):
    """A file that could not be written; nothing that was there before is lost."""

    @classmethod
    def of(cls, path: Path, error: Exception) -> "WriteError":
        """What kept a file from being written, and what to do."""
        found = re.search(r"os error (\d+)", str(error))  # safetensors says it so
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        mend = ""
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            mend = ". Free some space there, or give another folder"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            mend = ". Give a folder in which you may write"
        elif code == errno.ENAMETOOLONG:
            mend = ". Give a shorter name or path"
        why = getattr(error, "strerror", None) or error
        return cls(f"{path} could not be written: {why}{mend}; nothing that was there before is lost")


@contextlib.contextmanager
def atomically(path: Path, then: Callable[[], Any] = lambda: None) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is gone when it doesn't.

    Args:
        path: What shall be written.
        then: Called when all of it is on the disk, just before it takes the place of what was there.

    Raises:
        WriteError: If the file can't be written.
    """
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes a file anew, for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        then()
        os.replace(temporary, path)
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError.of(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it may be what can't be written
            temporary.unlink()


def check_writable(folder: Path, text: str) -> None:
    """See that a text can be written into a folder, which is left as it was.

    Raises:
        WriteError: If it can't.
    """
    path = folder / f".begun-{secrets.token_hex(8)}"
    with atomically(path) as temporary:
        temporary.write_bytes(text.encode())
    path.unlink()


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that writers which were killed have left in a folder."""
    return [path for path in folder.glob(".*-" + "[0-9a-f]" * 16) if path.is_file()]


def write_tensors(
    path: Path, tensors: dict[str, Tensor], values: dict[str, Any], then: Callable[[], Any] = lambda: None
) -> None:
    """Write tensors with plain values beside them and a checksum of both, atomically.

    Args:
        path: Where to.
        tensors: By name.
        values: What JSON can hold.
        then: As for :func:`atomically`.

    Raises:
        WriteError: If the file can't be written.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(values)
    with atomically(path, then) as temporary:
        # One entry, for the order of several is not always the same.
        written = json.dumps({"values": text, "sha256": _checksum(stored, text)})
        save_file(stored, temporary, metadata={"pyrogen": written})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        ValueError: If the file is missing, damaged or not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if "pyrogen" not in metadata:  # the first format, which had no checksum
            return tensors, _plain(metadata["values"])
        written = _plain(metadata["pyrogen"])
        if written["sha256"] != _checksum(tensors, written["values"]):
            raise ValueError("its contents differ from their checksum")
        return tensors, _plain(written["values"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or no file of pyrogen's ({error}); restore it from a copy, or train anew "
            "with overwrite"
        ) from error


def is_whole(path: Path) -> bool:
    """Whether a file is there as :func:`write_tensors` wrote it."""
    with contextlib.suppress(ValueError):
        read_tensors(path)
        return True
    return False


def _plain(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("its values have no names")
    return values


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """A SHA-256 of values as text and of all tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        for part in bytes_of(tensor):
            digest.update(part)
    return digest.hexdigest()


def bytes_of(x: Tensor) -> Iterator[Any]:
    """The bytes of a tensor in the order of its values, at most 16 MiB or one row at a time."""
    x = x.detach().reshape(1) if x.dim() == 0 else x.detach()
    if x.numel():
        size = max(1, CHUNK * len(x) // (x.numel() * x.element_size()))
        for part in x.split(size):
            yield part.cpu().contiguous().view(torch.uint8).flatten().numpy()


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one once."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a module's own parameters and buffers.

    Raises:
        ValueError: If names or shapes differ from the module's; nothing is copied then.
    """
    if unfit := misfit(module, tensors):
        raise ValueError(
            f"{where} belongs to another model, guide or objective: {unfit}; build all as they were when it was saved"
        )
    with torch.no_grad():
        for name, tensor in unique_tensors(module).items():
            tensor.copy_(tensors[name])


def misfit(module: nn.Module, tensors: dict[str, Tensor]) -> str:
    """In what names or shapes of tensors differ from a module's own, in words; empty where they don't."""
    own = unique_tensors(module)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        return f"it lacks {missing[:5] or 'nothing'} and has {extra[:5] or 'nothing'} besides"
    shapes = ((name, tuple(tensors[name].shape), tuple(tensor.shape)) for name, tensor in own.items())
    return next(
        (f"{name} has shape {there} there and {here} here" for name, there, here in shapes if there != here), ""
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors, and its plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    groups = [{k: v for k, v in group.items() if not isinstance(v, Tensor)} for group in state["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Give an optimizer the state that :func:`optimizer_state` took.

    Raises:
        ValueError: If it has other parameters.
    """
    groups, saved = optimizer.state_dict()["param_groups"], values["groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved]:
        raise ValueError("the checkpoint belongs to a training of other parameters; resume it with the same programs")
    for group, old in zip(groups, saved, strict=True):
        # JSON knows no tuples.
        group |= {name: tuple(v) if isinstance(group.get(name), tuple) else v for name, v in old.items()}
    entries: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in values["numbers"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # Files hold tensors row by row, and a fused step goes through memory.
            if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

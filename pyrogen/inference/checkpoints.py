"""Tensors and plain values in one safetensors file, written so that a crash leaves the old file or the new one."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["atomically", "load_weights", "read_tensors", "unique_tensors", "write_tensors"]


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is gone when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write tensors with plain values beside them, atomically."""
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        save_file(stored, temporary, metadata={"values": json.dumps(values)})


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        ValueError: If the file is missing, truncated or not one of ours.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads((file.metadata() or {})["values"])
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or no file of pyrogen's ({error}); restore it from a copy, or train anew with "
            "overwrite"
        ) from error
    return tensors, values


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one once."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a module's own parameters and buffers.

    Raises:
        ValueError: If names or shapes differ from the module's; nothing is copied then.
    """
    own = unique_tensors(module)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{where} belongs to another model or guide: it lacks {missing[:5] or 'nothing'} and has "
            f"{extra[:5] or 'nothing'} besides; build both as they were when it was saved"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{where} belongs to another model or guide: {name} has shape {tuple(tensors[name].shape)} there and "
                f"{tuple(tensor.shape)} here"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

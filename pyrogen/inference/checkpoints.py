"""Tensors and plain values in one safetensors file, written so that a crash leaves the old file or the new one."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "atomically",
    "leftovers",
    "load_optimizer",
    "load_weights",
    "optimizer_state",
    "read_tensors",
    "unique_tensors",
    "write_tensors",
]


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is gone when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes a file anew, for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that writers which were killed have left in a folder."""
    return [path for path in folder.glob(".*-" + "[0-9a-f]" * 16) if path.is_file()]


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
    except (SafetensorError, KeyError, ValueError, OSError) as error:
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
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
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
            f"{where} belongs to another model, guide or objective: it lacks {missing[:5] or 'nothing'} and has "
            f"{extra[:5] or 'nothing'} besides; build all as they were when it was saved"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{where} belongs to another model, guide or objective: {name} has shape "
                f"{tuple(tensors[name].shape)} there and {tuple(tensor.shape)} here"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


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

"""What earlier versions wrote, as this one reads it. One number, ``format``, counts for all files of a run.

1. ``weights.safetensors`` held weights alone, ``run.yaml`` and ``history.csv`` the rest; nothing had a checksum, and
   checkpoints had no number.
2. Weights hold settings and history too, of which the other two are copies, as the first format has them where another
   run is about to take its place; checksums; sites and source of programs and a fingerprint of all rows in
   checkpoints, and in later versions the source in settings too.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

__all__ = ["FORMAT", "checkpoint_of_1", "fingerprint_of_1", "format_of", "settings_of_1"]

FORMAT = 2


def format_of(values: dict[str, Any], path: Path, default: Any = None) -> int:
    """The number of the format of what a file holds.

    Raises:
        ValueError: If a later version wrote it, or it has no number.
    """
    number = values.get("format", default)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{path} is damaged: its format is {number!r}; restore it from a copy")
    if number > FORMAT:
        raise ValueError(
            f"{path} was written by a later version of pyrogen, in format {number}, and this one reads up to {FORMAT}; "
            "update pyrogen"
        )
    return number


def settings_of_1(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of any format, with what the first versions of it lacked."""
    return {"compile_seconds": 0.0, "made": {}, "source": {}} | settings


def checkpoint_of_1(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint of the first format, with what its first versions lacked and what fits did then."""
    identity = {"processes": 1} | values["identity"]
    identity["options"] = {"matmul_precision": "highest", "non_finite": "stop"} | identity["options"]
    tallies: list[dict] = [{} for _ in range(identity["processes"])]  # checkpoints came at the end of an epoch
    return {"compile_seconds": 0.0, "tallies": tallies} | values | {"identity": identity}


def fingerprint_of_1(rows: Any, count: int) -> str:
    """The hash of up to 1000 rows by which format 1 told data apart; of a data set their number alone."""
    digest = hashlib.sha256(str(count).encode())
    for x in rows if isinstance(rows, tuple) else ():
        some = x[:: max(1, len(x) // 1000)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.dim() else b"")
    return digest.hexdigest()

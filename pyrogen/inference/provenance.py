"""Where a run comes from: the command, the revision of the code around it, and the machine."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, Any]:
    """Plain values that say what is being run, where: what one needs besides seed and versions to make a run again.

    ``revision`` is that of the git repository of the working directory, with ``+`` where its files have changed since,
    or None; ``device`` names a GPU.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": _revision(Path.cwd()),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": name,
        },
    }


def _revision(folder: Path) -> str | None:
    def git(*words: str) -> str:
        # A repository's own settings could name a program to be run.
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, one of somebody else
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())

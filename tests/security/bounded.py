"""Run commands one after the other with little memory left; what each did goes to a file."""

import contextlib
import io
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pyrogen.cli import main

LEFT = 2**30
"""Bytes that may be asked for beyond what is taken once everything is imported."""


def in_use(kind: str) -> int:
    """Bytes in memory: now, ``"VmRSS"``, or at most since the mark was last set back, ``"VmHWM"``."""
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def run(commands: dict[str, list[str]], warm: list[str]) -> dict[str, dict[str, Any]]:
    """What each command returned and said, how long it took, and how much memory it took at most."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(warm) == 0
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + LEFT, size + LEFT))
    found = {}
    for name, arguments in commands.items():
        Path("/proc/self/clear_refs").write_text("5")  # sets back the mark
        said, before, started = io.StringIO(), in_use("VmRSS"), time.monotonic()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code: int | str
            try:
                code = main(arguments)
            except BaseException as error:
                code = repr(error)
        taken, seconds = in_use("VmHWM") - before, time.monotonic() - started
        found[name] = {"code": code, "said": said.getvalue(), "taken": taken, "seconds": seconds}
    return found


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(**task)))

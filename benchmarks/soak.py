"""Does a run survive being killed, again and again, and does memory stay where it is?

    OMP_NUM_THREADS=1 python benchmarks/soak.py --kills 200 --minutes 60

Fits by ``pyrogen fit --resume`` are ended at random moments by SIGKILL, SIGTERM and Ctrl-C, every other time while a
file is being written, until they are done; then weights, optimizer, random state and history are compared with those of
a fit that nobody disturbed, bit for bit. ``pyrogen evaluate`` and ``pyrogen report`` are killed as often as
``--others`` says: what stood in the folder must be there afterwards, what they write whole or not at all, and once left
alone they give the same figures. Then one process makes fits for so many minutes, and its memory is looked at after
each. The command ends with 1 where one of these does not hold.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

import pyrogen as pg
from pyrogen import cli
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.inference.folders import LOCK

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {0, 130, 143}  # of one that ended by itself, and that was told to
TIMES = ["seconds", "rows_per_second"]
STARTING = 0.2
"""Seconds before the first signal."""


def fit(folder: Path, epochs: int) -> int:
    network = ["--latent", "4", "--encoder.hidden", "[64]", "--average", "0.99", "--schedule", "cosine"]
    written = ["--out", str(folder), "--progress", "false", *(["--resume"] if folder.exists() else [])]
    return cli.main(["fit", "--data", "digits", "--epochs", str(epochs), *network, *written])


def evaluate(folder: Path) -> int:
    return cli.main(["evaluate", str(folder), "--rows", "100", "--parts", "likelihood", "bound", "aggregate"])


def report(folder: Path) -> int:
    return cli.main(["report", str(folder), "--rows", "100", "--overwrite"])


def started(job: Callable[[], int], log: Path) -> int:
    """A process that does a job, forked so that it need not import everything anew; returns its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        with open(log, "a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """How a process ended, as a shell says it, or None while it runs."""
    which, status = os.waitpid(child, os.WNOHANG)
    if not which:
        return None
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def disturbed(child: int, folder: Path, after: float, by: signal.Signals, writing: bool) -> tuple[bool, int]:
    """Send a signal after some seconds, or as soon then as a file is being written; was it, and what was the end?"""
    due = time.monotonic() + after
    while (code := ended(child)) is None:
        if time.monotonic() > due and (not writing or any(folder.glob(".*-*")) or time.monotonic() > due + 2):
            os.kill(child, by)
            _, status = os.waitpid(child, 0)
            return True, 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.0005 if writing else 0.005)
    return False, code


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], Any, pd.DataFrame]:
    """All that a finished fit leaves, without its times."""
    tensors: dict[str, torch.Tensor] = {}
    for name in ("checkpoint", "weights"):
        found, _ = read_tensors(folder / f"{name}.safetensors")
        tensors |= {f"{name} {key}": value for key, value in found.items()}
    history = pg.load(folder).history
    return tensors, yaml.safe_load((folder / "run.yaml").read_text())["options"], history.drop(columns=TIMES)


def same(one: Path, other: Path) -> bool:
    (tensors, options, history), (others, their_options, their_history) = contents(one), contents(other)
    equal = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return equal and options == their_options and history.equals(their_history)


def kill_fits(base: Path, kills: int, epochs: int, chance: random.Random) -> list[str]:
    """Disturb fits until so many signals were sent; returns what went wrong."""
    whole, log = base / "undisturbed", base / "log.txt"
    began = time.monotonic()
    child = started(lambda: fit(whole, epochs), log)
    if os.waitpid(child, 0)[1]:
        return [f"the undisturbed fit failed: {log.read_text()}"]
    span = time.monotonic() - began
    wrong: list[str] = []
    sent: Counter[str] = Counter()
    finished = 0
    while sum(sent.values()) < kills:
        folder, code = base / f"fit-{finished}", None
        while code != 0 and len(wrong) < 5:
            by, writing = chance.choice(SIGNALS), chance.random() < 0.5
            child = started(lambda folder=folder: fit(folder, epochs), log)  # type: ignore[misc]
            was_sent, code = disturbed(child, folder, STARTING + chance.random() * span / 3, by, writing)
            sent[by.name] += was_sent
            if code not in EXPECTED and not (was_sent and code == 128 + by):
                wrong.append(f"{folder.name} ended with {code}: {log.read_text()[-500:]}")
        if wrong:
            break
        finished += 1
        if not same(whole, folder):
            wrong.append(f"{folder.name} is not what the undisturbed fit gave")
        if left := [path.name for path in folder.glob(".*-*")]:
            wrong.append(f"{folder.name} still holds {left}")
    of_each = ", ".join(f"{count} {name}" for name, count in sorted(sent.items()))
    print(f"fits: {sum(sent.values())} signals ({of_each}), {finished} fits, {len(wrong)} differ from undisturbed ones")
    return wrong


def kill_others(base: Path, kills: int, chance: random.Random) -> list[str]:
    """Disturb evaluations and reports of a finished fit."""
    folder, log = base / "undisturbed", base / "log.txt"
    # Who was killed while it wrote is still named in the lock's file.
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    wrong: list[str] = []
    for job, name in ((evaluate, "evaluation.yaml"), (report, "report.html")):
        result, began = folder / name, time.monotonic()
        os.waitpid(started(lambda job=job: job(folder), log), 0)  # type: ignore[misc]
        span, known = time.monotonic() - began, figures(result)
        sent = 0
        for _ in range(kills):
            result.unlink(missing_ok=True)
            child = started(lambda job=job: job(folder), log)  # type: ignore[misc]
            after = STARTING + chance.random() * span
            was_sent, code = disturbed(child, folder, after, chance.choice(SIGNALS), chance.random() < 0.5)
            sent += was_sent
            if not was_sent and code:
                wrong.append(f"{job.__name__} ended with {code}: {log.read_text()[-500:]}")
            if any(path.read_bytes() != before for path, before in kept.items()):
                wrong.append(f"{job.__name__} has changed what was in the folder")
            with contextlib.suppress(FileNotFoundError):
                figures(result)  # raises where it is half of a file
        os.waitpid(started(lambda job=job: job(folder), log), 0)  # type: ignore[misc]
        if figures(result) != known:
            wrong.append(f"{job.__name__} gives other figures than undisturbed")
        print(f"{job.__name__}: {sent} signals, {len(wrong)} wrong so far")
    return wrong


def figures(path: Path) -> Any:
    """What an evaluation or a report says, without its times."""
    text = path.read_text()
    if path.suffix == ".yaml":
        entries = yaml.safe_load(text)
        return [{k: str(v) for k, v in entry.items() if "seconds" not in k} for entry in entries]  # for NaN is not NaN
    if not text.rstrip().endswith("</html>"):
        raise ValueError(f"{path} is half a page")
    return len(text) > 0


def grow(base: Path, minutes: float) -> list[str]:
    """Make fits for so long; memory after the first tenth of the time and at the end."""
    sizes: list[float] = []
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            fit(base / "again", 3)
        shutil.rmtree(base / "again")
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what is freed, or gives it back
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        sizes.append(resident())
    warm = sizes[len(sizes) // 10]
    growth = max(sizes[-3:]) / warm - 1
    print(f"memory: {len(sizes)} fits in {minutes:g} minutes, {warm:.0f} to {sizes[-1]:.0f} MiB, {growth:+.1%}")
    return [f"memory has grown by {growth:.1%}"] if growth > 0.01 else []


def resident() -> float:
    """MiB of memory that this process holds."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="signals to fits")
    parser.add_argument("--others", type=int, default=20, help="signals to evaluations, and to reports")
    parser.add_argument("--minutes", type=float, default=60.0, help="of fits whose memory is looked at")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance, wrong = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="pyrogen-soak-") as folder:
        wrong += kill_fits(Path(folder), arguments.kills, arguments.epochs, chance)
        if arguments.others and not wrong:
            wrong += kill_others(Path(folder), arguments.others, chance)
        if arguments.minutes:
            wrong += grow(Path(folder), arguments.minutes)
    print("\n".join(wrong) or "all held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

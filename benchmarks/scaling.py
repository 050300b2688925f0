"""Time and memory of training and evaluation against the size of the data, of the latents, particles and processes.

    python benchmarks/scaling.py --chart scaling.png

Every point is a process of its own, whose peak of resident memory is taken, less that of one that only imports what all
need. A VAE (784-400-400-L) learns images of 28 by 28 that are made up.

- data: 200 steps on rows that a ``Dataset`` makes up when asked for them, and on a tensor of bytes that is there.
- latent: 200 steps with L latent dimensions.
- particles: 20 steps of IWAE, whose batch is copied for each particle; importance sampling of 16 observations and
  annealing of two in so many chains, which go through the programs in parts.
- processes: 100 steps of 128 rows for each process, started by torchrun, one thread each.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pyrogen as pg
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.evaluation import annealing, importance_sampling
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

SHAPE, HIDDEN, LATENT, ROWS = (1, 28, 28), 400, 50, 10_000

AXES: dict[str, tuple[str, list[int]]] = {
    "data, made up when asked for": ("rows", [10_000, 100_000, 1_000_000]),
    "data, in memory": ("rows", [10_000, 100_000, 1_000_000]),
    "latent": ("dimensions", [2, 8, 32, 128, 512]),
    "training particles": ("particles", [1, 5, 25]),
    "importance sampling": ("particles", [1_000, 10_000, 100_000]),
    "annealing": ("chains", [256, 2048, 16384]),
    "processes": ("processes", [1, 2]),
}


class MadeUp(Dataset):
    """Images of noise, each always the same."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(SHAPE, generator=torch.Generator().manual_seed(index)).round()


def programs(latent: int = LATENT) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(latent), Bernoulli(MLP(latent, SHAPE, (HIDDEN, HIDDEN))))
    return model, AmortizedGuide(model, nn.Sequential(MLP(SHAPE, HIDDEN, (HIDDEN,)), nn.ReLU()))


def trained(data: Any, steps: int, latent: int = LATENT, objective: Any = None, **options: Any) -> float:
    """Milliseconds a step."""
    run = pg.fit(*programs(latent), objective or ELBO(), data, steps=steps, device="cpu", progress=False, **options)
    return 1000 * run.seconds / steps


def in_memory(rows: int) -> Tensor:
    """Pixels that are 0 or 255, which are read as 0 or 1; the same in all processes."""
    return torch.randint(2, (rows, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).neg_()


def timed(work: Callable[[], Any], units: float) -> float:
    """Milliseconds for each of some units."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started) / units


def point(axis: str, size: int) -> float:
    """Milliseconds of a step, or of a thousand particles or chains of one observation."""
    x = in_memory(16) / 255
    match axis:
        case "data, made up when asked for":
            return trained(MadeUp(size), 200)
        case "data, in memory":
            return trained(in_memory(size), 200)
        case "latent":
            return trained(in_memory(ROWS), 200, latent=size)
        case "training particles":
            return trained(in_memory(ROWS), 20, objective=IWAE(size))
        case "importance sampling":
            return timed(lambda: importance_sampling(*programs(), x, particles=size), len(x) * size / 1000)
        case "annealing":
            return timed(lambda: annealing(programs()[0], x[:2], chains=size, steps=3, leapfrogs=2), size / 500)
        case _:
            return trained(in_memory(ROWS), 100)


def measured(axis: str, size: int) -> tuple[float, float]:
    """The milliseconds of a point, and the peak of its process's memory in MiB."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={size}"] if axis == "processes" else []
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if axis == "processes" else {})
    command = [sys.executable, *launcher, __file__, "--point", axis, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{axis} at {size} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["milliseconds"], found["MiB"]


def draw(table: pd.DataFrame, path: str) -> None:
    """Time and memory, a panel for each axis."""
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    groups = table.groupby("axis", sort=False)
    figure, axes = plt.subplots(2, groups.ngroups, figsize=(2.4 * groups.ngroups, 5), layout="constrained")
    for (name, rows), column in zip(groups, axes.T, strict=True):
        for axis, figure_of in zip(column, ("milliseconds", "MiB"), strict=True):
            axis.plot(rows["size"], rows[figure_of], "o-", color="#30638e")
            axis.set(xscale="log", ylim=(0, 1.15 * max(1.0, rows[figure_of].max())))
            axis.set_xticks(rows["size"])
            axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axis.minorticks_off()
            axis.tick_params(labelsize=7)
        column[0].set_title(name, fontsize=9)
        column[1].set_xlabel(rows["of"].iloc[0], fontsize=8)
    axes[0, 0].set_ylabel("milliseconds", fontsize=8)
    axes[1, 0].set_ylabel("peak of memory, MiB", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=[*AXES])
    parser.add_argument("--chart", metavar="FILE.png", help="time and memory as curves")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point is not None:
        axis, size = arguments.point
        milliseconds = 0.0 if axis == "nothing" else point(axis, int(size))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"milliseconds": milliseconds, "MiB": peak}))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    _, imports = measured("nothing", 0)
    rows = []
    for axis in arguments.axes:
        of, sizes = AXES[axis]
        for size in sizes:
            milliseconds, peak = measured(axis, size)
            rows.append((axis, of, size, milliseconds, peak - imports))
            print(f"{axis}: {size} {of}, {milliseconds:.3g} ms, {peak - imports:.0f} MiB", flush=True)
    if arguments.chart:
        draw(pd.DataFrame(rows, columns=["axis", "of", "size", "milliseconds", "MiB"]), arguments.chart)


if __name__ == "__main__":
    main()

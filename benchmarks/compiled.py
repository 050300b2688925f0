"""Does compiling change what a fit finds, how long does it take, and is it spared the next time?

    OMP_NUM_THREADS=1 python benchmarks/compiled.py

A VAE, IWAE with a flow, and AVB learn the digits with each seed twice, as they are and compiled: log-likelihoods of
the test rows and what separates the two, beside the standard deviation between seeds. Then each is compiled in two
processes one after the other, the first with an empty cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Bernoulli, Flow, Implicit, Normal, StandardNormal
from pyrogen.inference import AVB, ELBO, IWAE, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

FITS: dict[str, tuple[Any, Any]] = {
    "VAE": (Normal, ELBO),
    "IWAE, flow": (Flow, partial(IWAE, 8)),
    "AVB": (Implicit, AVB),
}


def fitted(name: str, seed: int, epochs: int, compiled: bool) -> pg.inference.Run:
    data = pg.data.load("digits")
    family, objective = FITS[name]
    torch.manual_seed(seed)
    model = LatentVariableModel(StandardNormal(8), Bernoulli(MLP(8, data.event_shape)))
    guide = AmortizedGuide(model, nn.Sequential(MLP(data.event_shape, 128), nn.ReLU()), family)
    options: Any = {"epochs": epochs, "seed": seed, "compile": compiled, "device": "cpu", "progress": False}
    return pg.fit(model, guide, objective(), data, **options)


def log_likelihood(run: pg.inference.Run) -> float:
    """Of the test rows in nats, by the guide or one fitted afterwards."""
    return pg.evaluate(run, pg.data.load("digits"), parts=["likelihood"], particles=500).log_likelihood


def compile_seconds(name: str, cache: str) -> float:
    """In a process of its own."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", choices=FITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(fitted(arguments.only, 0, 1, compiled=True).compile_seconds)
        return
    rows = []
    for name in FITS:
        found = {
            how: [log_likelihood(fitted(name, seed, arguments.epochs, how == "compiled")) for seed in arguments.seeds]
            for how in ("as it is", "compiled")
        }
        table = pd.DataFrame(found, index=arguments.seeds)
        between = table["compiled"] - table["as it is"]
        with tempfile.TemporaryDirectory() as cache:
            first, again = (compile_seconds(name, cache) for _ in range(2))
        rows.append([*table.mean(), between.mean(), between.abs().max(), table["as it is"].std(), first, again])
        print(f"{name}\n{table.to_string(float_format='%.3f')}\n", flush=True)
    columns = ["as it is", "compiled", "mean difference", "largest", "sd of seeds", "compiled in, s", "and again, s"]
    print(pd.DataFrame(rows, index=[*FITS], columns=columns).to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()

"""Annealed importance sampling on MNIST: the log-likelihood of test images under a 50-latent VAE, and how tight it is.

    python benchmarks/annealing.py --root DATA

A VAE (784-400-400-50) is fitted to dynamically binarised MNIST, or read from ``--run``, and its decoder is judged by
importance sampling with its guide, by annealed importance sampling, which needs no guide, and by the sandwich of
bidirectional Monte Carlo on images that the model has drawn itself.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.evaluation import annealing, bidirectional_monte_carlo, importance_sampling
from pyrogen.inference import ELBO, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

LATENT, HIDDEN, SHAPE = 50, 400, (1, 28, 28)


def fitted(data: pg.data.Data, epochs: int, device: str, out: str | None) -> pg.inference.Run:
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(LATENT), Bernoulli(MLP(LATENT, SHAPE, (HIDDEN, HIDDEN))))
    guide = AmortizedGuide(model, nn.Sequential(MLP(SHAPE, HIDDEN, (HIDDEN,)), nn.ReLU()))
    return pg.fit(model, guide, ELBO(), data, epochs=epochs, schedule="linear", device=device, progress=False, out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=None, help="where MNIST is, or is downloaded to")
    parser.add_argument("--run", default=None, help="a folder with the fit; it is made there if it does not exist")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--simulated", type=int, default=200, help="images of the model's own for the sandwich")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--leapfrogs", type=int, default=10)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=4096, help="rows that go through the programs at once")
    parser.add_argument("--compile", action="store_true", help="run compiled graphs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    data = pg.data.load("mnist", root=arguments.root, binarize="dynamic")
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}", flush=True)
    if arguments.run is not None and Path(arguments.run).exists():
        run = pg.load(arguments.run)
    else:
        run = fitted(data, arguments.epochs, arguments.device, arguments.run)
    run.programs.to(device)
    x = data.test[: arguments.images].float()
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("rows", "compile")}
    chain = {name: getattr(arguments, name) for name in ("chains", "steps", "leapfrogs")} | settings
    parts = {
        f"{arguments.images} test images": lambda: importance_sampling(
            run.model, run.guide, x, particles=arguments.particles, **settings
        ),
        f"{arguments.images} test images, no guide": lambda: annealing(run.model, x, **chain),
        f"{arguments.simulated} simulated images": lambda: bidirectional_monte_carlo(
            run.model, x[: arguments.simulated], **chain
        ),
    }
    for name, part in parts.items():
        started = time.perf_counter()
        found = part()
        print(f"{name}: {found}; {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""Dynamically binarised MNIST, 784-400-400-50: test log-likelihoods, and the loop's cost beside a hand-written one.

    python benchmarks/mnist.py --root DATA --epochs 30

Part 1 times steps of ``pyrogen.fit`` and of an eager PyTorch loop in turns, in one process, and reports medians and the
median ratio; the hand-written loop runs with torch's default Adam and with the fused one. Part 2 trains both, and
pyrogen with a flow posterior and with IWAE, and reports log p(x) of the first 1000 test images by importance sampling.
The hand-written model is evaluated by hand-written code.
"""

import argparse
import math
import platform
import statistics
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import pyrogen as pg
from pyrogen.distributions import Bernoulli, Flow, Normal, StandardNormal
from pyrogen.evaluation import importance_sampling
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

BATCH, LATENT, HIDDEN, SHAPE = 128, 50, 400, (1, 28, 28)


class HandWritten:
    """The same model as a plain loop, as one would write it without a library."""

    def __init__(self, fused: bool) -> None:
        self.encoder = nn.Sequential(
            nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784)
        )
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=fused or None)

    def train(self, images: torch.Tensor, steps: int) -> float:
        """Seconds for ``steps`` steps."""
        started = time.perf_counter()
        done = 0
        while done < steps:
            for index in torch.randperm(len(images)).split(BATCH):
                x = torch.bernoulli(images[index].float() / 255).flatten(1)
                loc, log_variance = self.encoder(x).chunk(2, -1)
                z = loc + torch.randn_like(loc) * (0.5 * log_variance).exp()
                reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
                kl = 0.5 * (loc.square() + log_variance.exp() - 1 - log_variance).sum()
                loss = (reconstruction + kl) / len(x)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if not math.isfinite(loss.item()):
                    raise ArithmeticError("the loss is not finite")
                done += 1
                if done == steps:
                    break
        return time.perf_counter() - started

    @torch.no_grad()
    def log_likelihood(self, x: torch.Tensor, particles: int) -> float:
        x = x.flatten(1)
        loc, log_variance = self.encoder(x).chunk(2, -1)
        log_weights = []
        for _ in range(particles):
            noise = torch.randn_like(loc)
            z = loc + noise * (0.5 * log_variance).exp()
            log_p = -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
            log_weights.append(log_p + 0.5 * (noise.square() + log_variance - z.square()).sum(-1))
        return (torch.stack(log_weights).logsumexp(0) - math.log(particles)).mean().item()


def programs(family=Normal) -> tuple[LatentVariableModel, AmortizedGuide]:
    model = LatentVariableModel(StandardNormal(LATENT), Bernoulli(MLP(LATENT, SHAPE, (HIDDEN, HIDDEN))))
    encoder = nn.Sequential(MLP(SHAPE, HIDDEN, (HIDDEN,)), nn.ReLU())
    return model, AmortizedGuide(model, encoder, family)


def time_steps(data: pg.data.Data, steps: int, rounds: int) -> None:
    """Steps of each loop in turns; a round of one is followed at once by a round of the next."""
    loops = {"hand-written": HandWritten(fused=False), "hand-written, fused Adam": HandWritten(fused=True)}
    times: dict[str, list[float]] = {name: [] for name in [*loops, "pyrogen.fit"]}
    model, guide = programs()
    for index in range(rounds + 1):
        for name, loop in loops.items():
            times[name].append(loop.train(data.train, steps))
        run = pg.fit(model, guide, ELBO(), data, steps=steps, batch_size=BATCH, validate_every=10**6, progress=False)
        times["pyrogen.fit"].append(run.seconds)
        if index == 0:  # everything is slower the first time
            times = {name: [] for name in times}
    ours = times["pyrogen.fit"]
    print(f"\n{rounds} rounds of {steps} steps of {BATCH} images, medians")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(ours, seconds, strict=True))
        rate = steps * BATCH / median
        print(f"{name:26s} {1000 * median / steps:7.2f} ms a step {rate:9.0f} images/s   pyrogen / this {ratio:5.2f}")


FITS = {
    "ELBO": (Normal, ELBO()),
    "ELBO, flow posterior": (partial(Flow, layers=2, hidden=(100,)), ELBO(sticking_the_landing=True)),
    "IWAE, 5 particles": (Normal, IWAE(5)),
}


def train_by_hand(data: pg.data.Data, epochs: int, particles: int, x: torch.Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    loop = HandWritten(fused=True)
    seconds = loop.train(data.train, epochs * math.ceil(len(data.train) / BATCH))
    print(f"{'hand-written ELBO':28s} {loop.log_likelihood(x, particles):8.2f} nats {seconds:20.0f} s", flush=True)


def train(name: str, data: pg.data.Data, epochs: int, particles: int, x: torch.Tensor, seed: int) -> None:
    family, objective = FITS[name]
    torch.manual_seed(seed)
    model, guide = programs(family)
    run = pg.fit(
        model, guide, objective, data, epochs=epochs, batch_size=BATCH, seed=seed, validate_every=10**6, progress=False
    )
    estimate = importance_sampling(run.model, run.guide, x, particles=particles)
    mean = estimate.log_likelihood.mean().item()
    error = estimate.log_likelihood.std().item() / math.sqrt(len(x))
    rate = epochs * len(data.train) / run.seconds
    print(
        f"{'pyrogen ' + name:28s} {mean:8.2f} ± {error:.2f} nats {run.seconds:13.0f} s {rate:9.0f} images/s", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=None, help="where MNIST is, or is downloaded to")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--particles", type=int, default=500)
    parser.add_argument("--images", type=int, default=1000, help="test images that are evaluated")
    parser.add_argument("--steps", type=int, default=200, help="steps of a timed round; 0 leaves timing out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fits", nargs="*", default=["hand-written", *FITS], choices=["hand-written", *FITS])
    parser.add_argument("--all-train", action="store_true", help="train on all 60 000 images, validation ones too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = pg.data.load("mnist", root=arguments.root, binarize="dynamic")
    if arguments.all_train:
        everything = torch.cat([data.train, pg.data.load("mnist", root=arguments.root, binarize=None).validation])
        data = pg.data.Data(
            "mnist", everything, data.validation, data.test, "binary", binarize="dynamic", source=data.source
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    if arguments.steps:
        time_steps(data, arguments.steps, arguments.rounds)
    if arguments.epochs:
        x = data.test[: arguments.images].float()
        print(f"\nlog p(x) of {len(x)} test images, {arguments.particles} particles, {arguments.epochs} epochs")
        options = (data, arguments.epochs, arguments.particles, x, arguments.seed)
        for name in arguments.fits:
            train_by_hand(*options) if name == "hand-written" else train(name, *options)


if __name__ == "__main__":
    main()

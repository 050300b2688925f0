"""Modes that are lost and samples that fall between them: Gaussians on a ring and on a grid.

    OMP_NUM_THREADS=1 python benchmarks/modes.py --out modes.png

PacGAN's protocol (Lin, Khetan, Fanti & Oh 2018, *PacGAN*, 1712.04086): 100 000 observations of an even mixture, of 8
Gaussians of scale 0.01 on the unit circle or of 25 of scale 0.05 on {-4, -2, 0, 2, 4}²; a latent z of two standard
normal dimensions; 2500 samples of each fitted model. A sample is of high quality within 3 standard deviations of its
nearest mode, a mode is covered if at least one sample of high quality is nearest to it. Data themselves score 98.9 %.

Models see the data divided by their standard deviation, and all have the same networks, steps, rows a step and learning
rates, which fall linearly to 0; what is judged are averaged weights. A WGAN-GP critic takes 5 steps where others take
one, and has its own penalty; other critics of what models show have the penalty r1. The generator is a function of z
alone, but for AAE, which needs a density: its decoder has a normal likelihood of one learned scale, whose noise is part
of the samples. It starts near the identity, so that all modes are within reach. Guides are mean-field normal.

"Hybrid" is the point of that space with ℓ1 reconstructions, the rate KL(q(z|x) ‖ p(z)) in closed form, and a critic of
samples alone: the rate keeps a share of the prior for each mode, and the critic empties what lies between them.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import matplotlib
import torch
from torch import Tensor, nn

import pyrogen as pg
from pyrogen.data import GaussianMixture2d, grid, ring
from pyrogen.distributions import Implicit, NormalLikelihood, StandardNormal
from pyrogen.inference import (
    AAE,
    ALI,
    GAN,
    VGH,
    AmortizedGuide,
    CriticOptions,
    Hybrid,
    Logistic,
    Objective,
    VGHPlusPlus,
)
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

WIDTH, DEPTH, SAMPLES = 128, 3, 2500
HIDDEN = (WIDTH,) * DEPTH
OCTAVES, R1 = 4, 0.005


class Residual(nn.Module):
    """x and a multilayer perceptron that starts small, ``(..., 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.network = nn.Linear(2, 2), MLP(2, 2, HIDDEN)
        with torch.no_grad():
            nn.init.eye_(self.linear.weight)
            nn.init.normal_(self.network.layers[-1].weight, std=0.1 / math.sqrt(WIDTH))  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z) + self.network(z)


class Encoder(nn.Module):
    """Features of x, and x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(2, WIDTH, HIDDEN[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.network(x).relu()], -1)


class Waves(nn.Module):
    """A critic that is also shown the waves of its samples, by which it sees narrow modes early.

    Tancik et al. 2020, *Fourier features let networks learn high frequency functions*, 2006.10739.
    """

    def __init__(self, features: int | tuple[int, ...], context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.size = features if isinstance(features, int) else math.prod(features)
        self.critic = Critic((1 + 2 * OCTAVES) * self.size, context, hidden=HIDDEN, activation=nn.ReLU)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        waves = (z.unsqueeze(-1) * 2.0 ** torch.arange(OCTAVES, device=z.device)).flatten(-2)
        return self.critic(torch.cat([z, waves.sin(), waves.cos()], -1), context)


VISIBLE = partial(Logistic, r1=R1)
PROBLEMS: dict[str, Callable[[], GaussianMixture2d]] = {"ring": ring, "grid": grid}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "GAN": lambda: GAN(r1=R1, critic=Waves),
    "WGAN-GP": lambda: GAN("wasserstein-gp", critic=Waves),
    "ALI": lambda: ALI(r1=R1, critic=Waves),
    "AAE": lambda: AAE(critic=Waves),
    "VGH": lambda: VGH(visible_ratio=VISIBLE, critic=Waves),
    "VGH++": lambda: VGHPlusPlus(reconstruction=20.0, visible_ratio=VISIBLE, critic=Waves),
    "Hybrid": lambda: Hybrid(
        log_likelihood=0.0, reconstruction=20.0, visible_samples=3.0, visible_ratio=VISIBLE, critic=Waves
    ),
}


def programs(objective: Objective) -> tuple[LatentVariableModel, AmortizedGuide | None]:
    likelihood: nn.Module = Implicit(2, context=2, noise=0, network=Residual())
    if isinstance(objective, AAE):
        likelihood = NormalLikelihood(Residual(), scale="shared")
    model = LatentVariableModel(StandardNormal(2), likelihood)
    return model, AmortizedGuide(model, Encoder()) if objective.uses_guide else None


def fit(toy: GaussianMixture2d, name: str, seed: int, arguments: argparse.Namespace) -> tuple[Tensor, float]:
    """2500 samples of a fitted model, in the data's units, and the seconds that training took."""
    torch.manual_seed(seed)
    objective, spread = OBJECTIVES[name](), toy.x.std()
    started = time.perf_counter()
    run = pg.fit(
        *programs(objective),
        objective,
        toy.x / spread,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer=partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True),
        critic=CriticOptions(learning_rate=arguments.learning_rate),
        schedule="linear",
        average=0.99,
        seed=seed,
        device="cpu",
        progress=False,
    )
    seconds = time.perf_counter() - started
    drawn = pg.sample(run, SAMPLES, seed=seed)
    assert isinstance(drawn, Tensor)  # one observed site
    return drawn * spread, seconds


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):6.1f} ± {spread:.1f}"


def table(problem: str, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Print a row for each fit as it ends, then one for each objective; returns samples of the first seed."""
    toy = PROBLEMS[problem]()
    shown: dict[str, Tensor] = {}
    covered: dict[str, list[float]] = {name: [] for name in arguments.objectives}
    quality: dict[str, list[float]] = {name: [] for name in arguments.objectives}
    times: dict[str, list[float]] = {name: [] for name in arguments.objectives}
    print(f"\n{problem}, {len(toy.means)} modes, {arguments.steps} steps of {arguments.batch_size}")
    print(f"{'':10} {'seed':>12} {'modes covered':>16} {'high quality, %':>18} {'seconds':>14}")
    for seed in arguments.seeds:
        for name in arguments.objectives:
            samples, seconds = fit(toy, name, seed, arguments)
            modes, share = toy.mode_coverage(samples)
            shown.setdefault(name, samples)
            covered[name].append(modes)
            quality[name].append(100 * share)
            times[name].append(seconds)
            print(f"{name:10} {seed:12d} {modes:16d} {100 * share:18.1f} {seconds:14.0f}", flush=True)
    if len(arguments.seeds) > 1:
        print("mean ± standard deviation")
        for name in arguments.objectives:
            cells = f"{mean_and_spread(covered[name]):>16} {mean_and_spread(quality[name]):>18}"
            print(f"{name:10} {len(arguments.seeds):6d} seeds {cells} {statistics.mean(times[name]):14.0f}", flush=True)
    return shown


def draw(samples: dict[str, dict[str, Tensor]], path: str) -> None:
    """Samples of every model, a row for each problem; the modes are circles of 3 standard deviations."""
    from matplotlib import pyplot as plt

    columns = max(len(of_problem) for of_problem in samples.values())
    figure, axes = plt.subplots(
        len(samples), columns, figsize=(2.4 * columns, 2.6 * len(samples)), squeeze=False, layout="constrained"
    )
    for row, (problem, of_problem) in zip(axes, samples.items(), strict=True):
        toy = PROBLEMS[problem]()
        limit = 1.25 * toy.means.abs().max().item()
        for axis, (name, points) in zip(row, of_problem.items(), strict=False):
            for mean in toy.means.tolist():
                axis.add_patch(plt.Circle(mean, 3 * toy.scale, fill=False, linewidth=0.4, color="C1"))
            axis.scatter(*points.T, s=0.6, linewidths=0, color="C0")
            modes, share = toy.mode_coverage(points)
            axis.set_title(f"{name}: {modes} of {len(toy.means)}, {100 * share:.0f} %", fontsize=8)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="+", default=[*PROBLEMS], choices=[*PROBLEMS])
    parser.add_argument("--objectives", nargs="+", default=[*OBJECTIVES], choices=[*OBJECTIVES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=12_000, help="of the model")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of model, guide and critics, at first")
    parser.add_argument("--out", help="a picture of the samples of the first seed, such as modes.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    processor = platform.processor() or platform.machine()
    print("python " + " ".join(sys.argv))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}, {os.cpu_count()} cores")
    samples = {problem: table(problem, arguments) for problem in arguments.problem}
    if arguments.out:
        draw(samples, arguments.out)


if __name__ == "__main__":
    main()

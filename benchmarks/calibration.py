"""How often an exact guide is rejected, and one whose scale is off by a fifth found, by each test of calibration.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py

The model is linear and Gaussian with two latent values, its exact posterior the guide. Simulation-based calibration
and TARP run at their defaults on simulations of their own for every seed; C2ST compares 1000 draws of the exact
posterior of one observation with 1000 of the guide. A test rejects by p ≤ 0.05.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from scipy import stats

from pyrogen.data import LinearGaussian
from pyrogen.evaluation import c2st, simulation_based_calibration, tarp

TOY = LinearGaussian()


def guide_of(scale: float) -> Callable:
    """The exact posterior, its scale multiplied."""

    def guide(x: torch.Tensor) -> None:
        posterior = TOY.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=scale * posterior.scale_tril))

    return guide


def by_classifier(scale: float, seed: int) -> float:
    """The p-value of C2ST at one observation."""
    torch.manual_seed(seed)
    posterior = TOY.posterior(TOY.x[seed : seed + 1])
    guided = dist.MultivariateNormal(posterior.mean, scale_tril=scale * posterior.scale_tril)
    return c2st(posterior.sample((1000,))[:, 0], guided.sample((1000,))[:, 0], seed=seed).p_value


TESTS: dict[str, Callable[[float, int], float]] = {
    "SBC": lambda scale, seed: simulation_based_calibration(TOY.model, guide_of(scale), TOY.x, seed=seed).p_value,
    "TARP": lambda scale, seed: tarp(TOY.model, guide_of(scale), TOY.x, seed=seed).p_value,
    "C2ST": by_classifier,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="seeds of every test and scale")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=[*TESTS])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 0.8, 1.2])
    arguments = parser.parse_args()
    print("test   scale   p <= 0.05 (95 % interval)      seconds each")
    for name in arguments.tests:
        for scale in arguments.scales:
            started = time.perf_counter()
            rejected = sum(TESTS[name](scale, seed) <= 0.05 for seed in range(arguments.repeats))
            seconds = (time.perf_counter() - started) / arguments.repeats
            interval = stats.binomtest(rejected, arguments.repeats).proportion_ci()
            share = f"{rejected} of {arguments.repeats} ({interval.low:.2f} to {interval.high:.2f})"
            print(f"{name:<6} {scale:<7} {share:<30} {seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()

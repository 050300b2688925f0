"""How wrong a learned log ratio is: one logistic classifier and a telescoping chain on Gaussians of known divergence.

    OMP_NUM_THREADS=1 python benchmarks/ratios.py

Part 1: q = N(m, I) against N(0, I). Each critic is an MLP d-128-128; each figure is the mean of its log ratio over
20 000 samples of q that it has not seen. "fresh" draws new samples each step, "fixed" trains on 10 000 of each side.
The chain has 8 bridges and takes 128 pairs a step where the classifier takes 512, so that both critics read about as
many rows. "trusted to" is the largest estimate up to which all are within 10 %.

Part 2: pairs of correlated normals against independent ones (Rhodes, Xu & Gutmann 2020, 2006.12204), whose divergence
is their mutual information, with MLPs d-256-256, 4 bridges and fresh samples.
"""

import argparse
import math
import time

import torch
from torch import Tensor

from pyrogen.evaluation import calibrate_ratio, fit_ratio
from pyrogen.inference import Logistic, Ratio, Telescoping
from pyrogen.networks import Critic

CORRELATION = 0.7951
"""Gives 40, 80, 160 dimensions 10, 20, 40 nats of mutual information."""


def make_ratio(kind: str, features: int, width: int, bridges: int) -> Ratio:
    if kind == "telescoping":
        return Telescoping.between(features, bridges=bridges, hidden=(width, width))
    return Logistic(Critic(features, hidden=(width, width)))


def shifted(kind: str, arguments: argparse.Namespace) -> None:
    """A table of estimates: a row for each divergence, a column for each number of dimensions, fresh / fixed."""
    columns = {}
    started = time.perf_counter()
    for features in arguments.dimensions:
        for samples in (None, arguments.samples):
            calibration = calibrate_ratio(
                lambda d: make_ratio(kind, d, 128, arguments.bridges),
                features=features,
                samples=samples,
                steps=arguments.steps,
                batch_size=128 if kind == "telescoping" else 512,
                divergences=arguments.divergences,
                seed=arguments.seed,
            )
            columns[features, samples] = calibration
    seconds = time.perf_counter() - started
    print(f"\n{kind}, N(m, I) against N(0, I), fresh / {arguments.samples} fixed samples, {seconds:.0f} s")
    print(f"{'true KL':>10}" + "".join(f"{f'd = {features}':>18}" for features in arguments.dimensions))
    for index, divergence in enumerate(arguments.divergences):
        cells = [
            " / ".join(f"{columns[features, samples].estimated[index]:.2f}" for samples in (None, arguments.samples))
            for features in arguments.dimensions
        ]
        print(f"{divergence:10g}" + "".join(f"{cell:>18}" for cell in cells))
    cells = [
        " / ".join(f"{columns[features, samples].trusted:.2f}" for samples in (None, arguments.samples))
        for features in arguments.dimensions
    ]
    print(f"{'trusted to':>10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def correlated_pairs(n: int, features: int) -> Tensor:
    """Samples ``(n, features)``: the second half of the dimensions is correlated with the first, one by one."""
    first, noise = torch.randn(2, n, features // 2)
    return torch.cat([first, CORRELATION * first + math.sqrt(1 - CORRELATION**2) * noise], -1)


def pairs(kind: str, features: int, seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    ratio = make_ratio(kind, features, 256, 4)
    started = time.perf_counter()
    fit_ratio(
        ratio,
        lambda n: correlated_pairs(n, features),
        lambda n: torch.randn(n, features),
        steps=steps,
        batch_size=128 if kind == "telescoping" else 320,
    )
    seconds = time.perf_counter() - started
    with torch.no_grad():
        estimate = ratio.log_ratio(correlated_pairs(20_000, features)).double().mean().item()
    exact = -features / 4 * math.log(1 - CORRELATION**2)
    print(
        f"{kind:12s} d = {features:3d} seed {seed}   exact {exact:6.2f} estimate {estimate:6.2f} "
        f"{100 * (estimate / exact - 1):6.1f} % {seconds:6.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=["logistic", "telescoping"], choices=["logistic", "telescoping"])
    parser.add_argument("--dimensions", nargs="*", type=int, default=[2, 10, 50])
    parser.add_argument("--divergences", nargs="*", type=float, default=[1.0, 5.0, 10.0, 20.0, 50.0], help="in nats")
    parser.add_argument("--samples", type=int, default=10_000, help="of each side, where they are fixed")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--bridges", type=int, default=8)
    parser.add_argument("--pairs", nargs="*", type=int, default=[40, 80], help="dimensions of the correlated pairs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of telescoping on correlated pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps and one seed: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds = max(arguments.steps // 10, 1), arguments.seeds[:1]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for kind in arguments.kinds if arguments.dimensions else []:
        shifted(kind, arguments)
    print("\ncorrelated pairs against independent ones")
    for features in arguments.pairs:
        for kind in arguments.kinds:
            for seed in arguments.seeds if kind == "telescoping" else arguments.seeds[:1]:
                pairs(kind, features, seed, arguments.steps)


if __name__ == "__main__":
    main()

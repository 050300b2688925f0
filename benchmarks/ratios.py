"""How wrong a learned log ratio is: one logistic classifier and a telescoping chain, at divergences that are known.

    OMP_NUM_THREADS=1 python benchmarks/ratios.py

Parts ``classifier`` and ``telescoping``: q = N(m, I) against N(0, I), MLPs d-128-128, a table each. A figure is the
mean of the learned log ratio over 20 000 samples of q that it has not seen. Figures come in twos: trained on samples
drawn anew each step, and on fixed sets of 10 000 of each side. "trusted to" is the largest estimate up to which all are
within 10 %.

Part ``pairs``: pairs of correlated normals against independent ones, whose divergence is their mutual information
(Rhodes, Xu & Gutmann 2020, *Telescoping density-ratio estimation*, 2006.12204), MLPs d-256-256, new samples each step.

Each run is 4000 steps of Adam, whose learning rate falls from 1e-3 to 0. The chain has 8 bridges and takes 128 samples
of each side a step where the classifier takes 512, so that both critics read about as many rows.
"""

import argparse
import math
import os
import platform
import sys
import time

import torch
from torch import Tensor

from pyrogen.evaluation import RatioCalibration, calibrate_ratio, fit_ratio
from pyrogen.inference import Logistic, Ratio, Telescoping
from pyrogen.networks import Critic

CORRELATION = 0.7951
"""Gives 40, 80, 160 dimensions 10, 20, 40 nats of mutual information."""

BATCH = {"classifier": 512, "telescoping": 128}
HELD_OUT = 20_000


def make_ratio(kind: str, features: int, width: int, bridges: int) -> Ratio:
    if kind == "telescoping":
        return Telescoping.between(features, bridges=bridges, hidden=(width, width))
    return Logistic(Critic(features, hidden=(width, width)))


def row(title: str, cells: list[str]) -> None:
    print(f"{title:>10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def shifted(kind: str, arguments: argparse.Namespace) -> None:
    """A table of estimates: a row for each divergence, a column for each number of dimensions, fresh / fixed."""
    columns = [(features, samples) for features in arguments.dimensions for samples in (None, arguments.samples)]
    estimates: dict[tuple[int, int | None], list[float]] = {column: [] for column in columns}
    started = time.perf_counter()
    print(f"\n{kind}, N(m, I) against N(0, I): fresh / {arguments.samples} fixed samples; * is more than 10 % off")
    row("true KL", [f"d = {features}" for features in arguments.dimensions])
    for divergence in arguments.divergences:
        print(f"{divergence:10g}", end="", flush=True)
        for features, samples in columns:
            # One divergence at a time, so that each figure is shown as it comes; the seeds are the same either way.
            (estimate,) = calibrate_ratio(
                lambda d: make_ratio(kind, d, 128, arguments.bridges),
                features=features,
                samples=samples,
                steps=arguments.steps,
                batch_size=BATCH[kind],
                divergences=(divergence,),
                seed=arguments.seed,
            ).estimated
            estimates[features, samples].append(estimate)
            shown = f"{estimate:.2f}" + ("*" if abs(estimate / divergence - 1) > 0.1 else "")
            print(f"{shown:>9} /" if samples is None else f"{shown:>7}", end="", flush=True)
        print(flush=True)
    trusted = {
        column: RatioCalibration(tuple(arguments.divergences), tuple(values)).trusted
        for column, values in estimates.items()
    }
    cells = [f"{trusted[d, None]:9.2f} /{trusted[d, arguments.samples]:7.2f}" for d in arguments.dimensions]
    row("trusted to", cells)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


def correlated_pairs(n: int, features: int) -> Tensor:
    """Samples ``(n, features)``: the second half of the dimensions is correlated with the first, one by one."""
    first, noise = torch.randn(2, n, features // 2)
    return torch.cat([first, CORRELATION * first + math.sqrt(1 - CORRELATION**2) * noise], -1)


def pair(kind: str, features: int, seed: int, arguments: argparse.Namespace) -> None:
    """One estimate of the mutual information, on a line of its own."""
    torch.manual_seed(seed)
    ratio = make_ratio(kind, features, 256, arguments.bridges)
    started = time.perf_counter()
    fit_ratio(
        ratio,
        lambda n: correlated_pairs(n, features),
        lambda n: torch.randn(n, features),
        steps=arguments.steps,
        batch_size=BATCH[kind],
    )
    seconds = time.perf_counter() - started
    with torch.no_grad():
        estimate = ratio.log_ratio(correlated_pairs(HELD_OUT, features)).double().mean().item()
    exact = -features / 4 * math.log(1 - CORRELATION**2)
    error = 100 * (estimate / exact - 1)
    figures = f"{exact:8.2f} {estimate:9.2f} {error:6.1f} % {seconds:5.0f} s"
    print(f"{kind:>12} {features:4d} {seed:5d} {figures}", flush=True)


def pairs(arguments: argparse.Namespace) -> None:
    print("\ncorrelated pairs against independent ones")
    print(f"{'':12} {'d':>4} {'seed':>5} {'true MI':>8} {'estimate':>9} {'error':>8}", flush=True)
    for features in arguments.pairs:
        for seed in arguments.seeds:
            pair("telescoping", features, seed, arguments)
        pair("classifier", features, arguments.seeds[0], arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["classifier", "telescoping", "pairs"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--dimensions", nargs="+", type=int, default=[2, 10, 50], help="of the shifted Gaussians")
    parser.add_argument("--divergences", nargs="+", type=float, default=[1.0, 5.0, 10.0, 20.0, 50.0], help="in nats")
    parser.add_argument("--samples", type=int, default=10_000, help="of each side, where they are fixed")
    parser.add_argument("--seed", type=int, default=0, help="of the shifted Gaussians")
    parser.add_argument("--pairs", nargs="+", type=int, default=[40, 80], help="dimensions of correlated pairs, even")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the chain on correlated pairs")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--bridges", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps and one seed: does it run?")
    arguments = parser.parse_args()
    if any(features < 2 or features % 2 for features in arguments.pairs):
        parser.error(f"--pairs are even numbers of dimensions, half of them on each side, got {arguments.pairs}")
    arguments.divergences = sorted(set(arguments.divergences))
    if arguments.quick:
        arguments.steps, arguments.seeds = max(arguments.steps // 10, 1), arguments.seeds[:1]
    return arguments


def main() -> None:
    arguments = parse()
    processor = platform.processor() or platform.machine()
    print("python " + " ".join(sys.argv))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}, {os.cpu_count()} cores")
    for kind in ("classifier", "telescoping"):
        if kind in arguments.parts:
            shifted(kind, arguments)
    if "pairs" in arguments.parts:
        pairs(arguments)


if __name__ == "__main__":
    main()

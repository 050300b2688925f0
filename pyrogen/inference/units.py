"""Latent units: how much the posterior mean of each differs between observations."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from pyro import poutine
from torch import Tensor

from pyrogen.inference.programs import Copies, data_frame, rehearsal, repeat, row_axis, sample_sites, trace_of

__all__ = ["INACTIVE", "UNIT_ROWS", "by_row", "inactive_units", "means", "names_of_units", "unit_variances"]

INACTIVE = 0.01
"""The variance of its posterior mean up to which a unit is inactive (Burda, Grosse & Salakhutdinov 2016)."""

UNIT_ROWS = 1000
"""How many rows at most give the variances of an epoch."""

NOISY_ROWS, DRAWS = 50, 64
"""How many rows and draws where means are averages over draws: the error at a unit that says nothing is 1/64 √(2/50) =
0.003 of its own variance. For one cost, few rows and many draws make it least."""


def by_row(node: dict[str, Any], value: Tensor, copies: int) -> Tensor:
    """A value of a site by copy and row: ``(K, B, *nested plates, *event)``, or ``(*plates, *event)`` if global."""
    return value if data_frame(node) is None else value.movedim(row_axis(node), 0).unflatten(0, (copies, -1))


def means(node: dict[str, Any]) -> Tensor | None:
    """The mean of a site's distribution in the shape of its value, or None where it has none in closed form."""
    try:
        return node["fn"].mean.expand_as(node["value"])
    except (NotImplementedError, AttributeError):
        return None


def unit_variances(
    passes: Iterable[tuple[slice, int, poutine.Trace]], names: Sequence[str], count: int, particles: int
) -> dict[str, Tensor]:
    r"""The variance over observations of the posterior mean of each unit, less what is noise of the draws.

    .. math:: \hat A_u = \operatorname{Var}_x(\hat m) - \tfrac{1}{K} \mathbb{E}_x [s^2]

    Args:
        passes: Rows of a pass, how many copies of them, and a guide's trace on these.
        names: Per-observation latent sites.
        count: The number of rows in all.
        particles: The number K of copies of each in all; of one alone no noise is taken off.

    Returns:
        By site ``(*nested plates, *event)``.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    like: dict[str, Tensor] = {}
    for part, copies, trace in passes:
        nodes = sample_sites(trace)
        for name in names:
            node = nodes[name]
            mean, like[name] = means(node), node["value"]
            m = by_row(node, node["value"] if mean is None else mean, copies).double().cpu()
            if name not in sums:
                sums[name] = m.new_zeros(count, *m.shape[2:])
                squares[name] = sums[name].clone()
            sums[name][part] += m.sum(0)
            squares[name][part] += m.square().sum(0)
    variances = {}
    for name in names:
        mean = sums[name] / particles
        noise = (squares[name] / particles - mean.square()).clamp(min=0) / max(1, particles - 1)
        variances[name] = (mean.var(0) - noise.mean(0)).to(like[name])
    return variances


def names_of_units(site: str, shape: Sequence[int]) -> list[str]:
    """``z[0]``, ``z[1]``, ... or for more dimensions ``z[0,0]``, ..., in the order of the flattened site.

    Example:
        >>> names_of_units("z", (2, 2)), names_of_units("scale", ())
        (['z[0,0]', 'z[0,1]', 'z[1,0]', 'z[1,1]'], ['scale'])
    """
    site = "_".join(site.split())  # names stand side by side, parted by spaces
    if not shape:
        return [site]
    return [f"{site}[{','.join(map(str, index))}]" for index in product(*map(range, shape))]


def inactive_units(guide: Callable, names: Sequence[str], batch: tuple[Tensor, ...]) -> list[str]:
    """The units whose posterior mean hardly differs between the rows of a batch, at one draw of the global sites.

    Args:
        guide: A program.
        names: Per-observation latent sites.
        batch: Tensors of at least two rows; 50 of them serve where means are not known in closed form.
    """
    with rehearsal(guide):
        rows, particles = len(batch[0]), 1
        trace = trace_of(guide, *batch)
        nodes = sample_sites(trace)
        if len(nodes) > 1 or any(means(node) is None for node in nodes.values()):
            batch, particles = tuple(x[:: math.ceil(rows / NOISY_ROWS)] for x in batch), DRAWS
            rows = len(batch[0])
            with Copies(particles):
                trace = trace_of(guide, *repeat(batch, particles))
        variances = unit_variances([(slice(0, rows), particles, trace)], names, rows, particles)
    found = []
    for name, variance in variances.items():
        flat = (variance <= INACTIVE).flatten().tolist()
        found += [unit for unit, idle in zip(names_of_units(name, variance.shape), flat, strict=True) if idle]
    return found

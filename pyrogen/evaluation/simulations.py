"""Simulations from a model, and what its guide draws given what they show."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogen.arguments import check_counts
from pyrogen.evaluation.running import Prepared, by_row, parts, passes, prepared
from pyrogen.inference.draws import is_masked
from pyrogen.inference.programs import row_axis, sample_sites, trace_of
from pyrogen.inference.turns import seeded

__all__ = ["Simulated", "guide_draws", "simulate", "simulating"]

FEWEST = 20
"""Simulations below which hardly any error could be seen."""


@dataclass(frozen=True, eq=False)
class Simulated:
    """Draws from the model, of b observations or of one data set.

    Attributes:
        latents: By site ``(1, b, *unit)``.
        batch: The tensors that the programs take, with simulated observations.
        trace: The model on these.
        row: The row that stands for a data set, or None where each row is a simulation.
    """

    latents: dict[str, Tensor]
    batch: tuple[Tensor, ...]
    trace: poutine.Trace
    row: int | None


@contextmanager
def simulating(
    model: Callable, guide: Callable | None, x: Any, simulations: int, draws: int, seed: int, rows: int
) -> Iterator[Prepared]:
    """Programs that simulations can check, as in :func:`~pyrogen.evaluation.running.prepared`."""
    check_counts(simulations=simulations, draws=draws)
    if simulations < FEWEST:
        raise ValueError(f"expected at least {FEWEST} simulations, got {simulations}: fewer show no error of a guide")
    with prepared(model, guide, x, seed=seed, particles=draws, rows=rows, values=False) as pair:
        if not pair.latents:
            raise ValueError("the model has no latent sites, so there is no posterior to be tested")
        if pair.point_masses:
            raise ValueError(
                f"the guide's distribution at the latent sites {[*pair.point_masses]} is a point mass (Delta), whose "
                "draws tell nothing of a posterior; use another family"
            )
        if masked := [name for name, node in pair.nodes.items() if is_masked(node)]:
            raise ValueError(
                f"the sites {masked} are masked, and what is idle has no posterior; use a model without masks"
            )
        if pair.has_global:
            _check_global(pair, rows)
        yield pair


def _check_global(pair: Prepared, rows: int) -> None:
    """Raise a ``ValueError`` where a data set is too large, or does not matter to the guide's global sites."""
    if len(pair.batch[0]) > rows:
        raise ValueError(
            f"the model has global sites, for which the guide has to see all {len(pair.batch[0])} rows of a data set "
            f"at once, and rows={rows} allows fewer; pass fewer observations or more rows"
        )
    names = [name for name, site in pair.latents.items() if site.is_global]
    found = []
    for simulated in simulate(pair, 2, rows):
        with seeded(0, pair.batch[0].device):  # the same noise for two data sets
            nodes = sample_sites(trace_of(pair.guide, *simulated.batch))
        found.append([nodes[name]["value"] for name in names])
    if all(torch.equal(first, second) for first, second in zip(*found, strict=True)):
        raise ValueError(
            f"the guide draws the global sites {names} alike for all data sets: it is fitted to one, and not "
            "right for others. Hold these sites at a value in both programs and test the other sites, by "
            f"poutine.block(poutine.condition(program, data={{{names[0]!r}: value}}), hide={names}), or pass a guide "
            "that reads them off its arguments"
        )


def simulate(pair: Prepared, simulations: int, rows: int) -> Iterator[Simulated]:
    """So many simulations: as many rows at a time as may be run, or with global sites a data set at a time."""
    count = len(pair.batch[0])
    if pair.has_global:
        for _ in range(simulations):
            yield _simulation(pair, pair.batch, int(torch.randint(count, ())))
        return
    order = torch.cat([torch.randperm(count) for _ in range(math.ceil(simulations / count))])[:simulations]
    for part in parts(simulations, 1, rows):
        yield _simulation(pair, tuple(x[order[part].to(x.device)] for x in pair.batch), None)


def _simulation(pair: Prepared, batch: tuple[Tensor, ...], row: int | None) -> Simulated:
    drawn = trace_of(poutine.uncondition(pair.model), *batch)
    nodes, shown, values = sample_sites(drawn), [*batch], {}
    for name in pair.observed:
        place = _place(pair, name)
        values[name] = nodes[name]["value"]
        by_rows = values[name].movedim(row_axis(nodes[name]), 0)
        if by_rows.numel() != shown[place].numel():
            raise ValueError(_COMPUTED.format(name))
        shown[place] = by_rows.reshape(shown[place].shape).to(shown[place].dtype)
    trace = trace_of(poutine.replay(pair.model, trace=drawn), *shown)
    for name, value in values.items():
        if not torch.equal(torch.as_tensor(trace.nodes[name]["value"]).to(value), value):
            raise ValueError(_COMPUTED.format(name))
    return Simulated(_latents(pair, trace, 1, row), tuple(shown), trace, row)


_COMPUTED = (
    "the observed site '{}' is computed from the data that the model is called with, so it is not clear which data "
    "would show what is simulated; observe one of the tensors as it is, or reshaped"
)


def _place(pair: Prepared, name: str) -> int:
    """Which of the batch's tensors a site observes: the one whose memory it shares, else the first of its size."""
    value = pair.nodes[name]["value"]
    sized = [place for place, x in enumerate(pair.batch) if x[:2].numel() == value.numel()]
    memory = value.untyped_storage().data_ptr()
    shared = [place for place in sized if pair.batch[place].untyped_storage().data_ptr() == memory]
    if not sized:
        raise ValueError(_COMPUTED.format(name))
    return (shared or sized)[0]


def _latents(pair: Prepared, trace: poutine.Trace, copies: int, row: int | None) -> dict[str, Tensor]:
    """By site ``(K, b, *unit)``."""
    nodes, found = sample_sites(trace), {}
    for name, site in pair.latents.items():
        value = by_row(nodes[name], nodes[name]["value"], copies)
        if not torch.isfinite(value).all():
            raise ArithmeticError(f"a draw of the latent site '{name}' is not finite, by the model or by the guide")
        if site.is_global:
            value = value[None, None]
        elif row is not None:
            value = value[:, row : row + 1]
        found[name] = value
    return found


def guide_draws(
    pair: Prepared, simulated: Simulated, draws: int, rows: int
) -> Iterator[tuple[slice, int, dict[str, Tensor], poutine.Trace]]:
    """The guide's draws: simulations, copies of them, latents ``(K, b, *unit)``, and the trace."""
    alone = simulated.row is None
    for part, copies, trace in passes(pair.guide, simulated.batch, draws, rows, copies=None if alone else 1):
        latents = _latents(pair, trace, copies, simulated.row)
        yield part if alone else slice(0, 1), copies, latents, trace

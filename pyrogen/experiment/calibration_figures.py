"""Pictures of simulation-based checks: ranks and coverage of each fit, and where those of an exact guide would stay.

As in :mod:`pyrogen.experiment.figures`, functions take results by name of the fit and return a Matplotlib ``Figure``
that belongs to no window.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from scipy import stats

from pyrogen.evaluation.simulation_based import SimulationBasedCalibration
from pyrogen.evaluation.tarp import TARP
from pyrogen.evaluation.uniform_ranks import LEVEL, ecdf_band
from pyrogen.experiment.figures import COLOURS, literal
from pyrogen.experiment.latent_figures import WIDTH

__all__ = ["coverage", "ranks", "stacked"]

_BINS = 20
_NAMED = len(COLOURS) - 1
"""How many failing units have a colour and a name of their own."""


def ranks(results: Mapping[str, SimulationBasedCalibration]) -> Figure:
    """Ranks of every fit: how far each unit's distribution function is from the uniform one, and a histogram.

    Left, the functions' differences from the diagonal, one line a unit, with the band in which a line of an exact guide
    stays as a whole: with probability 0.95 one line, and lighter all lines. Those of failing units, the worst first,
    have colours; a line above the diagonal at the left and below it at the right is that of draws too narrow. Right,
    the histogram of the unit with the smallest p-value, and where 0.95 of an exact guide's bars end.

    Säilynoja, Bürkner & Vehtari 2022, *Graphical test for discrete uniformity*, 2103.10522.

    Args:
        results: By name of the fit, what
            :func:`~pyrogen.evaluation.simulation_based.simulation_based_calibration` returned.

    Raises:
        ValueError: Without results.
    """
    _check(results)
    figure = Figure(figsize=(10, 2.9 * len(results) + 0.6), layout="constrained", dpi=150)
    grid = figure.subplots(len(results), 2, squeeze=False, width_ratios=[1.5, 1])
    for (left, right), (name, found) in zip(grid, results.items(), strict=True):
        _differences(left, found)
        left.set_title(f"{name}: p = {found.p_value:.2g} for all units", fontsize=11)
        _histogram(right, found)
    for axes in grid[-1]:
        axes.set_xlabel("rank of the model's draw among the guide's")
    figure.suptitle(
        "Simulation-based calibration (grey: 0.95 of exact guides, by unit; lighter: all units)", fontsize=13
    )
    return figure


def _differences(axes: Axes, found: SimulationBasedCalibration) -> None:
    levels = torch.arange(found.draws + 2) / (found.draws + 1)
    for level, shade in ((1 - LEVEL / len(found.units), "#EEEEEE"), (1 - LEVEL, "#D5D5D5")):
        _band(axes, found.simulations, found.draws, level, shade)
    failing = [*found.failing][:_NAMED]
    for at, unit in found.units.items():
        if at not in failing:
            axes.plot(levels, unit.shares - levels, color="#777777", linewidth=0.8, alpha=0.6)
    for at, colour in zip(failing, COLOURS, strict=False):
        label = f"{literal(at)}: {found.failing[at]}"
        axes.plot(levels, found.units[at].shares - levels, color=colour, linewidth=1.5, label=label)
    if more := len(found.failing) - len(failing):
        axes.plot([], [], color="#777777", linewidth=0.8, label=f"{more} more fail")
    axes.axhline(0.0, color="#000000", linewidth=0.6)
    if failing:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + (0.12 + 0.08 * math.ceil(len(failing) / 3)) * (top - bottom))
        axes.legend(fontsize=7, ncols=3, loc="upper center", columnspacing=1, handlelength=1.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1], ["0", f"{found.draws}"])
    axes.set_ylabel("ECDF − uniform")
    axes.grid(alpha=0.3)


def _histogram(axes: Axes, found: SimulationBasedCalibration) -> None:
    places = found.draws + 1
    bins = max(b for b in range(1, min(_BINS, places) + 1) if places % b == 0 or b == 1)
    bins = bins if bins >= 5 else min(_BINS, places)
    worst = min(found.units, key=lambda at: found.units[at].p_value)
    edges = [math.ceil(k * places / bins) for k in range(bins + 1)]
    widths = np.diff(edges)
    bars = np.histogram(found.units[worst].ranks.numpy(), edges)[0] / widths
    axes.bar(edges[:-1], bars, width=widths, align="edge", color=COLOURS[0], edgecolor="white", linewidth=0.5)
    ends = (LEVEL / 2, 1 - LEVEL / 2)
    low, high = (stats.binom.ppf(end, found.simulations, widths / places) / widths for end in ends)
    axes.stairs(high, edges, baseline=low, fill=True, color="#777777", alpha=0.35)
    axes.set_title(f"{worst}, the smallest p-value", fontsize=11)
    axes.set_ylabel("simulations a rank")
    axes.set_xlim(0, places)


def coverage(results: Mapping[str, TARP]) -> Figure:
    """Expected coverage of every fit by credibility, the difference of the two, and the simultaneous band.

    The band is the one in which the curve of an exact guide stays as a whole with probability 0.95, for the smallest
    number of simulations among the fits. Lemos et al. 2023, 2302.03026.

    Args:
        results: By name of the fit, what :func:`~pyrogen.evaluation.tarp` returned.

    Raises:
        ValueError: Without results.
    """
    _check(results)
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2)
    smallest = min(results.values(), key=lambda found: found.simulations)
    _band(panels[1], smallest.simulations, smallest.draws, 1 - LEVEL, "#D5D5D5")
    lower, upper = ecdf_band(smallest.simulations, smallest.draws, 1 - LEVEL)
    panels[0].fill_between(smallest.levels[1:-1], lower, upper, color="#D5D5D5", linewidth=0)
    panels[0].plot([0, 1], [0, 1], color="#000000", linewidth=0.6)
    panels[1].axhline(0.0, color="#000000", linewidth=0.6)
    looks = itertools.product(("-", "--", ":", "-."), COLOURS)
    for (name, found), (style, colour) in zip(results.items(), looks, strict=False):
        look = {"color": colour, "linestyle": style, "linewidth": 1.5, "label": f"{name} (p = {found.p_value:.2g})"}
        panels[0].plot(found.levels, found.coverage, **look)
        panels[1].plot(found.levels, found.coverage - found.levels, **look)
    for axes, label in zip(panels, ("expected coverage", "expected coverage − credibility"), strict=True):
        axes.set_xlabel("credibility")
        axes.set_ylabel(label)
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1)
    panels[0].legend(fontsize=9)
    figure.suptitle("Coverage around random reference points (TARP)", fontsize=13)
    return figure


def stacked(figure: Figure, height: float = 5.6) -> Figure:
    """A figure for a column of a page: panels and legends one below the other, and no title, which the page gives."""
    places = GridSpec(len(figure.axes), 1, figure=figure)
    for place, axes in enumerate(figure.axes):
        axes.set_subplotspec(places[place])
        if (legend := axes.get_legend()) is not None:
            legend.remove()
            handles, names = axes.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", frameon=False, fontsize=9, ncols=2)
    figure.axes[0].set_title("")
    figure.suptitle("")
    figure.set_size_inches(WIDTH, height)
    return figure


def _band(axes: Axes, simulations: int, draws: int, level: float, shade: str) -> None:
    """The band of the difference from the diagonal."""
    points = torch.arange(1, draws + 1) / (draws + 1)
    lower, upper = ecdf_band(simulations, draws, level)
    axes.fill_between(points, lower - points, upper - points, color=shade, linewidth=0)


def _check(results: Mapping) -> None:
    if not results:
        raise ValueError("expected at least one result by name of the fit, got none")

"""Pictures of one fit: grids of images with names to their lines, and clouds of points with contours of densities.

As in :mod:`pyrogen.experiment.figures` every function takes plain tensors and returns a Matplotlib ``Figure``. These
are narrow, so that their letters can be read on a phone.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pyrogen.experiment.figures import CLASS_COLOURS, COLOURS, literal, picture

__all__ = ["MASSES", "aggregate", "box_of", "density_of", "highest_density_levels", "image_grid", "vectors"]

WIDTH = 5.0
MASSES = (0.5, 0.95)
"""How much of a distribution its contours hold: the smallest regions with so much of it."""
BINS = 96
_WIDTHS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)
"""Of kernels, in units of Scott's rule, which is right for one normal and far too wide for rings and several modes."""

Box = tuple[tuple[float, float], tuple[float, float]]


def image_grid(images: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Figure:
    """Images in lines and columns that have names.

    Args:
        images: ``(lines, columns, C, H, W)``, with pixels in [0, 1].
        rows: The name of each line, or nothing.
        columns: The name of each column, or nothing.
    """
    lines, across, _, height, width = images.shape
    shown = picture(images.flatten(0, 1), across)
    figure = Figure(figsize=(WIDTH, WIDTH * shown.shape[0] / shown.shape[1]), dpi=150)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(shown, interpolation="nearest", aspect="auto")
    axes.set_yticks(_centres(lines, height) if rows else [], rows or None)
    axes.set_xticks(_centres(across, width) if columns else [], columns or None)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return figure


def _centres(count: int, size: int) -> list[float]:
    """Where the middles of so many images lie, with a pixel between them."""
    return [1 + k * (size + 1) + (size - 1) / 2 for k in range(count)]


def box_of(*clouds: Tensor) -> Box:
    """A box around clouds of points ``(N, 2)`` that leaves the outermost 0.2 % of each side of them out."""
    low = np.min([np.quantile(_numbers(points), 0.002, axis=0) for points in clouds], axis=0)
    high = np.max([np.quantile(_numbers(points), 0.998, axis=0) for points in clouds], axis=0)
    pad = 0.12 * (high - low) + 1e-3
    (left, bottom), (right, top) = (low - pad).tolist(), (high + pad).tolist()
    return (left, right), (bottom, top)


def density_of(points: Tensor, box: Box, *, together: int = 1) -> np.ndarray:
    """The density of a cloud of points in the cells of a box, by a Gaussian kernel estimate.

    Points are counted in 96 × 96 cells and the counts are blurred, by kernels under which a random half of the points
    makes the other half most likely.

    Args:
        points: ``(N, 2)``.
        box: Its sides; points outside of it count for nothing.
        together: So many points in a row, such as draws given one observation, are of one half.

    Returns:
        Of each cell its share of the points, ``(96, 96)``, the first axis being that of the first value.
    """
    return _smoothed(_numbers(points), box, BINS, together)


def _smoothed(values: np.ndarray, sides: Sequence[tuple[float, float]], bins: int, together: int = 1) -> np.ndarray:
    """Shares of points ``(N, D)`` in the cells of a grid, blurred."""
    count, dimensions = values.shape
    groups = np.arange(count) // together
    first = (np.random.default_rng(0).permutation(groups[-1] + 1) % 2 == 0)[groups]
    fitted, held_out = (np.histogramdd(half, bins, range=sides)[0] for half in (values[first], values[~first]))
    cells = np.array([(high - low) / bins for low, high in sides])
    scott = values.std(0) * count ** (-1 / (dimensions + 4)) / cells

    def blurred(counts: np.ndarray, width: float) -> np.ndarray:
        return gaussian_filter(counts, np.maximum(width * scott, 0.5), mode="constant")

    def log_likelihood(width: float) -> float:
        return float((held_out * np.log(blurred(fitted / max(1, first.sum()), width) + 1e-12)).sum())

    return blurred((fitted + held_out) / count, max(_WIDTHS, key=log_likelihood))


def highest_density_levels(density: np.ndarray, masses: Sequence[float] = MASSES) -> list[float]:
    """The densities above which lie the smallest regions that hold so much, in rising order.

    Args:
        density: Of cells of one size, in any unit.
        masses: Shares of the whole, each between 0 and 1.

    Example:
        >>> highest_density_levels(np.array([[4.0, 3.0], [2.0, 1.0]]), (0.4, 0.7))
        [3.0, 4.0]
    """
    values = np.sort(density.ravel())[::-1]
    held = np.cumsum(values) / values.sum()
    places = np.minimum(np.searchsorted(held, masses), len(values) - 1)
    return sorted({float(values[place]) for place in places})


def aggregate(
    points: Tensor,
    posterior: np.ndarray,
    prior: np.ndarray,
    box: Box,
    names: Sequence[str],
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Figure:
    """Draws of q(z|x) in the plane of two latent units, with contours of q(z) and of p(z).

    Args:
        points: A draw of q(z|x) for each of some observations, ``(N, 2)``.
        posterior, prior: The densities of q(z) and p(z) in the cells of the box, as :func:`density_of` gives them.
        box: Its sides.
        names: Of the two units.
        labels: Integer labels ``(N,)``, which give the points their colours.
        classes: The name of each label.
    """
    figure, axes = _panel()
    handles = _cloud(axes, points, labels, classes)
    for density, colour, style in ((posterior, COLOURS[0], "solid"), (prior, COLOURS[6], "dashed")):
        _contours(axes, density, box, colour, style)
    handles = [_line(COLOURS[0], "-", "q(z)"), _line(COLOURS[6], "--", "p(z)"), *handles]
    _finish(axes, box, names)
    _legend(figure, handles)
    return figure


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, WIDTH * 0.78), dpi=150)
    return figure, figure.add_axes((0.0, 0.0, 0.78, 1.0))


def _cloud(axes: Axes, points: Tensor, labels: Tensor | None, classes: Sequence[str] | None) -> list[Line2D]:
    """Scatter points; returns what the legend says of their colours."""
    values = _numbers(points)
    if labels is None:
        axes.scatter(values[:, 0], values[:, 1], s=7, color="#999999", linewidths=0, alpha=0.7)
        return []
    handles = []
    distinct = labels.unique().tolist()
    for position, label in enumerate(distinct):
        colour = CLASS_COLOURS[position % len(CLASS_COLOURS)]
        chosen = values[np.asarray(labels == label)]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=8, color=colour, linewidths=0, alpha=0.75)
        name = classes[label] if classes else str(label)
        handles.append(Line2D([], [], color=colour, marker="o", linestyle="none", markersize=4, label=literal(name)))
    return handles if len(distinct) <= 12 else []


def _contours(axes: Axes, density: np.ndarray, box: Box, colour: str, style: str) -> None:
    if not density.max() > 0:
        return  # nothing in the box
    levels = highest_density_levels(density)
    middles = (np.linspace(*side, BINS, endpoint=False) + (side[1] - side[0]) / (2 * BINS) for side in box)
    axes.contour(*middles, density.T, levels=levels, colors=colour, linestyles=style, linewidths=1.6)


def _line(colour: str, style: Literal["-", "--"], label: str) -> Line2D:
    return Line2D([], [], color=colour, linestyle=style, linewidth=1.6, label=label)


def _finish(axes: Axes, box: Box, names: Sequence[str]) -> None:
    axes.set_xlim(*box[0])
    axes.set_ylim(*box[1])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.grid(alpha=0.25)


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.79, 1.0), frameon=False, fontsize=9)


def vectors(
    samples: Tensor,
    data: Tensor,
    names: Sequence[str] = ("$x_1$", "$x_2$"),
    labels: tuple[str, str] = ("samples", "data"),
) -> Figure:
    """Samples that are vectors beside data: points with contours of both densities, or two curves for single numbers.

    Args:
        samples, data: ``(N, D)`` and ``(M, D)``; of more than two values the first two are shown.
        names: Of the first two values.
        labels: What the samples and the data are called.
    """
    figure, axes = _panel()
    looks: tuple[tuple[Tensor, str, Literal["-", "--"], str], ...] = (
        (data, COLOURS[6], "--", labels[1]),
        (samples, COLOURS[1], "-", labels[0]),
    )
    if samples.shape[1] == 1:
        for x, colour, style, label in looks:
            axes.plot(*_curve(_numbers(x)[:, 0]), color=colour, linestyle=style, label=label)
        axes.set_xlabel(names[0])
        axes.set_ylabel("density")
        axes.grid(alpha=0.25)
    else:
        box = box_of(data[:, :2])
        first, second = _numbers(samples[:, :2]).T
        axes.scatter(first, second, s=6, color=COLOURS[4], linewidths=0, alpha=0.7)
        for x, colour, style, _ in looks:
            _contours(axes, density_of(x[:, :2], box), box, colour, "dashed" if style == "--" else "solid")
        _finish(axes, box, names)
    _legend(figure, [_line(colour, style, label) for _, colour, style, label in looks])
    return figure


def _curve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel estimate of the density of numbers, as :func:`density_of`."""
    low, high = np.quantile(values, [0.002, 0.998])
    pad = 0.15 * (high - low) + 1e-3
    density = _smoothed(values[:, None], [(low - pad, high + pad)], 4 * BINS)
    cell = (high - low + 2 * pad) / len(density)
    return low - pad + cell * (np.arange(len(density)) + 0.5), density / cell


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()

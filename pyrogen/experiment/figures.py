"""Pictures of a comparison: samples, reconstructions, training curves and latents, one panel or row for each fit.

Every function takes plain tensors and tables and returns a Matplotlib ``Figure`` that belongs to no window. The
colours can be told apart by the colour-blind (Okabe & Ito; Paul Tol's muted scheme for classes).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

from pyrogen.experiment.table import printable
from pyrogen.inference.watch import PREFIX

__all__ = [
    "are_images",
    "comparison",
    "critics",
    "curves",
    "latents",
    "likelihoods",
    "literal",
    "picture",
    "reconstructions",
    "samples",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLASS_COLOURS = (
    *("#332288", "#CC6677", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#777777"),
)
_MARKERS = "osD^v<>P"
_STRIP = 12
_SAMPLES = "Samples from the model: E[x | z], z from the prior"


def are_images(x: Tensor) -> bool:
    """Whether rows are images (C, H, W) with pixels in [0, 1] that a grid can show."""
    return x.dim() == 4 and x.shape[-1] > 1 and bool(x.min() >= -0.5) and bool(x.max() <= 1.5)


def literal(name: str, longest: int = 80) -> str:
    """A name as Matplotlib shows it: dollars and an underscore in front mean nothing, and it is not too long."""
    name = printable(name)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def picture(images: Tensor, columns: int) -> np.ndarray:
    """Images (N, C, H, W) in a grid of so many columns, as Matplotlib shows them, (height, width, 3)."""
    images = images.detach().cpu().float().clamp(0, 1)
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    return make_grid(images, nrow=columns, padding=1, pad_value=0.5).permute(1, 2, 0).numpy()


def _show(axes: Axes, images: Tensor, columns: int) -> None:
    axes.imshow(picture(images, columns), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _panels(count: int, size: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, in lines of three or of four, whichever leaves fewer places empty."""
    columns = count if count < 4 else min((3, 4), key=lambda columns: -count % columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size * columns + 0.4, (size + 0.5) * rows + 0.3), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])


def samples(drawn: Mapping[str, Tensor], data: Tensor, *, columns: int = 8) -> Figure | None:
    """Samples of each fit beside rows of the data: grids of images, or points where rows are vectors.

    Args:
        drawn: By name of the fit, samples ``(N, *event_shape)``; of images, their means given the latents.
        data: Rows of the data, ``(M, *event_shape)``.
        columns: Images in a line.

    Returns:
        The figure, or None for data that are neither images nor vectors of two values or more.
    """
    if not are_images(data) and (data.dim() != 2 or data.shape[1] < 2):
        return None
    figure, panels = _panels(len(drawn) + 1, 3.0)
    for axes, (name, x) in zip(panels, {"data": data, **drawn}.items(), strict=True):
        axes.set_title(literal(name), fontsize=11)
        if are_images(data):
            _show(axes, x[: columns**2], columns)
        else:
            _points(axes, x, data)
    figure.suptitle(_SAMPLES if are_images(data) else "Samples from the model", fontsize=13)
    return figure


def _points(axes: Axes, x: Tensor, data: Tensor) -> None:
    low, high = (data[:, :2].quantile(q, 0).tolist() for q in (0.0, 1.0))
    axes.scatter(data[:, 0].cpu(), data[:, 1].cpu(), s=8, color="#BBBBBB", label="data", linewidths=0)
    if x is not data:
        axes.scatter(x[:, 0].cpu(), x[:, 1].cpu(), s=8, color=COLOURS[0], label="samples", linewidths=0)
    pad = [0.15 * (top - bottom) + 1e-6 for bottom, top in zip(low, high, strict=True)]
    axes.set_xlim(low[0] - pad[0], high[0] + pad[0])
    axes.set_ylim(low[1] - pad[1], high[1] + pad[1])
    of = f" (of {data.shape[1]})" if data.shape[1] > 2 else ""
    axes.set_xlabel(f"$x_1${of}")
    axes.set_ylabel(f"$x_2${of}")


def reconstructions(originals: Tensor, rebuilt: Mapping[str, Tensor]) -> Figure | None:
    """A row of originals, and for each fit a row of what it makes of them.

    Args:
        originals: Images ``(N, C, H, W)``.
        rebuilt: By name of the fit, images of the same shape.

    Returns:
        The figure, or None for data that are no images.
    """
    if not are_images(originals):
        return None
    strips = {"data": originals, **rebuilt}
    figure = Figure(figsize=(10, 0.8 * len(strips) + 0.6), layout="constrained", dpi=150)
    _strips(figure, strips, "Reconstructions of test data")
    return figure


def _strips(figure: Any, strips: Mapping[str, Tensor], title: str, names: bool = True) -> None:
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(strips), 1, squeeze=False).flatten()
    for axes, (name, x) in zip(grid, strips.items(), strict=True):
        _show(axes, x[:_STRIP], _STRIP)
        if names:
            axes.set_ylabel(literal(name), rotation=0, ha="right", va="center", fontsize=10)


def curves(histories: Mapping[str, pd.DataFrame], *, narrow: bool = False) -> Figure:
    """Loss and validation of every fit by epoch, in nats per observation.

    Args:
        histories: By name of the fit, the history of its run.
        narrow: For a column of a page, with the legend below and no title.
    """
    figure = Figure(figsize=(5, 3.6 + 0.1 * len(histories)) if narrow else (9, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    _curves(axes, histories)
    handles, names = axes.get_legend_handles_labels()
    if narrow:
        first = 1 if len(histories) == 1 else 0  # a single fit needs no name
        where: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "ncols": 2}
        figure.legend(handles[first:], names[first:], **where)
    else:
        axes.set_title("Training curves", fontsize=13)
        figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


def _curves(axes: Axes, histories: Mapping[str, pd.DataFrame]) -> None:
    lowest: float = math.inf
    start: list[float] = []
    for (name, history), look in zip(histories.items(), _looks(), strict=False):
        every = max(1, len(history) // 8)
        axes.plot(history["epoch"], history["loss"], label=literal(name), markevery=every, **look)
        bound = history["validation"].fillna(history.get("validation_estimate", math.nan)).dropna()
        axes.plot(history["epoch"][bound.index], -bound, color=look["color"], linestyle="--", linewidth=1.2)
        losses = pd.concat([history["loss"], -bound])
        lowest, start = min(lowest, losses.min()), [*start, losses.quantile(0.98)]
    axes.plot([], [], color="#555555", linestyle="-", label="training")
    axes.plot([], [], color="#555555", linestyle="--", label="validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats per observation)")
    if lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_formatter("{x:.4g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    if start and max(start) > lowest:
        margin = 0.05 * (max(start) - lowest)
        axes.set_ylim(max(lowest - margin, lowest / 2) if lowest > 0 else lowest - margin, max(start) + margin)
    axes.grid(alpha=0.3)


def critics(histories: Mapping[str, pd.DataFrame], *, narrow: bool = False) -> Figure | None:
    """What the critics of every fit did, by epoch: their loss, how well they tell draws apart, the ratio they estimate.

    An accuracy of one half is that of a critic that finds no difference, or has died; one of 1 that of a critic that
    has won, whose ratio can't be trusted.

    Args:
        histories, narrow: As in :func:`curves`.

    Returns:
        The figure, or None if no fit has a critic.
    """
    if not any("critic_loss" in history for history in histories.values()):
        return None
    figure = Figure(figsize=(5, 7.5) if narrow else (13, 3.8), layout="constrained", dpi=150)
    panels = figure.subplots(*((3, 1) if narrow else (1, 3)))
    for (name, history), look in zip(histories.items(), _looks(), strict=False):
        if "critic_loss" not in history:
            continue
        accuracies = [str(column) for column in history if str(column).startswith(PREFIX)]
        look = look | {"markevery": max(1, len(history) // 8)}
        shown = literal(name)
        panels[0].plot(history["epoch"], history["critic_loss"], label=shown, **look)
        for column, style in zip(accuracies, itertools.cycle(("-", "--", ":", "-."))):
            label = f"{shown}: {literal(column.removeprefix(PREFIX))}"
            panels[1].plot(history["epoch"], history[column], linestyle=style, label=label, **look)
        for column in ("rate_estimate", "marginal_kl_estimate"):
            if column in history:
                panels[2].plot(history["epoch"], history[column], label=shown, **look)
    panels[1].axhline(0.5, color="#555555", linewidth=0.8)
    panels[1].set_ylim(0.45, 1.02)
    titles = ("Critics' loss", "Critics' accuracy", "Estimate of rate or marginal KL (nats)")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    return figure


def _looks() -> Any:
    """A colour and a marker for each fit, no two alike for a long while."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(_MARKERS))
    return ({"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4} for colour, marker in pairs)


def latents(
    drawn: Mapping[str, Tensor], labels: Tensor | None = None, classes: Sequence[str] | None = None
) -> Figure | None:
    """Posterior means in the plane, one panel for each fit: the two latents, or their first two principal components.

    Args:
        drawn: By name of the fit, posterior means ``(N, D)``.
        labels: Integer labels ``(N,)``, which give the points their colours.
        classes: The name of each label.

    Returns:
        The figure, or None for a single latent number.
    """
    if any(z.shape[1] < 2 for z in drawn.values()):
        return None
    figure, panels = _panels(len(drawn), 3.2)
    for axes, (name, z) in zip(panels, drawn.items(), strict=True):
        points, axis_names = _plane(z.detach().cpu().double())
        axes.set_title(literal(name), fontsize=11)
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        if labels is None:
            axes.scatter(points[:, 0], points[:, 1], s=9, color=COLOURS[0], linewidths=0, alpha=0.8)
            continue
        for position, label in enumerate(labels.unique().tolist()):
            chosen = points[labels == label]
            look: dict[str, Any] = {"color": CLASS_COLOURS[position % len(CLASS_COLOURS)], "linewidths": 0}
            marker = _MARKERS[position // len(CLASS_COLOURS) % len(_MARKERS)]
            title = literal(classes[label] if classes else str(label), 30)
            axes.scatter(chosen[:, 0], chosen[:, 1], s=12, marker=marker, label=title, alpha=0.85, **look)
    if labels is not None and len(labels.unique()) <= 20:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="label", markerscale=2)
    figure.suptitle("Posterior means of test data", fontsize=13)
    return figure


def _plane(z: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Points in two dimensions, and the names of these."""
    if z.shape[1] == 2:
        return z, ("$z_1$", "$z_2$")
    centred = z - z.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary; fix it so that the same data give the same picture.
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    share = (values.square() / values.square().sum().clamp(min=1e-30))[:2]
    first, second = (f"component {i + 1} of {z.shape[1]} ({float(s):.0%})" for i, s in enumerate(share))
    return centred @ directions[:2].T, (first, second)


def comparison(
    table: pd.DataFrame,
    histories: Mapping[str, pd.DataFrame],
    originals: Tensor,
    rebuilt: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor],
) -> Figure:
    """All at a glance: reconstructions, samples, training curves, and the log-likelihood of test data.

    Args:
        table: The table of the comparison; its columns ``log_likelihood`` and ``log_likelihood_error`` are shown.
        histories, originals, rebuilt, drawn: As in :func:`curves`, :func:`reconstructions` and :func:`samples`.
    """
    shown = are_images(originals)
    lines = len(table) + 1
    height = max(0.62 * lines + 0.5, 3.0)
    figure = Figure(figsize=(14, height + 4.2 if shown else 4.2), layout="constrained", dpi=150)
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 4.2]) if shown else [None, figure]
    if shown:
        left, right = parts[0].subfigures(1, 2, width_ratios=[1.18, 1])
        blank = dict.fromkeys(drawn, torch.ones_like(originals))  # a fit without a guide rebuilds nothing
        _strips(left, {"data": originals, **(blank | dict(rebuilt))}, "Reconstructions of test data")
        _strips(right, {"data": originals.flip(0), **drawn}, _SAMPLES, names=False)
    axes, likelihood = parts[1].subplots(1, 2, width_ratios=[1.5, 1])
    _curves(axes, histories)
    axes.set_title("Training curves", fontsize=13)
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    _likelihoods(likelihood, table)
    likelihood.set_title("Test data, by importance sampling", fontsize=13)
    return figure


def likelihoods(table: pd.DataFrame) -> Figure | None:
    """The log-likelihood of every fit with its standard error.

    Args:
        table: As in :func:`comparison`.

    Returns:
        The figure, or None if no log-likelihood is known.
    """
    if not table["log_likelihood"].notna().any():
        return None
    figure = Figure(figsize=(5, 1.1 + 0.33 * len(table)), layout="constrained", dpi=150)
    axes = figure.subplots()
    _likelihoods(axes, table)
    axes.set_xlabel("log-likelihood (nats per observation)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _likelihoods(axes: Axes, table: pd.DataFrame) -> None:
    places = np.arange(len(table))[::-1]
    for place, (_, row), look in zip(places, table.iterrows(), _looks(), strict=False):
        point = {"color": look["color"], "marker": look["marker"], "markersize": 7, "capsize": 3}
        axes.errorbar(row["log_likelihood"], place, xerr=row["log_likelihood_error"], linestyle="none", **point)
    axes.set_yticks(places, [literal(str(name), 40) for name in table.index])
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set_xlabel("log-likelihood (nats per observation; bars: standard error)")
    axes.grid(alpha=0.3, axis="x")

"""What a report shows of each fit: pictures with their titles and captions, in the order of the page."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyrogen.data import Data, as_float
from pyrogen.evaluation import diagnose, nearest_neighbours, reconstruct, sample, simulation_based_calibration, tarp
from pyrogen.evaluation.running import prepared
from pyrogen.experiment import calibration_figures, figures, latent_figures
from pyrogen.experiment.latent_walks import Latents, decode, interpolation, latents_of, prior_density, traversal
from pyrogen.inference import Run

__all__ = ["Block", "comparison_blocks", "fit_blocks", "labels_of"]

SAMPLES = 64
CLOUD = 2000
"""Samples that are points; and rows of which anything is shown."""
ACROSS = 10
PAIRS, UNITS, STEPS = 6, 8, 9
LATENT_ROWS = 1000
POSTERIOR_DRAWS, PRIOR_DRAWS = 10_000, 20_000
"""Of all observations together, at least; contours from fewer are ragged."""
VALUES = 2**24
"""Of so many numbers training rows are compared with samples at once, 128 MiB."""
_UNDEFINED = (ValueError, ArithmeticError)
"""By which a picture says that it is not defined for a fit. Other errors are faults, of a device or of ours."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """One part of a section of the report.

    Attributes:
        title: What stands above it.
        caption: What is seen, and of how many.
        figure: A picture, or None.
        lines: Plain lines instead of a picture or with it, such as findings.
    """

    title: str
    caption: str
    figure: Figure | None = None
    lines: tuple[str, ...] = ()


Made = tuple[str, Figure] | None
"""A caption and a figure, or None for data that have no such picture."""


@dataclass(frozen=True, eq=False)
class _Fit:
    """A fit with the rows that it was evaluated on, the data that it was fitted to, and the seed of its pictures."""

    run: Run
    evaluated: tuple[Tensor, ...]
    data: Any
    seed: int

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """What is shown of the rows."""
        x, *others = (each[:CLOUD] for each in self.evaluated)
        return as_float(x), *others

    @cached_property
    def images(self) -> bool:
        return figures.are_images(self.x)

    @property
    def x(self) -> Tensor:
        return self.rows[0]

    def first(self, count: int) -> tuple[Tensor, ...]:
        return tuple(x[:count] for x in self.rows)


def comparison_blocks(table: pd.DataFrame, histories: dict[str, pd.DataFrame], x: Tensor) -> list[Block]:
    """What concerns all fits: their log-likelihoods, their training, and rows of the data to hold samples against."""
    found, shown = [], as_float(x[:SAMPLES])
    if "log_likelihood" in table and (figure := figures.likelihoods(table)) is not None:
        caption = "By importance sampling, with the standard error of the mean over the rows."
        found.append(Block("Log-likelihood", caption, figure))
    if trained := {name: history for name, history in histories.items() if not history.empty}:
        caption = "Loss of each fit by epoch, and on validation data the negative bound. "
        caption += "Losses of different objectives are not of one kind; the figures of the table are."
        found.append(Block("Training", caption, figures.curves(trained, narrow=True)))
    if figures.are_images(shown):
        caption = f"The first {len(shown)} of the rows that the figures are computed on."
        found.append(Block("Data", caption, _square(shown)))
    return found


def fit_blocks(
    run: Run, rows: tuple[Tensor, ...], data: Any, seed: int = 0, evaluation_seed: int | None = None
) -> list[Block]:
    """Every picture of a fit that its data and its program allow.

    Args:
        run: The fit.
        rows: Observations that it was not trained on, a tuple of tensors that its programs take.
        data: What was fitted, for labels and nearest neighbours.
        seed: Of the draws.
        evaluation_seed: That of the figures that stand beside the pictures, where it is another one; calibration is
            shown as the evaluation of these rows found it.

    Returns:
        First what is wrong with the fit, then the pictures. Those that such data do not have are left out; of those
        that failed a block says why.
    """
    fit = _Fit(run, rows, data, seed)
    calibrated = seed if evaluation_seed is None else evaluation_seed
    makers: list[tuple[str, Callable[[], Made]]] = [
        ("Samples", lambda: _samples(fit)),
        ("Reconstructions", lambda: _reconstructions(fit)),
        ("Nearest training rows", lambda: _neighbours(fit)),
    ]
    found = [_diagnosis(fit), *(_made(*maker) for maker in makers)]
    try:
        some = fit.first(LATENT_ROWS)
        draws = math.ceil(POSTERIOR_DRAWS / len(some[0]))
        latents = latents_of(run, some, draws=draws, prior_draws=PRIOR_DRAWS, seed=seed)
    except _UNDEFINED as error:
        found.append(Block("Latents", f"Not shown: {error}."))
    else:
        walks: list[tuple[str, Callable[[], Made]]] = [
            ("Interpolations", lambda: _interpolations(fit, latents)),
            ("Latent traversals", lambda: _traversals(fit, latents)),
            ("Latents", lambda: _aggregate(fit, latents)),
        ]
        found += [_made(*maker) for maker in walks]
    found += [
        _made("Calibration", lambda: _ranks(fit, calibrated)),
        _made("Coverage", lambda: _coverage(fit, calibrated)),
        _made("Training", lambda: _curves(fit)),
        _made("Critics", lambda: _critics(fit)),
    ]
    return [block for block in found if block is not None]


def _diagnosis(fit: _Fit) -> Block:
    try:
        found = diagnose(fit.run, fit.data, seed=fit.seed)
    except (*_UNDEFINED, TypeError) as error:
        return Block("Diagnosis", f"Not made: {error}.")
    lines = [" ".join(str(finding).split()) for finding in found] or ["Nothing found."]
    lines += [f"Not looked for: {name} ({why})." for name, why in found.unchecked.items()]
    return Block("Diagnosis", "What is known to go wrong with such fits, looked for in this one.", None, tuple(lines))


def _made(title: str, make: Callable[[], Made]) -> Block | None:
    try:
        found = make()
    except _UNDEFINED as error:
        _log.warning("no figure '%s': %s", title, error)
        return Block(title, f"Not shown: {error}.")
    return None if found is None else Block(title, *found)


def _square(images: Tensor, columns: int = 8) -> Figure:
    whole = images[: max(1, len(images) // columns) * columns]
    columns = min(columns, len(whole))
    return latent_figures.image_grid(whole.unflatten(0, (-1, columns)))


def _samples(fit: _Fit) -> Made:
    count = SAMPLES if fit.images else CLOUD
    drawn = sample(fit.run, count, seed=fit.seed, mean=fit.images, given=fit.first(count)[1:])
    if not isinstance(drawn, Tensor) or not (fit.images or fit.x.dim() == 2):
        return None
    if fit.images:
        return f"{count} samples: E[x | z] with z from the prior, or x where its mean is not known.", _square(drawn)
    of = "" if drawn.shape[1] <= 2 else f", in the first two of {drawn.shape[1]} values"
    caption = f"{count} samples (points, if they have two values or more) and {len(fit.x)} rows of data{of}."
    if drawn.shape[1] > 1:
        caption += " The contours hold 50 % and 95 % of each (kernel density estimates)."
    return caption, latent_figures.vectors(drawn, fit.x)


def _reconstructions(fit: _Fit) -> Made:
    if fit.run.guide is None or not fit.images:
        return None
    shown = fit.first(2 * ACROSS)
    rebuilt = reconstruct(fit.run.model, fit.run.guide, shown, seed=fit.seed)
    if not isinstance(rebuilt, Tensor):
        return None
    across = min(ACROSS, len(shown[0]))
    whole = len(shown[0]) // across * across
    pairs = [x[:whole].cpu().unflatten(0, (-1, across)) for x in (shown[0], rebuilt)]
    lines = torch.stack(pairs, 1).flatten(0, 1)
    names = ["data", "rebuilt"] * (len(lines) // 2)
    return (
        f"{whole} rows, and below each E[x | z] with one draw z from q(z|x).",
        latent_figures.image_grid(lines, names),
    )


def _neighbours(fit: _Fit) -> Made:
    train = fit.data.train if isinstance(fit.data, Data) else fit.data
    if not fit.images or not isinstance(train, Tensor) or train.shape[1:] != fit.x.shape[1:]:
        return None
    drawn = sample(fit.run, ACROSS, seed=fit.seed, mean=True, given=fit.first(ACROSS)[1:])
    if not isinstance(drawn, Tensor):
        return None
    drawn = drawn.cpu().float()
    nearest = as_float(train[_nearest(drawn, train).to(train.device)]).cpu()
    return (
        f"{ACROSS} samples, and below each the nearest of {len(train)} training rows in Euclidean distance: a model "
        "that has memorised them shows the same twice.",
        latent_figures.image_grid(torch.stack([drawn, nearest.float()]), ["sample", "nearest"]),
    )


def _nearest(samples: Tensor, training: Tensor) -> Tensor:
    """Which of all training rows is nearest to each of the samples."""
    parts = training.split(max(1, VALUES // training[0].numel()))
    found = [nearest_neighbours(samples, part.to(samples.device)) for part in parts]
    distances = torch.cat([each.distances for each in found], 1)
    indices = torch.cat([each.indices for each in found], 1)
    part = distances.argmin(1, keepdim=True)
    return (indices.gather(1, part) + part * len(parts[0])).squeeze(1)


def _interpolations(fit: _Fit, latents: Latents) -> Made:
    if not fit.images:
        return None
    guided = latents.posterior is not None
    ends = latents.means[: 2 * min(PAIRS, len(latents.means) // 2)]
    if len(ends) < 2:
        return None
    path = interpolation(ends[::2], ends[1::2], STEPS, spherical=not guided)
    pairs = len(path)
    rows = tuple(x[: 2 * pairs : 2].repeat_interleave(STEPS, 0) for x in _at_least(fit.rows, 2 * pairs))
    decoded = decode(fit.run, path.flatten(0, 1), rows, seed=fit.seed).unflatten(0, (pairs, STEPS))
    if not guided:
        return (
            f"{pairs} ways from one draw of the prior to another, along great circles, decoded.",
            latent_figures.image_grid(decoded),
        )
    data = fit.x[: 2 * pairs].cpu().float().unflatten(0, (pairs, 2))
    lines = torch.cat([data[:, :1], decoded, data[:, 1:]], 1)
    return (
        f"From one row (left) to another (right): {pairs} straight lines between their posterior means, decoded.",
        latent_figures.image_grid(lines, columns=["data", *[""] * STEPS, "data"]),
    )


def _at_least(rows: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Rows, repeated in order where there are fewer."""
    return tuple(x[torch.arange(max(count, len(x)), device=x.device) % len(x)] for x in rows)


def _traversals(fit: _Fit, latents: Latents) -> Made:
    if not fit.images:
        return None
    chosen = latents.most_active(UNITS)
    sizes = latents.prior.std(0)
    moved = traversal(latents.means[0], chosen, sizes, STEPS).flatten(0, 1)
    rows = tuple(x[:1].expand(len(moved), *x.shape[1:]) for x in fit.rows)
    decoded = decode(fit.run, moved, rows, start=latents.means[:1].expand_as(moved), seed=fit.seed)
    names = [figures.literal(latents.names[unit]) for unit in chosen]
    steps = [f"{t:+.0f} sd".replace("-", "−") if t == round(t) and t else "" for t in np.linspace(-2, 2, STEPS)]
    steps[STEPS // 2] = "mean"
    where = "the posterior mean of the first row" if latents.posterior is not None else "a draw of the prior"
    which = "the most active" if latents.posterior is not None else "the first"
    activity = ", ".join(f"{latents.names[unit]} {float(latents.activity[unit]):.2f}" for unit in chosen)
    caption = (
        f"From {where}, one unit at a time is moved by up to two standard deviations of the prior; {len(chosen)} of "
    )
    caption += f"{len(latents.names)} units, {which}."
    if latents.posterior is not None and len(latents.means) > 1:
        caption += f" Variance of the posterior mean over that of the prior: {activity}."
    return caption, latent_figures.image_grid(decoded.unflatten(0, (len(chosen), STEPS)), names, steps)


def _aggregate(fit: _Fit, latents: Latents) -> Made:
    if latents.posterior is None:
        return None
    draws, rows, prior = *latents.posterior.shape[:2], latents.prior
    if len(latents.names) == 1:
        cloud = latents.posterior.reshape(-1, 1)
        figure = latent_figures.vectors(cloud, prior, [*map(figures.literal, latents.names)], ("q(z)", "p(z)"))
        caption = f"Kernel estimates from {draws} draws of q(z|x) for each of {rows} rows, and {len(prior)} of p(z)."
        return caption, figure
    chosen = latents.most_active(2)
    posterior, prior = latents.posterior[..., chosen], prior[:, chosen]
    cloud = posterior.transpose(0, 1).flatten(0, 1)
    box = latent_figures.box_of(cloud, prior)
    exact = _exact_prior(fit, latents, chosen, box)
    labels, classes = labels_of(fit.data, fit.x)
    figure = latent_figures.aggregate(
        posterior[0],
        latent_figures.density_of(cloud, box, together=draws),
        latent_figures.density_of(prior, box) if exact is None else exact,
        box,
        [figures.literal(latents.names[unit]) for unit in chosen],
        None if labels is None else labels[:rows],
        classes,
    )
    which = "" if len(latents.names) == 2 else f", in the two most active of {len(latents.names)} units"
    known = "its density" if exact is not None else f"a kernel estimate from {len(prior)} draws"
    colours = "; colours are labels" if labels is not None else ""
    return (
        f"One draw of q(z|x) for each of {rows} rows{which}{colours}. Contours hold 50 % and 95 % of q(z), a kernel "
        f"estimate from {draws} draws for each row, and of p(z), {known}. Where dashed contours hold no points the "
        "prior has holes; points outside of them are latents that sampling hardly reaches.",
        figure,
    )


def _exact_prior(fit: _Fit, latents: Latents, chosen: list[int], box: latent_figures.Box) -> np.ndarray | None:
    """The density of p(z) in the cells of a box in the plane, where these are all the units and it is known."""
    if len(latents.names) != 2:
        return None
    count = latent_figures.BINS
    middles = [torch.linspace(low, high, 2 * count + 1, dtype=torch.float64)[1::2] for low, high in box]
    grid = torch.cartesian_prod(*middles)
    order = [chosen.index(unit) for unit in range(2)]
    density = prior_density(fit.run, fit.first(2), grid[:, order])
    return None if density is None else density.view(count, count).numpy()


def labels_of(data: Any, x: Tensor) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """The labels of rows and the names of classes, if the rows are the first of a split that has labels."""
    if isinstance(data, Data):
        for split in ("test", "validation", "train"):
            rows, labels = getattr(data, split), getattr(data, f"{split}_labels")
            if labels is not None and len(rows) >= len(x) and as_float(rows[: len(x)]).equal(as_float(x)):
                return labels[: len(x)], data.classes
    return None, None


def _simulated(fit: _Fit, check: Callable, seed: int) -> Any:
    """What a check of the guide finds by simulations, the same as in the fit's evaluation.

    None where there is no guide, and with global sites, of which every simulation takes a data set of its own.
    """
    run = fit.run
    if run.guide is None:
        return None
    with prepared(run.model, run.guide, fit.first(2), seed=seed, values=False) as pair:
        if pair.has_global or not pair.latents:
            return None
    return check(run.model, run.guide, fit.evaluated, seed=seed)


def _ranks(fit: _Fit, seed: int) -> Made:
    if (found := _simulated(fit, simulation_based_calibration, seed)) is None:
        return None
    others = " and in log p(x|z)" if "log_likelihood" in found.ranks else ""
    caption = (
        f"Where each of {found.simulations} draws of the model ranks among {found.draws} of the guide given what it "
        f"shows, in {len(found.units) - bool(others)} units{others}. A unit of a right guide stays in the band, all in "
        f"the lighter one; ranks as uneven as these have the probability {_p(found.p_value)}. Below, the unit with the "
        "smallest p."
    )
    return caption, calibration_figures.stacked(calibration_figures.ranks({"guide": found}))


def _coverage(fit: _Fit, seed: int) -> Made:
    if (found := _simulated(fit, tarp, seed)) is None:
        return None
    caption = (
        f"How often credible regions around random points hold the model's draw, in {found.simulations} simulations "
        f"with {found.draws} draws each (TARP). A right guide stays in the band, and is as far off with probability "
        f"{_p(found.p_value)}."
    )
    figure = calibration_figures.coverage({"guide": found})
    if (legend := figure.axes[0].get_legend()) is not None:
        legend.remove()
    return caption, calibration_figures.stacked(figure)


def _p(value: float) -> str:
    """With as many digits as in the table."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _curves(fit: _Fit) -> Made:
    history = fit.run.history
    if history.empty:
        return None
    return f"Loss and the negative bound on validation data, {len(history)} epochs.", figures.curves(
        {fit.run.objective.__class__.__name__: history}, narrow=True
    )


def _critics(fit: _Fit) -> Made:
    figure = figures.critics({fit.run.objective.__class__.__name__: fit.run.history}, narrow=True)
    if figure is None:
        return None
    return (
        "An accuracy of one half is that of a critic that finds no difference, or has died; one of 1 that of a critic "
        "that has won, whose ratio can't be trusted.",
        figure,
    )

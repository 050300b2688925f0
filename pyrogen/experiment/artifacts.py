"""What a comparison leaves in its folder beside the fits: table, figures, report, and the posteriors for ArviZ."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray
from matplotlib.figure import Figure
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.data import as_float
from pyrogen.evaluation import posterior_samples, reconstruct, sample, to_arviz
from pyrogen.evaluation.frames import assemble, datasets_of
from pyrogen.experiment import figures
from pyrogen.experiment.report import write_report
from pyrogen.experiment.report_blocks import labels_of
from pyrogen.experiment.table import Comparison
from pyrogen.inference import Run
from pyrogen.inference.checkpoints import atomically

__all__ = ["join_posteriors", "posterior_means", "write_artifacts", "write_figures", "write_posteriors"]

POSTERIOR_ROWS = 16
_SHOWN = 64
_SCATTERED = 1000
_log = logging.getLogger(__name__)


def write_artifacts(folder: Path, table: Comparison, rows: tuple[Tensor, ...], data: Any, seed: int) -> None:
    """Write ``table.csv``, ``figures/``, ``posteriors.nc``, ``report.html`` and ``report.md``.

    Args:
        folder: The comparison's folder.
        table: The comparison.
        rows: The rows that it was evaluated on.
        data: What was fitted; labels of test rows colour the latents.
        seed: Of the draws.
    """
    with atomically(folder / "table.csv") as temporary:
        pd.DataFrame(table).to_csv(temporary)
    write_figures(folder / "figures", table, rows, data, seed)
    guided = _with_guide(table.runs)
    if guided:
        write_posteriors(folder / "posteriors.nc", guided, tuple(x[:POSTERIOR_ROWS] for x in rows), seed)
    write_report(folder, table, rows, data, seed)


def _with_guide(runs: Mapping[str, Run]) -> dict[str, Run]:
    return {name: run for name, run in runs.items() if run.guide is not None}


def write_figures(folder: Path, table: Comparison, rows: tuple[Tensor, ...], data: Any, seed: int) -> None:
    """Draw every figure that the data allow; what can't be drawn is said in the log."""
    runs = table.runs
    x = as_float(rows[0])
    labels, classes = labels_of(data, rows[0])
    images = figures.are_images(x)
    count = _SHOWN if images else _SCATTERED
    shown = (x[:count], *(other[:count] for other in rows[1:]))
    histories = {name: run.history for name, run in runs.items()}
    drawn = _each("samples", runs, lambda run: sample(run, count, seed=seed, mean=images, given=shown[1:]))
    guided = _with_guide(runs)
    rebuilt = _each("reconstructions", guided, lambda run: reconstruct(run.model, run.guide, shown, seed=seed)) or {}
    some = tuple(x[:_SCATTERED] for x in rows)
    means = {name: posterior_means(run, some, seed=seed) for name, run in guided.items()}
    made = {
        "samples": figures.samples(drawn, shown[0]) if drawn else None,
        "reconstructions": figures.reconstructions(shown[0], rebuilt) if rebuilt else None,
        "curves": figures.curves(histories),
        "critics": figures.critics(histories),
        "latents": figures.latents(means, None if labels is None else labels[:_SCATTERED], classes) if means else None,
        "comparison": figures.comparison(table, histories, shown[0], rebuilt, drawn or {}),
    }
    for name, figure in made.items():
        if figure is None and name == "critics":
            continue
        if figure is None:
            _log.warning("no figure '%s': data of event shape %s have no such picture", name, tuple(x.shape[1:]))
        else:
            save_figure(figure, folder / f"{name}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with atomically(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.1)


def _each(what: str, runs: Mapping[str, Run], draw: Any) -> dict[str, Tensor] | None:
    """What a function makes of every run, or None where that is not one tensor for each."""
    try:
        drawn = {name: draw(run) for name, run in runs.items()}
    except ValueError as error:
        _log.warning("no figure '%s': %s", what, error)
        return None
    return drawn if all(isinstance(x, Tensor) for x in drawn.values()) else None


def posterior_means(run: Run, rows: tuple[Tensor, ...], *, draws: int = 32, seed: int = 0) -> Tensor:
    """Posterior means of all latents that belong to an observation, ``(B, D)``, from so many draws."""
    found = posterior_samples(run.model, run.guide, rows, draws, seed=seed)
    sites = getattr(run.guide, "sites", {})
    local = [z for name, z in found.items() if name not in sites or not sites[name].is_global]
    return torch.cat([z.mean(0).reshape(z.shape[1], -1) for z in local], 1)


def write_posteriors(path: Path, runs: Mapping[str, Run], rows: tuple[Tensor, ...], seed: int) -> None:
    """Write the posteriors of all fits into one file that ``arviz.from_netcdf`` opens."""
    trees = {
        name: to_arviz(run, rows, draws=250, prior_draws=250, predictive_draws=10, seed=seed)
        for name, run in runs.items()
    }
    tree = join_posteriors(trees)
    with atomically(path) as temporary:
        tree.to_netcdf(str(temporary))


@checked()
def join_posteriors(trees: Mapping[str, Any]) -> Any:
    """Several fits' groups side by side, along a new first dimension ``fit`` whose coordinate is their names.

    Observed data are the same for all and stand once. ``tree["posterior"].sel(fit="flow")`` is one fit's posterior, and
    ArviZ's functions take what ``tree.sel(fit="flow")`` gives.

    Args:
        trees: By name of the fit, what :func:`pyrogen.to_arviz` returned for the same rows.
    """
    if not trees:
        raise ValueError("expected at least one fit's tree by its name, got none")
    parts = {name: datasets_of(tree) for name, tree in trees.items()}
    joined = {}
    for group in dict.fromkeys(group for groups in parts.values() for group in groups):
        having = {name: groups[group] for name, groups in parts.items() if group in groups}
        if group == "observed_data":
            joined[group] = next(iter(having.values()))
            continue
        along = pd.Index([*having], name="fit")
        dataset = xarray.concat([*having.values()], along, join="outer", combine_attrs="drop_conflicts")
        joined[group] = dataset.reindex(fit=[*parts])
    first = next(iter(trees.values()))
    return assemble(joined, major=1 if isinstance(first, xarray.DataTree) else 0)

"""One fit of a comparison: how it is trained, evaluated and read back, in this process or in a worker's."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrogen.data.limits import read_yaml
from pyrogen.evaluation import evaluate
from pyrogen.experiment.table import row_of, steps_of
from pyrogen.inference import AmortizedGuide, FitOptions, NonFiniteLoss, Objective, Run, fit, load
from pyrogen.inference.fingerprints import fingerprint
from pyrogen.inference.folders import HISTORY, contents, of_a_comparison
from pyrogen.inference.parallel import alone
from pyrogen.inference.run import as_yaml, write_text

__all__ = ["FIGURES", "Common", "PreparedFit", "fitted", "perform_fit", "read_fit", "step_in", "trial_of"]

FIGURES = "figures.yaml"


@dataclass
class PreparedFit:
    """One guide with its own copy of the model, ready to be trained."""

    name: str
    slug: str
    model: Callable
    guide: AmortizedGuide | None
    objective: Objective


@dataclass(frozen=True)
class Common:
    """What all fits of a comparison have in common."""

    data: Any
    rows: tuple[Tensor, ...]
    options: FitOptions
    parts: Sequence[str] | str
    particles: int
    space: Callable[[], dict[str, Any]]


def trial_of(objective: Objective) -> Objective:
    """A copy to be tried out, whose critics are its own."""
    trial = copy.copy(objective)
    trial.critics = copy.deepcopy(objective.critics)
    return trial


def fitted(
    each: PreparedFit, common: Common, folder: Path | None, resume: bool, trained: Callable[[int], None]
) -> tuple[Run, dict[str, Any]]:
    """A fit and its figures, which are read where they are known already."""
    run = _train(each, common, folder, resume, trained)
    path = None if folder is None else folder / FIGURES
    known = _known_figures(path, run, common.rows) if resume else None
    if known is None:
        options: dict[str, Any] = {"particles": common.particles, "seed": common.options.seed}
        options["compile"] = common.options.compile is True
        known = evaluate(run, common.rows, parts=common.parts, **options, **common.space()).to_dict()
        _keep_figures(path, run, common.rows, known)
    return run, known


def _train(each: PreparedFit, common: Common, folder: Path | None, resume: bool, trained: Callable[[int], None]) -> Run:
    options = common.options
    # The seed also stands for parameters that a plain function makes only when it first runs.
    with torch.random.fork_rng(devices=[]), of_a_comparison():  # a fit sees to the states of its device itself
        torch.default_generator.manual_seed(options.seed)
        try:
            return fit(
                each.model,
                each.guide,
                each.objective,
                common.data,
                epochs=options.epochs,
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                schedule=options.schedule,  # type: ignore[arg-type]
                gradient_clip=options.gradient_clip,
                seed=options.seed,
                device=options.device,
                precision=options.precision,
                critic=options.critic,
                average=options.average,
                compile=options.compile,
                matmul_precision=options.matmul_precision,
                non_finite=options.non_finite,
                callbacks=(lambda run: trained(steps_of(run)),),
                progress=False,
                out=folder,
                # Which says where there is nothing to go on from, and of a comparison's fits that is no news.
                resume=resume and folder is not None and bool(contents(folder)),
            )
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{each.name}: {error}") from error


def _keep_figures(path: Path | None, run: Run, rows: tuple[Tensor, ...], figures: dict[str, Any]) -> None:
    """Keep what was found of a fit, so that a comparison that is cut short does not look for it again."""
    if path is not None:
        write_text(path, as_yaml({"steps": steps_of(run), "rows": fingerprint(rows), "figures": figures}))


def _known_figures(path: Path | None, run: Run, rows: tuple[Tensor, ...]) -> dict[str, Any] | None:
    """What was found of a fit in this state on these rows; None where nothing was, or it can't be read."""
    if path is None or not path.is_file():
        return None
    try:
        known = read_yaml(path)
        same = known["steps"] == steps_of(run) and known["rows"] == fingerprint(rows)
        return known["figures"] if same else None
    except (ValueError, KeyError, TypeError):
        return None


def perform_fit(each: PreparedFit, common: Common, folder: Path, *, resume: bool, device: str | None) -> dict[str, Any]:
    """What a worker does for a fit, and what it says of it beside what it writes."""
    if device is not None:
        common = dataclasses.replace(common, options=dataclasses.replace(common.options, device=device))
    with alone():  # whatever has started the cluster
        run, figures = fitted(each, common, folder, resume, lambda step: None)
    state = {name: getattr(run.objective, name) for name in ("step", "observations")}
    return {"row": row_of(run, figures), "objective": state}


def step_in(folder: Path) -> int:
    """At which step a fit stands that another process makes."""
    try:
        return int(pd.read_csv(folder / HISTORY, usecols=["step"])["step"].iloc[-1])
    except (OSError, ValueError, IndexError):  # there is none yet
        return 0


def read_fit(each: PreparedFit, folder: Path, options: FitOptions, objective: Mapping[str, Any]) -> Run:
    """The run that a worker left, with the fit's own programs."""
    run = load(folder, model=each.model, guide=each.guide, objective=trial_of(each.objective))
    run.options = options
    vars(run.objective).update(objective)
    return run

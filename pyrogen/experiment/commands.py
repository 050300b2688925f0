"""What the ``pyrogen`` command does: fit, compare, evaluate a run, sample from one, report on several."""

import dataclasses
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.status import Status
from rich.text import Text
from torchvision.utils import make_grid, save_image

from pyrogen import data as data_sets
from pyrogen.arguments import check_counts
from pyrogen.configuration import describe
from pyrogen.data import Data
from pyrogen.data.limits import check_links
from pyrogen.data.published import default_root
from pyrogen.evaluation import Evaluation, evaluate, sample
from pyrogen.evaluation.parts import DEFAULT
from pyrogen.experiment.collection import EVALUATIONS, Fitted, collect, read_evaluations
from pyrogen.experiment.comparison import compare
from pyrogen.experiment.figures import are_images
from pyrogen.experiment.judging import compared_in
from pyrogen.experiment.parts import Part, partial_of
from pyrogen.experiment.programs import amortized_guide
from pyrogen.experiment.report import REPORT, write_report
from pyrogen.experiment.settings import CompareSettings, FitSettings, build_objective, chosen_parts
from pyrogen.experiment.table import Comparison, printable, row_of, steps_of
from pyrogen.experiment.workers import check_workers
from pyrogen.inference import OutputExistsError, Run, WriteError, fit, load
from pyrogen.inference.batches import training_and_validation
from pyrogen.inference.checkpoints import atomically
from pyrogen.inference.checks import check_programs
from pyrogen.inference.folders import COMPARISON, SETTINGS, check_length, contents, is_run, locked
from pyrogen.inference.parallel import Processes, connect

__all__ = [
    "EvaluateSettings",
    "FitOutputSettings",
    "OutputSettings",
    "ReportSettings",
    "SampleSettings",
    "run_compare",
    "run_evaluate",
    "run_fit",
    "run_report",
    "run_sample",
]

NOTING = 5.0
"""Seconds to wait until another process has written to a run's folder."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where results go.

    Args:
        out: The folder for all results; by default a new one, such as runs/compare-digits-001 for a comparison on
            digits. One that exists and is not empty is never changed, unless by --resume or --overwrite.
        resume: Go on with what is in --out, from its last checkpoint; where there is nothing, begin, and say so.
        overwrite: Replace what pyrogen wrote into --out; other files stay.
        progress: Show a progress bar with the time left.
        trust: Take what --config or a run to be resumed names, wherever it is: classes that are not pyrogen's, torch's
            or Pyro's, whose code is run, and links that lead out of the folder. Look at it first.
    """

    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True
    trust: bool = False

    def folder(self, command: str, data: str) -> Path:
        """The folder, a new one unless it was given.

        Raises:
            ValueError: If something is to be resumed or replaced and it was not said where, or if links lead out of
                what is to be resumed.
        """
        if self.out is not None:
            if self.resume and not self.trust:
                check_links(Path(self.out))
            return check_length(self.out, "--out")
        if self.resume or self.overwrite:
            raise ValueError("give the folder of the run with --out, to resume or replace it")
        stem = f"{command}-{re.sub(r'[^A-Za-z0-9_]+', '-', data).strip('-').lower()}"
        return next(p for n in range(1, 10_000) if not (p := Path("runs") / f"{stem}-{n:03d}").exists())


@dataclass(frozen=True, kw_only=True)
class FitOutputSettings(OutputSettings):
    """Where a fit goes.

    Args:
        anyway: With --resume, go on although options, data or programs are not those of the checkpoint, with a warning
            that names what differs.
    """

    anyway: bool = False

    def __post_init__(self) -> None:
        if self.anyway and not self.resume:
            raise ValueError("--anyway says how to go on; give it with --resume, or leave it out")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluate a fitted run on data that it was not trained on.

    Prints figures in parts, in nats per observation where nothing else is said, and adds them to evaluation.yaml in the
    run's folder: likelihood, bound, critics, aggregate (is q(z) the prior?), samples (are they like the data?),
    calibration (is the guide right about the model's own data?), and if asked for gap, annealing, wasserstein and
    reference (NUTS), which take long.

    Args:
        run: The folder that a fit wrote.
        data: The data set; by default the one of the fit. One of the same kind is binarised as that.
        root: The folder that holds the data sets; by default that of the fit.
        split: Which rows: test, validation or train.
        rows: Only the first so many rows; by default all.
        parts: Which parts, by name, or all.
        particles: Draws for each observation, for the log-likelihood.
        seed: Of the draws.
        compile: Trace the programs and run compiled graphs where much is to be done, for likelihood and annealing.
        trust: Take what run.yaml names, wherever it is: classes of your own, whose code is run, and paths of data.
            Look at it first.
    """

    run: str
    data: str | None = None
    root: str | None = None
    split: Literal["test", "validation", "train"] = "test"
    rows: int | None = None
    parts: list[str] = field(default_factory=lambda: [*DEFAULT])
    particles: int = 1000
    seed: int = 0
    compile: bool = False
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Sample new observations from a fitted run, as a picture or as numbers.

    Args:
        run: The folder that a fit wrote.
        n: How many.
        out: A file: .png for a grid of images, .npz for an array named samples. By default samples.png in the run's
            folder, or samples.npz for data that are no images.
        mean: Give the mean of each new observation's distribution, without its noise.
        seed: Of the draws.
        overwrite: Replace the file if it exists.
        trust: Take what run.yaml names, wherever it is: classes of your own, whose code is run, and paths of data.
            Look at it first.
    """

    run: str
    n: int = 64
    out: str | None = None
    mean: bool = False
    seed: int = 0
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Show fitted runs on one page: a table of all, and of each samples, reconstructions, latents and curves.

    Writes report.html, which needs nothing else, and report.md with its pictures in figures/. Figures that a comparison
    or pyrogen evaluate found on the same rows are taken over; others are computed, and noted as evaluate does.

    Args:
        runs: Folders that a fit or a comparison wrote; a comparison stands for all its fits.
        out: The folder for the report; by default that of the one run, or a new one such as runs/report-001.
        data: The data set; by default the one of the fits. One of the same kind is binarised as that.
        root: The folder that holds the data sets; by default that of the fits.
        split: Which rows: test, validation or train.
        rows: Only the first so many rows; by default as many as the comparison used, otherwise all.
        particles: Draws for each observation, for the log-likelihood of fits that have no figures yet.
        seed: Of the draws.
        compile: As for pyrogen evaluate, for fits that have no figures yet.
        trust: Take what run.yaml names, wherever it is: classes of your own, whose code is run, and paths of data.
            Look at it first.
        overwrite: Replace a report that is there.
    """

    runs: list[str]
    out: str | None = None
    data: str | None = None
    root: str | None = None
    split: Literal["test", "validation", "train"] = "test"
    rows: int | None = None
    particles: int = 1000
    seed: int = 0
    compile: bool = False
    trust: bool = False
    overwrite: bool = False

    def folder(self) -> Path:
        """Where the report goes.

        Raises:
            OutputExistsError: If a report is there that was not to be replaced, or what no run or report left.
        """
        if self.out is not None:
            folder = check_length(self.out, "--out")
        elif len(self.runs) == 1:
            folder = check_length(self.runs[0], "the run's folder")
        else:
            return next(p for n in range(1, 10_000) if not (p := Path("runs") / f"report-{n:03d}").exists())
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"{folder} is a file; give the path of a folder with --out")
        there = [name for name in REPORT if (folder / name).exists()]
        if there and not self.overwrite:
            raise OutputExistsError(f"{folder / there[0]} exists; give another folder with --out, or --overwrite it")
        of_ours = there or is_run(folder) or (folder / COMPARISON).is_file()
        if contents(folder) and not of_ours:
            raise OutputExistsError(f"{folder} holds no run or report of pyrogen's; give another folder with --out")
        return folder


def run_fit(settings: FitSettings, output: FitOutputSettings) -> tuple[Run, Path]:
    """Fit one model; the settings are kept as ``fit.yaml`` beside the run.

    Of several processes the first says where to and writes, and one of each machine loads the data before the others.
    """
    processes = Processes(connect(settings.device, "32-true"))
    with processes.together():
        folder = output.folder("fit", settings.data)
    folder = processes.broadcast(folder)
    data = processes.in_turn(settings.load_data)
    with settings.limited_threads(data), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model, guide = settings.build_model(data), None
        objective = build_objective(settings.objective)
        if not objective.uses_guide and settings.family != Part("Normal"):
            raise ValueError(f"{objective!r} uses no guide, so the family {settings.family!r} has no place in it")
        example = training_and_validation(data, settings.batch_size, settings.seed)[0].first()
        with settings.naming_parts(model, settings.family):
            if objective.uses_guide:
                encoder, family = settings.build_encoder(data), partial_of(settings.family, "family", 2)
                guide = amortized_guide(model, encoder, family, example)
            check_programs(model, guide, *example, guided=objective.uses_guide)
        describe([model, guide])  # so that what can't be loaded again is refused before time is spent on it
        run = fit(
            model,
            guide,
            objective,
            data,
            progress=output.progress,
            out=folder,
            resume="anyway" if output.anyway else output.resume,
            overwrite=output.overwrite,
            configuration=settings.plain(),
            **settings.training(),
        )
    return run, folder


def run_compare(settings: CompareSettings, output: OutputSettings) -> tuple[Comparison, Path]:
    """Compare guides; the settings are kept as ``compare.yaml``."""
    workers = check_workers(settings.workers)  # before data are loaded
    folder = output.folder("compare", settings.data)
    guides = settings.build_guides()
    data = settings.load_data()
    with settings.limited_threads(data), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = settings.build_model(data)
        encoder = settings.build_encoder(data)
        describe([model, encoder, *guides.values()])  # as in run_fit
        with settings.naming_parts(model, *settings.guides):
            table = compare(
                model,
                guides,
                encoder=lambda: settings.build_encoder(data),
                data=data,
                test=data.test[: settings.test_rows],
                parts=chosen_parts(settings.parts),
                particles=settings.particles,
                skip_unserved=True,
                out=folder,
                resume=output.resume,
                overwrite=output.overwrite,
                progress=output.progress,
                configuration=settings.plain(),
                workers=workers,
                **settings.training(),
            )
    return table, folder


def _load(folder: str, trust: bool) -> Run:
    path = check_length(folder, "the run's folder")
    if not is_run(path) and (path / COMPARISON).is_file():
        fits = sorted(str(found) for found in path.glob("*") if is_run(found))
        raise ValueError(f"{folder} holds a comparison; give one of its fits: {', '.join(fits) or 'there is none yet'}")
    return load(path, trust=trust)


def _data_of(run: Run, folder: str | Path, settings: EvaluateSettings | ReportSettings) -> Data:
    if settings.data is not None:
        return data_sets.load(settings.data, root=settings.root, **_preparation(run, settings.data))
    if not run.data:
        raise ValueError(f"{folder} was not fitted to a data set with a name; give one with --data")
    if not isinstance(run.data, dict) or not isinstance(run.data.get("name"), str):
        raise ValueError(f"{folder}/{SETTINGS} is damaged: its data are no settings with a name; give data with --data")
    root = {} if settings.root is None else {"root": settings.root}
    if not settings.trust:
        _check_places({**run.data, **dict.fromkeys(root)}, Path(folder))
    return data_sets.load(**run.data | root)


def _preparation(run: Run, name: str) -> dict[str, Any]:
    """How data of a name are prepared: those of the fit's kind as in the fit."""
    there = run.data if isinstance(run.data, dict) else {}
    same = str(there.get("name")).partition(":")[0] == name.partition(":")[0]
    return {key: there[key] for key in ("binarize", "seed", "size") if same and key in there}


def _check_places(source: dict[str, Any], folder: Path) -> None:
    """Raise a ``ValueError`` where a run leads to data outside of its folder and of where data sets are by default."""
    name, root = source["name"], source.get("root")
    path = name.partition(":")[2]
    for place, flag, homes in ((path, f"--data {name}", [folder]), (root, f"--root {root}", [folder, default_root()])):
        real = Path(str(place)).expanduser().resolve()
        if place and not any(real.is_relative_to(home.resolve()) for home in homes):
            raise ValueError(
                f"{folder / SETTINGS} names {place} for its data, which is outside of that folder; give {flag} if that "
                "is what shall be read, or --trust to take what it names"
            )


def run_evaluate(settings: EvaluateSettings) -> str:
    """Evaluate a run; returns what to print."""
    run = _load(settings.run, settings.trust)
    data = _data_of(run, settings.run, settings)
    rows = getattr(data, settings.split)[: settings.rows]
    check_counts(or_none=True, rows=settings.rows, particles=settings.particles)
    parts = chosen_parts(settings.parts)
    with Console(stderr=True).status("preparing") as shown:
        started = time.perf_counter()
        space = compared_in(data, parts, settings.seed)
        seconds = time.perf_counter() - started
        found, _ = _evaluated(run, Path(settings.run), rows, data, settings, parts, space, shown)
    if space.get("features") is not None:
        spent = {"the classifier of the data": seconds} | found.seconds_of
        found = dataclasses.replace(found, seconds=found.seconds + seconds, seconds_of=spent)
    return str(found)


def _evaluated(
    run: Run,
    folder: Path,
    rows: torch.Tensor,
    data: Data,
    settings: EvaluateSettings | ReportSettings,
    parts: Sequence[str],
    space: Mapping[str, Any],
    shown: Status,
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a run part by part, each noted in its folder as it ends; what was found, and all that is noted."""
    following = dict(pairwise(parts))
    entry: dict[str, Any] = {}

    def say(what: str) -> None:
        shown.update(Text(printable(f"{folder.name}: {what}")))  # a str would be read as markup

    def after_part(found: Evaluation) -> None:
        nonlocal entry
        entry = _note_evaluation(folder, run, data, settings, found)
        if name := following.get([*found.seconds_of][-1]):
            say(f"{name}, part {len(found.seconds_of) + 1} of {len(parts)}")

    say(f"{parts[0]}, part 1 of {len(parts)}")
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("particles", "seed", "compile")}
    found = evaluate(run, rows, parts=parts, after_part=after_part, **options, **space)
    return found, entry


def _note_evaluation(
    folder: Path, run: Run, data: Data, settings: EvaluateSettings | ReportSettings, evaluation: Evaluation
) -> dict[str, Any]:
    """Add an evaluation to the list in a run's folder, with what its other parts had found before; return it."""
    path = folder / EVALUATIONS
    made: dict[str, Any] = {"data": data.source or data.name, "split": settings.split, "seed": settings.seed}
    entry = made | {"steps": steps_of(run), "parts": [*evaluation.seconds_of]} | evaluation.to_dict()
    try:
        with locked(folder, timeout=NOTING):
            others, entry = _joined(entry, read_evaluations(path))
            with atomically(path) as temporary:
                temporary.write_text(yaml.safe_dump([*others, entry], sort_keys=False), encoding="utf-8")
    except (OutputExistsError, WriteError) as error:  # a fit of hours, a full disk: no reason to lose what was found
        _log.warning("%s is not written: %s", path, error)
        _, entry = _joined(entry, read_evaluations(path))
    return entry


def _joined(entry: dict[str, Any], known: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of evaluations that are known those that are others, and one with what its other parts had found before."""
    keys = ("data", "split", "seed", "steps", "particles", "observations")
    parts, reasons = entry["parts"], entry["reasons"]
    others = [other for other in known if any(other.get(key) != entry[key] for key in keys)]
    for same in (other for other in known if other not in others):
        known_now = {name: value for name, value in entry.items() if value is not None and value == value}
        others_said = {part: why for part, why in same.get("reasons", {}).items() if part not in parts}
        entry = same | known_now
        entry["parts"] = [*dict.fromkeys([*same["parts"], *parts])]
        entry["reasons"] = others_said | reasons
    return others, entry


def run_sample(settings: SampleSettings) -> Path:
    """Sample from a run; returns the file written."""
    run = _load(settings.run, settings.trust)
    drawn = sample(run, settings.n, seed=settings.seed, mean=settings.mean)
    arrays = {"samples": drawn} if isinstance(drawn, torch.Tensor) else drawn
    images = isinstance(drawn, torch.Tensor) and are_images(drawn)
    out = settings.out or Path(settings.run) / f"samples.{'png' if images else 'npz'}"
    path = check_length(out, "--out")
    if path.suffix not in (".png", ".npz") or (path.suffix == ".png" and not images):
        raise ValueError(f"can't write {path}: expected a name ending in .npz{', or .png' if images else ''}")
    if path.exists() and not settings.overwrite:
        raise OutputExistsError(f"{path} exists; give another with --out, or --overwrite it")
    with atomically(path) as temporary:
        if path.suffix == ".png":
            columns = max(1, round(settings.n**0.5))
            save_image(make_grid(arrays["samples"].cpu(), nrow=columns, padding=1, pad_value=0.5), temporary, "png")
        else:
            with open(temporary, "wb") as file:
                np.savez(file, **{name: x.cpu().numpy() for name, x in arrays.items()})  # type: ignore[arg-type]
    return path


def run_report(settings: ReportSettings) -> Path:
    """Report on runs; returns the page."""
    folder = settings.folder()
    fits = collect(settings.runs, trust=settings.trust)
    data = _data_of_all(fits, settings)
    whole = getattr(data, settings.split)
    rows = whole[: _count(fits, settings, len(whole))]
    known = {each.name: each.known(data, settings.split, len(rows)) for each in fits}
    figures = []
    with Console(stderr=True).status("preparing") as shown:
        space = compared_in(data, DEFAULT, settings.seed) if None in known.values() else {}
        for each in fits:
            entry = known[each.name]
            if entry is None:
                _, entry = _evaluated(each.run, each.folder, rows, data, settings, DEFAULT, space, shown)
            figures.append(row_of(each.run, entry))
    of_split = {"train": "training"}.get(settings.split, settings.split)
    table = Comparison.of(figures, {each.name: each.run for each in fits}, f"{of_split} rows")
    return write_report(folder, table, (rows,), data, settings.seed)


def _data_of_all(fits: list[Fitted], settings: ReportSettings) -> Data:
    """The one data set of several fits."""
    first = fits[0]
    if settings.data is not None and any(
        _preparation(each.run, settings.data) != _preparation(first.run, settings.data) for each in fits
    ):
        return data_sets.load(settings.data, root=settings.root)
    sources = [{k: v for k, v in (each.run.data or {}).items() if k != "root"} for each in fits]
    for each, source in zip(fits, sources, strict=True):
        if settings.data is None and source != sources[0]:
            raise ValueError(
                f"'{first.name}' was fitted to {sources[0]} and '{each.name}' to {source}, so their figures can't "
                "stand in one table; report on them one by one, or name the data for all with --data"
            )
    return _data_of(first.run, first.folder, settings)


def _count(fits: list[Fitted], settings: ReportSettings, most: int) -> int:
    """How many rows: those asked for, else as many as the comparisons used, if they agree."""
    if settings.rows is not None:
        check_counts(or_none=True, rows=settings.rows, particles=settings.particles)
        return min(settings.rows, most)
    used = {each.row["observations"] for each in fits if each.row is not None and each.from_settings}
    return min(used.pop(), most) if len(used) == 1 and settings.split == "test" else most

"""What the ``pyrogen`` command does: fit, compare, evaluate a run, sample from one."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torchvision.utils import make_grid, save_image

from pyrogen import data as data_sets
from pyrogen.configuration import describe
from pyrogen.data import Data
from pyrogen.evaluation import evaluate, sample
from pyrogen.experiment.comparison import CONFIGURATION, compare
from pyrogen.experiment.figures import are_images
from pyrogen.experiment.parts import Part
from pyrogen.experiment.programs import amortized_guide
from pyrogen.experiment.settings import CompareSettings, FitSettings, build_family, build_objective
from pyrogen.experiment.table import Comparison
from pyrogen.inference import OutputExistsError, Run, fit, load
from pyrogen.inference.batches import training_and_validation
from pyrogen.inference.checkpoints import atomically
from pyrogen.inference.run import SETTINGS, write_yaml

__all__ = [
    "EvaluateSettings",
    "OutputSettings",
    "SampleSettings",
    "run_compare",
    "run_evaluate",
    "run_fit",
    "run_sample",
]


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where results go.

    Args:
        out: The folder for all results; by default a new one, such as runs/compare-digits-001 for a comparison on
            digits. One that exists and is not empty is never changed, unless by --resume or --overwrite.
        resume: Go on with what is in --out, from its last checkpoint.
        overwrite: Replace the run in --out.
        progress: Show a progress bar with the time left.
    """

    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def folder(self, command: str, data: str) -> Path:
        """The folder, a new one unless it was given.

        Raises:
            ValueError: If something is to be resumed or replaced and it was not said where.
        """
        if self.out is not None:
            return Path(self.out)
        if self.resume or self.overwrite:
            raise ValueError("give the folder of the run with --out, to resume or replace it")
        stem = f"{command}-{re.sub(r'[^A-Za-z0-9_]+', '-', data).strip('-').lower()}"
        return next(p for n in range(1, 10_000) if not (p := Path("runs") / f"{stem}-{n:03d}").exists())


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluate a fitted run on data that it was not trained on.

    Prints log-likelihood, ELBO, rate, distortion and active units, in nats per observation, and adds them to
    evaluation.yaml in the run's folder.

    Args:
        run: The folder that a fit wrote.
        data: The data set; by default the one of the fit.
        root: The folder that holds the data sets; by default that of the fit.
        split: Which rows: test, validation or train.
        rows: Only the first so many rows; by default all.
        particles: Draws for each observation, for the log-likelihood.
        seed: Of the draws.
        trust: Build classes of your own that run.yaml names, which means to run their code. Look at it first.
    """

    run: str
    data: str | None = None
    root: str | None = None
    split: Literal["test", "validation", "train"] = "test"
    rows: int | None = None
    particles: int = 1000
    seed: int = 0
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
        trust: Build classes of your own that run.yaml names, which means to run their code. Look at it first.
    """

    run: str
    n: int = 64
    out: str | None = None
    mean: bool = False
    seed: int = 0
    overwrite: bool = False
    trust: bool = False


def run_fit(settings: FitSettings, output: OutputSettings) -> tuple[Run, Path]:
    """Fit one model; the settings are kept as ``fit.yaml`` beside the run."""
    folder = output.folder("fit", settings.data)
    data = settings.load_data()
    with settings.limited_threads(data), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model, guide = settings.build_model(data), None
        objective = build_objective(settings.objective)
        if objective.uses_guide:
            example = training_and_validation(data, settings.batch_size, settings.seed)[0].first()
            guide = amortized_guide(model, settings.build_encoder(data), build_family(settings.family), example)
        elif settings.family != Part("Normal"):
            raise ValueError(f"{objective!r} uses no guide, so the family {settings.family!r} has no place in it")
        describe([model, guide])  # so that what can't be loaded again is refused before time is spent on it
        run = fit(
            model,
            guide,
            objective,
            data,
            progress=output.progress,
            out=folder,
            resume=output.resume,
            overwrite=output.overwrite,
            **settings.training(),
        )
    write_yaml(folder / "fit.yaml", settings.plain())
    return run, folder


def run_compare(settings: CompareSettings, output: OutputSettings) -> tuple[Comparison, Path]:
    """Compare guides; the settings are kept as ``compare.yaml``."""
    folder = output.folder("compare", settings.data)
    guides = settings.build_guides()
    data = settings.load_data()
    with settings.limited_threads(data), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = settings.build_model(data)
        encoder = settings.build_encoder(data)
        describe([model, encoder, *guides.values()])  # as in run_fit
        table = compare(
            model,
            guides,
            encoder=lambda: settings.build_encoder(data),
            data=data,
            test=data.test[: settings.test_rows],
            particles=settings.particles,
            skip_unserved=True,
            out=folder,
            resume=output.resume,
            overwrite=output.overwrite,
            progress=output.progress,
            configuration=settings.plain(),
            **settings.training(),
        )
    return table, folder


def _load(folder: str, trust: bool) -> Run:
    path = Path(folder)
    if not (path / SETTINGS).is_file() and (path / CONFIGURATION).is_file():
        fits = sorted(str(found.parent) for found in path.glob(f"*/{SETTINGS}"))
        raise ValueError(f"{folder} holds a comparison; give one of its fits: {', '.join(fits) or 'there is none yet'}")
    return load(path, trust=trust)


def _data_of(run: Run, settings: EvaluateSettings) -> Data:
    if settings.data is not None:
        return data_sets.load(settings.data, root=settings.root)
    if not run.data:
        raise ValueError(f"{settings.run} was not fitted to a data set with a name; give one with --data")
    root = {} if settings.root is None else {"root": settings.root}
    return data_sets.load(**(run.data | root))


def run_evaluate(settings: EvaluateSettings) -> str:
    """Evaluate a run; returns what to print."""
    run = _load(settings.run, settings.trust)
    data = _data_of(run, settings)
    rows = getattr(data, settings.split)[: settings.rows]
    evaluation = evaluate(run, rows, particles=settings.particles, seed=settings.seed)
    _note_evaluation(
        Path(settings.run) / "evaluation.yaml",
        {"data": data.source or data.name, "split": settings.split, "seed": settings.seed} | evaluation.to_dict(),
    )
    return str(evaluation)


def _note_evaluation(path: Path, entry: dict[str, Any]) -> None:
    """Add an evaluation to the list in a file; the same one made again takes its place."""
    try:
        known = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
        settings = ("data", "split", "seed", "particles", "observations")
        others = [other for other in known if any(other[key] != entry[key] for key in settings)]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no list of evaluations ({error}); move it away") from error
    with atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump([*others, entry], sort_keys=False), encoding="utf-8")


def run_sample(settings: SampleSettings) -> Path:
    """Sample from a run; returns the file written."""
    run = _load(settings.run, settings.trust)
    drawn = sample(run, settings.n, seed=settings.seed, mean=settings.mean)
    arrays = {"samples": drawn} if isinstance(drawn, torch.Tensor) else drawn
    images = isinstance(drawn, torch.Tensor) and are_images(drawn)
    path = Path(settings.out or Path(settings.run) / f"samples.{'png' if images else 'npz'}")
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

"""A run: what a fit leaves behind, on disk as safetensors and YAML."""

import contextlib
import dataclasses
import functools
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pandas as pd
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from pyrogen.arguments import check_counts, check_positive, checked, is_finite, is_whole, plain_as
from pyrogen.configuration import build, describe
from pyrogen.data.limits import FREE, check_links
from pyrogen.inference.allowance import Allowance
from pyrogen.inference.checkpoints import atomically, load_weights, unique_tensors, write_tensors
from pyrogen.inference.fingerprints import source_of
from pyrogen.inference.folders import (
    CHECKPOINT,
    HISTORY,
    SETTINGS,
    WEIGHTS,
    check_length,
    clear_folder,
    held,
    prepare_folder,
)
from pyrogen.inference.migration import FORMAT
from pyrogen.inference.objectives import Objective
from pyrogen.inference.parallel import is_first
from pyrogen.inference.programs import Program, as_module, make_example
from pyrogen.inference.reading import read_files
from pyrogen.inference.turns import seeded

__all__ = ["CriticOptions", "FitOptions", "Run", "as_yaml", "load", "save", "write_text"]


def _make_plain(options: Any) -> None:
    for name, hint in get_type_hints(type(options)).items():
        object.__setattr__(options, name, plain_as(getattr(options, name), hint))


@dataclass(frozen=True)
class CriticOptions:
    """How the critics of an objective are trained beside the program.

    Attributes:
        learning_rate: Of their Adam; by default the program's.
        betas: Of their Adam.
        steps: Steps of the critics for each of the program, all but the last on rows drawn at random; by default what
            the objective says: 1, or 5 for ``GAN("wasserstein-gp")`` and ``ALI("wasserstein-gp")``.
        warmup: Steps in which critics alone are trained, before the program moves. They count among the steps of the
            fit, and schedules run meanwhile.
    """

    learning_rate: float | None = None
    betas: tuple[float, float] = (0.5, 0.999)
    steps: int | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        _make_plain(self)
        rate = self.learning_rate
        check_positive(or_none=True, **{"the critics' learning_rate": rate})
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas of the critics' Adam are two numbers in [0, 1), got {self.betas!r}")
        check_counts(or_none=True, steps=self.steps)
        check_counts(least=0, warmup=self.warmup)


@dataclass(frozen=True)
class FitOptions:
    """How a fit was made; see :func:`pyrogen.fit` for each."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    schedule: str | Callable[[float], float] = "constant"
    gradient_clip: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    validate_every: int = 1
    patience: int | None = None
    checkpoint_every: int = 1
    critic: CriticOptions = CriticOptions()
    average: float | None = None
    compile: bool | Literal["auto"] = False
    loader_workers: int = 0
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _make_plain(self)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give either epochs or steps, got epochs={self.epochs}, steps={self.steps}")
        check_counts(or_none=True, epochs=self.epochs, steps=self.steps, patience=self.patience)
        check_counts(
            batch_size=self.batch_size, validate_every=self.validate_every, checkpoint_every=self.checkpoint_every
        )
        check_counts(least=0, loader_workers=self.loader_workers)
        if self.matmul_precision not in ("highest", "high", "medium"):
            raise ValueError(f"matmul_precision is 'highest', 'high' or 'medium', got {self.matmul_precision!r}")
        if self.non_finite not in ("stop", "skip"):
            raise ValueError(f"non_finite is 'stop' or 'skip', got {self.non_finite!r}")
        check_positive(learning_rate=self.learning_rate)
        check_positive(or_none=True, gradient_clip=self.gradient_clip)
        if not is_whole(self.seed):
            raise ValueError(f"seed must be a whole number of less than 2**63, got {self.seed!r}")
        for name in ("device", "precision"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        if self.optimizer is not None and not callable(self.optimizer):
            raise ValueError(
                "optimizer is a callable such as torch.optim.AdamW or functools.partial(torch.optim.SGD, "
                f"momentum=0.9), got {self.optimizer!r}"
            )
        if not isinstance(self.critic, CriticOptions):
            raise ValueError(f"critic is CriticOptions(...), how critics are trained, got {self.critic!r}")
        if self.average is not None and not (is_finite(self.average) and 0 < self.average < 1):
            raise ValueError(f"average is the decay of averaged weights, between 0 and 1, got {self.average!r}")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile is True, False or 'auto', got {self.compile!r}")
        if not callable(self.schedule) and self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"schedule is 'constant', 'linear', 'cosine' or a callable from the share of training done to a "
                f"factor, got {self.schedule!r}"
            )


@dataclass
class Run:
    """A fitted model with its guide: what ``evaluate``, ``sample``, ``to_arviz`` and ``save`` take.

    Attributes:
        model: The model's program, a module.
        guide: The guide's program, a module, or None.
        objective: What was minimised.
        history: One row for each epoch: ``epoch, step, loss, distortion, rate, validation, learning_rate,
            gradient_norm, seconds, rows_per_second``; loss, distortion and rate are the epoch's means and
            ``validation`` the bound on the validation data, in nats per observation; the norm is that of the program's
            gradient before any clipping, mean of every tenth step. With ``non_finite="skip"`` there is ``skipped``.
            Where a critic has a part in them the names are ``rate_estimate``, ``marginal_kl_estimate`` and
            ``validation_estimate``; of critics there are ``critic_loss``, what they say of the model's data
            (``verdict_samples``, ``verdict_reconstructions``), and the share of draws that each tells apart,
            ``accuracy_`` and its name; at a site with an implicit prior there are ``accuracy_<site>_prior`` for the
            critic that teaches this and, with an adaptive contrast, ``accuracy_<site>_model``. The loss is the
            program's alone. With a guide of per-observation sites there is ``inactive_units``: at the end of the epoch,
            the latent units whose posterior mean has a variance of at most 0.01 over up to 1000 rows for validation, or
            where there are none of these for training, as ``z[0] z[3]`` or ``none``.
        options: How it was fitted.
        data: What :func:`pyrogen.data.load` can load again, or None for data of the user's own.
        example: Shape and type of each tensor of a batch of two rows.
        seconds: Time spent in training.
        compile_seconds: What compiling took of that.
        made: By which command, from which revision of the code around it, on which machine.
        source: By its name, a hash of the source of each class and function of the user's own in it, as it was fitted.
    """

    model: nn.Module
    guide: nn.Module | None
    objective: Objective
    history: pd.DataFrame
    options: FitOptions
    data: dict[str, Any] | None = None
    example: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    made: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.programs.parameters()), torch.device("cpu"))

    @property
    def programs(self) -> nn.ModuleDict:
        """``model``, ``guide`` and ``critics`` in one module, as far as there are any."""
        parts: dict[str, nn.Module] = {"model": self.model}
        if self.guide is not None:
            parts["guide"] = self.guide
        if len(self.objective.critics):
            parts["critics"] = self.objective.critics
        return nn.ModuleDict(parts)

    def __repr__(self) -> str:
        rows = "" if self.history.empty else f", loss={self.history['loss'].iloc[-1]:.3f}"
        compiled = f", compiled in {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        return (
            f"Run(model={type(self.model).__name__}, guide={type(self.guide).__name__}, "
            f"objective={self.objective!r}, epochs={len(self.history)}{rows}{compiled})"
        )


def settings_of(run: Run) -> dict[str, Any]:
    """Everything needed to build the run's objects again, as plain values."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("pyrogen", "pyro-ppl", "torch")}
        | {"python": platform.python_version()},
        "data": run.data,
        "example": run.example,
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "made": run.made,
        "source": run.source,
    }
    seen: dict[int, tuple[Any, Any]] = {}
    for name in ("model", "guide", "objective"):
        program = getattr(run, name)
        settings[name] = _described(program.function if isinstance(program, Program) else program, seen)
    settings["options"] = {f.name: _described(getattr(run.options, f.name)) for f in dataclasses.fields(run.options)}
    return settings


def source_of_run(run: Run) -> dict[str, str]:
    """The hashes of :func:`~pyrogen.inference.fingerprints.source_of` for all that a run is made of, as it is now."""
    modules = [*run.programs.modules()]
    functions = [getattr(module, "function", None) for module in modules]  # of those that stand for one
    return source_of([*modules, *functions, run.objective, run.options.optimizer, run.options.schedule])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _described(value: Any, seen: dict[int, tuple[Any, Any]] | None = None) -> Any:
    try:
        return describe(value, seen)
    except ValueError as error:
        return {"not_described": str(error)}


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically."""
    with atomically(path) as temporary:
        temporary.write_bytes(text.encode())


def as_yaml(values: Mapping[str, Any], name: str = "settings") -> str:
    """Plain values as YAML.

    Raises:
        ValueError: If there are others.
    """
    try:
        return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} must be plain values, such as numbers, text and lists of these: {error}") from error


@checked()
def save(run: Run, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a run: ``weights.safetensors``, ``run.yaml`` and ``history.csv``.

    The first holds all of it, with a checksum; the other two are copies for people to read. At any moment, even if the
    process is killed, :func:`load` finds the earlier run or the new one, whole.

    Of several processes that train together the first one writes, and the others do nothing here, unless within
    :func:`pyrogen.inference.parallel.alone`.

    Nothing is pickled. Objects whose constructor's arguments can't be read back from their attributes are noted in
    ``run.yaml``; :func:`load` then asks for them. An option that can't be written, such as a lambda for a schedule, is
    noted too, and comes back as its default.

    Args:
        run: The run.
        folder: Where to; it may be moved afterwards.
        overwrite: Whether a run already there is replaced.

    Raises:
        OutputExistsError: If the folder holds something and ``overwrite`` is not set, or something that is no run, or
            if another process writes there.
        WriteError: If a file can't be written; the earlier run stays.
    """
    if not is_first():
        return Path(folder)
    folder = prepare_folder(check_length(folder, "folder"), overwrite=overwrite)
    with held(folder, overwrite=overwrite):
        # What was found of an earlier run goes with it; its checkpoint is known to be another's meanwhile.
        write_run(run, folder, then=functools.partial(clear_folder, folder, keep=[WEIGHTS, CHECKPOINT]))
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return folder


def write_run(run: Run, folder: Path, then: Callable[[], Any] = lambda: None) -> None:
    """Write a run's files into a folder.

    Weights hold the text of the others, which go before the weights take their place and come after that, so that the
    run changes in one step, and no copy ever says what is not so.

    Args:
        run: The run.
        folder: Where to.
        then: As for :func:`~pyrogen.inference.checkpoints.atomically`, of the weights.
    """
    _bring_up(folder)
    copies = {SETTINGS: as_yaml(settings_of(run)), HISTORY: run.history.to_csv(index=False)}

    def make_way() -> None:
        then()
        for name in copies:
            (folder / name).unlink(missing_ok=True)

    write_tensors(folder / WEIGHTS, unique_tensors(run.programs), {"format": FORMAT, "files": copies}, make_way)
    for name, text in copies.items():
        write_text(folder / name, text)


def _bring_up(folder: Path) -> None:
    """Let weights of format 1 hold what stands beside them, of which they would have no copy when it goes."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            if "pyrogen" in (file.metadata() or {}):
                return
        tensors, _, _ = read_files(folder)
        texts = {name: (folder / name).read_bytes().decode() for name in (SETTINGS, HISTORY)}
    except (OSError, SafetensorError, ValueError):
        return  # there is no run that could be lost
    write_tensors(folder / WEIGHTS, tensors, {"format": FORMAT, "files": texts})


@checked()
def load(
    folder: str | Path,
    *,
    model: Callable | None = None,
    guide: Callable | None = None,
    objective: Objective | None = None,
    trust: bool = False,
) -> Run:
    """Read a run that :func:`save`, ``fit(out=...)`` or the command wrote.

    Args:
        folder: Where it is.
        model, guide, objective: Take these, built as they were, instead of building what ``run.yaml`` names.
        trust: Whether code outside pyrogen, Pyro and torch that ``run.yaml`` names may be imported and run, links may
            lead out of the folder, and building may take far more memory than the weights do. A ``FILE.py`` that is no
            longer where it was is looked for in the run's folder and in the working directory.

    Returns:
        The run, on the CPU.

    Raises:
        ValueError: If a file is damaged, files are not of one run, a part can't be built, the weights are another
            model's, or something would need to be trusted.

    Warns:
        UserWarning: If the source of a class or function of the user's own is not what it was in the fit.
    """
    folder = check_length(folder, "folder")
    if not trust:
        check_links(folder)
    tensors, settings, history = read_files(folder)
    most = 4 * sum(tensor.nbytes for tensor in tensors.values()) + 2 * FREE
    bounded = contextlib.nullcontext() if trust else Allowance(most, f"what {folder / SETTINGS} describes")
    with bounded:
        model, guide, objective = _build_parts(
            settings, {"model": model, "guide": guide, "objective": objective}, folder, trust
        )
    try:
        options = {k: v for k, v in settings["options"].items() if not _is_not_described(v)}
        with bounded:
            example = make_example(settings["example"])
            # Programs that are functions run once, to find their parts.
            model = as_module(model, *example)
            guide = None if guide is None else as_module(guide, *example)
        run = Run(
            model=model,
            guide=guide,
            objective=objective,
            history=history,
            options=FitOptions(**build(options, trust=trust, beside=folder)),
            data=settings["data"],
            example=settings["example"],
            seconds=settings["seconds"],
            compile_seconds=settings["compile_seconds"],
            made=settings["made"],
            source=settings["source"],
        )
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder / SETTINGS} does not fit the programs built from it ({error}); restore it from a copy, or pass "
            "model= and guide=, built as they were"
        ) from error
    if any(name.startswith("critics.") for name in tensors):
        with seeded(0, torch.device("cpu")), bounded:
            run.objective.prepare(run.model, run.guide, *example)
    precisions = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(precisions) == 1:
        run.programs.to(precisions.pop())
    load_weights(run.programs, tensors, str(folder / WEIGHTS))
    changed = [name for name, now in source_of_run(run).items() if run.source.get(name, now) != now]
    if changed:
        warnings.warn(
            f"the source of {', '.join(changed)} has changed since {folder} was fitted, so that its weights may mean "
            "something else now; load it with the programs as they were, or fit anew",
            stacklevel=3,
        )
    run.programs.eval()
    return run


def _build_parts(settings: dict[str, Any], given: dict[str, Any], folder: Path, trust: bool) -> tuple[Any, Any, Any]:
    """Model, guide and objective, each as it is given or else as it is described."""
    for name, part in given.items():
        if part is None and _is_not_described(settings[name]):
            raise ValueError(
                f"the {name} of {folder} could not be written as YAML ({settings[name]['not_described']}); build it as "
                f"it was and pass {name}= to load"
            )
    # Where a guide's description refers to the model, it gets the model that was given.
    made = {id(settings[name]): part for name, part in given.items() if part is not None}
    described = {name: settings[name] for name in given if given[name] is None}
    parts = given | build(described, trust=trust, beside=folder, _made=made)
    model, guide, objective = parts["model"], parts["guide"], parts["objective"]
    if not callable(model) or not (guide is None or callable(guide)) or not isinstance(objective, Objective):
        raise ValueError(f"{folder / SETTINGS} is damaged: expected model and guide to be programs, and an objective")
    return model, guide, objective


def _is_not_described(value: Any) -> bool:
    return isinstance(value, Mapping) and "not_described" in value

"""The main job: fit several guides to one model on the same data, evaluate each the same way, and put it in a table."""

import copy
import dataclasses
import functools
import logging
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyrogen.arguments import checked
from pyrogen.configuration import describe, without_moves
from pyrogen.data import Data
from pyrogen.data.limits import read_yaml
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation.parts import DEFAULT, known_parts
from pyrogen.experiment.artifacts import write_artifacts
from pyrogen.experiment.fits import FIGURES, Common, PreparedFit, fitted, perform_fit, read_fit, step_in, trial_of
from pyrogen.experiment.judging import compared_in
from pyrogen.experiment.programs import amortized_guide, independent_copy
from pyrogen.experiment.table import Comparison, printable, row_of, slug
from pyrogen.experiment.workers import Job, Outcome, Workers, check_workers, open_pool, perform_all
from pyrogen.inference import CriticOptions, FitOptions, NonFiniteLoss, Objective, Run
from pyrogen.inference.batches import Batches, check_data, training_and_validation
from pyrogen.inference.checkpoints import atomically, check_writable, leftovers
from pyrogen.inference.checks import check_programs, check_values, first_parameter
from pyrogen.inference.critic_objective import CriticObjective
from pyrogen.inference.folders import (
    COMPARISON,
    LOCK,
    OutputExistsError,
    check_length,
    clear_folder,
    contents,
    held,
    locked,
    prepare_folder,
)
from pyrogen.inference.parallel import environment
from pyrogen.inference.turns import seeded

__all__ = ["ERROR", "compare"]

ERROR = "error.txt"
LONGEST = 1000
"""Characters of a message that shows settings."""
_log = logging.getLogger(__name__)


@checked(but=("guides", "data"))
def compare(
    model: Callable,
    guides: Mapping[str, tuple[Any, Objective]],
    *,
    encoder: Callable[[], nn.Module] | nn.Module,
    data: Data | Tensor | Sequence[Tensor] | Dataset,
    test: Tensor | Sequence[Tensor] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    schedule: str | Callable[[float], float] = "constant",
    gradient_clip: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    critic: CriticOptions | None = None,
    average: float | None = None,
    compile: bool | Literal["auto"] = False,
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    non_finite: Literal["stop", "skip"] = "stop",
    parts: Sequence[str] | str = DEFAULT,
    particles: int = 1000,
    skip_unserved: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    configuration: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
) -> Comparison:
    """Fit several guides to one model and compare them.

    The comparison is fair: every fit starts from a copy of the same model with the same weights, draws its guide's
    weights and its noise from the same seed, sees the data in the same order, and is evaluated on the same test rows
    with as many particles. The figures do not depend on what was optimised; see :func:`pyrogen.evaluate`.

    Args:
        model: The program. It is copied, never trained itself.
        guides: By name, a family and an objective. The family is what :class:`~pyrogen.inference.AmortizedGuide`
            takes: a class, a ``functools.partial`` of one, or a mapping from site names to these; None with an
            objective that uses no guide, such as ``GAN()``.
        encoder: Called without arguments, it gives each guide its encoder; or a module, of which each gets a copy.
        data: As for :func:`pyrogen.fit`.
        test: Rows for the evaluation, a tensor or a tuple of tensors; by default the test split where data have one,
            otherwise the training data, which the table then says.
        epochs, steps, batch_size, learning_rate, schedule, gradient_clip, seed, device, precision, critic, average,
            compile, matmul_precision, non_finite: As for :func:`pyrogen.fit`; with ``compile=True`` figures come from
            compiled graphs too, as with ``pyrogen.evaluate(compile=True)``.
        parts: Which parts of :func:`pyrogen.evaluate`; ``"all"`` for all. Samples of labelled images are compared by
            the features of a classifier that is trained for it.
        particles: Draws for each test row, for the log-likelihood.
        skip_unserved: Leave out, and name under the table, a guide without the density that its objective needs.
        out: A folder for all there is: ``report.html`` and ``report.md``, ``table.csv``, ``figures/``,
            ``posteriors.nc`` (every fit's posterior of the first 16 test rows, along the dimension ``fit``; open it
            with ``arviz.from_netcdf``), ``compare.yaml``, and a run's folder for each fit, which :func:`pyrogen.load`
            reads.
        overwrite: Replace a comparison that is in ``out``; it is deleted when the first fit begins. Files that pyrogen
            did not write stay.
        resume: Go on with the one in ``out``: complete fits are read, a started one goes on from its checkpoint.
        progress: Show one progress bar with the time left.
        configuration: What ``compare.yaml`` shall hold; by default a description of the arguments.
        workers: Fit and evaluate in so many processes of this machine at once, or with ``"ray"`` on the Ray cluster
            that is joined, at hand or else started here for the time; no more processes than fits that are still to be
            made. Each has the cores of the machine divided by their number for threads, at least one, and never more
            than torch has here; a job of Ray's has the cluster's divided by the number of fits to be made, and a GPU
            where there are some and ``device`` allows. Figures are those of fits one after the other on as many
            threads, but for ``seconds`` and ``rows_per_second``, which say little where fits share a machine, and for
            what ``compile="auto"`` chooses by the time that steps take. A fit that fails, or whose process is killed,
            is tried once more from its last checkpoint, and then left out and named under the table, with why;
            ``error.txt`` in its folder says where that came up. A Ray cluster's machines need the same pyrogen and
            torch; results come back from those that can't see ``out``, but a machine that is lost takes along what it
            alone had. A script's functions and classes, and those of a ``FILE.py:NAME``, are sent as they are; other
            modules are imported by each worker, so that one that draws numbers at its import draws others there. What
            a script registers or patches (``register_kl``, say) has to be done by such a module.

    Returns:
        A table with a row for each guide, in nats per observation where nothing else is said; its ``.runs`` holds the
        fits by name, on the CPU where workers fitted them, and its ``.failed`` the fits that failed, and why.

    Raises:
        ValueError: Before any training, for anything that does not fit; if ``resume`` finds another comparison.
        OutputExistsError: If ``out`` holds something and neither ``overwrite`` nor ``resume`` was given, or if another
            process writes there.
        NonFiniteLoss: If a loss is NaN or infinite, with the name of the fit; with workers, only if every fit failed.
        ChildProcessError: If no fit is done and a worker's process was killed twice.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, Normal, StandardNormal
        >>> from pyrogen.inference import ELBO
        >>> from pyrogen.networks import MLP
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, data.event_shape)))
        >>> table = compare(model, {"mean field": (Normal, ELBO())}, encoder=lambda: MLP(data.event_shape, 32),
        ...                 data=data, test=data.test[:20], epochs=1, particles=10, progress=False)
        >>> table.loc["mean field", "observations"], table.runs["mean field"].model is model
        (np.int64(20), False)
    """
    options = FitOptions(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        gradient_clip=gradient_clip,
        seed=seed,
        device=device,
        precision=precision,
        critic=critic or CriticOptions(),
        average=average,
        compile=compile,
        matmul_precision=matmul_precision,
        non_finite=non_finite,
    )
    check_workers(workers)
    if environment() is not None:
        raise ValueError(
            "a comparison is made in one process, and torchrun or SLURM has started several; only fit trains on all of "
            "them together. Start one process, with workers= for more"
        )
    batches, _ = training_and_validation(data, batch_size, seed)
    if (home := first_parameter(model)) is not None:
        batches = dataclasses.replace(batches, dtype=home.dtype)
    known_parts(parts)
    rows, source = _test_rows(model, data, test)
    fits, left_out = _prepare(model, guides, encoder, batches, seed, skip_unserved)
    folder = None if out is None else prepare_folder(out, overwrite=overwrite, resume=resume, comparison=True)
    if configuration is None:
        configuration = _describe(model, fits, options, data, particles, parts)
    configuration = yaml.safe_load(yaml.safe_dump(dict(configuration), sort_keys=False))
    if folder is not None and resume:
        _check_same(folder, configuration)
        if not contents(folder):
            _log.warning("%s holds no comparison to go on with, so it begins anew", folder)
    work = _Work(fits, options, batches, rows, particles, writes=folder is not None, together=workers is not None)
    common = Common(data, rows, options, parts, particles, functools.partial(compared_in, data, parts, seed))

    def begin() -> None:
        if folder is not None:
            stack.enter_context(held(folder, overwrite=overwrite, resume=resume, comparison=True))
            _begin(folder, fits, configuration, resume=resume, clear=overwrite and not resume)

    with ExitStack() as stack, work.bar(progress):
        if workers is None:
            begin()
            table_rows, runs, failed = _fit_here(fits, common, folder, resume, work)
        else:
            table_rows, runs, failed = _fit_elsewhere(fits, common, folder, resume, work, workers, begin)
        table = Comparison.of(table_rows, runs, source, left_out)
        if failed:
            table.failed = failed
        if folder is not None:
            write_artifacts(folder, table, rows, data, seed)
        work.written()
    return table


def _fit_here(
    fits: list[PreparedFit], common: Common, folder: Path | None, resume: bool, work: "_Work"
) -> tuple[list[dict[str, Any]], dict[str, Run], dict[str, str]]:
    """Rows and runs of the fits, made one after the other, of which none may fail."""
    common = dataclasses.replace(common, space=functools.cache(common.space))
    rows, runs = [], {}
    for each in fits:
        own = None if folder is None else folder / each.slug
        runs[each.name], figures = fitted(each, common, own, resume, functools.partial(work.trained, each))
        work.evaluated(each)
        rows.append(row_of(runs[each.name], figures))
    return rows, runs, {}


def _fit_elsewhere(
    fits: list[PreparedFit],
    common: Common,
    folder: Path | None,
    resume: bool,
    work: "_Work",
    workers: Workers,
    begin: Callable[[], None],
) -> tuple[list[dict[str, Any]], dict[str, Run], dict[str, str]]:
    """Rows and runs of the fits that workers made, and why the others failed."""
    by_name, outcomes = {each.name: each for each in fits}, dict[str, Outcome]()
    with tempfile.TemporaryDirectory(prefix="pyrogen-") as scratch:
        base = (folder or Path(scratch)).resolve()
        jobs = {each.name: Job(each.name, base / each.slug, resume) for each in fits}
        left = sum(not (resume and (job.folder / FIGURES).is_file()) for job in jobs.values())
        # Looked for here, so that not every worker has to.
        space = functools.partial(dict, common.space()) if left else common.space
        sent = dataclasses.replace(common, space=space)
        functions = {each.name: functools.partial(perform_fit, each) for each in fits}

        def watch(names: list[str]) -> None:
            for name in names:
                work.trained(by_name[name], step_in(jobs[name].folder))

        with open_pool(workers, functions, sent, common.options.device, max(1, left), Path(scratch)) as pool:
            begin()
            for name, outcome in perform_all(pool, jobs.values(), watch):
                outcomes[name] = outcome
                _note_error(jobs[name].folder, outcome.error)
                work.evaluated(by_name[name])
        errors = {each.name: outcomes[each.name].error for each in fits}
        failed = {name: error for name, error in errors.items() if error is not None}
        if len(failed) == len(fits):
            raise next(iter(failed.values()))
        rows, runs = [], {}
        for each in fits:
            if each.name not in failed:
                done = outcomes[each.name].result
                rows.append(done["row"])
                runs[each.name] = read_fit(each, jobs[each.name].folder, common.options, done["objective"])
    return rows, runs, {name: _reason(name, error) for name, error in failed.items()}


def _note_error(folder: Path, error: Exception | None) -> None:
    """Keep where an error came up beside what the fit has left."""
    if error is not None:
        with atomically(folder / ERROR) as temporary:
            temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")


def _reason(name: str, error: Exception) -> str:
    text = next(iter(str(error).removeprefix(f"{name}: ").splitlines()), "")
    return text if isinstance(error, (NonFiniteLoss, ChildProcessError)) else f"{type(error).__name__}: {text}"


def _prepare(
    model: Callable,
    guides: Mapping[str, tuple[Any, Objective]],
    encoder: Any,
    batches: Batches,
    seed: int,
    skip_unserved: bool,
) -> tuple[list[PreparedFit], dict[str, str]]:
    """Build and check every fit, so that whatever is wrong shows before any training."""
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError('expected guides as a mapping with at least one entry, such as {"flow": (Flow, ELBO())}')
    example = batches.first()
    check_values(model, batches)
    fits, left_out = [], {}
    for name, entry in guides.items():
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[1], Objective)):
            raise ValueError(f"the guide '{name}' must be a pair (family, objective), got {entry!r}")
        family, objective = entry
        with seeded(seed, torch.device("cpu")):
            own, guide = independent_copy(model, example), None
            if family is not None:
                features = copy.deepcopy(encoder) if isinstance(encoder, nn.Module) else encoder()
                guide = amortized_guide(own, features, copy.deepcopy(family), example)
            objective.check_guide(guide)
            check_programs(own, guide, *example, guided=objective.uses_guide)
            try:
                trial_of(objective).prepare(own, guide, *example)
            except NoDensityError as error:
                if not skip_unserved:
                    raise NoDensityError(f"{name}: {error}") from error
                left_out[name] = str(error)
                continue
        fits.append(PreparedFit(name, slug(name), own, guide, copy.copy(objective)))
    if not fits:
        raise ValueError(f"no objective serves any of the guides: {'; '.join(left_out.values())}")
    slugs = [each.slug for each in fits]
    for each in fits:
        if slugs.count(each.slug) > 1:
            raise ValueError(f"two guides have names that give the folder '{each.slug}'; name one of them otherwise")
    return fits, left_out


def _test_rows(model: Callable, data: Any, test: Any) -> tuple[tuple[Tensor, ...], str]:
    """The rows to evaluate on, and what they are."""
    if test is not None:
        rows = (test,) if isinstance(test, Tensor) else tuple(test)
        if not rows:
            raise ValueError("expected test as a tensor or a tuple of tensors, got none; leave it out, or add rows")
        try:
            check_data(rows)
            check_values(model, Batches(rows, None, len(rows[0]), 0))
        except (ValueError, TypeError) as error:
            raise type(error)(f"test: {error}") from error
        return rows, "test rows"
    if isinstance(data, Data):
        return (data.test,), "test rows"
    if isinstance(data, Dataset):
        raise ValueError("a torch Dataset has no test rows; pass test=, a tensor or a tuple of tensors")
    return ((data,) if isinstance(data, Tensor) else tuple(data)), "rows of the training data itself"


class _Work:
    """How much is to be done, in seconds guessed from one forward pass of each fit, and a progress bar for it."""

    def __init__(
        self,
        fits: list[PreparedFit],
        options: FitOptions,
        batches: Batches,
        rows: tuple[Tensor, ...],
        particles: int,
        *,
        writes: bool,
        together: bool,
    ) -> None:
        self.names, self.together, self.ended = [each.name for each in fits], together, 0
        self.steps = options.steps or (options.epochs or 0) * batches.per_epoch
        batch = batches.first(min(options.batch_size, len(batches)))
        self.of_step: dict[str, float] = {}
        self.of_evaluation: dict[str, float] = {}
        for each in fits:
            seconds = _seconds_of(each, batch)
            # A step goes forward and back, and the optimizer moves; an evaluation only goes forward. Critics are asked
            # twice in a step, by the program and for their own loss.
            critical = isinstance(each.objective, CriticObjective)
            self.of_step[each.name] = (6 if critical else 3) * seconds
            draws = len(batch[0]) * each.objective.particles
            self.of_evaluation[each.name] = seconds / draws * len(rows[0]) * particles / 2
        self.writing = 2.0 + 4.0 * len(fits) if writes else 0.0
        self.done = dict.fromkeys(self.names, 0.0)
        self.total = sum(self.of_step.values()) * self.steps + sum(self.of_evaluation.values()) + self.writing

    @contextmanager
    def bar(self, progress: bool) -> Iterator[None]:
        """Show the bar, on stderr."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Quiet, for older versions of rich end with an empty line in any case.
        console = Console(stderr=True, quiet=not progress)
        with Progress(*columns, console=console, disable=not progress) as self.shown:
            self.task = self.shown.add_task(self._title(0), total=self.total)
            yield

    def _title(self, position: int, doing: str = "training") -> str:
        if self.together:
            return f"{self.ended} of {len(self.names)} fits done"
        return f"{position + 1}/{len(self.names)} {printable(self.names[position])}: {doing}"

    def trained(self, each: PreparedFit, step: int) -> None:
        """A fit stands at a step."""
        self.done[each.name] = self.of_step[each.name] * step
        self._show(self._title(self.names.index(each.name), "evaluating" if step == self.steps else "training"))

    def evaluated(self, each: PreparedFit) -> None:
        """A fit is done and evaluated, or will not be."""
        self.ended += 1
        self.done[each.name] = self.of_step[each.name] * self.steps + self.of_evaluation[each.name]
        following = self.ended if self.together else self.names.index(each.name) + 1
        self._show(self._title(following) if following < len(self.names) else "writing figures and posteriors")

    def written(self) -> None:
        """All is done."""
        self.shown.update(self.task, completed=self.total, description="done")

    def _show(self, title: str) -> None:
        self.shown.update(self.task, completed=sum(self.done.values()), description=title)


def _seconds_of(each: PreparedFit, batch: tuple[Tensor, ...]) -> float:
    """The time of a forward pass on a batch, on the CPU; nothing changes by it."""
    for program in (each.model, each.guide):
        if isinstance(program, nn.Module):
            program.eval()
    best, objective = math.inf, trial_of(each.objective)
    with (
        torch.no_grad(),
        pyro.validation_enabled(False),
        pyro.get_param_store().scope(),
        torch.random.fork_rng(devices=[]),
    ):
        for _ in range(3):
            started = time.perf_counter()
            objective.estimate(each.model, each.guide, *batch)
            best = min(best, time.perf_counter() - started)
    return best


def _describe(
    model: Callable, fits: list[PreparedFit], options: FitOptions, data: Any, particles: int, parts: Sequence[str] | str
) -> dict[str, Any]:
    """The arguments as plain values; what can't be described is noted."""

    def plain(value: Any) -> Any:
        try:
            return describe(value)
        except ValueError as error:
            return {"not_described": str(error)}

    return {
        "data": (data.source or data.name) if isinstance(data, Data) else None,
        "model": plain(model),
        "guides": {
            e.name: {"family": e.guide and plain(e.guide.family), "objective": plain(e.objective)} for e in fits
        },
        "encoder": next((plain(e.guide.encoder) for e in fits if e.guide), None),
        "options": {name: plain(value) for name, value in vars(options).items()},
        "particles": particles,
        "parts": known_parts(parts),
    }


def _check_same(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` where a folder to be resumed holds another comparison."""
    path = folder / COMPARISON
    if not path.is_file():
        return
    try:
        there, values = without_moves(read_yaml(path), values)  # fits compare the source of programs
        differing = [key for key in {*there, *values} if there.get(key) != values.get(key)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or start anew with overwrite") from error
    if differing:
        changes = "; ".join(f"{key}: {there.get(key)!r} there, {values.get(key)!r} now" for key in differing)
        changes = changes if len(changes) < LONGEST else f"{changes[:LONGEST]}…"
        raise ValueError(f"{folder} holds another comparison ({changes}); resume it with the same settings")


def _begin(
    folder: Path, fits: list[PreparedFit], configuration: Mapping[str, Any], *, resume: bool, clear: bool
) -> None:
    """Replace an earlier comparison, once nothing can refuse this one, or go on with it; write ``compare.yaml``."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("pyrogen", "pyro-ppl", "torch"))
    text = f"# Written by {versions}\n{yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)}"
    for each in fits:
        place = check_length(folder / each.slug, f"the guide's name {each.name!r}")
        if (place.exists() and not place.is_dir()) or (clear and place.is_symlink()):
            what = "a link" if place.is_symlink() else "a file"
            raise OutputExistsError(f"{place} is {what}; remove it, or give the guide {each.name!r} another name")
    if clear:
        for lock in folder.glob(f"*/{LOCK}"):
            with locked(lock.parent):
                pass
        check_writable(folder, text)
        clear_folder(folder, keep=[COMPARISON])  # which is replaced below
    gone = [path for place in (folder, folder / "figures") for path in leftovers(place)]
    for path in (*gone, *(folder / each.slug / ERROR for each in fits)):
        path.unlink(missing_ok=True)
    path = folder / COMPARISON
    if resume and path.is_file():
        return
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

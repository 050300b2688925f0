"""Training: one step, one loop, and checkpoints from which it goes on bit for bit."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyro
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyrogen.data import Data
from pyrogen.inference.batches import Batches, training_and_validation
from pyrogen.inference.checkpoints import load_weights, read_tensors, unique_tensors, write_tensors
from pyrogen.inference.checks import check_programs, check_values
from pyrogen.inference.objectives import Objective
from pyrogen.inference.programs import as_module, describe_example
from pyrogen.inference.run import FitOptions, Run, clear_folder, prepare_folder, write_run

__all__ = ["NonFiniteLoss", "fit", "progress_bar"]

CHECKPOINT = "checkpoint.safetensors"
_VALIDATION_ROWS = 1000
"""Rows of a validation batch."""


class NonFiniteLoss(ArithmeticError):
    """A loss that is NaN or infinite; training stopped before the step that it would have spoiled."""


def fit(
    model: Callable,
    guide: Callable | None,
    objective: Objective,
    data: Data | Tensor | Sequence[Tensor] | Dataset,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    schedule: Literal["constant", "linear", "cosine"] | Callable[[float], float] = "constant",
    gradient_clip: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    validate_every: int = 1,
    patience: int | None = None,
    callbacks: Iterable[Callable[[Run], Any]] = (),
    progress: bool = True,
    out: str | Path | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train a model with its guide.

    Args:
        model, guide: Programs; plain functions that use ``pyro.module`` as well as modules. They are trained in place
            and stay on the device.
        objective: What is minimised, in nats per observation.
        data: A tensor ``(N, *event_shape)``, a tuple of tensors (given to the programs as ``model(*batch)``), a torch
            ``Dataset`` of these, or what :func:`pyrogen.data.load` returns; only this last has validation data.
        epochs, steps: How long, one of the two.
        batch_size: Rows of a minibatch.
        learning_rate: Of Adam, or of ``optimizer``.
        optimizer: Called as ``optimizer(parameters, lr=learning_rate)``; by default a fused Adam.
        schedule: A factor on the learning rate: constant, falling to 0 linearly or as a half cosine, or a callable
            from the share of training done, in [0, 1).
        gradient_clip: Bound on the norm of the gradient of all parameters.
        seed: Of the draws and of the data's order. The caller's random state is left as it was.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        precision: As Lightning Fabric names it: ``"32-true"``, ``"bf16-mixed"``, ``"64-true"``, ...
        validate_every: Epochs between evaluations of the bound on the validation data.
        patience: Stop when the validation bound has not risen for so many evaluations, and keep the best weights.
        callbacks: Each is called with the run as it stands after every epoch; one that returns ``True`` stops it.
        progress: Show a progress bar with the time left.
        out: A folder for the run, its checkpoints and its logs (TensorBoard and ``history.csv``).
        checkpoint_every: Epochs between checkpoints.
        resume: Go on from the checkpoint in ``out`` where there is one; on the same machine the result is bit for bit
            that of a training never interrupted.
        overwrite: Replace a run that is in ``out``.

    Returns:
        The run: ``.model``, ``.guide``, ``.objective``, ``.history``, ...

    Raises:
        ValueError: Before any training, for data, programs or options that do not fit each other.
        OutputExistsError: Before any training, if ``out`` holds something.
        NonFiniteLoss: If a loss is NaN or infinite; it names the site where that began.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = fit(model, guide, pg.inference.ELBO(), data, epochs=2, progress=False)
        >>> len(run.history)
        2
    """
    options = FitOptions(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        gradient_clip=gradient_clip,
        seed=seed,
        device=device,
        precision=precision,
        validate_every=validate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
    )
    if not isinstance(objective, Objective):
        raise TypeError(
            f"expected an objective such as pyrogen.inference.ELBO(), got {type(objective).__name__}; Pyro's own "
            "losses train with pyro.infer.SVI"
        )
    batches, validation = training_and_validation(data, batch_size, seed)
    folder = None if out is None else prepare_folder(out, overwrite=overwrite, resume=resume)
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data; pass what pyrogen.data.load returns, or leave patience out")
    example = batches.first()
    check_values(model, batches)
    check_programs(model, guide, *example)
    if folder is not None and overwrite and not resume:
        clear_folder(folder)
    run = Run(
        model=as_module(model, *example),
        guide=None if guide is None else as_module(guide, *example),
        objective=copy.copy(objective),
        history=pd.DataFrame(),
        options=options,
        data=data.source or None if isinstance(data, Data) else None,
        example=describe_example(tuple(x[:2] for x in example)),
    )
    run.objective.step = 0
    if objective.observations is None:
        run.objective.observations = len(batches)
    with _quiet(seed, progress) as bar:
        _Training(run, batches, validation, folder, tuple(callbacks), bar).go(resume)
    if folder is not None:
        write_run(run, folder)
    return run


class _Training:
    """One fit under way: what changes from step to step, and how it is written and read."""

    def __init__(
        self,
        run: Run,
        batches: Batches,
        validation: tuple[Tensor, ...] | None,
        folder: Path | None,
        callbacks: tuple[Callable[[Run], Any], ...],
        bar: Progress | None,
    ) -> None:
        self.run = run
        self.folder = folder
        self.callbacks = callbacks
        self.bar = bar
        options = run.options
        self.fabric = _fabric(options, folder)
        self.batches = batches.to(self.fabric.device)
        self.validation = None if validation is None else tuple(x.to(self.fabric.device) for x in validation)
        module = run.objective(run.model, run.guide)
        self.optimizer = _optimizer(module, options, self.fabric.device)
        self.module: Any
        self.module, self.stepper = self.fabric.setup(module, self.optimizer)
        self.programs = module
        self.total = options.steps or options.epochs * batches.per_epoch  # type: ignore[operator]
        self.step = 0
        self.stop = False
        self.best = -math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.since_best = 0

    def go(self, resume: bool) -> None:
        if resume and self.folder is not None and (self.folder / CHECKPOINT).exists():
            self._read_checkpoint(self.folder / CHECKPOINT)
        task = None if self.bar is None else self.bar.add_task("fit", total=self.total, completed=self.step, loss="")
        while self.step < self.total and not self.stop:
            self._epoch(task)
        if self.best_weights:
            load_weights(self.run.programs, self.best_weights, "the best weights")
        self.run.programs.eval()

    def _epoch(self, task: Any) -> None:
        """Train to the end of the epoch, then measure, log, write, and decide whether to go on."""
        started = time.perf_counter()
        epoch, done = divmod(self.step, self.batches.per_epoch)
        sums: dict[str, Tensor] = {}
        rows = count = 0
        self.programs.train()
        for batch in self.batches.epoch(epoch, self.fabric.device, skip=done):
            metrics = self._step(batch)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
            rows, count = rows + len(batch[0]), count + 1
            if self.bar is not None:
                self.bar.update(task, completed=self.step, loss=f"loss {metrics['loss']:.2f}")
            if self.step == self.total:
                break
        seconds = time.perf_counter() - started
        self.run.seconds += seconds
        row = {"epoch": epoch + 1, "step": self.step} | {name: float(v) / count for name, v in sums.items()}
        validated = self.validation is not None and (
            (epoch + 1) % self.run.options.validate_every == 0 or self.step == self.total
        )
        row["validation"] = self._validate() if validated else math.nan
        row |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": self.run.seconds}
        row["rows_per_second"] = rows / seconds
        self.run.history = pd.concat([self.run.history, pd.DataFrame([row])], ignore_index=True)
        self.fabric.log_dict({name: value for name, value in row.items() if not math.isnan(value)}, step=self.step)
        self._finish_epoch(epoch, validated)

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the figures of its batch, without gradients."""
        options = self.run.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _factor(options.schedule, self.step / self.total)
        loss = self.module(*batch)
        estimate = self.programs.latest
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(self._explain(loss.item(), estimate.terms.origin_of_nan()))
        self.stepper.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if options.gradient_clip is not None:
            self.fabric.clip_gradients(self.module, self.stepper, max_norm=options.gradient_clip)
        self.stepper.step()
        self.step += 1
        return {"loss": loss.detach()} | estimate.metrics

    def _explain(self, loss: float, origin: str) -> str:
        epoch = self.step // self.batches.per_epoch + 1
        kept = self.folder is not None and (self.folder / CHECKPOINT).exists()
        where = f"the last good checkpoint is {self.folder / CHECKPOINT}" if kept else "no checkpoint was written"
        return (
            f"the loss is {loss} at step {self.step + 1} (epoch {epoch}); it began at {origin}. Training stopped and "
            f"{where}. Try a smaller learning_rate, or gradient_clip=1.0"
        )

    def _validate(self) -> float:
        """Mean bound on the validation data, from the same draws at every epoch."""
        self.programs.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.run.options.seed)
            total, parts = 0.0, zip(*(x.split(_VALIDATION_ROWS) for x in self.validation), strict=True)  # type: ignore[union-attr]
            for batch in parts:
                total += float(self.programs.bound(*batch).sum())
        return total / len(self.validation[0])  # type: ignore[index]

    def _finish_epoch(self, epoch: int, validated: bool) -> None:
        options = self.run.options
        if validated and options.patience is not None:
            bound = self.run.history["validation"].iloc[-1]
            self.since_best = 0 if bound > self.best else self.since_best + 1
            if bound > self.best:
                self.best = bound
                self.best_weights = {k: v.detach().clone() for k, v in unique_tensors(self.run.programs).items()}
            self.stop = self.since_best >= options.patience
        # A list, so that every callback is called even after one wants to stop.
        self.stop = any([callback(self.run) is True for callback in self.callbacks]) or self.stop
        last = self.stop or self.step == self.total
        if self.folder is not None and (last or (epoch + 1) % options.checkpoint_every == 0):
            self._write_checkpoint(self.folder / CHECKPOINT)

    def _write_checkpoint(self, path: Path) -> None:
        """Everything needed to go on, in one file."""
        state = self.optimizer.state_dict()
        tensors = {f"weights.{name}": value for name, value in unique_tensors(self.run.programs).items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.fabric.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        numbers: dict[str, Any] = {}
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        values = {
            "step": self.step,
            "stop": self.stop,
            "best": None if math.isinf(self.best) else self.best,
            "since_best": self.since_best,
            "objective_step": self.run.objective.step,
            "seconds": self.run.seconds,
            "history": self.run.history.to_dict("list"),
            "numbers": numbers,
            "parameters": [group["params"] for group in state["param_groups"]],
        }
        write_tensors(path, tensors, values)
        write_run(self.run, path.parent)

    def _read_checkpoint(self, path: Path) -> None:
        tensors, values = read_tensors(path)

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        load_weights(self.run.programs, under("weights."), str(path))
        state = self.optimizer.state_dict()
        if values["parameters"] != [group["params"] for group in state["param_groups"]]:
            raise ValueError(f"{path} belongs to a training of other parameters; resume it with the same programs")
        entries: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in values["numbers"].items()}
        for name, tensor in under("optimizer.").items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
        self.best_weights = under("best.")
        self.step, self.since_best, self.stop = values["step"], values["since_best"], values["stop"]
        self.best = -math.inf if values["best"] is None else values["best"]
        self.run.objective.step, self.run.seconds = values["objective_step"], values["seconds"]
        self.run.history = pd.DataFrame(values["history"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.fabric.device)


def _factor(schedule: str | Callable[[float], float], share: float) -> float:
    if callable(schedule):
        return schedule(share)
    return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[schedule]


def _fabric(options: FitOptions, folder: Path | None) -> Fabric:
    kind, _, index = options.device.partition(":")
    loggers = [] if folder is None else [TensorBoardLogger(folder, name="logs", version="")]
    try:
        return Fabric(
            accelerator=kind,
            devices=[int(index)] if index else 1,
            precision=options.precision,  # type: ignore[arg-type]
            loggers=loggers,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"device={options.device!r} with precision={options.precision!r} can't be used here: {error}"
        ) from error


def _optimizer(module: nn.Module, options: FitOptions, device: torch.device) -> torch.optim.Optimizer:
    module.to(device)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("neither model nor guide has a parameter to train")
    if options.optimizer is not None:
        return options.optimizer(parameters, lr=options.learning_rate)
    return torch.optim.Adam(parameters, lr=options.learning_rate, fused=device.type in ("cpu", "cuda"))


def progress_bar() -> Progress:
    """A progress bar with the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )


@contextmanager
def _quiet(seed: int, progress: bool) -> Iterator[Progress | None]:
    """Seeded random state that is given back, and Pyro's checks off: they were done once and cost time."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(pyro.validation_enabled(False))
        bar = stack.enter_context(progress_bar()) if progress else None
        torch.manual_seed(seed)
        yield bar

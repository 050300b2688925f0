"""The training loop: a step, an epoch, and checkpoints from which it goes on bit for bit."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from pyrogen.inference.batches import Batches
from pyrogen.inference.checkpoints import (
    load_optimizer,
    load_weights,
    optimizer_state,
    random_state,
    read_tensors,
    seeded,
    set_random_state,
    unique_tensors,
    write_tensors,
)
from pyrogen.inference.programs import no_sites
from pyrogen.inference.run import SETTINGS, FitOptions, Run, settings_of, write_run, write_yaml

__all__ = ["CHECKPOINT", "NonFiniteLoss", "Training"]

CHECKPOINT = "checkpoint.safetensors"
MAY_CHANGE = ("epochs", "steps", "patience", "device", "checkpoint_every")
"""Options that another part of the same run may have."""

_VALIDATION_ROWS = 1000
"""Rows of a validation batch, copies counted."""


class NonFiniteLoss(ArithmeticError):
    """A loss that is NaN or infinite; training stopped before the step that it would have spoiled."""


class Training:
    """One fit under way: what changes from step to step, and how it is written and read."""

    def __init__(
        self,
        run: Run,
        batches: Batches,
        validation: Batches | None,
        fabric: Fabric,
        folder: Path | None,
        callbacks: tuple[Callable[[Run], Any], ...],
    ) -> None:
        self.run = run
        self.folder = folder
        self.callbacks = callbacks
        self.fabric = fabric
        options = run.options
        self.programs = run.objective(run.model, no_sites if run.guide is None else run.guide)
        self.optimizer = _optimizer(self.programs, options, fabric.device)
        self.module: Any
        self.module, self.stepper = fabric.setup(self.programs, self.optimizer)
        self.module.mark_forward_method("bound")
        dtype = next((p.dtype for p in self.programs.parameters() if p.is_floating_point()), None)
        self.batches = batches.to(fabric.device, dtype)
        self.fingerprint = batches.fingerprint()
        self.validation = None if validation is None else validation.to(fabric.device, dtype)
        self.total = options.steps or (options.epochs or 0) * batches.per_epoch
        self.step = 0
        self.best = -math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.since_best = 0

    @property
    def out_of_patience(self) -> bool:
        patience = self.run.options.patience
        return patience is not None and self.since_best >= patience

    def go(self, progress: bool) -> None:
        """Train from where training stands to its end, and leave the run as it shall be."""
        stop = False
        try:
            if self.folder is not None:  # so that the folder is known as a run's from the start
                write_yaml(self.folder / SETTINGS, settings_of(self.run))
            with progress_bar(disable=not progress) as bar:
                task = bar.add_task("fit", total=self.total, completed=self.step, loss="")
                while self.step < self.total and not stop and not self.out_of_patience:
                    stop = self._epoch(bar, task)
            if self.best_weights:
                load_weights(self.run.programs, self.best_weights, "the best weights")
            if self.folder is not None:
                write_run(self.run, self.folder)
        finally:
            self.programs.eval()
            for logger in self.fabric.loggers:
                logger.finalize("finished")

    def _epoch(self, bar: Progress, task: TaskID) -> bool:
        """Train to the end of the epoch, then measure, log and write; returns whether a callback wants to stop."""
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
            if not bar.disable:
                bar.update(task, completed=self.step, loss=f"loss {metrics['loss']:.2f}")
            if self.step == self.total:
                break
        self._check_weights()
        seconds = time.perf_counter() - started
        self.run.seconds += seconds
        row = {"epoch": epoch + 1, "step": self.step} | {name: float(v) / count for name, v in sums.items()}
        row["validation"] = self._validate(epoch)
        row |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "seconds": self.run.seconds}
        row["rows_per_second"] = rows / seconds
        history, last = self.run.history, pd.DataFrame([row])
        self.run.history = last if history.empty else pd.concat([history, last], ignore_index=True)
        self.fabric.log_dict({name: value for name, value in row.items() if not math.isnan(value)}, step=self.step)
        return self._finish_epoch(epoch)

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the figures of its batch, without gradients."""
        options = self.run.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * _factor(options.schedule, self.step / self.total)
        loss = self.module(*batch)
        estimate: Any = self.programs.latest
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(self._explain(f"the loss is {loss.item()}", estimate.terms.origin_of_nan()))
        self.stepper.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if options.gradient_clip is not None:
            self.fabric.clip_gradients(
                self.module, self.stepper, max_norm=options.gradient_clip, error_if_nonfinite=False
            )
        self.stepper.step()
        self.step += 1
        return {"loss": loss.detach()} | estimate.metrics

    def _spoiled(self) -> list[str]:
        """Names of the parameters that are not finite."""
        return [name for name, p in self.run.programs.named_parameters() if not torch.isfinite(p).all()]

    def _check_weights(self) -> None:
        if spoiled := self._spoiled():
            raise NonFiniteLoss(self._explain("the last step has spoiled weights", f"the gradient of {spoiled[0]}"))

    def _explain(self, what: str, origin: str) -> str:
        if spoiled := self._spoiled():
            origin = f"{origin}, for the step before made {spoiled[0]} not finite"
        where = "no checkpoint was written"
        if self.folder is not None and (self.folder / CHECKPOINT).exists():
            where = f"the last good checkpoint is {self.folder / CHECKPOINT}"
        epoch = self.step // self.batches.per_epoch + 1
        return (
            f"{what} at step {self.step + 1} (epoch {epoch}); it began at {origin}. Training stopped and "
            f"{where}. Try a smaller learning_rate, or gradient_clip=1.0"
        )

    def _validate(self, epoch: int) -> float:
        """Mean bound on the validation data from the same draws at every epoch, or NaN if it is not yet time."""
        if self.validation is None or not self._validates(epoch):
            return math.nan
        self.programs.eval()
        total = torch.zeros((), dtype=torch.float64)
        size = max(1, _VALIDATION_ROWS // self.run.objective.particles)
        with torch.no_grad(), seeded(self.run.options.seed, self.fabric.device):
            for batch in self.validation.in_order(self.fabric.device, size):
                total += self.module.bound(*batch).sum().cpu()
        return float(total) / len(self.validation)

    def _validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.run.options.validate_every == 0 or self.step == self.total

    def _finish_epoch(self, epoch: int) -> bool:
        options = self.run.options
        if self.validation is not None and self._validates(epoch) and options.patience is not None:
            bound = self.run.history["validation"].iloc[-1]
            self.since_best = 0 if bound > self.best else self.since_best + 1
            if bound > self.best:
                self.best = bound
                self.best_weights = {k: v.detach().clone() for k, v in unique_tensors(self.run.programs).items()}
        due = (epoch + 1) % options.checkpoint_every == 0 or self.step == self.total or self.out_of_patience
        if due:
            self._write_checkpoint()
        # What callbacks draw does not change the training. A list, so that all are called even if one wants to stop.
        with seeded(None, self.fabric.device):
            stop = any([callback(self.run) is True for callback in self.callbacks])
        if stop and not due:
            self._write_checkpoint()
        return stop

    def _write_checkpoint(self) -> None:
        """Everything needed to go on, in one file."""
        if self.folder is None:
            return
        moments, optimizer = optimizer_state(self.optimizer)
        tensors = {f"weights.{name}": value for name, value in unique_tensors(self.run.programs).items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        tensors |= {f"random.{name}": value for name, value in random_state(self.fabric.device).items()}
        values = {
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "since_best": self.since_best,
            "objective_step": self.run.objective.step,
            "seconds": self.run.seconds,
            "history": self.run.history.to_dict("list"),
            "optimizer": optimizer,
            "precision": self.fabric.strategy.precision.state_dict(),
            "identity": self._identity(),
        }
        write_tensors(self.folder / CHECKPOINT, tensors, values)
        write_run(self.run, self.folder)

    def _identity(self) -> dict[str, Any]:
        """What may not change when a run goes on, as plain values."""
        settings = settings_of(self.run)
        parts = {name: settings[name] for name in ("model", "guide", "objective")}
        options = {name: value for name, value in settings["options"].items() if name not in MAY_CHANGE}
        source = {name: value for name, value in (self.run.data or {}).items() if name not in ("name", "root")}
        data = {"rows": len(self.batches), "fingerprint": self.fingerprint, "example": self.run.example, "source": source}
        return json.loads(json.dumps({"options": options, "data": data} | parts))

    def read_checkpoint(self, path: Path) -> None:
        """Go on where a checkpoint was written.

        Raises:
            ValueError: If it is damaged, was written by another fit, or has gone further than this one shall go.
        """
        tensors, values = read_tensors(path)
        try:
            difference = first_difference(values["identity"], self._identity())
            if difference is not None:
                raise ValueError(
                    f"{path} was written by a fit that differs: {difference}. Resume with what it was begun with (only "
                    f"{', '.join(MAY_CHANGE)} may change), or begin anew with overwrite=True"
                )
            if values["step"] > self.total:
                raise ValueError(
                    f"{path} has gone {values['step']} steps already, more than the {self.total} of this fit; give "
                    "larger epochs or steps to go on"
                )
            self._restore(tensors, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no checkpoint of this version of pyrogen ({error!r})") from error

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        load_weights(self.run.programs, under("weights."), CHECKPOINT)
        load_optimizer(self.optimizer, under("optimizer."), values["optimizer"])
        self.fabric.strategy.precision.load_state_dict(values["precision"])
        self.best_weights = under("best.")
        self.step, self.since_best = values["step"], values["since_best"]
        self.best = -math.inf if values["best"] is None else values["best"]
        self.run.objective.step, self.run.seconds = values["objective_step"], values["seconds"]
        self.run.history = pd.DataFrame(values["history"])
        set_random_state(under("random."), self.fabric.device)


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """Where two plain values differ first, in words, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = (
            first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            for key in {**there, **here}
        )
        return next((difference for difference in found if difference is not None), None)
    return None if there == here else f"{name} was {there!r} and is {here!r}"


def _factor(schedule: str | Callable[[float], float], share: float) -> float:
    if callable(schedule):
        return schedule(share)
    return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[schedule]


def _optimizer(module: nn.Module, options: FitOptions, device: torch.device) -> torch.optim.Optimizer:
    module.to(device)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("neither model nor guide has a parameter to train")
    if options.optimizer is not None:
        return options.optimizer(parameters, lr=options.learning_rate)
    # With scaled gradients a fused step would unscale them after they were clipped.
    fused = device.type in ("cpu", "cuda") and options.precision != "16-mixed"
    return torch.optim.Adam(parameters, lr=options.learning_rate, fused=fused)


def progress_bar(*, disable: bool = False) -> Progress:
    """A progress bar with the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        disable=disable,
    )

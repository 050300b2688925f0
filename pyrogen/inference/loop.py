"""The training loop: a step, an epoch, and checkpoints from which it goes on bit for bit."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.programs import latent_sites, prototype
from pyrogen.inference.run import INACTIVE_UNITS, SETTINGS, FitOptions, Run, settings_of, write_run, write_yaml
from pyrogen.inference.units import UNIT_ROWS, inactive_units
from pyrogen.inference.watch import CriticWatch

__all__ = ["CHECKPOINT", "NonFiniteLoss", "Training"]

CHECKPOINT = "checkpoint.safetensors"
MAY_CHANGE = ("epochs", "steps", "patience", "device", "checkpoint_every")
"""Options that another part of the same run may have."""

PAYS_FROM = 90.0
"""Seconds that are left of a fit, above which compiling it is worth its time."""
TIMED = 20
"""Steps after which it is known how long one takes."""

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
        self.programs = run.objective(run.model, run.guide)
        self.programs.to(fabric.device)
        critics = [*run.objective.critics.parameters()]
        self.trained = _trained(self.programs, critics)
        self.optimizers = {"program": _optimizer(self.trained, options, fabric.device)}
        self.learning_rates = {"program": options.learning_rate}
        if critics:
            self.learning_rates["critic"] = options.critic.learning_rate or options.learning_rate
            self.optimizers["critic"] = _adam(
                critics, self.learning_rates["critic"], options, fabric.device, betas=options.critic.betas
            )
        contrasts: Any = run.objective.critics.items()
        self.settling = {f"{name}{which}" for name, contrast in contrasts for which in contrast.settles}
        self.critic_steps = (options.critic.steps or run.objective.critic_steps) if critics else 1
        self.module: Any
        self.module, *steppers = fabric.setup(self.programs, *self.optimizers.values())
        self.steppers = dict(zip(self.optimizers, steppers, strict=True))
        for name in ("bound", "critic_loss"):
            self.module.mark_forward_method(name)
        self.averaged = [p.detach().clone() for p in self.trained] if options.average is not None else []
        self.watch = CriticWatch()
        dtype = next((p.dtype for p in self.programs.parameters() if p.is_floating_point()), None)
        self.batches = batches.to(fabric.device, dtype)
        self.fingerprint = batches.fingerprint()
        self.validation = None if validation is None else validation.to(fabric.device, dtype)
        self.watched = self.batches if self.validation is None else self.validation
        self.local: list[str] = []
        if run.guide is not None and len(self.watched) > 1:
            sites = latent_sites(prototype(run.model, *(x.to(fabric.device) for x in self.batches.first())))
            self.local = [name for name, site in sites.items() if not site.is_global]
        self.total = options.steps or (options.epochs or 0) * batches.per_epoch
        if critics and options.critic.warmup >= self.total:
            raise ValueError(
                f"the critics' warm-up of {options.critic.warmup} steps takes all {self.total} of this fit, so the "
                "program would never move; train for longer, or choose a shorter warmup"
            )
        self.full = min(options.batch_size, len(batches))
        self.compiled = Compiled(self.programs) if options.compile is True and self._compilable else None
        self.timed, self.fastest = 0, math.inf
        self.step = 0
        self.best = -math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.since_best = 0

    @property
    def out_of_patience(self) -> bool:
        patience = self.run.options.patience
        return patience is not None and self.since_best >= patience

    @property
    def _compilable(self) -> bool:
        # Scaled gradients are unscaled by Fabric, between its own backward pass and the step.
        return self.run.options.precision != "16-mixed"

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
            self._take_averaged()
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
            began = time.perf_counter()
            self._critic_steps(len(batch[0]))
            metrics = self._step(batch)
            self._consider_compiling(time.perf_counter() - began)
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
        if self.compiled is not None:
            self.run.compile_seconds += self.compiled.seconds
            self.compiled.seconds = 0.0
        means = {name: float(value) / count for name, value in sums.items()}
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step} | means
        self.watch.look(row, count, self.settling)
        row["validation"] = math.nan
        row[self.run.objective.validates_as or "validation"] = self._validate(epoch)
        row |= {"learning_rate": self.optimizers["program"].param_groups[0]["lr"], "seconds": self.run.seconds}
        row["rows_per_second"] = rows / seconds
        if self.local:
            row[INACTIVE_UNITS] = self._inactive_units()
        history, last = self.run.history, pd.DataFrame([row])
        self.run.history = last if history.empty else pd.concat([history, last], ignore_index=True)
        figures = {name: value for name, value in row.items() if name != INACTIVE_UNITS}
        self.fabric.log_dict({name: value for name, value in figures.items() if not math.isnan(value)}, step=self.step)
        return self._finish_epoch(epoch)

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the figures of its batch, without gradients."""
        options = self.run.options
        factor = _factor(options.schedule, self.step / self.total)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[name] * factor
        estimate = self._gradients(batch)
        loss = estimate.loss.detach()
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(self._explain(f"the loss is {loss.item()}", self._origin(estimate, batch)))
        for name, stepper in self.steppers.items():
            if name == "critic" or self.step >= options.critic.warmup or "critic" not in self.steppers:
                self._move(stepper)
        self._average()
        self.step += 1
        return {"loss": loss if estimate.of_program is None else estimate.of_program} | estimate.metrics

    def _gradients(self, batch: tuple[Tensor, ...]) -> Estimate:
        """The estimate of a batch, with the gradients of all parameters in place."""
        if self.compiled is not None and len(batch[0]) == self.full:
            with self.fabric.autocast():
                return self.compiled.backward(*batch)
        loss = self.module(*batch)
        for stepper in self.steppers.values():
            stepper.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        return self.programs.latest  # type: ignore[return-value]

    def _origin(self, estimate: Estimate, batch: tuple[Tensor, ...]) -> str:
        """Where a loss that is not finite began."""
        if estimate.of_program is not None and math.isfinite(estimate.of_program.item()):
            return "the critics' own loss, whose learning rate is that of critic=CriticOptions(learning_rate=...)"
        if estimate.terms is None:  # of a compiled step, which keeps no traces
            with torch.no_grad():
                self.module(*batch)
            estimate = self.programs.latest  # type: ignore[assignment]
        assert estimate.terms is not None
        return estimate.terms.origin_of_nan()

    def _consider_compiling(self, seconds: float) -> None:
        """Compile from here on where that is left to the time that it saves."""
        if self.run.options.compile != "auto" or self.compiled is not None or not self._compilable:
            return
        self.timed += 1
        # The first steps are slower than others, and one alone tells little.
        self.fastest = min(seconds, self.fastest)
        if self.timed == TIMED and self.fastest * (self.total - self.step) > PAYS_FROM:
            self.compiled = Compiled(self.programs)

    def _move(self, stepper: Any) -> None:
        clip = self.run.options.gradient_clip
        if clip is not None:
            self.fabric.clip_gradients(self.module, stepper, max_norm=clip, error_if_nonfinite=False)
        stepper.step()

    def _critic_steps(self, rows: int) -> None:
        """The steps that critics take before the one that they share with the program."""
        for _ in range(self.critic_steps - 1):
            batch = self.batches.some(rows, self.fabric.device)
            if self.compiled is not None and rows == self.full:
                with self.fabric.autocast():
                    self.compiled.critics_backward(*batch)
            else:
                loss = self.module.critic_loss(*batch)
                self.steppers["critic"].zero_grad(set_to_none=True)
                self.fabric.backward(loss)
            self._move(self.steppers["critic"])

    def _average(self) -> None:
        """Move the averaged weights; at first faster, so that the initial ones are soon forgotten."""
        if self.averaged:
            decay = min(self.run.options.average or 0.0, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.trained], 1 - decay)

    @contextmanager
    def _with_averaged(self) -> Iterator[None]:
        """Within, the programs have the averaged weights, if there are any."""
        own = [p.detach().clone() for p in self.trained] if self.averaged else []
        self._take_averaged()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.trained, own, strict=False):
                    p.copy_(value)

    def _take_averaged(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.trained, self.averaged, strict=False):
                p.copy_(value)

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
        if self.validation is None or self.run.objective.validates_as is None or not self._validates(epoch):
            return math.nan
        self.programs.eval()
        total = torch.zeros((), dtype=torch.float64)
        size = max(1, _VALIDATION_ROWS // self.run.objective.particles)
        with torch.no_grad(), seeded(self.run.options.seed, self.fabric.device), self._with_averaged():
            for batch in self.validation.in_order(self.fabric.device, size):
                total += self.module.bound(*batch).sum().cpu()
        return float(total) / len(self.validation)

    def _inactive_units(self) -> str:
        """The latent units that say nothing of validation data, or of training data where there are none for that."""
        guide: Any = self.run.guide
        with seeded(self.run.options.seed, self.fabric.device), self._with_averaged():
            rows = next(self.watched.in_order(self.fabric.device, UNIT_ROWS))
            return " ".join(inactive_units(guide, self.local, rows)) or "none"

    def _validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.run.options.validate_every == 0 or self.step == self.total

    def _finish_epoch(self, epoch: int) -> bool:
        options = self.run.options
        if self.validation is not None and self._validates(epoch) and options.patience is not None:
            bound = self.run.history["validation"].iloc[-1]
            self.since_best = 0 if bound > self.best else self.since_best + 1
            if bound > self.best:
                self.best = bound
                with self._with_averaged():
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
        tensors = {f"weights.{name}": value for name, value in unique_tensors(self.run.programs).items()}
        tensors |= {f"best.{name}": value for name, value in self.best_weights.items()}
        tensors |= {f"averaged.{index}": value for index, value in enumerate(self.averaged)}
        optimizers = {}
        for kind, optimizer in self.optimizers.items():
            moments, optimizers[kind] = optimizer_state(optimizer)
            tensors |= {f"optimizer.{kind}.{name}": value for name, value in moments.items()}
        tensors |= {f"random.{name}": value for name, value in random_state(self.fabric.device).items()}
        values = {
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "since_best": self.since_best,
            "objective_step": self.run.objective.step,
            "seconds": self.run.seconds,
            "compile_seconds": self.run.compile_seconds,
            "history": self.run.history.to_dict("list"),
            "optimizers": optimizers,
            "watch": self.watch.state(),
            "compiled": self.compiled is not None,
            "precision": self.fabric.strategy.precision.state_dict(),
            "identity": self._identity(),
        }
        write_tensors(self.folder / CHECKPOINT, tensors, values)
        with self._with_averaged():
            write_run(self.run, self.folder)

    def _identity(self) -> dict[str, Any]:
        """What may not change when a run goes on, as plain values."""
        settings = settings_of(self.run)
        parts = {name: settings[name] for name in ("model", "guide", "objective")}
        options = {name: value for name, value in settings["options"].items() if name not in MAY_CHANGE}
        source = {name: value for name, value in (self.run.data or {}).items() if name not in ("name", "root")}
        data = {
            "rows": len(self.batches),
            "fingerprint": self.fingerprint,
            "example": self.run.example,
            "source": source,
        }
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
        for kind, optimizer in self.optimizers.items():
            load_optimizer(optimizer, under(f"optimizer.{kind}."), values["optimizers"][kind])
        for index, tensor in enumerate(self.averaged):
            tensor.copy_(under("averaged.")[str(index)])
        self.watch = CriticWatch(**values["watch"])
        if values["compiled"] and self.compiled is None:
            self.compiled = Compiled(self.programs)
        self.fabric.strategy.precision.load_state_dict(values["precision"])
        self.best_weights = under("best.")
        self.step, self.since_best = values["step"], values["since_best"]
        self.best = -math.inf if values["best"] is None else values["best"]
        self.run.objective.step, self.run.seconds = values["objective_step"], values["seconds"]
        self.run.compile_seconds = values["compile_seconds"]
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


def _trained(module: nn.Module, critics: list[nn.Parameter]) -> list[nn.Parameter]:
    """The programs' parameters that are trained."""
    apart = {id(parameter) for parameter in critics}
    parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    if not parameters:
        raise ValueError("neither model nor guide has a parameter to train")
    return parameters


def _optimizer(parameters: list[nn.Parameter], options: FitOptions, device: torch.device) -> torch.optim.Optimizer:
    if options.optimizer is not None:
        return options.optimizer(parameters, lr=options.learning_rate)
    return _adam(parameters, options.learning_rate, options, device)


def _adam(
    parameters: list[nn.Parameter],
    learning_rate: float,
    options: FitOptions,
    device: torch.device,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Adam:
    # With scaled gradients a fused step would unscale them after they were clipped.
    fused = device.type in ("cpu", "cuda") and options.precision != "16-mixed"
    return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=fused)


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

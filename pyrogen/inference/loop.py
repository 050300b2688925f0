"""The training loop: a step, an epoch, and what is made of it."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from rich.console import Console
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
from pyrogen.inference.checkpoints import WriteError, check_writable, load_weights, unique_tensors
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.fabric import Fabric
from pyrogen.inference.folders import CHECKPOINT, CONFIGURATION, SETTINGS, WEIGHTS, clear_folder
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.optimizers import adam, learning_rate_factor, optimizer_of, trained_parameters
from pyrogen.inference.parallel import Processes
from pyrogen.inference.programs import clear_gradients, latent_sites, prototype
from pyrogen.inference.reading import INACTIVE_UNITS
from pyrogen.inference.recording import RecordedStep, is_recordable
from pyrogen.inference.resuming import check_alike, identity_of, read_checkpoint, restore, write_checkpoint
from pyrogen.inference.run import Run, as_yaml, settings_of, write_run, write_text
from pyrogen.inference.stopping import Stopping
from pyrogen.inference.tally import GRADIENT_NORM, Tally
from pyrogen.inference.trouble import (
    NonFiniteLoss,
    Seen,
    check_weights,
    explained,
    out_of_memory,
    stop_at,
    where_it_stands,
)
from pyrogen.inference.turns import Turn, random_state, seeded
from pyrogen.inference.units import UNIT_ROWS, inactive_units
from pyrogen.inference.watch import CriticWatch

__all__ = ["CHECKPOINT", "Training"]

PAYS_FROM = 90.0
"""Seconds that are left of a fit, above which compiling it is worth its time."""
TIMED = 20
"""Steps after which it is known how long one takes."""

LOOK_EVERY = {"cpu": 1}
"""After how many steps losses are looked at, by device; a look at a GPU's waits for all that it has still to do."""
LOOK_ELSEWHERE = 50

NORM_EVERY = 10
"""Steps of an epoch from one look at the gradient's norm to the next; one takes as long as a pass over all weights."""
MOST_SKIPPED = 100
"""Steps that may be skipped one after the other."""
FEW = 10
"""Steps skipped one after the other that may still be chance, where an epoch or the fit ends with them."""

_VALIDATION_ROWS = 1000
"""Rows of a validation batch, copies counted."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


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
        turn: Turn,
    ) -> None:
        self.run = run
        self.folder = folder
        self.callbacks, self.calls_back = callbacks, bool(callbacks)
        self.fabric = fabric
        self.processes = Processes(fabric)
        options = run.options
        self.programs = run.objective(run.model, run.guide)
        self.programs.to(fabric.device)
        self.critics = critics = [*run.objective.critics.parameters()]
        self.trained = trained_parameters(self.programs, critics)
        self.optimizers = {"program": optimizer_of(self.trained, options, fabric.device)}
        self.learning_rates = {"program": options.learning_rate}
        if critics:
            self.learning_rates["critic"] = options.critic.learning_rate or options.learning_rate
            self.optimizers["critic"] = adam(
                critics, self.learning_rates["critic"], options, fabric.device, betas=options.critic.betas
            )
        contrasts: Any = run.objective.critics.items()
        self.settling = {f"{name}{which}" for name, contrast in contrasts for which in contrast.settles}
        self.critic_steps = (options.critic.steps or run.objective.critic_steps) if critics else 1
        # Not the module that it returns, whose calls take longer and leave methods without autocast.
        _, *steppers = fabric.setup(self.programs, *self.optimizers.values())
        self.steppers = dict(zip(self.optimizers, steppers, strict=True))
        recordable = self.steppers if is_recordable(fabric.device) else {}
        self.recorded = {name: RecordedStep(self.optimizers[name], each.step) for name, each in recordable.items()}
        self.averaged = [p.detach().clone() for p in self.trained] if options.average is not None else []
        self.watch = CriticWatch()
        dtype = next((p.dtype for p in self.programs.parameters() if p.is_floating_point()), None)
        self.batches = batches.to(fabric.device, dtype)
        self.given = batches, validation
        self.identity: dict[str, Any] = {}
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
        self.full = batches.rows_at(0)[0]
        self.compiled = Compiled(self.programs) if options.compile is True and self._unscaled else None
        self.timed, self.fastest = 0, math.inf
        self.look_every = LOOK_EVERY.get(fabric.device.type, LOOK_ELSEWHERE)
        self.unseen: list[Seen] = []
        self.keeps, self.kept_at, self.kept = True, 0, dict[str, Tensor]()
        self.failure: Exception | None = None
        self.skips, self.in_a_row = options.non_finite == "skip", 0
        self.stopping, self.others_asked = Stopping(), False
        self.turn = turn
        self.tally = Tally()
        self.share = 1.0
        self.step = 0
        self.best = -math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.since_best = 0
        self.configuration: str | None = None
        self.replaces = False  # an earlier run in the folder, at the first checkpoint
        self.unlogged: list[tuple[dict[str, Any], int]] = []

    @property
    def out_of_patience(self) -> bool:
        patience = self.run.options.patience
        return patience is not None and self.since_best >= patience

    @property
    def done(self) -> bool:
        return self.step >= self.total or self.out_of_patience

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process was asked to stop, or of several any; all know it at the same step."""
        return self.stopping.by is not None if self.processes.alone else self.others_asked

    @property
    def _unscaled(self) -> bool:
        # Scaled gradients are unscaled by Fabric, between its own backward pass and the step.
        return self.run.options.precision != "16-mixed"

    def begin(self, *, resume: bool | str, overwrite: bool) -> None:
        """Go on from a checkpoint, if there is one and ``resume`` is wanted; all processes begin alike.

        Raises:
            ValueError: If the checkpoint is damaged, was written by another fit, or has gone further than this one
                shall go; if processes were given different fits.
        """
        if self.folder is not None or not self.processes.alone:
            with self.processes.together():
                self.identity = identity_of(self)
        check_alike(self)
        # The others may have been given neither; what all do together follows the first.
        self.folder, self.calls_back = self.processes.broadcast((self.folder, bool(self.callbacks)))
        read = None
        with self.processes.together():
            if self.folder is not None and self.processes.first:
                if resume and (self.folder / CHECKPOINT).exists():
                    read = read_checkpoint(self, self.folder / CHECKPOINT, anyway=resume == "anyway")
                elif overwrite:
                    # Which stays until there is another to load.
                    self.replaces = any((self.folder / name).exists() for name in (WEIGHTS, CHECKPOINT))
                    if not self.replaces:
                        clear_folder(self.folder)
                elif (self.folder / WEIGHTS).exists():
                    raise ValueError(
                        f"{self.folder} holds a run and no {CHECKPOINT} to go on from; give another folder, or replace "
                        "the run by overwrite=True"
                    )
                if resume and read is None:
                    _log.warning("%s holds no checkpoint to go on from, so training begins anew", self.folder)
        read = self.processes.broadcast(read)
        if read is not None:
            with self.processes.together():
                restore(self, *read)
        self.processes.spread([*unique_tensors(self.programs).values(), *self.averaged])

    def go(self, progress: bool, configuration: str | None = None) -> None:
        """Train from where training stands to its end, and leave the run as it shall be, and its configuration."""
        stop = False
        first = self.processes.first
        self.configuration = configuration
        try:
            with self.processes.together():
                # So that the folder is known as a run's from the start, and seen to be one that can be written.
                if self.folder is not None and first:
                    if self.replaces:
                        check_writable(self.folder, as_yaml(settings_of(self.run)))
                    elif not (self.folder / WEIGHTS).exists():
                        write_text(self.folder / SETTINGS, as_yaml(settings_of(self.run)))
                    self._write_configuration()
            # Without a folder there is nothing to be written before the end.
            watched = self.stopping.watched() if self.folder is not None else nullcontext()
            with watched, progress_bar(disable=not (progress and first)) as bar:
                task = bar.add_task("fit", total=self.total, completed=self.step, loss="")
                while not self.done and not stop:
                    lacking = None
                    try:
                        stop = self._epoch(bar, task)
                    except torch.OutOfMemoryError as error:
                        lacking = str(error)
                    if lacking is not None:  # only now is the memory free that the error referred to
                        raise torch.OutOfMemoryError(out_of_memory(self, lacking))
            self._take_averaged()
            if self.best_weights:
                load_weights(self.run.programs, self.best_weights, "the best weights")
            with self.processes.together(), self._said_when_unwritten():
                if self.folder is not None and first:
                    write_run(self.run, self.folder)
            if self.stopping.by is not None:  # in the last step, and what follows this fit is not wanted
                raise self.stopping.error()
        except NonFiniteLoss:
            if self.kept:
                load_weights(self.run.programs, self.kept, "the kept weights")
            raise
        finally:
            self.programs.eval()
            for logger in self.fabric.loggers:
                logger.finalize("finished")

    def _epoch(self, bar: Progress, task: TaskID) -> bool:
        """Train to the end of the epoch, then measure, log and write; returns whether a callback wants to stop."""
        started = began = time.perf_counter()
        epoch, done = divmod(self.step, self.batches.per_epoch)
        tally, since = self.tally, 0
        self.keeps = True
        self.programs.train()
        batches = self.batches.epoch(epoch, self.fabric.device, skip=done)
        for position in range(done, min(self.batches.per_epoch, done + self.total - self.step)):
            own, whole = self.batches.rows_at(position)
            self.share = own / whole
            batch = self._tried(lambda: next(batches))
            if not self.unseen:
                began, since = time.perf_counter(), 0
            self._critic_steps(own or 1)
            figures = self._step(batch or ())
            tally.rows, since = tally.rows + whole, since + 1
            if figures:
                alone = self.processes.alone
                tally.add(figures if alone else {name: self._weighted(x) for name, x in figures.items()})
            if not self.unseen:
                self._consider_compiling((time.perf_counter() - began) / since, since)
                if not bar.disable and figures:
                    bar.update(task, completed=self.step, loss=f"loss {figures['loss']:.2f}")
            if self.asked_to_stop:
                break
            self.turn.offer()
        if self.unseen:
            self._look()
        check_weights(self)
        seconds = time.perf_counter() - started
        self.run.seconds += seconds
        tally.seconds += seconds
        if self.asked_to_stop and self.step % self.batches.per_epoch and self.step < self.total:
            self._stop()
        self._check_skipped()
        if self.compiled is not None:
            self.run.compile_seconds += self.compiled.seconds
            self.compiled.seconds = 0.0
        means = tally.means(dict(zip(tally.sums, self.processes.sum([*tally.sums.values()]), strict=True)))
        bound = self._validate(epoch)
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step, "loss": math.nan, **means, "validation": math.nan}
        row[self.run.objective.validates_as or "validation"] = bound
        row["learning_rate"] = self.optimizers["program"].param_groups[0]["lr"]
        row |= {GRADIENT_NORM: row.pop(GRADIENT_NORM, math.nan), "seconds": self.run.seconds}
        row["rows_per_second"] = tally.rows / tally.seconds
        if self.skips:
            row["skipped"] = tally.skipped
        with self.processes.together():
            if self.processes.first:
                self.watch.look(means, tally.steps, self.settling)
                if self.local:
                    row[INACTIVE_UNITS] = self._inactive_units()
                figures = {name: value for name, value in row.items() if name != INACTIVE_UNITS}
                known = {name: value for name, value in figures.items() if not math.isnan(value)}
                self.unlogged.append((known, self.step))
                self._log()
        history, last = self.run.history, pd.DataFrame([self.processes.broadcast(row)])
        self.run.history = last if history.empty else pd.concat([history, last], ignore_index=True)
        self.tally = Tally()
        stop = self._finish_epoch(epoch)
        if self.asked_to_stop and not self.done and not stop:
            self._stop()
        return stop

    def _stop(self) -> None:
        """Write a checkpoint and end as who asked for it wants it."""
        self._checkpoint()
        said = f"stopped after step {self.step}; resume=True (--resume) goes on from {self.folder}"
        error = self.stopping.error(said)
        if self.processes.first and isinstance(error, SystemExit):  # which holds a number alone
            _log.warning(said)
        raise error

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One step of the optimizer; returns the figures of its batch, without gradients."""
        options = self.run.options
        factor = learning_rate_factor(options.schedule, self.step / self.total)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[name] * factor
        buffers = self._kept_buffers()
        estimate = self._tried(lambda: self._gradients(batch))
        loss = self._no_loss() if estimate is None else estimate.loss.detach()
        agreed = self._averaged(loss)
        looked = {}
        if self.skips or (self.tally.steps % NORM_EVERY == 0 and self._unscaled):
            looked[GRADIENT_NORM] = self._norm(self.trained)
        if self.skips and not self._sound(agreed, *looked.values(), self._norm(self.critics)):
            self._skip(buffers)
            return {}
        self.in_a_row = 0
        self.unseen.append(Seen(self.step, agreed, loss, self.share, {} if estimate is None else estimate.metrics))
        if len(self.unseen) >= self.look_every or self.keeps:
            self._look(estimate, batch)
        if self.keeps:
            self._keep()
        for name in self.steppers:
            if name == "critic" or self.step >= options.critic.warmup or "critic" not in self.steppers:
                self._move(name)
        self._average()
        self.step += 1
        if estimate is None:
            return {}
        return {"loss": loss if estimate.of_program is None else estimate.of_program} | estimate.metrics | looked

    def _keep(self) -> None:
        """Keep the weights, whose loss was just seen to be finite, lest later ones are spoiled; once an epoch."""
        self.keeps, self.kept_at = False, self.step
        self.kept = {name: tensor.detach().clone() for name, tensor in unique_tensors(self.run.programs).items()}

    def _kept_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers with what they hold, where a step may be skipped."""
        return [(buffer, buffer.clone()) for buffer in self.programs.buffers()] if self.skips else []

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.fabric.device)

    def _sound(self, *values: Tensor) -> bool:
        return math.isfinite(torch.stack(values).sum().item())

    def _skip(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Leave all as it was before the step, but the random state, so that what comes has other draws."""
        with self.processes.together():
            if self.failure is not None:
                raise self.failure
            _give_back(buffers)
            self.tally.skipped, self.in_a_row = self.tally.skipped + 1, self.in_a_row + 1
            self.step += 1
            if self.in_a_row == MOST_SKIPPED:
                raise self._all_skipped()

    def _check_skipped(self) -> None:
        """See that an epoch, or the fit, did not end with skipped steps alone: a step of finite loss can spoil all."""
        enough = min(FEW, self.total / 2) if self.done else max(FEW, self.batches.per_epoch)
        if self.in_a_row >= enough:
            raise self._all_skipped()

    def _all_skipped(self) -> NonFiniteLoss:
        steps = "a step" if self.in_a_row == 1 else f"{self.in_a_row} steps one after the other"
        what = f"loss or gradients of {steps} are not finite, the last"
        return NonFiniteLoss(explained(self, what, None, self.step - 1))

    def _tried(self, compute: Callable[[], T]) -> T | None:
        """What is computed. Where several processes train, one that fails goes on with NaN until all have seen it."""
        if self.processes.alone:
            return compute()
        try:
            return None if self.failure else compute()
        except Exception as error:
            self.failure = error
            return None

    def _averaged(self, loss: Tensor) -> Tensor:
        """Give all processes the same gradients and buffers; returns a loss that is finite where theirs all are."""
        if self.processes.alone:
            return loss
        buffers = [each for each in self.programs.buffers() if each.is_floating_point()]
        share = 1.0 if self.failure else self.share
        asked = self.stopping.by is not None
        return self.processes.average([*self.trained, *self.critics], loss, share, buffers, asked=asked)

    def _no_loss(self) -> Tensor:
        return torch.full((), torch.nan, device=self.fabric.device)

    def _weighted(self, value: Tensor) -> Tensor:
        return value * self.share if self.share else torch.zeros_like(value)

    def _look(self, estimate: Estimate | None = None, batch: tuple[Tensor, ...] = ()) -> None:
        """Look at the losses of the last steps, of the very last with its estimate at hand."""
        seen, self.unseen = self.unseen, []
        values = [seen[0].agreed.item()] if len(seen) == 1 else torch.stack([each.agreed for each in seen]).tolist()
        bad = next((each for each, value in zip(seen, values, strict=True) if not math.isfinite(value)), None)
        self.others_asked |= not self.processes.alone and any(value > 0 for value in values)
        if bad is not None:
            stop_at(self, bad, estimate if bad is seen[-1] else None, batch)

    def _gradients(self, batch: tuple[Tensor, ...]) -> Estimate:
        """The estimate of a batch, with the gradients of all parameters in place."""
        with self.fabric.autocast():
            if self.compiled is not None and len(batch[0]) == self.full:
                return self.compiled.backward(*batch)
            loss = self.programs(*batch)
        clear_gradients([*self.trained, *self.critics])
        self.fabric.backward(loss)
        return self.programs.latest  # type: ignore[return-value]

    def _consider_compiling(self, seconds: float, steps: int) -> None:
        """Compile from here on where that is left to the time that it saves."""
        if self.run.options.compile != "auto" or self.compiled is not None or not self._unscaled:
            return
        before, enough = self.timed, max(TIMED, 2 * self.look_every)
        self.timed += steps
        # The first steps are slower than others, and one alone tells little.
        self.fastest = min(seconds, self.fastest)
        if before < enough <= self.timed:
            pays = self.fastest * (self.total - self.step) > PAYS_FROM
            if self.processes.broadcast(pays):
                self.compiled = Compiled(self.programs)

    def _move(self, name: str) -> None:
        clip, stepper = self.run.options.gradient_clip, self.steppers[name]
        if clip is not None:
            self.fabric.clip_gradients(self.programs, stepper, max_norm=clip, error_if_nonfinite=False)
        if self.compiled is not None and name in self.recorded:
            self.recorded[name]()
        else:
            stepper.step()

    def _critic_steps(self, rows: int) -> None:
        """The steps that critics take before the one that they share with the program."""
        for _ in range(self.critic_steps - 1):
            buffers = self._kept_buffers()
            loss = self._tried(lambda: self._critic_gradients(rows))
            agreed = self.processes.average(self.critics, self._no_loss() if loss is None else loss, self.share)
            if self.skips and not self._sound(agreed, self._norm(self.critics)):
                _give_back(buffers)
            else:
                self._move("critic")

    def _critic_gradients(self, rows: int) -> Tensor:
        """The critics' loss on rows drawn at random, with their gradients in place."""
        batch = self.batches.some(rows, self.fabric.device)
        with self.fabric.autocast():
            if self.compiled is not None and rows == self.full:
                self.compiled.critics_backward(*batch)
                return torch.zeros((), device=self.fabric.device)
            loss = self.programs.critic_loss(*batch)
        clear_gradients(self.critics)
        self.fabric.backward(loss)
        return loss.detach()

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

    def _validate(self, epoch: int) -> float:
        """Mean bound on the validation data from the same draws at every epoch, or NaN if it is not yet time."""
        if self.validation is None or self.run.objective.validates_as is None or not self._validates(epoch):
            return math.nan
        self.programs.eval()
        total = torch.zeros((), dtype=torch.float64)
        size = max(1, _VALIDATION_ROWS // self.run.objective.particles)
        seed, device = self.processes.seed(self.run.options.seed), self.fabric.device
        with self.processes.together(), torch.no_grad(), seeded(seed, device), self._with_averaged():
            for batch in self.validation.in_order(device, size, own=True):
                with self.fabric.autocast():
                    total += self.programs.bound(*batch).sum().cpu()
        return self.processes.sum([total])[0] / len(self.validation)

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
        due = (epoch + 1) % options.checkpoint_every == 0 or self.done
        if due:
            self._checkpoint()
        stop = self.calls_back and self._call_back()
        if stop and not due:
            self._checkpoint()
        return stop

    def _call_back(self) -> bool:
        """Call the callbacks, in the first process; returns whether one wants to stop."""
        stop = False
        with self.processes.together(), seeded(None, self.fabric.device):  # what they draw does not change the training
            if self.processes.first:
                # A list, so that all are called even if one wants to stop.
                stop = any([callback(self.run) is True for callback in self.callbacks])
        self.processes.spread(unique_tensors(self.programs).values())
        return self.processes.broadcast(stop)

    def _checkpoint(self) -> None:
        """Write everything needed to go on, the random states of all processes included."""
        if self.folder is not None:
            states = self.processes.gather((random_state(self.fabric.device), self.tally))
            with self.processes.together(), self._said_when_unwritten():
                if self.processes.first and self.replaces:
                    # Both are on the disk before the earlier run goes; its checkpoint is known to be another's then.
                    clear = partial(clear_folder, self.folder, keep=[WEIGHTS, CHECKPOINT])
                    write_checkpoint(self, self.folder / CHECKPOINT, states, partial(self._write_run, clear))
                    self.replaces = False
                    self._write_configuration()
                    self._log()
                elif self.processes.first:
                    write_checkpoint(self, self.folder / CHECKPOINT, states)
                    self._write_run()

    def _write_run(self, then: Callable[[], Any] = lambda: None) -> None:
        if self.folder is not None:
            with self._with_averaged():
                write_run(self.run, self.folder, then)

    def _write_configuration(self) -> None:
        if self.folder is not None and self.configuration is not None and not self.replaces:
            write_text(self.folder / CONFIGURATION, self.configuration)

    def _log(self) -> None:
        """Log the figures of epochs, which wait while an earlier run's logs are there."""
        while self.unlogged and not self.replaces:
            figures, step = self.unlogged.pop(0)
            self.fabric.log_dict(figures, step=step)

    @contextmanager
    def _said_when_unwritten(self) -> Iterator[None]:
        """Within, an error in writing says how far training has come, and where it can go on."""
        try:
            yield
        except WriteError as error:
            raise WriteError(f"{error}. Training stands at step {self.step}, and {where_it_stands(self)}") from error


def _give_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


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
        console=Console(quiet=disable),  # older versions end with an empty line in any case
        disable=disable,
    )

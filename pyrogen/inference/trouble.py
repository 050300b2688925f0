"""What keeps a fit from going on: losses and weights that are not finite, and steps that take too much memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrogen.inference.folders import CHECKPOINT
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.programs import clear_gradients

if TYPE_CHECKING:
    from pyrogen.inference.loop import Training

__all__ = ["NonFiniteLoss", "Seen", "check_weights", "explained", "out_of_memory", "stop_at", "where_it_stands"]


class NonFiniteLoss(ArithmeticError):
    """A loss that is NaN or infinite; training stopped before the step that it would have spoiled.

    With ``non_finite="skip"``, losses or gradients of too many steps one after the other. Steps before may have spoiled
    weights, and those of a checkpoint are finite but may be of no use; model and guide go back to the weights of the
    last start of an epoch at which the loss was finite.
    """


@dataclass(slots=True)  # frozen it would take four times as long to make
class Seen:
    """What is kept of a step until its loss is looked at; ``agreed`` is finite where that of every process is."""

    step: int
    agreed: Tensor
    own: Tensor
    share: float
    metrics: dict[str, Tensor]

    def origin(self) -> str:
        """Where a loss began that is not finite, as far as figures tell."""
        odd = [name for name, value in self.metrics.items() if not math.isfinite(value.item())]
        where = f"its figures {', '.join(odd)}" if odd else "what none of its figures shows"
        return f"{where} (device='cpu' names the site, for there every loss is looked at)"


def stop_at(training: "Training", bad: Seen, estimate: Estimate | None, batch: tuple[Tensor, ...]) -> None:
    """Raise the same error in all processes, for a loss that is not finite or for what kept one from having any."""
    what = None
    with training.processes.together():
        if training.failure is not None:
            raise training.failure
        if bad.share and not math.isfinite(loss := bad.own.item()):
            origin = bad.origin() if estimate is None else _origin(training, estimate, batch)
            what = explained(training, f"the loss is {loss}", origin, bad.step)
    raise NonFiniteLoss(next(what for what in training.processes.gather(what) if what is not None))


def _origin(training: "Training", estimate: Estimate, batch: tuple[Tensor, ...]) -> str:
    """Where a loss that is not finite began."""
    if estimate.of_program is not None and math.isfinite(estimate.of_program.item()):
        return "the critics' own loss, whose learning rate is that of critic=CriticOptions(learning_rate=...)"
    if estimate.terms is None:  # of a compiled step, which keeps no traces
        try:
            with torch.no_grad(), training.fabric.autocast():
                again = training.programs(*batch)
        except Exception as error:
            return f"what can't be told, for the batch once more raised {type(error).__name__}: {error}"
        if math.isfinite(again.item()):
            return "what can't be told, for the batch once more, with other draws, gave a finite loss"
        estimate = training.programs.latest  # type: ignore[assignment]
    assert estimate.terms is not None
    return estimate.terms.origin_of_nan()


def check_weights(training: "Training") -> None:
    """Raise the same :class:`NonFiniteLoss` in all processes, for weights that are not finite."""
    with training.processes.together():
        if spoiled := _spoiled(training):
            origin = f"the gradient of {spoiled[0]}"
            raise NonFiniteLoss(explained(training, "the last step has spoiled weights", origin, training.step))


def _spoiled(training: "Training") -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, p in training.run.programs.named_parameters() if not torch.isfinite(p).all()]


def explained(training: "Training", what: str, origin: str | None, step: int) -> str:
    """What to say of something that is not finite; without an origin, how to come by that."""
    began = "non_finite='stop' names where that begins" if origin is None else f"it began at {origin}"
    # Of an earlier step's weights nothing is known any more.
    if step == training.step and (spoiled := _spoiled(training)):
        began = f"{began}, for the step before made {spoiled[0]} not finite"
    epoch = step // training.batches.per_epoch + 1
    back = f", and model and guide have their weights of step {training.kept_at} again" if training.kept else ""
    return (
        f"{what} at step {step + 1} (epoch {epoch}); {began}. Training stopped: "
        f"{where_it_stands(training)}{back}. Try a smaller learning_rate, or gradient_clip=1.0"
    )


def where_it_stands(training: "Training") -> str:
    """What is on disk, in words."""
    if training.replaces:
        return f"no checkpoint was written; the earlier run in {training.folder} stays"
    if training.folder is not None and (training.folder / CHECKPOINT).exists():
        return f"the last checkpoint is {training.folder / CHECKPOINT}"
    return "no checkpoint was written"


def out_of_memory(training: "Training", lacking: str) -> str:
    """What to say where a step takes more memory than there is, with the size of a batch that takes less."""
    size = training.run.options.batch_size
    fits = next((rows for rows in _halves(size) if _fits(training, rows)), None)
    mend = "and neither does one row; try" if fits is None else f"but batch_size={fits} does; set this, or try"
    return (
        f"a step with batch_size={size} does not fit into the memory of {training.fabric.device}, {mend} fewer "
        f"particles, precision='bf16-mixed' or a smaller network. Training stopped and {where_it_stands(training)}. "
        f"PyTorch says: {lacking}"
    )


def _fits(training: "Training", rows: int) -> bool:
    clear_gradients([*training.trained, *training.critics])
    if training.fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        with training.fabric.autocast():
            training.programs(*training.batches.some(rows, training.fabric.device)).backward()
    except torch.OutOfMemoryError:
        return False
    return True


def _halves(rows: int) -> Iterator[int]:
    while rows > 1:
        rows //= 2
        yield rows

"""What a checkpoint holds, and how a training goes on from one bit for bit."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from pyrogen.inference.checkpoints import (
    load_optimizer,
    load_weights,
    optimizer_state,
    read_tensors,
    unique_tensors,
    write_tensors,
)
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.run import settings_of
from pyrogen.inference.tally import Tally
from pyrogen.inference.turns import set_random_state
from pyrogen.inference.watch import CriticWatch

if TYPE_CHECKING:
    from pyrogen.inference.loop import Training

__all__ = ["CHECKPOINT", "check_alike", "read_checkpoint", "restore", "write_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"
MAY_CHANGE = ("epochs", "steps", "patience", "device", "checkpoint_every", "loader_workers")
"""Options that another part of the same run may have."""
WHERE_THERE_WERE_NONE: dict[str, Any] = {"matmul_precision": "highest", "non_finite": "stop"}
"""Options that checkpoints of earlier versions lack, and what fits did then."""


def write_checkpoint(training: "Training", path: Path, states: list[tuple[dict[str, Tensor], Tally]]) -> None:
    """Write everything needed to go on into one file, random states and tallies of all processes included."""
    run = training.run
    tensors = {f"weights.{name}": value for name, value in unique_tensors(run.programs).items()}
    tensors |= {f"best.{name}": value for name, value in training.best_weights.items()}
    tensors |= {f"averaged.{index}": value for index, value in enumerate(training.averaged)}
    optimizers = {}
    for kind, optimizer in training.optimizers.items():
        moments, optimizers[kind] = optimizer_state(optimizer)
        tensors |= {f"optimizer.{kind}.{name}": value for name, value in moments.items()}
    for rank, (state, tally) in enumerate(states):
        tensors |= {f"{_of('random', rank)}{name}": value for name, value in state.items()}
        tensors |= {f"{_of('tally', rank)}{name}": value for name, value in tally.sums.items()}
    values = {
        "step": training.step,
        "best": None if math.isinf(training.best) else training.best,
        "since_best": training.since_best,
        "objective_step": run.objective.step,
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "history": run.history.to_dict("list"),
        "optimizers": optimizers,
        "watch": training.watch.state(),
        "tallies": [tally.counts() for _, tally in states],
        "compiled": training.compiled is not None,
        "precision": training.fabric.strategy.precision.state_dict(),
        "identity": _identity(training),
    }
    write_tensors(path, tensors, values)


def read_checkpoint(training: "Training", path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and values.

    Raises:
        ValueError: If it is damaged, was written by another fit, or has gone further than this one shall go.
    """
    tensors, values = read_tensors(path)
    try:
        there = {"processes": 1} | values["identity"]
        there["options"] = WHERE_THERE_WERE_NONE | there["options"]
        difference = first_difference(there, _identity(training))
        if difference is not None:
            raise ValueError(
                f"{path} was written by a fit that differs: {difference}. Resume with what it was begun with (only "
                f"{', '.join(MAY_CHANGE)} may change), or begin anew with overwrite=True"
            )
        if values["step"] > training.total:
            raise ValueError(
                f"{path} has gone {values['step']} steps already, more than the {training.total} of this fit; give "
                "larger epochs or steps to go on"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise _of_another_version(error) from error
    return tensors, values


def restore(training: "Training", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a training where it stood."""
    try:
        _restore(training, tensors, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise _of_another_version(error) from error


def _of_another_version(error: Exception) -> ValueError:
    return ValueError(f"{CHECKPOINT} is no checkpoint of this version of pyrogen ({error!r})")


def _restore(training: "Training", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    run = training.run
    load_weights(run.programs, under("weights."), CHECKPOINT)
    for kind, optimizer in training.optimizers.items():
        load_optimizer(optimizer, under(f"optimizer.{kind}."), values["optimizers"][kind])
    for index, tensor in enumerate(training.averaged):
        tensor.copy_(under("averaged.")[str(index)])
    training.watch = CriticWatch(**values["watch"])
    if values["compiled"] and training.compiled is None:
        training.compiled = Compiled(training.programs)
    training.fabric.strategy.precision.load_state_dict(values["precision"])
    training.best_weights = under("best.")
    training.step, training.since_best = values["step"], values["since_best"]
    training.best = -math.inf if values["best"] is None else values["best"]
    run.objective.step, run.seconds = values["objective_step"], values["seconds"]
    run.compile_seconds = values["compile_seconds"]
    run.history = pd.DataFrame(values["history"])
    rank, device = training.processes.rank, training.fabric.device
    sums = {name: value.to(device) for name, value in under(_of("tally", rank)).items()}
    counts = values.get("tallies", {})  # which checkpoints of earlier versions lack, for they end with an epoch
    training.tally = Tally(sums, **(counts[rank] if counts else {}))
    set_random_state(under(_of("random", rank)), device)


def check_alike(training: "Training") -> None:
    """Raise a ``ValueError`` if processes that shall train together were given different fits."""
    processes = training.processes
    if processes.alone:
        return
    settings, held = settings_of(training.run), training.validation

    def described(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if "not_described" not in str(value)}

    own = {
        "options": described(settings["options"]),
        "data": _identity(training)["data"],
        "validation": {"rows": len(held), "fingerprint": held.fingerprint()} if held is not None else {"rows": 0},
        "weights": {name: list(value.shape) for name, value in unique_tensors(training.programs).items()},
        **described({"objective": settings["objective"]}),
        "critic_steps": training.critic_steps,
    }
    difference = first_difference(processes.broadcast(own), own)
    with processes.together():
        if difference is not None:
            raise ValueError(
                f"processes that train together must call fit alike, and with all of the data: {difference}, in the "
                f"first and in process {processes.rank}. For fits of their own, start them one by one"
            )


def _of(what: str, rank: int) -> str:
    """How names of what a process has begin."""
    return f"{what} of {rank}." if rank else f"{what}."


def _identity(training: "Training") -> dict[str, Any]:
    """What may not change when a run goes on, as plain values."""
    run, settings = training.run, settings_of(training.run)
    parts = {name: settings[name] for name in ("model", "guide", "objective")}
    options = {name: value for name, value in settings["options"].items() if name not in MAY_CHANGE}
    source = {name: value for name, value in (run.data or {}).items() if name not in ("name", "root")}
    data = {
        "rows": len(training.batches),
        "fingerprint": training.fingerprint,
        "example": run.example,
        "source": source,
    }
    whole = {"processes": training.processes.count, "options": options, "data": data} | parts
    return json.loads(json.dumps(whole))


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """Where two plain values differ first, in words, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = (
            first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            for key in {**there, **here}
        )
        return next((difference for difference in found if difference is not None), None)
    return None if there == here else f"{name} was {there!r} and is {here!r}"

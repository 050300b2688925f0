"""What a checkpoint holds, and how a training goes on from one bit for bit."""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from pyrogen.configuration import without_moves
from pyrogen.inference.checkpoints import (
    load_optimizer,
    load_weights,
    misfit,
    optimizer_state,
    read_tensors,
    unique_tensors,
    write_tensors,
)
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.fingerprints import sites_of
from pyrogen.inference.folders import CHECKPOINT, HISTORY, WEIGHTS
from pyrogen.inference.migration import FORMAT, checkpoint_of_1, fingerprint_of_1, format_of
from pyrogen.inference.reading import read_history
from pyrogen.inference.run import settings_of
from pyrogen.inference.tally import Tally
from pyrogen.inference.turns import set_random_state
from pyrogen.inference.watch import CriticWatch

if TYPE_CHECKING:
    from pyrogen.inference.loop import Training

__all__ = ["check_alike", "identity_of", "read_checkpoint", "restore", "write_checkpoint"]

MAY_CHANGE = ("epochs", "steps", "patience", "device", "checkpoint_every", "loader_workers")
"""Options that another part of the same run may have."""
NAMED = 3
"""How many differences a message names."""


def write_checkpoint(
    training: "Training",
    path: Path,
    states: list[tuple[dict[str, Tensor], Tally]],
    then: Callable[[], Any] = lambda: None,
) -> None:
    """Write everything needed to go on into one file, random states and tallies of all processes included.

    Args:
        training: What shall go on.
        path: Where to.
        states: Random state and tally of each process.
        then: As for :func:`~pyrogen.inference.checkpoints.atomically`.
    """
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
        "format": FORMAT,
        "step": training.step,
        "best": None if math.isinf(training.best) else training.best,
        "since_best": training.since_best,
        "in_a_row": training.in_a_row,
        "objective_step": run.objective.step,
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "history": run.history.to_dict("list"),
        "optimizers": optimizers,
        "watch": training.watch.state(),
        "tallies": [tally.counts() for _, tally in states],
        "compiled": training.compiled is not None,
        "precision": training.fabric.strategy.precision.state_dict(),
        "made": run.made,
        "identity": training.identity,
    }
    write_tensors(path, tensors, values, then)


def read_checkpoint(training: "Training", path: Path, *, anyway: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and values.

    Args:
        training: What shall go on.
        path: Of the checkpoint.
        anyway: Whether it may be one of a fit that differs, of which a warning then tells.

    Raises:
        ValueError: If it is damaged, was written by another fit, or has gone further than this one shall go.
    """
    tensors, values = read_tensors(path)
    here = training.identity
    try:
        if format_of(values, path, default=1) == 1:
            values, here = checkpoint_of_1(values), _identity_of_1(training)
        if "source" in here:  # of what was not recorded then, what refers to it was
            recorded = values["identity"]["source"]
            here = here | {"source": {name: value for name, value in here["source"].items() if name in recorded}}
        identities = without_moves(values["identity"], here)
        found = [*differences(*identities), *_of_another_training(path.parent / WEIGHTS, values)]
        if values["step"] > training.total:
            raise ValueError(
                f"{path} has gone {values['step']} steps already, more than the {training.total} of this fit; give "
                "larger epochs or steps to go on"
            )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _of_another_version(error) from error
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        differs = f"{path} was written by a fit that differs: {'; '.join(found[:NAMED])}{more}"
        unfit = misfit(training.run.programs, _under("weights.", tensors))
        same = f"Resume with what it was begun with (only {', '.join(MAY_CHANGE)} may change)"
        if unfit:
            raise ValueError(
                f"{differs}; its weights don't fit: {unfit}. {same}, or begin anew without resume, with overwrite=True"
            )
        if not anyway:
            raise ValueError(
                f"{differs}. {same}, begin anew without resume, with overwrite=True, or go on all the same with "
                "resume='anyway' (--resume --anyway)"
            )
        warnings.warn(f"{differs}; it goes on all the same", stacklevel=2)
    return tensors, values


def _of_another_training(weights: Path, values: dict[str, Any]) -> Iterator[str]:
    """Whether weights beside a checkpoint come from elsewhere, in words; damaged ones will be written anew."""
    try:
        beside = read_history(read_tensors(weights)[1]["files"][HISTORY], weights.parent)
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    # Two trainings, alike in all else, take different times.
    seconds = (table.get("seconds", ()) for table in (beside, values["history"]))
    if any(one != other for one, other in zip(*seconds, strict=False)):
        yield f"{weights.name} beside it are of another training"


def restore(training: "Training", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put a training where it stood."""
    try:
        _restore(training, tensors, values)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise _of_another_version(error) from error


def _of_another_version(error: Exception) -> ValueError:
    return ValueError(f"{CHECKPOINT} is no checkpoint of this version of pyrogen ({error!r})")


def _restore(training: "Training", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    run, under = training.run, partial(_under, tensors=tensors)
    load_weights(run.programs, under("weights."), CHECKPOINT)
    was, now = values["identity"]["options"]["optimizer"], training.identity["options"]["optimizer"]
    for kind, optimizer in training.optimizers.items():
        if kind == "critic" or was == now:  # another optimizer has no use for what this one has gathered
            load_optimizer(optimizer, under(f"optimizer.{kind}."), values["optimizers"][kind])
    averaged = under("averaged.")
    for index, (tensor, own) in enumerate(zip(training.averaged, training.trained, strict=False)):
        tensor.copy_(averaged.get(str(index), own.detach()))
    training.watch = CriticWatch(**values["watch"])
    if values["compiled"] and training.compiled is None:
        training.compiled = Compiled(training.programs)
    training.fabric.strategy.precision.load_state_dict(values["precision"])
    training.best_weights = under("best.")
    training.step, training.since_best = values["step"], values["since_best"]
    training.in_a_row = values.get("in_a_row", 0)
    training.best = -math.inf if values["best"] is None else values["best"] + 0.0
    run.objective.step, run.seconds = values["objective_step"], values["seconds"]
    run.compile_seconds = values["compile_seconds"]
    run.history = pd.DataFrame(values["history"])
    if training.done:  # nothing is made any more
        run.made = values.get("made", run.made)
        run.source = values["identity"].get("source", run.source)
    rank, device = training.processes.rank, training.fabric.device
    if rank < len(values["tallies"]):
        sums = {name: value.to(device) for name, value in under(_of("tally", rank)).items()}
        training.tally = Tally(sums, **values["tallies"][rank])
        set_random_state(under(_of("random", rank)), device)


def check_alike(training: "Training") -> None:
    """Raise a ``ValueError`` if processes that shall train together were given different fits."""
    processes = training.processes
    if processes.alone:
        return
    settings, data = settings_of(training.run), dict(training.identity["data"])
    held = {"rows": len(training.validation or ()), "fingerprint": data.pop("validation")}

    def described(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if "not_described" not in str(value)}

    own = {
        "options": described(settings["options"]),
        "data": data,
        "validation": held,
        "weights": {name: list(value.shape) for name, value in unique_tensors(training.programs).items()},
        **described({"objective": settings["objective"]}),
        "critic_steps": training.critic_steps,
    }
    difference = next(differences(processes.broadcast(own), own), None)
    with processes.together():
        if difference is not None:
            raise ValueError(
                f"processes that train together must call fit alike, and with all of the data: {difference}, in the "
                f"first and in process {processes.rank}. For fits of their own, start them one by one"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _of(what: str, rank: int) -> str:
    """How names of what a process has begin."""
    return f"{what} of {rank}." if rank else f"{what}."


def identity_of(training: "Training") -> dict[str, Any]:
    """What may not change when a run goes on, as plain values: options, data, and programs with sites and source."""
    run, settings = training.run, settings_of(training.run)
    batches, validation = training.given
    batch = tuple(x.to(training.fabric.device) for x in training.batches.first())
    identity = {
        "processes": training.processes.count,
        "options": {name: value for name, value in settings["options"].items() if name not in MAY_CHANGE},
        "data": {
            "rows": len(batches),
            "fingerprint": batches.fingerprint(),
            "validation": None if validation is None else validation.fingerprint(),
            "example": run.example,
            "source": {name: value for name, value in (run.data or {}).items() if name not in ("name", "root")},
        },
        **{name: settings[name] for name in ("model", "guide", "objective")},
        "sites": {"model": sites_of(run.model, *batch), "guide": sites_of(run.guide, *batch)},
        "source": run.source,
    }
    return json.loads(json.dumps(identity))


def _identity_of_1(training: "Training") -> dict[str, Any]:
    """What format 1 knew of that."""
    batches, _ = training.given
    identity = {name: value for name, value in training.identity.items() if name not in ("sites", "source")}
    data = {name: value for name, value in identity["data"].items() if name != "validation"}
    return identity | {"data": data | {"fingerprint": fingerprint_of_1(batches.rows, len(batches))}}


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Where two plain values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} was {there!r} and is {here!r}"

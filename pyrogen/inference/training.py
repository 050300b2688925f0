"""Fitting a model with its guide: everything is checked, then the loop runs."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyro
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger, TensorBoardLogger
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from pyrogen.data import Data
from pyrogen.inference.batches import Batches, training_and_validation
from pyrogen.inference.checkpoints import seeded
from pyrogen.inference.checks import check_programs, check_values, first_parameter
from pyrogen.inference.loop import CHECKPOINT, Training
from pyrogen.inference.objectives import Objective
from pyrogen.inference.programs import as_module, describe_example, modules_of
from pyrogen.inference.run import CriticOptions, FitOptions, Run, clear_folder, prepare_folder

__all__ = ["fit"]


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
    critic: CriticOptions | None = None,
    average: float | None = None,
    compile: bool | Literal["auto"] = False,
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
        callbacks: Each is called with the run as it stands after every epoch; one that returns ``True`` stops it. What
            they draw leaves the training as it is.
        progress: Show a progress bar with the time left.
        out: A folder for the run, its checkpoints and its logs (TensorBoard and ``history.csv``).
        checkpoint_every: Epochs between checkpoints.
        resume: Go on from the checkpoint in ``out`` where there is one; on the same machine the result is bit for bit
            that of a training never interrupted. All arguments must be as they were, except how long: larger ``epochs``
            or ``steps`` go on with a finished run. A schedule then runs over the new length, from the share of it that
            is done; a learning rate that had fallen rises again.
        overwrite: Replace a run that is in ``out``, unless ``resume`` goes on with it.
        critic: How the critics are trained, for an objective that has some; see
            :class:`~pyrogen.inference.CriticOptions`.
        average: Decay of an exponential moving average of the programs' weights, such as 0.999, by which they are
            validated and with which they end; None for the weights themselves.
        compile: Trace the objective once and train by a compiled graph, see :class:`~pyrogen.inference.Compiled`; what
            can't be compiled is trained as it is, with a warning. It takes 5 to 30 seconds, less for a program that was
            compiled before. ``"auto"`` compiles where the steps left would take over a minute and a half without.

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
        critic=CriticOptions() if critic is None else critic,
        average=average,
        compile=compile,
    )
    if not isinstance(objective, Objective):
        came = f"the class {objective.__name__}" if isinstance(objective, type) else f"a {type(objective).__name__}"
        raise TypeError(
            f"expected an objective such as pyrogen.inference.ELBO(), got {came}; Pyro's own losses train with "
            "pyro.infer.SVI"
        )
    batches, validation = training_and_validation(data, batch_size, seed)
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data; pass what pyrogen.data.load returns, or leave patience out")
    if resume and out is None:
        raise ValueError("resume needs out=, the folder of the run that shall go on")
    folder = None if out is None else prepare_folder(out, overwrite=overwrite, resume=resume)
    fabric = _fabric(options, folder)
    example = _example(model, guide, batches)
    for part in (batches, validation):
        if part is not None:
            check_values(model, part)
    objective.check_guide(guide)
    check_programs(model, guide, *example, guided=objective.uses_guide)
    with seeded(seed, fabric.device):
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
        run.objective.critics = copy.deepcopy(objective.critics)
        run.objective.prepare(run.model, run.guide, *example)
        _check_options(run)
        if objective.observations is None:
            run.objective.observations = len(batches)
        training = Training(run, batches, validation, fabric, folder, tuple(callbacks))
        if resume and folder is not None and (folder / CHECKPOINT).exists():
            training.read_checkpoint(folder / CHECKPOINT)
        elif folder is not None and overwrite:
            clear_folder(folder)
        with pyro.validation_enabled(False):  # the checks are made, and cost time
            training.go(progress)
    return run


def _check_options(run: Run) -> None:
    """See that the options go with the objective, once its critics are known."""
    if run.options.patience is not None and run.objective.validates_as != "validation":
        raise ValueError(
            f"patience follows a bound on validation data, and {type(run.objective).__name__} has none here, at most "
            "an estimate; leave patience out"
        )
    if run.options.precision == "16-mixed" and run.options.compile is True:
        raise ValueError(
            "precision='16-mixed' scales losses outside of what is compiled; use 'bf16-mixed', or compile=False"
        )
    if run.options.precision == "16-mixed" and len(run.objective.critics):
        raise ValueError(
            "precision='16-mixed' scales the gradients of one optimizer, and critics have their own; use 'bf16-mixed'"
        )


def _example(model: Callable, guide: Callable | None, batches: Batches) -> tuple[Tensor, ...]:
    """A batch where the programs are and in their precision; they are brought to one place for that."""
    home = first_parameter(model, guide)
    if home is None:
        return batches.first()
    for program in (model, guide):
        for module in modules_of(program):
            module.to(home.device)
    batches = dataclasses.replace(batches, dtype=home.dtype)
    return tuple(x.to(home.device) for x in batches.first())


def _fabric(options: FitOptions, folder: Path | None) -> Fabric:
    kind, _, index = options.device.partition(":")
    loggers: list[Logger] = [] if folder is None else [TensorBoardLogger(folder, name="logs", version="")]
    try:
        return Fabric(
            accelerator=kind,
            devices=[int(index)] if index else 1,
            precision=options.precision,  # type: ignore[arg-type]
            loggers=loggers,
        )
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        raise ValueError(
            f"device={options.device!r} with precision={options.precision!r} can't be used here: {error}"
        ) from error

"""Fitting a model with its guide: everything is checked, then the loop runs."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyro
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrogen.arguments import check_are
from pyrogen.data import Data
from pyrogen.inference.batches import Batches, training_and_validation
from pyrogen.inference.checks import check_objects, check_programs, check_values, check_weights, first_parameter
from pyrogen.inference.folders import held, prepare_folder
from pyrogen.inference.loop import Training
from pyrogen.inference.objectives import Objective
from pyrogen.inference.parallel import Processes, connect
from pyrogen.inference.programs import as_module, describe_example, modules_of
from pyrogen.inference.provenance import provenance
from pyrogen.inference.run import CriticOptions, FitOptions, Run, as_yaml, source_of_run
from pyrogen.inference.turns import Turn, seeded

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
    resume: bool | Literal["anyway"] = False,
    overwrite: bool = False,
    critic: CriticOptions | None = None,
    average: float | None = None,
    compile: bool | Literal["auto"] = False,
    loader_workers: int = 0,
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    non_finite: Literal["stop", "skip"] = "stop",
    configuration: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model with its guide.

    Started by ``torchrun --nproc-per-node=4 script.py`` (with ``--nnodes`` for several machines) or by SLURM's ``srun``
    with ``--ntasks-per-node``, the same script trains on all processes together, each on a device of its own. Each has
    all of the data and takes other rows of every minibatch, ``batch_size`` of them, so W processes make a step of
    W · ``batch_size`` rows; consider a higher learning rate. All leave with the same weights and history. Gradients are
    averaged, weighted by rows, so what is a mean over rows is the mean over all of them, while a loss of another kind,
    as MMD and Donsker-Varadhan, or batch normalisation, sees the rows of its process. Buffers such as moving averages
    are the first process's after every step. The first process draws as one alone would, prints, writes and calls back.
    An error of one is raised in all. A SLURM job of several tasks waits for all of them: start the script by ``srun``,
    or ask for ``--ntasks=1``. Batch normalisation raises where the last minibatch leaves one row to a process.

    Args:
        model, guide: Programs; plain functions that use ``pyro.module`` as well as modules. They are trained in place
            and stay on the device.
        objective: What is minimised, in nats per observation.
        data: A tensor ``(N, *event_shape)``, a tuple of tensors (given to the programs as ``model(*batch)``), a torch
            ``Dataset`` of these, or what :func:`pyrogen.data.load` returns; only this last has validation data.
        epochs, steps: How long, one of the two.
        batch_size: Rows of a minibatch, in each process.
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
            they draw leaves the training as it is. Of several processes the first calls its own, and all take the
            weights and the decision that it then has; a ``requires_grad`` or a setting of the objective that they
            change stays as it was in the others.
        progress: Show a progress bar with the time left.
        out: A folder for the run, its checkpoints and its logs (TensorBoard and ``history.csv``).
        checkpoint_every: Epochs between checkpoints.
        resume: Go on from the checkpoint in ``out``, or begin where there is none, which the log says; on the same
            machine the result is bit for bit that of a training never interrupted, but for ``compile="auto"``, which
            takes its times anew. All arguments must be as they were, and the number of processes, but not how long:
            larger ``epochs`` or ``steps`` go on with a finished run. A schedule then runs over the new length, from the
            share of it that is done; a learning rate that had fallen rises again. What differs in options, in data (see
            :func:`~pyrogen.inference.fingerprints.fingerprint`; the validation data too), or in the description, the
            sites or the source of programs is named and refused; ``"anyway"`` warns of it and goes on with the weights
            that the checkpoint holds, and with the state of the optimizer unless that is another.
        overwrite: Replace a run that is in ``out``, unless ``resume`` goes on with it. It stays, and can be loaded and
            resumed, until the first checkpoint of this one is written. Files that pyrogen did not write stay.
        critic: How the critics are trained, for an objective that has some; see
            :class:`~pyrogen.inference.CriticOptions`.
        average: Decay of an exponential moving average of the programs' weights, such as 0.999, by which they are
            validated and with which they end; None for the weights themselves.
        compile: Trace the objective once and train by a compiled graph, see :class:`~pyrogen.inference.Compiled`; what
            can't be compiled is trained as it is, with a warning. It takes 5 to 30 seconds, less for a program that was
            compiled before. ``"auto"`` compiles where the steps left would take over a minute and a half without.
            On a GPU the graph is replayed as a CUDA graph, which keeps memory of its own for one step, and the step of
            a fused Adam as another. The compiler lays out images with their channels last where it finds that faster;
            as it is, training keeps to how you laid out a module, such as by
            ``module.to(memory_format=torch.channels_last)``.
        loader_workers: How many processes read a ``Dataset``, begun anew for each epoch; 0 for the training's own. The
            order stays. Such data need memory for some batches, and eight bytes for each row. Tensors need no
            workers: they are put on the device as they are stored, integers as such, and batches become floats there.
            Those that would take over half of a GPU's free memory stay on the CPU, and a thread brings batches one
            ahead.
        matmul_precision: What PyTorch may do to products of 32-bit matrices meanwhile, see
            ``torch.set_float32_matmul_precision``: ``"high"`` uses TF32 where a GPU has it.
        non_finite: What to do at a step whose loss or gradients are NaN or infinite: ``"stop"`` with an error that
            names the site where that began, or ``"skip"`` the step and give buffers back what they held; the history
            counts them in ``skipped``. So many one after the other stop: 100; at the end of an epoch as many as it has
            steps, and at least 10; at the end of the fit 10, or half of a shorter one, for its weights are then of no
            use. Gradients are then looked at in every step, which costs about 2 % of it, and more on a GPU, which is
            waited for.
        configuration: Plain values that ``fit.yaml`` in ``out`` shall hold, such as the settings of the command; not
            without ``out``.

    With ``out=``, the first Ctrl-C or SIGTERM lets the step end and writes a checkpoint from which ``resume=True`` goes
    on, bit for bit; the second stops at once. On a GPU losses are looked at every 50 steps and at the end of an epoch,
    before anything is written, so that it need not wait after each step. Fits and evaluations in threads of one process
    take turns, step by step, and give what each gives alone; what other threads draw from torch meanwhile is not
    theirs.

    Returns:
        The run: ``.model``, ``.guide``, ``.objective``, ``.history``, ...

    Raises:
        ValueError: Before any training, for data, programs or options that do not fit each other.
        OutputExistsError: Before any training, if ``out`` holds something or another process writes there.
        WriteError: If a file can't be written, for a full disk, say; what was written before stays.
        NonFiniteLoss: If a loss is NaN or infinite; it names the site where that began. If too many steps one after the
            other were skipped, see ``non_finite``. Model and guide then have the weights of the last start of an epoch
            at which the loss was finite, of which a copy is kept.
        torch.OutOfMemoryError: If a step takes more memory than a GPU has; it names a ``batch_size`` that fits.
        KeyboardInterrupt, SystemExit: After Ctrl-C; after SIGTERM, with the code 143.

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
        loader_workers=loader_workers,
        matmul_precision=matmul_precision,
        non_finite=non_finite,
    )
    check_objects(model=model, guide=guide, objective=objective)
    if not isinstance(objective, Objective):
        raise TypeError(
            f"expected an objective such as pyrogen.inference.ELBO(), got a {type(objective).__name__}; Pyro's own "
            "losses train with pyro.infer.SVI"
        )
    check_are(Callable, model=model, guide=model if guide is None else guide)
    check_are(str | Path | None, out=out)
    check_are(bool, progress=progress, overwrite=overwrite)
    check_are(bool | Literal["anyway"], resume=resume)
    check_are(Mapping[str, Any] | None, configuration=configuration)
    if configuration is not None and out is None:
        raise ValueError("configuration is written to out=, which was not given")
    kept = None if configuration is None else as_yaml(configuration, "configuration")
    fabric = connect(device, precision, None if out is None else Path(out))
    processes = Processes(fabric)
    folder = None if out is None else Path(out)
    with Turn(fabric.device) as turn:
        with processes.together():
            if resume and folder is None and processes.first:
                raise ValueError("resume needs out=, the folder of the run that shall go on")
            if folder is not None and processes.first:
                prepare_folder(folder, overwrite=overwrite, resume=bool(resume))
            batches, validation = training_and_validation(data, options.batch_size, options.seed)
            batches = dataclasses.replace(
                batches, rank=processes.rank, ranks=processes.count, workers=options.loader_workers
            )
            if validation is not None:
                validation = dataclasses.replace(validation, rank=processes.rank, ranks=processes.count)
            if patience is not None and validation is None:
                raise ValueError(
                    "patience needs validation data; pass what pyrogen.data.load returns, or leave patience out"
                )
            check_weights(model, guide)
            example = _example(model, guide, batches)
            for part in (batches, validation):
                if part is not None:
                    check_values(model, part)
            objective.check_guide(guide)
            check_programs(model, guide, *example, guided=objective.uses_guide)
        with seeded(processes.seed(options.seed), fabric.device), _matmul_precision(matmul_precision):
            with processes.together():
                run = Run(
                    model=as_module(model, *example),
                    guide=None if guide is None else as_module(guide, *example),
                    objective=copy.copy(objective),
                    history=pd.DataFrame(),
                    options=options,
                    data=data.source or None if isinstance(data, Data) else None,
                    example=describe_example(tuple(x[:2] for x in example)),
                    made=provenance(fabric.device),
                )
                run.objective.step = 0
                run.objective.critics = copy.deepcopy(objective.critics)
                run.objective.prepare(run.model, run.guide, *example)
                run.source = source_of_run(run)
                _check_options(run)
                if objective.observations is None:
                    run.objective.observations = len(batches)
                training = Training(run, batches, validation, fabric, folder, tuple(callbacks), turn)
            with ExitStack() as lock:
                with processes.together():
                    if folder is not None and processes.first:
                        lock.enter_context(held(folder, overwrite=overwrite, resume=bool(resume)))
                training.begin(resume=resume, overwrite=overwrite)
                with pyro.validation_enabled(False):  # the checks are made, and cost time
                    training.go(progress, kept)
        return run


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    if run.options.precision == "16-mixed" and run.options.non_finite == "skip":
        raise ValueError("precision='16-mixed' skips steps by itself; use 'bf16-mixed', or non_finite='stop'")
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

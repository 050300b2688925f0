"""What is wrong with a fit, by name, with what shows it and what to try; nothing where all is well."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyrogen.arguments import check_counts, checked
from pyrogen.data import Data, load
from pyrogen.evaluation.findings import CHECKS, ORDER, Finding
from pyrogen.evaluation.running import ROWS, prepared
from pyrogen.evaluation.symptoms import Patient
from pyrogen.inference.batches import training_and_validation
from pyrogen.inference.run import Run
from pyrogen.inference.turns import seeded

__all__ = ["Diagnosis", "Finding", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found to be wrong with a fit; false where nothing was.

    Attributes:
        findings: The findings.
        unchecked: By name, why some things could not be looked for, such as mode dropping in data of two sites.
    """

    findings: tuple[Finding, ...] = ()
    unchecked: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the findings, each once."""
        return tuple(dict.fromkeys(finding.name for finding in self.findings))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["nothing found"]
        return "\n".join([*lines, *(f"not looked for: {name} ({why})" for name, why in self.unchecked.items())])


@checked(but=("data",))
def diagnose(
    run: Run,
    data: Data | Tensor | Sequence[Tensor] | Dataset | None = None,
    *,
    observations: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> Diagnosis:
    r"""Look for what is known to go wrong with such fits.

    ============================  ====================================================================================
    name                          what it says, and where it begins
    ============================  ====================================================================================
    ``posterior collapse``        Latent units say nothing: the variance of the posterior mean is at most 0.01, or a
                                  hundredth of that of the prior or of q(z) where one is below 1. It is one where all
                                  units of a site are so; or three quarters of all nearly so, at 0.05, and the rate is
                                  below ½ nat or, where it isn't known, less than 5 % of the data's variance is
                                  explained; or where half of those that were active are no longer, and the validation
                                  bound fell with them. Units that a healthy fit leaves unused are none.
    ``critic failure``            Over the second half of the training a critic tells more than 99 % of the draws apart;
                                  or less than 51 %, though less than half of one side is covered by the other; or loses
                                  a quarter more than a critic would that says nothing.
    ``mode dropping``             More than a fifth of the data have no sample near: within the distance that the
                                  nearest 2.5 % of the data are at. It is left out where, on training data too, the
                                  likelihood is uninformative or, with a guide, overconfident: by that samples of any
                                  mode miss the data.
    ``prior hole``                More than a fifth of the prior's draws have no draw of q(z) as near.
    ``overconfident likelihood``  Squared errors are more than twice what the likelihood expects of itself, on held-out
                                  data where there are any; or at more than 5 % of the values a learned scale of a
                                  density is at its floor. It is by overfitting where they are half as large again as
                                  on training data, else by the scale or for want of a fit.
    ``uninformative likelihood``  They are less than a tenth of that: the scale is so large that it explains nothing.
    ``overfitting``               The validation bound has fallen by more than a fifth of what it had risen, while that
                                  on training data rose, and lies below this by as much.
    ``divergence``                Without critics and schedules, the loss has risen by a fifth of what it had fallen.
    ``not converged``             There, a fifth of the fall since the second epoch is of the last quarter.
    ============================  ====================================================================================

    Samples and data are compared by coverage (:func:`~pyrogen.evaluation.neighbours.precision_recall`), with balls that
    reach to the nearest 2.5 % of the data in their first 16 principal components: parts smaller than that are not
    missed, and blurred samples do not count as missing ones. Draws of the likelihood and its means are both tried. So
    are the prior and q(z), of which no density is asked: in the first 8 principal components of both. What is
    compared are as many draws as there are rows.

    Findings come in an order in which each stands before those that it may entail: a training that was stopped too
    early first. What would rest on fewer than 50 rows, or on a short training, is not looked for.

    Args:
        run: What :func:`pyrogen.fit` returned, or :func:`pyrogen.load`.
        data: What it was fitted to; may be left out where :func:`pyrogen.data.load` made it. Only of a
            :class:`~pyrogen.data.Data` are there held-out rows, for validation.
        observations: How many rows are looked at, at random; more cost time as their square.
        seed: Of rows and draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        The findings, none where all is well; ``print`` shows them. What could not be looked for is in ``.unchecked``,
        with the reason.

    Raises:
        TypeError: If the data are of no known kind.
        ValueError: If there are no data, or they are not what the model observes.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(beta=100.0), data, epochs=10, progress=False)
        >>> diagnosis = diagnose(run)
        >>> "posterior collapse" in diagnosis.names, diagnosis.findings[0].units
        (True, ('z[0]', 'z[1]'))
    """
    check_counts(observations=observations)
    with seeded(seed, torch.device("cpu")):
        batch, held_out = _rows(run, data, observations, seed)
    with prepared(run.model, run.guide, batch, seed=seed, rows=rows, guided=False) as pair:
        patient = Patient(run, pair, held_out, seed, rows)
    findings: list[Finding] = []
    unchecked = {}
    for name, look in CHECKS.items():
        try:
            findings += look(patient)
        except ValueError as error:
            unchecked[name] = str(error)
    return Diagnosis(tuple(sorted(findings, key=lambda finding: ORDER.index(finding.name))), unchecked)


def _rows(run: Run, data: Any, count: int, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Rows for training and for validation, at random and without repetition, as programs see them."""
    if data is None:
        if not run.data:
            raise ValueError("this run was fitted to data of your own, which a run doesn't keep; pass them as data")
        data = load(**run.data)
    training, validation = training_and_validation(data, count, seed)
    first = next(training.epoch(0, torch.device("cpu")))
    return first, None if validation is None else next(validation.epoch(0, torch.device("cpu")))

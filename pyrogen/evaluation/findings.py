"""The sicknesses of a fit that are known, each with where it begins and what helps against it."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from pyrogen.evaluation.prior_match import prior_holes
from pyrogen.evaluation.symptoms import Patient
from pyrogen.inference.adversarial import ALI, GAN
from pyrogen.inference.hybrids import Hybrid
from pyrogen.inference.matching import WAE
from pyrogen.inference.objectives import ELBO
from pyrogen.inference.ratios import Hinge, JensenShannon, LeastSquares, Logistic, Ratio, Wasserstein
from pyrogen.inference.reading import INACTIVE_UNITS
from pyrogen.inference.run import Run
from pyrogen.inference.units import INACTIVE
from pyrogen.inference.watch import CHANCE, PREFIX, SATURATED

__all__ = ["CHECKS", "ORDER", "Finding"]

MISSED = 0.2
"""Of the data, or of the prior, the share without samples, or without q(z), from which on that is a sickness."""
APART = 0.5
"""The coverage below which two sides are so different that a critic has to see it."""
NEARLY, MOST, LITTLE, UNEXPLAINED = 0.05, 0.75, 0.5, 0.05
"""A posterior has as good as collapsed where so large a share of its units has posterior means of so small a variance,
and the rate is below so many nats, or where it isn't known such a share of the data's variance is explained."""
OVERCONFIDENT, UNINFORMATIVE = 2.0, 0.1
"""Squared errors on held-out data over those that the likelihood expects of itself."""
CLEARLY = 1.5
"""How many times larger they are there than on data of the training where that is overfitting. With 1000 rows of a
single number, and 180 held out, they are by chance once in 150 times."""
AT_FLOOR = 0.05
"""The share of values with a scale at its floor."""
WORSE = 1.25
"""How much more than a critic that says nothing one may lose."""
LOST, JUMP = 0.2, 5.0
"""Of what a curve has gained, the share by which it falls back or rises at last, and how many usual steps of it that
is at least."""
EPOCHS = 8
"""From how many epochs on a curve is judged."""
STEPS = 200
"""From how many steps of the program on critics are judged."""
PERSISTS = 0.9
"""The share of the epochs since, in which a state has to have held."""
LATE = "in the second half of the training"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a fit.

    Attributes:
        name: Which, one of those that :func:`diagnose` lists.
        evidence: What shows it, in figures.
        advice: What to try.
        units: The latent units concerned, such as ``z[3]``.
        epoch: Since which epoch, from 1, where that is known.
    """

    name: str
    evidence: str
    advice: str
    units: tuple[str, ...] = ()
    epoch: int | None = None

    def __str__(self) -> str:
        since = "" if self.epoch is None else f" since epoch {self.epoch}"
        return f"{self.name}{since}: {self.evidence}.\n    Try {self.advice}."


def _collapse(patient: Patient) -> list[Finding]:
    if not patient.is_guided:
        return []
    idle, units, history = patient.idle, patient.units, patient.run.history
    whole = [site for site, names in idle.items() if len(names) == units.variances[site].numel()]
    names, fall = [name for site in whole for name in idle[site]], None
    nearly = patient.units_below(NEARLY)
    if len(whole) < len(idle) and len(nearly) >= MOST * units.total and _says_little(patient):
        names = nearly
    if not names and (fall := _fall_with_units(history, units.total)) is not None:
        names = patient.units_below(INACTIVE)
    if not names:
        return []
    median = float(torch.cat([variance.flatten() for variance in units.variances.values()]).median())
    evidence = (
        f"{len(names)} of {units.total} latent units ({_shortened(names)}) say next to nothing of the observation; the "
        f"variance of the posterior mean is {max(median, 0.0):.2g} in the median of all units"
    )
    if not math.isnan(patient.rate):
        evidence += f"; the rate is {patient.rate:.2f} nats"
    if fall is not None:
        evidence += f"; the validation bound fell by {fall:.2f} nats as they were lost"
    since = _since(history, [name for of_site in idle.values() for name in of_site if name in names])
    return [Finding("posterior collapse", evidence, _against_collapse(patient.run.objective), tuple(names), since)]


def _says_little(patient: Patient) -> bool:
    if not math.isnan(patient.rate):
        return patient.rate < LITTLE
    return patient.likelihood.explained < UNEXPLAINED


def _fall_with_units(history: pd.DataFrame, total: int) -> float | None:
    """By how much the validation bound has fallen with half of the units that were active; None if it is not so."""
    if INACTIVE_UNITS not in history or "validation" not in history:
        return None
    known = history.dropna(subset=["validation"]).iloc[1:]  # at first units vary by chance
    if len(known) < EPOCHS:
        return None
    active, bound = total - known[INACTIVE_UNITS].map(lambda text: len(_names(text))), known["validation"]
    if active.iloc[-1] > active.max() / 2:
        return None
    fall = float(bound[active >= MOST * active.max()].max() - bound.iloc[-3:].median())
    return fall if fall > _large(bound, float(bound.max() - bound.iloc[0])) else None


def _against_collapse(objective: Any) -> str:
    weight = next((found for name in ("beta", "latent", "weight") if (found := getattr(objective, name, None))), 1.0)
    most = getattr(weight, "end", weight)
    tries = ["a smaller learning_rate", "a decoder that can do less without z"]
    if isinstance(objective, ELBO):
        tries.insert(0, "ELBO(free_bits=0.1)")
    if isinstance(weight, (int, float)) and isinstance(objective, (ELBO, Hybrid)):
        tries.insert(0, "a weight of the rate that rises from 0, LinearSchedule(steps=...)")
    if isinstance(most, (int, float)) and most > 1:
        tries.insert(0, f"a smaller weight of the latent term than {most:g}")
    return ", ".join(tries[:-1]) + f", or {tries[-1]}"


def _critics(patient: Patient) -> list[Finding]:
    run, history = patient.run, patient.run.history
    columns = [str(name) for name in history if str(name).startswith(PREFIX)]
    if not columns:
        return []
    late = history.iloc[len(history) // 2 :]
    if (steps := int(history["step"].iloc[-1])) < STEPS:
        raise ValueError(f"critics are judged from {STEPS} steps of the program on, and there were {steps}")
    contrasts: Any = run.objective.critics.items()
    settling = {f"{name}{which}" for name, contrast in contrasts for which in contrast.settles}
    findings = []
    for column in columns:
        critic, accuracy = column.removeprefix(PREFIX), float(late[column].median())
        told = f"the critic of '{critic}' tells {100 * accuracy:.1f} % of the draws apart {LATE}"
        if accuracy > SATURATED:
            since = _persisting(history, history[column] > SATURATED)
            findings.append(Finding("critic failure", told, _AGAINST_SATURATION, epoch=since))
        elif accuracy < CHANCE and critic not in settling and (apart := _apart(patient, critic)):
            since = _persisting(history, history[column] < CHANCE)
            findings.append(Finding("critic failure", f"{told}, though {apart}", _against_chance(run), epoch=since))
    silent, loss = _silent_loss(run.objective.critics), float(late["critic_loss"].mean())
    if not findings and silent is not None and loss > WORSE * silent:
        evidence = (
            f"the critics' loss is {loss:.3g} {LATE}, {late['critic_loss'].max():.3g} at most, where critics that say "
            f"nothing would lose {silent:.3g}"
        )
        since = _persisting(history, history["critic_loss"] > silent)
        findings.append(Finding("critic failure", evidence, _against_explosion(run), epoch=since))
    return findings


def _apart(patient: Patient, critic: str) -> str | None:
    """In words, how far apart the sides that a critic compares are, if far; None too where that is not known."""
    if critic in ("visible", "joint"):
        coverage, what = patient.visible.coverage, "samples are near to only {:.0f} % of the data"
    elif critic == "latent":
        coverage, what = patient.prior_coverage, "draws of q(z) are near to only {:.0f} % of the prior's"
    else:
        return None
    return what.format(100 * coverage) if coverage < APART else None


def _silent_loss(critics: torch.nn.Module) -> float | None:
    """What critics lose together that give every draw the same score; None where that is not known, or no loss."""
    known = {Logistic: 2 * math.log(2), JensenShannon: 0.0, LeastSquares: 0.25, Hinge: 2.0}
    total = 0.0
    for ratio in (part for part in critics.modules() if isinstance(part, Ratio)):
        if isinstance(ratio, Wasserstein):
            total += ratio.gradient_penalty  # at a slope of 0
        elif type(ratio) in known:
            total += known[type(ratio)]
        else:
            return None
    return total or None


_AGAINST_SATURATION = (
    "a slower critic (critic=CriticOptions(learning_rate=...)), a penalty on its slope (GAN(r1=1.0), else "
    "ratio=partial(Logistic, r1=1.0)), or GAN('wasserstein-gp'); where it stands for a density contrast='adaptive' or "
    "Telescoping, and where it matches marginals more weight of that term"
)


def _rates(run: Run) -> str:
    own = run.options.critic.learning_rate or run.options.learning_rate
    return f"than {own:g} (the program's is {run.options.learning_rate:g})"


def _against_chance(run: Run) -> str:
    return (
        f"a larger learning rate of the critic, critic=CriticOptions(learning_rate=...), {_rates(run)}, more steps of "
        "it for each of the program (CriticOptions(steps=5)), or a wider one"
    )


def _against_explosion(run: Run) -> str:
    return (
        f"a smaller learning rate of the critic, critic=CriticOptions(learning_rate=...), {_rates(run)}, "
        "gradient_clip=1.0, or a penalty on its slope (r1=1.0)"
    )


def _modes(patient: Patient) -> list[Finding]:
    found = patient.visible
    if found.coverage >= 1 - MISSED:
        return []
    missed = f"{100 * (1 - found.coverage):.0f} % of the data have no sample near"
    if (dispersion := _misfit(patient)) is not None:
        raise ValueError(
            f"{missed}, but on those of the training too squared errors are {_times(dispersion)} times what the "
            "likelihood expects of itself, by which samples of any mode miss the data"
        )
    evidence = (
        f"{missed} ({found.samples} samples, coverage with balls to the {found.density_neighbours} nearest of "
        f"{found.observations} rows); the samples' precision is {found.precision:.2f}"
    )
    if patient.run.guide is None:
        advice = (
            "a penalty on the critic's slope (GAN(r1=1.0)) or GAN('wasserstein-gp'), or a guide beside the model, by "
            "whose reconstructions it is held to all of the data (VGHPlusPlus, or Hybrid with visible_samples)"
        )
    else:
        advice = (
            "reconstruct(model, guide, x): where reconstructions are good the prior is at fault, see a prior hole; "
            "where they are not, more latent units, a larger decoder, or more weight of the likelihood"
        )
    return [Finding("mode dropping", evidence, advice)]


def _misfit(patient: Patient) -> float | None:
    """The dispersion on training data where the likelihood is at fault there; None too where that is not known."""
    dispersion = math.nan
    with suppress(ValueError):
        if _has_trained_likelihood(patient):
            dispersion = patient.likelihood.dispersion
    # Without latent sites errors are large because modes are missing.
    too_large = patient.is_guided and dispersion > OVERCONFIDENT
    return dispersion if too_large or dispersion < UNINFORMATIVE else None


def _holes(patient: Patient) -> list[Finding]:
    if not patient.is_guided or (coverage := patient.prior_coverage) >= 1 - MISSED:
        return []
    evidence = f"{100 * (1 - coverage):.0f} % of the prior's draws have no draw of q(z) near"
    pair = patient.pair
    with suppress(ValueError):  # no density, no figures by it
        holes = prior_holes(pair.model, pair.guide, pair.batch, samples=200, seed=patient.seed, rows=patient.rows)
        evidence += (
            f"; by densities {100 * holes.mass:.0f} % of the prior lies where q(z) is negligible, and "
            f"{100 * holes.outside:.0f} % of q(z) where the prior is"
        )
    advice = (
        "more weight of the latent term (beta=1 for the bound itself, a larger weight of AAE or WAE), a prior that is "
        "learned (Flow, Vamp or Mixture), or fewer latent units"
    )
    return [Finding("prior hole", evidence, advice)]


def _likelihood(patient: Patient) -> list[Finding]:
    if not _has_trained_likelihood(patient):
        return []
    found, trained = patient.held_out_likelihood, patient.likelihood
    if math.isnan(found.dispersion):
        raise ValueError("an observed distribution has no mean, or errors are not finite")
    where, beside = "the data", ""
    if patient.held_out is not None:
        where, beside = "held-out data", f" ({_times(trained.dispersion)} on those of the training)"
    evidence = (
        f"squared errors on {where} are {_times(found.dispersion)} times what the likelihood expects of itself{beside}"
    )
    if found.at_floor > AT_FLOOR:
        evidence = f"at {100 * found.at_floor:.0f} % of the values the learned scale is at its floor; {evidence}"
        advice = "a likelihood of levels for quantised data (QuantizedNormal), or one scale for all (scale='shared')"
    elif found.dispersion > OVERCONFIDENT and found.dispersion > CLEARLY * trained.dispersion:
        advice = "patience=..., a smaller decoder or more data; a beta not below 1; scale='shared' for 'per pixel'"
    elif found.dispersion > OVERCONFIDENT:
        advice = f"{_OF_THE_SCALE}; or smaller errors, by more epochs, a larger decoder or more latent units"
    elif found.dispersion < UNINFORMATIVE:
        evidence += f", and its means explain {100 * found.explained:.0f} % of the variance"
        return [Finding("uninformative likelihood", evidence, _OF_THE_SCALE)]
    else:
        return []
    return [Finding("overconfident likelihood", evidence, advice)]


def _times(ratio: float) -> str:
    """Two digits that count, and no exponent."""
    return f"{float(f'{ratio:.2g}'):g}"


_OF_THE_SCALE = "a scale of the size of the errors, or a learned one: scale='shared' or 'optimal'"


def _has_trained_likelihood(patient: Patient) -> bool:
    if not _trains_likelihood(patient.run.objective) or patient.pair.implicit_likelihood:
        return False
    return patient.run.guide is not None or not patient.pair.latents


def _trains_likelihood(objective: Any) -> bool:
    if isinstance(objective, Hybrid):
        return bool(objective.log_likelihood)
    if isinstance(objective, WAE):
        return objective.cost is None
    return not isinstance(objective, (ALI, GAN))


def _curves(patient: Patient) -> list[Finding]:
    history, objective = patient.run.history, patient.run.objective
    if history.empty or patient.run.options.patience is not None:  # which has kept the best weights
        return []
    if len(history) < EPOCHS:
        raise ValueError(f"curves are judged from {EPOCHS} epochs on, and there were {len(history)}")
    scheduled = any(callable(getattr(objective, name, None)) for name in ("beta", "latent", "weight"))
    falls = "critic_loss" not in history and not scheduled
    return [*_overfitting(history), *(_descent(history) if falls else [])]


def _descent(history: pd.DataFrame) -> list[Finding]:
    loss, lowest = history["loss"], int(history["loss"].argmin())
    least, last = float(loss.iloc[lowest]), float(loss.iloc[-3:].median())
    before = float(loss.iloc[: -(len(loss) // 4)].iloc[-3:].median())
    if last - least > _large(loss, float(loss.iloc[0]) - least):
        epoch = int(history["epoch"].iloc[lowest])
        evidence = f"the loss is {last:.2f} nats at the end and was {least:.2f} in epoch {epoch}"
        advice = "a smaller learning_rate, schedule='cosine', gradient_clip=1.0, or patience=..."
        return [Finding("divergence", evidence, advice, epoch=epoch + 1)]
    # The first epoch is mostly the fall from weights at random. Of a steady fall chance is only what its steps differ
    # by, in which it is √3 times as large as in the steps.
    chance = float(loss.diff().diff().abs().median()) / math.sqrt(3)
    if before - last > max(LOST * (float(loss.iloc[1]) - last), JUMP * chance):
        evidence = f"the loss fell from {before:.2f} to {last:.2f} nats in the last quarter of the training"
        return [Finding("not converged", evidence, "more epochs, or a larger learning_rate")]
    return []


def _overfitting(history: pd.DataFrame) -> list[Finding]:
    known = history.dropna(subset=["validation"]) if {"validation", "rate", "distortion"} <= {*history} else history[:0]
    if len(known) < EPOCHS:
        return []
    bound, training = known["validation"], -(known["distortion"] + known["rate"])
    best, last = int(bound.argmax()), float(bound.iloc[-3:].median())
    highest, then, now = float(bound.iloc[best]), float(training.iloc[best]), float(training.iloc[-1])
    large = _large(bound, highest - float(bound.iloc[0]))
    if highest - last <= large or now - last <= large or now <= then:
        return []
    epoch = int(known["epoch"].iloc[best])
    evidence = (
        f"the validation bound was {highest:.2f} nats in epoch {epoch} and is {last:.2f} at the end, while that on "
        f"training data rose from {then:.2f} to {now:.2f}"
    )
    advice = "patience=..., which keeps the best weights, smaller networks, dropout, or more data"
    return [Finding("overfitting", evidence, advice, epoch=epoch + 1)]


def _large(curve: pd.Series, gain: float) -> float:
    """What a curve has to go back for it to be no chance."""
    return max(LOST * gain, JUMP * float(curve.diff().abs().median()))


def _since(history: pd.DataFrame, names: Sequence[str]) -> int | None:
    """The epoch since which these units say nothing."""
    if INACTIVE_UNITS not in history or not names:
        return None
    return _persisting(history, history[INACTIVE_UNITS].map(lambda text: {*names} <= _names(text)))


def _names(text: Any) -> set[str]:
    return {*text.split()} - {"none"} if isinstance(text, str) else set()


def _persisting(history: pd.DataFrame, held: pd.Series) -> int | None:
    """The first epoch from which on something held in most epochs, to the end."""
    share = held[::-1].astype(float).expanding().mean()[::-1]
    since = held & (share >= PERSISTS)
    return int(history["epoch"][since].iloc[0]) if since.any() else None


def _shortened(names: Sequence[str], most: int = 8) -> str:
    return " ".join(names) if len(names) <= most else f"{' '.join(names[: most - 1])} ... {names[-1]}"


CHECKS: dict[str, Callable[[Patient], list[Finding]]] = {
    "posterior collapse": _collapse,
    "critic failure": _critics,
    "mode dropping": _modes,
    "prior hole": _holes,
    "saturated likelihood": _likelihood,
    "the curves of the training": _curves,
}

ORDER = (
    *("not converged", "divergence", "overfitting", "critic failure", "uninformative likelihood"),
    *("posterior collapse", "mode dropping", "overconfident likelihood", "prior hole"),
)
"""The findings by name, each before those that it may entail."""

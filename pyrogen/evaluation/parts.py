"""The parts of an evaluation: which figures each finds, on how many observations, and why one is not defined."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrogen.evaluation.aggregate import aggregated
from pyrogen.evaluation.annealing import annealing, bidirectional_monte_carlo
from pyrogen.evaluation.class_diversity import diversity
from pyrogen.evaluation.critics import critic_estimates
from pyrogen.evaluation.dimensions import total_correlation
from pyrogen.evaluation.errors import standard_error
from pyrogen.evaluation.explicit import explicit_guide
from pyrogen.evaluation.gaps import inference_gap
from pyrogen.evaluation.held_out import HeldOutEstimate, held_out_marginal_kl_estimate, held_out_rate_estimate
from pyrogen.evaluation.likelihood import importance_sampling
from pyrogen.evaluation.marginals import marginal_kl
from pyrogen.evaluation.neighbours import data_copying, precision_recall
from pyrogen.evaluation.pareto import pareto_diagnostic
from pyrogen.evaluation.prior_match import mmd, prior_holes
from pyrogen.evaluation.rates import rate_distortion
from pyrogen.evaluation.reference import nuts
from pyrogen.evaluation.running import Prepared
from pyrogen.evaluation.samples import posterior_samples, sample
from pyrogen.evaluation.simulation_based import simulation_based_calibration
from pyrogen.evaluation.tarp import tarp
from pyrogen.evaluation.two_samples import c2st, sliced_wasserstein
from pyrogen.evaluation.units import active_units
from pyrogen.evaluation.visible import frechet_distance, inception_score, kernel_distance
from pyrogen.evaluation.wasserstein import wasserstein_critic
from pyrogen.inference.batches import as_batch
from pyrogen.inference.contrasts import LatentContrast
from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.run import Run

__all__ = ["DEFAULT", "PARTS", "Subject", "known_parts"]

ANNEALED, CHAINS, TEMPERATURES = 64, 8, 300
"""Observations, chains for each and temperatures of annealed importance sampling."""
AGGREGATED, AGGREGATE_DRAWS = 10_000, 500
"""Observations, at most, that q(z) is the mixture of, and draws over which its figures are averaged. Where every
pair of a draw and an observation costs a pass of a network, as with flows, a tenth of these and half of those."""
GAP_ROWS = 64
"""Observations for each of which the best q of the family is sought."""
PARETO_ROWS = 1000
"""Observations whose importance weights have their tails fitted."""
SAMPLES = 10_000
"""Samples and observations, at most, that are compared in visible space."""
REFERENCES, REFERENCE_DRAWS, FEWEST_DRAWS = 4, 500, 50
"""Observations whose posterior is sampled by NUTS, draws of each chain, and what all must at least be worth."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and with what.

    Attributes:
        run: A run.
        pair: Its programs with the observations.
        particles, explicit_steps, ratio_steps, features, training, seed, rows, compile: As for :func:`evaluate`.
        reasons: Why figures are not defined, by part; the parts fill it.
    """

    run: Run
    pair: Prepared
    particles: int
    explicit_steps: int
    ratio_steps: int
    features: Any
    training: Tensor | None
    seed: int
    rows: int
    compile: bool = False
    reasons: dict[str, list[str]] = field(default_factory=dict)

    @property
    def x(self) -> tuple[Tensor, ...]:
        """The observations."""
        return self.pair.batch

    @property
    def programs(self) -> tuple[Any, Any]:
        """Model and guide; a model without latent sites needs none."""
        return self.run.model, self.run.guide

    @property
    def options(self) -> dict[str, Any]:
        """What every function takes."""
        return {"seed": self.seed, "rows": self.rows}

    def first(self, rows: int) -> tuple[Tensor, ...]:
        """The first observations."""
        return tuple(x[:rows] for x in self.x)

    def note(self, part: str, why: Any) -> None:
        """Take note of why a figure of a part is not defined."""
        reasons = self.reasons.setdefault(part, [])
        if str(why) not in reasons:
            reasons.append(str(why))

    def defined(self, part: str, find: Callable[[], Any]) -> Any:
        """What a function finds, or None with a note of why it is not defined; what others found is kept."""
        try:
            return find()
        except (ValueError, ArithmeticError) as error:
            self.note(part, error)
            return None


def _bound(subject: Subject) -> dict[str, Any]:
    if subject.run.guide is None and subject.pair.latents:
        subject.note("bound", "there is no guide")
        return {}
    split = rate_distortion(*subject.programs, subject.x, **subject.options)
    found: dict[str, Any] = {name: float(getattr(split, name).double().mean()) for name in _OF_BOUND}
    found["elbo_error"] = float(standard_error(split.elbo.double()))
    if subject.pair.has_global:
        found["global_rate"] = float(split.global_rate)
    if math.isnan(found["elbo"]):
        subject.note("bound", _why_no_bound(subject.pair))
    if len(subject.x[0]) > 1:
        found["active_units"] = active_units(*subject.programs, subject.x, **subject.options).count
    else:
        subject.note("bound", "active units differ between observations, and there is one")
    return found


def _why_no_bound(pair: Prepared) -> str:
    if names := [*pair.implicit_guide, *pair.implicit_prior, *pair.implicit_likelihood]:
        return f"the distributions at {[*dict.fromkeys(names)]} are implicit"
    if masses := pair.local_point_masses:
        return f"the guide is a point mass at {masses}"
    return "a density is NaN; the parameters of model or guide are not finite, or a distribution overflows"


_OF_BOUND = ("rate", "distortion", "elbo")


def _likelihood(subject: Subject) -> dict[str, Any]:
    proposal, explicit, why = _proposal(subject)
    if why is not None:
        subject.note("likelihood", why)
        return {}
    model, pair, count = subject.run.model, subject.pair, len(subject.x[0])
    settings: Any = {"particles": subject.particles, "compile": subject.compile} | subject.options
    found = importance_sampling(model, proposal, subject.x, **settings)
    values, errors = found.log_likelihood.double(), found.standard_error.double()
    mean = float(values.mean())
    figures = {
        "log_likelihood": mean,
        "log_likelihood_error": float(standard_error(values)),
        # Observations that share draws of global sites err together.
        "monte_carlo_error": float(errors.mean() if pair.has_global else errors.square().sum().sqrt() / count),
        "effective_sample_size": float(found.effective_sample_size.median()),
        "explicit_guide": explicit,
    }
    if (dimensions := _discrete_dimensions(pair)) is not None:
        figures["bits_per_dimension"] = -mean / (dimensions * math.log(2))
    if pair.local:
        tails = subject.defined(
            "likelihood", lambda: pareto_diagnostic(model, proposal, subject.first(PARETO_ROWS), **subject.options)
        )
        if tails is not None:
            figures |= {"pareto_k": float(tails.pareto_k.median()), "pareto_k_untrusted": float(tails.untrusted)}
    return figures


def _proposal(subject: Subject) -> tuple[Any, str | None, str | None]:
    """A guide for importance sampling, its family if it was made for that, and why there is none."""
    run, pair = subject.run, subject.pair
    if run.guide is None and pair.latents:
        return None, None, "there is no guide, so the latents are not known; sample(run) shows what the model makes"
    if names := [*pair.implicit_prior, *pair.implicit_likelihood]:
        return None, None, f"the model's distribution at {names} is implicit, so there is no log p(x, z)"
    if not pair.implicit_guide:
        masses = pair.local_point_masses
        return run.guide, None, f"the guide is a point mass at {masses}" if masses else None
    if not subject.explicit_steps:
        return None, None, f"the guide is implicit at {[*pair.implicit_guide]}, and explicit_steps=0 fits no other"
    made = explicit_guide(*subject.programs, subject.x, steps=subject.explicit_steps, **subject.options)
    return made, "normal", None


def _discrete_dimensions(pair: Prepared) -> int | None:
    """How many values the one observed site has for each observation, if they are discrete."""
    if len(pair.observed) != 1:
        return None
    node = pair.nodes[pair.observed[0]]
    value: Tensor = torch.as_tensor(node["value"])
    # The prototype has as many rows as fit in two, all of them in the plate "data".
    return value.numel() // min(2, len(pair.batch[0])) if node["fn"].support.is_discrete else None


def _critics(subject: Subject) -> dict[str, Any]:
    """What critics say where no exact figure stands: those of the training, and others fitted afterwards."""
    run, pair = subject.run, subject.pair
    trained = critic_estimates(run, subject.x, **subject.options)
    found = {"rate_estimate": trained.rate_estimate, "marginal_kl_estimate": trained.marginal_kl_estimate}
    if run.guide is None or not subject.ratio_steps:
        return found
    arguments = {"steps": subject.ratio_steps, **subject.options}
    if (pair.implicit_guide or pair.implicit_prior) and pair.why_no_rate_estimate() is None:
        rate = subject.defined("critics", lambda: held_out_rate_estimate(*subject.programs, subject.x, **arguments))
        found |= _shown("held_out_rate_estimate", rate)
    if any(isinstance(part, LatentContrast) for part in run.objective.critics.values()) and len(subject.x[0]) > 2:
        marginal = subject.defined(
            "critics", lambda: held_out_marginal_kl_estimate(*subject.programs, subject.x, **arguments)
        )
        found |= _shown("held_out_marginal_kl_estimate", marginal)
    return found


def _shown(name: str, found: HeldOutEstimate | None) -> dict[str, Any]:
    return {} if found is None else {name: found.estimate, f"{name}_shown": found.shown}


def _aggregate(subject: Subject) -> dict[str, Any]:
    if not subject.pair.local:
        subject.note("aggregate", 'there is no latent site in the plate "data"')
    if not (_is_guided(subject, "aggregate") and subject.pair.local):
        return {}
    programs, options = subject.programs, subject.options
    with aggregated(*programs, subject.first(2), **options) as q:
        quick = all(q.has_marginals(name) for name in subject.pair.local)
    x = subject.first(AGGREGATED if quick else AGGREGATED // 10)
    found: dict[str, Any] = {"aggregated_observations": len(x[0])}
    if (match := subject.defined("aggregate", lambda: mmd(*programs, x, **options))) is not None:
        found |= {"mmd": match.squared, "mmd_p_value": match.p_value}
    options = options | {"samples": AGGREGATE_DRAWS if quick else AGGREGATE_DRAWS // 2}
    if (split := subject.defined("aggregate", lambda: marginal_kl(*programs, x, **options))) is None:
        return found
    names = ("mutual_information", "mutual_information_error", "marginal_kl", "marginal_kl_error")
    found |= {name: getattr(split, name) for name in names} | {"marginal_kl_excess": split.excess}
    if (parts := subject.defined("aggregate", lambda: total_correlation(*programs, x, **options))) is not None:
        found |= {name: getattr(parts, name) for name in ("total_correlation", "total_correlation_error")}
        found["dimension_wise_kl"] = parts.dimension_wise_kl
    if (holes := subject.defined("aggregate", lambda: prior_holes(*programs, x, **options))) is not None:
        found |= {"prior_holes": holes.mass, "prior_holes_error": holes.error, "prior_holes_level": holes.level}
    return found


def _is_guided(subject: Subject, part: str) -> bool:
    if subject.run.guide is None:
        subject.note(part, "there is no guide")
    return subject.run.guide is not None


def _gap(subject: Subject) -> dict[str, Any]:
    if not _is_guided(subject, "gap"):
        return {}
    if not isinstance(subject.run.guide, AmortizedGuide):
        raise ValueError("the guide is no AmortizedGuide, whose encoder can be set aside")
    few = subject.first(GAP_ROWS)
    gap = inference_gap(*subject.programs, few, particles=subject.particles, **subject.options)
    return {
        "approximation_gap": float(gap.approximation.mean()),
        "amortization_gap": float(gap.amortization.mean()),
        "gap_observations": len(few[0]),
    }


def _annealing(subject: Subject) -> dict[str, Any]:
    few, model = subject.first(ANNEALED), subject.run.model
    settings: Any = {"chains": CHAINS, "steps": TEMPERATURES, "compile": subject.compile} | subject.options
    found = annealing(model, few, **settings)
    values = found.log_likelihood.double()
    figures = {
        "annealed_log_likelihood": float(values.mean()),
        "annealed_log_likelihood_error": float(found.standard_error.double().square().sum().sqrt() / len(values)),
        "annealed_observations": len(values),
    }
    both = subject.defined("annealing", lambda: bidirectional_monte_carlo(model, few, **settings))
    return figures if both is None else figures | {"annealing_gap": both.gap}


def _drawn(subject: Subject) -> tuple[Tensor, Tensor]:
    """As many samples as observations, and these."""
    x, *others = subject.first(SAMPLES)
    made = sample(subject.run, len(x), seed=subject.seed, given=tuple(others), rows=subject.rows)
    if not isinstance(made, Tensor):
        raise ValueError(f"the model observes the sites {[*made]}, so there is no one visible space to compare in")
    return made, x


def _samples(subject: Subject) -> dict[str, Any]:
    made, x = _drawn(subject)
    features = subject.features
    space = "values" if features is None else f"features of a {type(features).__name__}"
    found: dict[str, Any] = {"sample_size": len(made), "compared_in": space}

    def add(find: Callable[[], Any], **names: str) -> None:
        if (result := subject.defined("samples", find)) is not None:
            found.update({name: float(getattr(result, attribute)) for name, attribute in names.items()})

    shares = ("precision", "recall", "coverage")
    quality = ("density", *shares, *(f"{share}_error" for share in shares))
    add(lambda: precision_recall(made, x, features), **{name: name for name in quality})
    add(
        lambda: frechet_distance(made, x, features),
        frechet_distance="distance",
        frechet_distance_error="error",
    )
    size = max(2, min(1000, len(x) // 2))  # all of them make the same subset every time
    add(
        lambda: kernel_distance(made, x, features, subset_size=size, seed=subject.seed),
        kernel_distance="distance",
        kernel_distance_error="error",
    )
    if hasattr(features, "probabilities"):
        add(
            lambda: inception_score(made, features, seed=subject.seed),
            inception_score="score",
            inception_score_error="error",
        )
        if made.dim() == 4:
            add(
                lambda: diversity(made, features, seed=subject.seed),
                sample_diversity="diversity",
                sample_diversity_error="error",
            )
            add(lambda: diversity(x, features, seed=subject.seed), data_diversity="diversity")
    if subject.training is not None:
        training = as_batch(subject.training)[0].to(x)
        add(lambda: data_copying(made, training, x, features=features, seed=subject.seed), data_copying="z")
    return found


def _wasserstein(subject: Subject) -> dict[str, Any]:
    found = wasserstein_critic(*_drawn(subject), seed=subject.seed)
    return {"wasserstein": found.estimate, "wasserstein_error": found.error}


def _calibration(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not (_is_guided(subject, "calibration") and subject.pair.latents):
        return found
    for name, check in (("sbc_p_value", simulation_based_calibration), ("tarp_p_value", tarp)):
        result = subject.defined("calibration", lambda: check(*subject.programs, subject.x, **subject.options))  # noqa: B023
        if result is not None:
            found[name] = result.p_value
    return found


def _reference(subject: Subject) -> dict[str, Any]:
    """How far the guide is from draws of the posterior itself, for a few observations."""
    if subject.run.guide is None:
        raise ValueError("there is no guide")
    if subject.pair.has_global or not subject.pair.local:
        raise ValueError(
            "the reference is for the latents of one observation at a time; with global sites, whose posterior is that "
            "of the whole data set, run nuts on it"
        )
    few, local = subject.first(REFERENCES), subject.pair.local
    reference = nuts(*subject.programs, few, draws=REFERENCE_DRAWS, seed=subject.seed)
    known = {name: value.flatten(0, 1) for name, value in reference.samples.items()}
    draws = len(known[local[0]])
    # A classifier takes draws for independent ones: of a chain's only as many as they are worth.
    worth = _known(reference.effective_sample_size).min()
    if worth < FEWEST_DRAWS:
        raise ValueError(f"NUTS has not converged: {reference}")
    kept = torch.linspace(0, draws - 1, min(draws, int(worth))).long()
    guided = posterior_samples(*subject.programs, few, len(kept), **subject.options)
    accuracies, distances = [], []
    for row in range(len(few[0])):
        of_reference = {name: known[name][kept, row] for name in local}
        of_guide = {name: guided[name][:, row] for name in local}
        accuracies.append(c2st(of_reference, of_guide, seed=subject.seed).accuracy)
        distances.append(sliced_wasserstein(of_reference, of_guide, seed=subject.seed))
    return {
        "c2st": sum(accuracies) / len(accuracies),
        "sliced_wasserstein": sum(distances) / len(distances),
        "reference_r_hat": float(_known(reference.r_hat).max()),
        "reference_observations": len(few[0]),
    }


def _known(of_sites: dict[str, Tensor]) -> Tensor:
    """All that is not NaN, as a diagnostic is at a unit that its support holds."""
    flat = torch.cat([value.flatten() for value in of_sites.values()])
    return flat[~flat.isnan()]


PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "likelihood": _likelihood,
    "bound": _bound,
    "critics": _critics,
    "aggregate": _aggregate,
    "samples": _samples,
    "calibration": _calibration,
    "gap": _gap,
    "annealing": _annealing,
    "wasserstein": _wasserstein,
    "reference": _reference,
}
"""Every part by name: a function that gives figures by their names in :class:`Evaluation`."""

DEFAULT = ("likelihood", "bound", "critics", "aggregate", "samples", "calibration")
"""The parts that are quick."""


def known_parts(parts: Sequence[str] | str) -> list[str]:
    """The parts of these names, or ``"all"``, in the order in which they are made.

    Raises:
        ValueError: If there is no such part, or none is asked for.
    """
    names = [*PARTS] if parts == "all" else [parts] if isinstance(parts, str) else [*parts]
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"there is no part {', '.join(map(repr, unknown))}; expected 'all' or some of {[*PARTS]}")
    if not names:
        raise ValueError(f"no part is asked for; expected 'all' or some of {[*PARTS]}")
    return [name for name in PARTS if name in names]

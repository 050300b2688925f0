"""The evaluation of a run: a handful of figures that do not depend on what was optimised."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogen.data import Data
from pyrogen.evaluation.critics import critic_estimates
from pyrogen.evaluation.explicit import explicit_guide
from pyrogen.evaluation.held_out import HeldOutEstimate, held_out_marginal_kl_estimate, held_out_rate_estimate
from pyrogen.evaluation.likelihood import importance_sampling
from pyrogen.evaluation.rates import rate_distortion
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.evaluation.units import active_units
from pyrogen.inference.contrasts import LatentContrast
from pyrogen.inference.run import Run

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found; figures are means over the observations, in nats unless said.

    A figure that is not defined, such as a rate with a point mass for a posterior, is NaN, and a count None. So is one
    that is not known, such as the rate of an implicit guide. What critics report has ``estimate`` in its name, and is
    no bound on anything.

    Attributes:
        observations: How many there are.
        elbo: The evidence lower bound, −(rate + distortion).
        rate: KL(q(z|x) ‖ p(z)).
        distortion: −E log p(x|z).
        log_likelihood: By importance sampling, with the guide or with ``explicit_guide``.
        log_likelihood_error: Standard error of that mean, from the spread between observations; NaN for one.
        monte_carlo_error: Standard error of that mean, from the finite number of particles alone.
        effective_sample_size: The median over observations of what the particles are worth in equally weighted draws.
        bits_per_dimension: −log-likelihood / (D log 2), where the one observed site has discrete values (bits, levels);
            None elsewhere, for a density has no such scale.
        active_units: How many latent units are active.
        latent_units: How many there are.
        particles: How many draws for each observation the log-likelihood rests on.
        seconds: Time taken.
        explicit_guide: What the log-likelihood rests on in place of a guide with implicit sites: the family of a guide
            that was fitted afterwards to the frozen model; None where the guide itself served.
        rate_estimate: The rate according to the critics of the training.
        held_out_rate_estimate: The rate of an implicit guide or prior according to critics fitted afterwards, see
            :func:`held_out_rate_estimate <pyrogen.evaluation.held_out_rate_estimate>`.
        held_out_rate_estimate_shown: That number, or ``"> x"`` where critics are past the range in which their
            calibration is within 10 %; None without it.
        marginal_kl_estimate: KL(q(z) ‖ p(z)) according to the critic of a training that matched the marginals.
        held_out_marginal_kl_estimate, held_out_marginal_kl_estimate_shown: The same by a critic fitted afterwards to
            half of the observations and averaged over a quarter that it has not seen.
        not_known: Why log-likelihood, rate or distortion are NaN; None where they are not.
    """

    observations: int
    elbo: float
    rate: float
    distortion: float
    log_likelihood: float
    log_likelihood_error: float
    monte_carlo_error: float
    effective_sample_size: float
    bits_per_dimension: float | None
    active_units: int | None
    latent_units: int
    particles: int
    seconds: float
    explicit_guide: str | None = None
    rate_estimate: float = math.nan
    held_out_rate_estimate: float = math.nan
    held_out_rate_estimate_shown: str | None = None
    marginal_kl_estimate: float = math.nan
    held_out_marginal_kl_estimate: float = math.nan
    held_out_marginal_kl_estimate_shown: str | None = None
    not_known: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for a row of a table."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines: list[tuple[str, float | str, str]] = [
            ("log-likelihood", self.log_likelihood, f"nats {self._errors()}".rstrip()),
            ("ELBO", self.elbo, "nats"),
            ("rate", self.rate, "nats"),
            ("distortion", self.distortion, "nats"),
        ]
        if self.bits_per_dimension is not None:
            lines.append(("bits per dimension", self.bits_per_dimension, "bits"))
        lines += self._estimates()
        ess = self.effective_sample_size
        lines.append(("effective sample size", ess, f"of {self.particles} particles (median)"))
        width = max(len(name) for name, _, _ in lines)
        rows = [f"{name:<{width}}  {_figure(value):>12}  {unit}".rstrip() for name, value, unit in lines]
        count = "not defined" if self.active_units is None else str(self.active_units)
        rows.append(f"{'active units':<{width}}  {count:>12}  of {self.latent_units}")
        heading = f"Evaluation on {self.observations} observations, {self.seconds:.1f} s; means per observation"
        notes = []
        if self.explicit_guide is not None:
            notes.append(f"log-likelihood with an explicit guide ({self.explicit_guide}) fitted to the frozen model")
        if self.not_known is not None:
            notes.append(self.not_known)
        return "\n".join([heading, *notes, *rows])

    def _estimates(self) -> list[tuple[str, float | str, str]]:
        """The lines of what critics report, of those that there are."""
        found: list[tuple[str, float | str, str]] = []
        for name, training, held_out in (
            ("rate", self.rate_estimate, self.held_out_rate_estimate_shown),
            ("marginal KL", self.marginal_kl_estimate, self.held_out_marginal_kl_estimate_shown),
        ):
            if not math.isnan(training):
                found.append((f"{name}, estimate", training, "nats, by the critics of the training"))
            if held_out is not None:
                found.append((f"{name}, held-out estimate", held_out, "nats, by critics fitted afterwards"))
        return found

    def _errors(self) -> str:
        if math.isnan(self.log_likelihood):
            return ""
        data, draws = self.log_likelihood_error, self.monte_carlo_error
        parts = [f"± {error:.3f} ({of})" for error, of in ((data, "data"), (draws, "particles")) if error == error]
        return ", ".join(parts)


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "not defined" if math.isnan(value) else f"{value:.3f}"


def evaluate(
    run: Run,
    x: Data | Tensor | Sequence[Tensor],
    *,
    particles: int = 1000,
    explicit_steps: int = 300,
    ratio_steps: int = 500,
    seed: int = 0,
    rows: int = ROWS,
) -> Evaluation:
    r"""Evaluate a run on observations it was not trained on.

    Whatever the run was trained with, the bound is the plain evidence lower bound (:func:`rate_distortion
    <pyrogen.evaluation.rate_distortion>`), and the log-likelihood comes from importance sampling with the guide
    (:func:`importance_sampling <pyrogen.evaluation.importance_sampling>`):

    .. math:: \text{ELBO} = -\text{rate} - \text{distortion} \le \log p(x)
        \approx \log \frac{1}{K} \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)}

    With a guide that is a point mass at a latent site, rate, bound and log-likelihood are not defined; without a guide
    nothing is, unless the model has no latent sites. Such figures are NaN and shown as "not defined".

    With a guide that has implicit sites the log-likelihood comes from an explicit guide, fitted here to the frozen
    model and to these observations (:func:`explicit_guide <pyrogen.evaluation.explicit_guide>`), which is legitimate: a
    proposal may depend on x. Rate and ELBO are not known. What critics say of the rate stands beside them as an
    estimate, those of the training first and then others that are fitted here and calibrated
    (:func:`held_out_rate_estimate <pyrogen.evaluation.held_out_rate_estimate>`). With an implicit prior or likelihood
    there is no log p(x, z), and no log-likelihood by any guide.

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``; a tuple of tensors that the programs take; or what
            :func:`pyrogen.data.load` returned, of which the test split is used.
        particles: Number K of draws for each observation.
        explicit_steps: Steps in which an explicit guide is fitted where the run's has implicit sites; 0 leaves the
            log-likelihood out.
        ratio_steps: Steps in which critics are fitted for held-out estimates, and as many for each of two or three
            calibrations; 0 leaves these out.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        The figures; ``print`` shows them as a table.

    Raises:
        TypeError: If ``x`` is none of these.
        ValueError: If x is empty, holds NaN or infinity, or has another shape or other values than the model observes.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(), data, epochs=1, progress=False)
        >>> evaluation = evaluate(run, data.test[:20], particles=10)
        >>> evaluation.observations, evaluation.latent_units
        (20, 2)
    """
    started = time.perf_counter()
    x = x.test if isinstance(x, Data) else x
    model, guide, nan = run.model, run.guide, math.nan
    with prepared(model, guide, x, seed=seed, particles=particles, rows=rows, guided=False) as pair:
        count, units, dimensions = len(pair.batch[0]), _latent_units(pair), _discrete_dimensions(pair)
        guided = guide is not None or not pair.latents
    for name, steps in (("explicit_steps", explicit_steps), ("ratio_steps", ratio_steps)):
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, got {steps!r}")
    rate = distortion = elbo = ll = ll_error = mc_error = ess = nan
    active = None
    if guided:
        split = rate_distortion(model, guide, x, seed=seed, rows=rows)
        rate, distortion, elbo = (float(v.double().mean()) for v in (split.rate, split.distortion, split.elbo))
        if count > 1:
            active = active_units(model, guide, x, seed=seed, rows=rows).count
    proposal, explicit, why = _proposal(pair, run, x, explicit_steps, seed, rows)
    if why is None:
        estimate = importance_sampling(model, proposal, x, particles=particles, seed=seed, rows=rows)
        values, errors = estimate.log_likelihood.double(), estimate.standard_error.double()
        ll = float(values.mean())
        ll_error = float(values.std() / math.sqrt(count)) if count > 1 else nan
        # Observations that share draws of global sites err together.
        mc_error = float(errors.mean() if pair.has_global else errors.square().sum().sqrt() / count)
        ess = float(estimate.effective_sample_size.median())
    trained = critic_estimates(run, x, seed=seed, rows=rows)
    held_out = _held_out(pair, run, x, ratio_steps, seed, rows) if guide is not None and ratio_steps else (None, None)
    rate_found, marginal_found = (_estimate_and_shown(each) for each in held_out)
    return Evaluation(
        observations=count,
        elbo=elbo,
        rate=rate,
        distortion=distortion,
        log_likelihood=ll,
        log_likelihood_error=ll_error,
        monte_carlo_error=mc_error,
        effective_sample_size=ess,
        bits_per_dimension=None if dimensions is None else -ll / (dimensions * math.log(2)),
        active_units=active,
        latent_units=units,
        particles=particles,
        seconds=time.perf_counter() - started,
        explicit_guide=explicit,
        rate_estimate=trained.rate_estimate,
        held_out_rate_estimate=rate_found[0],
        held_out_rate_estimate_shown=rate_found[1],
        marginal_kl_estimate=trained.marginal_kl_estimate,
        held_out_marginal_kl_estimate=marginal_found[0],
        held_out_marginal_kl_estimate_shown=marginal_found[1],
        not_known=why,
    )


def _proposal(
    pair: Prepared, run: Run, x: Any, steps: int, seed: int, rows: int
) -> tuple[Callable | None, str | None, str | None]:
    """A guide for importance sampling, its family if it was made for that, and why there is none."""
    if run.guide is None and pair.latents:
        return None, None, "there is no guide, so the latents are not known; sample(run) shows what the model makes"
    if names := [*pair.implicit_prior, *pair.implicit_likelihood]:
        return None, None, f"the model's distribution at {names} is implicit, so there is no log p(x, z)"
    if not pair.implicit_guide:
        masses = pair.local_point_masses
        return run.guide, None, f"the guide is a point mass at {masses}" if masses else None
    if not steps:
        return None, None, f"the guide is implicit at {[*pair.implicit_guide]}, and explicit_steps=0 fits no other"
    made = explicit_guide(run.model, run.guide, x, steps=steps, seed=seed, rows=rows)  # type: ignore[arg-type]
    return made, "normal", None


def _held_out(
    pair: Prepared, run: Run, x: Any, steps: int, seed: int, rows: int
) -> tuple[HeldOutEstimate | None, HeldOutEstimate | None]:
    """Of rate and marginal divergence, what critics fitted afterwards say, where no exact figure stands."""
    rate = marginal = None
    arguments = {"steps": steps, "seed": seed, "rows": rows}
    if (pair.implicit_guide or pair.implicit_prior) and pair.why_no_rate_estimate() is None:
        rate = held_out_rate_estimate(run.model, run.guide, x, **arguments)  # type: ignore[arg-type]
    if any(isinstance(part, LatentContrast) for part in run.objective.critics.values()) and len(pair.batch[0]) > 2:
        marginal = held_out_marginal_kl_estimate(run.model, run.guide, x, **arguments)  # type: ignore[arg-type]
    return rate, marginal


def _estimate_and_shown(found: HeldOutEstimate | None) -> tuple[float, str | None]:
    return (math.nan, None) if found is None else (found.estimate, found.shown)


def _latent_units(pair: Prepared) -> int:
    """How many numbers the per-observation latent sites have for each observation."""
    return sum(
        math.prod(site.shape) * math.prod(plate.size for plate in site.plates if plate.name != "data")
        for site in pair.latents.values()
        if not site.is_global
    )


def _discrete_dimensions(pair: Prepared) -> int | None:
    """How many values the one observed site has for each observation, if they are discrete."""
    if len(pair.observed) != 1:
        return None
    node = pair.nodes[pair.observed[0]]
    value: Tensor = torch.as_tensor(node["value"])
    # The prototype has as many rows as fit in two, all of them in the plate "data".
    return value.numel() // min(2, len(pair.batch[0])) if node["fn"].support.is_discrete else None

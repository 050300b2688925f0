"""The evaluation of a run: a handful of figures that do not depend on what was optimised."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogen.data import Data
from pyrogen.evaluation.likelihood import importance_sampling
from pyrogen.evaluation.rates import rate_distortion
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.evaluation.units import active_units
from pyrogen.inference.run import Run

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found; figures are means over the observations, in nats unless said.

    A figure that is not defined, such as a rate with a point mass for a posterior, is NaN, and a count None.

    Attributes:
        observations: How many there are.
        elbo: The evidence lower bound, −(rate + distortion).
        rate: KL(q(z|x) ‖ p(z)).
        distortion: −E log p(x|z).
        log_likelihood: By importance sampling.
        log_likelihood_error: Standard error of that mean, from the spread between observations; NaN for one.
        monte_carlo_error: Standard error of that mean, from the finite number of particles alone.
        effective_sample_size: The median over observations of what the particles are worth in equally weighted draws.
        bits_per_dimension: −log-likelihood / (D log 2), where the one observed site has discrete values (bits, levels);
            None elsewhere, for a density has no such scale.
        active_units: How many latent units are active.
        latent_units: How many there are.
        particles: How many draws for each observation the log-likelihood rests on.
        seconds: Time taken.
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

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for a row of a table."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            ("log-likelihood", self.log_likelihood, f"nats {self._errors()}".rstrip()),
            ("ELBO", self.elbo, "nats"),
            ("rate", self.rate, "nats"),
            ("distortion", self.distortion, "nats"),
        ]
        if self.bits_per_dimension is not None:
            lines.append(("bits per dimension", self.bits_per_dimension, "bits"))
        ess = self.effective_sample_size
        lines.append(("effective sample size", ess, f"of {self.particles} particles (median)"))
        width = max(len(name) for name, _, _ in lines)
        rows = [f"{name:<{width}}  {_figure(value):>12}  {unit}".rstrip() for name, value, unit in lines]
        count = "not defined" if self.active_units is None else str(self.active_units)
        rows.append(f"{'active units':<{width}}  {count:>12}  of {self.latent_units}")
        heading = f"Evaluation on {self.observations} observations, {self.seconds:.1f} s; means per observation"
        return "\n".join([heading, *rows])

    def _errors(self) -> str:
        if math.isnan(self.log_likelihood):
            return ""
        data, draws = self.log_likelihood_error, self.monte_carlo_error
        parts = [f"± {error:.3f} ({of})" for error, of in ((data, "data"), (draws, "particles")) if error == error]
        return ", ".join(parts)


def _figure(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}"


def evaluate(
    run: Run,
    x: Data | Tensor | Sequence[Tensor],
    *,
    particles: int = 1000,
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

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``; a tuple of tensors that the programs take; or what
            :func:`pyrogen.data.load` returned, of which the test split is used.
        particles: Number K of draws for each observation.
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
        guided, masses = guide is not None or not pair.latents, pair.local_point_masses
        shared = pair.has_global
    rate = distortion = elbo = ll = ll_error = mc_error = ess = nan
    active = None
    if guided:
        split = rate_distortion(model, guide, x, seed=seed, rows=rows)
        rate, distortion, elbo = (float(v.double().mean()) for v in (split.rate, split.distortion, split.elbo))
        if count > 1:
            active = active_units(model, guide, x, seed=seed, rows=rows).count
    if guided and not masses:
        estimate = importance_sampling(model, guide, x, particles=particles, seed=seed, rows=rows)
        values, errors = estimate.log_likelihood.double(), estimate.standard_error.double()
        ll = float(values.mean())
        ll_error = float(values.std() / math.sqrt(count)) if count > 1 else nan
        # Observations that share draws of global sites err together.
        mc_error = float(errors.mean() if shared else errors.square().sum().sqrt() / count)
        ess = float(estimate.effective_sample_size.median())
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
    )


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

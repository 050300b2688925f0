"""What the critics of a training make of observations that it has not seen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.inference.contrasts import LatentContrast, SiteContrast
from pyrogen.inference.draws import Draws
from pyrogen.inference.programs import evaluation_mode
from pyrogen.inference.run import Run
from pyrogen.inference.terms import compare_sites

__all__ = ["CriticEstimates", "critic_estimates"]

PARTICLES = 16


@dataclass(frozen=True)
class CriticEstimates:
    """Estimates by the critics that a run was trained with; they bound nothing, and NaN is what there is no critic for.

    Attributes:
        rate_estimate: KL(q(z|x) ‖ p(z)) in nats, a mean over observations.
        marginal_kl_estimate: KL(q(z) ‖ p(z)) of all per-observation latents together, in nats.
    """

    rate_estimate: float = math.nan
    marginal_kl_estimate: float = math.nan


@checked()
def critic_estimates(
    run: Run, x: Tensor | Sequence[Tensor], *, particles: int = PARTICLES, seed: int = 0, rows: int = ROWS
) -> CriticEstimates:
    r"""Ask the critics of a run for the divergence that they stood for in training.

    .. math:: \mathbb{E}_{q(z|x)} \log \frac{q(z \mid x)}{p(z)} \approx \mathbb{E}_{q(z|x)} T(z, x)
        \quad \text{or} \quad \mathbb{E}_{q(z)} \log \frac{q(z)}{p(z)} \approx \mathbb{E}_{q(z)} T(z)

    Explicit sites beside implicit ones count with their own divergence. A critic that trained beside a program was
    fooled by it at times and lagged behind at others; :func:`held_out_rate_estimate
    <pyrogen.evaluation.held_out_rate_estimate>` asks one that had nothing to do with it.

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        particles: Draws for each observation, about: a multiple of the objective's particles.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        The estimates; NaN where the objective had no such critic.

    Example:
        >>> import pandas as pd
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.distributions import Implicit, StandardNormal, NormalLikelihood
        >>> from pyrogen.inference import AVB, AmortizedGuide, FitOptions
        >>> from pyrogen.models import LatentVariableModel
        >>> model = LatentVariableModel(StandardNormal(2), NormalLikelihood(torch.nn.Linear(2, 4)))
        >>> guide, x = AmortizedGuide(model, torch.nn.Linear(4, 8), Implicit), torch.randn(6, 4)
        >>> objective = AVB()
        >>> objective.prepare(model, guide, x)
        >>> found = critic_estimates(Run(model, guide, objective, pd.DataFrame(), FitOptions(epochs=1)), x)
        >>> math.isnan(found.rate_estimate), math.isnan(found.marginal_kl_estimate)
        (False, True)
    """
    check_counts(particles=particles, rows=rows)
    critics = run.objective.critics
    sites = {name: part for name, part in critics.items() if isinstance(part, SiteContrast)}
    latent = next((part for part in critics.values() if isinstance(part, LatentContrast)), None)
    if run.guide is None or not (sites or latent is not None):
        return CriticEstimates()
    with prepared(run.model, run.guide, x, seed=seed, rows=rows) as pair, evaluation_mode(critics):
        rates, marginals = [], []
        for draws in _draws(pair, run.objective.particles, particles, rows):
            if sites:
                estimates = {name: part.estimate(draws) for name, part in sites.items()}
                rates.append(compare_sites(draws.traces, closed_form=True, estimates=estimates).ratio)
            if latent is not None:
                marginals.append(latent.estimate(draws))
    return CriticEstimates(*(_mean(values) for values in (rates, marginals)))


def _draws(pair: Prepared, at_once: int, particles: int, rows: int) -> Iterator[Draws]:
    """Runs of as many particles as in training, whose moments the critics are used to."""
    size = max(1, rows // at_once)
    for start in range(0, len(pair.batch[0]), size):
        batch = tuple(x[start : start + size] for x in pair.batch)
        for _ in range(max(1, particles // at_once)):
            yield Draws(pair.model, pair.guide, batch, at_once)


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat([value.double().flatten() for value in values]).mean()) if values else math.nan

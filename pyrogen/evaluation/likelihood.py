"""The log-likelihood of observations by importance sampling."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.running import ROWS, Prepared, groups, pair_passes, parts, prepared
from pyrogen.inference.terms import Terms, run_programs
from pyrogen.inference.tracing import Traced
from pyrogen.networks.mlp import as_shape

__all__ = [
    "ImportanceSampling",
    "bits_per_dimension",
    "checked_weights",
    "error_and_size",
    "importance_sampling",
    "log_likelihood",
]


@dataclass(frozen=True, eq=False)
class ImportanceSampling:
    """Estimated log-likelihoods of B observations, and how far they can be trusted.

    Attributes:
        log_likelihood: In nats, ``(B,)``.
        standard_error: Of each of these, in nats, ``(B,)``; NaN for one particle.
        effective_sample_size: How many equally weighted draws the particles are worth, ``(B,)``, between 1 and K; with
            global sites, how many draws of these.
        particles: Number K of draws for each observation.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    particles: int

    def __str__(self) -> str:
        return (
            f"log-likelihood {self.log_likelihood.mean():.3f} nats, the mean over {len(self.log_likelihood)} "
            f"observations; with {self.particles} particles, median standard error "
            f"{self.standard_error.median():.3f} nats and effective sample size "
            f"{self.effective_sample_size.median():.1f}"
        )


@checked(but=("x",))
def importance_sampling(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    particles: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
) -> ImportanceSampling:
    r"""Estimate the log-likelihood of each observation with the guide as the proposal.

    .. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k, \quad
        w_k = \frac{p(x, z_k \mid \theta_k)}{q(z_k \mid x, \theta_k)}, \quad z_k \sim q(z \mid x, \theta_k)

    The mean of the weights is unbiased, so its logarithm is too low by about half the squared standard error
    (Burda, Grosse & Salakhutdinov 2016, 1509.00519). The standard error is the delta method's: the standard deviation
    of the normalised weights :math:`w_k / \bar w` over :math:`\sqrt K`. It cannot show what the guide never proposes;
    Pareto k̂ (:func:`~pyrogen.to_arviz`) warns of that. The effective sample size is
    :math:`(\sum_k w_k)^2 / \sum_k w_k^2`.

    With global sites, :math:`\theta_k \sim q(\theta)` is drawn up to 100 times and shared by the particles of one
    draw, and no divergence of q(θ) counts: what is estimated is the logarithm of the predictive density of each
    observation under the guide's θ, :math:`\log \int q(\theta) \, p(x \mid \theta) \, d\theta`. Errors are then
    those between draws of θ.

    Args:
        model, guide: Programs; a model without latent sites needs no guide, and its log-likelihood is exact.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        particles: Number K of draws for each observation.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once; memory is bounded by it, for the sums
            over particles are accumulated and weights never kept.
        compile: Trace the programs once and run a compiled graph, which takes 5 to 30 seconds and gives the same up to
            rounding. What can't be traced, and programs with global sites, runs as it is.

    Returns:
        Log-likelihoods with standard errors, of shape ``(B,)``, in nats.

    Raises:
        ValueError: If the guide has a point mass at a per-observation site, or programs and observations do not fit.
        NoDensityError: A ``ValueError`` that names the implicit sites: with one in the guide, use
            :func:`~pyrogen.evaluation.annealed_importance_sampling`, or an :func:`explicit_guide` fitted afterwards;
            with one in the model there is no log p(x, z).
        ArithmeticError: If a weight is NaN; it names the site where that began.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> importance_sampling(toy.model, guide, toy.x[:5], particles=10).log_likelihood.shape
        torch.Size([5])
    """
    with prepared(model, guide, x, seed=seed, particles=particles, rows=rows) as pair:
        pair.need_density("a log-likelihood by importance sampling")
        return _accumulate(pair, particles, rows, Traced(model, guide, compile=compile and not pair.has_global))


@checked(but=("x",))
def log_likelihood(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    particles: int = 1000,
    *,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
) -> Tensor:
    r"""Estimate the log-likelihood of each observation in nats, ``(B,)``.

    .. math:: \log p(x) \approx \log \frac{1}{K} \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)}, \quad
        z_k \sim q(z \mid x)

    :func:`importance_sampling` takes the same arguments, says more, and has the details. A guide or a model with
    implicit sites is refused.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> log_likelihood(toy.model, guide, toy.x[:5], 10).shape
        torch.Size([5])
    """
    found = importance_sampling(model, guide, x, particles=particles, seed=seed, rows=rows, compile=compile)
    return found.log_likelihood


@checked()
def bits_per_dimension(
    log_likelihood: Tensor, event_shape: int | Sequence[int], *, levels: int | None = None
) -> Tensor:
    r"""Log-likelihoods in nats as bits for each of an observation's D values; less is better.

    .. math:: -\frac{\log p(x)}{D \log 2} \; (+ \log_2 L)

    Args:
        log_likelihood: In nats, of any shape.
        event_shape: The shape of an observation, or its length D.
        levels: Where log p is a density of values in [0, 1] that stand for one of L levels, such as dequantised pixels,
            the number L; each level is 1 / L wide. Not for likelihoods of the levels themselves, whose log p is that of
            a probability (:class:`~pyrogen.distributions.QuantizedNormal`).

    Raises:
        ValueError: If there are no values, or fewer than 2 levels.

    Example:
        >>> bits_per_dimension(torch.tensor(-784 * math.log(2)), (1, 28, 28))
        tensor(1.)
        >>> bits_per_dimension(torch.tensor(0.0), (3, 32, 32), levels=256)
        tensor(8.)
    """
    if not log_likelihood.is_floating_point():
        raise ValueError(f"expected log_likelihood in nats, floating numbers, got {log_likelihood.dtype}")
    size = math.prod(as_shape(event_shape))
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return -log_likelihood / (size * math.log(2)) + (0.0 if levels is None else math.log2(levels))


def _accumulate(pair: Prepared, particles: int, rows: int, traced: Traced) -> ImportanceSampling:
    # In double precision and on the CPU, since not every accelerator has doubles.
    log_sum = torch.full((len(pair.batch[0]),), -math.inf, dtype=torch.float64)
    log_squares, units, like = log_sum.clone(), 0, pair.batch[0]
    for part, copies, like in _log_weights(pair, particles, rows, traced):
        log_w = like.double().cpu()
        log_mass = torch.logsumexp(log_w, 0)
        if pair.has_global:
            # Particles that share θ are not independent; their mean is the unit whose spread is measured.
            log_unit = log_mass - math.log(copies)
            squares, fresh = 2 * log_unit + math.log(copies), 1
        else:
            squares, fresh = torch.logsumexp(2 * log_w, 0), copies
        log_sum[part] = torch.logaddexp(log_sum[part], log_mass)
        log_squares[part] = torch.logaddexp(log_squares[part], squares)
        units += fresh if part.start == 0 else 0
    log_mean = log_sum - math.log(particles)
    error, size = error_and_size(log_mean, log_squares - math.log(particles), units)
    values, errors, sizes = (value.to(like.dtype).to(like.device) for value in (log_mean, error, size))
    return ImportanceSampling(values, errors, sizes, particles)


def _log_weights(pair: Prepared, particles: int, rows: int, traced: Traced) -> Iterator[tuple[slice, int, Tensor]]:
    """Pass by pass its rows, how many copies of them, and log-weights ``(K, B)``."""
    if pair.has_global:
        for part, copies, terms in pair_passes(pair, particles, rows, copies=pair.copies_of(particles)):
            yield part, copies, checked_weights(terms)
        return
    for copies in groups(particles, rows):
        for part in parts(len(pair.batch[0]), copies, rows):
            batch = tuple(x[part] for x in pair.batch)
            run = partial(run_programs, pair.model, pair.guide, particles=copies)
            (log_w,) = traced(lambda *few, run=run: [run(few).log_weights], *batch, kind=copies)
            if torch.isnan(log_w).any():
                raise _nan_weight(run(batch))
            yield part, copies, log_w


def error_and_size(log_mean: Tensor, log_mean_square: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Of the logarithm of a mean of weights the delta method's standard error, and the effective sample size."""
    spread = (log_mean_square - 2 * log_mean).exp()
    variance = (spread - 1).clamp(min=0) / (units - 1) if units > 1 else torch.full_like(spread, math.nan)
    return variance.sqrt(), units / spread


def checked_weights(terms: Terms) -> Tensor:
    """The log-weights, ``(K, B)``; an ``ArithmeticError`` that says where it began, if one is NaN."""
    if torch.isnan(terms.log_weights).any():
        raise _nan_weight(terms)
    return terms.log_weights


def _nan_weight(terms: Terms) -> ArithmeticError:
    return ArithmeticError(
        f"an importance weight is NaN; it began at {terms.origin_of_nan()}. The parameters of model or guide are "
        "not finite, or their distributions overflow there"
    )

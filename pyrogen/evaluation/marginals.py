"""The aggregate posterior: how far it is from the prior, and how much a latent says of its observation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.aggregate import aggregated
from pyrogen.evaluation.errors import check_not_negative, standard_error, with_error
from pyrogen.evaluation.running import ROWS

__all__ = ["MarginalKL", "marginal_kl", "mutual_information"]

KNOWN = 1e-5
"""The least share of q(z) that is taken to come from others than a draw's own posterior."""


@dataclass(frozen=True)
class MarginalKL:
    """The rate of a guide in two parts, in nats: rate = mutual_information + marginal_kl.

    Attributes:
        rate: E KL(q(z|x) ‖ p(z)).
        mutual_information: Of observation and latents, E KL(q(z|x) ‖ q(z)); between 0 and log N.
        marginal_kl: KL(q(z) ‖ p(z)).
        mutual_information_error, marginal_kl_error: Standard errors over the samples; NaN for one.
        excess: By how much at most the divergence is larger, and the mutual information smaller, than of any number of
            observations, on average over these; NaN for one observation.
        observations: Number N of the observations that q(z) is the aggregate of.
        samples: Over how many draws of z the three are averaged.
    """

    rate: float
    mutual_information: float
    marginal_kl: float
    mutual_information_error: float
    marginal_kl_error: float
    excess: float
    observations: int
    samples: int

    def __str__(self) -> str:
        unknown = "and of one observation it is not known how much of it is for want of more"
        excess = unknown if math.isnan(self.excess) else f"up to {self.excess:.3f} of it for want of more"
        information = with_error(self.mutual_information, self.mutual_information_error)
        return (
            f"rate {self.rate:.3f} nats: mutual information {information} (at most log N = "
            f"{math.log(self.observations):.3f}) and marginal KL "
            f"{with_error(self.marginal_kl, self.marginal_kl_error)}, {excess}; {self.observations} observations, "
            f"{self.samples} samples"
        )


@checked()
def marginal_kl(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> MarginalKL:
    r"""Part the rate into mutual information and marginal divergence, by the mixture of all N posteriors.

    .. math:: \underbrace{\operatorname{E} \log \frac{q(z \mid x)}{p(z)}}_{\text{rate}}
        = \underbrace{\operatorname{E} \log \frac{q(z \mid x)}{q(z)}}_{\text{mutual information}}
        + \underbrace{\operatorname{E} \log \frac{q(z)}{p(z)}}_{\operatorname{KL}(q(z) \| p(z))}, \quad
        q(z) = \frac{1}{N} \sum_{n=1}^{N} q(z \mid x_n)

    of all per-observation latent sites together. Each sample is a draw of q(z|x) for an observation chosen at random,
    and q(z) at it is the exact sum over all N. Hoffman & Johnson 2016, *ELBO surgery*. Where no site of the guide
    depends on another, the guide sees each observation once, and what takes time are the M N densities alone.

    It is the aggregate of *these* observations: with few of them in many dimensions each draw is known by its own
    posterior, the mutual information is close to its largest value log N, and the divergence too large. Without a
    draw's own posterior it would be too small, so that on average that of the aggregate of all data is between

    .. math:: \operatorname{E} \log \frac{q_{-n}(z)}{p(z)} \le \operatorname{KL} \le
        \operatorname{E} \log \frac{q(z)}{p(z)}, \quad z \sim q(z \mid x_n), \quad
        q_{-n}(z) = \frac{1}{N - 1} \sum_{m \ne n} q(z \mid x_m);

    ``excess`` is the width of that, and what is lacking in the mutual information at most.

    With global sites, one draw of these from the guide is held throughout.

    Args:
        model, guide: Programs.
        x: Observations ``(N, *event_shape)``, or a tuple of tensors that the programs take.
        samples: Number M of draws of z. The densities of all are taken under all N posteriors.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many pairs of a draw and an observation go through the guide at once; memory is bounded by it.

    Raises:
        NoDensityError: A ``ValueError``: if a per-observation site of guide or model is implicit, or has a density that
            is an estimate.
        ValueError: If the guide has a point mass or a helper site, a site is masked, the prior is not the same for all
            observations, or programs and observations do not fit.
        ArithmeticError: If, by more than five standard errors, one of both is below 0 or the mutual information above
            log N; so that of what is returned :math:`0 \le I \le \log N` and rate − log N ≤ KL(q(z) ‖ p(z)) ≤ rate
            hold up to chance. Otherwise densities are not those of the draws.

    Example:
        >>> import torch
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> found = marginal_kl(toy.model, guide, toy.x[:100], samples=50)
        >>> abs(found.rate - found.mutual_information - found.marginal_kl) < 1e-4
        True
    """
    check_counts(samples=samples)
    with aggregated(model, guide, x, seed=seed, rows=rows) as aggregate:
        for need in (aggregate.need_posterior_density, aggregate.need_prior_density):
            need("a mixture of posteriors", "held_out_marginal_kl_estimate estimates the divergence by a critic")
        chosen = aggregate.choose(samples)
        aggregate.check_common_prior(chosen)
        z = aggregate.posterior(chosen)
        own, of_all, prior = aggregate.own_log_prob(z, chosen), aggregate.log_prob(z), aggregate.prior_log_prob(z)
        information, divergence = own - of_all, of_all - prior
        found = MarginalKL(
            float((own - prior).mean()),
            float(information.mean()),
            float(divergence.mean()),
            float(standard_error(information)),
            float(standard_error(divergence)),
            float(_excess(own, of_all, aggregate.observations).mean()),
            aggregate.observations,
            samples,
        )
    _check_bounds(found)
    return found


@checked()
def mutual_information(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> float:
    """How many nats a latent says of its observation, among these; :func:`marginal_kl` has the details.

    Example:
        >>> import torch
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> 0 < mutual_information(toy.model, guide, toy.x[:100], samples=50) < math.log(100)
        True
    """
    return marginal_kl(model, guide, x, samples=samples, seed=seed, rows=rows).mutual_information


def _excess(own: Tensor, of_all: Tensor, observations: int) -> Tensor:
    """log q(z) − log q₋ₙ(z) of each draw, at most about 11 nats; NaN for one observation."""
    if observations == 1:
        return torch.full_like(of_all, math.nan)
    share = (own - of_all).exp() / observations
    return math.log((observations - 1) / observations) - torch.log1p(-share.clamp(max=1 - KNOWN))


def _check_bounds(found: MarginalKL) -> None:
    """Raise an ``ArithmeticError`` outside of 0 ≤ I ≤ log N or of rate − log N ≤ KL ≤ rate. The rate is that of the
    same draws, so that both say the same of I, and only KL ≥ 0 is left."""
    information, error = found.mutual_information, found.mutual_information_error
    most = math.log(found.observations)
    no_divergence = "no divergence is negative"
    check_not_negative("the mutual information", information, error, found.samples, no_divergence)
    check_not_negative("the marginal KL", found.marginal_kl, found.marginal_kl_error, found.samples, no_divergence)
    check_not_negative(
        f"log N = {most:.3f} less the mutual information of {information:.3f} nats",
        most - information,
        error,
        found.samples,
        "each posterior is one of the N that q(z) is the mixture of, so rate − log N ≤ KL(q(z) ‖ p(z))",
    )

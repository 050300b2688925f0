"""Rate and distortion: the two halves of the bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.running import ROWS, pair_passes, prepared

__all__ = ["RateDistortion", "rate_distortion"]


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The rate and the distortion of B observations.

    Attributes:
        rate: KL(q(z|x) ‖ p(z)) in nats, ``(B,)``; NaN where the guide has a point mass, or guide or prior an implicit
            site.
        distortion: −E log p(x|z) in nats, ``(B,)``; NaN with an implicit likelihood.
        global_rate: KL(q(θ) ‖ p(θ)) of the global sites in nats, for the whole data set; 0 without such
            sites, NaN where the guide has a point mass or a side is implicit.
    """

    rate: Tensor
    distortion: Tensor
    global_rate: float = 0.0

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound −(rate + distortion) of each observation, ``(B,)``, without the global rate."""
        return -(self.rate + self.distortion)

    def __str__(self) -> str:
        return (
            f"rate {self.rate.mean():.3f}, distortion {self.distortion.mean():.3f}, ELBO {self.elbo.mean():.3f} nats, "
            f"means over {len(self.rate)} observations"
        )


@checked()
def rate_distortion(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    particles: int = 16,
    seed: int = 0,
    rows: int = ROWS,
) -> RateDistortion:
    r"""Split the evidence lower bound of each observation into what the latents cost and what they leave unsaid.

    .. math:: R(x) = \operatorname{KL}(q(z \mid x) \| p(z)), \quad
        D(x) = -\mathbb{E}_{q(z \mid x)} \log p(x \mid z), \quad \text{ELBO} = -R - D \le \log p(x)

    The rate is the closed form where there is one and guide and model draw their sites in the same order, else the
    mean over particles of log q − log p. Alemi et al. 2018, *Fixing a broken ELBO*, 1711.00464.

    With global sites both are means over θ ~ q(θ), and the ELBO, without the divergence of q(θ), bounds what
    :func:`~pyrogen.evaluation.importance_sampling` estimates: the log predictive density of each observation.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        particles: Number of draws for each observation, over which both are averaged.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        Rates and distortions, of shape ``(B,)``, in nats. Where the guide has a point mass at a per-observation site
        the rate, and with it the ELBO, is not defined: NaN. Where guide or prior have an implicit site it is defined
        but not known: NaN too, for a critic could only estimate it; see :func:`held_out_rate_estimate
        <pyrogen.evaluation.held_out_rate_estimate>`.

    Raises:
        ValueError: If programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> result = rate_distortion(toy.model, guide, toy.x[:5])
        >>> bool((result.elbo == -result.rate - result.distortion).all())
        True
    """
    with prepared(model, guide, x, seed=seed, particles=particles, rows=rows) as pair:
        rate, distortion, global_rate = None, None, 0.0
        for part, copies, terms in pair_passes(
            pair, particles, rows, copies=pair.copies_of(particles), closed_form=True
        ):
            if rate is None or distortion is None:
                known = [*terms.log_likelihoods.values(), *terms.ratios.values(), *pair.batch]
                rate = known[0].new_zeros(len(pair.batch[0]))
                distortion = torch.zeros_like(rate)
            for ratio in terms.ratios.values():
                rate[part] += ratio.sum(0) / particles
            for log_likelihood in terms.log_likelihoods.values():
                distortion[part] -= log_likelihood.sum(0) / particles
            if part.start == 0:
                share = copies / particles
                global_rate += share * sum(float(ratio) for ratio in terms.global_ratios.values())
        assert rate is not None and distortion is not None  # there is at least one row
        if not pair.has_rate:
            rate = torch.full_like(rate, torch.nan)
        if pair.implicit_likelihood:
            distortion = torch.full_like(distortion, torch.nan)
        if not pair.has_global_rate:
            global_rate = torch.nan
        return RateDistortion(rate, distortion, global_rate)

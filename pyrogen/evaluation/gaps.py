"""The inference gap: what the bound loses by the guide's family, and what by one encoder for all observations."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrogen.arguments import check_counts, check_positive, checked
from pyrogen.evaluation.likelihood import checked_weights
from pyrogen.evaluation.running import ROWS, Prepared, pair_passes, parts, prepared
from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.terms import run_programs
from pyrogen.inference.turns import seeded

__all__ = ["InferenceGap", "inference_gap"]


@dataclass(frozen=True, eq=False)
class InferenceGap:
    """Two bounds on the log-likelihoods of B observations; all are ``(B,)``, in nats.

    Attributes:
        log_likelihood: log p(x), estimated.
        optimised: The evidence lower bound of the best q that was found for each observation.
        amortised: That of the guide's q.
    """

    log_likelihood: Tensor
    optimised: Tensor
    amortised: Tensor

    @property
    def approximation(self) -> Tensor:
        """log p(x) less the best bound: what the family can't express."""
        return self.log_likelihood - self.optimised

    @property
    def amortization(self) -> Tensor:
        """The best bound less the guide's: what the encoder does not find."""
        return self.optimised - self.amortised

    def __str__(self) -> str:
        approximation, amortization = self.approximation.mean(), self.amortization.mean()
        return (
            f"inference gap {approximation + amortization:.3f} nats: approximation {approximation:.3f}, amortization "
            f"{amortization:.3f}; means over {len(self.amortised)} observations"
        )


@checked(but=("guide",))
def inference_gap(
    model: Callable,
    guide: AmortizedGuide,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = 500,
    learning_rate: float = 0.02,
    particles: int = 1000,
    gradient_particles: int = 8,
    seed: int = 0,
    rows: int = ROWS,
) -> InferenceGap:
    r"""Part the gap between log-likelihood and evidence lower bound into what family and encoder are to blame for.

    .. math:: \log p(x) - \operatorname{ELBO}[q_{\text{guide}}] =
        \underbrace{\log p(x) - \operatorname{ELBO}[q^*]}_{\text{approximation}} +
        \underbrace{\operatorname{ELBO}[q^*] - \operatorname{ELBO}[q_{\text{guide}}]}_{\text{amortization}}

    q* is found for each observation on its own. What the encoder says of it, its *features*, becomes a free vector, and
    a copy of the guide's conditional distributions is trained beside these vectors; Adam takes both from where they are
    to the best bound, by gradients with q's parameters held ("sticking the landing"). q* is the best q of the family
    where features can reach every parameter of it, as those of :class:`~pyrogen.distributions.Normal` if they are as
    many; otherwise, as with flows, whose weights stay common to the observations, it is a good one, and the
    approximation gap an upper bound. The log-likelihood is by importance sampling from q*, and has its error. Cremer,
    Li & Duvenaud 2018, *Inference suboptimality in variational autoencoders*, 1801.03558.

    Args:
        model: A program.
        guide: An :class:`~pyrogen.inference.AmortizedGuide`.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        steps: Steps of Adam, whose rate falls to 0 as a half cosine.
        learning_rate: At the first step.
        particles: Draws for each observation in the three figures.
        gradient_particles: Draws for each observation in a step.
        seed: Of all draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Raises:
        NoDensityError: A ``ValueError``: for implicit sites.
        TypeError: For a guide without an encoder of its own.
        ValueError: For a point mass, a number below 1, or programs and observations that do not fit.
        ArithmeticError: If a weight is NaN; it names the site where that began.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, nn.Linear(4, 8))
        >>> gap = inference_gap(toy.model, guide, toy.x[:5], steps=5, particles=10)
        >>> gap.approximation.shape, gap.amortization.shape
        (torch.Size([5]), torch.Size([5]))
    """
    if not isinstance(guide, AmortizedGuide):
        raise TypeError(f"expected an AmortizedGuide, whose encoder can be set aside, got a {type(guide).__name__}")
    check_counts(steps=steps, gradient_particles=gradient_particles)
    check_positive(learning_rate=learning_rate)
    with prepared(model, guide, x, seed=seed, particles=particles, rows=rows) as pair:
        pair.need_density("an inference gap")
        if pair.has_global:
            raise ValueError(
                "an inference gap is of one observation given the model's global latent sites, which it has; make them "
                "parameters of the model"
            )
        found = []
        for few in parts(len(pair.batch[0]), gradient_particles, rows):
            part = replace(pair, batch=tuple(tensor[few] for tensor in pair.batch))
            best = replace(part, guide=_optimised(part, guide, steps, learning_rate, gradient_particles))
            log_likelihood, optimised = _figures(best, particles, rows, seed)
            _, amortised = _figures(part, particles, rows, seed)
            found.append((log_likelihood, optimised, amortised))
        return InferenceGap(*(torch.cat(each) for each in zip(*found, strict=True)))


class _Free(nn.Module):
    """An encoder that knows the features of each row of one batch, and of no other."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.features


def _optimised(
    pair: Prepared, guide: AmortizedGuide, steps: int, learning_rate: float, particles: int
) -> AmortizedGuide:
    """The guide with the features of each observation, and its conditional distributions, at the best bound."""
    made = copy.deepcopy(guide)
    made.encoder = _Free(guide.encoder(*pair.batch).flatten(1).detach().clone())
    free = [*made.encoder.parameters()]
    shared = [parameter for name, parameter in made.named_parameters() if not name.startswith("encoder.")]
    groups: list[dict[str, Any]] = [{"params": free}, {"params": shared, "lr": 0.1 * learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.enable_grad():
            terms = run_programs(pair.model, made, pair.batch, particles, frozen_guide=True)
            gradients = torch.autograd.grad(-terms.log_weights.mean(0).sum(), [*free, *shared], allow_unused=True)
        for parameter, gradient in zip([*free, *shared], gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    return made


def _figures(pair: Prepared, particles: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The log-likelihood by importance sampling and the evidence lower bound, ``(B,)`` each, of the same draws."""
    count = len(pair.batch[0])
    log_sum, total = torch.full((count,), -math.inf, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    with seeded(seed, pair.batch[0].device):
        for _, _, terms in pair_passes(pair, particles, rows, copies=max(1, rows // count)):
            log_w = checked_weights(terms).double().cpu()
            log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
            total += log_w.sum(0)
    like = pair.batch[0] if pair.batch[0].is_floating_point() else torch.zeros(())
    return (log_sum - math.log(particles)).to(like), (total / particles).to(like)

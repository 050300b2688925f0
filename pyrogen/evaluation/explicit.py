"""An explicit guide for a model that is already fitted: a proposal for importance sampling where the guide has none."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyrogen.arguments import check_counts, checked
from pyrogen.distributions import MultivariateNormal, Normal, Vamp
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.programs import (
    clear_gradients,
    evaluation_mode,
    global_draws,
    modules_of,
    trace_of,
    unregistered,
)
from pyrogen.inference.terms import compare_sites, nothing, trace_programs
from pyrogen.networks.mlp import MLP, as_shape

__all__ = ["Proposal", "explicit_guide"]

CORRELATED = 64
"""Up to how many values of a site the proposal has a full covariance, whose parameters grow as their square."""

BATCH = 64
PARTICLES = 8
LEARNING_RATE = 3e-3
GRADIENT_CLIP = 100.0


class Proposal(nn.Module):
    r"""The family of :func:`explicit_guide`: normal, with full covariance up to 64 values.

    Args:
        features: Event shape, or its length.
        context: Width of the context, or 0.

    Example:
        >>> Proposal(3, context=5)(torch.zeros(7, 5)).batch_shape
        torch.Size([7])
    """

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        family = MultivariateNormal if 1 < math.prod(as_shape(features)) <= CORRELATED else Normal
        self.normal = family(features, context)

    def forward(self, context: Tensor | None = None) -> Any:
        return self.normal(context)


@checked()
def explicit_guide(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = 300,
    seed: int = 0,
    rows: int = ROWS,
) -> nn.Module:
    r"""Fit a guide with a density to a frozen model, for what needs log q(z|x) where the model's own guide has none.

    .. math:: \max_\phi \; \frac{1}{B} \sum_i \mathbb{E} \log \frac{1}{8} \sum_{k=1}^{8}
        \frac{p(x_i, z_{k,i})}{q_\phi(z_{k,i} \mid x_i)}, \quad z_{k,i} \sim q_\phi(z \mid x_i)

    An :class:`~pyrogen.inference.AmortizedGuide` with normal distributions, of full covariance up to 64 values, on a
    copy of the guide's encoder, or on a multilayer perceptron where the guide is no ``AmortizedGuide``. It is trained
    by the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, 1509.00519), whose optimum covers the
    posterior as a proposal has to, by Adam on minibatches of 64 rows. Global sites are still drawn from ``guide``.

    It is fitted to the very observations that are then evaluated. That is legitimate for importance sampling: the
    weights' mean is an unbiased estimate of p(x) for every proposal that does not depend on the draws it is made of,
    and the proposal may well depend on x. A proposal that fits badly makes the estimate of log p(x) noisy and low, not
    high; standard error and effective sample size say how noisy.

    Model and guide stay as they are, with their buffers, gradients and modes, and so does the caller's random state.

    Args:
        model, guide: Programs; sites of the guide may be implicit, those of the model not.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        steps: Steps of Adam, whose learning rate falls from 0.003 to 0 as a half cosine.
        seed: Of the weights, draws and minibatches.
        rows: How many rows, copies counted, go through the programs at once, if fewer than 512.

    Returns:
        A program with the guide's latent sites, in evaluation mode.

    Raises:
        NoDensityError: If the model has an implicit site: then there is no log p(x, z).
        ValueError: If ``steps`` is below 1, the model has no per-observation latent site, or programs and observations
            do not fit.
        ArithmeticError: If more than half of the steps have a gradient that is not finite; it names the site where that
            began.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.distributions import Implicit
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, nn.Linear(4, 8), Implicit)
        >>> explicit = explicit_guide(toy.model, guide, toy.x[:5], steps=10)
        >>> explicit(toy.x[:5])["z"].shape
        torch.Size([5, 2])
    """
    check_counts(steps=steps)
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        pair.need_joint_density("an explicit guide")
        if not pair.local:
            raise ValueError("the model has no per-observation latent site, so there is nothing to guide explicitly")
        made = _built(pair, model, guide)
        fitted = made if len(pair.local) == len(pair.latents) else _AtGlobals(made, pair.guide)
        with evaluation_mode(model, guide), torch.enable_grad():
            _fit(pair, fitted, steps, max(1, min(BATCH, rows // PARTICLES)))
        return fitted.eval()


class _AtGlobals(nn.Module):
    """A guide whose global sites are another guide's draws."""

    def __init__(self, explicit: AmortizedGuide, of_globals: Callable) -> None:
        super().__init__()
        self.explicit = explicit
        self._of_globals = [of_globals]  # in a list, outside the module tree: nothing of it is this one's

    def forward(self, *batch: Tensor) -> Any:
        with torch.no_grad(), poutine.block():
            held = global_draws(trace_of(self._of_globals[0], *batch))
        return poutine.replay(self.explicit, trace=held)(*batch)


class _Rows(nn.Module):
    """An encoder for any tensors: their rows side by side, through a multilayer perceptron."""

    def __init__(self, width: int, features: int = 128) -> None:
        super().__init__()
        self.width = width
        self.features = features
        self.network = MLP(width, features)

    def forward(self, *batch: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return self.network(torch.cat([x.reshape(len(x), -1).to(dtype) for x in batch], -1))


def _built(pair: Prepared, model: Callable, guide: Callable | None) -> AmortizedGuide:
    example = tuple(x[:2] for x in pair.batch)
    like = next((x for x in pair.batch if x.is_floating_point()), torch.zeros(()))
    if isinstance(guide, AmortizedGuide):
        encoder = copy.deepcopy(guide.encoder).requires_grad_(True)
    else:
        encoder = _Rows(sum(x[0].numel() for x in pair.batch)).to(like.device, like.dtype)
    priors = {part: part._posterior for root in modules_of(model) for part in root.modules() if isinstance(part, Vamp)}
    try:
        made = AmortizedGuide(model if isinstance(model, nn.Module) else pair.model, encoder, Proposal, example=example)
    finally:
        for prior, posterior in priors.items():  # a new guide takes them over, and the model would be another
            prior.bind(posterior)  # type: ignore[arg-type]
    return made.to(like.device, like.dtype)


def _fit(pair: Prepared, guide: nn.Module, steps: int, size: int) -> None:
    """Train a guide in place; gradients are taken for its own parameters alone, so that the model gets none.

    Early proposals may be so bad that a weight overflows; such a step is left out, up to half of them.
    """
    model, program = unregistered(pair.model), unregistered(guide)
    parameters = [*guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    guide.train()
    left_out = 0
    for _ in range(steps):
        chosen = torch.randint(len(pair.batch[0]), (size,), device=pair.batch[0].device)
        traces = trace_programs(model, program, tuple(x[chosen] for x in pair.batch), PARTICLES)
        # What the global sites say of each other is no matter of this guide's.
        terms = compare_sites(traces, estimates=nothing(traces, pair.implicit_global))
        loss = math.log(PARTICLES) - torch.logsumexp(terms.log_weights, 0).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)):
            optimizer.step()
        elif (left_out := left_out + 1) > steps // 2:
            raise ArithmeticError(f"the loss of the explicit guide is NaN; it began at {terms.origin_of_nan()}")
        schedule.step()
    clear_gradients(parameters)

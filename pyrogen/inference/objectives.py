r"""Objectives for explicit guides: the evidence lower bound and its relatives.

Each is a ``pyro.infer.ELBO``: it goes into ``pyro.infer.SVI(model, guide, optim, loss=objective)``, and as a module
``objective(model, guide)(x)`` returns the loss. Losses are in nats per observation. With K particles each row of the
batch is copied K times, and the log-weights

.. math:: \log w_{k,i} = \log p(x_i, z_{k,i} \mid \theta) - \log q(z_{k,i} \mid x_i, \theta),
          \quad \theta \sim q(\theta)

have shape ``(K, B)``; whatever is done over particles is done per observation. Global sites θ are drawn once and add
their divergence, divided by the number N of observations in the whole data set:

.. math:: \mathcal{L} = -\frac{1}{B} \sum_i b(w_{\cdot,i}) + \frac{1}{N} \operatorname{KL}(q(\theta) \| p(\theta))

so that the expected loss of a minibatch is that of the whole data set.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from pyrogen.arguments import as_weight, check_are, check_counts
from pyrogen.inference.batches import as_batch
from pyrogen.inference.divergences import kl_by_dimension
from pyrogen.inference.programs import data_frame, per_row, rehearsal, row_axis, unregistered
from pyrogen.inference.terms import Terms, run_programs

__all__ = ["ELBO", "IWAE", "Estimate", "Objective", "ObjectiveModule", "Renyi"]


@dataclass(frozen=True)
class Estimate:
    """One evaluation of an objective: the loss to be differentiated, figures to be logged, and where they come from."""

    loss: Tensor
    metrics: dict[str, Tensor]
    terms: Terms | None
    of_program: Tensor | None = None
    """Of the loss what the program minimises, where critics have a part in it."""


class ObjectiveModule(nn.Module):
    """An objective with its two programs; its call takes a batch and returns the loss in nats per observation.

    Parameters of programs stay in a store of their own, never in Pyro's global one.
    """

    def __init__(self, model: Callable, guide: Callable | None, objective: "Objective") -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self.elbo = objective
        self.critics = objective.critics
        self._programs = unregistered(model), unregistered(guide)
        self._store: Any = {"params": {}, "constraints": {}}
        self.latest: Estimate | None = None

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, that of critics included; ``latest`` then holds the whole :class:`Estimate`."""
        with pyro.get_param_store().scope(self._store):
            self.latest = self.elbo.estimate(*self._programs, *as_batch(batch))
        return self.latest.loss

    def critic_loss(self, *batch: Tensor) -> Tensor:
        """What the critics alone minimise, see :meth:`CriticObjective.critic_loss`."""
        with pyro.get_param_store().scope(self._store):
            return self.elbo.critic_loss(*self._programs, *as_batch(batch))  # type: ignore[attr-defined]

    def bound(self, *batch: Tensor) -> Tensor:
        """The bound of each observation, see :meth:`Objective.bound`."""
        with pyro.get_param_store().scope(self._store):
            return self.elbo.bound(*self._programs, *as_batch(batch))


class Objective(pyro.infer.ELBO):
    """Base of the objectives with explicit guides; a sibling says what it makes of the log-weights.

    Args:
        particles: Number K of samples for each observation.
        observations: How many observations the whole data set has. Needed where a program has global sites, the data
            come in minibatches and the ``"data"`` plate is not a subsampling one; ``fit`` sets it.
    """

    schedules: ClassVar[tuple[str, ...]] = ()
    """The weights that may be schedules, from the number of the step to a number."""
    validates_as: ClassVar[str | None] = "validation"
    """What the mean of :meth:`bound` over validation data is called; None where there is no such thing."""
    uses_guide: ClassVar[bool] = True

    def __init__(self, particles: int = 1, *, observations: int | None = None) -> None:
        check_counts(particles=particles)
        check_counts(or_none=True, observations=observations)
        super().__init__(num_particles=particles)
        self.particles = particles
        self.observations = observations
        self.step = 0
        self.critics = nn.ModuleDict()
        self.critic_steps = 1
        self._held: Mapping[str, float | Tensor] = {}

    def scheduled(self) -> dict[str, float]:
        """The weights that follow a schedule, as they are at this step."""
        weights = {name: getattr(self, name) for name in self.schedules}
        return {name: float(weight(self.step)) for name, weight in weights.items() if callable(weight)}

    def weight_of(self, name: str) -> float | Tensor:
        """A weight as it is at this step, or as it is held."""
        weight = self._held.get(name, getattr(self, name))
        return weight(self.step) if callable(weight) else weight

    @contextmanager
    def held(self, weights: Mapping[str, float | Tensor]) -> Iterator[None]:
        """Within, weights that follow a schedule are these."""
        self._held = weights
        try:
            yield
        finally:
            self._held = {}

    def prepare(self, model: Callable, guide: Callable | None, *batch: Tensor) -> None:
        """See that the objective can serve these programs, and build what it needs beside them.

        Raises:
            ValueError: If it can't, such as at a site without a density.
        """
        self.check_guide(guide)
        with rehearsal(model, guide):
            self.estimate(model, guide, *batch)

    def check_guide(self, guide: Callable | None) -> None:
        """Raise a ``ValueError`` for a guide too many."""
        if guide is not None and not self.uses_guide:
            raise ValueError(f"{type(self).__name__} uses no guide; pass guide=None")

    def __call__(self, model: Callable, guide: Callable | None) -> ObjectiveModule:  # type: ignore[override]
        return ObjectiveModule(model, guide, self)

    def log_bound(self, log_weights: Tensor) -> Tensor:
        """From log-weights ``(K, B)`` to the bound of each observation ``(B,)``."""
        raise NotImplementedError(f"{type(self).__name__} must say what it makes of log-weights")

    def terms(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Terms:
        """Run both programs once on K copies of the batch."""
        return run_programs(model, guide, batch, self.particles, observations=self.observations)

    def bound(self, model: Callable, guide: Callable, *batch: Tensor) -> Tensor:
        """The bound on the log-likelihood of each observation in nats, ``(B,)``, as it stands: no β, no free bits."""
        terms = self.terms(model, guide, *batch)
        return self.log_bound(terms.log_weights) - terms.global_rate

    def loss_of(self, terms: Terms) -> Tensor:
        """The scalar that is minimised."""
        return terms.global_rate - self.log_bound(terms.log_weights).mean()

    def estimate(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Estimate:
        """The loss of a batch in nats per observation, with the figures that training logs."""
        terms = self.terms(model, guide, *batch)
        loss = self.loss_of(terms)
        if torch.is_grad_enabled():
            self.step += 1
        metrics = {
            "distortion": terms.distortion.detach(),
            "rate": terms.rate.detach(),
        }
        if terms.global_ratios:
            metrics["global_rate"] = terms.global_rate.detach()  # type: ignore[union-attr]
        return Estimate(loss, metrics, terms)

    def differentiable_loss(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Tensor:
        """The loss as a tensor, for ``pyro.infer`` and for optimizers of one's own."""
        return self.estimate(model, guide, *batch).loss

    def loss(self, model: Callable, guide: Callable, *batch: Tensor) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *batch: Tensor) -> float:
        """The loss as a number, its gradients added to the parameters; what ``pyro.infer.SVI`` calls.

        With critics it is their loss and the program's together. ``loss`` and the history of a fit have the program's.
        """
        loss = self.differentiable_loss(model, guide, *batch)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        terms = self.terms(model, guide, *args)
        return terms.model_trace, terms.guide_trace

    def __repr__(self) -> str:
        """The particles, and whatever else differs from its default."""
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            held = vars(self).get(f"{name}_", getattr(self, name, None))  # as loss_, where the name is a method's
            value, default = _in_words(held), _in_words(parameter.default)
            if name == "particles" or (name != "observations" and value != default):
                shown.append(f"{name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _in_words(value: Any) -> str:
    if isinstance(value, functools.partial):
        options = ", ".join(f"{name}={_in_words(option)}" for name, option in value.keywords.items())
        return f"partial({_in_words(value.func)}, {options})"
    return value.__name__ if isinstance(value, type) else repr(value)


class ELBO(Objective):
    r"""The evidence lower bound.

    .. math:: \mathcal{L} = -\mathbb{E}_{q(z|x)} \log p(x \mid z) + \beta \operatorname{KL}(q(z \mid x) \| p(z))

    The divergence of each site is the closed form where there is one and guide and model draw their sites in the same
    order, else the Monte Carlo estimate. Kingma & Welling 2014, 1312.6114.

    Args:
        particles: Number K of samples, over which the bound is averaged.
        beta: Weight of the rate: a number, or a schedule from the number of the step to one, such as
            :class:`~pyrogen.inference.LinearSchedule` (β-VAE: Higgins et al. 2017). Global sites keep weight one.
        free_bits: λ in nats; the rate becomes :math:`\sum_j \max(\lambda, \operatorname{KL}_j)` with the batch's mean
            divergence of each latent dimension, or of a whole site where its dimensions are not independent (Kingma
            et al. 2016, 1606.04934).
        sticking_the_landing: Evaluate log q with its parameters detached: gradients without the score term, whose
            variance vanishes at the exact posterior (Roeder et al. 2017, 1703.09194). Rates are then Monte Carlo. Not
            for guides with :class:`~pyrogen.distributions.SemiImplicit`.
        observations: See :class:`Objective`.

    Example:
        >>> ELBO(beta=0.5)
        ELBO(particles=1, beta=0.5)
    """

    schedules = ("beta",)

    def __init__(
        self,
        particles: int = 1,
        *,
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        sticking_the_landing: bool = False,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_are(float, free_bits=free_bits, beta=0.0 if callable(beta) else beta)
        check_are(bool, sticking_the_landing=sticking_the_landing)
        if free_bits < 0 or (not callable(beta) and beta < 0):
            raise ValueError(f"beta and free_bits cannot be negative, got beta={beta}, free_bits={free_bits}")
        if free_bits and sticking_the_landing:
            raise ValueError("free_bits needs expected divergences, sticking_the_landing samples them; choose one")
        self.beta = as_weight(beta)
        self.free_bits = as_weight(free_bits)
        self.sticking_the_landing = sticking_the_landing

    def log_bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def terms(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Terms:
        return run_programs(
            model,
            guide,
            batch,
            self.particles,
            observations=self.observations,
            closed_form=not self.sticking_the_landing,
            frozen_guide=self.sticking_the_landing,
        )

    def loss_of(self, terms: Terms) -> Tensor:
        beta = self.weight_of("beta")
        rate = self._free_rate(terms) if self.free_bits else terms.rate
        if isinstance(beta, (int, float)) and beta == 0.0:  # a point mass may have an infinite rate, and 0 · ∞ is not 0
            return terms.global_rate + terms.distortion
        return terms.global_rate + terms.distortion + beta * rate

    def _free_rate(self, terms: Terms) -> Tensor:
        rate = torch.zeros((), device=terms.log_likelihood.device)
        for name, ratio in terms.ratios.items():
            q: Any = terms.guide_trace.nodes[name]
            p: Any = terms.model_trace.nodes.get(name)
            kl = kl_by_dimension(q["fn"], p["fn"]) if terms.closed_form and p is not None else None
            groups = [ratio] if kl is None else [per_row(p, each) for each in kl.unbind(-1)]
            rate = rate + sum(group.mean().clamp(min=self.free_bits) for group in groups)
        return rate


class IWAE(Objective):
    r"""The importance-weighted bound, its logarithm of the mean taken for each observation.

    .. math:: \mathcal{L} = -\frac{1}{B} \sum_i \mathbb{E} \log \frac{1}{K} \sum_{k=1}^{K} w_{k,i}

    It rises with K from the ELBO (K = 1) to log p(x). With global sites θ it bounds, for one draw of θ,

    .. math:: \log p(X) \ge \mathbb{E}_{q(\theta)} \Big[ \sum_i \log \frac{1}{K} \sum_k w_{k,i}(\theta) \Big]
              - \operatorname{KL}(q(\theta) \| p(\theta)):

    only the per-observation sites are importance weighted, so for large K it is the bound of a guide that is exact at
    those. Burda, Grosse & Salakhutdinov 2016, 1509.00519.

    Args:
        particles: Number K of samples for each observation.
        gradient: ``"standard"``, or ``"doubly reparameterised"``: the guide's gradient becomes
            :math:`\sum_k \tilde w_k^2 \, \partial \log w_k / \partial z_k \cdot \partial z_k / \partial \phi`, unbiased
            too, whose signal does not vanish as K grows (Tucker et al. 2019, 1810.04152). Not for guides with
            :class:`~pyrogen.distributions.SemiImplicit`.
        observations: See :class:`Objective`.
    """

    def __init__(
        self,
        particles: int = 16,
        *,
        gradient: Literal["standard", "doubly reparameterised"] = "standard",
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        if gradient not in ("standard", "doubly reparameterised"):
            raise ValueError(f"gradient is 'standard' or 'doubly reparameterised', got {gradient!r}")
        self.gradient = gradient

    def log_bound(self, log_weights: Tensor) -> Tensor:
        return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))

    def terms(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Terms:
        if self.gradient == "standard":
            return super().terms(model, guide, *batch)
        draws = _WeightedDraws()
        terms = run_programs(
            model,
            guide,
            batch,
            self.particles,
            observations=self.observations,
            frozen_guide=True,
            through=draws,
        )
        draws.weigh(torch.softmax(terms.log_weights.detach(), 0))
        return terms


class Renyi(IWAE):
    r"""The variational Rényi bound of order α, per observation.

    .. math::
        \mathcal{L} = -\frac{1}{B} \sum_i \frac{1}{1 - \alpha} \mathbb{E} \log \frac{1}{K} \sum_k w_{k,i}^{1-\alpha}

    α = 0 is :class:`IWAE`; α → 1 is the :class:`ELBO`. Li & Turner 2016, 1602.02311.

    Args:
        alpha: The order, any number but 1.
        particles: Number K of samples for each observation.
        observations: See :class:`Objective`.
    """

    def __init__(self, alpha: float = 0.5, particles: int = 16, *, observations: int | None = None) -> None:
        super().__init__(particles, observations=observations)
        check_are(float, alpha=alpha)
        if alpha == 1:
            raise ValueError("the Rényi bound of order alpha=1 is the ELBO; use ELBO()")
        self.alpha = as_weight(alpha)

    def log_bound(self, log_weights: Tensor) -> Tensor:
        return super().log_bound((1 - self.alpha) * log_weights) / (1 - self.alpha)


class _WeightedDraws:
    """The draws of a guide, passed on unchanged, whose gradients are weighted on their way back.

    The weights are known only when the model has run on the draws, so each draw holds them by a hook.
    """

    def __init__(self) -> None:
        self.passed: list[tuple[Tensor, int]] = []

    def __call__(self, node: dict[str, Any]) -> Tensor:
        value = node["value"]
        if data_frame(node) is None or not value.requires_grad:
            return value
        passed = value.view_as(value)
        self.passed.append((passed, row_axis(node)))
        return passed

    def weigh(self, weights: Tensor) -> None:
        """Weight the gradient of every draw by ``(K, B)`` weights."""
        for passed, axis in self.passed:
            rows = weights.reshape(-1, *(1,) * (-axis - 1))
            passed.register_hook(lambda gradient, rows=rows: gradient * rows)

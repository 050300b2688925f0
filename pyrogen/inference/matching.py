r"""Objectives that match the aggregate posterior q(z) = E q(z | x) to the prior, and need no critic for it.

Each is a weighted sum of figures in nats per observation, from one run of both programs on a batch, to which global
sites add their explicit divergence as in :mod:`~pyrogen.inference.objectives`. All figures go to the log of a
training. What compares whole distributions is estimated from one batch, so it depends on the batch's size: these
objectives want batches of a hundred rows and more.
"""

import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyrogen.arguments import as_weight, check_are, is_finite, plain
from pyrogen.distributions.implicit import NoDensityError, is_implicit
from pyrogen.inference.draws import draw_only, elements, is_masked
from pyrogen.inference.kernels import InverseMultiquadraticKernel, Kernel, maximum_mean_discrepancy
from pyrogen.inference.objectives import Estimate, Objective
from pyrogen.inference.programs import data_frame, global_draws, observed_sites, per_row, sample_sites
from pyrogen.inference.terms import (
    Terms,
    Traces,
    compare_sites,
    has_no_density,
    local_sites,
    nothing,
    trace_programs,
    without_density,
)

__all__ = ["WAE", "InfoVAE", "Matching", "Parts", "check_unmasked", "check_weights"]

Parts = dict[str, tuple[float, Tensor]]
"""The figures of which a loss is made, by name: the weight and the mean over the batch."""


class Matching(Objective):
    """An objective that is a weighted sum; a sibling says of what. Its bound is the plain ELBO."""

    def log_bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean(0)

    def terms(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Terms:
        return self.compared(trace_programs(model, guide, batch, self.particles))

    def compared(self, traces: Traces) -> Terms:
        """What both programs say of each site."""
        return compare_sites(traces, observations=self.observations, closed_form=True)

    def parts(self, model: Callable, traces: Traces, terms: Terms) -> Parts:
        """The figures and their weights."""
        raise NotImplementedError(f"{type(self).__name__} must say of what its loss is made")

    def estimate(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Estimate:
        traces = trace_programs(model, guide, batch, self.particles)
        terms = self.compared(traces)
        parts = self.parts(model, traces, terms)
        # What has no weight is left out: a point mass may have an infinite rate, and 0 · ∞ is not 0.
        weighted = [weight * value for weight, value in parts.values() if weight]
        loss = torch.as_tensor(terms.global_rate, dtype=weighted[0].dtype, device=weighted[0].device)
        for value in weighted:
            loss = loss + value
        if torch.is_grad_enabled():
            self.step += 1
        metrics = {name: value.detach() for name, (_, value) in parts.items()}
        if terms.global_ratios:
            metrics["global_rate"] = terms.global_rate.detach()  # type: ignore[union-attr]
        return Estimate(loss, metrics, terms)


class WAE(Matching):
    r"""The Wasserstein auto-encoder, with the maximum mean discrepancy in latent space.

    .. math:: \mathcal{L} = \mathbb{E}_{q(z|x)} \, c(x, G(z))
              + \lambda \widehat{\operatorname{MMD}}^2(q(z), p(z))

    Tolstikhin et al. 2018, *Wasserstein auto-encoders*, 1711.01558 (WAE-MMD). The two samples are one draw of z for
    each observation and as many draws from the model's prior, all per-observation latent sites side by side, as the
    program has their values: a site on (0, ∞) is compared there. No latent site is asked for a density, so guide and
    prior may be implicit or point masses. A prior without reparameterised samples, such as
    :class:`~pyrogen.distributions.Vamp`, gets no gradient from the discrepancy.

    It is no bound on the log-likelihood, so there is no validation curve. A batch of one row has no unbiased
    discrepancy, and only its cost counts.

    Args:
        weight: λ. The authors' experiments have 10 on MNIST and 100 on CelebA, with squared errors that their code
            multiplies by 0.05.
        cost: c. By default −log p(x | z) in nats, for any model with a density there; ``"squared error"`` or
            ``"absolute error"`` between x and the mean of the likelihood, of an implicit one a draw, summed over the
            values of x, in units of the data.
        kernel: Such as :class:`~pyrogen.inference.InverseMultiquadraticKernel`, the default.
        particles: Number K of draws for each observation; cost and discrepancy are averaged over them.
        observations: See :class:`Objective`.

    Raises:
        ValueError: For a negative weight or an unknown cost; at the first step if the model has no per-observation
            latent site, or one that is masked.

    Example:
        >>> from pyrogen.inference import GaussianKernel
        >>> WAE(100.0, cost="squared error", kernel=GaussianKernel()).kernel
        GaussianKernel(bandwidth=None)
    """

    validates_as: ClassVar[str | None] = None

    def __init__(
        self,
        weight: float = 10.0,
        *,
        cost: Literal["squared error", "absolute error"] | None = None,
        kernel: Kernel | None = None,
        particles: int = 1,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_weights(weight=weight)
        if cost not in (None, "squared error", "absolute error"):
            raise ValueError(f"cost is None, 'squared error' or 'absolute error', got {cost!r}")
        self.weight = as_weight(weight)
        self.cost = cost
        self.kernel = InverseMultiquadraticKernel() if kernel is None else kernel

    def bound(self, model: Callable, guide: Callable, *batch: Tensor) -> Tensor:
        """Not defined.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "WAE bounds no log-likelihood; evaluate estimates it, where the guide has no density with an explicit one "
            "fitted to the frozen model"
        )

    def compared(self, traces: Traces) -> Terms:
        unasked = nothing(traces, local_sites(traces))
        return compare_sites(traces, observations=self.observations, closed_form=True, estimates=unasked)

    def parts(self, model: Callable, traces: Traces, terms: Terms) -> Parts:
        for name, node in observed_sites(traces.model).items():
            if self.cost is None and has_no_density(node):
                raise NoDensityError(without_density(name, observed=True))
        parts: Parts = {}
        if self.cost is not None:
            parts[self.cost.replace(" ", "_")] = 1.0, _error(traces, self.cost).mean()
        if terms.log_likelihoods:
            parts["distortion"] = float(self.cost is None), terms.distortion
        return parts | {"mmd": (self.weight, _discrepancy(model, traces, self.kernel))}


class InfoVAE(Matching):
    r"""The information maximising variational auto-encoder, with the maximum mean discrepancy.

    .. math:: \mathcal{L} = -\mathbb{E}_{q(z|x)} \log p(x \mid z) + (1 - \alpha) \operatorname{KL}(q(z \mid x) \| p(z))
              + (\alpha + \lambda - 1) \widehat{\operatorname{MMD}}^2(q(z), p(z))

    Zhao, Song & Ermon 2019, *InfoVAE*, 1706.02262. α = 0, λ = 1 is the :class:`ELBO`; α = 0 and another λ adds a
    discrepancy to it; **α = 1 is the MMD-VAE**, without a divergence for each observation and so the same loss as
    :class:`WAE` with weight λ, which serves implicit guides too. The discrepancy is taken as in :class:`WAE`.
    Validation reports the plain ELBO.

    Args:
        alpha: α, how much of the mutual information of x and z is paid back; usually in [0, 1].
        weight: λ, at least 1 − α. The default is ours.
        kernel: Such as :class:`~pyrogen.inference.InverseMultiquadraticKernel`, the default.
        particles: Number K of draws for each observation.
        observations: See :class:`Objective`.

    Raises:
        ValueError: For a weight of the discrepancy α + λ − 1 that is negative; at the first step if the model has no
            per-observation latent site, or one that is masked.

    Example:
        >>> mmd_vae = InfoVAE(alpha=1.0, weight=10.0)
    """

    def __init__(
        self,
        alpha: float = 0.0,
        weight: float = 10.0,
        *,
        kernel: Kernel | None = None,
        particles: int = 1,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_are(float, alpha=alpha, weight=weight)
        if alpha + weight - 1 < 0:
            raise ValueError(
                f"the discrepancy's weight alpha + weight - 1 cannot be negative, got {alpha + weight - 1:g}; "
                f"with alpha={alpha} choose a weight of at least {1 - alpha:g}"
            )
        self.alpha = as_weight(alpha)
        self.weight = as_weight(weight)
        self.kernel = InverseMultiquadraticKernel() if kernel is None else kernel

    def parts(self, model: Callable, traces: Traces, terms: Terms) -> Parts:
        return {
            "distortion": (1.0, terms.distortion),
            "rate": (1.0 - self.alpha, terms.rate),
            "mmd": (self.alpha + self.weight - 1.0, _discrepancy(model, traces, self.kernel)),
        }


def check_weights(**weights: float) -> None:
    """Raise a ``ValueError`` for a weight that is negative or not finite, by its name."""
    for name, value in weights.items():
        value = plain(value)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} cannot be negative, got {value}")
        if not is_finite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def _error(traces: Traces, cost: str) -> Tensor:
    """The errors of the likelihoods' means at all observed sites, ``(K, B)``."""
    errors = []
    for name, node in observed_sites(traces.model).items():
        if data_frame(node) is None:
            continue  # it counts among the global sites, by its density
        try:
            fn = node["fn"]
            difference = node["value"] - (fn.rsample() if is_implicit(fn) else fn.mean)
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(
                f"cost={cost!r} compares x with the mean of the likelihood, but the {type(node['fn']).__name__} at the "
                f"observed site '{name}' has none; leave cost at its default, the negative log-likelihood"
            ) from error
        sizes = difference.square() if cost == "squared error" else difference.abs()
        errors.append(per_row(node, _over_event(node["fn"], sizes)))
    return torch.stack(errors).sum(0).view(traces.particles, -1)


def _over_event(fn: Any, values: Tensor) -> Tensor:
    """Sum over the event's dimensions what has the shape of a distribution's samples, as its log-density is summed."""
    if isinstance(fn, dist.MaskedDistribution):
        return scale_and_mask(_over_event(fn.base_dist, values), mask=fn._mask)
    if isinstance(fn, dist.Independent):
        return sum_rightmost(_over_event(fn.base_dist, values), fn.reinterpreted_batch_ndims)
    return sum_rightmost(values, fn.event_dim)


def _local(traces: Traces) -> dict[str, dict[str, Any]]:
    """The model's per-observation latent sites."""
    nodes = sample_sites(traces.model).items()
    return {name: node for name, node in nodes if not node["is_observed"] and data_frame(node) is not None}


def _discrepancy(model: Callable, traces: Traces, kernel: Kernel) -> Tensor:
    """MMD² between the guide's draws and the prior's, the mean over K of each particle's.

    Particles are kept apart: the draws of one observation are not independent draws of the aggregate posterior.
    """
    posterior = _local(traces)
    if not posterior:
        raise ValueError(
            "the aggregate posterior is that of per-observation latent sites, and the model has none in the plate "
            '"data"; train it with ELBO()'
        )
    z = _side_by_side(posterior, traces.particles)
    if z.shape[1] == 1:
        warnings.warn(
            "a batch of one row has no unbiased discrepancy, so only its other terms count; use larger batches",
            stacklevel=2,
        )
        return z.new_zeros(())
    prior = _prior_draws(model, traces, posterior)
    return maximum_mean_discrepancy(z, _side_by_side(prior, traces.particles), kernel).mean()


def _side_by_side(nodes: dict[str, dict[str, Any]], copies: int) -> Tensor:
    """The values of sites, ``(K, B, D)``."""
    for name, node in nodes.items():
        check_unmasked(name, node)
    return torch.cat([elements(node, node["value"], copies).flatten(2) for node in nodes.values()], -1)


def check_unmasked(name: str, node: dict[str, Any]) -> None:
    """Raise a ``ValueError`` at a latent site some of whose draws are idle."""
    if is_masked(node):
        raise ValueError(
            f"the latent site '{name}' is masked, so its draws are not all draws of the posterior and can't be "
            "compared with the prior's; train this model with AVB(), or with ELBO() where all sites have densities"
        )


def _prior_draws(model: Callable, traces: Traces, sites: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per-observation latent sites as the model draws them on its own, at the guide's draws of global ones."""
    shared = poutine.replay(model, trace=global_draws(traces.model))
    return draw_only(poutine.uncondition(shared), [*sites], traces.rows)

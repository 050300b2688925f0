r"""Objectives that weight the total correlation of the aggregate posterior: what its dimensions know of each other.

.. math:: \operatorname{TC} = \operatorname{KL}\Big(q(z) \Big\| \prod_j q(z_j)\Big), \quad
          q(z) = \operatorname{E}_{p^*(x)} q(z \mid x)

:class:`BetaTCVAE` estimates it from the densities in a minibatch, :class:`FactorVAE` by a critic.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogen.arguments import as_weight
from pyrogen.distributions.semi_implicit import has_stochastic_density
from pyrogen.inference.contrasts import Contrast, CriticBuilder, RatioBuilder, build_ratio, of_one
from pyrogen.inference.critic_objective import CriticObjective
from pyrogen.inference.divergences import is_point_mass
from pyrogen.inference.draws import Draws, by_value
from pyrogen.inference.matching import Matching, Parts, check_unmasked, check_weights
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.programs import data_frame, per_row, row_axis, sample_sites
from pyrogen.inference.ratios import Logistic
from pyrogen.inference.terms import Terms, Traces, compare_sites
from pyrogen.networks.critics import Critic

__all__ = ["BetaTCVAE", "FactorVAE", "TotalCorrelationContrast", "permuted"]


class BetaTCVAE(Matching):
    r"""The ELBO with its rate taken apart, and the total correlation of the aggregate posterior weighted by β.

    .. math:: \mathcal{L} = -\mathbb{E}_{q(z|x)} \log p(x \mid z) + \alpha I_q(x; z)
              + \beta \operatorname{KL}\Big(q(z) \Big\| \prod_j q(z_j)\Big)
              + \gamma \sum_j \operatorname{KL}(q(z_j) \| p(z_j))

    Chen et al. 2018, *Isolating sources of disentanglement in VAEs*, 1802.04942. With B rows of a data set of N, the
    aggregate posterior is estimated by minibatch-weighted sampling,

    .. math:: \log q(z) \approx \log \frac{1}{N B} \sum_{j=1}^{B} q(z \mid x_j),

    and each log q(z_j) alike, or stratified, see ``weighting``. The former are low by between log B, where every
    observation has a region of its own, and log N, where all share one: mutual information and total correlation come
    out that much and D − 1 times that much too high, the last term D times too low. To read the figures and not only
    train on them, choose ``"stratified"``. Whatever the weighting the three add up to the rate; they are estimates, and
    any may be negative. Validation reports the plain ELBO.

    It needs one per-observation latent site whose values are independent under the prior, and under the guide given x:
    :class:`~pyrogen.distributions.Normal` is, a flow or a full covariance is not.

    Args:
        beta: β; the authors' experiments have 6 on dSprites.
        alpha: α, weight of the mutual information.
        gamma: γ, weight of the divergences of single dimensions.
        weighting: ``"minibatch"``, or ``"stratified"``: an observation's own posterior gets the weight 1/N and the
            others share what is left, which makes :math:`\hat q(z)` unbiased, and exact when the batch is the whole
            data set (the authors' stratified sampling, with the remainder spread evenly).
        particles: Number K of draws for each observation; memory grows with (K B)².
        observations: N, as in :class:`Objective`; ``fit`` sets it. Where it is not known the batch counts as all there
            is. With ``"minibatch"`` that shifts the loss by a constant and leaves gradients as they are.

    Raises:
        ValueError: For a negative weight or an unknown weighting; at the first step if the sites are not as above.

    Example:
        >>> BetaTCVAE(beta=4.0).weighting
        'minibatch'
    """

    def __init__(
        self,
        beta: float = 6.0,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        weighting: Literal["minibatch", "stratified"] = "minibatch",
        particles: int = 1,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_weights(beta=beta, alpha=alpha, gamma=gamma)
        if weighting not in ("minibatch", "stratified"):
            raise ValueError(f"weighting is 'minibatch' or 'stratified', got {weighting!r}")
        self.beta = as_weight(beta)
        self.alpha = as_weight(alpha)
        self.gamma = as_weight(gamma)
        self.weighting = weighting

    def parts(self, model: Callable, traces: Traces, terms: Terms) -> Parts:
        name = _only_site(traces)
        q, p = sample_sites(traces.guide)[name], sample_sites(traces.model)[name]
        _check_independent(name, q, "guide")
        _check_independent(name, p, "model")
        log_q = _under_each_other(q)  # (K B, K B, D)
        own = log_q.diagonal(dim1=0, dim2=1).sum(0)
        weights = self._log_weights(traces, terms.observations, log_q)
        joint = torch.logsumexp(weights + log_q.sum(-1), 1)
        marginals = torch.logsumexp(weights.unsqueeze(-1) + log_q, 1).sum(-1)
        log_prior = per_row(p, p["fn"].log_prob(p["value"]))
        return {
            "distortion": (1.0, terms.distortion),
            "rate": (0.0, terms.rate),
            "mutual_information": (self.alpha, (own - joint).mean()),
            "total_correlation": (self.beta, (joint - marginals).mean()),
            "dimension_wise_kl": (self.gamma, (marginals - log_prior).mean()),
        }

    def _log_weights(self, traces: Traces, total: int, like: Tensor) -> Tensor:
        """Logarithms of the weights of q(· | x_j) in the mixture at the draws z_i, ``(K B, K B)``."""
        copies, rows = traces.particles, len(traces.rows[0]) // traces.particles
        weights = like.new_full((rows, rows), 1 / (total * rows))
        if self.weighting == "stratified":
            weights.fill_((total - 1) / (total * max(rows - 1, 1))).fill_diagonal_(1 / total)
        return (weights / copies).log().repeat(copies, copies)


class FactorVAE(CriticObjective):
    r"""The ELBO and the total correlation of the aggregate posterior, the latter by a critic.

    .. math:: \mathcal{L} = -\mathbb{E}_{q(z|x)} \log p(x \mid z) + \operatorname{KL}(q(z \mid x) \| p(z))
              + \gamma \, \mathbb{E}_{q(z)} \log \frac{q(z)}{\prod_j q(z_j)}

    The critic contrasts the guide's draws with the same draws whose dimensions are permuted over the batch, each for
    itself. These dimensions are the unconstrained values of all per-observation latent sites together. Kim & Mnih 2018,
    *Disentangling by factorising*, 1802.05983; there a second batch is permuted, here the same one.

    The ELBO needs densities, so guide and model must have them at every site. A critic that lags behind reports too
    little total correlation. Validation reports the plain ELBO.

    Args:
        particles: Number K of draws for each observation.
        gamma: γ. The authors' are from 6.4 to 40, by data set; the default is ours.
        ratio: What makes a ratio of a critic, such as :class:`~pyrogen.inference.Logistic`.
        critic: What makes a critic, called as ``critic(size, 0)`` with the number of latent values.
        observations: See :class:`~pyrogen.inference.Objective`.

    Raises:
        ValueError: For a negative weight; when prepared, at a site without a density, one that is masked, or with fewer
            than two latent values for each observation.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> FactorVAE(gamma=6.4)(toy.model, guide)(toy.x[:16]).shape
        torch.Size([])
    """

    validates_as: ClassVar[str | None] = "validation"

    def __init__(
        self,
        particles: int = 1,
        *,
        gamma: float = 10.0,
        ratio: RatioBuilder = Logistic,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_weights(gamma=gamma)
        self.gamma = as_weight(gamma)
        self.ratio = ratio
        self.critic = critic

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        for name in draws.local:
            check_unmasked(name, draws.model[name])
        return {"total_correlation": TotalCorrelationContrast(draws, self.ratio, self.critic)}

    def of_program(self, draws: Draws) -> Estimate:
        terms = self._compared(draws.traces)
        contrast: Any = self.critics["total_correlation"]
        metrics = {
            "distortion": terms.distortion,
            "rate": terms.rate,
            "total_correlation_estimate": contrast.estimate(draws).mean(),
        }
        loss = terms.global_rate + metrics["distortion"] + metrics["rate"]
        loss = loss + self.gamma * metrics["total_correlation_estimate"]
        if terms.global_ratios:
            metrics["global_rate"] = terms.global_rate
        return Estimate(loss, {name: value.detach() for name, value in metrics.items()}, terms, loss.detach())

    def bound(self, model: Callable, guide: Callable, *batch: Tensor) -> Tensor:
        """The evidence lower bound of each observation in nats, ``(B,)``; the critic has no part in it."""
        terms = self._compared(Draws(model, guide, batch, self.particles).traces)
        return (terms.log_likelihood - terms.ratio).mean(0) - terms.global_rate

    def _compared(self, traces: Traces) -> Terms:
        return compare_sites(traces, observations=self.observations, closed_form=True)


class TotalCorrelationContrast(Contrast):
    r"""log q(z)/∏ q(z_j) of all per-observation latent sites together, of which the guide's draws are all it needs."""

    def __init__(self, draws: Draws, ratio: RatioBuilder, critic: CriticBuilder) -> None:
        super().__init__()
        size = draws.latents(draws.model, draws.local).shape[-1] if draws.local else 0
        if size < 2:
            raise ValueError(
                f"the total correlation is that of two or more latent values of an observation, and the model has "
                f'{size} in the plate "data"; train it with ELBO()'
            )
        self.ratio = build_ratio(ratio, critic, (size,), 0)

    def estimate(self, draws: Draws) -> Tensor:
        """The log-ratio at the guide's draws in nats, ``(K, B)``, with its gradient along these."""
        return self.ratio.log_ratio(draws.latents(draws.model, draws.local)).view(draws.particles, -1)

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        z = draws.latents(draws.model, draws.local).detach()
        return of_one(self.ratio.loss_and_accuracy(z, permuted(z)))


def permuted(z: Tensor) -> Tensor:
    """Rows ``(N, n)`` with each column in a random order of its own: draws from the product of the marginals."""
    order = torch.rand(z.shape, device=z.device).argsort(0)
    return z.gather(0, order)


def _only_site(traces: Traces) -> str:
    drawn = {name: node for name, node in sample_sites(traces.guide).items() if not node["is_observed"]}
    modelled = sample_sites(traces.model)
    names = [name for name, node in drawn.items() if data_frame(modelled.get(name, node)) is not None]
    if len(names) != 1:
        raise ValueError(
            "BetaTCVAE needs one per-observation latent site, for q(z | x) must be known at other observations' draws; "
            f"the guide has {names or 'none'}. Join them in one site, or train with InfoVAE(), which serves several"
        )
    return names[0]


def _check_independent(name: str, node: dict[str, Any], program: str) -> None:
    fn = by_value(node["fn"])
    unsuited = fn.event_shape or is_point_mass(fn) or has_stochastic_density(fn)
    if unsuited or node["mask"] is not None or isinstance(fn, dist.MaskedDistribution):
        raise ValueError(
            f"BetaTCVAE needs densities of each value of a latent site on its own, but the {program}'s distribution at "
            f"site '{name}', a {type(node['fn']).__name__}, gives none; use distributions with independent values, "
            "such as Normal in the guide and StandardNormal in the model, or train with InfoVAE()"
        )


def _under_each_other(node: dict[str, Any]) -> Tensor:
    """log q(z_{i,d} | x_j) of all rows i and j and every value d of the site, ``(rows, rows, D)``."""
    value, axis = node["value"], row_axis(node)
    value = value.to(
        torch.promote_types(value.dtype, torch.float32)
    )  # half precision has no room for sums of densities
    # Draws first and a single row in place of the plate: against the distribution that is all draws by all rows.
    log_q = by_value(node["fn"]).log_prob(value.movedim(axis, 0).unsqueeze(axis))
    return log_q.movedim(axis, 1).reshape(len(log_q), len(log_q), -1)

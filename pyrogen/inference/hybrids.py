r"""Objectives in which critics stand for densities: one space of weights, from the evidence lower bound to the GAN.

.. math::
    \mathcal{L} = -w_1 \operatorname{E} \log p(x \mid z) + w_2 \operatorname{E} \lVert x - \hat x \rVert_1
        + w_3 \, D(q(z \mid x), p(z)) + w_4 V(\hat x) + w_5 V(\tilde x)

with z ~ q(z|x), x̂ ~ p(x|z) a reconstruction, x̃ a sample of the model on its own, D a divergence in latent space and V
a critic's verdict in visible space. Rosca, Lakshminarayanan & Mohamed 2018, *Distribution matching in variational
inference*, 1802.06847.

What a critic reports is an estimate, never a bound. Critic and program are trained by one backward pass on the loss:
critics see draws without gradients, programs see critics with their weights held.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyrogen.arguments import as_weight, check_are
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.inference.adaptive import Covariance
from pyrogen.inference.contrasts import (
    Contrast,
    CriticBuilder,
    LatentContrast,
    RatioBuilder,
    SiteContrast,
    VisibleContrast,
)
from pyrogen.inference.critic_objective import CriticObjective
from pyrogen.inference.draws import Draws
from pyrogen.inference.matching import check_weights
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.programs import module_name, repeat
from pyrogen.inference.ratios import Logistic, Ratio
from pyrogen.inference.terms import Terms, compare_sites, has_no_density, local_sites, nothing
from pyrogen.networks.critics import Critic

__all__ = ["AAE", "AVB", "VGH", "AlphaGAN", "Hybrid", "VGHPlusPlus"]

SMOOTH: RatioBuilder = partial(Logistic, r1=1.0)
"""The default for visible critics: without the penalty on its slope one soon tells all apart."""


class Hybrid(CriticObjective):
    r"""The weighted sum of this module's five terms; :class:`AVB`, :class:`AAE` and the others are points in it.

    Args:
        particles: Number K of draws for each observation.
        log_likelihood: Weight of −log p(x|z), in nats.
        reconstruction: Weight of the ℓ1 distance of data and reconstruction, summed over an observation's values.
        latent: Weight of the latent term, in nats: a number, or a schedule from the number of the step to one, such as
            :class:`~pyrogen.inference.LinearSchedule`.
        visible_reconstructions: Weight of the critic's verdict on reconstructions.
        visible_samples: Weight of its verdict on samples.
        match: ``"conditional"``: the latent term is E KL(q(z|x) ‖ p(z)), site by site; sites with densities on both
            sides have it in closed form or by Monte Carlo, implicit ones by a critic. ``"marginal"``: it is
            KL(q(z) ‖ p(z)) of all per-observation sites together, by one critic. Global sites have their divergence.
        contrast: For conditional terms, how a critic stands for a density: ``"adaptive"``, see
            :class:`~pyrogen.inference.AdaptiveContrast`, or ``"none"``, guide against model directly.
        covariance: Of the adaptive contrast's reference, ``"diagonal"`` or ``"full"``.
        through_guide: Whether the verdict on reconstructions also teaches the guide.
        ratio: What makes a ratio of a critic, for latent terms.
        visible_ratio: The same for the visible one. Where it gives a log-ratio its verdict is log p_model/p_data, in
            nats; otherwise its own loss for a generator. By default a logistic one with a penalty on its slope at the
            data (Mescheder, Geiger & Nowozin 2018, 1801.04406).
        critic: What makes a critic, called as ``critic(event_shape, context)``.
        observations: See :class:`~pyrogen.inference.Objective`.

    Raises:
        ValueError: For an option that is not known; when prepared, for programs that it can't serve.
    """

    schedules = ("latent",)

    def __init__(
        self,
        particles: int = 1,
        *,
        log_likelihood: float = 1.0,
        reconstruction: float = 0.0,
        latent: float | Callable[[int], float] = 1.0,
        visible_reconstructions: float = 0.0,
        visible_samples: float = 0.0,
        match: Literal["conditional", "marginal"] = "conditional",
        contrast: Literal["adaptive", "none"] = "adaptive",
        covariance: Covariance = "diagonal",
        through_guide: bool = True,
        ratio: RatioBuilder = Logistic,
        visible_ratio: RatioBuilder = SMOOTH,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        super().__init__(particles, observations=observations)
        check_weights(
            log_likelihood=log_likelihood,
            reconstruction=reconstruction,
            latent=0.0 if callable(latent) else latent,
            visible_reconstructions=visible_reconstructions,
            visible_samples=visible_samples,
        )
        check_are(bool, through_guide=through_guide)
        if match not in ("conditional", "marginal"):
            raise ValueError(f"match is 'conditional' or 'marginal', got {match!r}")
        if not any((log_likelihood, reconstruction, latent, visible_reconstructions, visible_samples)):
            raise ValueError("all weights are 0, so there is nothing to minimise")
        if covariance not in get_args(Covariance):
            raise ValueError(f"covariance is 'diagonal' or 'full', got {covariance!r}")
        if contrast not in ("adaptive", "none"):
            raise ValueError(f"contrast is 'adaptive' or 'none', got {contrast!r}")
        self.log_likelihood = as_weight(log_likelihood)
        self.reconstruction = as_weight(reconstruction)
        self.latent = as_weight(latent)
        self.visible_reconstructions = as_weight(visible_reconstructions)
        self.visible_samples = as_weight(visible_samples)
        self.match = match
        self.contrast = contrast
        self.covariance = covariance
        self.through_guide = through_guide
        self.ratio = ratio
        self.visible_ratio = visible_ratio
        self.critic = critic

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        found: dict[str, Contrast] = {}
        if self.latent and self.match == "marginal" and draws.local:
            found["latent"] = LatentContrast(draws, self.ratio, self.critic)
        elif self.latent:
            for name, site in draws.sites.items():
                if not has_no_density(draws.guide[name], draws.model[name]):
                    continue
                if site.is_global:
                    continue  # it has no place in any objective, as comparing the sites says
                if self.contrast == "adaptive" and self.particles < 2:
                    raise ValueError(
                        f"adaptive contrast at site '{name}' takes moments over particles; expected particles of at "
                        f"least 2, better 8, got {self.particles}"
                    )
                found[_key(name)] = SiteContrast(name, draws, self.ratio, self.critic, self.contrast, self.covariance)
        if self.visible_reconstructions or self.visible_samples:
            found["visible"] = VisibleContrast(
                draws,
                self.visible_ratio,
                self.critic,
                reconstructions=bool(self.visible_reconstructions),
                samples=bool(self.visible_samples),
            )
        return found

    def of_program(self, draws: Draws) -> Estimate:
        terms = self._compared(draws)
        loss = torch.as_tensor(terms.global_rate, dtype=draws.like.dtype, device=draws.like.device)
        metrics = {}
        if terms.log_likelihoods:
            metrics["distortion"] = terms.distortion
        if self.log_likelihood:
            loss = loss + self.log_likelihood * metrics["distortion"]
        if self.reconstruction:
            distance = repeat((draws.data(),), self.particles)[0] - draws.reconstructions
            metrics["reconstruction"] = distance.abs().flatten(1).sum(1).mean()
            loss = loss + self.reconstruction * metrics["reconstruction"]
        if self.latent:
            ratio, teaching = self._latent_term(draws, terms)
            what = "marginal_kl_estimate" if "latent" in self.critics else "rate_estimate"
            metrics["rate" if self.exact else what] = ratio.mean()
            loss = loss + self.weight_of("latent") * (ratio.mean() + teaching)
        if self.visible_reconstructions:
            shown = draws.reconstructions if self.through_guide else draws.visible(draws.detached)
            metrics["verdict_reconstructions"] = self._verdict(shown)
            loss = loss + self.visible_reconstructions * metrics["verdict_reconstructions"]
        if self.visible_samples:
            metrics["verdict_samples"] = self._verdict(draws.samples)
            loss = loss + self.visible_samples * metrics["verdict_samples"]
        return Estimate(loss, {name: value.detach() for name, value in metrics.items()}, terms, loss.detach())

    @property
    def exact(self) -> bool:
        """Whether the latent term needs no critic."""
        return all(name == "visible" for name in self.critics)

    def _compared(self, draws: Draws) -> Terms:
        if self.latent and self.match == "conditional":
            sites = [part for part in self.critics.values() if isinstance(part, SiteContrast)]
            estimates = {site.name: site.estimate(draws) for site in sites}
        else:
            estimates = nothing(draws.traces, local_sites(draws.traces))
        terms = compare_sites(draws.traces, observations=self.observations, closed_form=True, estimates=estimates)
        if self.log_likelihood and len(terms.log_likelihoods) < len(draws.visible_names()):
            raise NoDensityError(
                f"{type(self).__name__} needs the likelihood of the observed sites {draws.visible_names()}, but one of "
                "them is implicit; use VGH, VGHPlusPlus, AlphaGAN or ALI, or a likelihood with a density"
            )
        return terms

    def _latent_term(self, draws: Draws, terms: Terms) -> tuple[Tensor, Tensor | float]:
        """log q/p for each draw, ``(K, B)``, and what teaches the model's side."""
        if "latent" in self.critics:
            latent: Any = self.critics["latent"]
            return latent.estimate(draws), latent.prior_term(draws)
        sites = [part for part in self.critics.values() if isinstance(part, SiteContrast)]
        return terms.ratio, sum((site.prior_term(draws) for site in sites), start=0.0)

    def _verdict(self, shown: Tensor) -> Tensor:
        ratio: Ratio = self.critics["visible"].ratio  # type: ignore[assignment]
        return -ratio.log_ratio(shown).mean() if ratio.gives_log_ratio else ratio.generator_loss(shown)

    def bound(self, model: Callable, guide: Callable, *batch: Tensor) -> Tensor:
        """An estimate of the evidence lower bound of each observation in nats, ``(B,)``; critics make it no bound.

        Raises:
            ValueError: If the latent term has no weight, or the observed sites are implicit.
        """
        if not self.latent:
            raise ValueError(f"{type(self).__name__} gives the latent term no weight, so it knows no bound; use ELBO()")
        self.prepare(model, guide, *batch)
        draws = Draws(model, guide, batch, self.particles)
        terms = self._compared(draws)
        if not terms.log_likelihoods:
            raise NoDensityError(
                f"the observed sites {draws.visible_names()} are implicit, so there is no bound on them"
            )
        ratio, _ = self._latent_term(draws, terms)
        return (terms.log_likelihood - ratio).mean(0) - terms.global_rate

    @property
    def validates_as(self) -> str | None:  # type: ignore[override]
        if not (self.log_likelihood and self.latent):
            return None
        return "validation" if self.exact and self.match == "conditional" else "validation_estimate"


def _key(site: str) -> str:
    """What the critics of a site are filed under, beside those of all sites together."""
    return f"site {site}" if site in ("latent", "visible") else module_name(site)


class AVB(Hybrid):
    r"""Adversarial variational Bayes: the evidence lower bound for guides and priors that can only be sampled.

    .. math:: \mathcal{L} = -\operatorname{E} \log p(x \mid z)
        + \beta \operatorname{E}_{q(z|x)} \log \frac{q(z|x)}{p(z)}

    with a critic for the density of each implicit side of each latent site. Explicit sites beside them have their
    divergence in closed form or by Monte Carlo. Mescheder, Nowozin & Geiger 2017, 1701.04722; their settings, Adam
    with β₁ = 0.5 and a critic that learns faster than the program, are a good start.

    With adaptive contrast a critic is at chance where the posteriors are normal, so a fit does not warn of that; that
    it has learned a held-out estimate tells (:func:`~pyrogen.evaluation.held_out_rate_estimate`).

    Args:
        particles: Number K of draws for each observation; adaptive contrast needs at least 2.
        contrast, covariance, ratio, critic, observations: See :class:`Hybrid`.
        beta: Weight of the latent term, a number or a schedule. One that falls to 1 from above lets a guide find
            several modes before the likelihood parts them.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.distributions import Implicit
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8), Implicit)
        >>> AVB()(toy.model, guide)(toy.x[:16]).shape
        torch.Size([])
    """

    def __init__(
        self,
        particles: int = 8,
        *,
        contrast: Literal["adaptive", "none"] = "adaptive",
        covariance: Covariance = "diagonal",
        beta: float | Callable[[int], float] = 1.0,
        ratio: RatioBuilder = Logistic,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        check_weights(beta=0.0 if callable(beta) else beta)
        super().__init__(
            particles,
            latent=beta,
            contrast=contrast,
            covariance=covariance,
            ratio=ratio,
            critic=critic,
            observations=observations,
        )
        self.beta = as_weight(beta)


class AAE(Hybrid):
    r"""Adversarial autoencoder: the aggregate posterior matches the prior, by one critic.

    .. math:: \mathcal{L} = -\operatorname{E} \log p(x \mid z)
        + \lambda \operatorname{E}_{q(z)} \log \frac{q(z)}{p(z)}

    Makhzani et al. 2015, 1511.05644.

    Args:
        particles: Number K of draws for each observation.
        weight: The weight λ of the latent term; 1 is the evidence lower bound less the mutual information of x and z.
        ratio, critic, observations: See :class:`Hybrid`.
    """

    def __init__(
        self,
        particles: int = 1,
        *,
        weight: float = 1.0,
        ratio: RatioBuilder = Logistic,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        check_weights(weight=weight)
        super().__init__(
            particles, latent=weight, match="marginal", ratio=ratio, critic=critic, observations=observations
        )
        self.weight = as_weight(weight)


class AlphaGAN(Hybrid):
    r"""α-GAN: an ℓ1 reconstruction, and critics in both spaces.

    .. math:: \mathcal{L} = \lambda \lVert x - \hat x \rVert_1 + R_D(\hat x) + R_D(\tilde x) + R_C(z), \quad
        R(u) = -\log D(u) + \log (1 - D(u))

    The visible critic's verdict teaches the model alone, the reconstruction both. Rosca, Lakshminarayanan,
    Warde-Farley & Mohamed 2017, *Variational approaches for auto-encoding generative adversarial networks*,
    1706.04987 (whose first version has the classes of C the other way round).

    Args:
        reconstruction: The weight λ. The distance is a sum over an observation's values: for images of 784 and more
            0.1 leaves the verdicts a say.
        ratio, visible_ratio, critic, observations: See :class:`Hybrid`.
    """

    def __init__(
        self,
        *,
        reconstruction: float = 1.0,
        ratio: RatioBuilder = Logistic,
        visible_ratio: RatioBuilder = SMOOTH,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        super().__init__(
            log_likelihood=0.0,
            reconstruction=reconstruction,
            visible_reconstructions=1.0,
            visible_samples=1.0,
            match="marginal",
            through_guide=False,
            ratio=ratio,
            visible_ratio=visible_ratio,
            critic=critic,
            observations=observations,
        )


class VGH(Hybrid):
    r"""VAE-GAN hybrid: the marginal latent term, and a synthetic likelihood from a critic of reconstructions.

    .. math:: \mathcal{L} = \operatorname{E} \log \frac{p_\theta(\hat x)}{p^*(\hat x)}
        + \operatorname{E}_{q(z)} \log \frac{q(z)}{p(z)}

    Rosca, Lakshminarayanan & Mohamed 2018, 1802.06847. Where the paper leaves room, the choices are ours: both ratios
    are those of :class:`AlphaGAN`, and the verdict on reconstructions teaches the guide too.

    Args:
        ratio, visible_ratio, critic, observations: See :class:`Hybrid`.
    """

    def __init__(
        self,
        *,
        ratio: RatioBuilder = Logistic,
        visible_ratio: RatioBuilder = SMOOTH,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        super().__init__(
            log_likelihood=0.0,
            visible_reconstructions=1.0,
            match="marginal",
            ratio=ratio,
            visible_ratio=visible_ratio,
            critic=critic,
            observations=observations,
        )


class VGHPlusPlus(Hybrid):
    """VGH++: :class:`VGH` with an ℓ1 reconstruction, and samples of the model beside reconstructions for the critic.

    Rosca, Lakshminarayanan & Mohamed 2018, 1802.06847; our choices are those of :class:`VGH`.

    Args:
        reconstruction: Weight of the ℓ1 distance, as in :class:`AlphaGAN`.
        ratio, visible_ratio, critic, observations: See :class:`Hybrid`.
    """

    def __init__(
        self,
        *,
        reconstruction: float = 1.0,
        ratio: RatioBuilder = Logistic,
        visible_ratio: RatioBuilder = SMOOTH,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        super().__init__(
            log_likelihood=0.0,
            reconstruction=reconstruction,
            visible_reconstructions=1.0,
            visible_samples=1.0,
            match="marginal",
            ratio=ratio,
            visible_ratio=visible_ratio,
            critic=critic,
            observations=observations,
        )

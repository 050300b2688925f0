"""Objectives in which a critic of what the model shows teaches it: alone, with the latent values, by its features."""

from typing import Any, ClassVar, Literal, get_args

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyrogen.arguments import as_weight
from pyrogen.inference.adaptive import Covariance
from pyrogen.inference.contrasts import Contrast, CriticBuilder, RatioBuilder, VisibleContrast, build_ratio, of_one
from pyrogen.inference.critic_objective import CriticObjective
from pyrogen.inference.draws import Draws
from pyrogen.inference.hybrids import SMOOTH, Hybrid
from pyrogen.inference.matching import check_unmasked, check_weights
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.programs import repeat, sample_sites, trace_of, unregistered
from pyrogen.inference.ratios import Hinge, LeastSquares, Logistic, Ratio, Wasserstein, at_least_single
from pyrogen.inference.terms import Terms, frozen, parameters_of
from pyrogen.networks.critics import Critic

__all__ = ["ALI", "GAN", "VAEGAN", "JointContrast"]

GANLoss = Literal["non-saturating", "wasserstein-gp", "hinge", "least-squares"]

RATIOS: dict[str, type[Ratio]] = {
    "non-saturating": Logistic,
    "wasserstein-gp": Wasserstein,
    "hinge": Hinge,
    "least-squares": LeastSquares,
}


class _Adversarial(CriticObjective):
    """Base: a critic's verdict and nothing else."""

    validates_as: ClassVar[str | None] = None

    def __init__(
        self,
        loss: GANLoss = "non-saturating",
        *,
        r1: float = 0.0,
        gradient_penalty: float = 10.0,
        critic: CriticBuilder = Critic,
    ) -> None:
        super().__init__()
        if loss not in get_args(GANLoss):
            raise ValueError(f"loss is one of {', '.join(get_args(GANLoss))}, got {loss!r}")
        self.loss_ = loss  # the plain name is that of the method by which Pyro asks for a loss
        check_weights(r1=r1, gradient_penalty=gradient_penalty)
        self.r1 = as_weight(r1)
        self.gradient_penalty = as_weight(gradient_penalty)
        self.critic = critic
        self.critic_steps = 5 if loss == "wasserstein-gp" else 1

    def _ratio(self, critic: nn.Module) -> Ratio:
        if self.loss_ == "wasserstein-gp":
            return Wasserstein(critic, gradient_penalty=self.gradient_penalty, r1=self.r1)
        return RATIOS[self.loss_](critic, r1=self.r1)


class GAN(_Adversarial):
    r"""A generative adversarial network: a critic tells data from samples, and the model learns to mislead it.

    The model is any program; its samples have to have gradients, so its observed site is implicit or has them, or is
    discrete and the critic sees its mean. There is no guide: ``fit(model, None, GAN(), data)``. With critic T:

    - ``"non-saturating"``: the model minimises E log(1 + exp(−T(x̃))) (Goodfellow et al. 2014, *Generative adversarial
      networks*, 1406.2661);
    - ``"wasserstein-gp"``: −E T(x̃), with a penalty of weight 10 on slopes other than 1 and 5 steps of the critic for
      each of the model (Gulrajani et al. 2017, *Improved training of Wasserstein GANs*, 1704.00028);
    - ``"hinge"``: −E T(x̃) (Lim & Ye 2017, *Geometric GAN*, 1705.02894);
    - ``"least-squares"``: ½ E (T(x̃) − 1)² (Mao et al. 2017, *Least squares generative adversarial networks*,
      1611.04076).

    Args:
        loss: One of these.
        r1: Weight of a penalty on the critic's slope at the data (Mescheder, Geiger & Nowozin 2018, 1801.04406); 1
            keeps a critic of images from telling all apart.
        gradient_penalty: Weight of the penalty of ``"wasserstein-gp"``; 0 with a critic under spectral normalisation.
        critic: What makes a critic, called as ``critic(event_shape, context)``.

    Raises:
        ValueError: For another loss.

    Example:
        >>> import torch
        >>> from pyrogen.distributions import Implicit, StandardNormal
        >>> from pyrogen.models import LatentVariableModel
        >>> from pyrogen.networks import MLP
        >>> generator = Implicit((1, 8, 8), context=4, noise=0, network=MLP(4, (1, 8, 8)))
        >>> GAN()(LatentVariableModel(StandardNormal(4), generator), None)(torch.rand(6, 1, 8, 8)).shape
        torch.Size([])
    """

    uses_guide: ClassVar[bool] = False

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        return {"visible": VisibleContrast(draws, self._ratio, self.critic, reconstructions=False, samples=True)}

    def of_program(self, draws: Draws) -> Estimate:
        ratio: Ratio = self.critics["visible"].ratio  # type: ignore[assignment]
        loss = ratio.generator_loss(draws.samples)
        terms = Terms({}, {}, {}, len(draws.batch[0]), poutine.Trace(), draws.prior_trace, False)
        return Estimate(loss, {"verdict_samples": loss.detach()}, terms, loss.detach())

    def bound(self, *programs_and_batch: Tensor) -> Tensor:  # type: ignore[override]
        """There is none: a GAN has no likelihood."""
        raise ValueError("a GAN bounds no likelihood; judge its samples, or fit a guide to its frozen model")


class ALI(_Adversarial):
    r"""Adversarially learned inference, or BiGAN: one critic tells the guide's pairs (x, z) from the model's.

    .. math:: (x, z), \; x \sim p^*(x), z \sim q(z \mid x) \quad \text{against} \quad
              (\tilde x, \tilde z), \; \tilde z \sim p(z), \tilde x \sim p(x \mid \tilde z)

    Guide and model both learn to mislead it, each with the labels swapped: with the non-saturating loss and critic T
    the guide minimises E log(1 + exp(T(x, z))) and the model E log(1 + exp(−T(x̃, z̃))). Where no critic can tell the
    pairs apart, the guide is the model's posterior. Dumoulin et al. 2017, *Adversarially learned inference*,
    1606.00704; Donahue, Krähenbühl & Darrell 2017, *Adversarial feature learning*, 1605.09782.

    No density is asked for: guide, prior and likelihood may be implicit. All learn along their draws, so a prior whose
    draws have no gradients, such as :class:`~pyrogen.distributions.Vamp`, stays as it is. Of a discrete observed site
    the critic sees the model's mean. Latent values are those of all per-observation sites together, unconstrained.

    Args:
        loss: As for :class:`GAN`; the guide's loss is the mirror image of the model's.
        r1: Weight of a penalty on the critic's slope at the guide's pairs (Mescheder, Geiger & Nowozin 2018,
            1801.04406).
        gradient_penalty: As for :class:`GAN`.
        critic: What makes a critic, called as ``critic(event_shape, context)``: its samples are x, its context is z.

    Raises:
        ValueError: For another loss; without a guide; when prepared, for a model with global latent sites, which make
            no pair with one observation, without latent sites, or with one that is masked.

    Example:
        >>> from pyrogen.distributions import Implicit, StandardNormal
        >>> from pyrogen.inference import AmortizedGuide
        >>> from pyrogen.models import LatentVariableModel
        >>> from pyrogen.networks import MLP
        >>> generator = Implicit((1, 8, 8), context=4, noise=0, network=MLP(4, (1, 8, 8)))
        >>> model = LatentVariableModel(StandardNormal(4), generator)
        >>> guide = AmortizedGuide(model, MLP((1, 8, 8), 16), Implicit)
        >>> ALI()(model, guide)(torch.rand(6, 1, 8, 8)).shape
        torch.Size([])
    """

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        _check_latents(self, draws)
        if shared := [name for name, site in draws.sites.items() if site.is_global]:
            raise ValueError(
                f"ALI contrasts pairs of one observation and its latent values, but the latent sites {shared} are "
                "global; use VAEGAN or AVB, or make them parameters of the model"
            )
        return {"joint": JointContrast(draws, self._ratio, self.critic)}

    def of_program(self, draws: Draws) -> Estimate:
        joint: Any = self.critics["joint"]
        (x, z), (sample, prior) = joint.pairs(draws)
        verdicts = {
            "verdict_guide": _mirrored(self.loss_, joint.ratio(x, z)).mean(),
            "verdict_model": joint.ratio.generator_loss(sample, prior),
        }
        loss = verdicts["verdict_guide"] + verdicts["verdict_model"]
        terms = Terms({}, {}, {}, len(draws.batch[0]), draws.traces.guide, draws.traces.model, False)
        return Estimate(loss, {name: value.detach() for name, value in verdicts.items()}, terms, loss.detach())

    def bound(self, *programs_and_batch: Tensor) -> Tensor:  # type: ignore[override]
        """There is none.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_without_bound(self))


class JointContrast(Contrast):
    """Pairs of data and the guide's latent values against pairs that the model draws."""

    def __init__(self, draws: Draws, ratio: RatioBuilder, critic: CriticBuilder) -> None:
        super().__init__()
        (x, z), _ = self.pairs(draws)
        self.ratio = build_ratio(ratio, critic, x.shape[1:], z.shape[-1])

    def pairs(self, draws: Draws) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(x, z) of the guide and of the model, ``(B, *event_shape)`` and ``(B, n)`` each, with gradients."""
        inferred, drawn = (draws.latents(nodes, draws.local) for nodes in (draws.model, draws.prior))
        return (draws.data(), inferred), (draws.samples, drawn)

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        (x, z), (sample, prior) = self.pairs(draws)
        return of_one(self.ratio.loss_and_accuracy(x, sample, (z, prior)))


class VAEGAN(Hybrid):
    r"""VAE/GAN: reconstructions are compared in the features of a critic that tells data from what the model shows.

    .. math:: \mathcal{S} = \tfrac12 \lVert h(x) - h(\hat x) \rVert^2, \qquad
        \mathcal{L}_q = \operatorname{KL}(q(z \mid x) \| p(z)) + \mathcal{S}, \qquad
        \mathcal{L}_p = \gamma \, \mathcal{S} + G(\hat x) + G(\tilde x)

    with h what the critic's last layer reads, so that 𝒮 is −log N(h(x) | h(x̂), I) less its constant, summed over the
    features; x̂ a reconstruction, x̃ a sample of the model on its own, and G the critic's loss for a generator, by
    default log(1 + exp(−T)). The guide minimises the first sum, the model the second, and no part reaches the other's:
    the verdicts G do not teach the guide, and γ weighs in the model alone. The rate also teaches what the model has
    of a prior. All terms are means over observations of sums over an observation's values. Larsen et al. 2016,
    *Autoencoding beyond pixels using a learned similarity metric*, 1512.09300.

    The critic learns from data against x̂ and x̃, by halves, and never from 𝒮. Of a discrete observed site it sees the
    model's mean, of another one a draw; a likelihood without noise, ``Implicit(..., noise=0)``, is the paper's decoder.
    The logged loss is the sum of both.

    Args:
        particles: Number K of draws for each observation; the adaptive contrast of an implicit site needs at least 2.
        reconstruction: γ; the default is ours. Verdicts are of order 1 for each observation, 𝒮 of the size of the
            critic's features, often 50 and more.
        contrast, covariance, ratio: For the latent term of implicit sites; see :class:`Hybrid`.
        visible_ratio: What makes a ratio of the visible critic. By default a logistic one with a penalty on its slope
            (Mescheder, Geiger & Nowozin 2018, 1801.04406), which keeps its features, and with them 𝒮, of one size.
        critic: What makes a critic, called as ``critic(event_shape, context)``. The visible one must also have
            ``features_of(x, context)``, from ``(N, *event_shape)`` to ``(N, H)``, as
            :class:`~pyrogen.networks.Critic` has.
        observations: See :class:`Hybrid`.

    Raises:
        ValueError: For a negative weight; without a guide; when prepared, for a critic without features or a model
            without per-observation latent sites.

    Example:
        >>> from pyrogen.distributions import Implicit, StandardNormal
        >>> from pyrogen.inference import AmortizedGuide
        >>> from pyrogen.models import LatentVariableModel
        >>> from pyrogen.networks import MLP
        >>> generator = Implicit((1, 8, 8), context=4, noise=0, network=MLP(4, (1, 8, 8)))
        >>> model = LatentVariableModel(StandardNormal(4), generator)
        >>> guide = AmortizedGuide(model, MLP((1, 8, 8), 16))
        >>> VAEGAN()(model, guide)(torch.rand(6, 1, 8, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        particles: int = 1,
        *,
        reconstruction: float = 0.1,
        contrast: Literal["adaptive", "none"] = "adaptive",
        covariance: Covariance = "diagonal",
        ratio: RatioBuilder = Logistic,
        visible_ratio: RatioBuilder = SMOOTH,
        critic: CriticBuilder = Critic,
        observations: int | None = None,
    ) -> None:
        check_weights(reconstruction=reconstruction)
        super().__init__(
            particles,
            log_likelihood=0.0,
            reconstruction=reconstruction,
            visible_reconstructions=1.0,
            visible_samples=1.0,
            contrast=contrast,
            covariance=covariance,
            through_guide=False,
            ratio=ratio,
            visible_ratio=visible_ratio,
            critic=critic,
            observations=observations,
        )

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        _check_latents(self, draws)
        found = super().contrasts(draws)
        visible: Any = found["visible"]
        if not callable(getattr(visible.ratio.critic, "features_of", None)):
            raise ValueError(
                "VAEGAN compares reconstructions in the features of its critic, but "
                f"{type(visible.ratio.critic).__name__} has no method features_of(x, context) that gives them as "
                "(N, H); add one, or use pyrogen.networks.Critic"
            )
        return found

    def of_program(self, draws: Draws) -> Estimate:
        visible: Any = self.critics["visible"]
        terms = self._compared(draws)
        rate, teaching = self._latent_term(draws, terms)
        data = repeat((draws.data(),), self.particles)[0]
        held = draws.visible(draws.detached)  # what teaches the model alone
        metrics = {
            "rate" if self.exact else "rate_estimate": rate.mean(),
            "similarity": _distance(visible.ratio.critic, data, _through_guide(draws)),
            "verdict_reconstructions": visible.ratio.generator_loss(held),
            "verdict_samples": visible.ratio.generator_loss(draws.samples),
        }
        loss = terms.global_rate + teaching + sum(metrics.values())
        loss = loss + self.reconstruction * _distance(visible.ratio.critic, data, held)
        if terms.log_likelihoods:
            metrics["distortion"] = terms.distortion
        return Estimate(loss, {name: value.detach() for name, value in metrics.items()}, terms, loss.detach())

    def bound(self, *programs_and_batch: Tensor) -> Tensor:  # type: ignore[override]
        """There is none.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_without_bound(self))


def _distance(critic: Any, x: Tensor, shown: Tensor) -> Tensor:
    """Half the squared distance of the critic's features, summed over them, its mean over rows."""
    difference = at_least_single(critic.features_of(x, None)) - at_least_single(critic.features_of(shown, None))
    return 0.5 * difference.square().flatten(1).sum(1).mean()


def _through_guide(draws: Draws) -> Tensor:
    """What the model shows at the guide's draws, with gradients along these alone.

    The model runs once more for it: in a graph that holds its weights already they can't be held any more.
    """
    parameters = parameters_of(draws.program, draws.traces.model)
    with torch.set_grad_enabled(draws.gradients), frozen(parameters):
        program = poutine.replay(unregistered(draws.program), trace=draws.traces.guide)
        return draws.visible(sample_sites(trace_of(program, *draws.rows)))


def _mirrored(loss: str, t: Tensor) -> Tensor:
    """What the guide minimises of the critic's outputs at its pairs: the model's loss with the labels swapped."""
    if loss == "non-saturating":
        return F.softplus(t)
    return 0.5 * t.square() if loss == "least-squares" else t


def _check_latents(objective: CriticObjective, draws: Draws) -> None:
    if not draws.local:
        raise ValueError(
            f"{type(objective).__name__} needs a latent site for each observation, and the model has none in the plate "
            '"data"; use GAN for a model without a guide'
        )
    for name in draws.local:
        check_unmasked(name, draws.model[name])


def _without_bound(objective: CriticObjective) -> str:
    return (
        f"{type(objective).__name__} bounds no log-likelihood; judge samples and reconstructions, or fit an explicit "
        "guide to the frozen model"
    )

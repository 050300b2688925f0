r"""Density ratios and distances that are learned from samples alone.

A ratio sees samples of a *numerator* :math:`p_1` and of a *denominator* :math:`p_0` and trains a critic :math:`T` to
tell them apart. At the optimum of the classifying and the f-divergence losses :math:`T` gives :math:`\log p_1 / p_0`;
short of it, it is an estimate, and no bound on anything follows from it. Past 10 to 15 nats a single critic reports too
little, and fitted to a small fixed sample too much: see :func:`~pyrogen.evaluation.calibrate_ratio`, and
:class:`Telescoping` for large divergences.

The siblings differ in what the critic minimises (``_critic_loss``), how a log ratio is read off its output
(``_log_ratio``), what a program minimises that is to move the denominator onto the numerator (``_generator_loss``) and
which divergence is estimated (``_divergence``).

============================  =======================================  ==========================  ==================
ratio                         at the optimum T is                      divergence                  program minimises
============================  =======================================  ==========================  ==================
:class:`Logistic`             log p₁/p₀                                KL(p₁‖p₀)                   softplus(−T)
:class:`JensenShannon`        log p₁/p₀                                JS(p₁, p₀)                  −½ softplus(T)
:class:`DonskerVaradhan`      log p₁/p₀ + constant                     KL(p₁‖p₀)                   −log ratio
:class:`NWJ`                  log p₁/p₀ + 1                            KL(p₁‖p₀)                   −log ratio
:class:`LeastSquares`         p₁/(p₁ + p₀)                             triangular discrimination   ½ (T − 1)²
:class:`Wasserstein`          a potential of slope 1                   Wasserstein-1               −T
:class:`Hinge`                sign(p₁ − p₀)                            total variation             −T
============================  =======================================  ==========================  ==================
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrogen.arguments import as_weight, checked

__all__ = [
    "NWJ",
    "Context",
    "DonskerVaradhan",
    "Hinge",
    "JensenShannon",
    "LeastSquares",
    "Logistic",
    "OwnRatio",
    "Ratio",
    "Wasserstein",
    "at_least_single",
    "detached_sides",
    "need_pairs",
    "trailing",
]

Context = Tensor | tuple[Tensor | None, Tensor | None] | None
"""What a ratio is conditioned on: nothing, the same for both sides, or for a joint ratio one for each side."""

LARGEST_EXPONENT = 30.0
"""Where :class:`NWJ` goes on with a straight line in place of the exponential."""

SOFTNESS = 0.01
"""δ of the soft clamp that keeps probabilities of :class:`LeastSquares` positive."""


@checked()
class Ratio(nn.Module):
    r"""Base of the ratios: what they have in common, given a few functions of the critic's output.

    Args:
        critic: Any module that takes samples ``(..., *E)`` and a context ``(..., C)`` or None and returns ``(...)``,
            such as :class:`~pyrogen.networks.Critic`.
        r1: Weight γ of the penalty :math:`\tfrac{\gamma}{2} \mathbb{E}_{p_1} \|\nabla_z T(z)\|^2` on the critic's slope
            at the numerator's samples, which for a GAN are the data (Mescheder, Geiger & Nowozin 2018, *Which training
            methods for GANs do actually converge?*, 1801.04406). In a joint ratio the slope in the context counts too.

    Shapes:
        In ``loss``, ``accuracy`` and ``divergence``: numerator ``(..., *E)`` and denominator ``(..., *E)``; a context
        ``(..., C)`` that both share gives the conditional ratio :math:`p_1(z \mid c) / p_0(z \mid c)`; a pair of
        contexts, one for each side, gives the joint one, :math:`p_1(z, c) / p_0(z, c)`.

    Raises:
        ValueError: If r1 is negative, or the critic's outputs have a wrong shape.
    """

    gives_log_ratio: ClassVar[bool] = True
    """Whether :meth:`log_ratio` estimates one."""
    needs_pairs: ClassVar[bool] = False
    """Whether :meth:`loss` takes as many samples of one side as of the other."""
    event_dim: int | None = None
    """How many dimensions a sample has, where that is known; then every score is checked to be one of a sample."""
    border: ClassVar[float] = 0.0
    """The T at which both sides are equally likely; it is added to the critic's output, so that critics start there."""

    def __init__(self, critic: nn.Module, *, r1: float = 0.0) -> None:
        super().__init__()
        if r1 < 0:
            raise ValueError(f"r1 is the weight of a penalty and can't be negative, got {r1}")
        self.critic = critic
        self.r1 = as_weight(r1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """T for samples ``(..., *E)`` and a context ``(..., C)``: ``(...)``, at least float32."""
        t = self._checked(self.critic(z, context), z, context)
        return t + self.border if self.border else t

    def _checked(self, scores: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        if not self._fits(scores, z, context):
            raise ValueError(
                f"the critic must return one score for each sample: for samples {tuple(z.shape)} it returned "
                f"{tuple(scores.shape)}; build it with outputs=1 and without trailing dimensions"
            )
        return at_least_single(scores)

    def _fits(self, scores: Tensor, z: Tensor, context: Tensor | None) -> bool:
        if self.event_dim is None:
            broadcast = context is not None and scores.dim() == context.dim() - 1
            return broadcast or scores.shape == z.shape[: scores.dim()]
        leading = z.shape[: z.dim() - self.event_dim]
        return scores.shape == (leading if context is None else torch.broadcast_shapes(leading, context.shape[:-1]))

    def log_ratio(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The estimate of log p₁(z|c)/p₀(z|c) in nats: samples ``(..., *E)`` give ``(...)``.

        Raises:
            ValueError: If this kind of critic estimates no ratio.
        """
        return self._log_ratio(self(z, context))

    def loss(self, numerator: Tensor, denominator: Tensor, context: Context = None) -> Tensor:
        """What the critic minimises, a scalar. Only the critic gets a gradient: samples and context are detached."""
        return self.loss_and_accuracy(numerator, denominator, context)[0]

    def loss_and_accuracy(
        self, numerator: Tensor, denominator: Tensor, context: Context = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`loss` and :meth:`accuracy` from one pass of the critic."""
        u, v, context_u, context_v = detached_sides(numerator, denominator, context)
        penalty: Tensor | float = 0.0
        if self.r1:
            t1, slope = self._slope(u, context_u, joint=context_u is not context_v)
            penalty = 0.5 * self.r1 * slope.mean()
        else:
            t1 = self(u, context_u)
        t0 = self(v, context_v)
        loss = self._critic_loss(t1, t0) + penalty
        loss = loss + self._penalty(u, v, context_u, context_v, t1.dim())
        return loss if torch.is_grad_enabled() else loss.detach(), self._accuracy(t1, t0)

    def generator_loss(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What a program minimises over its samples z of the denominator, to look like the numerator; a scalar.

        The gradient reaches the critic's parameters too, unless the caller freezes them.
        """
        return self._generator_loss(self(z, context)).mean()

    @torch.no_grad()
    def accuracy(self, numerator: Tensor, denominator: Tensor, context: Context = None) -> Tensor:
        """The share of samples that the critic puts on their own side, each side counting one half; chance is 0.5."""
        return self._accuracy(*self._outputs(numerator, denominator, context))

    @torch.no_grad()
    def divergence(self, numerator: Tensor, denominator: Tensor, context: Context = None) -> Tensor:
        """The estimate of the divergence that this kind stands for, a scalar; in nats where it is KL or JS."""
        return self._divergence(*self._outputs(numerator, denominator, context))

    @torch.no_grad()
    def _accuracy(self, t1: Tensor, t0: Tensor) -> Tensor:
        border = self._border(t1, t0)
        return 0.5 * ((t1 > border).to(t1.dtype).mean() + (t0 <= border).to(t0.dtype).mean())

    def _outputs(self, numerator: Tensor, denominator: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        u, v, context_u, context_v = detached_sides(numerator, denominator, context)
        return self(u, context_u), self(v, context_v)

    def _slope(self, z: Tensor, context: Tensor | None, joint: bool) -> tuple[Tensor, Tensor]:
        """The outputs at z and the squared norm of their gradient in z, and in the context if it is ``joint``."""
        with torch.enable_grad():  # a slope is wanted in validation too
            z = z.detach().requires_grad_()
            if joint and context is not None:
                context = context.detach().requires_grad_()
            t = self(z, context)
            points = [z] if context is None or not joint else [z, context]
            slopes = torch.autograd.grad(t.sum(), points, create_graph=True, allow_unused=True, materialize_grads=True)
        return t, sum((at_least_single(slope).square().flatten(t.dim()).sum(-1) for slope in slopes), t.new_zeros(()))

    def _penalty(
        self, u: Tensor, v: Tensor, context_u: Tensor | None, context_v: Tensor | None, leading: int
    ) -> Tensor | float:
        """What is added to the critic's loss; there are ``leading`` dimensions before those of one sample."""
        return 0.0

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say what its critic minimises")

    def _log_ratio(self, t: Tensor) -> Tensor:
        raise ValueError(
            f"the critic of {type(self).__name__} estimates no density ratio; use Logistic, or another ratio with one"
        )

    def _generator_loss(self, t: Tensor) -> Tensor:
        return -self._log_ratio(t)

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return self._log_ratio(t1).mean()

    def _border(self, t1: Tensor, t0: Tensor) -> Tensor | float:
        """Where the two sides part; :attr:`border`, unless it depends on the outputs."""
        return self.border

    def extra_repr(self) -> str:
        return f"r1={self.r1}" if self.r1 else ""


class Logistic(Ratio):
    r"""The ratio of a logistic classifier.

    .. math:: \min_T \; \mathbb{E}_{p_1} \log(1 + e^{-T}) + \mathbb{E}_{p_0} \log(1 + e^{T})

    At the optimum :math:`T = \log p_1 / p_0`. The program minimises :math:`\mathbb{E}_{p_0} \log(1 + e^{-T})`, the
    non-saturating loss. Goodfellow et al. 2014, *Generative adversarial nets*, 1406.2661; as a ratio in variational
    inference: Mescheder, Nowozin & Geiger 2017, *Adversarial variational Bayes*, 1701.04722.

    Example:
        >>> from pyrogen.networks import Critic
        >>> _ = torch.manual_seed(0)
        >>> ratio = Logistic(Critic(1, hidden=(32,)))
        >>> optimizer = torch.optim.Adam(ratio.parameters(), lr=0.01)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     ratio.loss(1 + torch.randn(128, 1), torch.randn(128, 1)).backward()
        ...     optimizer.step()
        >>> z = torch.tensor([[-1.0], [0.5], [2.0]])  # exact: z - 1/2
        >>> bool((ratio.log_ratio(z) - (z[:, 0] - 0.5)).abs().max() < 0.4)
        True
    """

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return F.softplus(-t1).mean() + F.softplus(t0).mean()

    def _log_ratio(self, t: Tensor) -> Tensor:
        return t

    def _generator_loss(self, t: Tensor) -> Tensor:
        return F.softplus(-t)


class JensenShannon(Logistic):
    r"""The f-GAN form of the Jensen–Shannon divergence: a lower bound on it in expectation, for any critic.

    .. math:: \operatorname{JS}(p_1, p_0) = \max_T \; \log 2 - \tfrac12 \mathbb{E}_{p_1} \log(1 + e^{-T})
              - \tfrac12 \mathbb{E}_{p_0} \log(1 + e^{T}) \; \le \log 2

    This is :math:`\log 2` less half the loss of :class:`Logistic`, so the critic is the same one. What differs is the
    estimate, and that the program minimises the divergence itself, :math:`-\tfrac12 \mathbb{E}_{p_0} \log(1 + e^{T})`,
    whose gradient vanishes where the critic is sure. Nowozin, Cseke & Tomioka 2016, *f-GAN*, 1606.00709, where JS
    stands without the factor one half.
    """

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return 0.5 * super()._critic_loss(t1, t0) - math.log(2)

    def _generator_loss(self, t: Tensor) -> Tensor:
        return -0.5 * F.softplus(t)

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return -self._critic_loss(t1, t0)


@checked()
class DonskerVaradhan(Ratio):
    r"""The Donsker–Varadhan representation of the Kullback–Leibler divergence.

    .. math:: \operatorname{KL}(p_1 \| p_0) = \max_T \; \mathbb{E}_{p_1} T - \log \mathbb{E}_{p_0} e^{T}

    At the optimum :math:`T = \log p_1 / p_0` up to a constant, :math:`\log \mathbb{E}_{p_0} e^T`. An average of
    :math:`\mathbb{E}_{p_0} e^T` over the steps is kept, by which log ratios are normalised; it also stands in the
    denominator of the gradient, :math:`\mathbb{E}_{p_0}[e^T \nabla T]` over that average, since the gradient of the
    logarithm of a minibatch's mean is biased (Belghazi et al. 2018, *Mutual information neural estimation*,
    1801.04062). The average is updated in training mode, and only while gradients are recorded.

    A minibatch sees :math:`\mathbb{E}_{p_0} e^T` only through the few samples where :math:`e^T` is large: past a few
    nats its variance is exponential in the divergence (McAllester & Stratos 2020, 1811.04251).

    Args:
        critic, r1: See :class:`Ratio`.
        momentum: The share of the average that each step keeps; the first steps form a plain mean.
    """

    log_normaliser: Tensor
    updates: Tensor

    def __init__(self, critic: nn.Module, *, r1: float = 0.0, momentum: float = 0.99) -> None:
        super().__init__(critic, r1=r1)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("log_normaliser", torch.zeros(()))
        self.register_buffer("updates", torch.zeros(()))

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        log_mean = _log_mean_exp(t0)
        if not (self.training and torch.is_grad_enabled()):
            return log_mean - t1.mean()
        self._update(log_mean.detach())
        # The value is the bound's, the gradient that of the mean of exp(T) over its average.
        surrogate = (log_mean - self.log_normaliser.clone()).exp()
        return surrogate + (log_mean - surrogate).detach() - t1.mean()

    @torch.no_grad()
    def _update(self, log_mean: Tensor) -> None:
        self.updates += 1
        # Tensors throughout: to read a number off a GPU would stop it.
        new = (1 / self.updates).clamp(min=1 - self.momentum)
        kept = torch.log1p(-new) + self.log_normaliser  # −∞ at the first step: nothing is kept
        self.log_normaliser.copy_(torch.logaddexp(kept, new.log() + log_mean.to(new.dtype)))

    def _log_ratio(self, t: Tensor) -> Tensor:
        return t - self.log_normaliser

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return t1.mean() - _log_mean_exp(t0)

    def _border(self, t1: Tensor, t0: Tensor) -> Tensor | float:
        return self.log_normaliser


class NWJ(Ratio):
    r"""The bound of Nguyen, Wainwright and Jordan on the Kullback–Leibler divergence.

    .. math:: \operatorname{KL}(p_1 \| p_0) = \max_T \; \mathbb{E}_{p_1} T - \mathbb{E}_{p_0} e^{T - 1}

    At the optimum :math:`T = 1 + \log p_1 / p_0`; T is 1 and the critic's output. The exponential is continued by its
    tangent where its exponent passes 30, so that it can't overflow. Its variance is exponential in the divergence, as
    that of :class:`DonskerVaradhan`. Nguyen, Wainwright & Jordan 2010, *Estimating divergence functionals and the
    likelihood ratio by convex risk minimization*, 0809.0853; as f-GAN's KL: Nowozin et al. 2016, 1606.00709.
    """

    border = 1.0

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return _tangent_exp(t0 - 1).mean() - t1.mean()

    def _log_ratio(self, t: Tensor) -> Tensor:
        return t - 1

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return -self._critic_loss(t1, t0)


class LeastSquares(Ratio):
    r"""The least-squares critic of LSGAN, with labels 1 and 0.

    .. math:: \min_T \; \tfrac12 \mathbb{E}_{p_1} (T - 1)^2 + \tfrac12 \mathbb{E}_{p_0} T^2

    At the optimum :math:`T = p_1 / (p_1 + p_0)`, so the log ratio is its logit. T is ½ and the critic's output, not
    confined to (0, 1), so the log ratio is :math:`\log s(T) - \log s(1 - T)` with the soft clamp :math:`s(t) = \tfrac12
    (t + \sqrt{t^2 + 4 \delta^2})`, δ = 0.01: the logit to 0.04 where T is between 0.05 and 0.95, ±4.6 where it is 0 or
    1, and rising everywhere, logarithmically outside. Beyond 3 nats either way it says hardly more than the sign: a
    probability near 1 is fitted to an absolute error.

    The divergence is the triangular discrimination :math:`\tfrac12 \int (p_1 - p_0)^2 / (p_1 + p_0) \in [0, 1]`. Mao et
    al. 2017, *Least squares generative adversarial networks*, 1611.04076.
    """

    border = 0.5

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return 0.5 * ((t1 - 1).square().mean() + t0.square().mean())

    def _log_ratio(self, t: Tensor) -> Tensor:
        # log s(t) = log δ + asinh(t / 2δ), which is exact for large negative t too.
        return torch.asinh(t / (2 * SOFTNESS)) - torch.asinh((1 - t) / (2 * SOFTNESS))

    def _generator_loss(self, t: Tensor) -> Tensor:
        return 0.5 * (t - 1).square()

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return 1 - 4 * self._critic_loss(t1, t0)


@checked()
class Wasserstein(Ratio):
    r"""The critic of WGAN-GP: a potential whose slope is held at 1 by a gradient penalty.

    .. math:: \min_T \; \mathbb{E}_{p_0} T - \mathbb{E}_{p_1} T
              + \lambda \, \mathbb{E} \left( \|\nabla_{\hat z} T(\hat z)\| - 1 \right)^2,
              \quad \hat z = \epsilon u + (1 - \epsilon) v, \; \epsilon \sim U(0, 1)

    :math:`\mathbb{E}_{p_1} T - \mathbb{E}_{p_0} T` estimates the Wasserstein-1 distance; there is no density ratio. In
    a joint ratio the contexts are interpolated and count for the slope as well. With a critic under spectral
    normalisation, ``gradient_penalty=0.0`` leaves the penalty out. Gulrajani et al. 2017, *Improved training of
    Wasserstein GANs*, 1704.00028.

    Args:
        critic, r1: See :class:`Ratio`.
        gradient_penalty: λ.

    Raises:
        ValueError: In ``loss``, if numerator and denominator are of different shapes: samples are paired.
    """

    gives_log_ratio = False
    needs_pairs = True

    def __init__(self, critic: nn.Module, *, gradient_penalty: float = 10.0, r1: float = 0.0) -> None:
        super().__init__(critic, r1=r1)
        if gradient_penalty < 0:
            raise ValueError(f"gradient_penalty is a weight and can't be negative, got {gradient_penalty}")
        self.gradient_penalty = as_weight(gradient_penalty)

    def _penalty(
        self, u: Tensor, v: Tensor, context_u: Tensor | None, context_v: Tensor | None, leading: int
    ) -> Tensor | float:
        if not self.gradient_penalty:
            return 0.0
        need_pairs(u, v)
        share = torch.rand(u.shape[:leading], dtype=u.dtype, device=u.device)
        between, context, joint = _between(v, u, share), context_u, context_u is not context_v
        if joint and context_u is not None and context_v is not None:
            context = _between(context_v, context_u, share)
        _, slope = self._slope(between, context, joint)
        # The root has no slope at 0, where the gradient of a critic may well be: keep off it.
        return self.gradient_penalty * (slope.clamp(min=1e-12).sqrt() - 1).square().mean()

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return t0.mean() - t1.mean()

    def _generator_loss(self, t: Tensor) -> Tensor:
        return -t

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return t1.mean() - t0.mean()

    def _border(self, t1: Tensor, t0: Tensor) -> Tensor | float:
        return 0.5 * (t1.mean() + t0.mean())


class Hinge(Ratio):
    r"""The hinge loss of geometric GAN, SNGAN and BigGAN.

    .. math:: \min_T \; \mathbb{E}_{p_1} \max(0, 1 - T) + \mathbb{E}_{p_0} \max(0, 1 + T)

    At the optimum :math:`T = \operatorname{sign}(p_1 - p_0)` and the loss is 2 (1 − TV): one minus half of it estimates
    the total variation distance, in [0, 1]. There is no density ratio. Lim & Ye 2017, *Geometric GAN*, 1705.02894.
    """

    gives_log_ratio = False

    def _critic_loss(self, t1: Tensor, t0: Tensor) -> Tensor:
        return F.relu(1 - t1).mean() + F.relu(1 + t0).mean()

    def _generator_loss(self, t: Tensor) -> Tensor:
        return -t

    def _divergence(self, t1: Tensor, t0: Tensor) -> Tensor:
        return 1 - 0.5 * self._critic_loss(t1, t0)


class OwnRatio(Ratio):
    """A ratio of a user's own, a module of which only ``log_ratio`` and ``loss`` are known.

    Args:
        ratio: The module.

    Raises:
        TypeError: If it is no such module.
    """

    def __init__(self, ratio: nn.Module) -> None:
        if not (
            isinstance(ratio, nn.Module) and callable(getattr(ratio, "log_ratio", None)) and hasattr(ratio, "loss")
        ):
            raise TypeError(
                f"expected a ratio, a module with log_ratio(z, context) and loss(numerator, denominator, context), got "
                f"a {type(ratio).__name__}; see pyrogen.inference.Logistic"
            )
        super().__init__(ratio)

    def log_ratio(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._checked(self.critic.log_ratio(z, context), z, context)  # type: ignore[operator]

    def loss_and_accuracy(
        self, numerator: Tensor, denominator: Tensor, context: Context = None
    ) -> tuple[Tensor, Tensor]:
        u, v, context_u, context_v = detached_sides(numerator, denominator, context)
        shared = context_u if context_u is context_v else (context_u, context_v)
        loss = self.critic.loss(u, v, shared)  # type: ignore[operator]
        if loss.dim():
            raise ValueError(f"the loss of {type(self.critic).__name__} must be one number, got {tuple(loss.shape)}")
        with torch.no_grad():
            accuracy = self._accuracy(self.log_ratio(u, context_u), self.log_ratio(v, context_v))
        return loss, accuracy

    def generator_loss(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.log_ratio(z, context).mean()


def need_pairs(numerator: Tensor, denominator: Tensor) -> None:
    """Raise a ``ValueError`` unless the samples of both sides can be paired."""
    if numerator.shape != denominator.shape:
        raise ValueError(
            "samples of numerator and denominator are interpolated in pairs and must have one shape, got "
            f"{tuple(numerator.shape)} and {tuple(denominator.shape)}; draw as many of one as of the other"
        )


def detached_sides(
    numerator: Tensor, denominator: Tensor, context: Context
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides and the context of each, detached; one context that both share stays one object."""
    if isinstance(context, tuple):
        first, second = (None if side is None else side.detach() for side in context)
        return numerator.detach(), denominator.detach(), first, second
    shared = None if context is None else context.detach()
    return numerator.detach(), denominator.detach(), shared, shared


def at_least_single(t: Tensor) -> Tensor:
    """``t``, in single precision if it came in half: losses need the digits."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def trailing(share: Tensor, like: Tensor) -> Tensor:
    """``share`` with dimensions of 1 behind, so that it broadcasts against ``like``."""
    return share.reshape(share.shape + (1,) * (like.dim() - share.dim()))


def _between(v: Tensor, u: Tensor, share: Tensor) -> Tensor:
    """v + share · (u − v) in the precision of u; under autocast that of v, which a network made, may be another."""
    return torch.lerp(v.to(u.dtype), u, trailing(share, u).to(u.dtype))


def _log_mean_exp(t: Tensor) -> Tensor:
    return torch.logsumexp(t.flatten(), 0) - math.log(t.numel())


def _tangent_exp(t: Tensor) -> Tensor:
    """The exponential, continued by its tangent past :data:`LARGEST_EXPONENT`."""
    low = t.clamp(max=LARGEST_EXPONENT)
    return low.exp() * (1 + t - low)

"""Objectives in which a critic alone teaches the model."""

from functools import partial
from typing import ClassVar, Literal, get_args

from pyro import poutine
from torch import Tensor

from pyrogen.inference.contrasts import Contrast, CriticBuilder, VisibleContrast
from pyrogen.inference.draws import Draws
from pyrogen.inference.hybrids import CriticObjective
from pyrogen.inference.objectives import Estimate
from pyrogen.inference.ratios import Hinge, LeastSquares, Logistic, Ratio, Wasserstein
from pyrogen.inference.terms import Terms
from pyrogen.networks.critics import Critic

__all__ = ["GAN"]

GANLoss = Literal["non-saturating", "wasserstein-gp", "hinge", "least-squares"]


class GAN(CriticObjective):
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
        r1: Weight of a penalty on the critic's slope at the data (Mescheder, Geiger & Nowozin 2018, 1801.04406).
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
    validates_as: ClassVar[str | None] = None

    def __init__(self, loss: GANLoss = "non-saturating", *, r1: float = 0.0, critic: CriticBuilder = Critic) -> None:
        super().__init__()
        if loss not in get_args(GANLoss):
            raise ValueError(f"loss is one of {', '.join(get_args(GANLoss))}, got {loss!r}")
        self.loss_ = loss  # the plain name is that of the method by which Pyro asks for a loss
        self.r1 = r1
        self.critic = critic
        self.critic_steps = 5 if loss == "wasserstein-gp" else 1

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        kinds: dict[str, type[Ratio]] = {
            "non-saturating": Logistic,
            "wasserstein-gp": Wasserstein,
            "hinge": Hinge,
            "least-squares": LeastSquares,
        }
        ratio = partial(kinds[self.loss_], r1=self.r1)
        return {"visible": VisibleContrast(draws, ratio, self.critic, reconstructions=False, samples=True)}

    def of_program(self, draws: Draws) -> Estimate:
        ratio: Ratio = self.critics["visible"].ratio  # type: ignore[assignment]
        loss = ratio.generator_loss(draws.samples)
        terms = Terms({}, {}, {}, len(draws.batch[0]), poutine.Trace(), draws.prior_trace, False)
        return Estimate(loss, {"verdict_samples": loss.detach()}, terms, loss.detach())

    def bound(self, *programs_and_batch: Tensor) -> Tensor:  # type: ignore[override]
        """There is none: a GAN has no likelihood."""
        raise ValueError("a GAN bounds no likelihood; judge its samples, or fit a guide to its frozen model")

    def __repr__(self) -> str:
        return f"GAN(loss={self.loss_!r})"

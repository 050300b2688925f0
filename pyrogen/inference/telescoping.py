r"""Telescoping density ratios: a large divergence crossed by a chain of small ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.inference.ratios import Context, Logistic, at_least_single, detached_sides, need_pairs, trailing
from pyrogen.networks import Critic

__all__ = ["Telescoping"]


@checked()
class Telescoping(Logistic):
    r"""A log ratio as a sum of M log ratios between neighbours on a path from the numerator to the denominator.

    .. math:: \log \frac{p_1(z)}{p_0(z)} = \sum_{k=0}^{M-1} \log \frac{p_{(k)}(z)}{p_{(k+1)}(z)} \approx \sum_k T_k(z),
              \quad z_k = \sqrt{1 - \alpha_k^2} \, u + \alpha_k v, \; u \sim p_1, \; v \sim p_0

    Each *bridge* :math:`T_k` is a logistic classifier of :math:`z_k` against :math:`z_{k+1}`; all are outputs of one
    critic and are trained at once. The spacing is that of equal angles, :math:`\alpha_k = \sin(k \pi / 2M)`: pairs of
    samples are rotated into each other. For N(m, I) against N(0, I) no bridge is then longer than :math:`(\pi / 2M)^2
    \operatorname{KL}`, 1/26 of it at M = 8, and none of the steps, at either end, is out of proportion. Rhodes, Xu &
    Gutmann 2020, *Telescoping density-ratio estimation*, 2006.12204, whose spacing is that of equal α or powers of it,
    and whose bridges share all but the last layers.

    A narrow numerator far inside of the denominator (a standard deviation of 1e-6 against 1) still leaves its whole
    divergence to the first bridge: waymarks are mixtures of samples, and the first already holds sin(π/2M) of v.

    A call returns the sum over bridges, and accuracy and divergence are those of the sum. A pair of contexts is
    mixed as the samples are.

    Args:
        critic: A module that takes samples ``(..., *E)`` and a context ``(..., C)`` or None and returns ``(..., M)``:
            ``Critic(features, context, outputs=M)``; see :meth:`between`.
        bridges: M; by default what the critic says are its ``outputs``.
        r1: See :class:`Ratio`; the slope is that of the sum.

    Raises:
        ValueError: If the critic's outputs are not M, or when ``loss`` gets numerator and denominator of different
            shapes: samples are paired.

    Example:
        >>> ratio = Telescoping.between(features=10, bridges=4)
        >>> ratio.log_ratio(torch.zeros(5, 10)).shape
        torch.Size([5])

        In an objective, whose critic then has an output for each bridge:

        >>> from functools import partial
        >>> from pyrogen.inference import AVB
        >>> avb = AVB(ratio=Telescoping, critic=partial(Critic, outputs=8))
    """

    needs_pairs = True

    def __init__(self, critic: nn.Module, *, bridges: int | None = None, r1: float = 0.0) -> None:
        super().__init__(critic, r1=r1)
        outputs = getattr(critic, "outputs", None)
        bridges = outputs if bridges is None else bridges
        if not isinstance(bridges, int) or bridges < 2 or (isinstance(outputs, int) and outputs != bridges):
            raise ValueError(
                f"the critic of a telescoping ratio has one output for each of 2 or more bridges, got {bridges=} and "
                f"a critic with outputs={outputs}; build it with Critic(features, context, outputs=bridges), in an "
                "objective by ratio=Telescoping, critic=functools.partial(Critic, outputs=8)"
            )
        self.bridges = bridges

    @classmethod
    def between(
        cls,
        features: int | Sequence[int],
        context: int = 0,
        *,
        bridges: int = 8,
        hidden: Sequence[int] = (256, 256),
        r1: float = 0.0,
    ) -> "Telescoping":
        """A telescoping ratio with a :class:`~pyrogen.networks.Critic` that has an output for each bridge."""
        return cls(Critic(features, context, hidden=hidden, outputs=bridges), bridges=bridges, r1=r1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The sum of the bridges for samples ``(..., *E)`` and a context ``(..., C)``: ``(...)``."""
        return self.outputs_of(z, context).sum(-1)

    def outputs_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The bridges one by one, ``(..., M)``."""
        scores = self.critic(z, context)
        if scores.dim() == 0 or scores.shape[-1] != self.bridges:
            raise ValueError(
                f"the critic must return one score for each of {self.bridges} bridges, (..., {self.bridges}), got "
                f"{tuple(scores.shape)}; build it with outputs={self.bridges}"
            )
        return at_least_single(scores)

    def loss_and_accuracy(
        self, numerator: Tensor, denominator: Tensor, context: Context = None
    ) -> tuple[Tensor, Tensor]:
        """The mean of the bridges' logistic losses, a scalar, and how often their sum tells the ends apart."""
        need_pairs(numerator, denominator)
        u, v, context_u, context_v = detached_sides(numerator, denominator, context)
        path, contexts = self._path(u, v), None
        if context_u is not None and context_v is not None:
            contexts = self._path(context_u, context_v) if context_u is not context_v else self._repeated(context_u)
        # Waymark k is the numerator of bridge k and the denominator of bridge k - 1.
        t = self.outputs_of(path, contexts)
        t1, t0 = t[:-1].diagonal(dim1=0, dim2=-1), t[1:].diagonal(dim1=0, dim2=-1)
        loss = self._critic_loss(t1, t0)
        if self.r1:
            _, slope = self._slope(u, context_u, joint=context_u is not context_v)
            loss = loss + 0.5 * self.r1 * slope.mean()
        accuracy = self._accuracy(t[0].sum(-1), t[-1].sum(-1))
        return loss if torch.is_grad_enabled() else loss.detach(), accuracy

    def _path(self, u: Tensor, v: Tensor) -> Tensor:
        """The M + 1 waymarks from u to v, ``(M + 1, *u.shape)``, the ends being u and v themselves."""
        angles = torch.linspace(0, math.pi / 2, self.bridges + 1, dtype=u.dtype, device=u.device)[1:-1]
        inner = trailing(angles.cos(), u[None]) * u + trailing(angles.sin(), u[None]) * v
        return torch.cat([u[None], inner, v[None]])

    def _repeated(self, context: Tensor) -> Tensor:
        return context.expand(self.bridges + 1, *context.shape)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"bridges={self.bridges}", super().extra_repr()]))

"""Semi-implicit distributions: a mixture over noise whose components have a density, and the mixture an estimate."""

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyrogen.arguments import check_counts, checked
from pyrogen.distributions.bounds import log_sum_exp
from pyrogen.distributions.families import Normal, check_context
from pyrogen.distributions.implicit import apply_to_rows, default_noise
from pyrogen.networks.mlp import MLP, as_shape

__all__ = ["SemiImplicit", "SemiImplicitDistribution", "has_stochastic_density"]

REMEMBERED = 8
"""How many draws a distribution object knows again; it makes as many where several sites share it."""
ROWS_AT_ONCE = 2**17
"""About how many components are scored together, to bound the memory of evaluations with many particles."""


@dataclass(frozen=True, eq=False)
class _Draw:
    """A draw and what made it; ``differentiable`` says whether the component has a graph."""

    value: Tensor
    noise: Tensor
    component: Any
    differentiable: bool

    def resembles(self, value: Tensor) -> bool:
        """Whether a value may be this draw after a transform and back."""
        if value.shape != self.value.shape or not value.numel():
            return False
        with torch.no_grad():
            near = (value - self.value).abs() <= 1e-3 * (1 + self.value.abs())
            return bool(near.float().mean() >= 0.5)


class SemiImplicitDistribution(dist.TorchDistribution):
    r"""A mixture over noise, :math:`q(z) = \int q(z \mid \epsilon) \, p(\epsilon) \, d\epsilon`; see
    :class:`SemiImplicit` for what its ``log_prob`` estimates.

    Args:
        component: From noise ``S + (n,)`` to the distribution q(z | ε) of batch shape ``S``, for any shape ``S`` that
            ends with the batch shape.
        noise: Standard normal noise of a given shape, ``S`` to ``S + (n,)``.
        batch_shape: Batch shape.
        event_shape: Event shape; the support is all of it.
        draws: Number K of further components by which a draw is scored.
    """

    arg_constraints: ClassVar = {}
    has_rsample = True
    stochastic_density = True

    def __init__(
        self,
        component: Callable[[Tensor], Any],
        noise: Callable[[Size], Tensor],
        batch_shape: Sequence[int],
        event_shape: Sequence[int],
        draws: int,
    ) -> None:
        self.component = component
        self.noise = noise
        self.draws = draws
        # Shared by expanded copies.
        self.drawn: deque[_Draw] = deque(maxlen=REMEMBERED)
        super().__init__(Size(batch_shape), Size(event_shape), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        event_dim = len(self.event_shape)
        return constraints.independent(constraints.real, event_dim) if event_dim else constraints.real

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "SemiImplicitDistribution":
        new = self._get_checked_instance(SemiImplicitDistribution, _instance)
        SemiImplicitDistribution.__init__(new, self.component, self.noise, batch_shape, self.event_shape, self.draws)
        new.drawn = self.drawn
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = self.noise(Size(sample_shape) + self.batch_shape)
        component = self.component(noise)
        value = component.rsample()
        self.drawn.append(_Draw(value, noise, component, torch.is_grad_enabled()))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """An estimate of log q in nats, another one at every call; see :class:`SemiImplicit`.

        Shapes:
            value ``(*S, *batch_shape, *event_shape)`` gives ``(*S, *batch_shape)``.
        """
        shape = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        draw = self._source_of(value)
        fresh = self.draws + (draw is None)
        at_once = max(1, min(fresh, ROWS_AT_ONCE // max(1, shape.numel())))
        scores = [
            self.component(self.noise(Size((min(at_once, fresh - first),)) + shape)).log_prob(value)
            for first in range(0, fresh, at_once)
        ]
        if draw is not None:
            # A draw made without a graph would withhold the gradient of the component it came from.
            stale = torch.is_grad_enabled() and not draw.differentiable
            own = self.component(draw.noise) if stale else draw.component
            scores.append(own.log_prob(value).expand(shape).unsqueeze(0))
        return log_sum_exp(torch.cat(scores), 0) - math.log(self.draws + 1)

    def _source_of(self, value: Tensor) -> _Draw | None:
        """The draw that a value is, of which there is no doubt, or that it resembles."""
        latest_first = [*reversed(self.drawn)]
        same = (draw for draw in latest_first if draw.value is value)
        return next(same, None) or next((draw for draw in latest_first if draw.resembles(value)), None)

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({shapes}, draws={self.draws})"


def has_stochastic_density(fn: Any) -> bool:
    """Whether the density of a distribution is an estimate that holds for its own draws only, also inside
    ``to_event``, ``mask``, ``expand`` or under a transform.

    Objectives that score the draws of one distribution object by another, equal one can't use it: there the estimate
    lacks the component that made the draw, log q is from below, and an ELBO with it bounds nothing.
    """
    while fn is not None:
        if getattr(fn, "stochastic_density", False):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


@checked()
class SemiImplicit(nn.Module):
    r"""A mixture over noise: components with a density, of which there are as many as values of the noise.

    .. math:: q(z \mid c) = \int q(z \mid \epsilon, c) \, p(\epsilon) \, d\epsilon,
              \quad \epsilon \sim \mathcal{N}(0, I)

    Its density has no closed form and is estimated by components. For a draw of its own, made from
    :math:`\epsilon_0`, and for any other value ``log_prob`` returns, with the further :math:`\epsilon_k` drawn anew
    at each call,

    .. math::
        \log \hat q(z \mid c) = \log \frac{1}{K + 1} \sum_{k=0}^K q(z \mid \epsilon_k, c), \qquad
        \log \tilde q(z \mid c) = \log \frac{1}{K + 1} \sum_{k=1}^{K+1} q(z \mid \epsilon_k, c).

    *As a posterior*, with draws of its own: put the :math:`\epsilon_k` in random order. Given all of them, z comes from
    one chosen at random, so its density is :math:`\hat q` itself, and

    .. math:: \mathbb{E} \, \frac{p(x, z)}{\hat q(z)} = \mathbb{E}_\epsilon \int \hat q(z) \frac{p(x, z)}{\hat q(z)} dz
              = p(x)

    (the balance heuristic of multiple importance sampling). The weights are unbiased, hence the ELBO, the
    importance-weighted bounds and the log-likelihood by importance sampling stay bounds, without any change to the
    objective; :math:`\mathbb{E} \log \hat q \ge \mathbb{E} \log q`, so the ELBO is from below and rises with K to that
    of q. *As a prior*, with values from elsewhere, :math:`\tilde q` is unbiased and :math:`\mathbb{E} \log \tilde q \le
    \log q`, again from below. As a posterior that scores values from elsewhere (draws that were copied, cut, or made by
    another distribution object) it bounds nothing.

    Draws are known again as tensors, or by their values where a transform was applied and inverted: a value of the same
    shape of which at least half the numbers agree to 1e-3, since those where the transform saturates come back changed.
    The last eight draws of a distribution object and of its expanded copies are remembered.

    Yin & Zhou 2018, *Semi-implicit variational inference*, 1805.11183; the estimate in importance weights: Sobolev &
    Vetrov 2019, *Importance weighted hierarchical variational inference*, 1905.03290.

    By default the components' parameters are a linear map of the context, the noise and a perceptron of both: the
    family contains normals with a full covariance, and starts near the mean-field :class:`Normal`.

    Args:
        features: Event shape, or its length ``D``.
        context: Width ``C`` of the context, or 0.
        noise: Number ``n`` of noise inputs; by default D + 16.
        mixing: A module from ``(N, C + n)``, the context first, to ``(N, H)``, what the components are conditioned on;
            ``hidden`` does not apply to it. Given the same input it must give the same output.
        draws: Number K of further components by which a draw is scored.
        hidden: Widths of the default mixing network.
        family: The components, built as ``family(features, H)``; their distributions need reparameterised draws.

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)``, none gives ``()``; the event shape is ``features``.

    Raises:
        ValueError: Without noise or further draws; when called with another context than the one declared; at a draw,
            if a component is a point mass or has other shapes than declared.

    Example:
        >>> q = SemiImplicit(3, context=5)(torch.zeros(7, 5))
        >>> q.log_prob(q.rsample()).shape
        torch.Size([7])
    """

    zero: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        noise: int | None = None,
        mixing: nn.Module | None = None,
        draws: int = 16,
        hidden: Sequence[int] = (128, 128),
        family: Callable[[int | Sequence[int], int], nn.Module] = Normal,
    ) -> None:
        super().__init__()
        self.features = features
        self.context = context
        check_counts(least=0, context=context)
        self.noise = noise
        self.mixing = mixing
        self.draws = draws
        self.hidden = hidden
        self.family = family
        self.shape = as_shape(features)
        self.noises = default_noise(math.prod(self.shape)) if noise is None else noise
        if self.noises < 1 or draws < 1:
            raise ValueError(f"expected at least one noise input and one further draw, got {noise=} and {draws=}")
        inputs = context + self.noises
        if mixing is None:
            self.default = _Mixing(inputs, hidden)
        self.width = inputs + sum(hidden[-1:]) if mixing is None else _width(mixing, inputs)
        self.components = family(features, self.width)
        # A buffer, so that noise stands on the module's device and has its precision.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> SemiImplicitDistribution:
        check_context(context, self.context)
        batch = () if context is None else context.shape[:-1]
        component = partial(self._component, context)
        return SemiImplicitDistribution(component, self._noise, batch, self.shape, self.draws)

    def _noise(self, shape: Size) -> Tensor:
        return torch.randn(*shape, self.noises, dtype=self.zero.dtype, device=self.zero.device)

    def _component(self, context: Tensor | None, noise: Tensor) -> Any:
        batch = noise.shape[:-1]
        inputs = noise if context is None else torch.cat([context.expand(batch + context.shape[-1:]), noise], -1)
        mixing = self.default if self.mixing is None else self.mixing
        component = self.components(apply_to_rows(mixing, inputs, (self.width,)))
        if isinstance(component, dist.Delta):
            raise ValueError("components must have a density and a point mass has none; pass another family than Delta")
        if component.batch_shape != batch or component.event_shape != self.shape:
            raise ValueError(
                f"expected components of batch shape {tuple(batch)} and event shape {self.shape}, got "
                f"{tuple(component.batch_shape)} and {tuple(component.event_shape)}; the family must build a "
                "conditional distribution over features with its batch shape from the context"
            )
        return component

    def extra_repr(self) -> str:
        return f"{self.features}, context={self.context}, noise={self.noises}, draws={self.draws}"


class _Mixing(nn.Module):
    """Context and noise as they are, and a perceptron of them beside."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = None
        if hidden:
            self.layers = nn.Sequential(MLP(inputs, hidden[-1], hidden[:-1], activation=nn.GELU), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x if self.layers is None else torch.cat([x, self.layers(x)], -1)


def _width(mixing: nn.Module, inputs: int) -> int:
    """The width of what a mixing network gives, from a run that leaves no mark on it."""
    parameter = next((p for p in mixing.parameters() if p.is_floating_point()), torch.zeros(()))
    with torch.no_grad():
        return copy.deepcopy(mixing).eval()(parameter.new_zeros(2, inputs)).shape[-1]

"""The layers of a :class:`pyrogen.distributions.Flow`: Pyro's transforms, started near the identity.

Each builder is called as ``(features, context, hidden)`` and returns a conditional transform of vectors. A
context of width 0 means none: the transform is then conditioned on an empty vector.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from pyro.distributions import transforms as T
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.spline import ConditionedSpline
from pyro.nn import ConditionalAutoRegressiveNN, ConditionalDenseNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.nn.functional import softplus

from pyrogen.distributions.bounds import finite_gradient
from pyrogen.distributions.families import Parameters
from pyrogen.networks.mlp import dense

__all__ = [
    "BUILDERS",
    "Builder",
    "Layer",
    "Name",
    "affine_autoregressive",
    "affine_coupling",
    "element_wise_spline",
    "planar",
    "shrink",
    "spline_autoregressive",
    "spline_coupling",
]

BINS = 8
BOX = 3.0
SPLINE_SIZES = [BINS, BINS, BINS - 1, BINS]  # widths, heights, slopes at the inner knots, Pyro's "lambdas"
IDENTITY_SLOPE = math.log(math.expm1(1 - 1e-3))  # Pyro's slopes are 0.001 plus the softplus of this
FARTHEST = 1e8
"""How large the numbers are that a network of a layer sees; of larger ones it sees that."""
BOUND, SHIFT_BOUND, PLANAR_BOUND = 2.0, 1e6, 1e5
AFFINE_LIMITS = ((0.0, SHIFT_BOUND), (0.0, BOUND))
SPLINE_LIMITS = ((0.0, BOUND), (0.0, BOUND), (IDENTITY_SLOPE, BOUND), (0.0, BOUND))
SHORTEST, SMALLEST_SLOPE = 1e-12, 1e-30
INITIAL_WEIGHT_SCALE = 0.01

Name = Literal["affine_autoregressive", "affine_coupling", "spline_autoregressive", "spline_coupling", "planar"]
Widths = tuple[int, ...]
Layer = ConditionalTransformModule | TransformModule
Builder = Callable[[int, int, Widths], Layer]


def affine_autoregressive(features: int, context: int, hidden: Widths) -> Layer:
    """An affine map of each feature given the earlier ones, in one pass."""
    network = autoregressive(features, context, hidden, [1, 1])
    return T.ConditionalAffineAutoregressive(Bounded(network, AFFINE_LIMITS))


def affine_coupling(features: int, context: int, hidden: Widths) -> Layer:
    """An affine map of half the features given the others."""
    network = coupling(features, context, hidden, [1, 1])
    return T.ConditionalAffineCoupling(features // 2, Bounded(network, AFFINE_LIMITS))


def spline_autoregressive(features: int, context: int, hidden: Widths) -> Layer:
    """A spline of each feature given the earlier ones, in one pass."""
    network = Bounded(autoregressive(features, context, hidden, SPLINE_SIZES), SPLINE_LIMITS)
    return ConditionalSplineAutoregressive(features, network, count_bins=BINS, bound=BOX)


def spline_coupling(features: int, context: int, hidden: Widths) -> Layer:
    """A spline of half the features given the others."""
    network = Bounded(coupling(features, context, hidden, SPLINE_SIZES), SPLINE_LIMITS)
    return ConditionalSplineCoupling(network, features)


def element_wise_spline(features: int, context: int, hidden: Widths) -> Layer:
    """A spline of each feature given the context alone."""
    sizes = [features * size for size in SPLINE_SIZES]
    network = Bounded(FromContext(context, hidden, sizes), SPLINE_LIMITS)
    return ConditionalSpline(network, features, BINS, bound=BOX, order="linear")


def planar(features: int, context: int, hidden: Widths) -> Layer:
    """A move along one direction by a function of one projection."""
    network = FromContext(context, hidden, [1, features, features])
    # Pyro moves x along u + (softplus(w·u) − 1 − w·u) w / |w|², which vanishes for u along w with
    # w·u = log(e − 1). Exactly there, the bias would have no gradient: hence the noise.
    w = torch.randn(features) / math.sqrt(features)
    u = math.log(math.e - 1) * w / w.square().sum() + INITIAL_WEIGHT_SCALE * torch.randn(features)
    with torch.no_grad():
        network.last.initial.copy_(torch.cat([torch.zeros(1), u, w]))
    return ConditionalPlanar(network)


BUILDERS: dict[str, Builder] = {
    "affine_autoregressive": affine_autoregressive,
    "affine_coupling": affine_coupling,
    "spline_autoregressive": spline_autoregressive,
    "spline_coupling": spline_coupling,
    "planar": planar,
}


def autoregressive(features: int, context: int, hidden: Widths, sizes: list[int]) -> ConditionalAutoRegressiveNN:
    """A network with ``sizes`` outputs for each feature, from the earlier features and the context."""
    if min(hidden) < features:
        raise ValueError(f"hidden widths must be {features} or more, the number of features, got {hidden}")
    # In the natural order: the flow's own permutations change it from layer to layer.
    order = cast(torch.LongTensor, torch.arange(features))
    network = ConditionalAutoRegressiveNN(features, context, list(hidden), sizes, permutation=order)
    shrink(cast(nn.Linear, network.layers[-1]))
    return network


def coupling(features: int, context: int, hidden: Widths, sizes: list[int]) -> ConditionalDenseNN:
    """A network with ``sizes`` outputs for each moved feature, from the fixed ones and the context."""
    fixed, moved = features // 2, features - features // 2
    network = ConditionalDenseNN(fixed, context, list(hidden), [moved * size for size in sizes])
    shrink(cast(nn.Linear, network.layers[-1]))
    return network


def shrink(layer: nn.Linear) -> None:
    """Make a network's last layer small, so that what it parametrises starts near its neutral value."""
    with torch.no_grad():
        layer.weight.mul_(INITIAL_WEIGHT_SCALE)
        layer.bias.zero_()


class Bounded(nn.Module):
    r"""A network whose outputs are bounded smoothly, to an offset plus or minus a bound b.

    .. math:: o + b \tanh(r / b)

    What shapes a layer has b = 2. Invertible is not enough in single precision: two affine layers of scale exp(-5), or
    one spline with slopes of exp(-10), lose half the digits. Pyro's own clamp of affine log-scales to [-5, 3] is too
    wide for that, and passes gradients on as if it did nothing; its splines have no bound. Shifts have b = 1e6, which
    changes nothing below 400: that no layer's output overflows.

    The network sees numbers up to 1e8. The density stays exact, for the parameters of a layer may be any function of
    what they depend on.
    """

    def __init__(self, network: nn.Module, limits: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        self.network = network
        self.limits = limits

    @property
    def permutation(self) -> Tensor:
        return cast(Tensor, self.network.permutation)

    def get_permutation(self) -> Tensor:
        return self.permutation

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        x = x.clamp(-FARTHEST, FARTHEST)
        if context is None:
            outputs = self.network(x)
        else:
            # Pyro inverts an autoregression from zeros of the default dtype, whatever that of the network.
            outputs = self.network(x.to(context.dtype), context.clamp(-FARTHEST, FARTHEST))
        return tuple(saturating(raw, *limits) for raw, limits in zip(outputs, self.limits, strict=True))


def saturating(raw: Tensor, offset: float, bound: float) -> Tensor:
    """Numbers bounded smoothly; far out, where their gradient is 0, that of a layer may be infinite."""
    raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw  # half precision ends below the bounds
    return finite_gradient(offset + bound * torch.tanh(raw / bound))


class FromContext(nn.Module):
    """Parameters of the given ``sizes`` that depend on the context alone; free ones without a context."""

    def __init__(self, context: int, hidden: Widths, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.trunk = nn.Sequential(*dense((context, *hidden), nn.ReLU), nn.ReLU()) if context else None
        self.last = Parameters(sum(sizes), hidden[-1] if context else 0)
        if context:
            shrink(self.last.linear)

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        h = None if self.trunk is None else self.trunk(context.clamp(-FARTHEST, FARTHEST))
        return self.last(h).split(self.sizes, -1)


class ConditionalSpline(T.ConditionalSpline):
    """Pyro's, whose splines are here :class:`Spline`."""

    def condition(self, context: Tensor) -> "Spline":
        return Spline(partial(self._params, context), self.bound, self.order)


class Spline(ConditionedSpline):
    """Pyro's spline, which it evaluates beyond its box too, where the formula overflows, before it leaves that out."""

    def spline_op(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        y, log_det = super().spline_op(inside, **kwargs)
        beyond = x != inside
        return torch.where(beyond, x, y), torch.where(beyond, 0.0, log_det)


class ConditionalSplineAutoregressive(T.ConditionalSplineAutoregressive):
    """Pyro's, whose splines are here :class:`Spline`."""

    def condition(self, context: Tensor) -> Transform:
        transform = super().condition(context)
        transform.spline = ConditionalSpline(transform.arn, self.input_dim, **self.kwargs)
        return transform


class ConditionalPlanar(T.ConditionalPlanar):
    """Pyro's, whose transforms are here :class:`Planar`."""

    def condition(self, context: Tensor) -> "Planar":
        return Planar(partial(self._params, context))


class Planar(ConditionedPlanar):
    r"""Pyro's planar transform for any parameters and values.

    .. math:: y = x + \hat u \tanh(w \cdot x + b), \quad
        \hat u = u + (\log(1 + e^{-\alpha}) - 1) \, w / |w|^2, \quad \alpha = w \cdot u

    Parameters are bounded smoothly to ±1e5, which changes nothing below 40, and |w| to 1e-12 and more. The determinant
    is :math:`h^2 + (1 - h^2) \log(1 + e^\alpha)` with h the hyperbolic tangent: nothing cancels in it.
    """

    def _call(self, x: Tensor) -> Tensor:
        parameters = self._params() if callable(self._params) else self._params
        bias, u, w = (saturating(raw, 0.0, PLANAR_BOUND) for raw in parameters)
        length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        longer = length.clamp_min(SHORTEST)
        alpha = (w * u).sum(-1, keepdim=True)
        t = (w * x).sum(-1, keepdim=True) + bias
        h, e = torch.tanh(t), torch.exp(-2 * t.abs())
        # 1 + w·û: the first term is there for a vanishing w alone.
        share = (length / longer).square()
        slope = (1 - share) * (1 + alpha) + share * (softplus(alpha) + SMALLEST_SLOPE)
        rest = 4 * e / (1 + e).square()  # 1 - h²
        self._cached_logDetJ = torch.log(h.square() + rest * slope).squeeze(-1)
        return x + (u + (softplus(-alpha) - 1) * (w / longer / longer)) * h


class ConditionalSplineCoupling(ConditionalTransformModule):
    """Splines of half the features given the others and a context; Pyro has this only without a context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, network: nn.Module, features: int) -> None:
        super().__init__()
        self.network = network
        self.features = features

    def condition(self, context: Tensor) -> Transform:
        return SplineCoupling(self.network, self.features, context)


class SplineCoupling(Transform):
    """A :class:`ConditionalSplineCoupling` given its context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, network: nn.Module, features: int, context: Tensor) -> None:
        super().__init__(cache_size=1)
        self.fixed = features // 2
        self.splines = ConditionalSpline(
            lambda fixed: network(fixed, context), features - self.fixed, BINS, bound=BOX, order="linear"
        )

    def _call(self, x: Tensor) -> Tensor:
        fixed, moved = x[..., : self.fixed], x[..., self.fixed :]
        spline = self.splines.condition(fixed)
        y = spline(moved)
        self.log_det = spline.log_abs_det_jacobian(moved, y).sum(-1)
        return torch.cat([fixed, y], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        fixed, moved = y[..., : self.fixed], y[..., self.fixed :]
        spline = self.splines.condition(fixed)
        x = spline.inv(moved)
        self.log_det = spline.log_abs_det_jacobian(x, moved).sum(-1)
        return torch.cat([fixed, x], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        known_x, known_y = self._cached_x_y
        if x is not known_x or y is not known_y:
            self(x)
        return self.log_det

"""Normalising flows as priors and as posteriors, built from Pyro's transforms."""

import copy
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, cast, get_args

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import Transform

from pyrogen.arguments import check_counts, checked
from pyrogen.distributions.bounds import finite_gradient
from pyrogen.distributions.families import Parameters, positive_scale
from pyrogen.distributions.flow_transforms import BUILDERS, Builder, Layer, Name, element_wise_spline
from pyrogen.distributions.normals import SafeNormal
from pyrogen.networks.mlp import as_shape

__all__ = ["Flow"]

FARTHEST = 0.73
"""The power of the largest number to which standardised values are cut, 1e28 in single precision.

Ten layers of scales exp(±2) can neither make more of that than there is, nor so little that its density is not zero.
"""
Direction = Literal["sampling", "density"]


@checked(but=("transform", "direction"))
class Flow(nn.Module):
    r"""A normalising flow: a prior without a context, a posterior with one.

    .. math:: z = \mu(c) + \sigma(c) \odot (T_L \circ P_L \circ \dots \circ P_2 \circ T_1)(\epsilon; c),
              \quad \epsilon \sim \mathcal{N}(0, I)

    with :math:`T_l` the transforms and :math:`P_l` fixed permutations, which are kept in the state dict. The
    location and the scale are a linear map of the context, or free parameters without one, so the family
    contains the mean-field normal one, and the box of a spline stands where the mass is. Every transform
    starts near the identity and the scale at 1: an untrained flow is nearly the mean-field normal one.

    Transforms, by name:

    - ``"affine_autoregressive"``: inverse autoregressive flow in direction ``"sampling"`` (Kingma et al.
      2016, *Improving variational inference with inverse autoregressive flow*, 1606.04934), masked
      autoregressive flow in direction ``"density"`` (Papamakarios et al. 2017, 1705.07057).
    - ``"affine_coupling"``: RealNVP (Dinh et al. 2017, *Density estimation using Real NVP*, 1605.08803).
    - ``"spline_autoregressive"``, ``"spline_coupling"``: neural spline flows (Durkan et al. 2019, 1906.04032)
      with Pyro's linear rational splines (Dolatabadi et al. 2020, 2001.05168): 8 bins on [-3, 3], the
      identity outside.
    - ``"planar"``: Rezende & Mohamed 2015, *Variational inference with normalizing flows*, 1505.05770. It has
      no inverse.

    A single feature cannot be split or ordered: for it, all but ``"planar"`` are an element-wise spline,
    since an affine flow of one feature is only a normal distribution. What shapes a layer
    (log-scales; the splines' widths, heights and slopes; shifts, by 1e6) is bounded smoothly: in single precision, 8
    layers of moderate weights are inverted to about 1e-5 nats. Deep stacks of steep splines lose more; use
    double precision where it matters.

    Coupling flows draw and score in one pass. Autoregressive ones do one of these in one pass and the other
    in as many as there are features. In either direction, the score of a value that the same distribution
    object has just drawn comes from the draw, at no further cost.

    Args:
        features: Event shape, or its length ``D``; shapes other than vectors are flattened inside.
        context: Width ``C`` of the context, or 0.
        transform: A name from the list, or a callable ``(features, context, hidden)`` that builds one layer
            on vectors: Pyro's ``ConditionalTransformModule``, or ``TransformModule`` if it needs no context.
        layers: Number ``L`` of transforms.
        hidden: Hidden widths of each transform's network; by default two of ``max(64, 2 D)``.
        direction: What is one pass, ``"sampling"`` or ``"density"``; by default the former with a context and
            the latter without.

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)``, none gives ``()``; the event shape is ``features``.

    Raises:
        ValueError: For an unknown transform or direction, for sizes that do not fit, and when called with
            another context than the one declared.
        NotImplementedError: From the distribution, where it needs the inverse of a transform without one.

    Example:
        >>> q = Flow(3, context=5)(torch.zeros(7, 5))
        >>> q.log_prob(q.rsample()).shape
        torch.Size([7])
        >>> Flow((2, 2), transform="spline_coupling", layers=2)().event_shape
        torch.Size([2, 2])
    """

    zero: Tensor
    permutations: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        transform: Name | Builder = "affine_autoregressive",
        layers: int = 4,
        hidden: Sequence[int] | None = None,
        direction: Direction | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.context = context
        check_counts(least=0, context=context)
        self.transform = transform
        self.layers = layers
        self.hidden = hidden
        self.direction = direction
        self.shape = as_shape(features)
        size = math.prod(self.shape)
        widths = (max(64, 2 * size),) * 2 if hidden is None else tuple(hidden)
        if layers < 1 or not widths:
            raise ValueError(f"expected at least one layer and one hidden width, got {layers=} and {hidden=}")
        if direction is not None and (not isinstance(direction, str) or direction not in get_args(Direction)):
            raise ValueError(f'direction must be "sampling", "density" or None, got {direction!r}')
        self.fast: Direction = direction or ("sampling" if context else "density")
        build = builder(transform, size)
        self.steps = nn.ModuleList(checked_layer(build(size, context, widths), transform) for _ in range(layers))
        self.affine = Parameters(2 * size, context)
        self.affine.start_at(torch.zeros(size), size)
        self.register_buffer("permutations", permutations(size, layers))
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        loc, raw_scale = self.affine(context).chunk(2, -1)
        # Conditional transforms serve both cases: where there is no context, they are given one of width 0.
        given = loc.new_empty(0) if context is None else context
        # The transforms are made anew for every distribution, since they hold the caches of what was drawn:
        # kept on the module, they would serve values of an earlier step's parameters, or prevent copying it.
        steps = [conditioned(step, given) for step in self.steps]
        if loc.shape[-1] > 1:
            shuffles = (T.Permute(order) for order in self.permutations)
            steps = [steps[0], *chain.from_iterable(zip(shuffles, steps[1:], strict=True))]
        if self.fast == "density":
            steps = [step.inv for step in reversed(steps)]
        steps.append(Standardising(loc, positive_scale(raw_scale), event_dim=1, cache_size=1))
        if len(self.shape) != 1:
            steps.append(T.ReshapeTransform(loc.shape[-1:], Size(self.shape), cache_size=1))
        zero = self.zero.expand(loc.shape)
        base = SafeNormal(zero, torch.ones_like(zero)).to_event(1)
        return FlowDistribution(base, steps, named(self.transform), self.fast)

    def extra_repr(self) -> str:
        return f"{self.features}, context={self.context}, transform={named(self.transform)}, {self.fast}"


class Standardising(T.AffineTransform):
    """Location and scale; its inverse keeps values far out from overflowing in the layers."""

    def _inverse(self, y: Tensor) -> Tensor:
        farthest = torch.finfo(y.dtype).max ** FARTHEST
        x = finite_gradient(y - self.loc) / finite_gradient(cast(Tensor, self.scale))
        return x.clamp(-farthest, farthest)


class FlowDistribution(dist.TransformedDistribution):
    """What a :class:`Flow` returns: it scores from its transforms' caches exactly where that is right.

    The transforms of torch and Pyro remember their last input and output by identity. This makes the score of
    a draw free, but it is wrong for a value drawn without a graph that is then scored for its gradients, and
    for any other tensor that is scored again after its content or its graph has changed.
    """

    def __init__(self, base: dist.Distribution, transforms: list[Transform], name: str, direction: Direction) -> None:
        super().__init__(base, transforms)
        self.name = name
        self.direction = direction
        # The last draw, and whether it has a graph: shared by expanded copies, as the caches are.
        self.last_draw: list = [None, False]

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "FlowDistribution":
        new = super().expand(batch_shape, _instance=self._get_checked_instance(FlowDistribution, _instance))
        new.name, new.direction, new.last_draw = self.name, self.direction, self.last_draw
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        try:
            value = super().rsample(Size(sample_shape))
        except (KeyError, NotImplementedError) as error:  # Pyro raises KeyError where there is no inverse.
            raise self.no_inverse("draw a sample", 'Build it with direction="sampling"') from error
        self.last_draw[:] = value, torch.is_grad_enabled()
        return value

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        event = self.event_shape
        if value.shape[value.dim() - len(event) :] != event:
            expected = ", ".join(["...", *map(str, event)])
            raise ValueError(f"expected a value of shape ({expected}), got {tuple(value.shape)}")
        drawn, has_graph = self.last_draw
        if value is not drawn or (torch.is_grad_enabled() and not has_graph):
            # A new tensor object is in no cache; and Pyro's networks do not broadcast a value to a context.
            value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + event))
        try:
            return super().log_prob(value)
        except (KeyError, NotImplementedError) as error:
            mend = "Score what its own rsample() returned (or its sample(), with gradients disabled), build it"
            raise self.no_inverse("score this value", mend + ' with direction="density"') from error

    def no_inverse(self, act: str, mend: str) -> NotImplementedError:
        return NotImplementedError(
            f"a flow with transform={self.name!r} and direction={self.direction!r} cannot {act}, since this "
            f"transform has no inverse. {mend}, or choose a coupling or autoregressive transform."
        )


def builder(transform: Name | Builder, features: int) -> Builder:
    """The callable that builds one layer."""
    if callable(transform):
        return transform
    if not isinstance(transform, str) or transform not in BUILDERS:
        raise ValueError(
            f"transform must be one of {', '.join(BUILDERS)}, or a callable (features, context, hidden) that "
            f"builds a transform of Pyro, got {transform!r}"
        )
    return element_wise_spline if features == 1 and transform != "planar" else BUILDERS[transform]


def checked_layer(layer: Layer, transform: Name | Builder) -> Layer:
    if not isinstance(layer, ConditionalTransformModule | TransformModule):
        raise TypeError(
            f"{named(transform)} must build a ConditionalTransformModule or TransformModule of "
            f"pyro.distributions, built a {type(layer).__name__}"
        )
    return layer


def named(transform: Name | Builder) -> str:
    return transform if isinstance(transform, str) else getattr(transform, "__name__", repr(transform))


def permutations(features: int, layers: int) -> Tensor:
    """The permutations between the layers, one a row.

    A reversal after odd layers hands the other half to a coupling, and the other order to an autoregression,
    so that two layers move every feature. A shuffle after even ones changes which features go together.
    """
    orders = [
        torch.randperm(features) if layer % 2 == 0 else torch.arange(features).flip(0) for layer in range(1, layers)
    ]
    return torch.stack(orders) if orders else torch.empty(0, features, dtype=torch.long)


def conditioned(layer: nn.Module, context: Tensor) -> Transform:
    """A transform with an empty cache of its own that shares the parameters of ``layer``."""
    if isinstance(layer, ConditionalTransform):
        return layer.condition(context).with_cache()
    shared = {id(tensor): tensor for tensor in chain(layer.parameters(), layer.buffers())}
    return cast(Transform, copy.deepcopy(layer, cast(dict[int, Any], shared))).with_cache()

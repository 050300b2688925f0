"""Implicit distributions: they can be sampled, with gradients, but have no density."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyrogen.arguments import LARGEST, checked, is_whole
from pyrogen.distributions.families import Parameters, check_context
from pyrogen.networks.mlp import as_shape, initialise

__all__ = [
    "Implicit",
    "ImplicitDistribution",
    "NoDensityError",
    "apply_to_rows",
    "default_noise",
    "is_implicit",
    "lies_on_a_surface",
]

SPARE_NOISE = 16
START = 0.1
"""Size of what the hidden layers of an untrained network add to its linear part."""


class NoDensityError(ValueError, NotImplementedError):
    """Raised where the density of an implicit distribution is asked for.

    A ``ValueError``, so that Pyro's traces add the name of the site to the message.
    """


class ImplicitDistribution(dist.TorchDistribution):
    """A distribution given by a sampler: it has draws, with gradients, but no density.

    Args:
        sampler: From a shape ``S`` (that of the samples and of the batch together) to independent draws of shape
            ``S + event_shape``, reparameterised.
        batch_shape: Batch shape.
        event_shape: Event shape; the support is all of it.
        noise: Of how many noise inputs a draw is a function, where that is known.

    Raises:
        NoDensityError: From ``log_prob``, with the objectives that do without.

    Example:
        >>> d = ImplicitDistribution(lambda shape: torch.randn(*shape, 2).exp(), (3,), (2,))
        >>> d.rsample((5,)).shape
        torch.Size([5, 3, 2])
    """

    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(
        self,
        sampler: Callable[[Size], Tensor],
        batch_shape: Sequence[int] = (),
        event_shape: Sequence[int] = (),
        noise: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.noise = noise
        super().__init__(Size(batch_shape), Size(event_shape), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        event_dim = len(self.event_shape)
        return constraints.independent(constraints.real, event_dim) if event_dim else constraints.real

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ImplicitDistribution":
        new = self._get_checked_instance(ImplicitDistribution, _instance)
        ImplicitDistribution.__init__(new, self.sampler, batch_shape, self.event_shape, self.noise)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.sampler(Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NoDensityError(
            "an implicit distribution can only be sampled, it has no density. Use an objective of pyrogen.inference "
            "that estimates density ratios or matches samples (AVB, AAE, WAE, VGH, VGHPlusPlus, AlphaGAN, VAEGAN, ALI, "
            "GAN), or a family with a density here, such as Normal, Flow or SemiImplicit"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


def is_implicit(fn: Any) -> bool:
    """Whether a distribution has no density, also inside ``to_event``, ``mask``, a transform or a mixture."""
    while fn is not None:
        if isinstance(fn, ImplicitDistribution) or is_implicit(getattr(fn, "component_distribution", None)):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def lies_on_a_surface(fn: Any) -> bool:
    """Whether draws are known to be a function of fewer noise inputs than they have values."""
    while not isinstance(fn, ImplicitDistribution):
        if (fn := getattr(fn, "base_dist", None)) is None:
            return False
    return fn.noise is not None and fn.noise < fn.event_shape.numel()


def default_noise(size: int) -> int:
    """How many noise inputs a distribution over ``size`` values gets: ``size`` and 16 to spare.

    With fewer than ``size`` the draws lie on a surface, and every ratio of densities is infinite; those to spare can
    choose between modes.
    """
    return size + SPARE_NOISE


def apply_to_rows(network: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A network from ``(..., n)`` to ``(..., *shape)``, given one batch of rows: a user's may know of no other.

    Raises:
        ValueError: If the network's output has another shape.
    """
    batch = x.shape[:-1]
    rows = x if len(batch) == 1 else x.reshape(batch.numel(), x.shape[-1])
    y = network(rows)
    if y.shape != rows.shape[:1] + shape:
        raise ValueError(
            f"expected a network from {tuple(rows.shape)}, rows of context first and then noise, to "
            f"{(len(rows), *shape)}; its output has shape {tuple(y.shape)}. Build it with these sizes, or pass others "
            "for features, context and noise"
        )
    return y if len(batch) == 1 else y.reshape(batch + shape)


@checked(but=("context", "noise"))
class Implicit(nn.Module):
    r"""A distribution given by a network of noise and context: any shape, several modes, but no density.

    .. math:: z = f(c, \epsilon), \quad \epsilon \sim \mathcal{N}(0, I)

    As a posterior see Mescheder, Nowozin & Geiger 2017, *Adversarial variational Bayes*, 1701.04722; as a prior it
    stands without a context; as a likelihood, with ``noise=0``, it is the generator of a GAN (Goodfellow et al. 2014,
    *Generative adversarial networks*, 1406.2661).

    The network built by default is :math:`f(c, \epsilon) = W c + b + V \epsilon + h(c, \epsilon)`, with h a multilayer
    perceptron that starts small and V started so that each value has its own unit of noise. Untrained it is thus
    nearly the mean-field :class:`Normal`, of unit scale around a linear map of the context, and a critic begins with a
    ratio that it can learn. Its activation is the smooth GELU: one with kinks makes a density with jumps, which no
    smooth critic can follow.

    Args:
        features: Event shape, or its length ``D``.
        context: Width ``C`` of the context, or 0.
        noise: Number ``n`` of noise inputs; by default D + 16, one for each value and some to choose between modes. 0
            makes draws a function of the context, which must then be there: a generator, but no posterior, for with
            fewer than D draws lie on a surface and every ratio of densities is infinite.
        network: A module from ``(N, C + n)``, the context first, to ``(N, *features)``; ``hidden`` and ``inject`` do
            not apply to it.
        hidden: Widths of the default network's hidden layers.
        inject: Whether the output of every hidden layer gets ``n`` fresh noise values beside it, which helps with
            posteriors of several modes.

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)``, none gives ``()``; the event shape is ``features``. Every
        draw is one pass of the network.

    Raises:
        ValueError: If there is neither noise nor context, or nothing to inject noise into; when called with another
            context than the one declared; at a draw, if the network's output does not have the shape of ``features``.

    Example:
        >>> q = Implicit(3, context=5)(torch.zeros(7, 5))
        >>> q.rsample((2,)).shape
        torch.Size([2, 7, 3])
        >>> from pyrogen.networks import MLP
        >>> Implicit((1, 8, 8), context=4, noise=0, network=MLP(4, (1, 8, 8)))(torch.zeros(7, 4)).event_shape
        torch.Size([1, 8, 8])
    """

    zero: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        noise: int | None = None,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        inject: bool = False,
    ) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.noise = noise
        self.network = network
        self.hidden = hidden
        self.inject = inject
        self.shape = as_shape(features)
        size = math.prod(self.shape)
        for name, value in {"context": context, "noise": 0 if noise is None else noise}.items():
            if not is_whole(value) or not 0 <= value <= LARGEST:
                raise ValueError(f"{name} is a whole number, 0 or more, got {value!r}")
        self.noises = default_noise(size) if noise is None else noise
        if not (self.noises or context):
            raise ValueError(
                f"expected some noise, or noise=0 with a context of which the draws are a function, got {noise=} and "
                f"{context=}"
            )
        if inject and (network is not None or not self.noises or not hidden):
            raise ValueError("inject=True puts noise into the default network's hidden layers; here it has none to put")
        if network is None:
            self.default = _Generator(size, context, self.noises, hidden, inject=inject)
        # A buffer, so that noise stands on the module's device and has its precision.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> ImplicitDistribution:
        check_context(context, self.context)
        batch = () if context is None else context.shape[:-1]
        noise = self.noises * (1 + len(self.hidden)) if self.inject else self.noises
        return ImplicitDistribution(partial(self._draw, context), batch, self.shape, noise)

    def _draw(self, context: Tensor | None, shape: Size) -> Tensor:
        inputs = [] if context is None else [context.expand(shape + context.shape[-1:])]
        if self.noises:
            inputs.append(torch.randn(*shape, self.noises, dtype=self.zero.dtype, device=self.zero.device))
        x = torch.cat(inputs, -1)
        if self.network is None:
            z = self.default(x).reshape(shape + self.shape)
        else:
            z = apply_to_rows(self.network, x, self.shape)
        return z.to(self.zero.dtype)  # under autocast a network gives half precision

    def extra_repr(self) -> str:
        return f"{self.features}, context={self.context}, noise={self.noises}, inject={self.inject}"


class _Generator(nn.Module):
    """A linear map of context and noise plus a multilayer perceptron, with fresh noise at its layers on demand."""

    def __init__(self, size: int, context: int, noise: int, hidden: Sequence[int], *, inject: bool) -> None:
        super().__init__()
        self.context = context
        self.injected = noise if inject else 0
        self.location = Parameters(size, context)
        self.spread = nn.Linear(noise, size, bias=False) if noise else None
        widths = [context + noise, *(width + self.injected for width in hidden)]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths, [*hidden, size], strict=True))
        self.activation = nn.GELU()
        last = self.layers[-1]
        initialise(self.layers, last=last)
        with torch.no_grad():
            last.weight.mul_(START)  # type: ignore[operator]
            if self.spread is not None:
                self.spread.weight.zero_()
                self.spread.weight[torch.arange(size), torch.arange(size) % noise] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        context, noise = x.split([self.context, x.shape[-1] - self.context], -1)
        linear = self.location(context if self.context else None)
        if self.spread is not None:
            linear = linear + self.spread(noise)
        first, *others = self.layers
        h = first(x)
        for layer in others:
            h = self.activation(h)
            if self.injected:
                h = torch.cat([h, torch.randn(*h.shape[:-1], self.injected, dtype=h.dtype, device=h.device)], -1)
            h = layer(h)
        return linear + h

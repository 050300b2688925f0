"""Families that are explicit in every direction: standard normal, normal, multivariate normal and point mass.

A *family* is a class of conditional distribution: an ``nn.Module`` whose call returns a Pyro distribution. Called as
``family(features, context)`` it builds one; with ``context=0`` its parameters are free and it can serve as a prior,
with a context its parameters are a linear map of the context and it can serve as an amortised posterior.

Log-densities, of these families and of the other ones, hold in single precision for all parameters and values up to
1e30: they are never NaN nor ∞, and -∞ only below -3.4e38, where single precision ends. Gradients are finite.
"""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyrogen.arguments import check_counts, checked, shown
from pyrogen.distributions.normals import SafeMultivariateNormal, SafeNormal
from pyrogen.networks.mlp import as_shape

__all__ = ["Delta", "MultivariateNormal", "Normal", "Parameters", "StandardNormal", "check_context", "positive_scale"]

SMALLEST_SCALE = 1e-6
UNIT_OFFSET = math.log(math.e - 1)
"""What softplus takes to 1."""


def positive_scale(raw: Tensor) -> Tensor:
    r"""A scale from an unconstrained value: 1 at zero, never below 1e-6.

    .. math:: s = 10^{-6} + \log(1 + (e - 1) \exp(r))

    It falls exponentially but grows linearly, so that a context far from those seen in training can neither make it
    vanish nor explode: the logarithm is bounded from below and grows as that of ``raw``. It needs no bound from above,
    since densities hold for every scale that a network can put out.
    """
    return SMALLEST_SCALE + softplus(raw + UNIT_OFFSET)


def check_context(context: Tensor | None, width: int) -> None:
    """Raise a ``ValueError`` for another context than ``(..., width)``, or any for a width of 0; where distributions
    are validated also for NaN and infinity."""
    if context is None and not width:
        return
    if not width or not isinstance(context, Tensor) or context.shape[-1:] != (width,):
        came = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else shown(context)
        if not width:
            raise ValueError(
                f"this distribution was built without a context but got one of {came}; pass context= when building it"
            )
        raise ValueError(f"expected a context of shape (..., {width}), got {'none' if context is None else came}")
    if Distribution._validate_args and not torch.compiler.is_compiling() and not context.isfinite().all():
        raise ValueError(
            "the context holds NaN or infinity; give a finite one, and where a network made it look at its weights"
        )


@effectful(type="linear")
def _linear(layer: nn.Linear, context: Tensor) -> Tensor:
    """A layer's output, as an effect, so that particles, which share a context, can share the work."""
    return layer(context)


class Parameters(nn.Module):
    """The ``outputs`` real parameters of a distribution: free ones, or a linear map of a context.

    Args:
        outputs: How many parameters.
        context: Width ``C`` of the context, or 0 for free parameters.

    Shapes:
        context ``(..., C)`` gives ``(..., outputs)``; without a context the result is ``(outputs,)``.
    """

    def __init__(self, outputs: int, context: int = 0) -> None:
        super().__init__()
        check_counts(least=0, context=context)
        self.outputs = outputs
        self.context = context
        if context:
            self.linear = nn.Linear(context, outputs)
        else:
            self.free = nn.Parameter(torch.zeros(outputs))

    def forward(self, context: Tensor | None = None) -> Tensor:
        check_context(context, self.context)
        if not self.context:
            return self.free
        return _linear(self.linear, context, name="linear")

    @property
    def initial(self) -> Tensor:
        """The parameters that hold the values taken at a context of zero; for initialisation."""
        return self.linear.bias if self.context else self.free

    def start_at(self, values: Tensor, first: int) -> None:
        """Let the parameters from number ``first`` on start at ``values``, whatever the context."""
        with torch.no_grad():
            self.initial[first : first + len(values)] = values
            if self.context:
                self.linear.weight[first : first + len(values)] = 0.0


@checked()
class StandardNormal(nn.Module):
    r"""The fixed prior of most latent-variable models.

    .. math:: p(z) = \mathcal{N}(z; 0, I)

    Args:
        features: Event shape, or its length.

    Example:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    zero: Tensor

    def __init__(self, features: int | Sequence[int]) -> None:
        super().__init__()
        self.features = features
        self.shape = as_shape(features)
        # A buffer, so that the distribution stands on the module's device and has its precision.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        batch = () if context is None else context.shape[:-1]
        zero = self.zero.expand(batch + self.shape)
        return SafeNormal(zero, torch.ones_like(zero)).to_event(len(self.shape))

    def extra_repr(self) -> str:
        return f"{self.features}"


@checked()
class Normal(nn.Module):
    r"""A normal distribution with diagonal covariance: the mean-field family.

    .. math:: q(z \mid c) = \prod_j \mathcal{N}(z_j; \mu_j(c), \sigma_j(c)^2)

    Kingma & Welling 2014, *Auto-encoding variational Bayes*, 1312.6114.

    Args:
        features: Event shape, or its length ``D``.
        context: Width ``C`` of the context; 0 makes location and scale free parameters, started at N(0, I). The scale
            starts at 1 whatever the context.

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)`` and event shape ``(D,)``.

    Example:
        >>> Normal(3, context=5)(torch.zeros(7, 5)).batch_shape
        torch.Size([7])
    """

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.shape = as_shape(features)
        size = math.prod(self.shape)
        self.parameters_of = Parameters(2 * size, context)
        self.parameters_of.start_at(torch.zeros(size), size)

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        loc, raw = self.parameters_of(context).chunk(2, -1)
        if len(self.shape) != 1:
            shape = loc.shape[:-1] + self.shape
            loc, raw = loc.reshape(shape), raw.reshape(shape)
        return SafeNormal(loc, positive_scale(raw)).to_event(len(self.shape))


@checked()
class MultivariateNormal(nn.Module):
    r"""A normal distribution with full covariance, through its Cholesky factor.

    .. math:: q(z \mid c) = \mathcal{N}(z; \mu(c), L(c) L(c)^\top), \quad L = \operatorname{diag}(\sigma) \, T

    with T lower triangular and of unit diagonal: scales of the values' own on the left, so that the factor can be
    inverted to full precision however different they are.

    Args:
        features: Event shape, or its length ``D``; all values of the event are correlated with each other.
        context: Width ``C`` of the context; 0 makes the parameters free, started at N(0, I).

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)`` and event shape ``(D,)``.

    Example:
        >>> MultivariateNormal(3)().covariance_matrix.shape
        torch.Size([3, 3])
    """

    lower: Tensor

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.shape = as_shape(features)
        d = math.prod(self.shape)
        self.parameters_of = Parameters(2 * d + d * (d - 1) // 2, context)
        self.parameters_of.start_at(torch.zeros(d + d * (d - 1) // 2), d)
        self.register_buffer("lower", torch.tril_indices(d, d, -1), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        d = math.prod(self.shape)
        parameters = self.parameters_of(context)
        loc, raw, below = parameters.split([d, d, self.lower.shape[1]], -1)
        unit = torch.diag_embed(torch.ones_like(raw))
        unit[..., self.lower[0], self.lower[1]] = below
        normal = SafeMultivariateNormal(loc, positive_scale(raw), unit)
        if len(self.shape) == 1:
            return normal
        return dist.TransformedDistribution(normal, [ReshapeTransform(torch.Size((d,)), torch.Size(self.shape))])


@checked()
class Delta(nn.Module):
    r"""A point mass at a learned location: turns a VAE into an autoencoder.

    .. math:: q(z \mid c) = \delta(z - \mu(c))

    Its log-density counts as zero, so ``ELBO(beta=0.0)`` with this guide is the loss of a plain autoencoder, and
    ``ELBO()`` that of one penalised by −log p(z), the maximum a posteriori estimate. A rate, a marginal KL or a
    log-likelihood by importance sampling is not defined for a point mass.

    Args:
        features: Event shape, or its length ``D``.
        context: Width ``C`` of the context; 0 makes the location a free parameter, started at 0.

    Example:
        >>> Delta(2, context=3)(torch.zeros(4, 3)).rsample().shape
        torch.Size([4, 2])
    """

    def __init__(self, features: int | Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.shape = as_shape(features)
        self.parameters_of = Parameters(math.prod(self.shape), context)

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        loc = self.parameters_of(context)
        return dist.Delta(loc.reshape(loc.shape[:-1] + self.shape), event_dim=len(self.shape))

r"""Normal distributions whose log-densities overflow only where their values do.

Torch divides by squared scales: in single precision these overflow from 1.8e19 and vanish below 3.7e-23, and their
gradients do so from :math:`\sigma^4` on. Here differences are divided by the scale first. Below -3.4e38, where single
precision ends, log-densities are -∞; they are never NaN for finite numbers up to 1e30.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.diag_normal_mixture import _MixDiagNormalSample
from torch import Size, Tensor

from pyrogen.distributions.bounds import finite_gradient, log_sum_exp, widest

__all__ = ["SafeMixture", "SafeMixtureOfDiagNormals", "SafeMultivariateNormal", "SafeNormal", "solved", "triangle"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class SafeNormal(dist.Normal):
    r"""Independent normal values.

    .. math:: \log p(x) = -\tfrac12 z^2 - \log \sigma - \tfrac12 \log 2\pi, \quad z = (x - \mu) / \sigma
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        scale = finite_gradient(self.scale)
        z = finite_gradient(value - self.loc) / scale
        return -0.5 * z * z - scale.log() - HALF_LOG_2PI


class SafeMultivariateNormal(dist.MultivariateNormal):
    r"""A normal of the covariance :math:`L L^\top` with :math:`L = \operatorname{diag}(\sigma) \, T`.

    .. math:: \log p(x) = -\tfrac12 \|y\|^2 - \sum_j \log \sigma_j - \tfrac{D}{2} \log 2\pi,
        \quad T y = (x - \mu) / \sigma

    Args:
        loc: μ, ``(..., D)``.
        scale: σ, positive, ``(..., D)``.
        unit: T, lower triangular and of unit diagonal, ``(..., D, D)``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, unit: Tensor) -> None:
        super().__init__(loc, scale_tril=scale.unsqueeze(-1) * unit)
        self.scale, self.unit = scale, unit

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "SafeMultivariateNormal":
        new = self._get_checked_instance(SafeMultivariateNormal, _instance)
        new.scale, new.unit = self.scale, self.unit
        return cast(SafeMultivariateNormal, super().expand(Size(batch_shape), _instance=new))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        scale = finite_gradient(self.scale)
        y = solved(self.unit, finite_gradient(value - self.loc) / scale)
        return (-0.5 * y * y).sum(-1) - scale.log().sum(-1) - HALF_LOG_2PI * y.shape[-1]


def triangle(normal: dist.MultivariateNormal) -> tuple[Tensor, Tensor]:
    """Scales ``(..., D)`` and the unit triangle ``(..., D, D)`` by whose product a normal's covariance is factored."""
    if isinstance(normal, SafeMultivariateNormal):
        return normal.scale, normal.unit
    scale = normal.scale_tril.diagonal(dim1=-2, dim2=-1)
    return scale, normal.scale_tril / scale.unsqueeze(-1)


def solved(unit: Tensor, x: Tensor) -> Tensor:
    r""":math:`T^{-1} x` for unit triangles ``(..., D, D)`` and vectors ``(*S, ..., D)``.

    What overflows on the way becomes the largest number: its square is infinite, but its gradient is zero.
    """
    x = finite_gradient(x)
    lead = x.shape[: x.dim() + 1 - unit.dim()]
    # The vectors that share a triangle are columns of one right-hand side.
    columns = x.reshape(lead.numel(), *x.shape[len(lead) :]).movedim(0, -1)
    y = torch.linalg.solve_triangular(finite_gradient(unit), columns, upper=False, unitriangular=True)
    largest = torch.finfo(y.dtype).max
    return torch.nan_to_num(y, nan=largest).movedim(-1, 0).reshape(*lead, *y.shape[:-1])


class SafeMixture(dist.MixtureSameFamily):
    """A mixture whose components may be flows: values meet the components in full shape, not by broadcasting."""

    def log_prob(self, value: Tensor) -> Tensor:
        components = self.component_distribution
        value = self._pad(value)
        shape = torch.broadcast_shapes(value.shape, components.batch_shape + components.event_shape)
        log_prob = components.log_prob(value.expand(shape))
        return log_sum_exp(log_prob + self.mixture_distribution.logits, -1)


class SafeMixtureOfDiagNormals(dist.MixtureOfDiagNormals):
    """A mixture of normals with diagonal covariances."""

    def log_prob(self, value: Tensor) -> Tensor:
        scale = finite_gradient(self.coord_scale)
        z = finite_gradient(value.unsqueeze(-2) - self.locs) / scale
        log_p = self.categorical.logits - (0.5 * z * z).sum(-1) - scale.log().sum(-1)
        return log_sum_exp(log_p, -1) - HALF_LOG_2PI * self.dim

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        which = self.categorical.sample(Size(sample_shape))
        shape = Size(sample_shape) + self.locs.shape[:-2] + (self.dim,)
        logits, probs = self.component_logits, self.categorical.probs
        return _Draw.apply(self.locs, self.coord_scale, logits, probs, which, shape)


class _Draw(_MixDiagNormalSample):
    """Pyro's draw, its gradient in double precision: it has densities, not their logarithms, and that of a hundred
    values is zero in single precision, hence the gradient NaN."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wide = widest(gradient)
        saved = SimpleNamespace(saved_tensors=[each.to(wide) for each in ctx.saved_tensors])
        found = _MixDiagNormalSample.backward(saved, gradient.to(wide))
        return tuple(None if each is None else each.to(gradient.dtype) for each in found)

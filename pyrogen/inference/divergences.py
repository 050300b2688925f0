"""Divergences between the distributions of two sites, in closed form where there is one."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyrogen.distributions.bounds import finite_gradient
from pyrogen.distributions.normals import SafeMultivariateNormal, SafeNormal, solved, triangle

__all__ = ["closed_form_kl", "is_point_mass", "kl_by_dimension"]


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    r"""The Kullback–Leibler divergence in nats, or None where no closed form is known.

    .. math:: \operatorname{KL}(q \| p) = \mathbb{E}_q [\log q(z) - \log p(z)]

    Point masses have none: their density is not one. Beside torch's and Pyro's own pairs, normals are known here of
    any covariance, and hold in single precision as far as their value does: it is never NaN for finite parameters up to
    1e30, and ∞ where it is past 3.4e38.

    Shapes:
        The broadcast batch shape of both.
    """
    if is_point_mass(q) or is_point_mass(p):
        return None
    if _is_normal(q) and _is_normal(p):
        return _kl_of_values(q, p)
    if _is_independent_normal(q) and _is_independent_normal(p):
        ndims = q.reinterpreted_batch_ndims
        if ndims == p.reinterpreted_batch_ndims:
            return sum_rightmost(_kl_of_values(q.base_dist, p.base_dist), ndims)
    if _is_normal_vector(q) and _is_normal_vector(p):
        return _kl_of_vectors(q, p)
    try:
        return torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return None


def kl_by_dimension(q: Any, p: Any) -> Tensor | None:
    """The divergences of each value of the event where both distributions are independent over it, else None.

    Shapes:
        batch shape + ``(n,)``.
    """
    if not (isinstance(q, dist.Independent) and isinstance(p, dist.Independent)):
        return None
    if q.reinterpreted_batch_ndims != p.reinterpreted_batch_ndims:
        return None
    kl = closed_form_kl(q.base_dist, p.base_dist)
    return None if kl is None else kl.flatten(-q.reinterpreted_batch_ndims)


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a point mass, also inside ``to_event`` or under a transform."""
    while fn is not None:
        if isinstance(fn, dist.Delta):
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _is_normal(fn: Any) -> bool:
    # Those that extend them may have a divergence of their own, registered with torch.
    return type(fn) in (torch.distributions.Normal, dist.Normal, SafeNormal)


def _is_independent_normal(fn: Any) -> bool:
    return isinstance(fn, dist.Independent) and _is_normal(fn.base_dist)


def _is_full_normal(fn: Any) -> bool:
    full = (torch.distributions.MultivariateNormal, dist.MultivariateNormal, SafeMultivariateNormal)
    return type(fn) in full


def _is_normal_vector(fn: Any) -> bool:
    return _is_full_normal(fn) or (_is_independent_normal(fn) and fn.reinterpreted_batch_ndims == 1)


def _kl_of_values(q: Any, p: Any) -> Tensor:
    scale_q, scale_p = finite_gradient(q.scale), finite_gradient(p.scale)
    ratio, shift = scale_q / scale_p, finite_gradient(q.loc - p.loc) / scale_p
    return 0.5 * ratio * ratio + 0.5 * shift * shift - 0.5 - ratio.log()


def _kl_of_vectors(q: Any, p: Any) -> Tensor:
    r""":math:`\tfrac12 (\|L_p^{-1} L_q\|^2 + \|L_p^{-1} (\mu_q - \mu_p)\|^2 - D) + \log \det L_p - \log \det L_q`."""
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    q, p = q.expand(batch), p.expand(batch)
    (scale_q, unit_q), (scale_p, unit_p) = (map(finite_gradient, _triangle(each)) for each in (q, p))
    ratio, shift = scale_q / scale_p, finite_gradient(q.mean - p.mean) / scale_p
    columns = (ratio.unsqueeze(-1) * unit_q).movedim(-1, 0).expand(-1, *batch, -1)
    if _is_full_normal(p):
        columns, shift = solved(unit_p, columns), solved(unit_p, shift)
    quadratic = (0.5 * columns * columns).sum(0) + 0.5 * shift * shift - 0.5
    return (quadratic - ratio.log()).sum(-1)


def _triangle(fn: Any) -> tuple[Tensor, Tensor]:
    """Scales ``(..., D)`` and the unit triangle ``(..., D, D)`` of a normal."""
    if _is_full_normal(fn):
        return triangle(fn)
    scale = fn.base_dist.scale
    return scale, torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)

"""Divergences between the distributions of two sites, in closed form where there is one."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["closed_form_kl", "is_point_mass", "kl_by_dimension"]


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    r"""The Kullback–Leibler divergence in nats, or None where no closed form is known.

    .. math:: \operatorname{KL}(q \| p) = \mathbb{E}_q [\log q(z) - \log p(z)]

    Point masses have none: their density is not one. Beside torch's and Pyro's own pairs, a multivariate normal
    against independent normals is known here.

    Shapes:
        The broadcast batch shape of both.
    """
    if is_point_mass(q) or is_point_mass(p):
        return None
    if isinstance(q, dist.MultivariateNormal) and _is_diagonal_normal(p):
        return _kl_full_diagonal(q, p)
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


def _is_diagonal_normal(p: Any) -> bool:
    return (
        isinstance(p, dist.Independent)
        and p.reinterpreted_batch_ndims == 1
        and isinstance(p.base_dist, torch.distributions.Normal)
    )


def _kl_full_diagonal(q: Any, p: Any) -> Tensor:
    loc, scale = p.base_dist.loc, p.base_dist.scale
    variance = q.scale_tril.square().sum(-1)
    log_det = q.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    quadratic = (variance + (q.loc - loc).square()) / scale.square()
    return (0.5 * (quadratic - 1.0) + scale.log() - log_det).sum(-1)

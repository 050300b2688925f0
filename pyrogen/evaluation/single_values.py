"""One value at a time: marginal densities of distributions in closed form, and densities from draws."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.distributions.transforms import biject_to
from torch import Tensor
from torch.distributions import Transform

from pyrogen.inference.programs import Site, bare, is_real

__all__ = ["marginal_log_prob", "neighbour_log_density", "unconstrained"]

NEIGHBOURS = 10


def marginal_log_prob(fn: Any, value: Tensor) -> Tensor | None:
    r"""The log-density of each value of an event on its own, or None where it has no closed form.

    .. math:: \log q_j(z_j) = \log \int q(z) \, dz_{\setminus j}

    Known for independent values, normals of any covariance, mixtures of these, and what element-wise transforms or a
    change of shape make of them.

    Shapes:
        value ``(*S, *batch_shape, *event_shape)`` gives the same.

    Example:
        >>> correlated = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[4.0, 1.9], [1.9, 1.0]]))
        >>> marginal_log_prob(correlated, torch.zeros(2)) - dist.Normal(0.0, torch.tensor([2.0, 1.0])).log_prob(
        ...     torch.zeros(2))
        tensor([0., 0.])
    """
    if fn.event_shape.numel() == 1:
        return fn.log_prob(value).reshape(value.shape)
    if isinstance(fn, dist.Independent):
        return marginal_log_prob(fn.base_dist, value)
    if isinstance(fn, (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return dist.Normal(fn.mean, fn.variance.sqrt()).log_prob(value)
    if isinstance(fn, dist.MixtureOfDiagNormals):
        log_q = dist.Normal(fn.locs, fn.coord_scale).log_prob(value.unsqueeze(-2))
        return (log_q + fn.component_logits.log_softmax(-1).unsqueeze(-1)).logsumexp(-2)
    if isinstance(fn, dist.MixtureSameFamily):
        return _of_mixture(fn, value)
    if isinstance(fn, dist.TransformedDistribution):
        return _of_transformed(fn.base_dist, fn.transforms, value)
    return None


def _of_mixture(fn: Any, value: Tensor) -> Tensor | None:
    components, event_dim = fn.component_distribution, fn.event_dim
    axis = -1 - event_dim
    lead = value.shape[: value.dim() - event_dim]
    spread = value.unsqueeze(axis).expand(*lead, components.batch_shape[-1], *fn.event_shape)
    log_q = marginal_log_prob(components, spread)
    if log_q is None:
        return None
    weights = fn.mixture_distribution.logits.log_softmax(-1)
    return (log_q + weights.reshape(*weights.shape, *(1,) * event_dim)).logsumexp(axis)


def _of_transformed(base: Any, transforms: Sequence[Transform], value: Tensor) -> Tensor | None:
    if not transforms:
        return marginal_log_prob(base, value)
    last = transforms[-1]
    if isinstance(last, T.ComposeTransform):
        return _of_transformed(base, [*transforms[:-1], *last.parts], value)
    reshapes = isinstance(last, T.ReshapeTransform)
    each = last if reshapes else _by_element(last)
    if each is None:
        return None
    inner = each.inv(value)
    log_q = _of_transformed(base, transforms[:-1], inner)
    if log_q is None:
        return None
    return each(log_q) if reshapes else log_q - each.log_abs_det_jacobian(inner, value)


def _by_element(transform: Any) -> Any | None:
    """A transform of single values, without the declaration that they are one event; None where it mixes them."""
    if isinstance(transform, T.IndependentTransform):
        return _by_element(transform.base_transform)
    if isinstance(transform, T.AffineTransform):
        return T.AffineTransform(transform.loc, transform.scale)
    by_element = transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
    return transform if by_element and transform.bijective else None


def unconstrained(site: Site, values: Tensor) -> tuple[Tensor, Tensor, bool]:
    r"""Values of a site mapped to the whole space, u, and what its log-densities gain by it.

    .. math:: \log q_u(u) = \log q_z(z) + \log \left| \frac{\partial z}{\partial u} \right|

    Shapes:
        values ``(M, *nested plates, *event)`` give u ``(M, *nested plates, *unconstrained event)`` and what is gained,
        ``(M, *nested plates, *event)`` where the map acts on single values, which the last result says.
    """
    if is_real(site.support):
        return values, torch.zeros_like(values), True
    transform = biject_to(bare(site.support))
    u = transform.inv(values)
    single = transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
    return u, transform.log_abs_det_jacobian(u, values), single


def neighbour_log_density(at: Tensor, draws: Tensor, *, own: bool, neighbours: int = NEIGHBOURS) -> Tensor:
    r"""The log-density of single values by the distance to the k-th nearest draw.

    .. math:: \log \hat q(z) = \psi(k) - \psi(m + 1) - \log 2 \rho_k(z)

    of m draws, :math:`\rho_k` being half the width of the interval around z that reaches the k-th. The mean over draws
    of q is minus the entropy estimate of Kozachenko & Leonenko 1987, in the form of Kraskov, Stögbauer & Grassberger
    2004, cond-mat/0305641; the mean difference of two is the divergence estimate of Wang, Kulkarni & Verdú 2009,
    *Divergence estimation for multidimensional densities via k-nearest-neighbor distances*. Both are consistent for any
    fixed k.

    Args:
        at: Where, ``(M, n)``.
        draws: Of each of n values, ``(m, n)``; with ``own``, ``(m + 1, n)``.
        own: Whether ``at`` are the first M of the draws, each of which is then no neighbour of itself.
        neighbours: The number k.

    Returns:
        Log-densities ``(M, n)`` in double precision.

    Raises:
        ValueError: If there are not more draws than neighbours, or so many coincide that a distance is zero.

    Example:
        >>> z = torch.randn(2000, 1)
        >>> entropy = -neighbour_log_density(z, z, own=True).mean()
        >>> bool((entropy - 0.5 * math.log(2 * math.pi * math.e)).abs() < 0.1)
        True
    """
    if len(draws) < neighbours + own:
        raise ValueError(f"a density by {neighbours} neighbours needs more draws than {len(draws)}")
    at, (ordered, order) = at.cpu().double(), draws.cpu().double().sort(0)
    if own:
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(draws)).unsqueeze(-1).expand_as(order))
        place = rank[: len(at)]
    else:
        place = torch.searchsorted(ordered.T.contiguous(), at.T.contiguous()).T
    edge = torch.full((neighbours, at.shape[1]), math.inf, dtype=torch.float64)
    padded = torch.cat([-edge, ordered, edge])
    # The k nearest are a run in the sorted draws: of all runs that may be it, the one whose farther end is nearest.
    radius = torch.full_like(at, math.inf)
    for first in range(neighbours + 1):
        low = padded.gather(0, place + first)
        high = padded.gather(0, place + first + neighbours - 1 + own)
        radius = torch.minimum(radius, torch.maximum(at - low, high - at))
    if (radius <= 0).any():
        raise ValueError(
            f"more than {neighbours} draws of a latent value coincide, so it has no density: the distribution has "
            "point masses there, or its values are rounded"
        )
    others = torch.tensor(float(len(draws) - own), dtype=torch.float64)
    constant = torch.digamma(torch.tensor(float(neighbours), dtype=torch.float64)) - torch.digamma(others + 1)
    return constant - torch.log(2 * radius)

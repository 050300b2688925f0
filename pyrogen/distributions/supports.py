r"""From real numbers onto the support of a distribution, without reaching its bounds or overflowing."""

import math
from typing import Any

import torch
from pyro.distributions import transforms as T
from pyro.distributions.transforms import biject_to
from torch import Tensor
from torch.distributions import Transform, constraints

from pyrogen.distributions.bounds import bounded, finite_gradient, log_slope, unbounded

__all__ = ["HalfLine", "to_support"]

LIMIT = 80.0
"""What logarithms are bounded to: e^±80 are numbers of single precision, and so are products with moderate ones."""


def to_support(support: constraints.Constraint, *, cache_size: int = 0) -> Transform:
    """The bijection from real numbers onto a support: torch's, but :class:`HalfLine` where that is an exponential.

    Args:
        support: The support, of values or of an event.
        cache_size: 1 to score draws, which a :class:`HalfLine` then remembers, and nothing else.

    Example:
        >>> to_support(constraints.positive)(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([1.8049e-35, 1.0000e+00, 5.5406e+34])
        >>> to_support(constraints.greater_than(1.0))(torch.tensor(-20.0)) > 1
        tensor(True)
    """
    if isinstance(support, constraints.independent):
        base = to_support(support.base_constraint, cache_size=cache_size)
        return T.IndependentTransform(base, support.reinterpreted_batch_ndims)
    if type(support) in (constraints.greater_than, constraints.greater_than_eq):  # not Pyro's softplus_positive
        return HalfLine(support, support.lower_bound, cache_size=cache_size)  # type: ignore[attr-defined]
    if type(support) is constraints.less_than:
        return HalfLine(support, support.upper_bound, sign=-1, cache_size=cache_size)
    return biject_to(support)


class HalfLine(Transform):
    r"""The real line onto the numbers above a bound, or below it.

    .. math:: y = b \pm e^{s(u)}, \quad s(u) = u \, \bigl(1 + |u / 80|^{16}\bigr)^{-1/16}

    s(u) is u itself in single precision up to 28, and bounded smoothly by ±80. Where the exponential is too small to
    change b, y is the number next to b.

    Args:
        codomain: The half-line as a constraint.
        bound: b.
        sign: 1 for the numbers above, -1 for those below.
        cache_size: 1 to remember from what the latest y came: many u give the y next to b, and all beyond ±200 the
            same.
    """

    domain = constraints.real
    bijective = True

    def __init__(
        self, codomain: constraints.Constraint, bound: float | Tensor, sign: int = 1, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.codomain = codomain
        self.bound = bound
        self._sign = sign

    @property
    def sign(self) -> int:
        return self._sign

    def with_cache(self, cache_size: int = 1) -> "HalfLine":
        return HalfLine(self.codomain, self.bound, self.sign, cache_size)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, T.ExpTransform):  # which it is, for all that closed-form divergences can tell
            return self.sign == 1 and self._starts_at_zero()
        if not isinstance(other, HalfLine) or self.sign != other.sign:
            return False
        return bool((torch.as_tensor(self.bound) == torch.as_tensor(other.bound)).all())

    def _starts_at_zero(self) -> bool:
        return not isinstance(self.bound, Tensor) and self.bound == 0

    def _call(self, x: Tensor) -> Tensor:
        distance = finite_gradient(self.sign * bounded(x, LIMIT).exp(), of_draws=True)
        if self._starts_at_zero():
            return distance
        bound = torch.as_tensor(self.bound, dtype=x.dtype, device=x.device)
        nearest = torch.nextafter(bound, torch.full_like(bound, self.sign * math.inf))
        return (torch.maximum if self.sign == 1 else torch.minimum)(bound + distance, nearest)

    def _inverse(self, y: Tensor) -> Tensor:
        distance = self.sign * (y - self.bound)
        return unbounded(distance.clamp_min(torch.finfo(y.dtype).tiny).log(), LIMIT)

    def _inv_call(self, y: Tensor) -> Any:
        drawn, value = self._cached_x_y if self._cache_size else (None, None)
        # A draw made without a graph withholds the gradient of a value that got one since.
        if y is value and (drawn.requires_grad or not y.requires_grad):
            return drawn
        return self._inverse(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return bounded(x, LIMIT) + log_slope(x, LIMIT)

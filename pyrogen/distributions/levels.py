r"""Distributions on levels, the grid k / (L - 1) in [0, 1], such as the 256 levels of 8-bit pixels."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrogen.arguments import LARGEST, is_whole
from pyrogen.distributions.hyperbolic import langevin_ratio, log_sinhc

__all__ = ["CategoricalLevels", "Levels", "LogisticMixtureLevels", "NormalLevels"]


class Levels(constraints.Constraint):
    """The numbers k / (L - 1), k = 0, ..., L - 1.

    Values are accepted within 1e-4 of a level's width, or the rounding of their own floating-point type if
    that is more.

    Args:
        levels: L, at least 2.

    Example:
        >>> Levels(256).check(torch.tensor([0.0, 7 / 255, 0.5, 1.0, 256 / 255]))
        tensor([ True,  True, False,  True, False])
        >>> Levels(256)
        Levels(256)
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        self.levels = check_levels(levels)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        scaled = value * (self.levels - 1)
        tolerance = max(1e-4, torch.finfo(value.dtype).eps * (self.levels - 1))
        on_grid = (scaled - scaled.round()).abs() <= tolerance
        return on_grid & (scaled >= -tolerance) & (scaled <= self.levels - 1 + tolerance)

    def __repr__(self) -> str:
        return f"Levels({self.levels})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Levels) and other.levels == self.levels

    def __hash__(self) -> int:
        return hash((Levels, self.levels))


def check_levels(levels: int) -> int:
    """Return the number of levels; raise ValueError unless it is an integer of at least 2."""
    if not is_whole(levels) or not 2 <= levels <= LARGEST:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}; 8-bit pixels have levels=256")
    return int(levels)


class _LevelsDistribution(TorchDistribution):
    """The support, and reading values: without validation, one off the grid counts as its nearest level."""

    levels: int

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        return constraints.independent(Levels(self.levels), self.event_dim) if self.event_dim else Levels(self.levels)

    def _index(self, value: Tensor) -> Tensor:
        """The level's number k, still a floating-point tensor."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * (self.levels - 1)).round().clamp(0, self.levels - 1)

    def _nearest_level(self, value: Tensor) -> Tensor:
        return (value * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)


class CategoricalLevels(_LevelsDistribution):
    """Any distribution on L levels, from its logits.

    Args:
        logits: unnormalised log-probabilities, shape (..., L).

    Example:
        >>> CategoricalLevels(torch.zeros(3)).mean
        tensor(0.5000)
    """

    arg_constraints: ClassVar = {"logits": constraints.real}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        self.levels = check_levels(logits.shape[-1])
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "CategoricalLevels":
        new = self._get_checked_instance(CategoricalLevels, _instance)
        new.levels = self.levels
        new.logits = self.logits.expand(*batch_shape, self.levels)
        super(CategoricalLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The exact mean, shape (...)."""
        grid = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device) / (self.levels - 1)
        return self.logits.softmax(-1) @ grid

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            index = dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
            return index.to(self.logits.dtype) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        index = self._index(value).long().unsqueeze(-1)
        log_p = self.logits.log_softmax(-1)
        shape = torch.broadcast_shapes(log_p.shape[:-1], index.shape[:-1])
        return log_p.expand(*shape, -1).gather(-1, index.expand(*shape, 1)).squeeze(-1)


def _log_normal_cdf(t: Tensor) -> Tensor:
    """log Phi(t), whose derivative is right in both tails (that of torch.special.log_ndtr overflows)."""
    left = t < 0
    u = torch.where(left, t, 0.0)
    tail = -0.5 * u * u + torch.log(0.5 * torch.special.erfcx(-u / math.sqrt(2)))
    return torch.where(left, tail, torch.log1p(-0.5 * torch.erfc(torch.where(left, 0.0, t) / math.sqrt(2))))


def _log_normal_interval(offset: Tensor, spread: Tensor) -> Tensor:
    """The log-mass of a standard normal on an interval, by the scale and its middle's offset, both in widths.

    Whole offsets keep the edges that neighbours share the same number, so that masses add up in float32 too.

    A wide interval is a difference of CDFs, scaled by its larger density where it lies in a tail. A narrow
    one would cancel: it is the density, exactly integrated for its slope and to first order in width^2 for
    its curvature, which is right to 1e-8 at the switch. Each branch gets harmless arguments where another is
    chosen, so gradients stay finite. Offsets are divided by the spread: times the width, its inverse, their
    gradient would overflow.
    """
    d, width = offset.abs(), 1 / spread
    t = d / spread
    narrow = width < 0.05
    w = torch.where(narrow, width, 0.05)
    s = torch.where(narrow, t * w / 2, 0.0)
    curvature = w.square() / 8 * (1 - 2 * langevin_ratio(s))
    slope = torch.log(w) + log_sinhc(s) - curvature
    near = torch.where(narrow, t, 0.0)
    density = -0.5 * near * near - 0.5 * math.log(2 * math.pi) + slope

    near, far = (d - 0.5) / spread / math.sqrt(2), (d + 0.5) / spread / math.sqrt(2)
    in_tail = ~narrow & (near > 0)
    a, b = torch.where(in_tail, near, 0.0), torch.where(in_tail, far, 1.0)
    decay = torch.exp(-torch.where(in_tail, t * width, 1.0))
    tail = -a.square() + torch.log(0.5 * (torch.special.erfcx(a) - decay * torch.special.erfcx(b)))

    across = ~narrow & ~in_tail
    a, b = torch.where(across, near, 0.0), torch.where(across, far, 1.0)
    centre = torch.log(0.5 * (torch.erf(b) - torch.erf(a)))
    return torch.where(narrow, density, torch.where(in_tail, tail, centre))


class NormalLevels(_LevelsDistribution):
    r"""A normal rounded to the nearest of L levels, the first and the last of which take the tails.

    .. math:: P(x) = \Phi\Bigl(\frac{x + h - \mu}{\sigma}\Bigr) - \Phi\Bigl(\frac{x - h - \mu}{\sigma}\Bigr),
        \quad h = \frac{1}{2 (L - 1)}

    Args:
        loc: the location, shape (...).
        scale: the scale, positive, broadcastable with it.
        levels: L.

    Example:
        >>> NormalLevels(torch.tensor(0.5), torch.tensor(0.1), levels=2).log_prob(torch.tensor(1.0)).exp()
        tensor(0.5000)
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor, scale: Tensor | float, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, torch.as_tensor(scale, dtype=loc.dtype, device=loc.device))
        self.levels = check_levels(levels)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "NormalLevels":
        new = self._get_checked_instance(NormalLevels, _instance)
        new.levels = self.levels
        new.loc, new.scale = self.loc.expand(*batch_shape), self.scale.expand(*batch_shape)
        super(NormalLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        r"""The mean of the normal clamped to [0, 1], before rounding: smooth, exact to half a level.

        .. math:: \sigma \bigl[h(\mu / \sigma) - h((\mu - 1) / \sigma)\bigr],
            \quad h(t) = t \Phi(t) + \varphi(t)
        """
        return _clamped_mean(self.loc, self.scale, _expected_excess)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            return self._nearest_level(torch.normal(self.loc.expand(shape), self.scale.expand(shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        k = self._index(value)
        steps = self.levels - 1
        loc, spread = steps * self.loc, steps * self.scale
        inside = _log_normal_interval(*torch.broadcast_tensors(k - loc, spread))
        lowest, highest = _log_normal_cdf((0.5 - loc) / spread), _log_normal_cdf((loc - steps + 0.5) / spread)
        return torch.where(k == 0, lowest, torch.where(k == steps, highest, inside))


def _clamped_mean(loc: Tensor, scale: Tensor, excess: Callable[[Tensor], Tensor]) -> Tensor:
    """E min(1, max(0, m + s e)) for e symmetric about 0, with E max(0, t + e) given.

    Locations above one half are mirrored: far above, the difference of two large numbers would be left of it.
    """
    high = loc > 0.5
    near = torch.where(high, 1 - loc, loc)
    mean = (scale * (excess(near / scale) - excess((near - 1) / scale))).clamp(0, 1)
    return torch.where(high, 1 - mean, mean)


def _expected_excess(t: Tensor) -> Tensor:
    """E max(0, t + e) for a standard normal e."""
    return t * torch.special.ndtr(t) + torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)


class LogisticMixtureLevels(_LevelsDistribution):
    r"""A mixture of logistics rounded to L levels, for each value or joint over a pixel's three colours.

    .. math:: P(x) = \sum_k \pi_k \prod_c \Bigl[\sigma\Bigl(\frac{x_c + h - \mu_{kc}}{s_{kc}}\Bigr)
        - \sigma\Bigl(\frac{x_c - h - \mu_{kc}}{s_{kc}}\Bigr)\Bigr], \quad h = \frac{1}{2 (L - 1)}

    where the first and the last level take the tails. With ``coefficients`` a component's green location
    moves with red, and its blue one with red and green, from the middle grey: :math:`\mu_{k2} = m_{k2} +
    \alpha_k (x_1 - \frac12)` and :math:`\mu_{k3} = m_{k3} + \beta_k (x_1 - \frac12) + \gamma_k (x_2 -
    \frac12)`.

    Args:
        logits: the components' unnormalised log-weights: shape (..., K, \*event) for a mixture for each
            value; with coefficients (..., K, 1, H, W), one mixture for each pixel.
        loc: locations m, shape (..., K, \*event).
        scale: scales s, positive, of the same shape.
        coefficients: None, or :math:`\alpha, \beta, \gamma` of shape (..., K, 3, H, W) with an event of shape
            (3, H, W).
        event_dim: the number of event dimensions.
        levels: L.

    Example:
        >>> loc = torch.tensor([[0.2], [0.8]])
        >>> d = LogisticMixtureLevels(torch.zeros(2, 1), loc, torch.full((2, 1), 0.1), event_dim=1, levels=2)
        >>> d.log_prob(torch.ones(1)).exp()
        tensor(0.5000)
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real,
        "loc": constraints.real,
        "scale": constraints.positive,
        "coefficients": constraints.real,
    }

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        coefficients: Tensor | None = None,
        *,
        event_dim: int,
        levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        # With no colours to couple the coefficients have no values; a tensor keeps validation and repr
        # uniform.
        self.coefficients = loc.new_empty(0) if coefficients is None else coefficients
        self.coupled = coefficients is not None
        self.levels = check_levels(levels)
        batch_shape, event_shape = loc.shape[: -event_dim - 1], loc.shape[-event_dim:]
        if coefficients is not None and (event_dim != 3 or event_shape[0] != 3):
            raise ValueError(f"coefficients need an event of shape (3, H, W), got {tuple(event_shape)}; leave them out")
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "LogisticMixtureLevels":
        new = self._get_checked_instance(LogisticMixtureLevels, _instance)
        new.levels, new.coupled = self.levels, self.coupled
        kept = self.event_dim + 1
        for name in ("logits", "loc", "scale", "coefficients"):
            parameter = getattr(self, name)
            unused = name == "coefficients" and not self.coupled
            setattr(new, name, parameter if unused else parameter.expand(*batch_shape, *parameter.shape[-kept:]))
        super(LogisticMixtureLevels, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean of the mixture clamped to [0, 1], before rounding: within half a level of the exact mean.

        For colours it is an approximation: a component's green and blue are taken at the mean of what they
        depend on.
        """
        means: list[Tensor] = []
        for colour in range(self.event_shape[0] if self.coupled else 1):
            loc, scale = self._colour(self.loc, self.scale, self.coefficients, colour, means)
            means.append(_clamped_mean(loc, scale, F.softplus))
        weights = self.logits.softmax(-self.event_dim - 1)
        return (weights * torch.cat(means, -self.event_dim)).sum(-self.event_dim - 1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
            over = -self.event_dim - 1
            chosen = dist.Categorical(logits=wide.logits.movedim(over, -1), validate_args=False).sample()
            one_hot = F.one_hot(chosen, wide.logits.shape[over]).movedim(-1, over).to(wide.loc.dtype)
            loc, scale = (wide.loc * one_hot).sum(over), (wide.scale * one_hot).sum(over)
            coefficients = (wide.coefficients * one_hot).sum(over) if self.coupled else wide.coefficients
            values: list[Tensor] = []
            for colour in range(self.event_shape[0] if self.coupled else 1):
                m, s = self._colour(loc, scale, coefficients, colour, values)
                u = torch.rand_like(m).clamp_min(torch.finfo(m.dtype).tiny)
                values.append(self._nearest_level(m + s * (u.log() - torch.log1p(-u))))
            return torch.cat(values, -self.event_dim)

    def log_prob(self, value: Tensor) -> Tensor:
        over = -self.event_dim - 1
        k = self._index(value).unsqueeze(over)
        steps = self.levels - 1
        loc = self._moved_loc(k / steps) if self.coupled else self.loc
        offset, width = k - steps * loc, 1 / (steps * self.scale)
        above, below = F.logsigmoid((0.5 + offset) * width), F.logsigmoid((0.5 - offset) * width)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)): nothing cancels, wherever a and b lie.
        inside = above + below + torch.log(-torch.expm1(-width))
        log_p = torch.where(k == 0, above, torch.where(k == steps, below, inside))
        if self.coupled:
            log_p = log_p.sum(-self.event_dim, keepdim=True)
        log_p = (log_p + self.logits.log_softmax(over)).logsumexp(over)
        return log_p.flatten(-self.event_dim).sum(-1)

    def _moved_loc(self, x: Tensor) -> Tensor:
        """The locations of three colours, given the colours' values."""
        red, green, _ = (x - 0.5).split(1, -3)
        alpha, beta, gamma = self.coefficients.split(1, -3)
        r, g, b = self.loc.split(1, -3)
        return torch.cat(torch.broadcast_tensors(r, g + alpha * red, b + beta * red + gamma * green), -3)

    def _colour(
        self, loc: Tensor, scale: Tensor, coefficients: Tensor, colour: int, values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Location and scale of one colour given those before it; of all values when not coupled."""
        if not self.coupled:
            return loc, scale
        m, s = loc.narrow(-3, colour, 1), scale.narrow(-3, colour, 1)
        first = colour * (colour - 1) // 2  # alpha for green; beta and gamma for blue
        for i, value in enumerate(values):
            m = m + coefficients.narrow(-3, first + i, 1) * (value - 0.5)
        return m, s

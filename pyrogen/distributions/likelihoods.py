r"""Likelihoods of binary and of continuous data: modules over a decoder, called with latents.

A likelihood is a conditional distribution of the data x given latents z: ``likelihood(z)`` with z of shape
(..., D) is a Pyro distribution with batch shape (...) and the data's event shape. The decoder is any network
from (B, D) to the parameters; ``decoder_shape(event_shape)`` says what it must give.

Log-densities hold in single precision for all that a decoder puts out and all values up to 1e30: they are never NaN nor
∞, and -∞ only below -3.4e38, where single precision ends. Gradients are finite.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrogen.distributions.decoding import (
    SMALLEST_SCALE,
    LocationScale,
    Scale,
    check_decoder,
    decode,
    parameter_shape,
)
from pyrogen.distributions.hyperbolic import langevin_ratio
from pyrogen.distributions.normals import HALF_LOG_2PI, SafeNormal

__all__ = ["Bernoulli", "ContinuousBernoulli", "LaplaceLikelihood", "NormalLikelihood"]


class Bernoulli(nn.Module):
    r"""Independent Bernoulli values, for data that are 0 or 1.

    .. math:: \log p(x \mid z) = \sum_i x_i \log \sigma(\ell_i) + (1 - x_i) \log \sigma(-\ell_i),
        \quad \ell = f(z)

    in nats, straight from the logits. Pixels between 0 and 1 are outside the support: use
    :class:`ContinuousBernoulli` for them, or binarise them.

    Args:
        decoder: a network f from (B, D) to logits (B, \*event_shape).

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape; ``mean`` holds the probabilities.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: on a call, when the decoder's output does not fit.

    Example:
        >>> likelihood = Bernoulli(nn.Linear(2, 6))
        >>> x_given_z = likelihood(torch.zeros(5, 2))
        >>> x_given_z.batch_shape, x_given_z.event_shape, x_given_z.support
        (torch.Size([5]), torch.Size([6]), IndependentConstraint(Boolean(), 1))
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = check_decoder(decoder)

    @staticmethod
    def decoder_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
        """The shape of the decoder's output for this event shape: the same."""
        return parameter_shape(event_shape, 1)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits, event_dim = decode(self.decoder, z)
        return _IndependentBernoulli(dist.Bernoulli(logits=logits), event_dim)


class _IndependentBernoulli(dist.Independent):
    """Binary values whose log-density is summed before its sign is turned: a pass over them less in each direction."""

    base_dist: dist.Bernoulli

    def log_prob(self, value: Tensor) -> Tensor:
        base = self.base_dist
        if base._validate_args:
            base._validate_sample(value)
        logits, value = torch.broadcast_tensors(base.logits, value)
        entropy = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -entropy.sum([*range(-self.reinterpreted_batch_ndims, 0)])


class _ContinuousBernoulli(dist.ContinuousBernoulli):
    """Torch's distribution with moments, normaliser and quantiles that hold at every logit.

    Torch computes them from probabilities clamped to [eps, 1 - eps] and from short series, so that in float32
    its log-density is wrong by 0.6 nats a pixel at logit 30. These are functions of the logits alone.
    """

    def _cont_bern_log_norm(self) -> Tensor:
        y = self.logits / 2  # log (2 y coth y)
        return math.log(2) + torch.log1p(y * (y * langevin_ratio(y)))  # y² overflows

    @property
    def mean(self) -> Tensor:
        y = self.logits / 2
        return 0.5 + 0.5 * y * langevin_ratio(y)

    @property
    def variance(self) -> Tensor:
        y = self.logits / 2
        ratio = langevin_ratio(y)
        near = (1 - 2 * ratio - (y * ratio).square()) / 4
        far = y.abs() > 18  # where the difference above cancels and 1 / logit^2 is exact to 1e-13
        return torch.where(far, torch.where(far, self.logits, 1.0).reciprocal().square(), near)

    def entropy(self) -> Tensor:
        return F.softplus(self.logits) - self.logits * self.mean - self._cont_bern_log_norm()

    def cdf(self, value: Tensor) -> Tensor:
        u, x = self.logits.abs(), torch.where(self.logits < 0, value, 1 - value)
        small = u < 1e-2
        v = torch.where(small, 1.0, u)
        tail = torch.expm1(-v * x) / torch.expm1(-v)
        series = value - value * (1 - value) * self.logits / 2 * (1 - (1 - 2 * value) * self.logits / 6)
        return torch.where(small, series, torch.where(self.logits < 0, tail, 1 - tail)).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        # The law at -logit is the mirror image, so only negative logits are inverted and nothing overflows.
        u, p = self.logits.abs(), torch.where(self.logits < 0, value, 1 - value)
        small = u < 1e-2
        v = torch.where(small, 1.0, u)
        p = p.clamp(max=1 - torch.finfo(p.dtype).eps / 2)
        tail = -torch.log1p(p * torch.expm1(-v)) / v
        series = value + value * (1 - value) * self.logits / 2 * (1 + (1 - 2 * value) * self.logits / 3)
        return torch.where(small, series, torch.where(self.logits < 0, tail, 1 - tail))


class ContinuousBernoulli(nn.Module):
    r"""Independent continuous Bernoulli values, for pixels anywhere in [0, 1].

    .. math:: \log p(x \mid z) = \sum_i x_i \ell_i - \log \frac{e^{\ell_i} - 1}{\ell_i}, \quad \ell = f(z)

    in nats: the normalised density whose exponent is the binary cross-entropy that is often misused on grey
    pixels. The normaliser is computed without loss at every logit, near 0 and far out, also in float32.

    Args:
        decoder: a network f from (B, D) to logits (B, \*event_shape).

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape. ``mean`` is the distribution's
        mean, which is not the sigmoid of the logits: it reaches 0.9 at logit 10.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: on a call, when the decoder's output does not fit.

    Reference:
        Loaiza-Ganem and Cunningham, 2019, The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders, arXiv:1907.06845.

    Example:
        >>> likelihood = ContinuousBernoulli(nn.Linear(2, 6))
        >>> likelihood(torch.zeros(5, 2)).log_prob(torch.rand(5, 6)).shape
        torch.Size([5])
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = check_decoder(decoder)

    @staticmethod
    def decoder_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
        """The shape of the decoder's output for this event shape: the same."""
        return parameter_shape(event_shape, 1)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits, event_dim = decode(self.decoder, z)
        return _ContinuousBernoulli(logits=logits).to_event(event_dim)


class _OptimalNormal(SafeNormal):
    """A normal that scores values with the scale that is best for them, and samples with its own."""

    _record: Callable[[Tensor], None]

    def __init__(self, loc: Tensor, scale: Tensor, record: Callable[[Tensor], None]) -> None:
        super().__init__(loc, scale)
        self._record = record

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "_OptimalNormal":
        new = self._get_checked_instance(_OptimalNormal, _instance)
        new._record = self._record
        return super().expand(batch_shape, _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        errors = value - self.loc
        # In units of the largest error no square overflows.
        unit = torch.linalg.vector_norm(errors.detach(), torch.inf).clamp_min(SMALLEST_SCALE)
        squares = (errors / unit).square()
        variance = squares.mean().clamp_min((SMALLEST_SCALE / unit).square())
        self._record(variance.sqrt().detach() * unit)
        return -0.5 * (squares / variance + variance.log()) - unit.log() - HALF_LOG_2PI


class NormalLikelihood(LocationScale):
    r"""Independent normal values, for real data, and for pixels when a density outside [0, 1] does no harm.

    .. math:: \log p(x \mid z) = -\sum_i \frac{(x_i - \mu_i)^2}{2 \sigma_i^2} + \log \sigma_i
        + \tfrac12 \log 2\pi

    in nats, with :math:`\mu = f(z)`. The scale is one of

    - a number: fixed, in the data's units;
    - ``"shared"``: one learned scale for all values;
    - ``"per pixel"``: the decoder gives a location and a raw scale for every value;
    - ``"optimal"``: in training, the scale that maximises the density of the batch it scores,
      :math:`\sigma^2 = \operatorname{mean}_{b,i} (x_{bi} - \mu_{bi})^2` over all observations, particles and
      values, with gradients through it. That is an objective, not a density, for it looks at x. Each such
      call moves a buffer, an exponential average of :math:`\sigma^2` (weight 0.1 on the newest; the first
      batch sets it), and **in evaluation mode, as for every sample, the scale is the buffer's**, so that the
      density is normalised. Call ``eval()`` before comparing log-likelihoods. In several processes each
      averages its own batches.

    Learned scales are :math:`10^{-3} + \log(1 + e^{raw})`, and the optimal one is at least :math:`10^{-3}`,
    so that no density is infinite.

    Args:
        decoder: a network f from (B, D) to (B, \*decoder_shape(event_shape, scale)).
        scale: see above.

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: for a scale that is not positive or not known; on a call, when the decoder's output does
            not fit.

    Reference:
        Rybkin, Daniilidis and Levine, 2021, Simple and effective VAE training with calibrated decoders,
        arXiv:2006.13202, for the optimal scale.

    Example:
        >>> likelihood = NormalLikelihood(nn.Linear(2, 12), scale="per pixel")
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    variance: Tensor
    batches: Tensor

    def __init__(self, decoder: nn.Module, scale: float | Literal["shared", "per pixel", "optimal"] = 1.0) -> None:
        super().__init__(decoder, scale)
        if scale == "optimal":
            self.register_buffer("variance", torch.ones(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @classmethod
    def scales(cls) -> tuple[str, ...]:
        return ("shared", "per pixel", "optimal")

    @staticmethod
    def decoder_shape(
        event_shape: int | Sequence[int], scale: float | Literal["shared", "per pixel", "optimal"] = 1.0
    ) -> tuple[int, ...]:
        """The shape of the decoder's output: the event shape, its channels doubled for ``"per pixel"``."""
        return parameter_shape(event_shape, 2 if scale == "per pixel" else 1)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        if self.scale != "optimal":
            loc, scale, event_dim = self.location_and_scale(z)
            return SafeNormal(loc, scale).to_event(event_dim)
        loc, event_dim = decode(self.decoder, z)
        scale = self.variance.sqrt().to(loc.dtype)
        normal = _OptimalNormal(loc, scale, self._record) if self.training else SafeNormal(loc, scale)
        return normal.to_event(event_dim)

    @torch.no_grad()
    def _record(self, scale: Tensor) -> None:
        variance = scale.square().clamp_max(torch.finfo(scale.dtype).max)
        newest = torch.where(self.batches == 0, 1.0, 0.1).to(self.variance)
        self.variance.lerp_(variance.to(self.variance), newest)
        self.batches.add_(1)


class LaplaceLikelihood(LocationScale):
    r"""Independent Laplace values, for real data with outliers: an absolute error for a loss.

    .. math:: \log p(x \mid z) = -\sum_i \frac{|x_i - \mu_i|}{b_i} + \log 2 b_i, \quad \mu = f(z)

    in nats. The scale b is a number (fixed), ``"shared"`` (one learned scale) or ``"per pixel"`` (from the
    decoder); learned scales are :math:`10^{-3} + \log(1 + e^{raw})`.

    Args:
        decoder: a network f from (B, D) to (B, \*decoder_shape(event_shape, scale)).
        scale: see above, in the data's units.

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: for a scale that is not positive or not known; on a call, when the decoder's output does
            not fit.

    Example:
        >>> likelihood = LaplaceLikelihood(nn.Linear(2, 6), scale="shared")
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def __init__(self, decoder: nn.Module, scale: Scale = 1.0) -> None:
        super().__init__(decoder, scale)

    @staticmethod
    def decoder_shape(event_shape: int | Sequence[int], scale: Scale = 1.0) -> tuple[int, ...]:
        """The shape of the decoder's output: the event shape, its channels doubled for ``"per pixel"``."""
        return parameter_shape(event_shape, 2 if scale == "per pixel" else 1)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, scale, event_dim = self.location_and_scale(z)
        return dist.Laplace(loc, scale).to_event(event_dim)

r"""Likelihoods of quantised data, such as 8-bit pixels: probabilities, which bits per dimension need.

Log-probabilities hold in single precision for all that a decoder puts out up to 1e30: they are never NaN nor ∞, and -∞
only below -3.4e38, where single precision ends. Gradients are finite.
"""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from pyrogen.arguments import LARGEST, is_whole
from pyrogen.distributions.decoding import (
    LocationScale,
    Scale,
    check_decoder,
    decode,
    parameter_shape,
    positive,
    split,
)
from pyrogen.distributions.levels import CategoricalLevels, LogisticMixtureLevels, NormalLevels, check_levels

__all__ = ["CategoricalLikelihood", "DiscretizedLogisticMixture", "QuantizedNormal"]


class QuantizedNormal(LocationScale):
    r"""Independent normal values rounded to levels, for pixels k / (L - 1).

    .. math:: P(x \mid z) = \prod_i \Phi\Bigl(\frac{x_i + h - \mu_i}{\sigma_i}\Bigr)
        - \Phi\Bigl(\frac{x_i - h - \mu_i}{\sigma_i}\Bigr), \quad h = \frac{1}{2 (L - 1)}, \quad \mu = f(z)

    The levels 0 and 1 take the tails, so the probabilities sum to one. Log-probabilities are in nats and keep
    their digits in float32 however far a value lies from its location.

    Args:
        decoder: a network f from (B, D) to (B, \*decoder_shape(event_shape, scale=scale)).
        levels: L, the number of levels.
        scale: a number (fixed, pixels in [0, 1]), ``"shared"`` (one learned scale) or ``"per pixel"`` (the
            decoder gives a location and a raw scale for each value). Learned scales are :math:`10^{-3} +
            \log(1 + e^{raw})`.

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape. ``mean`` is that of the normal
        clamped to [0, 1], before rounding: smooth in the parameters, and within half a level of the exact
        mean.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: for a bad scale or number of levels; on a call, when the decoder's output does not fit.

    Example:
        >>> import torch
        >>> likelihood = QuantizedNormal(nn.Linear(2, 6), levels=17)
        >>> likelihood(torch.zeros(5, 2)).support
        IndependentConstraint(Levels(17), 1)
    """

    def __init__(self, decoder: nn.Module, levels: int = 256, *, scale: Scale = "shared") -> None:
        super().__init__(decoder, scale)
        self.levels = check_levels(levels)

    @staticmethod
    def decoder_shape(
        event_shape: int | Sequence[int], levels: int = 256, *, scale: Scale = "shared"
    ) -> tuple[int, ...]:
        """The shape of the decoder's output: the event shape, its channels doubled for ``"per pixel"``."""
        check_levels(levels)
        return parameter_shape(event_shape, 2 if scale == "per pixel" else 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, scale={self.scale!r}"

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc, scale, event_dim = self.location_and_scale(z)
        return NormalLevels(loc, scale, self.levels).to_event(event_dim)


class DiscretizedLogisticMixture(nn.Module):
    r"""A mixture of logistics rounded to levels, for pixels k / (L - 1); joint over the colours of RGB.

    .. math:: P(x \mid z) = \prod_{hw} \sum_k \pi_k \prod_c
        \Bigl[\sigma\Bigl(\frac{x_c + h - \mu_{kc}}{s_{kc}}\Bigr)
        - \sigma\Bigl(\frac{x_c - h - \mu_{kc}}{s_{kc}}\Bigr)\Bigr], \quad h = \frac{1}{2 (L - 1)}

    For events of shape (3, H, W) green depends linearly on red, and blue on red and green, within each
    component (see :class:`~pyrogen.distributions.levels.LogisticMixtureLevels`); other events have a mixture
    for each value. Locations are ½ + raw, scales :math:`10^{-3} + \log(1 + e^{raw})` and coefficients
    tanh(raw), so a decoder that returns zeros gives middle grey. The paper's own code works in [-1, 1] with
    exponential scales; the family of distributions is the same.

    Args:
        decoder: a network from (B, D) to (B, \*decoder_shape(event_shape, components)). In the order of
            channels: the log-weights of K components, then locations, scales and (RGB) coefficients,
            component by component.
        components: K.
        levels: L, the number of levels.

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape. ``mean`` is that of the mixture
        clamped to [0, 1], before rounding (within half a level of the exact one); for RGB an approximation
        that takes green and blue of each component at the mean of the colours before them.

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: for bad counts; on a call, when the decoder's output does not fit.

    Reference:
        Salimans, Karpathy, Chen and Kingma, 2017, PixelCNN++: improving the PixelCNN with discretized
        logistic mixture likelihood and other modifications, arXiv:1701.05517.

    Example:
        >>> import torch
        >>> DiscretizedLogisticMixture.decoder_shape((3, 32, 32), components=10)
        (100, 32, 32)
        >>> shape = DiscretizedLogisticMixture.decoder_shape((1, 8, 8))
        >>> decoder = nn.Sequential(nn.Linear(2, 15 * 64), nn.Unflatten(1, shape))
        >>> likelihood = DiscretizedLogisticMixture(decoder)
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, components: int = 5, levels: int = 256) -> None:
        super().__init__()
        self.decoder = check_decoder(decoder)
        self.components = _check_components(components)
        self.levels = check_levels(levels)

    @staticmethod
    def decoder_shape(event_shape: int | Sequence[int], components: int = 5, levels: int = 256) -> tuple[int, ...]:
        """The shape of the decoder's output: (10 K, H, W) for RGB, else (3 K C, ...) for events (C, ...)."""
        check_levels(levels)
        shape = parameter_shape(event_shape, 1)
        if _is_rgb(shape):
            return (10 * _check_components(components), *shape[1:])
        return parameter_shape(shape, 3 * _check_components(components))

    def extra_repr(self) -> str:
        return f"components={self.components}, levels={self.levels}"

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        output, event_dim = decode(self.decoder, z)
        rgb = event_dim == 3 and output.shape[-3] == 10 * self.components
        per_component = 10 if rgb else 3
        # (P K, ..., C, *rest) -> (..., P K, C, *rest); for RGB C is 1: its colours are among the parameters.
        raw = split(output, event_dim, per_component * self.components).movedim(0, -event_dim - 1)
        logits, rest = raw.tensor_split([self.components], -event_dim - 1)
        if not rgb:
            loc, scale = rest.chunk(2, -event_dim - 1)
            return LogisticMixtureLevels(logits, 0.5 + loc, positive(scale), event_dim=event_dim, levels=self.levels)
        # (..., 9 K, 1, H, W) -> three of (..., K, 3, H, W)
        loc, scale, coefficients = rest.squeeze(-3).unflatten(-3, (3, self.components, 3)).unbind(-5)
        return LogisticMixtureLevels(
            logits, 0.5 + loc, positive(scale), coefficients.tanh(), event_dim=3, levels=self.levels
        )


def _is_rgb(event_shape: Sequence[int]) -> bool:
    return len(event_shape) == 3 and event_shape[0] == 3


def _check_components(components: int) -> int:
    if not is_whole(components) or not 1 <= components <= LARGEST:
        raise ValueError(f"components must be a positive integer, got {components!r}; the paper uses 5")
    return int(components)


class CategoricalLikelihood(nn.Module):
    r"""Independent levels with any probabilities: a softmax over the L levels of each pixel k / (L - 1).

    .. math:: P(x \mid z) = \prod_i \operatorname{softmax}(f(z)_i)_{(L - 1) x_i}

    in nats. It knows nothing of the order of levels and costs L parameters for each value.

    Args:
        decoder: a network f from (B, D) to logits (B, \*decoder_shape(event_shape, levels)).
        levels: L, the number of levels.

    Call:
        ``z`` of shape (..., D) gives batch shape (...) and the event shape; data and ``mean`` (exact) are
        pixels in [0, 1].

    Raises:
        TypeError: when the decoder is not a module.
        ValueError: for a bad number of levels; on a call, when the decoder's output does not fit.

    Example:
        >>> import torch
        >>> CategoricalLikelihood.decoder_shape(6, levels=4)
        (24,)
        >>> likelihood = CategoricalLikelihood(nn.Linear(2, 24), levels=4)
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def __init__(self, decoder: nn.Module, levels: int = 256) -> None:
        super().__init__()
        self.decoder = check_decoder(decoder)
        self.levels = check_levels(levels)

    @staticmethod
    def decoder_shape(event_shape: int | Sequence[int], levels: int = 256) -> tuple[int, ...]:
        """The shape of the decoder's output for this event shape: L times as many channels."""
        return parameter_shape(event_shape, check_levels(levels))

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        output, event_dim = decode(self.decoder, z)
        return CategoricalLevels(split(output, event_dim, self.levels).movedim(0, -1)).to_event(event_dim)

r"""From a decoder's output to the parameters of a distribution: shapes, and scales kept positive."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrogen.arguments import is_finite, is_whole
from pyrogen.distributions.bounds import finite_gradient

__all__ = [
    "SMALLEST_SCALE",
    "LocationScale",
    "check_decoder",
    "decode",
    "parameter_shape",
    "positive",
    "split",
]

SMALLEST_SCALE = 1e-3
"""The least scale that is learned, in the data's units: a quarter of an 8-bit level."""

Scale = float | Literal["shared", "per pixel"]


def check_decoder(decoder: nn.Module) -> nn.Module:
    """Return the decoder; raise TypeError unless it is a module, whose parameters can be trained."""
    if not isinstance(decoder, nn.Module):
        raise TypeError(
            "decoder must be a torch.nn.Module from latents (B, D) to parameters, "
            f"got {type(decoder).__name__}; pass an instance, such as torch.nn.Linear(8, 64)"
        )
    return decoder


def parameter_shape(event_shape: int | Sequence[int], parameters: int) -> tuple[int, ...]:
    """The shape of a decoder's output that gives ``parameters`` numbers for each value of an event.

    Args:
        event_shape: the data's shape (C, ...), or an integer n for (n,).
        parameters: P, the parameters for each value.

    Returns:
        (P * C, ...).

    Raises:
        ValueError: when the event shape is empty or not made of positive integers.

    Example:
        >>> parameter_shape((3, 32, 32), 2)
        (6, 32, 32)
    """
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if not shape or any(not is_whole(size) or size < 1 for size in shape):
        raise ValueError(
            f"event_shape must be a positive integer or a non-empty tuple of them, got {event_shape!r}; "
            "give scalar data the shape (1,)"
        )
    return (parameters * shape[0], *shape[1:])


def decode(decoder: nn.Module, z: Tensor) -> tuple[Tensor, int]:
    """Run a decoder on latents with any number of batch dimensions.

    The decoder sees one batch dimension, as convolutions need. Half precision (as under autocast) is raised
    to float32, because the logarithms that follow need it.

    Args:
        decoder: a network from (B, D) to (B, C, ...).
        z: latents of shape (..., D).

    Returns:
        The output, shape (..., C, ...), and its number of event dimensions.

    Raises:
        ValueError: when ``z`` has no latent dimension, or the decoder changes the number of rows or gives
            scalars.
    """
    if z.dim() == 0:
        raise ValueError("latents must have shape (..., D), got a scalar; unsqueeze its last dimension")
    batch = torch.Size(z.shape[:-1])  # else a tuple, where Pyro draws the model
    output = decoder(z if len(batch) == 1 else z.reshape(batch.numel(), z.shape[-1]))
    if output.dim() < 2 or output.shape[0] != batch.numel():
        raise ValueError(
            f"the decoder must map latents of shape ({batch.numel()}, {z.shape[-1]}) to "
            f"({batch.numel()}, *event_shape), got {tuple(output.shape)}; "
            "keep the first dimension and give each row at least one more"
        )
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    return (output if len(batch) == 1 else output.reshape(*batch, *output.shape[1:])), output.dim() - 1


def split(output: Tensor, event_dim: int, parameters: int) -> Tensor:
    """Separate a decoder's output into its parameters.

    Args:
        output: shape (..., P * C, ...).
        event_dim: the number of dimensions from P * C on.
        parameters: P.

    Returns:
        Shape (P, ..., C, ...): unpack it into P tensors.

    Raises:
        ValueError: when the first event dimension is not a multiple of P.
    """
    size = output.shape[-event_dim]
    if size % parameters:
        raise ValueError(
            f"this likelihood takes {parameters} parameters for each value, so the first dimension of the "
            f"decoder's output must be a multiple of {parameters}, got {tuple(output.shape[-event_dim:])}; "
            "build the decoder with the shape that decoder_shape(event_shape) gives"
        )
    return output.unflatten(-event_dim, (parameters, size // parameters)).movedim(-event_dim - 1, 0)


def positive(raw: Tensor) -> Tensor:
    r"""Scales from unconstrained numbers: :math:`10^{-3} + \log(1 + e^{raw})`; 0 gives 0.694.

    The floor keeps log-densities finite when a decoder fits a pixel exactly; growth is linear, so nothing
    overflows.
    """
    return finite_gradient(SMALLEST_SCALE + F.softplus(raw))


class LocationScale(nn.Module):
    """A decoder that gives a location, and a scale of one of three kinds: fixed, shared or per pixel."""

    def __init__(self, decoder: nn.Module, scale: float | str) -> None:
        super().__init__()
        self.decoder = check_decoder(decoder)
        self.scale = scale
        if not isinstance(scale, str) and not (is_finite(scale) and scale > 0):
            raise ValueError(f"a fixed scale must be positive and finite, got {scale}; or learn it: scale='shared'")
        if isinstance(scale, str) and scale not in self.scales():
            names = ", ".join(map(repr, self.scales()))
            raise ValueError(f"scale must be a positive number or one of {names}, got {scale!r}")
        if scale == "shared":
            self.raw_scale = nn.Parameter(torch.zeros(()))

    @classmethod
    def scales(cls) -> tuple[str, ...]:
        """The scales that have a name."""
        return ("shared", "per pixel")

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"

    def location_and_scale(self, z: Tensor) -> tuple[Tensor, Tensor | float, int]:
        """Location (..., C, ...), a scale that broadcasts with it, and the number of event dimensions."""
        output, event_dim = decode(self.decoder, z)
        if self.scale == "per pixel":
            loc, raw = split(output, event_dim, 2)
            return loc, positive(raw), event_dim
        if self.scale == "shared":
            return output, positive(self.raw_scale), event_dim
        return output, float(self.scale), event_dim

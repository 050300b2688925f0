"""Fully connected networks, and the shapes and initial values that all networks here share."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Size, Tensor, nn

from pyrogen.arguments import LARGEST, checked, is_whole

__all__ = ["MLP", "as_shape", "dense", "initialise", "leading_shape"]


def as_shape(size: int | Sequence[int]) -> tuple[int, ...]:
    """An event shape from an integer or a shape: ``8`` means ``(8,)``."""
    shape = tuple(size) if isinstance(size, Sequence) else (size,)
    if not all(is_whole(n) and n >= 1 for n in shape):
        raise ValueError(f"a size must be positive, got {size}; pass an integer or an event shape such as (1, 28, 28)")
    if any(n > LARGEST for n in shape):
        raise ValueError(f"a size must be at most {LARGEST}, got {size}; pass an integer or an event shape")
    return tuple(map(int, shape))


def leading_shape(x: Tensor, shape: tuple[int, ...]) -> Size:
    """The batch dimensions of ``x``, whose trailing dimensions must be ``shape``.

    Raises:
        ValueError: If they are not.
    """
    cut = x.dim() - len(shape)
    if x.shape[cut:] != shape:
        raise ValueError(
            f"expected an input of shape (..., {', '.join(map(str, shape))}), got {tuple(x.shape)}; "
            "reshape it, or build the network with inputs= set to the shape of one observation"
        )
    return Size(x.shape[:cut])  # else a tuple, where Pyro draws the model


def dense(sizes: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Linear layers through ``sizes``, with an activation between them and none at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return layers[:-1]


def initialise(network: nn.Module, last: nn.Module) -> None:
    r"""Initialise a network: He's weights for hidden layers, LeCun's for the ``last``, zero biases.

    Hidden weights have variance :math:`2 / \text{fan-in}` (He et al. 2015, *Delving deep into rectifiers*,
    1502.01852) and the last layer's :math:`1 / \text{fan-in}`, so that the signal keeps its size at any depth:
    for standardised inputs the outputs start at about 1. Whatever reads them as a mean, a logit or a log-scale
    starts near its neutral value and no loss starts at infinity; features that tell inputs apart from the start
    keep a posterior from collapsing onto its prior before the decoder has learned to listen.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            scale = 1.0 if layer is last else math.sqrt(2)
            nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in(layer)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def fan_in(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> float:
    """How many inputs each output of ``layer`` sums, away from the borders."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    taps = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):
        # A transposed convolution spreads its kernel over stride**2 outputs.
        return layer.in_channels * taps / math.prod(layer.stride)
    return layer.in_channels * taps


@checked()
class MLP(nn.Module):
    """A multilayer perceptron between event shapes.

    Args:
        inputs: Event shape ``I`` of the input, or its length ``n`` for ``(n,)``.
        outputs: Event shape ``O`` of the output, or its length.
        hidden: Widths of the hidden layers; ``()`` is a linear map.
        activation: A module class, called without arguments after each hidden layer.

    Shapes:
        input ``(..., *I)`` gives ``(..., *O)``, with any leading batch dimensions.

    The outputs start at about 1 for standardised inputs (see :func:`initialise`).

    Raises:
        ValueError: When called on an input whose trailing shape is not ``I``.

    Example:
        >>> import torch
        >>> MLP((1, 8, 8), 16)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 16])
        >>> MLP(16, (1, 8, 8), hidden=(64,))(torch.zeros(3, 5, 16)).shape
        torch.Size([3, 5, 1, 8, 8])
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | Sequence[int],
        hidden: Sequence[int] = (256, 256),
        *,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.hidden = hidden
        self.activation = activation
        self.input_shape = as_shape(inputs)
        self.output_shape = as_shape(outputs)
        self.inputs_count = math.prod(self.input_shape)
        sizes = (self.inputs_count, *hidden, math.prod(self.output_shape))
        self.layers = nn.Sequential(*dense(sizes, activation))
        initialise(self, last=self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        if len(self.input_shape) != 1:
            x = x.reshape(batch + (self.inputs_count,))
        y = self.layers(x)
        return y if len(self.output_shape) == 1 else y.reshape(batch + self.output_shape)

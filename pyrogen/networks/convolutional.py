"""Strided convolutional encoders and decoders for small images."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.networks.mlp import as_shape, dense, initialise, leading_shape

__all__ = ["ConvDecoder", "ConvEncoder", "RoscaEncoder", "image_shape", "stages"]


def image_shape(size: int | Sequence[int], argument: str) -> tuple[int, int, int]:
    """The ``(C, H, W)`` of an argument that has to be an image's shape."""
    shape = as_shape(size)
    if len(shape) != 3:
        raise ValueError(f"{argument} must be an image's shape (C, H, W), got {size}; for vectors use MLP")
    return shape[0], shape[1], shape[2]


def stages(height: int, width: int, channels: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The channels of each stage, and the height and width that are left when each stage has halved them.

    Without ``channels`` there is one stage for each time both sides can be halved and stay at 4 or more (but
    at least one), with 32, 64, 128 and then 256 channels.

    Raises:
        ValueError: If the sides cannot be halved that often.

    Example:
        >>> stages(28, 28, None)
        ((32, 64), (7, 7))
        >>> stages(64, 64, None)
        ((32, 64, 128, 256), (4, 4))
    """
    possible = 0
    while height % 2 ** (possible + 1) == 0 and width % 2 ** (possible + 1) == 0:
        possible += 1
    if channels is None:
        while possible > 1 and min(height, width) // 2**possible < 4:
            possible -= 1
        channels = [min(32 * 2**stage, 256) for stage in range(possible)]
    if not 1 <= len(channels) <= possible:
        raise ValueError(
            f"an image of {height} x {width} can be halved {possible} times but channels={channels} asks for "
            f"{len(channels)}: pass 1 to {possible} channels, pad the images, or use MLP"
        )
    return tuple(channels), (height // 2 ** len(channels), width // 2 ** len(channels))


@checked()
class ConvEncoder(nn.Module):
    """A convolutional encoder: each stage halves the image, then a fully connected head reads what is left.

    The layout is that of DCGAN without batch normalisation (Radford, Metz & Chintala 2016, *Unsupervised
    representation learning with deep convolutional generative adversarial networks*, 1511.06434): kernels of
    4, stride 2, padding 1.

    Args:
        inputs: Image shape ``(C, H, W)``; both sides divisible by 2 to the number of stages. 28, 32 and 64
            pixels get 2, 3 and 4 stages by default, 8 pixels get 1.
        outputs: Event shape ``O`` of the output, or its length.
        channels: Channels of each stage, from the image inward; by default 32, 64, 128, 256, as many as fit.
        hidden: Widths of the head's hidden layers.
        activation: A module class, called without arguments.

    Shapes:
        input ``(..., C, H, W)`` gives ``(..., *O)``, with any leading batch dimensions.

    Raises:
        ValueError: If ``inputs`` is not an image or cannot be halved once for each stage, or when called on
            another shape.

    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 28), 64)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int | Sequence[int],
        channels: Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (256,),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.channels = channels
        self.hidden = hidden
        self.activation = activation
        self.input_shape = image_shape(inputs, "inputs")
        self.output_shape = as_shape(outputs)
        widths, left = stages(*self.input_shape[1:], channels)
        layers: list[nn.Module] = []
        for before, after in zip((self.input_shape[0], *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), activation()]
        sizes = (widths[-1] * math.prod(left), *hidden, math.prod(self.output_shape))
        self.layers = nn.Sequential(*layers, nn.Flatten(), *dense(sizes, activation))
        initialise(self, last=self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        return self.layers(x.reshape(batch.numel(), *self.input_shape)).reshape(batch + self.output_shape)


@checked()
class ConvDecoder(nn.Module):
    """A convolutional decoder, the mirror of :class:`ConvEncoder`: transposed convolutions double the image.

    Args:
        inputs: Event shape ``I`` of the input, or its length.
        outputs: Shape ``(P * C, H, W)``: ``P`` parameters for each of ``C`` channels, or ``(C, H, W)``.
        channels: Channels of each stage, from the image inward as in :class:`ConvEncoder`.
        hidden: Widths of the hidden layers that stand before the convolutions.
        activation: A module class, called without arguments.

    Shapes:
        input ``(..., *I)`` gives ``(..., P * C, H, W)``, with any leading batch dimensions.

    Raises:
        ValueError: If ``outputs`` is not an image or cannot be halved once for each stage, or when called on
            another shape.

    Example:
        >>> import torch
        >>> ConvDecoder(16, (1, 28, 28))(torch.zeros(3, 5, 16)).shape
        torch.Size([3, 5, 1, 28, 28])
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | Sequence[int],  # an int is refused in better words below
        channels: Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (256,),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.channels = channels
        self.hidden = hidden
        self.activation = activation
        self.input_shape = as_shape(inputs)
        self.output_shape = image_shape(outputs, "outputs")
        widths, left = stages(*self.output_shape[1:], channels)
        sizes = (math.prod(self.input_shape), *hidden, widths[-1] * math.prod(left))
        layers = [*dense(sizes, activation), nn.Unflatten(1, (widths[-1], *left))]
        inward = (self.output_shape[0], *widths)
        for before, after in zip(reversed(widths), reversed(inward[:-1]), strict=True):
            layers += [activation(), nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)
        initialise(self, last=self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        flat = x.reshape(batch.numel(), math.prod(self.input_shape))
        return self.layers(flat).reshape(batch + self.output_shape)


@checked()
class RoscaEncoder(nn.Module):
    """A small convolutional encoder for MNIST in the manner of Rosca and colleagues (2017, 2018).

    Four convolutions of 5 x 5 with leaky rectifiers, the second and fourth of stride 2 (28 pixels become 14,
    then 7), then one linear map. Sources: Rosca, Lakshminarayanan, Warde-Farley & Mohamed 2017, *Variational
    approaches for auto-encoding generative adversarial networks*, 1706.04987; Rosca, Lakshminarayanan &
    Mohamed 2018, *Distribution matching in variational inference*, 1802.06847.

    The papers' tables of layers could not be checked when this was written: the number and kind of layers,
    their channels 8-16-32-64, the strides, the slope, and leaving out batch normalisation are our choices.
    Don't quote results of this network as results of the papers' network.

    Args:
        inputs: Image shape ``(C, H, W)``; strided layers round up, so any size will do.
        outputs: Event shape ``O`` of the output, or its length.
        channels: Channels of each convolution.
        slope: Slope of the leaky rectifiers for negative values.

    Shapes:
        input ``(..., C, H, W)`` gives ``(..., *O)``, with any leading batch dimensions.

    Raises:
        ValueError: If ``inputs`` is not an image or ``channels`` is empty, or when called on another shape.

    Example:
        >>> import torch
        >>> RoscaEncoder((1, 28, 28), 64)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int | Sequence[int],
        channels: Sequence[int] = (8, 16, 32, 64),
        *,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.channels = channels
        self.slope = slope
        self.input_shape = image_shape(inputs, "inputs")
        self.output_shape = as_shape(outputs)
        if not channels:
            raise ValueError("channels must name at least one convolution, got none; pass e.g. (8, 16, 32, 64)")
        layers: list[nn.Module] = []
        before, height, width = self.input_shape
        for index, after in enumerate(channels):
            stride = 1 + index % 2
            layers += [nn.Conv2d(before, after, kernel_size=5, stride=stride, padding=2), nn.LeakyReLU(slope)]
            before, height, width = after, -(-height // stride), -(-width // stride)
        head = nn.Linear(before * height * width, math.prod(self.output_shape))
        self.layers = nn.Sequential(*layers, nn.Flatten(), head)
        initialise(self, last=head)

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        return self.layers(x.reshape(batch.numel(), *self.input_shape)).reshape(batch + self.output_shape)

"""Residual convolutional encoders and decoders for small images.

The blocks are pre-activated (He, Zhang, Ren & Sun 2016, *Identity mappings in deep residual networks*,
1603.05027) and use group normalisation (Wu & He 2018, *Group normalization*, 1803.08494), never batch
normalisation: with the latter, the posterior or likelihood of one observation would depend on the others in
its batch, and a bound computed in batches would not be a bound for any model. Group normalisation treats each
observation alone, the same way in training and in evaluation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrogen.arguments import check_counts, checked
from pyrogen.networks.convolutional import image_shape, stages
from pyrogen.networks.mlp import as_shape, initialise, leading_shape

__all__ = ["ResNetDecoder", "ResNetEncoder", "ResidualBlock"]

BRANCH_SCALE = 0.1


def normalisation(channels: int) -> nn.GroupNorm:
    """Group normalisation in up to 8 groups, or in a single one where groups would be small."""
    return nn.GroupNorm(math.gcd(channels, 8) if channels >= 32 else 1, channels)


@checked()
class ResidualBlock(nn.Module):
    """A pre-activated residual block of two 3 x 3 convolutions that keeps, halves or doubles the image.

    .. math:: y = S(r(x)) + f(x)

    with ``S`` the identity or a 1 x 1 convolution and ``r`` the change of size, by mean pooling or by nearest
    neighbours.

    Args:
        inputs: Channels ``C`` before the block.
        outputs: Channels ``D`` after the block.
        resize: ``1`` keeps the sides, ``0.5`` halves them, ``2`` doubles them.
        activation: A module class, called without arguments.

    Shapes:
        input ``(B, C, H, W)`` gives ``(B, D, resize * H, resize * W)``.

    Example:
        >>> ResidualBlock(8, 16, resize=0.5)(torch.zeros(2, 8, 6, 6)).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, *, resize: float = 1, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        check_counts(inputs=inputs, outputs=outputs)
        if resize not in (0.5, 1, 2):
            raise ValueError(f"resize must be 0.5, 1 or 2, got {resize}")
        self.inputs = inputs
        self.outputs = outputs
        self.resize = resize
        self.activation = activation
        self.before = nn.Sequential(normalisation(inputs), activation())
        self.first = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        self.between = nn.Sequential(normalisation(outputs), activation())
        self.second = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.resize == 2:
            x, h = F.interpolate(x, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)
        h = self.first(h)
        if self.resize == 0.5:
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        return self.skip(x) + self.second(self.between(h))


def initialise_residual(network: nn.Module, last: nn.Module) -> None:
    """As :func:`pyrogen.networks.mlp.initialise`, with blocks that start near the identity."""
    initialise(network, last)
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            with torch.no_grad():
                block.second.weight.mul_(BRANCH_SCALE)


@checked()
class ResNetEncoder(nn.Module):
    """A residual encoder: in each stage, blocks at one size and one that halves the image, then a linear map.

    Args:
        inputs: Image shape ``(C, H, W)``; both sides divisible by 2 to the number of stages.
        outputs: Event shape ``O`` of the output, or its length.
        channels: Channels of each stage, from the image inward; by default 32, 64, 128, 256, as many as fit.
        blocks: Blocks in each stage, the halving one included.
        activation: A module class, called without arguments.

    Shapes:
        input ``(..., C, H, W)`` gives ``(..., *O)``, with any leading batch dimensions.

    Raises:
        ValueError: If ``inputs`` is not an image or cannot be halved once for each stage, or when called on
            another shape.

    Example:
        >>> ResNetEncoder((1, 8, 8), 16, channels=(8, 16))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: int | Sequence[int],
        channels: Sequence[int] | None = None,
        *,
        blocks: int = 2,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.channels = channels
        self.blocks = check_blocks(blocks)
        self.activation = activation
        self.input_shape = image_shape(inputs, "inputs")
        self.output_shape = as_shape(outputs)
        widths, left = stages(*self.input_shape[1:], channels)
        layers: list[nn.Module] = [nn.Conv2d(self.input_shape[0], widths[0], kernel_size=3, padding=1)]
        for before, after in zip((widths[0], *widths), widths, strict=False):
            layers += [ResidualBlock(before, before, activation=activation) for _ in range(blocks - 1)]
            layers += [ResidualBlock(before, after, resize=0.5, activation=activation)]
        head = nn.Linear(widths[-1] * math.prod(left), math.prod(self.output_shape))
        self.layers = nn.Sequential(*layers, normalisation(widths[-1]), activation(), nn.Flatten(), head)
        initialise_residual(self, last=head)

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        return self.layers(x.reshape(batch.numel(), *self.input_shape)).reshape(batch + self.output_shape)


@checked()
class ResNetDecoder(nn.Module):
    """A residual decoder, the mirror of :class:`ResNetEncoder`: a linear map, then doubling stages.

    Args:
        inputs: Event shape ``I`` of the input, or its length.
        outputs: Shape ``(P * C, H, W)``: ``P`` parameters for each of ``C`` channels, or ``(C, H, W)``.
        channels: Channels of each stage, from the image inward as in :class:`ResNetEncoder`.
        blocks: Blocks in each stage, the doubling one included.
        activation: A module class, called without arguments.

    Shapes:
        input ``(..., *I)`` gives ``(..., P * C, H, W)``, with any leading batch dimensions.

    Raises:
        ValueError: If ``outputs`` is not an image or cannot be halved once for each stage, or when called on
            another shape.

    Example:
        >>> ResNetDecoder(16, (1, 8, 8), channels=(8, 16))(torch.zeros(3, 5, 16)).shape
        torch.Size([3, 5, 1, 8, 8])
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | Sequence[int],  # an int is refused in better words below
        channels: Sequence[int] | None = None,
        *,
        blocks: int = 2,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.channels = channels
        self.blocks = check_blocks(blocks)
        self.activation = activation
        self.input_shape = as_shape(inputs)
        self.output_shape = image_shape(outputs, "outputs")
        widths, left = stages(*self.output_shape[1:], channels)
        start = (widths[-1], *left)
        layers: list[nn.Module] = [
            nn.Linear(math.prod(self.input_shape), math.prod(start)),
            nn.Unflatten(1, start),
        ]
        for before, after in zip(reversed(widths), reversed((widths[0], *widths[:-1])), strict=True):
            layers += [ResidualBlock(before, after, resize=2, activation=activation)]
            layers += [ResidualBlock(after, after, activation=activation) for _ in range(blocks - 1)]
        last = nn.Conv2d(widths[0], self.output_shape[0], kernel_size=3, padding=1)
        self.layers = nn.Sequential(*layers, normalisation(widths[0]), activation(), last)
        initialise_residual(self, last=last)

    def forward(self, x: Tensor) -> Tensor:
        batch = leading_shape(x, self.input_shape)
        flat = x.reshape(batch.numel(), math.prod(self.input_shape))
        return self.layers(flat).reshape(batch + self.output_shape)


def check_blocks(blocks: int) -> int:
    """The number of blocks in a stage, if it is one."""
    if blocks < 1:
        raise ValueError(f"blocks must be 1 or more, got {blocks}: each stage has at least the block that resizes")
    return blocks

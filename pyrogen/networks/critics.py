"""Critics: networks that score samples, from whose scores a density ratio or a distance is read."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pyrogen.arguments import checked
from pyrogen.networks.convolutional import stages
from pyrogen.networks.mlp import as_shape, dense, initialise

__all__ = ["Critic"]

FIRST_OUTPUTS = 0.1
"""What the last layer's initial weights are multiplied by: scores start near 0, ratios near 1."""

SMALLEST_SIDE = 8
"""Images smaller than this are read as vectors: after one halving nothing of a neighbourhood would be left."""


@checked()
class Critic(nn.Module):
    r"""Scores samples, and what they are conditioned on: the default network of every ratio.

    .. math:: T(z, c) = w^\top h(z, c) + b

    Vectors are read by fully connected layers, together with the context. Images whose sides are 8 or more and can be
    halved go through the strided convolutions of :class:`~pyrogen.networks.ConvEncoder` first, and the context joins
    before the fully connected layers. Every other shape is flattened to a vector. There is no normalisation over the
    batch: a sample's score doesn't depend on its neighbours.

    Args:
        features: Event shape ``E`` of the samples, or its length.
        context: Width ``C`` of the context, or 0 for none.
        hidden: Widths of the fully connected hidden layers.
        channels: Channels of each convolution that images ``(C, H, W)`` go through, from the image inward; by default
            those of :class:`~pyrogen.networks.ConvEncoder`. An empty sequence has images read as vectors. Samples of
            another shape have no use for it.
        outputs: How many scores; 1 gives no dimension of its own.
        spectral: Divide the weights of every layer by their largest singular value, so that each layer is 1-Lipschitz
            (convolutions as the matrices of their kernels; Miyato et al. 2018, *Spectral normalization for generative
            adversarial networks*, 1802.05957). The estimate of the singular value takes one step each call in training
            mode.
        activation: A module class, called without arguments after each hidden layer.

    Shapes:
        samples ``(..., *E)`` and context ``(..., C)``, whose leading dimensions are broadcast against each other, give
        scores ``(...)``, or ``(..., outputs)`` with more than one.

    The last layer starts small, so that a ratio starts near 1; with ``spectral`` its norm is 1 from the start.

    Raises:
        ValueError: For channels that ask to halve an image more often than it can be; when called with samples or a
            context of another shape, with a context it was not built for, or without the one it was built for.

    Example:
        >>> critic = Critic(3, context=5)
        >>> critic(torch.zeros(7, 2, 3), torch.zeros(2, 5)).shape
        torch.Size([7, 2])
        >>> Critic((1, 28, 28), outputs=4)(torch.zeros(7, 1, 28, 28)).shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        features: int | Sequence[int],
        context: int = 0,
        *,
        hidden: Sequence[int] = (256, 256),
        channels: Sequence[int] | None = None,
        outputs: int = 1,
        spectral: bool = False,
        activation: type[nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        if context < 0 or outputs < 1:
            raise ValueError(f"context must be 0 or more and outputs 1 or more, got context={context}, {outputs=}")
        self.features = features
        self.context = context
        self.hidden = hidden
        self.channels = channels
        self.outputs = outputs
        self.spectral = spectral
        self.activation = activation
        self.shape = as_shape(features)
        self.convolutions, self.width = _convolutions(self.shape, channels, activation)
        sizes = (self.width + context, *hidden)
        self.trunk = nn.Sequential(*dense(sizes, activation), *([activation()] if hidden else []))
        self.last = nn.Linear(sizes[-1], outputs)
        initialise(self, last=self.last)
        with torch.no_grad():
            self.last.weight.mul_(FIRST_OUTPUTS)
        if spectral:
            for layer in [*self.modules()]:
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    spectral_norm(layer)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        scores = self.last(self.features_of(z, context))
        return scores.squeeze(-1) if self.outputs == 1 else scores

    def features_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the last layer reads, flat: ``(..., H)``, in which VAE/GAN measures how alike two images are.

        Larsen et al. 2016, *Autoencoding beyond pixels using a learned similarity metric*, 1512.09300.
        """
        batch = self._leading_shape(z)
        self._check_context(context)
        if self.convolutions is None:
            h = z.reshape(batch + (self.width,))
        else:
            h = self.convolutions(z.reshape(batch.numel(), *self.shape)).reshape(batch + (self.width,))
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            h = torch.cat([h.expand(batch + h.shape[-1:]), context.expand(batch + context.shape[-1:])], -1)
        return self.trunk(h)

    def _leading_shape(self, z: Tensor) -> torch.Size:
        cut = z.dim() - len(self.shape)
        if cut < 0 or z.shape[cut:] != self.shape:
            raise ValueError(
                f"this critic was built for samples of shape (..., {', '.join(map(str, self.shape))}), "
                f"got {tuple(z.shape)}; build it with features= set to the shape of one sample"
            )
        return z.shape[:cut]

    def _check_context(self, context: Tensor | None) -> None:
        if (context is None) == (self.context == 0) and (context is None or context.shape[-1:] == (self.context,)):
            return
        expected = f"a context of shape (..., {self.context})" if self.context else "no context"
        came = "none" if context is None else f"one of shape {tuple(context.shape)}"
        raise ValueError(f"this critic was built for {expected}, got {came}; build it with context= set to its width")

    def extra_repr(self) -> str:
        return f"{self.features}, context={self.context}, outputs={self.outputs}, spectral={self.spectral}"


def _convolutions(
    shape: tuple[int, ...], channels: Sequence[int] | None, activation: Callable[[], nn.Module]
) -> tuple[nn.Sequential | None, int]:
    """Convolutions for an event shape, None if it is read as a vector, and how many features come of it."""
    is_image = len(shape) == 3
    if is_image and channels is None:
        is_image = min(shape[1:]) >= SMALLEST_SIDE and shape[1] % 2 == shape[2] % 2 == 0
    if not is_image or (channels is not None and not channels):
        return None, math.prod(shape)
    widths, left = stages(shape[1], shape[2], channels)
    layers: list[nn.Module] = []
    for before, after in zip((shape[0], *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), activation()]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * math.prod(left)

"""Data sets built from MNIST by a documented, seeded recipe."""

from pathlib import Path

import torch
from torch import Tensor

from pyrogen.data.dataset import Data
from pyrogen.data.published import mnist

__all__ = ["color_mnist", "stacked_mnist"]

STACKED_TRAIN = 128_000
_CHUNK = 10_000  # images coloured at a time, to bound the memory of the wider integers


def color_mnist(root: Path, seed: int) -> Data:
    r"""ColorMNIST: each digit in one random colour on one random background, 3×28×28.

    With :math:`u \in [0, 1]` the digit's intensity and foreground :math:`f` and background :math:`b` drawn
    uniformly from 8-bit RGB for each image,

    .. math:: x = \mathrm{round}\,(b + (f - b)\, u) .

    Colours come from one generator with the given seed, which is used for train, validation and test in turn,
    foregrounds first. The idea is that of Rosca, Lakshminarayanan and Mohamed (2018, arXiv 1802.06847), whose
    own recipe is not published. Splits and labels are MNIST's.
    """
    gray = mnist(root)
    generator = torch.Generator().manual_seed(seed)
    train, validation, test = (_coloured(x, generator) for x in (gray.train, gray.validation, gray.test))
    return Data(
        "color_mnist",
        train=train,
        validation=validation,
        test=test,
        values="levels",
        levels=256,
        train_labels=gray.train_labels,
        validation_labels=gray.validation_labels,
        test_labels=gray.test_labels,
        classes=gray.classes,
    )


def _coloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gray uint8 images (N, 1, H, W) in random colours, uint8 (N, 3, H, W)."""
    n = len(images)
    foreground, background = (
        torch.randint(256, (n, 3, 1, 1), generator=generator, dtype=torch.int32) for _ in range(2)
    )
    coloured = torch.empty((n, 3, *images.shape[2:]), dtype=torch.uint8)
    for i in range(0, n, _CHUNK):
        rows = slice(i, i + _CHUNK)
        f, b, u = foreground[rows], background[rows], images[rows].to(torch.int32)
        # In integers, rounding half up, so that every machine gives the same bytes.
        coloured[rows] = ((b * (255 - u) + f * u) * 2 + 255).div(510, rounding_mode="floor")
    return coloured


def stacked_mnist(root: Path, seed: int) -> Data:
    """Stacked MNIST: three random digits as the red, green and blue channel, 3×28×28, with 1000 modes.

    The label is 100 a + 10 b + c for the digits a, b, c of the three channels. There are 128 000 training
    images, as in PacGAN (Lin et al. 2018, arXiv 1712.04086), and as many validation and test images as MNIST
    has; each split takes its digits, uniformly and with replacement, from that split of MNIST, with one
    generator of the given seed for train, validation and test in turn.
    """
    gray = mnist(root)
    generator = torch.Generator().manual_seed(seed)
    assert gray.train_labels is not None and gray.validation_labels is not None and gray.test_labels is not None
    train, train_labels = _stacked(gray.train, gray.train_labels, STACKED_TRAIN, generator)
    validation, validation_labels = _stacked(gray.validation, gray.validation_labels, len(gray.validation), generator)
    test, test_labels = _stacked(gray.test, gray.test_labels, len(gray.test), generator)
    return Data(
        "stacked_mnist",
        train=train,
        validation=validation,
        test=test,
        values="levels",
        levels=256,
        train_labels=train_labels,
        validation_labels=validation_labels,
        test_labels=test_labels,
    )


def _stacked(images: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n triples of gray images (N, 1, H, W): channels (n, 3, H, W) and labels (n,) in 0..999."""
    rows = torch.randint(len(images), (n, 3), generator=generator)
    return images.squeeze(1)[rows], labels[rows] @ torch.tensor([100, 10, 1])

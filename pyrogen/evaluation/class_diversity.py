"""How much samples of one class differ from each other."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from pyrogen.arguments import check_counts, checked
from pyrogen.data import as_float
from pyrogen.evaluation.errors import standard_error
from pyrogen.evaluation.features import ROWS, check_sides, class_labels, prepared_batches
from pyrogen.inference.turns import seeded

__all__ = ["Diversity", "diversity"]

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The weights of the scales, from the finest (Wang, Simoncelli & Bovik 2003)."""
WINDOW = 11
"""The side of the window in which structures are compared."""
SMALLEST_SIDE = 16
"""In pixels; smaller images are enlarged."""
BATCH = 256
"""How many pairs are compared at once."""


@dataclass(frozen=True)
class Diversity:
    """How much samples of one class differ: 1 − MS-SSIM, from 0, all alike, to about 1.

    Attributes:
        diversity: The mean over classes.
        error: Its standard error, over the pairs that were drawn.
        per_class: The mean of each class by its label, of those with two samples or more.
        samples: Number of samples.
        pairs: Number of pairs in each class.
        scales: At how many scales structures were compared.
        side: The smaller side of the compared images in pixels, after enlarging if they were small.
    """

    diversity: float
    error: float
    per_class: dict[int, float]
    samples: int
    pairs: int
    scales: int
    side: int

    def __str__(self) -> str:
        return (
            f"diversity {self.diversity:.3f} ± {self.error:.3f}: 1 − MS-SSIM at {self.scales} scales from {self.side} "
            f"pixels ({self.samples} samples, {self.pairs} pairs in each of {len(self.per_class)} classes)"
        )


@checked()
def diversity(
    samples: Tensor,
    labels: Callable | Tensor,
    *,
    pairs: int = 100,
    seed: int = 0,
    rows: int = ROWS,
) -> Diversity:
    r"""How much samples of one class differ: one less the multi-scale structural similarity of random pairs.

    .. math:: 1 - \mathbb{E}_k \, \mathbb{E}_{x, x' \mid k} \operatorname{MS-SSIM}(x, x')

    Odena, Olah & Shlens 2017, *Conditional image synthesis with auxiliary classifier GANs*, 1610.09585, with 100 pairs
    a class; Rosca et al. 2018, 1802.06847. It says nothing of quality: noise is as diverse as can be; compare it with
    that of test data, of the same scales.

    The similarity (Wang, Simoncelli & Bovik 2003) is torchmetrics', with windows of 11 pixels, and no scale of a pair
    counts as less than 0. Each scale halves the image: five need sides of 176 pixels, four of 99, three of 44, and
    smaller images get two, with the first of the five weights, scaled to sum to 1. Images with a side below 16 pixels
    are first enlarged bilinearly by the least whole factor that makes it 16. Other implementations shrink the window
    instead, and their figures differ.

    Args:
        samples: Images ``(N, C, H, W)``, pixels in [0, 1].
        labels: Integers ``(N,)``, or a classifier, as :func:`~pyrogen.evaluation.visible.inception_score`, whose most
            probable class is taken.
        pairs: Pairs of different samples that are drawn in each class, a pair more than once if there are few.
        seed: Of the pairs; the caller's random state is left as it was.
        rows: How many rows go through the classifier at once.

    Raises:
        TypeError: If samples are no tensor of values whose meaning is known.
        ValueError: If samples are no images with pixels in [0, 1], labels do not match them, or no class has two.

    Example:
        >>> images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.arange(40) % 2
        >>> print(diversity(images, labels, pairs=20))
        diversity 0.9... ± 0.0...: 1 − MS-SSIM at 2 scales from 28 pixels (40 samples, 20 pairs in each of 2 classes)
        >>> diversity(images[:1].repeat(40, 1, 1, 1), labels, pairs=20).diversity < 1e-6
        True
    """
    check_counts(pairs=pairs, rows=rows)
    _check_images(samples, rows)
    found = class_labels(labels, samples, rows=rows).to(samples.device)
    classes = [int(k) for k, n in zip(*(t.tolist() for t in found.unique(return_counts=True)), strict=True) if n > 1]
    if not classes:
        raise ValueError(f"no class has two of the {len(samples)} samples, so none can be compared; take more samples")
    scales, factor = _scales(samples)
    means, errors = {}, []
    with seeded(seed, samples.device), torch.no_grad():
        for k in classes:
            first, second = _pairs((found == k).nonzero()[:, 0], pairs)
            different = 1 - _similarity(samples, first, second, scales, factor)
            means[k] = float(different.mean())
            errors.append(float(standard_error(different)))
    mean, error = sum(means.values()) / len(means), math.hypot(*errors) / len(means)
    return Diversity(mean, error, means, len(samples), pairs, scales, factor * min(samples.shape[2:]))


def _check_images(samples: Tensor, rows: int) -> None:
    check_sides(samples=samples)
    if samples.dim() != 4:
        raise ValueError(f"expected samples as images (N, C, H, W), got {tuple(samples.shape)}; reshape them")
    for batch in prepared_batches(samples, "samples", rows, None):
        if batch.min() < 0 or batch.max() > 1:
            raise ValueError(
                f"expected pixels in [0, 1], got values from {float(batch.min()):.3g} to {float(batch.max()):.3g}; "
                "rescale the images, or x.clamp(0, 1) what a sample's noise has carried outside"
            )


def _scales(samples: Tensor) -> tuple[int, int]:
    """At how many scales images are compared, and by how much they are enlarged before."""
    side = min(samples.shape[2:])
    factor = max(1, math.ceil(SMALLEST_SIDE / side))
    # What torchmetrics asks of n scales; all images get two.
    return max(n for n in range(2, len(BETAS) + 1) if factor * side // (n - 1) ** 2 >= WINDOW), factor


def _pairs(rows: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Random pairs of different rows."""
    first = torch.randint(len(rows), (pairs,), device=rows.device)
    other = torch.randint(len(rows) - 1, (pairs,), device=rows.device)
    return rows[first], rows[other + (other >= first)]


def _similarity(samples: Tensor, first: Tensor, second: Tensor, scales: int, factor: int) -> Tensor:
    """MS-SSIM of each pair."""
    betas = tuple(beta / sum(BETAS[:scales]) for beta in BETAS[:scales])
    found = []
    for rows in torch.stack([first, second]).split(BATCH, dim=1):
        x, y = (as_float(samples[each]).float() for each in rows)
        if factor > 1:
            x, y = (F.interpolate(each, scale_factor=factor, mode="bilinear") for each in (x, y))
        found.append(
            multiscale_structural_similarity_index_measure(x, y, reduction="none", data_range=1.0, betas=betas)
        )
    return torch.cat(found)

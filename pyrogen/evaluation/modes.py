"""Which modes of the data samples cover, and how evenly: of Gaussian mixtures and of stacked digits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.data import GaussianMixture2d
from pyrogen.evaluation.features import ROWS, check_sides, class_probabilities, features_of

__all__ = ["ModeCoverage", "mode_coverage"]


@dataclass(frozen=True)
class ModeCoverage:
    """How many modes samples cover, and how evenly.

    Attributes:
        covered: Number of modes covered.
        modes: Number of modes.
        high_quality: The share of samples of high quality; NaN where a classifier says which mode a sample is of.
        kl: KL(modes of the samples ‖ uniform) in nats, from 0 to log ``modes``.
        samples: Number of samples.
    """

    covered: int
    modes: int
    high_quality: float
    kl: float
    samples: int

    @property
    def even_kl(self) -> float:
        """About what :attr:`kl` is on average for as many samples of even modes: (modes − 1) / 2 samples, in nats.

        It holds for several samples a mode.
        """
        return (self.modes - 1) / (2 * self.samples)

    def __str__(self) -> str:
        quality = "" if math.isnan(self.high_quality) else f"{100 * self.high_quality:.1f} % of high quality, "
        return (
            f"{self.covered} of {self.modes} modes, {quality}KL {self.kl:.4f} nats to even modes ({self.samples} "
            f"samples, for which about {self.even_kl:.4f} is chance)"
        )


@checked()
def mode_coverage(samples: Tensor, modes: GaussianMixture2d | Callable, *, rows: int = ROWS) -> ModeCoverage:
    r"""Count the modes that samples cover, and compare how often each comes with what would be even.

    .. math:: \operatorname{KL}(\hat q \| \text{uniform}) = \sum_m \hat q_m \log (M \hat q_m)

    of the shares q̂ of samples by mode. Of a mixture in the plane, such as the ring and the grid, a sample's mode is the
    nearest; it is of high quality within three standard deviations of it, and a mode is covered if it has a sample of
    high quality (Lin, Khetan, Fanti & Oh 2018, *PacGAN*, 1712.04086, who judge 2500 samples; all count for q̂). Of
    stacked digits each channel is classified: three channels and ten classes make 1000 modes, covered if one sample is
    of it (Metz et al. 2017, *Unrolled generative adversarial networks*, 1611.02163). Few samples miss modes, and are
    uneven, by chance.

    Args:
        samples: Points ``(n, 2)``, or images ``(n, C, H, W)``.
        modes: A mixture, or the classifier of single channels, as
            :func:`~pyrogen.evaluation.visible.inception_score`: of ``(n, 1, H, W)`` to probabilities ``(n, K)``, with
            :math:`K^C` modes.
        rows: How many images go through the classifier at once.

    Raises:
        TypeError: If samples are no tensor of values whose meaning is known.
        ValueError: If samples are empty, not finite or of another shape, or the classifier gives no probabilities.

    Example:
        >>> from pyrogen.data import ring
        >>> toy = ring()
        >>> found = mode_coverage(toy.sample(2500, seed=1), toy)
        >>> found.covered, found.high_quality > 0.98, found.kl < 0.01
        (8, True, True)
    """
    if isinstance(modes, GaussianMixture2d):
        mode, good = _nearest_means(samples, modes, rows)
        total, quality = len(modes.means), float(good.double().mean())
    else:
        mode, total = _stacked(samples, modes, rows)
        good, quality = torch.ones_like(mode, dtype=torch.bool), math.nan
    shares = mode.bincount(minlength=total).double() / len(mode)
    seen = shares[shares > 0]
    return ModeCoverage(len(mode[good].unique()), total, quality, float((seen * (total * seen).log()).sum()), len(mode))


def _nearest_means(samples: Tensor, mixture: GaussianMixture2d, rows: int) -> tuple[Tensor, Tensor]:
    """The mode of each point, and whether it is of high quality."""
    check_sides(samples=samples)
    if samples.shape[1:] != (2,):
        raise ValueError(f"expected samples as points (n, 2), as the mixture's, got {tuple(samples.shape)}")
    (points,) = features_of(None, rows=rows, samples=samples)
    return mixture.nearest_modes(points)


def _stacked(samples: Tensor, classifier: Callable, rows: int) -> tuple[Tensor, int]:
    """The mode of each image by its channels' classes, the first the leading digit, and how many modes there are."""
    check_sides(samples=samples)
    if samples.dim() != 4:
        raise ValueError(f"expected samples as images (n, C, H, W) for a classifier, got {tuple(samples.shape)}")
    mode, total = torch.zeros((), dtype=torch.long), 1
    for channel in samples.split(1, dim=1):
        probabilities = class_probabilities(classifier, channel, rows=rows)
        mode = mode.to(probabilities.device) * probabilities.shape[1] + probabilities.argmax(1)
        total *= probabilities.shape[1]
    return mode, total

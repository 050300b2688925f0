"""An independent Wasserstein critic: how far samples are from data, by a network that no training has seen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyrogen.arguments import check_counts, check_positive, checked
from pyrogen.evaluation.calibration import fit_ratio
from pyrogen.evaluation.features import ROWS, check_sides, prepared_batches
from pyrogen.inference.ratios import Wasserstein
from pyrogen.inference.turns import seeded
from pyrogen.networks import Critic

__all__ = ["WassersteinCritic", "wasserstein_critic"]

STEPS = 1000
BATCH = 128
LEARNING_RATE = 1e-3
FIRST = 0.1
"""The share of the penalty with which the first half of the steps is done."""
FEWEST = 4
"""Rows of a side: two to train on, two to read the critic on."""


@dataclass(frozen=True)
class WassersteinCritic:
    """What a critic of its own makes of the Wasserstein-1 distance, in units of the values.

    Attributes:
        estimate: The estimate; for equal laws it is as often negative.
        error: Its standard error, over the rows that the critic was read on.
        slope: The root mean square of the critic's slope there, by which it has been divided.
        steps: The steps that it was trained.
        samples: Number of samples that it was read on; as many more it was trained on.
        observations: Number of rows of data that it was read on; likewise.
    """

    estimate: float
    error: float
    slope: float
    steps: int
    samples: int
    observations: int

    def __str__(self) -> str:
        return (
            f"Wasserstein critic {self.estimate:.4g} ± {self.error:.2g} after {self.steps} steps, read on "
            f"{self.samples} samples and {self.observations} observations"
        )


class _Scaled(nn.Module):
    """A critic of samples in other units, so that its inputs are about as large as networks expect."""

    def __init__(self, critic: nn.Module, factor: float) -> None:
        super().__init__()
        self.critic = critic
        self.factor = factor

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.critic(self.factor * z, context)


@checked()
def wasserstein_critic(
    samples: Tensor,
    data: Tensor,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    gradient_penalty: float = 10.0,
    critic: Callable[[Sequence[int]], nn.Module] = Critic,
    seed: int = 0,
    rows: int = ROWS,
) -> WassersteinCritic:
    r"""Estimate the Wasserstein-1 distance of samples and data by a critic of its own, read on rows it has not seen.

    .. math:: W_1 = \sup_{\|T\|_{\text{Lip}} \le 1} \mathbb{E}_{\text{data}} T - \mathbb{E}_{\text{samples}} T
        \approx \frac{\mathbb{E}_{\text{data}} T - \mathbb{E}_{\text{samples}} T}
        {(\mathbb{E} \|\nabla T\|^2)^{1/2}}

    for the Euclidean distance of all values. The critic of WGAN-GP
    (:class:`Wasserstein <pyrogen.inference.ratios.Wasserstein>`) is trained on a random half of each side and read on
    the other half, with data that no training of the model has used: so Danihelka et al. 2017, *Comparison of maximum
    likelihood and GAN-based training of Real NVPs*, 1705.05263, and Rosca et al. 2018, 1802.06847, judge models of any
    kind. The penalty is a tenth at first, for under the whole one a critic turns only slowly to where the difference
    is. It lets slopes pass 1, which is taken off by the root mean square of the slope on lines between samples and
    data. An estimate, no bound: too short a training, or too small a network, gives too little, and so does a half that
    is too small to show the law, the more so in many dimensions; compare figures of equal sizes, steps and critics.

    Args:
        samples: ``(M, *event_shape)``.
        data: Held-out rows ``(N, *event_shape)``.
        steps: Steps of Adam, in two halves, in each of which the learning rate falls to 0 as a half cosine.
        batch_size: Rows of each side a step.
        learning_rate: At the first step of each half.
        gradient_penalty: λ, in units in which data and samples are 1 away from the data's mean.
        critic: From an event shape to a critic; see :class:`~pyrogen.networks.Critic`.
        seed: Of halves, weights and batches; the caller's random state is left as it was.
        rows: How many rows go through the critic at once when it is read.

    Raises:
        TypeError: If a side is no tensor of values whose meaning is known.
        ValueError: If a side has fewer than four rows or is not finite, shapes differ, or a number is below 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> data, other = torch.randn(2, 2000, 2, generator=generator)
        >>> found = wasserstein_critic(other + torch.tensor([3.0, 0.0]), data, steps=200)
        >>> 2.7 < found.estimate < 3.3, found.samples
        (True, 1000)
    """
    check_counts(steps=steps, batch_size=batch_size, rows=rows)
    check_positive(learning_rate=learning_rate)
    check_sides(samples=samples, data=data)
    if min(len(samples), len(data)) < FEWEST:
        raise ValueError(
            f"a critic is trained on one half and read on the other, which takes at least {FEWEST} rows of each side, "
            f"got {len(samples)} samples and {len(data)} rows of data"
        )
    device = data.device
    with seeded(seed, device):
        u, other_u = _halves(samples, "samples", rows, device)
        v, other_v = _halves(data, "data", rows, device)
        centre = v.mean(0)
        unit = max(float((x - centre).flatten(1).square().sum(1).mean().sqrt()) for x in (u, v)) or 1.0
        u, v, other_u, other_v = ((x - centre) / unit for x in (u, v, other_u, other_v))
        network = _Scaled(critic(v.shape[1:]), math.sqrt(v[0].numel()))
        ratio = Wasserstein(network, gradient_penalty=gradient_penalty).to(device)
        for share, part in ((FIRST, steps // 2), (1.0, steps - steps // 2)):
            ratio.gradient_penalty = share * gradient_penalty
            if part:
                fit_ratio(ratio, v, u, steps=part, batch_size=batch_size, learning_rate=learning_rate)
        above, below = _read(ratio, other_v, rows), _read(ratio, other_u, rows)
        slope = _slope(ratio, other_u, other_v, rows)
    error = math.sqrt(float(above.var()) / len(above) + float(below.var()) / len(below))
    if not slope > 0:
        raise ArithmeticError("the critic is flat where it is read, so it tells no distance; give it more steps")
    scale = unit / slope
    difference = float(above.mean() - below.mean())
    return WassersteinCritic(scale * difference, scale * error, slope, steps, len(below), len(above))


def _halves(x: Tensor, name: str, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two random halves of a set, in single precision, where the critic is to be."""
    like = torch.empty((), device=device)
    whole = torch.cat([*prepared_batches(x, name, rows, like)])
    whole = whole.unsqueeze(1) if whole.dim() == 1 else whole
    order = torch.randperm(len(whole)).to(device)
    return whole[order[len(whole) // 2 :]], whole[order[: len(whole) // 2]]


@torch.no_grad()
def _read(ratio: Wasserstein, x: Tensor, rows: int) -> Tensor:
    return torch.cat([ratio(part) for part in x.split(rows)]).cpu().double()


def _slope(ratio: Wasserstein, u: Tensor, v: Tensor, rows: int) -> float:
    """The root mean square of the critic's slope on lines between the rows of both sides."""
    total, count = 0.0, min(len(u), len(v))
    for part_u, part_v in zip(u[:count].split(rows), v[:count].split(rows), strict=True):
        share = torch.rand(len(part_u), *[1] * (u.dim() - 1), device=u.device)
        between = torch.lerp(part_u, part_v, share).requires_grad_()
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(ratio(between).sum(), between)
        total += float(slopes.square().sum())
    return math.sqrt(total / count)

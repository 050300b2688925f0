"""How far a learned ratio can be trusted: the same critic, sample size and steps on Gaussians of known divergence."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogen.arguments import check_counts, check_positive, checked, shown
from pyrogen.inference.ratios import OwnRatio, Ratio
from pyrogen.inference.turns import seeded

__all__ = ["RatioCalibration", "calibrate_ratio", "fit_ratio"]

TOLERANCE = 0.1
"""The relative error up to which an estimate is shown as a number."""

HELD_OUT = 20_000
"""Samples over which an estimate is averaged. The log ratio's standard deviation is √(2 KL), a standard error of 0.07
nats at 50 nats."""

Sampler = Callable[[int], Tensor]


@dataclass(frozen=True)
class RatioCalibration:
    """Divergences that are known, and what a learned ratio made of them.

    Attributes:
        known: KL(q ‖ p) of Gaussian pairs in nats, rising.
        estimated: Means of the learned log ratio over held-out samples of q, in nats.
        trusted: The largest estimate up to which estimates are within 10 % of what is known, in nats; 0 if the first is
            not. An estimate that a larger, misjudged divergence can give as well is not among them.

    Example:
        >>> calibration = RatioCalibration(known=(1.0, 10.0, 20.0, 50.0), estimated=(1.0, 9.5, 16.4, 15.0))
        >>> calibration.shown(5.2), calibration.shown(15.5)
        ('5.2', '> 9.5')
        >>> round(calibration.error_at(9.5), 2), round(calibration.error_at(15.5), 2)
        (-0.05, -0.61)
    """

    known: tuple[float, ...]
    estimated: tuple[float, ...]

    @property
    def trusted(self) -> float:
        return max(0.0, min(max(self.estimated[: self._sound], default=0.0), self._misjudged))

    @property
    def _misjudged(self) -> float:
        """The smallest estimate of a divergence past the first that is not within tolerance."""
        return min(self.estimated[self._sound :], default=math.inf)

    @property
    def _sound(self) -> int:
        """How many divergences, from the first on, are estimated within tolerance."""
        return len([*itertools.takewhile(lambda error: abs(error) <= TOLERANCE, self._errors)])

    @property
    def _errors(self) -> list[float]:
        return [estimate / known - 1 for known, estimate in zip(self.known, self.estimated, strict=True)]

    def shown(self, estimate: float) -> str:
        """An estimate in nats as a table shows it: ``"12.3"``, or ``"> 15.0"`` past the range that is trusted."""
        return f"{estimate:.1f}" if estimate <= self.trusted and estimate < self._misjudged else f"> {self.trusted:.1f}"

    def error_at(self, estimate: float) -> float:
        """The relative error that an estimate of this size has, by linear interpolation; −0.2 is a fifth too little.

        Where several divergences give the same estimate, the largest error counts. Below the smallest divergence its
        error is taken; past all estimates it isn't known, which is NaN.
        """
        errors = self._errors
        if estimate <= min(self.estimated):
            return errors[0]
        found = []
        for k in range(len(errors) - 1):
            low, high = self.estimated[k], self.estimated[k + 1]
            if min(low, high) <= estimate <= max(low, high):
                share = (estimate - low) / (high - low) if high != low else 1.0
                known = (1 - share) * self.known[k] + share * self.known[k + 1]
                found.append(estimate / known - 1)
        return max(found, key=abs, default=math.nan)

    def __str__(self) -> str:
        lines = [f"{'known KL':>10} {'estimated':>10} {'error':>8}"]
        for known, estimate, error in zip(self.known, self.estimated, self._errors, strict=True):
            lines.append(f"{known:10.2f} {estimate:10.2f} {100 * error:6.1f} %")
        return "\n".join([*lines, f"within {100 * TOLERANCE:.0f} % up to an estimate of {self.trusted:.2f} nats"])


@checked()
def fit_ratio(
    ratio: Ratio,
    numerator: Sampler | Tensor,
    denominator: Sampler | Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    judged_by: tuple[Tensor, Tensor] | None = None,
) -> Ratio:
    """Train a ratio between two distributions that stay as they are.

    Args:
        ratio: It is trained in place and returned in evaluation mode.
        numerator, denominator: Functions from a number n to fresh samples ``(n, *E)``, or fixed sets ``(N, *E)`` of
            which each step draws rows at random.
        steps: Steps of Adam, whose learning rate falls to 0 as a half cosine.
        batch_size: Samples of each side a step.
        learning_rate: At the first step.
        judged_by: Other samples of both sides. The ratio is left as it was when its loss on these was least, of 10
            times at which it is asked and of its start.
    """
    check_counts(steps=steps, batch_size=batch_size)
    check_positive(learning_rate=learning_rate)
    draw_u, draw_v = _sampler("numerator", numerator, ratio), _sampler("denominator", denominator, ratio)
    optimizer = torch.optim.Adam(ratio.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = _Best(ratio, judged_by)
    ratio.train()
    with torch.enable_grad():
        for step in range(steps):
            if step % max(1, steps // 10) == 0:
                best.look()
            loss = ratio.loss(draw_u(batch_size), draw_v(batch_size))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    best.look()
    best.take()
    return ratio.eval()


class _Best:
    """The weights with which a ratio has told two sets of samples apart best; without samples, its last."""

    def __init__(self, ratio: Ratio, samples: tuple[Tensor, Tensor] | None) -> None:
        self.ratio = ratio
        self.samples = samples
        self.loss = math.inf
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> None:
        if self.samples is not None and (loss := float(self.ratio.loss(*self.samples))) < self.loss:
            self.loss, self.weights = loss, copy.deepcopy(self.ratio.state_dict())

    def take(self) -> None:
        if self.weights:
            self.ratio.load_state_dict(self.weights)


def _sampler(name: str, samples: Sampler | Tensor, ratio: Ratio) -> Sampler:
    if not isinstance(samples, Tensor):
        return samples
    dtype = next((parameter.dtype for parameter in ratio.parameters()), samples.dtype)
    if samples.dim() == 0 or not samples.numel() or samples.dtype != dtype or not samples.isfinite().all():
        raise ValueError(f"{name} must be rows of finite numbers, {dtype} as the ratio's, got {shown(samples)}")
    return lambda n: samples[torch.randint(len(samples), (n,), device=samples.device)]


@checked()
def calibrate_ratio(
    ratio: Callable[[int], Ratio],
    *,
    features: int,
    samples: int | None = None,
    steps: int = 4000,
    batch_size: int = 512,
    divergences: Sequence[float] = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0),
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> RatioCalibration:
    r"""Ask what a ratio would report for Gaussians whose divergence is known.

    .. math:: q = \mathcal{N}(m, I), \quad p = \mathcal{N}(0, I), \quad
        \operatorname{KL}(q \| p) = \tfrac12 \|m\|^2, \quad \log \frac{q(z)}{p(z)} = m^\top z - \tfrac12 \|m\|^2

    For each divergence a new ratio is trained with these samples and steps (:func:`fit_ratio`), and its log ratio is
    averaged over 20 000 samples of q that it has not seen. A learned ratio is no bound: a single critic reports too
    little past 10 to 15 nats (Rhodes, Xu & Gutmann 2020, 2006.12204) and, fitted to a small fixed sample, too much.
    Shifted Gaussians are about the easiest pairs of their divergence: what fails here will not do better elsewhere.

    Args:
        ratio: Called with ``features``, it makes a new ratio: ``lambda d: Logistic(Critic(d))``.
        features: The number of dimensions.
        samples: How many samples of each side there are to train on; None draws fresh ones each step.
        steps, batch_size, learning_rate: See :func:`fit_ratio`.
        divergences: The known divergences in nats, above 0 and rising.
        seed: Of initial weights and samples; the caller's random state is left as it was.

    Raises:
        ValueError: If divergences are not positive and rising, a number is below 1, or the ratio estimates no log
            ratio.

    Example:
        >>> from pyrogen.inference import Logistic
        >>> from pyrogen.networks import Critic
        >>> def small(features):
        ...     return Logistic(Critic(features, hidden=(32,)))
        >>> calibration = calibrate_ratio(small, features=2, steps=200, batch_size=128, divergences=(0.5, 1.0))
        >>> bool(abs(calibration.estimated[1] - 1.0) < 0.25)
        True
    """
    check_positive(learning_rate=learning_rate)
    _check(ratio, features, samples, steps, batch_size, divergences)
    estimated = []
    for divergence in divergences:
        with seeded(seed, torch.device("cpu")):
            trained = ratio(features)
        if isinstance(trained, torch.nn.Module) and not isinstance(trained, Ratio):
            trained = OwnRatio(trained)
        like = next(trained.parameters(), None) if isinstance(trained, Ratio) else None
        if like is None:
            raise ValueError(
                f"expected a function from the number of features to a ratio with a critic, such as lambda d: "
                f"Logistic(Critic(d)); it returned a {type(trained).__name__}"
            )
        trained.event_dim = 1
        with seeded(seed + 1, like.device):
            estimated.append(_estimate(trained, features, divergence, samples, steps, batch_size, learning_rate, like))
    return RatioCalibration(tuple(float(each) for each in divergences), tuple(estimated))


def _estimate(
    ratio: Ratio,
    features: int,
    divergence: float,
    samples: int | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    like: Tensor,
) -> float:
    """What ``ratio`` reports for Gaussians of this divergence; their means are apart along the diagonal."""
    shift = math.sqrt(2 * divergence / features)

    def draw_p(n: int) -> Tensor:
        return torch.randn(n, features, dtype=like.dtype, device=like.device)

    def draw_q(n: int) -> Tensor:
        return shift + draw_p(n)

    with torch.no_grad():
        ratio.log_ratio(draw_q(1))  # a kind without a ratio says so before it is trained
    q: Sampler | Tensor = draw_q if samples is None else draw_q(samples)
    p: Sampler | Tensor = draw_p if samples is None else draw_p(samples)
    fit_ratio(ratio, q, p, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    with torch.no_grad():
        return ratio.log_ratio(draw_q(HELD_OUT)).double().mean().item()


def _check(
    ratio: object, features: int, samples: int | None, steps: int, batch_size: int, divergences: Sequence[float]
) -> None:
    if isinstance(ratio, torch.nn.Module) or not callable(ratio):
        raise TypeError(f"expected a function from the number of features to a new ratio, got {ratio!r}")
    check_counts(features=features, steps=steps, batch_size=batch_size)
    check_counts(or_none=True, samples=samples)
    pairs = itertools.pairwise(divergences)
    if not divergences or divergences[0] <= 0 or any(after <= before for before, after in pairs):
        raise ValueError(f"divergences must be above 0 and rise, in nats, got {tuple(divergences)}")

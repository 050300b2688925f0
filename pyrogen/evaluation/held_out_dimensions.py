"""Held-out estimates of what single latent values are apart from the prior, and of what they know of each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.aggregate import with_globals_held
from pyrogen.evaluation.calibration import RatioCalibration, fit_ratio
from pyrogen.evaluation.held_out import (
    BATCH,
    HELD_OUT,
    LEARNING_RATE,
    MARGINAL_LEARNING_RATE,
    POOL,
    STEPS,
    CriticOfEach,
    HeldOutEstimate,
    calibrated_around,
    default_critic,
    latent_draws,
    quarter,
    three_parts,
)
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.inference.adaptive import SMALLEST_VARIANCE
from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.ratios import Logistic
from pyrogen.inference.total_correlation import permuted

__all__ = ["HeldOutDimensions", "held_out_dimension_kl_estimate", "held_out_total_correlation_estimate"]


@dataclass(frozen=True, eq=False)
class HeldOutDimensions:
    """Estimates of the marginal divergences of single latent values by critics, and how far these can be trusted.

    Attributes:
        dimensions: KL(q(z_j) ‖ p(z_j)) of each unconstrained value in nats, by site ``(*nested plates, *event)``.
        calibration: What the same critic, with as many samples and steps, makes of divergences that are known.
        observations: How many observations they were asked about.

    Example:
        >>> calibration = RatioCalibration(known=(0.5, 5.0, 50.0), estimated=(0.5, 4.8, 15.0))
        >>> HeldOutDimensions({"z": torch.tensor([0.3, 12.0])}, calibration, 90).shown
        {'z': ['0.3', '> 4.8']}
    """

    dimensions: dict[str, Tensor]
    calibration: RatioCalibration = field(repr=False)
    observations: int

    @property
    def shown(self) -> dict[str, list[str]]:
        """As a table shows them; past the range of the critics ``"> 4.8"``, what these are trusted with."""
        return {
            name: [self.calibration.shown(round(float(kl), 1) + 0.0) for kl in each.flatten()]
            for name, each in self.dimensions.items()
        }

    def __str__(self) -> str:
        sites = "; ".join(f"{name} {', '.join(each)}" for name, each in self.shown.items())
        return f"estimates of the marginal KL of each value, nats: {sites}; {self.observations} observations"


@checked()
def held_out_dimension_kl_estimate(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    rows: int = ROWS,
) -> HeldOutDimensions:
    r"""Estimate the marginal divergence of each latent value by itself, by critics fitted to half of the observations.

    .. math:: \operatorname{KL}(q(z_j) \| p(z_j)) \approx \mathbb{E}_{q(z_j)} T_j(z_j)

    of the unconstrained values of all per-observation sites, explicit or not, with a critic of its own for each. Which
    observations they are fitted to, stopped by and asked about is as in
    :func:`~pyrogen.evaluation.held_out_marginal_kl_estimate`. They are calibrated on Gaussians of a single dimension,
    around the largest estimate. It bounds nothing. :func:`~pyrogen.evaluation.total_correlation` has these divergences
    without a critic, of the observations that it is given.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, at least 3, or a tuple of tensors that the programs take.
        steps: Steps of Adam.
        seed: Of draws, weights and parts; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Raises:
        ValueError: For fewer than three observations, without a per-observation latent site, for a masked one, or if
            programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> held_out_dimension_kl_estimate(toy.model, guide, toy.x[:20], steps=5).dimensions["z"].shape
        torch.Size([2])
    """
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        shapes = _shapes(pair)
        (u, v), second, (held, _) = _draws(pair, rows)
        both = torch.cat([u, v])

        def standard(z: Tensor) -> Tensor:
            """A sample for each critic, ``(N, n, 1)``."""
            return ((z - both.mean(0)) / both.std(0).clamp(min=SMALLEST_VARIANCE**0.5)).unsqueeze(-1)

        ratio = fit_ratio(
            Logistic(CriticOfEach(u.shape[1], 1)).to(u.device),
            standard(u),
            standard(v),
            steps=steps,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            judged_by=(standard(second[0]), standard(second[1])),
        )
        found = ratio.log_ratio(standard(held)).double().mean(0).to(u.dtype)
        calibration = calibrated_around(float(found.max()), 1, steps, seed, LEARNING_RATE)
        of_sites = zip(shapes.items(), found.split([shape.numel() for shape in shapes.values()]), strict=True)
        dimensions = {name: part.view(shape) for (name, shape), part in of_sites}
        return HeldOutDimensions(dimensions, calibration, quarter(pair))


@checked()
def held_out_total_correlation_estimate(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    rows: int = ROWS,
) -> HeldOutEstimate:
    r"""Estimate the total correlation of the aggregate posterior, by a critic fitted to half of these observations.

    .. math:: \operatorname{KL}\Big(q(z) \Big\| \prod_j q(z_j)\Big) \approx \mathbb{E}_{q(z)} T(z)

    of the unconstrained values of all per-observation latent sites together, explicit or not. The critic contrasts
    draws with draws whose values are permuted, each for itself (Kim & Mnih 2018, *Disentangling by factorising*,
    1802.05983). Which observations it is fitted to, stopped by and asked about is as in
    :func:`~pyrogen.evaluation.held_out_marginal_kl_estimate`, and so is the calibration. It bounds nothing.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, at least 3, or a tuple of tensors that the programs take.
        steps: Steps of Adam.
        seed: Of draws, weights and parts; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Raises:
        ValueError: For fewer than three observations, for fewer than two latent values of an observation, for a masked
            latent site, or if programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> [*held_out_total_correlation_estimate(toy.model, guide, toy.x[:20], steps=5).learned]
        ['latents']
    """
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        width = sum(shape.numel() for shape in _shapes(pair).values())
        if width < 2:
            raise ValueError(
                f"the total correlation is that of two or more latent values of an observation, and the model has "
                f'{width} in the plate "data"'
            )
        (u, _), (judge, _), (held, _) = _draws(pair, rows)
        centre, scale = u.mean(0), u.std(0).clamp(min=SMALLEST_VARIANCE**0.5)
        u, judge, held = ((z - centre) / scale for z in (u, judge, held))
        ratio = fit_ratio(
            default_critic(width).to(u.device),
            u,
            permuted(u),
            steps=steps,
            batch_size=BATCH,
            learning_rate=MARGINAL_LEARNING_RATE,
            judged_by=(judge, permuted(judge)),
        )
        learned = float(ratio.log_ratio(held).double().mean())
        calibration = calibrated_around(learned, width, steps, seed, MARGINAL_LEARNING_RATE)
        return HeldOutEstimate(0.0, {"latents": learned}, {"latents": calibration}, quarter(pair))


def _shapes(pair: Prepared) -> dict[str, torch.Size]:
    """The shapes of the unconstrained values of one observation."""
    return LatentVector({name: pair.latents[name] for name in pair.local}, pair.nodes).shapes


def _draws(pair: Prepared, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Draws of the guide and of the model to fit to, to stop by, and to ask about, with one draw of global sites."""
    chosen = three_parts(pair)
    held = with_globals_held(pair)
    return [latent_draws(held, part, total, rows) for part, total in zip(chosen, (POOL, HELD_OUT, POOL), strict=True)]

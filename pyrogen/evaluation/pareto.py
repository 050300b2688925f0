"""How far importance weights can be trusted: the shape of their tail, by Pareto smoothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyrogen.arguments import LARGEST, checked, is_whole
from pyrogen.evaluation.frames import arviz_major, import_arviz
from pyrogen.evaluation.likelihood import checked_weights
from pyrogen.evaluation.running import ROWS, pair_passes, prepared

__all__ = ["FEWEST_DRAWS", "ParetoDiagnostic", "pareto_diagnostic", "pareto_k", "tail_shapes"]

FEWEST_DRAWS = 25
"""Draws below which the tail, a fifth of them, has fewer than the five values that a fit takes."""

_EQUAL = 1e-3
"""Log-weights that differ by less, in nats, are equal as far as any estimate can show."""

_GOOD, _TRUSTED = 0.5, 0.7


@dataclass(frozen=True, eq=False)
class ParetoDiagnostic:
    """Pareto k̂ of B observations.

    Attributes:
        pareto_k: The shape of the tail of each observation's importance weights, ``(B,)``.
        draws: Number of weights that each was fitted to.
    """

    pareto_k: Tensor
    draws: int

    @property
    def good(self) -> float:
        """The share of observations with k̂ of at most 0.5."""
        return float((self.pareto_k <= _GOOD).double().mean())

    @property
    def untrusted(self) -> float:
        """The share of observations with k̂ above 0.7."""
        return float((self.pareto_k > _TRUSTED).double().mean())

    def __str__(self) -> str:
        return (
            f"Pareto k of {len(self.pareto_k)} observations, {self.draws} draws each: median "
            f"{self.pareto_k.median():.2f}, largest {self.pareto_k.max():.2f}; {self.good:.1%} of at most {_GOOD}, "
            f"{self.untrusted:.1%} above {_TRUSTED}, where the guide is not to be trusted"
        )


@checked(but=("draws",))
def pareto_diagnostic(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    draws: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> ParetoDiagnostic:
    r"""Say for each observation whether importance weights can make up for the guide's errors.

    The largest fifth (or :math:`3 \sqrt S`, if that is less) of the S weights

    .. math:: w_s = \frac{p(x, z_s \mid \theta_s)}{q(z_s \mid x, \theta_s)}, \quad z_s \sim q(z \mid x, \theta_s)

    is fitted by a generalised Pareto distribution, whose shape k̂ estimates how many moments the weights have: those
    of order below 1 / k. Up to 0.5 their variance is finite and the guide is good; above 0.7 neither guide nor
    weighted averages are to be trusted (Yao, Vehtari, Simpson & Gelman 2018, *Yes, but did it work?: Evaluating
    variational inference*, 1802.02538; Vehtari, Simpson, Gelman, Yao & Gabry 2024, *Pareto smoothed importance
    sampling*, 1507.02646). The fit is ArviZ's. Weights that are all equal have no tail and get 0; where no weight is
    finite and positive k̂ is infinite. Like the weights, k̂ is blind to what the guide never proposes: a guide on one of
    two separate modes may look good.

    With global sites, the weights are those of an observation's own latents, θ drawn anew from q(θ) for each.

    Args:
        model, guide: Programs with per-observation latent sites.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        draws: Number S of draws for each observation, at least 25.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once; ``draws * B`` weights are kept besides.

    Returns:
        k̂ of each observation, and the shares that are good and not to be trusted.

    Raises:
        ValueError: If the guide has a point mass at a per-observation site, the model has no such site, programs and
            observations do not fit, or there are too few draws.
        NoDensityError: A ``ValueError`` that names the implicit sites of guide or model.
        ArithmeticError: If a weight is NaN; it names the site where that began.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> pareto_diagnostic(toy.model, guide, toy.x[:5]).pareto_k.shape
        torch.Size([5])
    """
    if not is_whole(draws) or not FEWEST_DRAWS <= draws <= LARGEST:
        raise ValueError(f"Pareto k needs a whole number of at least {FEWEST_DRAWS} draws, got {draws!r}")
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        pair.need_density("Pareto k")
        if not pair.local:
            raise ValueError(
                "Pareto k is of the weights of an observation's own latents, and the model has no latent site in the "
                'plate "data"; to_arviz(run, x) keeps log_weight_global, the weights of its global sites'
            )
        log_w, start = torch.empty(draws, len(pair.batch[0]), dtype=torch.float64), 0
        like = pair.batch[0]
        for part, copies, terms in pair_passes(pair, draws, rows, copies=1 if pair.has_global else None):
            like = checked_weights(terms)
            log_w[start : start + copies, part] = like.double().cpu()
            start += copies if part.stop == len(pair.batch[0]) else 0
    shapes = torch.as_tensor(tail_shapes(log_w.T.numpy(), major=arviz_major()))
    return ParetoDiagnostic(shapes.to(like.dtype).to(like.device), draws)


@checked(but=("draws",))
def pareto_k(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    draws: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> Tensor:
    """Estimate the shape k̂ of the tail of each observation's importance weights, ``(B,)``.

    At most 0.5 is good, above 0.7 the guide is not to be trusted. :func:`pareto_diagnostic` takes the same arguments,
    says more, and has the details. A guide or a model with implicit sites is refused.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> pareto_k(toy.model, guide, toy.x[:5], draws=100).shape
        torch.Size([5])
    """
    return pareto_diagnostic(model, guide, x, draws=draws, seed=seed, rows=rows).pareto_k


def tail_shapes(log_weights: np.ndarray, *, major: int) -> np.ndarray:
    """Shape k̂ of the generalised Pareto tail of importance weights, by ArviZ of a major version.

    Args:
        log_weights: ``(B, S)`` in nats, without NaN.
        major: Of ArviZ.

    Returns:
        ``(B,)``; infinite where a fit failed, or where no weight is finite and positive.

    Raises:
        ModuleNotFoundError: If ArviZ's statistics are not installed.

    Example:
        >>> tail_shapes(np.zeros((2, 50)), major=0)
        array([0., 0.])
    """
    largest = log_weights.max(-1)
    finite = np.isfinite(largest)
    spread = np.subtract(largest, log_weights.min(-1), where=finite, out=np.full(len(largest), np.inf))
    shapes = np.where(finite, 0.0, np.inf)
    for row in np.flatnonzero(finite & (spread >= _EQUAL)):
        shapes[row] = _fit_tail(log_weights[row], major)
    return shapes


def _fit_tail(log_weights: np.ndarray, major: int) -> float:
    draws = len(log_weights)
    if np.isfinite(log_weights).sum() <= math.ceil(min(draws / 5, 3 * math.sqrt(draws))):
        return np.inf  # zeros in the tail itself
    with np.errstate(all="ignore"):
        try:
            # ArviZ 1.x takes log-likelihoods, whose negatives are its log-weights.
            shape = (
                import_arviz("arviz").psislw(log_weights)[1]
                if major < 1
                else import_arviz("arviz_stats.base").array_stats.psislw(-log_weights)[1]
            )
        except ValueError:  # a tail of equal values, of which ArviZ 0.x makes infinity
            return np.inf
    return np.inf if np.isnan(shape) else float(shape)

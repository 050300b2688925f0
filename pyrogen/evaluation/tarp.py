"""The coverage of credible regions around random points, by simulations from the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.running import ROWS, Prepared
from pyrogen.evaluation.simulations import Simulated, guide_draws, simulate, simulating
from pyrogen.evaluation.uniform_ranks import Ranking, UniformRanks, counts_below
from pyrogen.inference.latent_vector import LatentVector

__all__ = ["TARP", "tarp"]

SHIFT = 2.0
"""How far, in standard deviations of each unit, reference points are moved from the posterior."""

_SPREAD_DRAWS = 16
"""Draws of each of some observations from which the guide's standard deviations come."""

Reference = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class TARP:
    """How often credible regions around random reference points cover what the model drew.

    Attributes:
        ranks: How many of a simulation's draws are closer to its reference than what the model drew,
            ``(simulations,)``; uniform on 0, ..., L if the guide is exact.
        draws: Number L of the guide's draws for each simulation.
    """

    ranks: Tensor
    draws: int

    @property
    def simulations(self) -> int:
        """How many simulations there are."""
        return len(self.ranks)

    @property
    def levels(self) -> Tensor:
        """Credibility levels, ``(L + 2,)``, from 0 to 1."""
        return torch.arange(self.draws + 2, dtype=torch.float64) / (self.draws + 1)

    @property
    def coverage(self) -> Tensor:
        """The share of simulations that regions of these levels cover, ``(L + 2,)``; by an exact guide the level."""
        return counts_below(self.ranks, self.draws) / self.simulations

    @cached_property
    def p_value(self) -> float:
        """Of the coverage being that of an exact guide."""
        return float(UniformRanks(self.simulations, self.draws).p_values(self.ranks))

    def __str__(self) -> str:
        off = self.coverage - self.levels
        worst = int(off.abs().argmax())
        return (
            f"expected coverage p = {self.p_value:.3g}: {self.coverage[worst]:.3f} at credibility "
            f"{self.levels[worst]:.3f}, where it is farthest off; {self.simulations} simulations with "
            f"{self.draws} draws"
        )


@checked(but=("simulations", "draws"))
def tarp(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    simulations: int = 1000,
    draws: int = 99,
    reference: Reference | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> TARP:
    r"""Test the coverage of credible regions around random reference points, of all latents of an observation together.

    .. math:: (z^*, x^*) \sim p(z, x), \quad z_1, \dots, z_L \sim q(z \mid x^*), \quad
        r = \sum_{l=1}^{L} 1[d(z_l, \bar z) < d(z^*, \bar z)], \quad
        \text{coverage}(\tfrac{j}{L+1}) = \Pr(r < j)

    A region of credibility j / (L + 1) is the ball around the reference :math:`\bar z` that the j-th closest draw
    ends, and the ranks of an exact guide are uniform for every choice of a reference that does not know z*; were they
    uniform for all choices, the guide would be exact. Lemos, Coogan, Hezaveh & Perreault-Levasseur 2023,
    *Sampling-based accuracy testing of posterior estimators for general inference*, 2302.03026. The p-value is that of
    :func:`~pyrogen.evaluation.simulation_based.simulation_based_calibration`.

    **References.** Points that do not depend on x can't tell the prior from the posterior, and points that the guide
    draws can't either, if it gives the prior; points that lie on all sides of a posterior alike do not show that it is
    shifted. So here a reference is what the model drew together with another observation, the closest to x of as many
    as there are simulations: about a draw from the posterior, by no means of the guide. It is then moved by two
    standard deviations of every unit, up or down as was drawn once for all simulations. From there the scale shows
    most, then correlations, and a shift as far as it is along that direction (for shifts of single units the ranks of
    each have more power).

    **Distances** are Euclidean, of all units on unconstrained scales, each divided by the guide's standard deviation
    given x on average, which other simulations tell; so a unit that the data say nothing of does not hide the others.

    With global sites, the vector is that of the global sites and of one row of a data set chosen at random.

    Args:
        model, guide, x, simulations, draws, seed, rows: As for
            :func:`~pyrogen.evaluation.simulation_based.simulation_based_calibration`.
        reference: Another choice: a function of the tensors that the programs take, of B simulated rows, that returns
            the latents by site, ``(B, *nested plates, *event)``, or ``(*plates, *event)`` of a global site.

    Raises:
        ValueError, ArithmeticError: As there.

    Example:
        >>> import pyro
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", toy.posterior(x))
        >>> tarp(toy.model, guide, toy.x, simulations=200).p_value > 0.05
        True
    """
    with simulating(model, guide, x, simulations, draws, seed, rows) as pair:
        pilot = _Pilot(pair, simulations, rows)
        ranks = []
        for simulated in simulate(pair, simulations, rows):
            if reference is None:
                points = pilot.near(simulated)
            else:
                points = pilot.vectors(_chosen(pair, reference(*simulated.batch), simulated))
            ranking = Ranking(pilot.distance(pilot.vectors(simulated.latents), points))
            for part, _, latents, _ in guide_draws(pair, simulated, draws, rows):
                ranking.add(part, pilot.distance(pilot.vectors(latents), points[:, part]))
            ranks.append(ranking.ranks())
        return TARP(torch.cat(ranks), draws)


def _chosen(pair: Prepared, reference: Mapping[str, Tensor], simulated: Simulated) -> dict[str, Tensor]:
    """A user's reference points as the latents of simulations are shaped."""
    if missing := [name for name in pair.latents if name not in reference]:
        raise ValueError(f"the reference has no values for the latent sites {missing}")
    points = {}
    for name, truth in simulated.latents.items():
        value = reference[name].to(truth)
        if pair.latents[name].is_global:
            value = value.unsqueeze(0)
        elif simulated.row is not None:
            value = value[simulated.row : simulated.row + 1]
        if value.shape != truth.shape[1:]:
            came, expected = tuple(value.shape), tuple(truth.shape[1:])
            raise ValueError(f"the reference at site '{name}' has shape {came}, expected {expected}")
        points[name] = value.unsqueeze(0)
    return points


class _Pilot:
    """Simulations beside those that are ranked, from which references and scales come."""

    def __init__(self, pair: Prepared, simulations: int, rows: int) -> None:
        self.pair = pair
        self.sites = LatentVector(pair.latents, pair.nodes)
        latents, features, spread = [], [], []
        for count, simulated in enumerate(simulate(pair, simulations, rows)):
            latents.append(self.vectors(simulated.latents)[0])
            features.append(_features(simulated))
            if count == 0 or (pair.has_global and count < 32):
                spread.append(self._spread(simulated, rows))
        self.latents, seen = torch.cat(latents), torch.cat(features)
        self.centre, self.width = seen.mean(0), seen.std(0)
        self.features = self._standardised(seen)
        scale = torch.cat(spread).mean(0).clamp(min=0).sqrt()
        # A unit at which the guide has collapsed shall not outweigh all others.
        scale = torch.maximum(scale, 1e-3 * self.latents.std(0))
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.shift = SHIFT * (2 * torch.randint_like(self.scale, 2) - 1)

    def vectors(self, latents: Mapping[str, Tensor]) -> Tensor:
        """All sites ``(K, b, *unit)`` on unconstrained scales, ``(K, b, D)``."""
        vectors = self.sites.vectors(latents)
        if not torch.isfinite(vectors).all():
            raise ArithmeticError("a draw of the model or of the guide lies on the boundary of its site's support")
        return vectors

    def _spread(self, simulated: Simulated, rows: int) -> Tensor:
        """The variances of some of the guide's draws, ``(b, D)``."""
        few = 256 if simulated.row is None else len(simulated.batch[0])
        some = replace(
            simulated,
            batch=tuple(x[:few] for x in simulated.batch),
            latents={name: value[:, :few] for name, value in simulated.latents.items()},
        )
        truth = self.vectors(some.latents)[0]
        sums = torch.zeros(2, *truth.shape, dtype=torch.float64)  # of the draws' distances from a point, and squares
        for part, _, latents, _ in guide_draws(self.pair, some, _SPREAD_DRAWS, rows):
            away = (self.vectors(latents) - truth[part]).double().cpu()
            sums[:, part] += torch.stack([away.sum(0), away.square().sum(0)])
        mean, square = sums / _SPREAD_DRAWS
        return (square - mean.square()).to(truth)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.centre) / torch.where(self.width > 0, self.width, torch.ones_like(self.width))

    def near(self, simulated: Simulated) -> Tensor:
        """The reference points of simulations, ``(1, b, D)``."""
        away = torch.cdist(self._standardised(_features(simulated)), self.features)
        return (self.latents[away.argmin(1)] + self.shift * self.scale).unsqueeze(0)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        return ((first - second) / self.scale).square().sum(-1)


def _features(simulated: Simulated) -> Tensor:
    """Simulations as vectors, ``(b, F)``; of a data set its means and standard deviations, and the row."""
    like = next(iter(simulated.latents.values()))
    flat = torch.cat(
        [x.flatten(1) if x.dim() > 1 else x.unsqueeze(1) for x in (x.to(like) for x in simulated.batch)], 1
    )
    if simulated.row is None:
        return flat
    return torch.cat([flat.mean(0), flat.std(0, correction=0), flat[simulated.row]]).unsqueeze(0)

"""What a diagnosis rests on: figures of a run and of rows of its data, each measured when first asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrogen.distributions.decoding import SMALLEST_SCALE, LocationScale
from pyrogen.evaluation.aggregate import Aggregate, Values, aggregated
from pyrogen.evaluation.neighbours import PrecisionRecall, precision_recall
from pyrogen.evaluation.rates import rate_distortion
from pyrogen.evaluation.running import Prepared, pair_passes, prepared
from pyrogen.evaluation.samples import posterior_samples, prior_samples, sample
from pyrogen.evaluation.units import ActiveUnits, active_units
from pyrogen.inference.draws import by_value, is_masked
from pyrogen.inference.programs import observed_sites
from pyrogen.inference.run import Run
from pyrogen.inference.units import INACTIVE, by_row, means, names_of_units

__all__ = ["Likelihood", "Patient"]

PART = 0.025
"""The share of rows that a ball reaches to, and so the smallest part of the data, or of the prior, that can be missed.
Balls around five rows of 1000, as is usual for coverage, are left by blurred samples too."""
FEWEST = 50
"""From how many rows on figures of them say something of the whole."""
FAINT = 1e-4
"""The share of the prior's variance up to which q(z) counts as a point, however narrow the posterior is."""
VISIBLE, LATENT = 16, 8
"""In how many principal components data and latent values are compared. In 50 dimensions balls of a normal law hold
nothing of one that is a third wider, though neither has a hole."""
DRAWS = 32
"""Draws of the guide for each row, where the mean of its distribution isn't known."""
FLOOR = 1e-3
"""The share of the data's standard deviation up to which a learned scale counts as none."""


@dataclass(frozen=True)
class Likelihood:
    """How the observed distributions at z ~ q(z|x) fit the x that they are for.

    Attributes:
        dispersion: The squared distance of x to their means, over that of their own draws; 1 where calibrated.
        explained: The share of the variance of x that the means explain; 0 for the mean of all rows.
        at_floor: The share of values with a learned scale that is as small as it can get, of continuous ones.
    """

    dispersion: float
    explained: float
    at_floor: float


@dataclass(frozen=True, eq=False)
class Patient:
    """A run with rows of its data. What can't be measured raises a ``ValueError`` that says why.

    Attributes:
        run: The run.
        pair: Its programs with rows that it was trained on.
        held_out: Rows that it was not trained on, or None.
        seed: Of all draws.
        rows: How many rows, copies counted, go through a program at once.
    """

    run: Run
    pair: Prepared
    held_out: tuple[Tensor, ...] | None
    seed: int
    rows: int

    @property
    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed, "rows": self.rows}

    @property
    def is_guided(self) -> bool:
        """Whether there are per-observation latent sites and a guide for them."""
        return bool(self.pair.local) and self.run.guide is not None

    @cached_property
    def units(self) -> ActiveUnits:
        """The variances of the units' posterior means."""
        x = self.pair.batch
        _enough(len(x[0]))
        return active_units(self.pair.model, self.pair.guide, x, particles=DRAWS, **self._options)

    @cached_property
    def idle(self) -> dict[str, list[str]]:
        """By site, the units that say nothing."""
        return self._units_below(INACTIVE)

    def units_below(self, limit: float) -> list[str]:
        """The units whose posterior mean has at most this variance, or this share of the prior's or of q(z)'s where
        one of these is below 1."""
        return [name for names in self._units_below(limit).values() for name in names]

    def _units_below(self, limit: float) -> dict[str, list[str]]:
        found = {}
        for site, variance in self.units.variances.items():
            below = (variance <= limit * self._latent_variances[site].to(variance).clamp(max=1.0)).flatten().tolist()
            names = names_of_units(site, variance.shape)
            found[site] = [name for name, is_below in zip(names, below, strict=True) if is_below]
        return found

    @cached_property
    def _latent_variances(self) -> dict[str, Tensor]:
        """By site, of the prior or of q(z), the smaller one."""
        model, guide, x, options = self.pair.model, self.pair.guide, self.pair.batch, self._options
        p, q = prior_samples(model, x, 1, **options), posterior_samples(model, guide, x, 1, **options)
        variances = {site: (p[site][0].var(0), q[site][0].var(0)) for site in self.units.variances}
        return {site: torch.minimum(of_p, of_q.clamp(min=FAINT * of_p)) for site, (of_p, of_q) in variances.items()}

    @cached_property
    def rate(self) -> float:
        """KL(q(z|x) ‖ p(z)) in nats, a mean over rows; NaN where it is not known."""
        found = rate_distortion(self.pair.model, self.pair.guide, self.pair.batch, particles=1, **self._options)
        return float(found.rate.double().mean())

    @cached_property
    def prior_coverage(self) -> float:
        """The share of draws of the prior with draws of q(z) around them."""
        count = _enough(len(self.pair.batch[0]))
        with aggregated(self.pair.model, self.pair.guide, self.pair.batch, **self._options) as aggregate:
            aggregate.check_common_prior(torch.arange(count))
            q = _flat(aggregate, aggregate.posterior(torch.arange(count)))
            p = _flat(aggregate, aggregate.prior(count))
        scale = p.std(0).clamp(min=torch.finfo(p.dtype).tiny)
        q, p = q / scale, p / scale
        look = _principal(torch.cat([q, p]), LATENT)
        return precision_recall(q, p, look, density_neighbours=_balls(count), splits=None).coverage

    @cached_property
    def visible(self) -> PrecisionRecall:
        """Samples against data: draws, or the means of the likelihood where these cover more."""
        data = self._observed
        balls, look = _balls(_enough(len(data))), _principal(data, VISIBLE)
        has_mean = not self.pair.implicit_likelihood and means(self.pair.nodes[self.pair.observed[0]]) is not None
        drawn = (self._samples(mean) for mean in ((False, True) if has_mean else (False,)))
        found = (precision_recall(samples, data, look, density_neighbours=balls, splits=None) for samples in drawn)
        return max(found, key=lambda each: each.coverage)

    @property
    def _observed(self) -> Tensor:
        """The rows, flat, on the CPU."""
        names = self.pair.observed
        if len(names) != 1:
            raise ValueError(f"the model observes {len(names)} sites {names}, and samples are compared at one")
        if is_masked(self.pair.nodes[names[0]]):
            raise ValueError(f"the observed site '{names[0]}' is masked")
        x = self.pair.batch[0].cpu()
        return x.reshape(len(x), -1)

    def _samples(self, mean: bool) -> Tensor:
        x, *others = self.pair.batch
        drawn = sample(self.run, len(x), mean=mean, given=others, **self._options)
        assert isinstance(drawn, Tensor)  # one observed site
        if drawn.shape != x.shape:
            raise ValueError(f"samples have the shape {tuple(drawn.shape)}, and the data {tuple(x.shape)}")
        return drawn.cpu().to(x.dtype).reshape(len(x), -1)

    @cached_property
    def likelihood(self) -> Likelihood:
        """Of the rows that it was trained on."""
        return self._likelihood(self.pair.batch)

    @cached_property
    def held_out_likelihood(self) -> Likelihood:
        """Of the rows that it was not trained on; of the others where there are none."""
        return self.likelihood if self.held_out is None else self._likelihood(self.held_out)

    def _likelihood(self, batch: tuple[Tensor, ...]) -> Likelihood:
        if self.pair.implicit_likelihood:
            raise ValueError(f"the observed sites {[*self.pair.implicit_likelihood]} are implicit")
        _enough(len(batch[0]), "held-out rows" if batch is self.held_out else "rows")
        error = own = small = count = 0.0
        seen: dict[str, list[Tensor]] = {}
        with prepared(self.run.model, self.run.guide, batch, **self._options) as pair:
            least = self._least_scale()
            for _, _, terms in pair_passes(pair, 1, self.rows):
                for name, node in observed_sites(terms.model_trace).items():
                    mean, x = means(node), node["value"]
                    if mean is None or is_masked(node):
                        raise ValueError(f"the observed site '{name}' is masked, or its mean has no closed form")
                    error += _squares(x - mean)
                    own += _squares(node["fn"].sample() - mean)
                    count += x.numel()
                    small += _count_small(node, least)
                    seen.setdefault(name, []).append(by_row(node, x, 1)[0].cpu().double())
        total = sum(_squares(x - x.mean(0)) for x in map(torch.cat, seen.values()))
        return Likelihood(_ratio(error, own), 1 - _ratio(error, total), small / count)

    def _least_scale(self) -> float:
        """Up to which scale a learned one counts as at its floor; 0 where scales are given."""
        parts = [part for part in self.run.model.modules() if isinstance(part, LocationScale)]
        if parts and all(not isinstance(part.scale, str) for part in parts):
            return 0.0
        x = self.pair.batch[0].cpu().double()
        return max(1.1 * SMALLEST_SCALE if parts else 0.0, FLOOR * float((x - x.mean(0)).square().mean().sqrt()))


def _squares(values: Tensor) -> float:
    return float(values.cpu().double().square().sum())


def _count_small(node: dict[str, Any], least: float) -> float:
    """How many values have a scale of at most this."""
    scale = getattr(by_value(node["fn"]), "scale", None)
    if not isinstance(scale, Tensor) or node["fn"].support.is_discrete:
        return 0.0
    return float((scale <= least).expand_as(node["value"]).sum())


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("inf") if above > 0 else 1.0


def _enough(rows: int, what: str = "rows") -> int:
    if rows < FEWEST:
        raise ValueError(f"at least {FEWEST} {what} are needed to say something of the whole, got {rows}")
    return rows


def _balls(rows: int) -> int:
    """To which neighbour a ball reaches; Naeem's five where there are few rows."""
    return max(5, round(PART * rows))


def _flat(aggregate: Aggregate, values: Values) -> Tensor:
    """The unconstrained values of all sites, ``(M, n)``."""
    return aggregate.latents.vectors(values).cpu()


def _principal(points: Tensor, count: int) -> Callable[[Tensor], Tensor] | None:
    """What maps rows like these ``(N, D)`` to their first principal components; None where they have no more."""
    if points.shape[1] <= count:
        return None
    centre = points.mean(0)
    axes = torch.linalg.svd(points - centre, full_matrices=False)[2][:count].T
    return lambda x: (x - centre) @ axes

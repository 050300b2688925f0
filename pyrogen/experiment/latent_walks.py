"""Ways through the latents of a fit, decoded: from one observation to another, and along one unit at a time.

Programs may have several latent sites, nested in plates, on any support. Here all that belong to an observation are one
vector of D real numbers, the *units*: values on a constrained support are mapped to the whole space, as in the guide.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogen.evaluation import posterior_samples
from pyrogen.evaluation.aggregate import Aggregate, with_globals_held
from pyrogen.evaluation.running import ROWS, Prepared, by_row, means, prepared
from pyrogen.inference import Run
from pyrogen.inference.draws import draw_only, is_masked
from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.programs import is_real, observed_sites, trace_of

__all__ = ["Latents", "decode", "interpolation", "latents_of", "prior_density", "traversal"]

PRIOR_ROWS = 1000


@dataclass(frozen=True, eq=False)
class Latents:
    """Draws of all per-observation latents of a fit, as D real numbers each.

    Attributes:
        names: Of the units, such as ``z[3]``.
        posterior: Draws of q(z|x), ``(S, N, D)``; None for a fit without a guide.
        prior: Draws of p(z), ``(M, D)``.
    """

    names: tuple[str, ...]
    posterior: Tensor | None
    prior: Tensor

    @property
    def means(self) -> Tensor:
        """Posterior means ``(N, D)``; draws of the prior for a fit without a guide."""
        return self.prior if self.posterior is None else self.posterior.mean(0)

    @property
    def activity(self) -> Tensor:
        """The variance of the posterior mean over observations in units of the prior's variance, ``(D,)``.

        What is noise of the draws is taken off, as in :func:`pyrogen.evaluation.active_units`. NaN for one observation.
        """
        if len(self.means) < 2 or len(self.prior) < 2:
            return self.prior.new_full((len(self.names),), math.nan)
        variance = self.means.var(0)
        if self.posterior is not None and len(self.posterior) > 1:
            variance = variance - self.posterior.var(0).mean(0) / len(self.posterior)
        return variance / self.prior.var(0).clamp(min=1e-12)

    def most_active(self, count: int) -> list[int]:
        """So many units, the most active first."""
        return self.activity.nan_to_num(0.0).argsort(descending=True, stable=True)[:count].tolist()


def latents_of(run: Run, rows: tuple[Tensor, ...], *, draws: int, prior_draws: int, seed: int = 0) -> Latents:
    """Draw the latents of a fit given observations, and from its prior.

    Global sites, where the model has any, are drawn from the guide, anew for each draw given the observations, and for
    every 1000 of the prior.

    Args:
        run: A fit.
        rows: Observations, a tuple of tensors that the programs take.
        draws: How many of q(z|x) for each observation.
        prior_draws: How many of p(z). Where the model takes further tensors those of the observations take turns.
        seed: Of the draws.

    Raises:
        ValueError: If the model has no per-observation latent sites, or programs and observations do not fit.
    """
    with prepared(run.model, run.guide, rows, seed=seed, guided=False) as pair:
        if not pair.local:
            raise ValueError("the model has no latent site that belongs to an observation")
        units = _units(pair)
        order = torch.arange(prior_draws) % len(pair.batch[0])
        batches = (tuple(x[part.to(x.device)] for x in pair.batch) for part in order.split(PRIOR_ROWS))
        drawn = (draw_only(with_globals_held(pair, batch).model, pair.local, batch) for batch in batches)
        prior = torch.cat([_finite(units.vectors(units.drawn(nodes))) for nodes in drawn])
    posterior = None
    if run.guide is not None:
        posterior = _finite(units.vectors(posterior_samples(run.model, run.guide, rows, draws, seed=seed)))
    return Latents(tuple(units.names), posterior, prior)


def _units(pair: Prepared) -> LatentVector:
    return LatentVector({name: pair.latents[name] for name in pair.local}, pair.nodes)


def _finite(vectors: Tensor) -> Tensor:
    """Doubles on the CPU; values on the edge of their support are far out, not at infinity."""
    return vectors.detach().cpu().double().nan_to_num(posinf=1e3, neginf=-1e3)


def _values(pair: Prepared, z: Tensor) -> dict[str, Tensor]:
    """Vectors ``(R, D)`` as values of the sites, rows first."""
    return _units(pair).values(z.to(pair.nodes[pair.local[0]]["value"]))


def prior_density(run: Run, rows: tuple[Tensor, ...], points: Tensor) -> Tensor | None:
    """The density of p(z) at points ``(R, D)``, or None where it is not known or not the same for all observations.

    It is known where every per-observation site has an exact density on the whole space, and where nothing but z is
    behind it: no global sites, no masks, no further tensors that the model takes.
    """
    with prepared(run.model, run.guide, rows, seed=0, guided=False) as pair:
        real = all(is_real(pair.latents[name].support) for name in pair.local)
        masked = any(is_masked(pair.nodes[name]) for name in pair.local)
        if pair.has_global or len(pair.batch) > 1 or not real or masked:
            return None
        aggregate = Aggregate(pair, ROWS)
        if not aggregate.has_prior_density:
            return None
        return aggregate.prior_log_prob(_values(pair, points)).exp()


def interpolation(start: Tensor, end: Tensor, steps: int, *, spherical: bool = False) -> Tensor:
    r"""Points on the way from each of P vectors to another.

    Linear, or for draws of a prior about the origin along great circles, which pass no point that is unlikely for its
    length alone (White 2016, *Sampling generative networks*, 1609.04468):

    .. math:: z_t = (1 - t) a + t b, \quad z_t = \frac{\sin((1 - t) \omega) a + \sin(t \omega) b}{\sin \omega}, \quad
        \cos \omega = \frac{a \cdot b}{\|a\| \|b\|}

    Args:
        start, end: ``(P, D)``.
        steps: How many points, both ends counted.
        spherical: Whether along great circles.

    Returns:
        ``(P, steps, D)``.

    Example:
        >>> interpolation(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 3, spherical=True)[0, 1]
        tensor([1.4142, 1.4142])
    """
    t = torch.linspace(0, 1, steps, dtype=start.dtype)[:, None]
    a, b = start[:, None], end[:, None]
    if not spherical:
        return (1 - t) * a + t * b
    angle = torch.nn.functional.cosine_similarity(a, b, -1).clamp(-0.9999, 0.9999).arccos()[..., None]
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def traversal(start: Tensor, units: list[int], sizes: Tensor, steps: int, reach: float = 2.0) -> Tensor:
    """A point moved along one unit at a time, from −reach to +reach of its size.

    Args:
        start: ``(D,)``.
        units: Which of the D.
        sizes: Of a step of one along each unit, ``(D,)``.
        steps: How many points on the way, evenly.
        reach: How far.

    Returns:
        ``(units, steps, D)``.
    """
    moved = start.repeat(len(units), steps, 1)
    along = torch.linspace(-reach, reach, steps, dtype=start.dtype)
    for place, unit in enumerate(units):
        moved[place, :, unit] += along * sizes[unit]
    return moved


def decode(run: Run, z: Tensor, rows: tuple[Tensor, ...], *, start: Tensor | None = None, seed: int = 0) -> Tensor:
    r"""What a model makes of given latents: E[x | z], or a draw where the likelihood has no mean in closed form.

    With a ``start``, sites that the program draws later go along when one is moved: each keeps its distance from the
    mean that the program gives it,

    .. math:: z'_s = z_s + \operatorname{E}[s \mid z'_{<s}] - \operatorname{E}[s \mid z^0_{<s}]

    for otherwise a unit high up in a hierarchy, of which observations are independent given the units below, would seem
    to do nothing. Sites whose distribution has no mean in closed form, or that are constrained, stay.

    Args:
        run: A fit.
        z: Vectors ``(R, D)`` of unconstrained values, see :class:`Latents`.
        rows: R observations, of which the further tensors that a model takes are used.
        start: The vectors from which ``z`` was moved, ``(R, D)``.
        seed: Of draws.

    Returns:
        ``(R, *event_shape)``.

    Raises:
        ValueError: If several sites are observed.
    """
    with prepared(run.model, run.guide, rows, seed=seed, guided=False, values=False) as pair:
        if len(pair.observed) != 1:
            raise ValueError(f"the model observes the sites {pair.observed}; only one has a picture")
        program = with_globals_held(pair, pair.batch).model
        placed = _units(pair).placed
        held, base = placed(_values(pair, z)), dict[str, Tensor]()
        if start is not None:
            before = poutine.condition(program, data=placed(_values(pair, start)))
            nodes = draw_only(before, pair.local, pair.batch)
            known = {name: means(node) for name, node in nodes.items() if is_real(pair.latents[name].support)}
            base = {name: mean for name, mean in known.items() if mean is not None}
        with _Moved(held, base):
            trace = trace_of(poutine.uncondition(program), *pair.batch)
        node = observed_sites(trace)[pair.observed[0]]
        mean = means(node)
        return by_row(node, node["value"] if mean is None else mean, 1)[0].float().cpu()


class _Moved(Messenger):
    """Hold latent sites at values, each moved as far as its mean moves."""

    def __init__(self, values: dict[str, Tensor], base: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.base = base

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            value = self.values[name]
            if name in self.base:
                value = value + msg["fn"].mean.expand_as(value) - self.base[name]
            msg["value"], msg["is_observed"] = value, True

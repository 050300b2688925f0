"""The aggregate posterior: the mixture of a guide's posteriors, its draws and its densities in bounded memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogen.distributions.implicit import NoDensityError
from pyrogen.distributions.semi_implicit import has_stochastic_density
from pyrogen.evaluation.running import Prepared, parts, prepared
from pyrogen.evaluation.single_values import marginal_log_prob
from pyrogen.inference.draws import draw_only
from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.matching import check_unmasked
from pyrogen.inference.programs import Copies, data_frame, global_draws, repeat, row_axis, sample_sites, trace_of
from pyrogen.inference.turns import seeded

__all__ = ["Aggregate", "Values", "aggregated", "with_globals_held"]

Values = dict[str, Tensor]
"""Of per-observation latent sites, draws first: ``(M, *nested plates, *event)``."""

LOOK = 64
"""At how many rows it is looked whether one distribution depends on what another has drawn."""


class Aggregate:
    r"""The aggregate posterior of N observations, of all per-observation latent sites together.

    .. math:: q(z) = \frac{1}{N} \sum_{n=1}^{N} q(z \mid x_n)

    With global sites, one draw of these from the guide is held throughout, for guide and model. It stands inside
    :func:`~pyrogen.evaluation.running.prepared`.

    Args:
        pair: The programs and observations.
        rows: How many pairs of a draw and an observation are scored at once, and rows run at once.
    """

    def __init__(self, pair: Prepared, rows: int) -> None:
        if not pair.local:
            raise ValueError('the model has no latent site in the plate "data", so there is no aggregate posterior')
        for name in pair.local:
            check_unmasked(name, pair.nodes[name])
        self.pair = with_globals_held(pair)
        self.rows = rows

    @property
    def observations(self) -> int:
        """The number N."""
        return len(self.pair.batch[0])

    @cached_property
    def latents(self) -> LatentVector:
        """All per-observation latent sites as one vector."""
        return LatentVector({name: self.pair.latents[name] for name in self.pair.local}, self.pair.nodes)

    def choose(self, samples: int) -> Tensor:
        """So many observations at random, ``(M,)``, none of them again before all have been."""
        rounds = math.ceil(samples / self.observations)
        return torch.cat([torch.randperm(self.observations) for _ in range(rounds)])[:samples]

    def check_common_prior(self, chosen: Tensor) -> None:
        """Raise a ``ValueError`` where the prior is not the same for these observations."""
        # From the same random numbers equal distributions make equal draws, and so do those without a density.
        for few in chosen.split(max(2, self.rows)):
            here, other = (self._prior_nodes(self._batch(each), seed=0) for each in (few, few.roll(1, 0)))
            if not all(torch.allclose(here[name]["value"], other[name]["value"], 1e-4, 1e-5) for name in here):
                raise ValueError(
                    "the prior of the latent sites is not the same for all observations, so there is no marginal prior "
                    "for q(z) to match; held_out_rate_estimate and rate_distortion compare q(z|x) with each one's own"
                )

    def need_posterior_density(self, what: str, instead: str) -> None:
        """Raise a ``ValueError`` if the densities q(z|x) are not known."""
        if self.pair.implicit_guide:
            raise NoDensityError(
                f"{what} needs the posteriors' densities, and the sites {[*self.pair.implicit_guide]} are implicit; "
                f"{instead}"
            )
        self.refuse_point_masses()
        if helpers := [name for name in self.pair.order if name not in self.pair.latents]:
            raise ValueError(
                f"the guide's helper sites {helpers} make the density of its latent sites an integral that is not "
                f"known; {instead}"
            )
        for name in self.pair.local:
            if has_stochastic_density(self._guide_nodes[name]["fn"]):
                raise NoDensityError(
                    f"the guide's density at site '{name}' is an estimate (SemiImplicit), and so would be the "
                    f"mixture's; {instead}"
                )

    def refuse_point_masses(self) -> None:
        """Raise a ``ValueError`` if the guide is a point mass at a per-observation site."""
        if self.pair.local_point_masses:
            raise ValueError(
                f"the guide's distribution at the latent sites {self.pair.local_point_masses} is a point mass (Delta): "
                "q(z) has no density, and its divergence is infinite; use another family"
            )

    def need_prior_density(self, what: str, instead: str) -> None:
        """Raise a ``NoDensityError`` if the density p(z) is not known."""
        if not self.has_prior_density:
            unknown = [*self.pair.implicit_prior] or self.pair.local
            raise NoDensityError(
                f"{what} needs the prior's density, and that of the sites {unknown} is implicit or an estimate; "
                f"{instead}"
            )

    @property
    def has_posterior_density(self) -> bool:
        """Whether log q(z|x) is known."""
        helpers = any(name not in self.pair.latents for name in self.pair.order)
        unknown = self.pair.implicit_guide or self.pair.local_point_masses or helpers
        return not unknown and not any(has_stochastic_density(node["fn"]) for node in self._guide_nodes.values())

    @property
    def has_prior_density(self) -> bool:
        """Whether log p(z) is known."""
        nodes = self.pair.nodes
        return not self.pair.implicit_prior and not any(
            has_stochastic_density(nodes[name]["fn"]) for name in self.pair.local
        )

    def posterior(self, chosen: Tensor) -> Values:
        """A draw of q(z|x) for each of M observations, ``(M,)``."""
        return self._collected(chosen, lambda batch: self._sites(trace_of(self.pair.guide, *batch)))

    def prior(self, samples: int) -> Values:
        """So many draws of p(z)."""
        return self._collected(torch.arange(samples) % self.observations, self._prior_nodes)

    def own_log_prob(self, values: Values, chosen: Tensor) -> Tensor:
        """log q(z|x) of each draw for its own observation, ``(M,)``."""
        found = []
        for part in parts(len(chosen), 1, self.rows):
            nodes = self._guide_at({name: value[part] for name, value in values.items()}, self._batch(chosen[part]))
            found.append(self._log_prob(nodes))
        return torch.cat(found)

    def log_prob(self, values: Values, among: Tensor | None = None) -> Tensor:
        """log q(z) at M draws, ``(M,)``, with the mixture over all observations or over some, ``(n,)``."""
        among = torch.arange(self.observations) if among is None else among
        samples = len(next(iter(values.values())))
        total = torch.full((samples,), -math.inf, dtype=torch.float64)
        for part, log_q in (self._spread if self.separate else self._copied)(values, among):
            total[part] = torch.logaddexp(total[part], log_q.double().logsumexp(1).cpu())
        return total - math.log(len(among))

    def marginal_log_prob(self, name: str, values: Tensor) -> Tensor | None:
        """log q(z_j) of each value of a site on its own, ``(M, n)``; None where it has no closed form given x."""
        first = next(other for other in self.pair.order if other in self.pair.local)
        if not self.has_marginals(name) or not (name == first or self.separate):
            return None
        of_rows = (
            (few, self._sites(trace_of(self.pair.guide, *self._batch(few)))[name])
            for few in torch.arange(self.observations).split(self.rows)
        )
        return self._mixed(values, of_rows)

    def has_marginals(self, name: str) -> bool:
        """Whether the guide's distribution of a site has single values in closed form, given what it depends on."""
        if name in self.pair.implicit_guide or any(other not in self.pair.latents for other in self.pair.order):
            return False
        node = self._guide_nodes[name]
        known = not has_stochastic_density(node["fn"])
        return known and marginal_log_prob(node["fn"], node["value"]) is not None

    def prior_log_prob(self, values: Values) -> Tensor:
        """log p(z) at M draws, ``(M,)``."""
        return torch.cat([self._log_prob(nodes) for nodes in self._priors_at(values)])

    def prior_marginal_log_prob(self, name: str, values: Values) -> Tensor | None:
        """log p(z_j) of each value of a site on its own, ``(M, n)``; None where it has no closed form."""
        if name not in self.separate_priors or not self.has_prior_marginals(name):
            return None
        found = []
        for nodes in self._priors_at(values):
            log_p = marginal_log_prob(nodes[name]["fn"], nodes[name]["value"])
            assert log_p is not None
            first = log_p.movedim(row_axis(nodes[name]), 0)
            found.append(first.reshape(len(first), -1))
        return torch.cat(found).double().cpu()

    def prior_marginal_log_prob_by_draws(self, name: str, values: Tensor, draws: int) -> Tensor | None:
        """The same for a site that depends on others, as the mixture over so many draws of these; None where it has
        no closed form given them either."""
        if not self.has_prior_density or not self.has_prior_marginals(name):
            return None
        of_rows = (
            (few, self._prior_nodes(self._batch(few % self.observations))[name])
            for few in torch.arange(draws).split(self.rows)
        )
        return self._mixed(values, of_rows)

    def has_prior_marginals(self, name: str) -> bool:
        """Whether the model's distribution of a site has single values in closed form, given what it depends on."""
        if name in self.pair.implicit_prior:
            return False
        node = self.pair.nodes[name]
        return marginal_log_prob(node["fn"], node["value"]) is not None

    def _mixed(self, values: Tensor, of_rows: Iterator[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        """Marginal densities of M draws under the equal mixture of a site's rows, ``(M, n)``."""
        total: Tensor | None = None
        count = 0
        for few, node in of_rows:
            count += len(few)
            for part in parts(len(values), len(few), self.rows):
                log_q = marginal_log_prob(node["fn"], _beside(node, values[part]))
                assert log_q is not None
                found = log_q.movedim(row_axis(node), 1).reshape(*log_q.shape[:1], len(few), -1)
                found = found.logsumexp(1).double().cpu()
                total = found.new_full((len(values), found.shape[1]), -math.inf) if total is None else total
                total[part] = torch.logaddexp(total[part], found)
        assert total is not None
        return total - math.log(count)

    @cached_property
    def separate(self) -> bool:
        """Whether, given x, none of the guide's sites depends on what another has drawn."""
        if len(self.pair.local) == 1 or self.pair.implicit_guide:
            return len(self.pair.local) == 1
        batch = self._looked_at
        with seeded(1, batch[0].device):
            nodes = self._sites(trace_of(self.pair.guide, *batch))
            values = {name: node["value"].movedim(row_axis(node), 0) for name, node in nodes.items()}
            others = self._guide_at({name: value.roll(1, 0) for name, value in values.items()}, batch)
        return all(
            torch.allclose(others[name]["fn"].log_prob(node["value"]), node["fn"].log_prob(node["value"]), 1e-5, 1e-6)
            for name, node in nodes.items()
        )

    @cached_property
    def separate_priors(self) -> list[str]:
        """The sites whose prior has a density that does not depend on what others have drawn."""
        if not self.has_prior_density:
            return []
        found = []
        for name, node in self._prior_nodes(self._looked_at, seed=1).items():
            dim = row_axis(node) + node["fn"].event_dim
            here, other = (node["fn"].log_prob(node["value"].roll(shift, row_axis(node))) for shift in (0, 1))
            if name == self.pair.local[0] or torch.allclose(here.roll(1, dim), other, 1e-5, 1e-6):
                found.append(name)
        return found

    @cached_property
    def _guide_nodes(self) -> dict[str, dict[str, Any]]:
        batch = tuple(x[:2] for x in self.pair.batch)
        with seeded(0, batch[0].device):
            return self._sites(trace_of(self.pair.guide, *batch))

    @property
    def _looked_at(self) -> tuple[Tensor, ...]:
        return self._batch(torch.arange(LOOK) % self.observations)

    def _batch(self, chosen: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[chosen.to(x.device)] for x in self.pair.batch)

    def _sites(self, trace: poutine.Trace) -> dict[str, dict[str, Any]]:
        nodes = sample_sites(trace)
        for name in self.pair.local:
            check_unmasked(name, nodes[name])
        return {name: nodes[name] for name in self.pair.local}

    def _collected(self, chosen: Tensor, draw: Callable[[tuple[Tensor, ...]], dict[str, dict[str, Any]]]) -> Values:
        found: dict[str, list[Tensor]] = {name: [] for name in self.pair.local}
        for part in chosen.split(self.rows):
            for name, node in draw(self._batch(part)).items():
                found[name].append(node["value"].movedim(row_axis(node), 0))
        return {name: torch.cat(values) for name, values in found.items()}

    def _prior_nodes(self, batch: tuple[Tensor, ...], seed: int | None = None) -> dict[str, dict[str, Any]]:
        program = poutine.uncondition(self.pair.model)
        if seed is None:
            return draw_only(program, self.pair.local, batch)
        with seeded(seed, batch[0].device):
            return draw_only(program, self.pair.local, batch)

    def _priors_at(self, values: Values) -> Iterator[dict[str, dict[str, Any]]]:
        samples = len(next(iter(values.values())))
        for part in parts(samples, 1, self.rows):
            batch = self._batch(torch.arange(part.start, part.stop) % self.observations)
            held = self._placed({name: value[part] for name, value in values.items()})
            yield draw_only(poutine.condition(self.pair.model, data=held), self.pair.local, batch)

    def _guide_at(self, values: Values, batch: tuple[Tensor, ...]) -> dict[str, dict[str, Any]]:
        held = poutine.condition(self.pair.guide, data=self._placed(values))
        return self._sites(trace_of(held, *batch))

    def _placed(self, values: Values) -> Values:
        """Values with their rows where the programs have them."""
        return {name: value.movedim(0, row_axis(self.pair.nodes[name])) for name, value in values.items()}

    def _log_prob(self, nodes: dict[str, dict[str, Any]]) -> Tensor:
        """Of all sites together, for each row."""
        of_sites = [_row_sums(node, node["fn"].log_prob(node["value"]), 0) for node in nodes.values()]
        return torch.stack(of_sites).sum(0).double().cpu()

    def _spread(self, values: Values, among: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """log q(z_s|x_n) by parts of the draws and of the observations, ``(S, R)``; the guide sees a row once."""
        samples = len(next(iter(values.values())))
        for few in among.split(self.rows):
            nodes = self._sites(trace_of(self.pair.guide, *self._batch(few)))
            for part in parts(samples, len(few), self.rows):
                of_sites = [
                    _row_sums(node, node["fn"].log_prob(_beside(node, values[name][part])), 1)
                    for name, node in nodes.items()
                ]
                yield part, torch.stack(of_sites).sum(0)

    def _copied(self, values: Values, among: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same where sites depend on each other: draws are copies of the rows, and an encoder sees a row once for
        all of them."""
        for part in parts(len(next(iter(values.values()))), 1, self.rows):
            size = part.stop - part.start
            for few in among.split(max(1, self.rows // size)):
                held = {name: value[part].repeat_interleave(len(few), 0) for name, value in values.items()}
                with Copies(size):
                    nodes = self._guide_at(held, repeat(self._batch(few), size))
                yield part, self._log_prob(nodes).view(size, -1)


def _beside(node: dict[str, Any], values: Tensor) -> Tensor:
    """Draws ``(S, *nested plates, *event)`` to be scored by each row of a site: ``(S, *batch, *event)``."""
    fn = node["fn"]
    return values.unsqueeze(row_axis(node)).expand(len(values), *fn.batch_shape, *fn.event_shape)


def _row_sums(node: dict[str, Any], log_prob: Tensor, lead: int) -> Tensor:
    """Log-densities ``(*lead, *batch)`` summed over nested plates, ``(*lead, rows)``."""
    frame = data_frame(node)
    assert frame is not None and frame.dim is not None
    first = log_prob.movedim(frame.dim, lead)
    return first.reshape(*first.shape[: lead + 1], -1).sum(-1)


def with_globals_held(pair: Prepared, batch: tuple[Tensor, ...] | None = None) -> Prepared:
    """The same programs at one draw of the global sites from the guide, given some rows or else the first."""
    if not pair.has_global:
        return pair
    batch = tuple(x[:1] for x in pair.batch) if batch is None else batch
    held = global_draws(trace_of(pair.guide, *batch))
    return dataclasses.replace(
        pair, guide=poutine.replay(pair.guide, trace=held), model=poutine.replay(pair.model, trace=held)
    )


@contextmanager
def aggregated(
    model: Callable, guide: Callable | None, x: Tensor | Sequence[Tensor], *, seed: int, rows: int
) -> Iterator[Aggregate]:
    """The aggregate posterior of checked programs and observations, as in :func:`prepared`."""
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        yield Aggregate(pair, rows)

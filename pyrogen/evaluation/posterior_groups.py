"""What is drawn from a guide, and what densities say of it, collected pass by pass for ArviZ."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrogen.distributions.implicit import is_implicit
from pyrogen.evaluation.frames import Frame, Store, Variables, arviz_major
from pyrogen.evaluation.likelihood import checked_weights
from pyrogen.evaluation.pareto import FEWEST_DRAWS, tail_shapes
from pyrogen.evaluation.running import by_row, pair_passes
from pyrogen.inference.programs import data_frame, per_row, sample_sites
from pyrogen.inference.terms import Terms, unmasked

__all__ = ["BY_ROW", "Posterior", "stores"]

BY_ROW: tuple[str, ...] = ("chain", "draw", "observation")
"""The dimensions of what is known of each draw and observation."""

_TIES = 1e-9
"""Noise, in nats, by which equal values differ: ArviZ fits no tail to ties."""


class Posterior:
    """All that rests on draws from the guide, collected pass by pass.

    Args:
        frame: The dimensions.
        predictive: Predictive draws of each chain.
        particles: Draws of an observation's own latents for each draw of global sites.
    """

    def __init__(self, frame: Frame, predictive: int, particles: int) -> None:
        pair, draws = frame.pair, frame.chains * frame.draws
        self.frame, self.count = frame, len(pair.batch[0])
        self.kept = np.arange(predictive) * (frame.draws // max(predictive, 1))
        self.numbers = (np.arange(frame.chains)[:, None] * frame.draws + self.kept).ravel()
        self.posterior = stores(frame, frame.of_posterior, draws)
        self.densities = stores(frame, [n for n in frame.observed if n not in pair.implicit_likelihood], draws)
        self.predicted = stores(frame, frame.observed, len(self.numbers))
        self.observed = stores(frame, frame.observed, 1)
        self.site_densities: dict[str, Store] = {}
        self.weighted = pair.has_rate and not pair.implicit_likelihood
        self.weights, self.global_weights = Store(draws, self.count), Store(draws, None)
        self.integrated = Store(draws, self.count)
        self.nested = self.weighted and pair.has_global and bool(pair.local)
        self.particles = particles if self.nested else 1

    def collect(self, rows: int) -> None:
        """Run the programs."""
        pair, draws = self.frame.pair, self.frame.chains * self.frame.draws
        shared = self.particles if pair.has_global else None
        start = 0
        for part, copies, terms in pair_passes(pair, draws * self.particles, rows, copies=shared):
            # Of the copies that share global draws, the first is the posterior's.
            count = 1 if shared else copies
            self._put(terms, copies, count, start, part)
            start += count if part.stop == self.count else 0

    def _put(self, terms: Terms, copies: int, count: int, start: int, part: slice) -> None:
        nodes = sample_sites(terms.model_trace)
        for name, into in self.posterior.items():
            into.put(_first(nodes[name], nodes[name]["value"], copies, count), start, part)
        for name, into in self.densities.items():
            into.put(terms.log_likelihoods[name][:count], start, part)
        if start == 0:
            for name, into in self.observed.items():
                into.put(_first(nodes[name], nodes[name]["value"], copies, 1), 0, part)
        for name, value in _site_densities(terms, self.frame, copies, count).items():
            local = value.dim() == 2
            into = self.site_densities.setdefault(name, Store(self.weights.leading[0], self.count if local else None))
            into.put(value, start, part)
        if self.weighted:
            log_w = checked_weights(terms)
            self.weights.put(log_w[:count], start, part)
            if self.nested:
                self.integrated.put(torch.logsumexp(log_w.double(), 0, keepdim=True) - math.log(copies), start, part)
        if terms.global_ratios:
            self.global_weights.put(-sum(terms.global_ratios.values(), start=torch.zeros(())), start, part)
        first, last = np.searchsorted(self.numbers, [start, start + count])
        if first < last:
            wanted = torch.as_tensor(self.numbers[first:last] - start)
            for name, into in self.predicted.items():
                value = _first(nodes[name], nodes[name]["fn"].sample(), copies, count)
                into.put(value[wanted.to(value.device)], int(first), part)

    def groups(self) -> dict[str, xarray.Dataset]:
        """What has been collected, by the names of ArviZ's groups; some may be empty."""
        frame = self.frame
        datasets = {
            "posterior": frame.dataset(_of_draws(frame, self.posterior)),
            "log_likelihood": self._log_likelihoods(),
            "sample_stats": frame.dataset(self._statistics()),
            "observed_data": frame.dataset({n: (frame.of_site(n), v.all[0]) for n, v in self.observed.items()}),
        }
        if len(self.kept):
            datasets["posterior_predictive"] = frame.dataset(_of_draws(frame, self.predicted), draw=self.kept)
        return datasets

    def _log_likelihoods(self) -> xarray.Dataset:
        frame, pair = self.frame, self.frame.pair
        found = {name: v.all for name, v in self.densities.items()}
        if found and (pair.local or len(frame.observed) > 1):
            if "marginal" in found:
                raise ValueError(
                    "an observed site is called 'marginal', as log p(x) with the latents integrated out is; give the "
                    "site another name"
                )
            found["marginal"] = self._marginal()
        variables = {name: (BY_ROW, frame.by_chain(value)) for name, value in found.items()}
        return frame.dataset(variables).assign_attrs(leave_one_out=self._left_out())

    def _left_out(self) -> str:
        """What ``arviz.loo`` would leave out."""
        pair = self.frame.pair
        if pair.local and not self.weighted:
            return "not known: the weights that integrate the observations' own latents out are not"
        if not pair.has_global:
            said = "nothing: log p(x) at the parameters as they were fitted"
        else:
            said = "observations from the global sites, if x is all that these were fitted to"
        if pair.local:
            said += '; take var_name="marginal", for the others are given latents that know the observation'
        elif len(self.frame.observed) > 1:
            said += '; take var_name="marginal", the sum of the others'
        return said

    def _marginal(self) -> Tensor:
        """log p(x | θ) of all observed sites together, without the latents of the observations, ``(S, B)``."""
        pair = self.frame.pair
        if not pair.local and not pair.implicit_likelihood:
            return sum(v.all.double() for v in self.densities.values())  # type: ignore[return-value]
        if not self.weighted:
            return torch.full(self.weights.leading, math.nan, dtype=torch.float64)
        return self.integrated.all if self.nested else _means_of_halves(self.weights.all.double())

    def _statistics(self) -> Variables:
        """Densities at the sites, importance weights and the shape of their tails."""
        pair, by_chain = self.frame.pair, self.frame.by_chain
        found: Variables = {}
        for name, store in self.site_densities.items():
            found[name] = (BY_ROW[: store.all.dim() + 1], by_chain(store.all))
        if (joint := self._joint()) is not None:
            found["lp"] = (BY_ROW[: joint.dim() + 1], by_chain(joint))
        if not self.weighted:
            return found
        log_w = self.weights.all
        if pair.local:
            found["log_weight"] = (BY_ROW, by_chain(log_w))
            if len(log_w) >= FEWEST_DRAWS:
                try:
                    shapes = tail_shapes(log_w.T.double().numpy(), major=arviz_major())
                except ModuleNotFoundError:
                    pass
                else:
                    found["pareto_k"] = (("observation",), torch.as_tensor(shapes))
        if pair.has_global and pair.has_global_rate:
            found["log_weight_global"] = (("chain", "draw"), by_chain(self.global_weights.all))
        return found

    def _joint(self) -> Tensor | None:
        """log p(x, z), ``(S, B)``; with global sites log p(x, z, θ), ``(S,)``; None where a density is not known."""
        pair = self.frame.pair
        priors = [self.site_densities.get(f"log_prior_{name}") for name in pair.latents]
        if not priors or pair.implicit_likelihood or any(prior is None for prior in priors):
            return None
        parts = [store.all for store in (*self.densities.values(), *priors) if store is not None]
        if not pair.has_global:
            return sum(parts)  # type: ignore[return-value]
        return sum(part.sum(1) if part.dim() == 2 else part for part in parts)  # type: ignore[return-value]


def stores(frame: Frame, names: Sequence[str], draws: int) -> dict[str, Store]:
    """Room for so many draws of each of some sites."""
    count = len(frame.pair.batch[0])
    return {name: Store(draws, None if frame.is_global(name) else count) for name in names}


def _of_draws(frame: Frame, stores: Mapping[str, Store]) -> Variables:
    return {name: (frame.of_draws(name), frame.by_chain(store.all)) for name, store in stores.items()}


def _first(node: dict[str, Any], value: Tensor, copies: int, count: int) -> Tensor:
    """The first few copies of a site's value by copy and row, or all of a global one."""
    value = by_row(node, value, copies)
    return value if data_frame(node) is None else value[:count]


def _site_densities(terms: Terms, frame: Frame, copies: int, count: int) -> dict[str, Tensor]:
    """log p and log q at each latent site where they are known, and log q at the guide's helper sites."""
    modelled, found = sample_sites(terms.model_trace), dict[str, Tensor]()
    ratios = terms.ratios | terms.global_ratios
    for name, q in sample_sites(terms.guide_trace).items():
        if q["is_observed"]:
            continue
        p = modelled.get(name, q)
        site, mask = unmasked(p["fn"])

        def total(log_prob: Tensor, p: Any = p, mask: Any = mask) -> Tensor:
            log_prob = per_row(p, log_prob if mask is None else scale_and_mask(log_prob, mask=mask))
            return log_prob if data_frame(p) is None else log_prob.view(copies, -1)[:count]

        known = {"prior": name in modelled and not is_implicit(site)}
        known["guide"] = not is_implicit(q["fn"]) and name not in frame.pair.point_masses
        if known["prior"]:
            found[f"log_prior_{name}"] = total(site.log_prob(p["value"]))
        if known["guide"]:
            log_q = None
            if name in ratios and (known["prior"] or name not in modelled):
                # Not asked for again: where it is an estimate, this is the one that the weight is made of.
                ratio = ratios[name] if data_frame(p) is None else ratios[name][:count]
                log_q = ratio + found.get(f"log_prior_{name}", 0.0)
            if log_q is None or not log_q.isfinite().all():
                log_q = total(q["fn"].log_prob(q["value"]))
            found[f"log_guide_{name}"] = log_q
    return found


def _means_of_halves(log_w: Tensor) -> Tensor:
    """For each of S draws the logarithm of the mean of half of the weights, ``(S, B)``: those from it on, in a circle.

    All are estimates of the same number. The small noise keeps them apart where the weights are equal.
    """

    def from_each_on(half: Tensor, other: Tensor) -> Tensor:
        rest = half.flip(0).logcumsumexp(0).flip(0)
        before = torch.cat([half.new_full((1, half.shape[1]), -math.inf), other.logcumsumexp(0)])[: len(half)]
        return torch.logaddexp(rest, before) - math.log(max(len(half), 1))

    first, second = log_w.tensor_split(2)
    means = torch.cat([from_each_on(first, second), from_each_on(second, first)])
    return means + _TIES * torch.randn(len(means), 1, dtype=means.dtype)

"""The aggregate posterior: how far it is from the prior, and how much a latent says of its observation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogen.distributions.implicit import NoDensityError
from pyrogen.distributions.semi_implicit import has_stochastic_density
from pyrogen.evaluation.running import ROWS, Prepared, check_counts, parts, prepared
from pyrogen.inference.draws import draw_only
from pyrogen.inference.matching import check_unmasked
from pyrogen.inference.programs import Copies, global_draws, per_row, repeat, row_axis, sample_sites

__all__ = ["MarginalKL", "marginal_kl", "mutual_information"]


@dataclass(frozen=True)
class MarginalKL:
    """The rate of a guide in two parts, in nats: rate = mutual_information + marginal_kl.

    Attributes:
        rate: E KL(q(z|x) ‖ p(z)).
        mutual_information: Of observation and latents, E KL(q(z|x) ‖ q(z)); between 0 and log N.
        marginal_kl: KL(q(z) ‖ p(z)).
        mutual_information_error, marginal_kl_error: Standard errors over the samples; NaN for one.
        observations: Number N of the observations that q(z) is the aggregate of.
        samples: Over how many draws of z the three are averaged.
    """

    rate: float
    mutual_information: float
    marginal_kl: float
    mutual_information_error: float
    marginal_kl_error: float
    observations: int
    samples: int

    def __str__(self) -> str:
        return (
            f"rate {self.rate:.3f} nats: mutual information {self.mutual_information:.3f} ± "
            f"{self.mutual_information_error:.3f} (at most log N = {math.log(self.observations):.3f}) and marginal KL "
            f"{self.marginal_kl:.3f} ± {self.marginal_kl_error:.3f}; {self.observations} observations, {self.samples} "
            "samples"
        )


def marginal_kl(
    model: Callable,
    guide: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> MarginalKL:
    r"""Part the rate into mutual information and marginal divergence, by the mixture of all N posteriors.

    .. math:: \underbrace{\operatorname{E} \log \frac{q(z \mid x)}{p(z)}}_{\text{rate}}
        = \underbrace{\operatorname{E} \log \frac{q(z \mid x)}{q(z)}}_{\text{mutual information}}
        + \underbrace{\operatorname{E} \log \frac{q(z)}{p(z)}}_{\operatorname{KL}(q(z) \| p(z))}, \quad
        q(z) = \frac{1}{N} \sum_{n=1}^{N} q(z \mid x_n)

    of all per-observation latent sites together. Each sample is a draw of q(z|x) for an observation chosen at random,
    and q(z) at it is the exact sum over all N. It is the aggregate of *these* observations: with few of them in many
    dimensions each draw is known by its own posterior, the mutual information is close to its largest value log N, and
    the divergence too large. Hoffman & Johnson 2016, *ELBO surgery*.

    With global sites, one draw of these from the guide is held throughout.

    Args:
        model, guide: Programs.
        x: Observations ``(N, *event_shape)``, or a tuple of tensors that the programs take.
        samples: Number M of draws of z. The densities of all are taken under all N posteriors.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many pairs of a draw and an observation go through the guide at once; memory is bounded by it.

    Raises:
        NoDensityError: A ``ValueError``: if a per-observation site of guide or model is implicit, or has a density that
            is an estimate.
        ValueError: If the guide has a point mass or a helper site, a site is masked, the prior is not the same for all
            observations, or programs and observations do not fit.
        ArithmeticError: If one of both is below 0 by more than five standard errors: then densities are not those of
            the draws.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> found = marginal_kl(toy.model, guide, toy.x[:100], samples=50)
        >>> abs(found.rate - found.mutual_information - found.marginal_kl) < 1e-4
        True
    """
    check_counts(samples=samples)
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        _check(pair)
        count = len(pair.batch[0])
        chosen = torch.cat([torch.randperm(count) for _ in range(math.ceil(samples / count))])[:samples]
        guide = pair.guide
        if pair.has_global:
            first = poutine.trace(guide).get_trace(*(x[:1] for x in pair.batch))
            guide = poutine.replay(guide, trace=global_draws(first))
        draws = _drawn(pair, guide, chosen, rows)
        aggregate = _aggregate(pair, guide, draws, rows)
        information, divergence = draws.own - aggregate, aggregate - draws.prior
        found = MarginalKL(
            float((draws.own - draws.prior).mean()),
            float(information.mean()),
            float(divergence.mean()),
            _error(information),
            _error(divergence),
            count,
            samples,
        )
    for name in ("mutual_information", "marginal_kl"):
        value, error = getattr(found, name), getattr(found, f"{name}_error")
        if value < -1e-3 - 5 * error:  # never, of one sample
            raise ArithmeticError(
                f"the {name} came out as {value:.3f} nats, and no divergence is negative: the densities of the guide "
                "or of the prior are not those of their draws"
            )
    return found


def mutual_information(
    model: Callable,
    guide: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    samples: int = 1000,
    seed: int = 0,
    rows: int = ROWS,
) -> float:
    """How many nats a latent says of its observation, among these; :func:`marginal_kl` has the details.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> 0 < mutual_information(toy.model, guide, toy.x[:100], samples=50) < math.log(100)
        True
    """
    return marginal_kl(model, guide, x, samples=samples, seed=seed, rows=rows).mutual_information


def _check(pair: Prepared) -> None:
    if not pair.local:
        raise ValueError('the model has no latent site in the plate "data", so there is no aggregate posterior')
    if implicit := [*dict.fromkeys([*pair.implicit_guide, *pair.implicit_prior])]:
        raise NoDensityError(
            f"a mixture of posteriors needs their densities and the prior's, and the sites {implicit} are implicit; "
            "held_out_marginal_kl_estimate estimates the divergence by a critic"
        )
    if pair.local_point_masses:
        raise ValueError(
            f"the guide's distribution at the latent sites {pair.local_point_masses} is a point mass (Delta): q(z) has "
            "no density, and its divergence is infinite; use another family"
        )
    if helpers := [name for name in pair.order if name not in pair.latents]:
        raise ValueError(
            f"the guide's helper sites {helpers} make the density of its latent sites an integral that is not known; "
            "held_out_marginal_kl_estimate estimates the divergence by a critic"
        )
    for name in pair.local:
        check_unmasked(name, pair.nodes[name])


@dataclass(frozen=True)
class _Draws:
    """Draws of q(z|x), one for each of M rows: log q(z|x), log p(z), ``(M,)``, and each site's values, rows first."""

    own: Tensor
    prior: Tensor
    values: dict[str, Tensor]


def _drawn(pair: Prepared, guide: Callable, chosen: Tensor, rows: int) -> _Draws:
    local = pair.local
    own, prior, values = [], [], dict[str, list[Tensor]]({name: [] for name in local})
    for part in chosen.split(rows):
        batch = tuple(x[part.to(x.device)] for x in pair.batch)
        trace = poutine.trace(guide).get_trace(*batch)
        drawn = sample_sites(trace)
        modelled = draw_only(poutine.replay(pair.model, trace=trace), local, batch)
        for name in local:
            if has_stochastic_density(drawn[name]["fn"]):
                raise NoDensityError(
                    f"the guide's density at site '{name}' is an estimate (SemiImplicit), and so would be the "
                    "mixture's; held_out_marginal_kl_estimate estimates the divergence by a critic"
                )
            values[name].append(drawn[name]["value"].movedim(row_axis(drawn[name]), 0))
        here = {name: drawn[name]["value"] for name in local}
        own.append(_log_density(drawn, here))
        prior.append(_log_density(modelled, here))
        rolled = draw_only(poutine.replay(pair.model, trace=trace), local, tuple(x.roll(1, 0) for x in batch))
        if not torch.allclose(_log_density(rolled, here), prior[-1], 1e-3, 1e-3):
            raise ValueError(
                "the prior of the latent sites is not the same for all observations, so there is no marginal prior for "
                "q(z) to match; held_out_rate_estimate and rate_distortion compare q(z|x) with each one's own"
            )
    return _Draws(torch.cat(own), torch.cat(prior), {name: torch.cat(parts) for name, parts in values.items()})


def _aggregate(pair: Prepared, guide: Callable, draws: _Draws, rows: int) -> Tensor:
    """log q(z) at each draw, ``(M,)``. Draws are copies of the rows, so that an encoder sees a row once for all."""
    samples, count = len(draws.own), len(pair.batch[0])
    total = torch.full((samples,), -math.inf, dtype=torch.float64)
    for part in parts(samples, 1, rows):
        size = part.stop - part.start
        for few in parts(count, size, rows):
            batch = tuple(x[few] for x in pair.batch)
            held = {
                name: value[part].repeat_interleave(len(batch[0]), 0).movedim(0, row_axis(pair.nodes[name]))
                for name, value in draws.values.items()
            }
            with Copies(size):
                trace = poutine.trace(poutine.condition(guide, data=held)).get_trace(*repeat(batch, size))
            log_q = _log_density(sample_sites(trace), held).view(size, -1)
            total[part] = torch.logaddexp(total[part], log_q.logsumexp(1))
    return total - math.log(count)


def _log_density(nodes: dict[str, dict[str, Any]], values: dict[str, Tensor]) -> Tensor:
    """Of all sites together at these values, for each row, on the CPU."""
    of_sites = [per_row(nodes[name], nodes[name]["fn"].log_prob(value)) for name, value in values.items()]
    return torch.stack(of_sites).sum(0).double().cpu()


def _error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

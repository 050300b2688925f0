"""The log-likelihood of observations without a guide: annealed importance sampling, and how far off it is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.likelihood import error_and_size
from pyrogen.evaluation.running import ROWS, Prepared, groups, parts, prepared
from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.programs import per_row, repeat, row_axis, sample_sites, trace_of
from pyrogen.inference.terms import frozen, parameters_of, without_mask
from pyrogen.inference.tracing import Traced

__all__ = [
    "AnnealedImportanceSampling",
    "BidirectionalMonteCarlo",
    "annealed_importance_sampling",
    "annealing",
    "bidirectional_monte_carlo",
]

STEEPNESS = 4.0
"""δ of the inverse temperatures: they rise slowly at both ends, where the distributions change fastest."""

ACCEPTANCE = 0.75
"""What the pilot chains tune the acceptance rate of their moves to."""

WARM_UP = 30
"""Moves of the pilot chains before the first temperature, by which the step size finds its order of magnitude."""

JITTER = 0.2
"""Step sizes are spread by so much either way, lest trajectories come back to where they began."""


@dataclass(frozen=True, eq=False)
class AnnealedImportanceSampling:
    """Estimated log-likelihoods of B observations, and how far they can be trusted.

    Attributes:
        log_likelihood: In nats, ``(B,)``.
        standard_error: Of each of these, in nats, ``(B,)``; NaN for one chain, or where all found a likelihood of 0.
        effective_sample_size: How many equally weighted draws the chains are worth, ``(B,)``, between 1 and K, or NaN.
        acceptance: The share of moves that were accepted, ``(B,)``.
        chains, steps: Their number K for each observation, and that of temperatures.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor
    chains: int
    steps: int

    def __str__(self) -> str:
        return (
            f"log-likelihood {self.log_likelihood.mean():.3f} nats, the mean over {len(self.log_likelihood)} "
            f"observations; with {self.chains} chains of {self.steps} steps, median standard error "
            f"{self.standard_error.median():.3f} nats, effective sample size "
            f"{self.effective_sample_size.median():.1f}, acceptance {self.acceptance.median():.2f}"
        )


@dataclass(frozen=True, eq=False)
class BidirectionalMonteCarlo:
    """Bounds from both sides on the log-likelihoods of B simulated observations.

    Attributes:
        lower, upper: In nats, ``(B,)``; stochastic bounds, below and above in expectation.
        chains, steps: As for :class:`AnnealedImportanceSampling`.
    """

    lower: Tensor
    upper: Tensor
    chains: int
    steps: int

    @property
    def gap(self) -> float:
        """The mean of upper − lower in nats; that of either bound is at most this, in expectation."""
        return float((self.upper - self.lower).double().mean())

    @property
    def standard_error(self) -> float:
        """Of the gap, over observations."""
        return float((self.upper - self.lower).double().std() / math.sqrt(len(self.lower)))

    def __str__(self) -> str:
        return (
            f"log-likelihood of {len(self.lower)} simulated observations between {self.lower.mean():.3f} and "
            f"{self.upper.mean():.3f} nats: a gap of {self.gap:.3f} ± {self.standard_error:.3f}, with {self.chains} "
            f"chains of {self.steps} steps"
        )


@checked()
def annealing(
    model: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    held: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
) -> AnnealedImportanceSampling:
    r"""Estimate the log-likelihood of each observation by annealed importance sampling; no guide is needed.

    .. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k, \quad
        \log w_k = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log p(x \mid z_{k,t-1}), \quad z_{k,0} \sim p(z)

    where :math:`z_{k,t}` comes from :math:`z_{k,t-1}` by a move that leaves :math:`p(z) \, p(x \mid z)^{\beta_t}` as it
    is: one trajectory of Hamiltonian Monte Carlo, of all latent sites together on unconstrained scales. Inverse
    temperatures rise from 0 to 1 along a sigmoid. The mean of the weights is unbiased, so its logarithm is too low on
    average: the estimate is a stochastic lower bound, and :func:`bidirectional_monte_carlo` says how tight such ones
    are. Neal 2001, *Annealed importance sampling*, physics/9803008; for decoders, Wu, Burda, Salakhutdinov & Grosse
    2017, *On the quantitative analysis of decoder-based models*, 1611.04273.

    Each observation has step sizes of its own, one for each temperature. They are tuned by pilot chains of other draws
    and then held: sizes that followed a chain's own past would make its weights biased. The standard error is the
    delta method's over the chains, which few of very unequal weights make too small.

    Only the prior and the likelihood are asked for their densities, so models that were trained with an implicit guide
    are judged as well as others (AVB, AAE).

    Args:
        model: A program.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the program takes.
        chains: Number K of chains for each observation.
        steps: Number T of temperatures, each with one move. More of them make the estimate better.
        leapfrogs: Steps of each trajectory; what is run is ``chains * steps * leapfrogs`` passes of the model and back
            for each observation, and a quarter more for the pilot.
        held: Values of global latent sites, by name: the log-likelihood is given these.
        seed: Of all draws; the caller's random state is left as it was.
        rows: How many chains are run at once; memory is bounded by it.
        compile: Trace the model's densities and their gradients once and run a compiled graph, which takes 5 to 30
            seconds and gives the same up to rounding. What can't be traced runs as it is, with a warning.

    Returns:
        Log-likelihoods with standard errors, of shape ``(B,)``, in nats.

    Raises:
        ValueError: If the model has global latent sites that are not held, a number is below 1, or program and
            observations do not fit.
        NoDensityError: A ``ValueError`` that names the model's implicit sites.
        ArithmeticError: If a log-likelihood is NaN.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> annealing(toy.model, toy.x[:3], chains=4, steps=20).log_likelihood.shape
        torch.Size([3])
    """
    check_counts(chains=chains, steps=steps, leapfrogs=leapfrogs)
    with prepared(model, None, x, seed=seed, rows=rows, guided=False) as pair:
        pair = _given(pair, held, "annealed importance sampling")
        traced = Traced(model, compile=compile)
        log_weights, accepted = [], []
        for few in parts(len(pair.batch[0]), min(chains, rows), rows):
            first = _Target(pair, tuple(tensor[few] for tensor in pair.batch), min(chains, rows), traced)
            sizes, found = _tuned(first, steps, leapfrogs), []
            for target in first.groups(chains):
                found.append(_annealed(target, target.state(target.draw()), sizes, leapfrogs))
            log_w, share = (torch.cat(each) for each in zip(*found, strict=True))
            log_weights.append(log_w)
            accepted.append(share.mean(0))
        log_w = torch.cat(log_weights, 1)
        log_mean, log_mean_square = (torch.logsumexp(power * log_w, 0) - math.log(chains) for power in (1, 2))
        acceptance = torch.cat(accepted)
        figures = (log_mean, *error_and_size(log_mean, log_mean_square, chains))
        value, error, size = (each.to(acceptance) for each in figures)
        return AnnealedImportanceSampling(value, error, size, acceptance, chains, steps)


@checked()
def annealed_importance_sampling(
    model: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    held: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
) -> Tensor:
    """Estimate the log-likelihood of each observation in nats, ``(B,)``, without a guide.

    :func:`annealing` takes the same arguments, says more, and has the details.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> annealed_importance_sampling(toy.model, toy.x[:3], chains=4, steps=20).shape
        torch.Size([3])
    """
    return annealing(
        model, x, chains=chains, steps=steps, leapfrogs=leapfrogs, held=held, seed=seed, rows=rows, compile=compile
    ).log_likelihood


@checked()
def bidirectional_monte_carlo(
    model: Callable,
    x: Tensor | Sequence[Tensor],
    *,
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    held: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
) -> BidirectionalMonteCarlo:
    r"""Bound the log-likelihood of simulated observations from both sides, to see how tight :func:`annealing` is.

    Of an observation that the model itself has drawn, with its latent values z*, an exact draw of the posterior is
    known: z*. Chains that start from it and are cooled from β = 1 to 0 have weights of mean 1 / p(x), so that

    .. math:: \log p(x) \le -\operatorname{E} \log \frac{1}{K} \sum_k \exp \Bigl( \sum_{t=T}^{1} (\beta_{t-1} -
        \beta_t) \log p(x \mid z_{k,t}) \Bigr), \quad z_{k,T+1} = z^*,

    each :math:`z_{k,t}` from :math:`z_{k,t+1}` by a move at :math:`\beta_t`, while :func:`annealing` bounds it from
    below. The gap between the two bounds the error of both. It is that of data like the model's own, which says most of
    real ones where the model is good. Grosse, Ghahramani & Adams 2015, *Sandwiching the marginal likelihood using
    bidirectional Monte Carlo*, 1511.02543.

    Args:
        model: A program.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the program takes: as many are simulated.
        chains, steps, leapfrogs, held, seed, rows, compile: See :func:`annealing`.

    Returns:
        The bounds in nats, and their ``gap``.

    Raises:
        ValueError, NoDensityError, ArithmeticError: See :func:`annealing`.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> bidirectional_monte_carlo(toy.model, toy.x[:3], chains=4, steps=20).upper.shape
        torch.Size([3])
    """
    check_counts(chains=chains, steps=steps, leapfrogs=leapfrogs)
    with prepared(model, None, x, seed=seed, rows=rows, guided=False) as pair:
        pair = _given(pair, held, "bidirectional Monte Carlo")
        traced = Traced(model, compile=compile)
        lower, upper = [], []
        for few in parts(len(pair.batch[0]), min(chains, rows), rows):
            batch = tuple(tensor[few] for tensor in pair.batch)
            drawn = sample_sites(trace_of(poutine.uncondition(pair.model), *batch))
            first = _Target(pair, batch, min(chains, rows), traced, drawn)
            sizes, found = _tuned(first, steps, leapfrogs), []
            for target in first.groups(chains):
                up, _ = _annealed(target, target.state(target.draw()), sizes, leapfrogs)
                down, _ = _annealed(target, target.state(target.known()), sizes, leapfrogs, cooling=True)
                found.append((up, down))
            up, down = (torch.cat(each) for each in zip(*found, strict=True))
            lower.append(torch.logsumexp(up, 0) - math.log(chains))
            upper.append(math.log(chains) - torch.logsumexp(down, 0))
        return BidirectionalMonteCarlo(torch.cat(lower), torch.cat(upper), chains, steps)


def _given(pair: Prepared, held: Mapping[str, Tensor] | None, what: str) -> Prepared:
    """The model at the values of its global sites, if it can be annealed."""
    pair.need_joint_density(what)
    if not pair.latents:
        raise ValueError(
            f"{what} integrates over latent sites, and the model has none: its log-likelihood is exact, and "
            "log_likelihood(model, None, x) gives it"
        )
    shared = [name for name, site in pair.latents.items() if site.is_global]
    if {*shared} != {*(held or {})}:
        raise ValueError(
            f"{what} is of one observation given the model's global latent sites: expected held to have values of "
            f"{shared or 'none'}, got {[*(held or {})] or 'none'}"
        )
    if not held:
        return pair
    values = {name: torch.as_tensor(value).to(pair.nodes[name]["value"]) for name, value in held.items()}
    model = poutine.block(poutine.condition(pair.model, data=values), hide=[*values])
    return replace(pair, model=model, latents={name: s for name, s in pair.latents.items() if name not in values})


@dataclass(frozen=True, eq=False)
class _State:
    """Where R chains are, and what the densities and their slopes are there."""

    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor
    prior_slope: Tensor
    likelihood_slope: Tensor

    def log_density(self, beta: float) -> Tensor:
        return self.log_prior + beta * self.log_likelihood

    def slope(self, beta: float) -> Tensor:
        return self.prior_slope + beta * self.likelihood_slope

    def moved(self, other: "_State", accepted: Tensor) -> "_State":
        """The other's where that is accepted."""

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(accepted.view(-1, *[1] * (old.dim() - 1)), new, old)

        return _State(*map(chosen, vars(self).values(), vars(other).values()))


class _Target:
    """log p(z) and log p(x | z) of K copies of some rows, as functions of unconstrained latents ``(K * B, D)``.

    Args:
        pair: The model, and what is known of it.
        batch: Rows.
        chains: The number K.
        traced: Runs the densities.
        drawn: Sites of a run of the model on its own; then its observed sites are at the values there.
    """

    def __init__(
        self,
        pair: Prepared,
        batch: tuple[Tensor, ...],
        chains: int,
        traced: Traced,
        drawn: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.pair, self.batch, self.chains, self.traced = pair, batch, chains, traced
        self.rows = repeat(batch, chains)
        self.drawn = drawn
        self.seen: dict[str, Tensor] = {}
        if drawn is not None:
            self.seen = {
                name: torch.cat([node["value"]] * chains, row_axis(node))
                for name, node in drawn.items()
                if name not in pair.latents and not node["infer"].get("_deterministic")
            }
        self.model = pair.model if drawn is None else poutine.uncondition(pair.model)
        trace = trace_of(poutine.condition(self.model, data=self.seen), *self.rows)
        self.parameters = parameters_of(pair.model, trace)
        self.first = sample_sites(trace)
        self.latents = LatentVector(pair.latents, self.first)

    def with_chains(self, chains: int) -> "_Target":
        """The same of another number of copies."""
        return _Target(self.pair, self.batch, chains, self.traced, self.drawn)

    def groups(self, chains: int) -> Iterator["_Target"]:
        """Targets of so many chains together, this one the first and largest."""
        for group, copies in enumerate(groups(chains, self.chains)):
            yield self if group == 0 else self.with_chains(copies)

    def draw(self) -> Tensor:
        """A draw of the prior for each chain, always the same ones."""
        return self.latents.vectors(self.latents.drawn(self.first))

    def known(self) -> Tensor:
        """The latents that the observations were drawn with."""
        assert self.drawn is not None
        return self.latents.vectors(self.latents.drawn(self.drawn)).repeat(self.chains, 1)

    def state(self, z: Tensor) -> _State:
        """The densities at some values, with their slopes."""
        return _State(z, *self.traced(self._densities, z, *self.rows, *self.seen.values()))

    def _densities(self, z: Tensor, *given: Tensor) -> list[Tensor]:
        """All of a state but its place; parameters are constants."""
        rows, seen = given[: len(self.rows)], dict(zip(self.seen, given[len(self.rows) :], strict=True))
        with torch.enable_grad(), frozen(self.parameters):
            z = z.detach().requires_grad_()
            both = self._log_densities(z, rows, seen)
            return [*(each.detach() for each in both), *(_slope(each, z) for each in both)]

    def _log_densities(self, z: Tensor, rows: tuple[Tensor, ...], seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values = self.latents.values(z)
        model = poutine.condition(self.model, data=seen | self.latents.placed(values))
        log_prior, log_likelihood = self.latents.log_volume(z, values), z.new_zeros(len(z))
        for name, node in sample_sites(trace_of(model, *rows)).items():
            if name in values:
                node = without_mask(node)
                log_prior = log_prior + per_row(node, node["fn"].log_prob(node["value"]))
            else:
                log_likelihood = log_likelihood + per_row(node, node["fn"].log_prob(node["value"]))
        return log_prior, log_likelihood


def _slope(log_density: Tensor, z: Tensor) -> Tensor:
    if not log_density.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(log_density.sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def _betas(steps: int) -> list[float]:
    """Inverse temperatures from 0 to 1, T + 1 of them."""
    points = torch.linspace(-STEEPNESS, STEEPNESS, steps + 1, dtype=torch.float64).sigmoid()
    return ((points - points[0]) / (points[-1] - points[0])).tolist()


def _move(target: _Target, state: _State, beta: float, size: Tensor, leapfrogs: int) -> tuple[_State, Tensor]:
    """One trajectory of each chain with its own step size ``(R,)``, and the probability that it is accepted."""
    step = (size * (1 + JITTER * (2 * torch.rand_like(size) - 1))).unsqueeze(-1)
    start = torch.randn_like(state.z)
    new, momentum = state, start + 0.5 * step * state.slope(beta)
    for leapfrog in range(leapfrogs):
        new = target.state(new.z + step * momentum)
        momentum = momentum + (0.5 if leapfrog == leapfrogs - 1 else 1.0) * step * new.slope(beta)
    gain = new.log_density(beta) - state.log_density(beta) + 0.5 * (start.square() - momentum.square()).sum(-1)
    probability = gain.clamp(max=0.0).exp().nan_to_num(nan=0.0)  # a trajectory that diverged is refused
    return state.moved(new, torch.rand_like(probability) < probability), probability


def _tuned(target: _Target, steps: int, leapfrogs: int) -> Tensor:
    """Step sizes ``(T, B)`` with which pilot chains, a quarter as many, have moves accepted as often as wanted."""
    pilots = max(1, target.chains // 4)
    target = target.with_chains(pilots)
    state, betas = target.state(target.draw()), _betas(steps)
    log_size = state.log_prior.new_full((len(state.z) // pilots,), math.log(0.5))
    found = []
    for beta, gain in [*((betas[1], 0.5) for _ in range(WARM_UP)), *((beta, 0.3) for beta in betas[1:])]:
        state, probability = _move(target, state, beta, log_size.exp().repeat(pilots), leapfrogs)
        known = state.log_likelihood.isfinite().view(pilots, -1).any(0)  # else nothing is accepted, whatever the size
        log_size = log_size + known * gain * (probability.view(pilots, -1).mean(0) - ACCEPTANCE)
        found.append(log_size.exp())
    return torch.stack(found[WARM_UP:])


def _annealed(
    target: _Target, state: _State, sizes: Tensor, leapfrogs: int, *, cooling: bool = False
) -> tuple[Tensor, Tensor]:
    """Of chains from prior to posterior, or where they are cooling the other way, the log-weights ``(K, B)`` and the
    share of moves that was accepted."""
    betas = _betas(len(sizes))
    log_w = torch.zeros(len(state.z), dtype=torch.float64, device=state.z.device)
    accepted = torch.zeros_like(state.log_prior)
    steps = range(1, len(betas))
    for step in reversed(steps) if cooling else steps:
        weight = betas[step] - betas[step - 1]
        if not cooling:
            log_w += weight * state.log_likelihood.double()
        state, probability = _move(target, state, betas[step], sizes[step - 1].repeat(target.chains), leapfrogs)
        accepted += probability
        if cooling:
            log_w -= weight * state.log_likelihood.double()
    if torch.isnan(log_w).any():
        raise ArithmeticError(
            "the log-likelihood of a chain is NaN; the parameters of the model are not finite, or a distribution "
            "overflows at draws from its prior"
        )
    return log_w.view(target.chains, -1), accepted.view(target.chains, -1) / len(sizes)

"""A reference to judge guides by: the posterior of chosen observations by the No-U-Turn Sampler."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray
from pyro import poutine
from pyro.infer import NUTS
from pyro.ops.integrator import potential_grad
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.distributions.implicit import NoDensityError, is_implicit
from pyrogen.evaluation.frames import arviz_major, import_arviz
from pyrogen.evaluation.running import Prepared, prepared
from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.programs import data_frame, per_row, sample_sites, trace_of, unregistered
from pyrogen.inference.terms import frozen, parameters_of, without_mask
from pyrogen.inference.turns import seeded

__all__ = ["ReferencePosterior", "nuts"]

R_HAT = 1.01
"""The largest R̂ of a reference (Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, 1903.08008)."""

EFFECTIVE_SAMPLE_SIZE = 400
"""The smallest effective sample size of a reference; the same source."""

_ATTEMPTS = 100
"""How many starting points are drawn for a chain before none is found that the model can have."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ReferencePosterior:
    """Draws from the posterior of B observations by Markov chains, and whether they can be a reference.

    Attributes:
        samples: By site ``(chains, draws, B, *nested plates, *event)``, or ``(chains, draws, *plates, *event)`` at a
            global site.
        r_hat: Of each unit, in the shape of the site's value, ``(B, ...)``: the rank-normalised R̂, near 1 where
            chains agree; infinite where a site did not move, NaN for a unit of it that can't, such as the first entry
            of a Cholesky factor.
        effective_sample_size: Of each unit, in the same shape: how many independent draws the chains are worth, in the
            bulk or in the tails, whichever is less; 0 where a site did not move, NaN as above.
        divergent: Whether a draw's trajectory diverged, ``(chains, draws, B)``; ``(chains, draws)`` with global sites.
        acceptance: The share of draws that differ from the one before, ``(chains, B)``; ``(chains,)`` with global
            sites.
        x: The observations, and what else the model took.
        warmup: Draws of each chain before those that were kept.
    """

    samples: dict[str, Tensor]
    r_hat: dict[str, Tensor]
    effective_sample_size: dict[str, Tensor]
    divergent: Tensor
    acceptance: Tensor
    x: tuple[Tensor, ...]
    warmup: int

    @property
    def chains(self) -> int:
        """Number of chains."""
        return self.divergent.shape[0]

    @property
    def draws(self) -> int:
        """Draws of each chain."""
        return self.divergent.shape[1]

    @property
    def divergences(self) -> int:
        """How many draws diverged; more than a few say that the chains avoid a part of the posterior."""
        return int(self.divergent.sum())

    @property
    def doubtful(self) -> dict[str, Tensor]:
        """By site, the units with R̂ above 1.01 or an effective sample size below 400."""
        sizes = self.effective_sample_size
        return {name: (r > R_HAT) | (sizes[name] < EFFECTIVE_SAMPLE_SIZE) for name, r in self.r_hat.items()}

    @property
    def converged(self) -> bool:
        """Whether no unit is doubtful. It does not show a mode that no chain has visited."""
        return not any(bool(units.any()) for units in self.doubtful.values())

    def __str__(self) -> str:
        r_hat, size = (
            torch.cat([values[~values.isnan()] for values in by_site.values()])
            for by_site in (self.r_hat, self.effective_sample_size)
        )
        text = (
            f"NUTS of {len(self.x[0])} observations, {self.chains} chains of {self.draws} draws after {self.warmup}: "
            f"largest R-hat {r_hat.max():.3f}, least effective sample size {size.min():.0f}, divergences "
            f"{self.divergences}, acceptance {self.acceptance.mean():.2f}"
        )
        if self.converged:
            return text
        doubtful = {name: int(units.sum()) for name, units in self.doubtful.items()}
        units = ", ".join(f"{name} {n} of {self.r_hat[name].numel()}" for name, n in doubtful.items() if n)
        return (
            f"{text}. NOT A REFERENCE: R-hat is above {R_HAT} or the effective sample size below "
            f"{EFFECTIVE_SAMPLE_SIZE} at some units ({units}); take more draws and a longer warmup"
        )


@checked()
def nuts(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    draws: int = 500,
    warmup: int = 300,
    chains: int = 4,
    target_acceptance: float = 0.8,
    seed: int = 0,
) -> ReferencePosterior:
    r"""Draw from the exact posterior of a few observations, by Pyro's No-U-Turn Sampler.

    .. math:: \theta, z \sim p(\theta, z \mid x), \quad \text{or for each observation } z_i \sim p(z_i \mid x_i)
        \text{ without global sites}

    Hoffman & Gelman 2014, *The No-U-turn sampler*, 1111.4246. Sampled are the model's latent sites on unconstrained
    scales, its parameters held fixed. Without global sites the posterior factorises, and each observation has chains
    of its own; with them all observations are sampled together, and the posterior is that given these observations
    alone. What a mask leaves out has its prior as the posterior.

    The chains start at draws from the guide, which may be implicit, or without one from the prior, and run one after
    the other. R̂ and effective sample sizes are ArviZ's rank-normalised ones (Vehtari, Gelman, Simpson, Carpenter &
    Bürkner 2021, *Rank-normalization, folding, and localization: an improved R̂*, 1903.08008). No chain finds a mode
    that is far from every starting point: with a guide on one of several modes, compare with ``guide=None``.

    A draw takes several passes of the model and back, each some milliseconds however small the model: expect half a
    minute for an observation, and choose few. Progress is logged, at level INFO, by the logger
    ``pyrogen.evaluation.reference``. Pyro's ``jit_compile`` is not used: it holds branches of the program as they were
    at the first values, and torch has deprecated what it rests on.

    Args:
        model: A program with latent sites, all of its sites explicit.
        guide: A program for starting points, or None.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        draws: Draws kept of each chain, at least 4.
        warmup: Draws of each chain before, in which step size and mass matrix are adapted.
        chains: Number of chains, at least 2.
        target_acceptance: What the step size is adapted to; nearer 1 where trajectories diverge.
        seed: Of the draws; the caller's random state is left as it was.

    Returns:
        The draws by site, and whether they can be trusted: print it.

    Raises:
        ValueError: If programs and observations do not fit, the model has no latent site, or an option is out of
            range.
        NoDensityError: A ``ValueError`` that names the model's implicit sites.
        ArithmeticError: If the density of a hundred starting points is zero or not finite.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> reference = nuts(toy.model, None, toy.x[:1], draws=20, warmup=20, chains=2)
        >>> reference.samples["z"].shape, reference.r_hat["z"].shape, reference.converged
        (torch.Size([2, 20, 1, 2]), torch.Size([1, 2]), False)
    """
    check_counts(draws=draws, warmup=warmup, chains=chains)
    if draws < 4 or chains < 2:
        raise ValueError(f"R-hat compares chains: expected at least 2 of 4 draws, got {chains} of {draws}")
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must be between 0 and 1, got {target_acceptance!r}")
    with prepared(model, guide, x, seed=seed, guided=guide is not None) as pair, poutine.block():
        _check_densities(pair)
        trace = trace_of(pair.model, *(tensor[:2] for tensor in pair.batch))
        with frozen(parameters_of(pair.model, trace)):
            return _sampled(pair, pair.model if guide is None else pair.guide, draws, warmup, chains, target_acceptance)


def _check_densities(pair: Prepared) -> None:
    pair.need_joint_density("NUTS")
    if names := [name for name in pair.latents if is_implicit(pair.nodes[name]["fn"])]:
        raise NoDensityError(
            f"NUTS needs log p(x, z), but the model's distribution at the global sites {names} is implicit: it can "
            "only be sampled; give these sites a family with a density"
        )
    if not pair.latents:
        raise ValueError("NUTS draws from the posterior of latent sites, and the model has none")


def _sampled(
    pair: Prepared, starter: Callable, draws: int, warmup: int, chains: int, target_acceptance: float
) -> ReferencePosterior:
    total = len(pair.batch[0])
    few = [slice(0, total)] if pair.has_global else [slice(row, row + 1) for row in range(total)]
    densities = [_Density(pair, part) for part in few]
    starts = _starting_points(pair, starter, densities, chains)
    # A seed for each chain, so that none depends on how long the others ran.
    seeds = torch.randint(2**31, (len(few), chains)).tolist()
    values: list[dict[str, Tensor]] = []
    divergent, acceptance = [], []
    for density, points, own in zip(densities, starts, seeds, strict=True):
        began, paths = time.perf_counter(), []
        for point, seed in zip(points, own, strict=True):
            with seeded(seed, point.device):
                paths.append(_chain(density, point, draws, warmup, target_acceptance))
        flat, diverged, accepted = (torch.stack(parts) for parts in zip(*paths, strict=True))
        values.append(density.latents.values(flat))
        divergent.append(diverged)
        acceptance.append(accepted)
        _log.info("NUTS: %d of %d done, %.1f seconds", len(values), len(few), time.perf_counter() - began)
    # Either there is one piece of all observations, or all sites are in pieces of one observation each.
    samples = values[0] if pair.has_global else {name: torch.cat([v[name] for v in values], 2) for name in values[0]}
    diagnostics = {name: _diagnostics(draw, pair.latents[name].is_global) for name, draw in samples.items()}
    return ReferencePosterior(
        samples,
        {name: r_hat for name, (r_hat, _) in diagnostics.items()},
        {name: size for name, (_, size) in diagnostics.items()},
        divergent[0] if pair.has_global else torch.stack(divergent, -1),
        acceptance[0] if pair.has_global else torch.stack(acceptance, -1),
        pair.batch,
        warmup,
    )


class _Score(Messenger):
    """Run a program at given values of its latent sites and sum what its densities say of all sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.log_density: Tensor | float = 0.0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):  # type: ignore[arg-type]
            return
        node = without_mask(msg) if msg["name"] in self.values else msg
        self.log_density = self.log_density + per_row(node, node["fn"].log_prob(node["value"])).sum()


class _Density:
    """log p(x, z) of some rows, as a function of all their latents in one unconstrained vector.

    Args:
        pair: The model, and what is known of it.
        part: Which rows.
    """

    def __init__(self, pair: Prepared, part: slice) -> None:
        self.program = unregistered(pair.model)
        self.part = part
        self.batch = tuple(tensor[part] for tensor in pair.batch)
        self.latents = LatentVector(pair.latents, pair.nodes, rows=len(self.batch[0]))

    def flat(self, drawn: dict[str, dict[str, Any]]) -> Tensor:
        """The latents of these rows in a run of a program on all rows."""
        values = self.latents.drawn(drawn)
        local = {name: value[self.part] for name, value in values.items() if data_frame(drawn[name]) is not None}
        return self.latents.vectors(values | local)

    def potential(self, vector: dict[str, Tensor]) -> Tensor:
        """−log p of a vector ``(D,)``, as Pyro's kernels ask for it."""
        with torch.enable_grad():
            values = self.latents.values(vector["z"])
            with _Score(self.latents.placed(values)) as score:
                self.program(*self.batch)
            return -(score.log_density + self.latents.log_volume(vector["z"], values))


def _starting_points(pair: Prepared, starter: Callable, densities: list[_Density], chains: int) -> list[list[Tensor]]:
    """For each density and chain, a draw of the latents at which the density and its slope are finite."""
    found: list[list[Tensor]] = [[] for _ in densities]
    for chain in range(chains):
        for _ in range(_ATTEMPTS):
            drawn = sample_sites(trace_of(starter, *pair.batch))
            for density, points in zip(densities, found, strict=True):
                if len(points) == chain and _is_possible(density, point := density.flat(drawn)):
                    points.append(point)
            if all(len(points) > chain for points in found):
                break
        else:
            missing = [
                density.part.start for density, points in zip(densities, found, strict=True) if len(points) == chain
            ]
            raise ArithmeticError(
                f"log p(x, z) or its slope is not finite at {_ATTEMPTS} starting points"
                + ("" if pair.has_global else f" of the observations {missing[:8]}")
                + "; the model's parameters are not finite, an observation is impossible under it, or the guide "
                "proposes what the prior excludes"
            )
    return found


def _is_possible(density: _Density, point: Tensor) -> bool:
    slopes, energy = potential_grad(density.potential, {"z": point})
    return bool(energy.isfinite() & slopes["z"].isfinite().all())


def _chain(
    density: _Density, start: Tensor, draws: int, warmup: int, target_acceptance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ``(S, D)``, which of them diverged, and the share that moved.

    The kernel is driven by hand: Pyro's MCMC would write to its logger at every draw, and leave that changed.
    """
    kernel = NUTS(potential_fn=density.potential, target_accept_prob=target_acceptance)
    kernel.initial_params = {"z": start}
    kernel.setup(warmup)
    state = kernel.initial_params
    for _ in range(warmup):
        state = kernel.sample(state)
    path = []
    for _ in range(draws):
        state = kernel.sample(state)
        path.append(state["z"])
    said = kernel.diagnostics()
    divergent = torch.zeros(draws, dtype=torch.bool, device=start.device)
    divergent[said["divergences"]] = True
    return torch.stack(path), divergent, start.new_tensor(said["acceptance rate"])


def _diagnostics(draws: Tensor, is_global: bool) -> tuple[Tensor, Tensor]:
    """R̂ and effective sample size of each unit, of ``(chains, draws, ...)``."""
    units = draws.reshape(*draws.shape[:2], -1).double().cpu().numpy()
    moved = np.flatnonzero((units != units[:1, :1]).any((0, 1)))
    r_hat, size = (draws.new_full((units.shape[-1],), float("nan")) for _ in range(2))
    if len(moved):
        for into, values in zip((r_hat, size), _arviz_diagnostics(units[..., moved]), strict=True):
            into[torch.as_tensor(moved, device=into.device)] = torch.as_tensor(values).to(into)
    r_hat, size = (values.view(draws.shape[2:]) for values in (r_hat, size))
    # Where not one unit of a site has moved, in an observation, it is not that the support holds it.
    held = r_hat.isnan()
    stuck = held.all() if is_global else held.view(len(held), -1).all(1).view(-1, *[1] * (held.dim() - 1))
    return r_hat.masked_fill(stuck, float("inf")), size.masked_fill(stuck, 0.0)


def _arviz_diagnostics(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's R̂, and the lesser of its bulk and tail effective sample sizes, of ``(chains, draws, units)``."""
    with np.errstate(all="ignore"):  # parts of a chain that do not move
        if arviz_major() < 1:
            arviz, data = import_arviz("arviz"), xarray.Dataset({"u": (("chain", "draw", "unit"), units)})
            found = [arviz.rhat(data), arviz.ess(data), arviz.ess(data, method="tail")]
            r_hat, bulk, tail = (each["u"].values for each in found)
        else:
            stats, axes = import_arviz("arviz_stats.base").array_stats, {"chain_axis": 0, "draw_axis": 1}
            r_hat, bulk = stats.rhat(units, **axes), stats.ess(units, **axes)
            tail = stats.ess(units, method="tail", prob=(0.05, 0.95), **axes)
    return np.nan_to_num(r_hat, nan=np.inf, posinf=np.inf), np.nan_to_num(np.minimum(bulk, tail))

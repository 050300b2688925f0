"""Divergences of implicit distributions by critics of their own, fitted to data that a training has not seen."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.transforms import biject_to
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.evaluation.aggregate import with_globals_held
from pyrogen.evaluation.calibration import TOLERANCE, RatioCalibration, calibrate_ratio, fit_ratio
from pyrogen.evaluation.running import ROWS, Prepared, pair_passes, passes, prepared
from pyrogen.inference.adaptive import SMALLEST_VARIANCE, Reference
from pyrogen.inference.draws import Draws
from pyrogen.inference.guides import flattened
from pyrogen.inference.matching import check_unmasked
from pyrogen.inference.programs import is_real, per_row, sample_sites
from pyrogen.inference.ratios import Logistic, Ratio
from pyrogen.networks import Critic

__all__ = ["HeldOutEstimate", "held_out_marginal_kl_estimate", "held_out_rate_estimate"]

STEPS = 500
BATCH = 128
LEARNING_RATE = 1e-2
POOL = 8192
"""Draws to which a critic is fitted, of each side; and, of its calibration, samples."""
HELD_OUT = 1024
"""Draws over which what a critic adds is averaged; it has not seen them."""
PARTICLES = 256
"""Draws over which what needs no critic is averaged."""
CRITICS = 16
"""Of how many observations each gets a critic of its own."""
MARGINAL_LEARNING_RATE = 2e-3
DIVERGENCES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Of these, in nats, critics are calibrated at the neighbours of an estimate and at the last."""


@dataclass(frozen=True)
class HeldOutEstimate:
    """An estimate of a divergence by critics, and how far these can be trusted.

    Attributes:
        known: The part of it that needs no critic, in nats, a mean over observations.
        learned: What the critics at each implicit site add, in nats.
        calibrations: What the same critic, with as many samples and steps, makes of divergences that are known.
        observations: How many observations the first part was averaged over.

    Example:
        >>> calibration = RatioCalibration(known=(0.5, 5.0, 50.0), estimated=(0.5, 4.8, 15.0))
        >>> HeldOutEstimate(6.0, {"z": 0.3}, {"z": calibration}, 90).shown
        '6.3'
        >>> HeldOutEstimate(6.0, {"z": 12.0}, {"z": calibration}, 90).shown
        '> 10.8'
    """

    known: float
    learned: dict[str, float]
    calibrations: dict[str, RatioCalibration] = field(repr=False)
    observations: int

    @property
    def estimate(self) -> float:
        """The estimate in nats. It bounds nothing."""
        return self.known + sum(self.learned.values())

    @property
    def shown(self) -> str:
        """As a table shows it: ``"12.3"``, or ``"> 10.0"`` where critics that are off as much as their calibrations say
        may be off by more than 10 % of the whole; the number is then what they are trusted with."""
        if self._off() <= TOLERANCE * abs(self.estimate):
            return _tenths(self.estimate)
        trusted = (min(value, self.calibrations[name].trusted) for name, value in self.learned.items())
        return f"> {_tenths(self.known + sum(trusted))}"

    def _off(self) -> float:
        """By how much, in nats, critics past their range may be off; infinite where that isn't known."""
        off = 0.0
        for name, value in self.learned.items():
            calibration = self.calibrations[name]
            if value <= calibration.trusted:
                continue
            error = calibration.error_at(value)
            off += abs(value * error / (1 + error)) if error > -1 else math.inf  # NaN is not above -1 either
        return off

    def __str__(self) -> str:
        parts = "".join(f", {value:.3f} by the critics of {name}" for name, value in self.learned.items())
        return f"estimate {self.shown} nats: {self.known:.3f} known{parts}; {self.observations} observations"


def _tenths(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0.0, for a zero without a sign


@checked()
def held_out_rate_estimate(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    rows: int = ROWS,
) -> HeldOutEstimate:
    r"""Estimate the rate of a guide or a prior with implicit sites, by critics fitted to these observations.

    .. math:: R = \mathbb{E}_x \mathbb{E}_{q(z|x)} \log \frac{r_x(z)}{p(z)}
        + \mathbb{E}_x \mathbb{E}_{q(z|x)} \log \frac{q(z \mid x)}{r_x(z)}, \quad r_x = \mathcal{N}(\mu_x, \Sigma_x)

    with the moments of 1024 draws from q(z|x) or more, up to 16 384, which are some tenths of a nat too few past a
    hundred values of z. The first part, most of a rate, needs no critic; the second is how far the shape of q(z|x) is
    from a normal one (the adaptive contrast of Mescheder, Nowozin & Geiger 2017, 1701.04722). A prior that is implicit
    itself is contrasted with the guide directly, and all comes from critics.

    Each of 16 observations gets a critic of its own, a logistic one of 8192 draws of either side; what they report is
    averaged over further draws. So nothing hangs on how well a critic generalises from one observation to another, and
    as draws are not scarce, nothing is lost by evaluating the observations that it was fitted to. The same critic, with
    as many samples and steps, is calibrated (:func:`calibrate_ratio <pyrogen.evaluation.calibrate_ratio>`) on Gaussians
    of known divergence. It is an estimate all the same, and no bound: shapes can be harder than shifted Gaussians.

    Explicit sites beside implicit ones count with their exact or Monte Carlo divergence.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take; of many, some are chosen
            at random.
        steps: Steps of Adam.
        seed: Of draws and weights; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        The estimate: its ``.estimate`` in nats per observation, and ``.shown``.

    Raises:
        ValueError: If a per-observation site has a point mass, an implicit one is masked, the guide has implicit helper
            sites, an implicit prior depends on sites that the guide draws later, or programs and observations do not
            fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.distributions import Implicit
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, nn.Linear(4, 8), Implicit)
        >>> found = held_out_rate_estimate(toy.model, guide, toy.x[:4], steps=5)
        >>> [*found.learned], found.observations
        (['z'], 4)
    """
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        if reason := pair.why_no_rate_estimate():
            raise ValueError(f"critics can't estimate this rate: {reason}")
        names = [*dict.fromkeys([*pair.implicit_guide, *pair.implicit_prior])]
        pair = _some_rows(pair, names)
        known, learned, calibrations = _explicit_part(pair, rows), {}, {}
        for name in names:
            contrast: _Contrast = (_Direct if name in pair.implicit_prior else _Adaptive)(pair, name, rows)
            known += contrast.known(rows)
            learned[name], calibrations[name] = contrast.learned(steps, seed, rows)
        return HeldOutEstimate(known, learned, calibrations, len(pair.batch[0]))


@checked()
def held_out_marginal_kl_estimate(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    steps: int = STEPS,
    seed: int = 0,
    rows: int = ROWS,
) -> HeldOutEstimate:
    r"""Estimate the marginal divergence of the latents, by a critic fitted to half of these observations.

    .. math:: \operatorname{KL}(q(z) \| p(z)) \approx \mathbb{E}_{q(z)} T(z), \quad
        q(z) = \mathbb{E}_{p^*(x)} q(z \mid x)

    of all per-observation latent sites together, explicit or not. A logistic critic T contrasts draws given a random
    half of the observations with the model's own, until it no longer improves on draws given a further quarter, and is
    averaged over draws given the last quarter: a half that it was fitted to it would come to know by heart. With few
    observations the estimate is low, for half of them do not show all of q(z). Calibrated as
    :func:`held_out_rate_estimate`; no bound on anything.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, at least 3, or a tuple of tensors that the programs take.
        steps: Steps of Adam.
        seed: Of draws, weights and parts; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        The estimate; nothing of it is known without the critic.

    Raises:
        ValueError: For fewer than three observations, for a masked latent site, or if programs and observations do not
            fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, nn.Linear(4, 8))
        >>> held_out_marginal_kl_estimate(toy.model, guide, toy.x[:20], steps=5).observations
        5
    """
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        pair = with_globals_held(pair)
        first, second, third = three_parts(pair)
        fitted = latent_draws(pair, first, POOL, rows)
        ratio = fit_ratio(
            default_critic(fitted[0].shape[-1]).to(fitted[0].device),
            *fitted,
            steps=steps,
            batch_size=BATCH,
            learning_rate=MARGINAL_LEARNING_RATE,
            judged_by=latent_draws(pair, second, HELD_OUT, rows),
        )
        held, _ = latent_draws(pair, third, POOL, rows)
        learned = float(ratio.log_ratio(held).double().mean())
        calibration = calibrated_around(learned, held.shape[-1], steps, seed, MARGINAL_LEARNING_RATE)
        return HeldOutEstimate(0.0, {"latents": learned}, {"latents": calibration}, len(third))


def three_parts(pair: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """Observations at random to fit a critic to, half of them, to stop it by, and to ask it about.

    Raises:
        ValueError: For fewer than three, or if a latent site is masked.
    """
    for name in pair.local:
        check_unmasked(name, pair.nodes[name])
    count = len(pair.batch[0])
    if count < 3:
        raise ValueError(f"parts to fit to, to stop by and to evaluate need at least 3 observations, got {count}")
    order, few = torch.randperm(count), quarter(pair)
    return order[2 * few :], order[few : 2 * few], order[:few]


def quarter(pair: Prepared) -> int:
    """How many observations a critic is asked about."""
    return max(1, len(pair.batch[0]) // 4)


def latent_draws(pair: Prepared, chosen: Tensor, total: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draws ``(N, n)`` of all per-observation latents from the guide and from the model, of at least ``total``."""
    particles = math.ceil(total / len(chosen))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for draws, _ in _passes(pair, chosen, particles, rows):
        for into, nodes in zip(found, (draws.model, draws.prior_latents), strict=True):
            into.append(draws.latents(nodes, draws.local).float())
    return torch.cat(found[0]), torch.cat(found[1])


def _some_rows(pair: Prepared, names: list[str]) -> Prepared:
    """The same with no more observations than moments can be taken of at reasonable cost."""
    draws = max(_draws_for_moments(_width(pair, name)) for name in names) if names else 1
    most = max(CRITICS, 2**18 // draws)
    count = len(pair.batch[0])
    if count <= most:
        return pair
    chosen = torch.randperm(count)[:most]
    return dataclasses.replace(pair, batch=tuple(x[chosen.to(x.device)] for x in pair.batch))


def _width(pair: Prepared, name: str) -> int:
    """How many values a site has for each observation."""
    site = pair.latents[name]
    return math.prod(site.shape) * math.prod(plate.size for plate in site.plates if plate.name != "data")


def _draws_for_moments(width: int) -> int:
    """So many that a normal with the draws' moments is some hundredths of a nat away from one with the exact ones:
    that divergence is d (d + 3) / 4K. Past 64 values it grows, to a quarter of a nat at 128 and one at 256."""
    return min(2**14, max(1024, 4 * width**2))


def _explicit_part(pair: Prepared, rows: int) -> float:
    """The rate of the explicit sites."""
    total = 0.0
    for _, _, terms in pair_passes(pair, PARTICLES, rows, copies=pair.copies_of(PARTICLES), closed_form=True):
        total += sum(float(ratio.double().sum()) for ratio in terms.ratios.values())
    return total / (PARTICLES * len(pair.batch[0]))


def _passes(pair: Prepared, chosen: Tensor, particles: int, rows: int) -> Iterator[tuple[Draws, Tensor]]:
    """Runs of both programs on copies of chosen rows, at most ``rows`` at once, and the rows of each."""
    for part in chosen.split(max(1, rows // particles)):
        batch = tuple(x[part.to(x.device)] for x in pair.batch)
        done = 0
        while done < particles:
            copies = min(particles - done, max(1, rows // len(part)))
            yield Draws(pair.model, pair.guide, batch, copies), part
            done += copies


class _Contrast:
    """What critics contrast at one site: pairs of samples with what both are conditioned on behind."""

    def __init__(self, pair: Prepared, name: str, rows: int) -> None:
        self.pair = pair
        self.name = name

    def known(self, rows: int) -> float:
        """What needs no critic, a mean over observations."""
        raise NotImplementedError

    def sides(self, draws: Draws, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, ``(K, R, n)`` each."""
        raise NotImplementedError

    def learned(self, steps: int, seed: int, rows: int) -> tuple[float, RatioCalibration]:
        """What critics add, a mean over observations, and their calibration."""
        count = min(CRITICS, len(self.pair.batch[0]))
        u, v = self._samples(POOL + HELD_OUT, count, rows)
        ratio = Logistic(CriticOfEach(count, u.shape[-1])).to(u.device)
        fit_ratio(ratio, u[:POOL], v[:POOL], steps=steps, batch_size=BATCH, learning_rate=LEARNING_RATE)
        learned = float(ratio.log_ratio(u[POOL:]).double().mean())
        return learned, calibrated_around(learned, u.shape[-1], steps, seed, LEARNING_RATE)

    def _samples(self, particles: int, count: int, rows: int) -> tuple[Tensor, Tensor]:
        """Both sides for the first observations, standardised, ``(K, R, n)``."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        chosen, copies = torch.arange(count), max(1, rows // count)
        batch = tuple(x[:count] for x in self.pair.batch)
        for start in range(0, particles, copies):
            draws = Draws(self.pair.model, self.pair.guide, batch, min(copies, particles - start))
            for into, side in zip(sides, self.sides(draws, chosen), strict=True):
                into.append(torch.cat([side, self._earlier(draws)], -1))
        u, v = (torch.cat(side) for side in sides)
        both = torch.cat([u, v])
        centre, scale = both.mean(0), both.std(0).clamp(min=SMALLEST_VARIANCE**0.5)
        return ((u - centre) / scale).float(), ((v - centre) / scale).float()

    def _earlier(self, draws: Draws) -> Tensor:
        """The latents that the guide draws before, ``(K, R, m)``; the observation itself is each critic's own."""
        names = [name for name in self.pair.before(self.name) if not self.pair.latents[name].is_global]
        rows = draws.particles, len(draws.batch[0])
        if not names:
            return draws.rows[0].new_zeros(*rows, 0, dtype=self.values(draws).dtype)
        return draws.latents(draws.model, names).view(*rows, -1)

    def values(self, draws: Draws, value: Tensor | None = None) -> Tensor:
        """The site's unconstrained values, ``(K, R, n)``."""
        value = draws.model[self.name]["value"] if value is None else value
        flat = flattened(draws.sites[self.name], value, len(draws.rows[0]))
        return flat.view(draws.particles, len(draws.batch[0]), -1)


class _Direct(_Contrast):
    """The guide's draws against the model's, given the same earlier sites."""

    def known(self, rows: int) -> float:
        return 0.0

    def sides(self, draws: Draws, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self.values(draws), self.values(draws, draws.model[self.name]["fn"].sample())


class _Adaptive(_Contrast):
    """The guide's draws, whitened by fixed moments of each observation, against standard normal ones."""

    def __init__(self, pair: Prepared, name: str, rows: int) -> None:
        super().__init__(pair, name, rows)
        count, site = _draws_for_moments(_width(pair, name)), pair.latents[name]
        means, lowers = [], []
        for start in range(0, len(pair.batch[0]), max(1, 2**16 // count)):
            batch = tuple(x[start : start + max(1, 2**16 // count)] for x in pair.batch)
            parts: dict[int, list[Tensor]] = {}
            for part, copies, trace in passes(pair.guide, batch, count, rows, copies=pair.copies_of(count)):
                value = flattened(site, sample_sites(trace)[name]["value"], copies * len(batch[0][part]))
                parts.setdefault(part.start, []).append(value.view(copies, len(batch[0][part]), -1))
            v = torch.cat([torch.cat(pieces) for pieces in parts.values()], 1)
            reference = Reference.of(v, 1, "full")
            means.append(reference.mean)
            lowers.append(reference.lower)
        self.mean, self.lower = torch.cat(means), torch.cat(lowers)

    def known(self, rows: int) -> float:
        total, observations = 0.0, len(self.pair.batch[0])
        for draws, part in _passes(self.pair, torch.arange(observations), PARTICLES, rows):
            reference = self._reference(part)
            log_r = reference.log_prob(reference.whiten(self.values(draws)))
            total += float((log_r - _log_prior(draws, self.name)).double().sum())
        return total / (PARTICLES * observations)

    def sides(self, draws: Draws, chosen: Tensor) -> tuple[Tensor, Tensor]:
        white = self._reference(chosen).whiten(self.values(draws))
        return white, torch.randn_like(white)

    def _reference(self, chosen: Tensor) -> Reference:
        """The normals that stand for q of some observations."""
        chosen = chosen.to(self.mean.device)
        return Reference(self.mean[chosen], self.lower[chosen], event_dim=1)


def _log_prior(draws: Draws, name: str) -> Tensor:
    """log p at the guide's draws of a site, as a density of the unconstrained values, ``(K, R)``."""
    node: Any = draws.model[name]
    value, support = node["value"], draws.sites[name].support
    log_p = node["fn"].log_prob(value)
    if not is_real(support):
        transform = biject_to(support)
        log_p = log_p + transform.log_abs_det_jacobian(transform.inv(value), value)
    return per_row(node, log_p).view(draws.particles, -1)


def default_critic(width: int) -> Ratio:
    return Logistic(Critic(width, hidden=(64, 64)))


class CriticOfEach(nn.Module):
    """A :func:`default_critic` for each of R observations, all at once: samples ``(K, R, n)`` give ``(K, R)``."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        stacked, _ = torch.func.stack_module_state([default_critic(width).critic for _ in range(count)])
        weights = [tensor for tensor in stacked.values() if tensor.dim() == 3]
        self.weights = nn.ParameterList(weight.detach().transpose(1, 2).contiguous() for weight in weights)
        self.biases = nn.ParameterList(b.detach().unsqueeze(1) for b in stacked.values() if b.dim() == 2)

    def forward(self, z: Tensor, context: None = None) -> Tensor:
        h = z.transpose(0, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, nn.functional.leaky_relu(h) if layer else h, weight)
        return h.squeeze(-1).transpose(0, 1)


def calibrated_around(estimate: float, width: int, steps: int, seed: int, learning_rate: float) -> RatioCalibration:
    """The critic on Gaussians of divergences around an estimate, and of one so large that it may seem smaller; where it
    misjudges the nearest below, also on smaller ones, until one is found that it does not."""

    def calibrated(divergences: Iterable[float]) -> RatioCalibration:
        return calibrate_ratio(
            default_critic,
            features=width,
            samples=POOL,
            steps=steps,
            batch_size=BATCH,
            divergences=sorted(divergences),
            learning_rate=learning_rate,
            seed=seed,
        )

    *smaller, nearest = [known for known in DIVERGENCES if known <= estimate] or DIVERGENCES[:1]
    above = {next((known for known in DIVERGENCES if known >= least), nearest) for least in (estimate, 1.2 * estimate)}
    found = calibrated({nearest, *above, DIVERGENCES[-1]})
    while smaller and not found.trusted:
        one = calibrated([smaller.pop()])
        found = RatioCalibration(one.known + found.known, one.estimated + found.estimated)
    return found

"""The evaluation of a run: figures that do not depend on what was optimised."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.data import Data
from pyrogen.evaluation.features import features_of
from pyrogen.evaluation.parts import DEFAULT, PARTS, Subject, known_parts
from pyrogen.evaluation.running import ROWS, Prepared, prepared
from pyrogen.inference.run import Run

__all__ = ["Evaluation", "evaluate"]

NAN = math.nan


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found; figures are means over the observations, in nats unless said.

    Names with ``_error`` are standard errors. A figure that is not defined, such as a rate with a point mass for a
    posterior, is NaN, and a count None. So is one that is not known, such as the rate of an implicit guide, and one of
    a part that was not asked for. What critics report has ``estimate`` in its name, and is no bound on anything.

    Attributes:
        observations: How many there are.
        latent_units: How many latent units there are.
        particles: How many draws for each observation the log-likelihood rests on.
        seconds: Time taken.
        seconds_of: Time taken by each part.
        reasons: Why figures are not defined, by part.
        elbo: The evidence lower bound, −(rate + distortion), with its standard error from the spread between
            observations.
        rate: KL(q(z|x) ‖ p(z)).
        distortion: −E log p(x|z).
        global_rate: KL(q(θ) ‖ p(θ)) of global sites, for the whole data set; the ELBO, which is per observation and
            given these, is without it.
        active_units: How many latent units are active.
        log_likelihood: By importance sampling, with the guide or with ``explicit_guide``.
        log_likelihood_error: Standard error of that mean, from the spread between observations; NaN for one.
        monte_carlo_error: Standard error of that mean, from the finite number of particles alone.
        effective_sample_size: The median over observations of what the particles are worth in equally weighted draws.
        bits_per_dimension: −log-likelihood / (D log 2), where the one observed site has discrete values (bits, levels);
            None elsewhere, for a density has no such scale.
        explicit_guide: What the log-likelihood rests on in place of a guide with implicit sites: the family of a guide
            that was fitted afterwards to the frozen model; None where the guide itself served.
        pareto_k: The median of k̂ over up to 1000 observations, for the guide of the log-likelihood.
        pareto_k_untrusted: The share of these with k̂ above 0.7.
        rate_estimate: The rate according to the critics of the training.
        held_out_rate_estimate: The rate of an implicit guide or prior according to critics fitted afterwards, see
            :func:`held_out_rate_estimate <pyrogen.evaluation.held_out_rate_estimate>`.
        held_out_rate_estimate_shown: That number, or ``"> x"`` where critics are past the range in which their
            calibration is within 10 %; None without it.
        marginal_kl_estimate: KL(q(z) ‖ p(z)) according to the critic of a training that matched the marginals.
        held_out_marginal_kl_estimate, held_out_marginal_kl_estimate_shown: The same by a critic fitted afterwards to
            half of the observations and averaged over a quarter that it has not seen.
        mutual_information, marginal_kl, marginal_kl_excess: The rate in two parts, and by how much at most the second
            is too large for want of more observations, see :func:`marginal_kl <pyrogen.evaluation.marginal_kl>`.
        aggregated_observations: Of how many of the first observations q(z) is the mixture there: all up to 10 000, or
            1000 for a guide such as a flow, whose densities take a pass of a network for every pair.
        total_correlation, dimension_wise_kl: The marginal divergence in two parts.
        prior_holes: The share of the prior's mass where there is hardly any of q(z), with its standard error; equal
            laws give ``prior_holes_level``.
        mmd, mmd_p_value: Squared maximum mean discrepancy between q(z) and p(z), and how likely as large a one is
            between equal laws.
        precision, recall, density, coverage: Of as many samples as observations, see :func:`precision_recall
            <pyrogen.evaluation.precision_recall>`.
        frechet_distance, kernel_distance: Between the features of samples and observations.
        inception_score, sample_diversity, data_diversity: By a classifier of the data.
        data_copying: A z-score, far below 0 where samples are copies of the training data.
        sample_size, compared_in: How many samples these rest on, and in what space they are compared.
        sbc_p_value, tarp_p_value: Of simulation-based calibration and of TARP: how likely ranks as uneven are with an
            exact posterior.
        approximation_gap, amortization_gap: What family and encoder lose of the bound, means over the first
            ``gap_observations``.
        annealed_log_likelihood: By annealed importance sampling, of the first ``annealed_observations``, with the
            standard error from the number of chains, and ``annealing_gap``, between the bounds of bidirectional Monte
            Carlo on as many simulated observations.
        wasserstein: The distance between samples and observations according to a Wasserstein critic fitted afterwards,
            with its standard error.
        c2st, sliced_wasserstein: Between draws from the guide and by NUTS, means over the first
            ``reference_observations``; 0.5 is the accuracy of a classifier that can't tell them apart.
        reference_r_hat: The largest R̂ of these NUTS draws.
    """

    observations: int
    latent_units: int
    particles: int
    seconds: float
    seconds_of: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    elbo: float = NAN
    elbo_error: float = NAN
    rate: float = NAN
    distortion: float = NAN
    global_rate: float = NAN
    active_units: int | None = None
    log_likelihood: float = NAN
    log_likelihood_error: float = NAN
    monte_carlo_error: float = NAN
    effective_sample_size: float = NAN
    bits_per_dimension: float | None = None
    explicit_guide: str | None = None
    pareto_k: float = NAN
    pareto_k_untrusted: float = NAN
    rate_estimate: float = NAN
    held_out_rate_estimate: float = NAN
    held_out_rate_estimate_shown: str | None = None
    marginal_kl_estimate: float = NAN
    held_out_marginal_kl_estimate: float = NAN
    held_out_marginal_kl_estimate_shown: str | None = None
    aggregated_observations: int | None = None
    mutual_information: float = NAN
    mutual_information_error: float = NAN
    marginal_kl: float = NAN
    marginal_kl_error: float = NAN
    marginal_kl_excess: float = NAN
    total_correlation: float = NAN
    total_correlation_error: float = NAN
    dimension_wise_kl: float = NAN
    prior_holes: float = NAN
    prior_holes_error: float = NAN
    prior_holes_level: float = NAN
    mmd: float = NAN
    mmd_p_value: float = NAN
    precision: float = NAN
    precision_error: float = NAN
    recall: float = NAN
    recall_error: float = NAN
    density: float = NAN
    coverage: float = NAN
    coverage_error: float = NAN
    frechet_distance: float = NAN
    frechet_distance_error: float = NAN
    kernel_distance: float = NAN
    kernel_distance_error: float = NAN
    inception_score: float = NAN
    inception_score_error: float = NAN
    sample_diversity: float = NAN
    sample_diversity_error: float = NAN
    data_diversity: float = NAN
    data_copying: float = NAN
    sample_size: int | None = None
    compared_in: str | None = None
    sbc_p_value: float = NAN
    tarp_p_value: float = NAN
    approximation_gap: float = NAN
    amortization_gap: float = NAN
    gap_observations: int | None = None
    annealed_log_likelihood: float = NAN
    annealed_log_likelihood_error: float = NAN
    annealing_gap: float = NAN
    annealed_observations: int | None = None
    wasserstein: float = NAN
    wasserstein_error: float = NAN
    c2st: float = NAN
    sliced_wasserstein: float = NAN
    reference_r_hat: float = NAN
    reference_observations: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for a row of a table, with the reasons for those that are not defined."""
        figures = dataclasses.asdict(self)
        del figures["seconds_of"]
        return figures

    def __str__(self) -> str:
        longest = max(self.seconds_of, key=self.seconds_of.__getitem__, default=None)
        most = "" if longest is None else f", most of it for {longest} ({self.seconds_of[longest]:.1f} s)"
        heading = f"Evaluation on {self.observations} observations, {self.seconds:.1f} s{most}; means per observation"
        if self.explicit_guide is not None:
            heading += f"\nlog-likelihood with an explicit guide ({self.explicit_guide}) fitted to the frozen model"
        lines = [heading]
        width = max(len(line.label) for each in _SHOWN.values() for line in each)
        for part in self.seconds_of:
            shown = [line for line in _SHOWN.get(part, ()) if self._has(line)]
            lines += ["", *(line.text(self, width) for line in shown)] if shown else []
            if part in self.reasons:
                lines += [] if shown else [""]
                lines.append(f"  {part}: {self.reasons[part]}")
        return "\n".join(lines)

    def _has(self, line: "_Line") -> bool:
        value = getattr(self, line.name)
        return not (line.optional and (value is None or value != value))


@dataclass(frozen=True)
class _Line:
    """A printed figure: its field, what it is called, its unit, in which ``{...}`` are other fields, its error, and
    what more is to be said of it."""

    name: str
    label: str
    unit: str = ""
    error: str | None = None
    more: Callable[[Evaluation], str] | None = None
    optional: bool = True

    def text(self, found: Evaluation, width: int) -> str:
        value = getattr(found, self.name)
        figure = value if isinstance(value, str) else _figure(value)
        if self.name.endswith("p_value") and value < 0.001:
            figure = "< 0.001"
        what, comma, rest = self.unit.format(**vars(found)).partition(",")
        error = math.nan if self.error is None else getattr(found, self.error)
        spread = "" if error != error else f" ± {error:.3f}"
        more = "" if self.more is None else self.more(found)
        return f"{self.label:<{width}}  {figure:>12}  {f'{what}{spread}{comma}{rest}{more}'.strip()}".rstrip()


def _figure(value: float | int | None) -> str:
    if value is None or value != value:
        return "not defined"
    return str(value) if isinstance(value, int) else f"{round(value, 3) + 0.0:.3f}"  # + 0.0, for a zero without a sign


def _errors(found: Evaluation) -> str:
    if math.isnan(found.log_likelihood):
        return ""
    data, draws = found.log_likelihood_error, found.monte_carlo_error
    return ",".join(f" ± {error:.3f} ({of})" for error, of in ((data, "data"), (draws, "particles")) if error == error)


def _excess(found: Evaluation) -> str:
    if not found.marginal_kl_excess > 2 * found.marginal_kl_error:
        return ""
    return f", up to {found.marginal_kl_excess:.2f} of it for want of more observations"


_SHOWN: dict[str, tuple[_Line, ...]] = {
    "likelihood": (
        _Line("log_likelihood", "log-likelihood", "nats", more=_errors, optional=False),
        _Line("bits_per_dimension", "bits per dimension", "bits"),
        _Line("effective_sample_size", "effective sample size", "of {particles} particles (median)", optional=False),
        _Line("pareto_k", "Pareto k", "(median), above 0.7 for {pareto_k_untrusted:.0%} of observations"),
    ),
    "bound": (
        _Line("elbo", "ELBO", "nats", "elbo_error", optional=False),
        _Line("rate", "rate", "nats", optional=False),
        _Line("distortion", "distortion", "nats", optional=False),
        _Line("global_rate", "rate of global sites", "nats, once for the whole data set; not in the ELBO"),
        _Line("active_units", "active units", "of {latent_units}", optional=False),
    ),
    "critics": (
        _Line("rate_estimate", "rate, estimate", "nats, by the critics of the training"),
        _Line("held_out_rate_estimate_shown", "rate, held-out estimate", "nats, by critics fitted afterwards"),
        _Line("marginal_kl_estimate", "marginal KL, estimate", "nats, by the critics of the training"),
        _Line(
            "held_out_marginal_kl_estimate_shown",
            "marginal KL, held-out estimate",
            "nats, by critics fitted afterwards",
        ),
    ),
    "aggregate": (
        _Line(
            "mutual_information",
            "mutual information",
            "nats, of {aggregated_observations} observations",
            "mutual_information_error",
        ),
        _Line("marginal_kl", "marginal KL", "nats", "marginal_kl_error", more=_excess),
        _Line("total_correlation", "total correlation", "nats, of that", "total_correlation_error"),
        _Line("dimension_wise_kl", "dimension-wise KL", "nats, of that"),
        _Line("prior_holes", "prior holes", "of the prior, {prior_holes_level} without any", "prior_holes_error"),
        _Line("mmd_p_value", "q(z) = p(z)", "(p-value; MMD² {mmd:.4f})"),
    ),
    "samples": (
        _Line("precision", "precision", ", of {sample_size} samples", "precision_error"),
        _Line("recall", "recall", error="recall_error"),
        _Line("density", "density"),
        _Line("coverage", "coverage", error="coverage_error"),
        _Line("frechet_distance", "Fréchet distance", ", in {compared_in}", "frechet_distance_error"),
        _Line("kernel_distance", "kernel distance", error="kernel_distance_error"),
        _Line("inception_score", "Inception Score", error="inception_score_error"),
        _Line("sample_diversity", "diversity", "(1 − MS-SSIM)", "sample_diversity_error"),
        _Line("data_diversity", "diversity of the data"),
        _Line("data_copying", "data copying", "z-score; far below 0 for copies"),
    ),
    "calibration": (
        _Line("sbc_p_value", "simulation-based calibration", "(p-value)"),
        _Line("tarp_p_value", "TARP", "(p-value)"),
    ),
    "gap": (
        _Line("approximation_gap", "approximation gap", "nats, of {gap_observations} observations"),
        _Line("amortization_gap", "amortization gap", "nats"),
    ),
    "annealing": (
        _Line(
            "annealed_log_likelihood",
            "log-likelihood, annealed",
            "nats, of {annealed_observations} observations",
            "annealed_log_likelihood_error",
        ),
        _Line("annealing_gap", "gap of both bounds", "nats, on simulated observations"),
    ),
    "wasserstein": (_Line("wasserstein", "Wasserstein distance", "by a critic", "wasserstein_error"),),
    "reference": (
        _Line(
            "c2st", "C2ST against NUTS", "accuracy, of {reference_observations} observations; R̂ {reference_r_hat:.2f}"
        ),
        _Line("sliced_wasserstein", "sliced Wasserstein against NUTS"),
    ),
}
"""What is printed of each part."""


@checked(but=("x",))
def evaluate(
    run: Run,
    x: Data | Tensor | Sequence[Tensor],
    *,
    parts: Sequence[str] | str = DEFAULT,
    particles: int = 1000,
    features: Callable | None = None,
    training: Tensor | None = None,
    explicit_steps: int = 300,
    ratio_steps: int = 500,
    seed: int = 0,
    rows: int = ROWS,
    compile: bool = False,
    after_part: Callable[[Evaluation], Any] | None = None,
) -> Evaluation:
    r"""Evaluate a run on observations it was not trained on.

    Whatever the run was trained with, the bound is the plain evidence lower bound (:func:`rate_distortion
    <pyrogen.evaluation.rate_distortion>`), and the log-likelihood comes from importance sampling with the guide
    (:func:`importance_sampling <pyrogen.evaluation.importance_sampling>`):

    .. math:: \text{ELBO} = -\text{rate} - \text{distortion} \le \log p(x)
        \approx \log \frac{1}{K} \sum_{k=1}^{K} \frac{p(x, z_k)}{q(z_k \mid x)}

    =============== ===================================================================================================
    part            figures
    =============== ===================================================================================================
    ``bound``       ELBO, rate, distortion, active units
    ``likelihood``  log-likelihood with its errors, effective sample size, Pareto k̂, bits per dimension
    ``critics``     what critics say of the rate and the marginal divergence where no exact figure stands
    ``aggregate``   how far q(z) is from p(z): mutual information, marginal KL and its parts, holes, MMD
    ``samples``     how far samples are from x: precision, recall, density, coverage, FID, KID; with a classifier
                    Inception Score and diversity; with training data a test for copies of them
    ``calibration`` simulation-based calibration and TARP
    ``gap``         the inference gap of the first 64 observations, in two parts
    ``annealing``   the log-likelihood of the first 64 without a guide, and how tight that is
    ``wasserstein`` the distance of samples to x by a critic fitted afterwards
    ``reference``   C2ST and sliced Wasserstein distance to draws by NUTS, for the first four observations
    =============== ===================================================================================================

    The first six, which take seconds on small data, are made by default, and the others take minutes; the functions of
    the same names in :mod:`pyrogen.evaluation` say more and have options. With a guide that is a point mass at a latent
    site, rate, bound and log-likelihood are not defined; without a guide nothing is that needs one, unless the model
    has no latent sites. Such figures are NaN and shown as "not defined", with the reason.

    With a guide that has implicit sites the log-likelihood comes from an explicit guide, fitted here to the frozen
    model and to these observations (:func:`explicit_guide <pyrogen.evaluation.explicit_guide>`), which is legitimate: a
    proposal may depend on x. Rate and ELBO are not known. What critics say of the rate stands beside them as an
    estimate, those of the training first and then others that are fitted here and calibrated
    (:func:`held_out_rate_estimate <pyrogen.evaluation.held_out_rate_estimate>`). With an implicit prior or likelihood
    there is no log p(x, z), and no log-likelihood by any guide.

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``; a tuple of tensors that the programs take; or what
            :func:`pyrogen.data.load` returned, of which the test split is used.
        parts: Which of the parts, by name; ``"all"`` for all.
        particles: Number K of draws for each observation.
        features: A network from observations to vectors ``(B, F)`` in whose space samples are compared, such as a
            :func:`feature_classifier <pyrogen.evaluation.feature_classifier>` of the data; by default their values.
        training: The observations that the run was trained on, to see whether samples are copies of them.
        explicit_steps: Steps in which an explicit guide is fitted where the run's has implicit sites; 0 leaves the
            log-likelihood out.
        ratio_steps: Steps in which critics are fitted for held-out estimates, and as many for each of two or three
            calibrations; 0 leaves these out.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.
        compile: Run the likelihood and annealing by compiled graphs, see :func:`importance_sampling
            <pyrogen.evaluation.importance_sampling>`: worth it from a few minutes on.
        after_part: Called after each part with all that was found until then, to show it or to keep it.

    Returns:
        The figures; ``print`` shows them as a table.

    Raises:
        TypeError: If ``x`` is none of these.
        ValueError: If a part is not known, x is empty, holds NaN or infinity, or has another shape or other values than
            the model observes.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(), data, epochs=1, progress=False)
        >>> evaluation = evaluate(run, data.test[:20], parts=["bound", "likelihood"], particles=10)
        >>> evaluation.observations, evaluation.latent_units
        (20, 2)
    """
    started = time.perf_counter()
    if not isinstance(run, Run):
        raise TypeError(f"expected run as fit returned it, a Run, got {type(run).__name__}")
    if features is not None and not callable(features):
        raise TypeError(f"expected features as a network from observations to vectors, got {features!r}")
    chosen = known_parts(parts)
    x = x.test if isinstance(x, Data) else x
    for name, steps in (("explicit_steps", explicit_steps), ("ratio_steps", ratio_steps)):
        if steps < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, got {steps!r}")
    with prepared(run.model, run.guide, x, seed=seed, particles=particles, rows=rows, guided=False) as pair:
        units = _latent_units(pair)
    _check_space(pair, features, training)
    subject = Subject(run, pair, particles, explicit_steps, ratio_steps, features, training, seed, rows, compile)
    found = Evaluation(len(pair.batch[0]), units, particles, seconds=0.0)
    for name in chosen:
        before = time.perf_counter()
        figures = subject.defined(name, lambda: PARTS[name](subject)) or {}  # noqa: B023
        now = time.perf_counter()
        found = dataclasses.replace(
            found,
            seconds=now - started,
            seconds_of=found.seconds_of | {name: now - before},
            reasons={part: "; ".join(reasons) for part, reasons in subject.reasons.items()},
            **figures,
        )
        if after_part is not None:
            after_part(found)
    return found


def _check_space(pair: Prepared, features: Any, training: Any) -> None:
    """See that what samples are compared in and with goes with the observations."""
    x = pair.batch[0]
    if features is not None:
        try:
            features_of(features, x=x[:2])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(f"features can't be called with observations {tuple(x.shape[1:])}: {error}") from error
    if training is not None and (not isinstance(training, Tensor) or training.shape[1:] != x.shape[1:]):
        came = tuple(training.shape) if isinstance(training, Tensor) else type(training).__name__
        raise ValueError(f"expected training as a tensor (N, {', '.join(map(str, x.shape[1:]))}) as x is, got {came}")


def _latent_units(pair: Prepared) -> int:
    """How many numbers the per-observation latent sites have for each observation."""
    return sum(
        math.prod(site.shape) * math.prod(plate.size for plate in site.plates if plate.name != "data")
        for site in pair.latents.values()
        if not site.is_global
    )

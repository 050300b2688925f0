"""The table of a comparison: which columns it shows, in which sections, and which figures are the best."""

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from pyrogen.inference import Run

__all__ = ["COLUMNS", "Column", "Comparison", "printable", "row_of", "slug", "steps_of"]

WIDTH = 160
"""Characters up to which the sections of a printed table stand side by side."""


@dataclass(frozen=True)
class Column:
    """How a column is shown.

    Attributes:
        heading: What stands above it.
        format: How a figure is rounded.
        section: The part of the table to which it belongs.
        best: Which figures are the better ones; None where neither are: for a trade-off, for what critics report, which
            bounds nothing, and for figures that can't be compared from one fit to another.
        error: The column of its standard errors, if there is one, which stand beside it.
        excess: The column that says by how much at most it is too large.
        of_observations: Whether it is a log-density of observations: in nats these can be compared only where all are
            densities, or all are probabilities.
        about: What it is, in a line, for a report.
    """

    heading: str
    format: str = "{:.2f}"
    section: str = "likelihood"
    best: Literal["highest", "lowest"] | None = None
    error: str | None = None
    excess: str | None = None
    of_observations: bool = False
    about: str = ""


_LATENT, _SAMPLES, _POSTERIOR, _ANNEALING = "latent space", "samples", "posterior", "annealed importance sampling"

COLUMNS: dict[str, Column] = {
    "log_likelihood": Column(
        "log p(x)",
        best="highest",
        error="log_likelihood_error",
        of_observations=True,
        about="log-likelihood of the rows, by importance sampling, with the standard error of its mean over them",
    ),
    "explicit_guide": Column(
        "log p(x) by",
        "{} guide, fitted afterwards",
        about="what the log-likelihood rests on where the fit's own guide has no density",
    ),
    "elbo": Column(
        "ELBO",
        best="highest",
        error="elbo_error",
        of_observations=True,
        about="evidence lower bound, −(rate + distortion), whatever was optimised",
    ),
    "rate": Column("rate", about="E KL(q(z|x) ‖ p(z))"),
    "rate_estimate": Column("rate (estimate)", about="the rate according to the critics of the training; no bound"),
    "held_out_rate_estimate_shown": Column(
        "rate (held-out estimate)", "{}", about="the rate according to critics fitted afterwards; no bound"
    ),
    "marginal_kl_estimate": Column(
        "marginal KL (estimate)", about="KL(q(z) ‖ p(z)) according to the critic of the training; no bound"
    ),
    "held_out_marginal_kl_estimate_shown": Column(
        "marginal KL (held-out estimate)", "{}", about="the same by a critic fitted afterwards; no bound"
    ),
    "distortion": Column("distortion", about="−E log p(x|z)"),
    "bits_per_dimension": Column(
        "bits/dim", "{:.3f}", about="−log p(x) / (D log 2), where the values of an observation are discrete"
    ),
    "active_units": Column(
        "active units", "{:.0f}", about="latent units whose posterior mean differs between observations"
    ),
    "effective_sample_size": Column(
        "ESS", "{:.0f}", about="what the particles are worth in equally weighted draws; the median over rows"
    ),
    "seconds": Column("train s", "{:.1f}", about="seconds of training"),
    "parameters": Column("parameters", "{:.0f}", about="how many numbers are trained, in model and guide"),
    "mutual_information": Column(
        "mutual information", section=_LATENT, error="mutual_information_error", about="I(x; z) of the guide, in nats"
    ),
    "marginal_kl": Column(
        "marginal KL",
        section=_LATENT,
        best="lowest",
        error="marginal_kl_error",
        excess="marginal_kl_excess",
        about="KL(q(z) ‖ p(z)), in nats",
    ),
    "total_correlation": Column(
        "total correlation", section=_LATENT, error="total_correlation_error", about="KL(q(z) ‖ ∏ q(z_j)), a part of it"
    ),
    "dimension_wise_kl": Column("dimension-wise KL", section=_LATENT, about="Σ KL(q(z_j) ‖ p(z_j)), the other part"),
    "prior_holes": Column(
        "prior holes",
        "{:.3f}",
        section=_LATENT,
        best="lowest",
        error="prior_holes_error",
        about="the share of the prior's mass where there is hardly any of q(z)",
    ),
    "mmd_p_value": Column(
        "q(z) = p(z), p", "{:.3f}", section=_LATENT, about="the p-value of that, by the maximum mean discrepancy"
    ),
    "precision": Column(
        "precision",
        "{:.3f}",
        _SAMPLES,
        "highest",
        error="precision_error",
        about="the share of samples that lie among data",
    ),
    "recall": Column(
        "recall", "{:.3f}", _SAMPLES, "highest", error="recall_error", about="the share of data that lie among samples"
    ),
    "density": Column("density", "{:.3f}", _SAMPLES, about="how densely data lie around samples; 1 for more data"),
    "coverage": Column(
        "coverage",
        "{:.3f}",
        _SAMPLES,
        "highest",
        error="coverage_error",
        about="the share of data with a sample nearby",
    ),
    "frechet_distance": Column(
        "Fréchet distance",
        "{:.2f}",
        _SAMPLES,
        "lowest",
        error="frechet_distance_error",
        about="FID, between features where there is a network for these, otherwise between values",
    ),
    "kernel_distance": Column(
        "kernel distance", "{:.4f}", _SAMPLES, "lowest", error="kernel_distance_error", about="KID, likewise"
    ),
    "inception_score": Column(
        "Inception Score",
        "{:.2f}",
        _SAMPLES,
        "highest",
        error="inception_score_error",
        about="by a classifier of the data",
    ),
    "sample_diversity": Column(
        "diversity", "{:.3f}", _SAMPLES, error="sample_diversity_error", about="1 − MS-SSIM of pairs of samples"
    ),
    "data_copying": Column(
        "data copying", "{:.1f}", _SAMPLES, about="a z-score, far below 0 for copies of training data"
    ),
    "wasserstein": Column(
        "Wasserstein (estimate)",
        section=_SAMPLES,
        error="wasserstein_error",
        about="the distance of samples to data by a critic fitted afterwards; no bound",
    ),
    "pareto_k": Column("Pareto k", section=_POSTERIOR, about="the median; up to 0.7 importance weights can be trusted"),
    "pareto_k_untrusted": Column("k > 0.7", "{:.0%}", _POSTERIOR, about="the share of rows with a larger one"),
    "sbc_p_value": Column(
        "SBC, p", "{:.3f}", _POSTERIOR, about="of simulation-based calibration; small for a wrong guide"
    ),
    "tarp_p_value": Column("TARP, p", "{:.3f}", _POSTERIOR, about="of the coverage around random points, likewise"),
    "approximation_gap": Column("approximation gap", section=_POSTERIOR, about="what the family loses of the bound"),
    "amortization_gap": Column("amortization gap", section=_POSTERIOR, about="what the encoder loses of it"),
    "c2st": Column(
        "C2ST", "{:.3f}", _POSTERIOR, about="accuracy of a classifier of draws by guide and NUTS; 0.5 is best"
    ),
    "sliced_wasserstein": Column("sliced Wasserstein", "{:.3f}", _POSTERIOR, about="between the same draws"),
    "reference_r_hat": Column("R̂ of NUTS", "{:.3f}", _POSTERIOR, about="the largest of the draws by NUTS"),
    "annealed_log_likelihood": Column(
        "log p(x), annealed",
        section=_ANNEALING,
        best="highest",
        error="annealed_log_likelihood_error",
        of_observations=True,
        about="without a guide, of the first rows, with the standard error from the number of chains",
    ),
    "annealing_gap": Column(
        "gap of bounds", section=_ANNEALING, about="between both bounds, on simulated observations"
    ),
}
"""What is shown, in this order; the table itself has more and is not rounded. A column is added by a line here."""

_ESTIMATES = [name for name, column in COLUMNS.items() if "estimate" in column.heading]


def slug(name: str) -> str:
    """A name as that of a folder: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "fit"


def printable(text: str) -> str:
    """Text for a terminal, to which control characters in it would be orders.

    Example:
        >>> print(printable("red: \\x1b[31m"))
        red: \\x1b[31m
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: repr(found[0])[1:-1], text)


def row_of(run: Run, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the figures of an evaluation, time and steps of the training, and how much was trained."""
    critics = {id(p) for p in run.objective.critics.parameters()}
    trained = {id(p): p for p in run.programs.parameters() if p.requires_grad and id(p) not in critics}
    parameters = sum(p.numel() for p in trained.values())
    return {**figures, "seconds": run.seconds, "steps": steps_of(run), "parameters": parameters}


def steps_of(run: Run) -> int:
    """How many steps a run has been trained for, by which figures of an earlier state are told from its own."""
    return 0 if run.history.empty else int(run.history["step"].iloc[-1])


class Comparison(pd.DataFrame):
    """A table with one row for each fit, and the fits themselves.

    Its columns are the fields of :class:`pyrogen.evaluation.Evaluation`, with ``seconds`` and ``steps`` for the
    training and ``parameters`` for how many are trained in model and guide. It is a ``pandas.DataFrame`` that prints
    rounded.

    Attributes:
        runs: The fits by name.
        evaluated_on: What the figures were computed on.
        left_out: What was not fitted, by name, and why.
        failed: The fits of workers that failed, by name, and why.
    """

    _metadata = ["runs", "evaluated_on", "left_out", "failed"]  # noqa: RUF012  pandas' own way to keep attributes
    runs: dict[str, Run]
    evaluated_on: str
    left_out: dict[str, str]
    failed: dict[str, str]

    @classmethod
    def of(
        cls,
        rows: list[dict[str, Any]],
        runs: dict[str, Run],
        evaluated_on: str,
        left_out: dict[str, str] | None = None,
    ) -> "Comparison":
        """The table of rows in the order of the runs."""
        table = cls(rows, index=pd.Index([*runs], name="guide"))
        pairs = ((name, column.error) for name, column in COLUMNS.items())
        shown = [name for pair in pairs for name in pair if name in table.columns]
        table = table[shown + [name for name in table.columns if name not in shown]]
        table.runs, table.evaluated_on = runs, evaluated_on
        table.left_out, table.failed = left_out or {}, {}
        return table

    @property
    def _constructor(self) -> type["Comparison"]:
        return Comparison

    def sections(self) -> dict[str, list[str]]:
        """The columns that are shown and hold any figure, by section."""
        found: dict[str, list[str]] = {}
        for name, column in COLUMNS.items():
            if name in self.columns and self[name].notna().any():
                found.setdefault(column.section, []).append(name)
        return found

    def cells(self, name: str) -> list[str]:
        """A column as it is shown: rounded, with standard errors, and a dash for what is not known."""
        column = COLUMNS[name]
        errors = self[column.error] if column.error in self.columns else [math.nan] * len(self)
        figures = self._figures(name)
        return [
            figure if pd.isna(error) or figure == "–" else f"{figure} ± {column.format.format(error)}"
            for figure, error in zip(figures, errors, strict=True)
        ]

    def _figures(self, name: str) -> list[str]:
        column = COLUMNS[name]
        few = name.endswith("p_value")
        return [
            "–" if pd.isna(value) else "<0.001" if few and value < 0.001 else column.format.format(value)
            for value in self[name]
        ]

    def best(self) -> dict[str, list[bool]]:
        r"""Of each column that has better and worse figures, which can't be told from the best.

        Figure i is one of the best if it is no more than two standard errors from the best figure b, and what it may be
        too large by, e; their errors are taken for independent. Where errors are not known, it is one of the best if
        it is shown as the same number.

        .. math:: |v_i - v_b| \le 2 \sqrt{s_i^2 + s_b^2} + e_i

        Fits evaluated on the same rows err together, so that more are called the best than would be by the errors of
        their differences. A column is left out where its figures can't be compared: with fewer than two fits, with
        log-densities of some fits beside log-probabilities of others, and bounds where q(θ) of global sites has a
        divergence besides.

        Example:
            >>> rows = [{"log_likelihood": v, "log_likelihood_error": 0.3} for v in (-22.6, -23.1, -25.0)]
            >>> Comparison(rows).best()
            {'log_likelihood': [True, True, False]}
        """
        columns = [(name, COLUMNS[name]) for names in self.sections().values() for name in names]
        return {name: self._best(name, column) for name, column in columns if self._has_best(name, column)}

    def _has_best(self, name: str, column: Column) -> bool:
        known = self[self[name].notna()]
        if column.best is None or len(known) < 2:
            return False
        if name == "elbo" and self._has("global_rate"):
            return False
        discrete = known["bits_per_dimension"].notna() if "bits_per_dimension" in known else pd.Series([True])
        return not column.of_observations or discrete.nunique() == 1

    def _best(self, name: str, column: Column) -> list[bool]:
        values = self[name].to_numpy(dtype=float)
        sign = 1.0 if column.best == "highest" else -1.0
        place = int(np.nanargmax(sign * values))
        if column.error in self.columns:
            errors = self[column.error].to_numpy(dtype=float)
            excess = self[column.excess].to_numpy(dtype=float) if column.excess in self.columns else 0.0
            near = np.abs(values - values[place]) <= 2 * np.hypot(errors, errors[place]) + np.nan_to_num(excess)
        else:
            near = np.zeros(len(values), dtype=bool)
        shown = self._figures(name)
        return [bool(is_near) or text == shown[place] for is_near, text in zip(near, shown, strict=True)]

    def __repr__(self) -> str:
        sections = self.sections()
        if self.empty or not sections:
            return super().__repr__()
        printed = {title: self._shown(names).to_string() for title, names in sections.items()}
        whole = self._shown([name for names in sections.values() for name in names]).to_string()
        if len(sections) > 1 and max(map(len, whole.splitlines())) > WIDTH:
            first, *others = printed.items()
            whole = "\n".join([first[1], *(f"\n{title}\n{table}" for title, table in others)])
        return printable(f"{whole}\n{self.note()}")

    def _shown(self, names: list[str]) -> pd.DataFrame:
        headings = [COLUMNS[name].heading for name in names]
        cells = zip(*(self.cells(name) for name in names), strict=True)
        return pd.DataFrame([*cells], columns=headings, index=[*self.index])

    def _repr_html_(self) -> str:
        if self.empty or not self.sections():
            return pd.DataFrame(self).to_html()
        tables = (
            f"<p>{html.escape(title)}</p>{self._shown(names).to_html()}" for title, names in self.sections().items()
        )
        return f"{''.join(tables)}<p>{html.escape(self.note())}</p>"

    def _has(self, name: str) -> bool:
        return name in self.columns and bool(self[name].notna().any())

    def note(self) -> str:
        """What has to be known to read the table."""
        note = "Nats per observation"
        if "observations" in self.columns and "particles" in self.columns:
            rows = f"{_span(self['observations'])} {getattr(self, 'evaluated_on', 'rows')}"
            note += f", on {rows}; log p(x) with its standard error, from {_span(self['particles'])} particles"
        note += "."
        rests = [
            f"{title} {_span(self[name])} {what}".strip() for name, (title, what) in _RESTS.items() if self._has(name)
        ]
        if rests:
            note += f" Sizes: {'; '.join(rests)}."
        if self._has("compared_in"):
            note += f" Samples are compared in {' or '.join(dict.fromkeys(self['compared_in'].dropna()))}."
        if self._has("marginal_kl_excess"):
            most = self["marginal_kl_excess"].max()
            note += f" Marginal KL and total correlation are up to {most:.2f} too large, for want of more rows."
        if left_out := getattr(self, "left_out", {}):
            note += f" Left out, for want of a density that the objective needs: {', '.join(left_out)}."
        for name, reason in getattr(self, "failed", {}).items():
            note += f"\nFailed: {name} ({reason})."
        if any(self._has(name) for name in _ESTIMATES):
            note += (
                '\nEstimates are what critics report, and bound nothing; "> x" where critics are no longer within 10 % '
                "of divergences that are known."
            )
        return note


_RESTS = {
    "sample_size": ("", "samples against as many rows"),
    "aggregated_observations": ("q(z) of", "rows"),
    "gap_observations": ("inference gap on", "rows"),
    "annealed_observations": ("annealing on", "rows"),
    "reference_observations": ("NUTS on", "rows"),
}
"""How many samples or rows figures rest on, by the column that says so."""


def _span(counts: pd.Series) -> str:
    """A count, or the least and the greatest where there are several."""
    least, greatest = counts.min(), counts.max()
    if math.isnan(least):
        return "?"
    return f"{least:.0f}" if least == greatest else f"{least:.0f} to {greatest:.0f}"

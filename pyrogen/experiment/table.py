"""The table of a comparison."""

from typing import Any

import pandas as pd

from pyrogen.inference import Run

__all__ = ["Comparison"]

_COLUMNS = {
    "log_likelihood": ("log p(x)", "{:.2f}"),
    "log_likelihood_error": ("±", "{:.2f}"),
    "explicit_guide": ("log p(x) by", "{} guide, fitted afterwards"),
    "elbo": ("ELBO", "{:.2f}"),
    "rate": ("rate", "{:.2f}"),
    "rate_estimate": ("rate (estimate)", "{:.2f}"),
    "held_out_rate_estimate_shown": ("rate (held-out estimate)", "{}"),
    "marginal_kl_estimate": ("marginal KL (estimate)", "{:.2f}"),
    "held_out_marginal_kl_estimate_shown": ("marginal KL (held-out estimate)", "{}"),
    "distortion": ("distortion", "{:.2f}"),
    "bits_per_dimension": ("bits/dim", "{:.3f}"),
    "active_units": ("active units", "{:.0f}"),
    "effective_sample_size": ("ESS", "{:.0f}"),
    "seconds": ("train s", "{:.1f}"),
    "parameters": ("parameters", "{:d}"),
}
"""What is shown, under which heading and how rounded; the table itself has more and is not rounded."""

_ESTIMATES = [name for name in _COLUMNS if "estimate" in name]


class Comparison(pd.DataFrame):
    """A table with one row for each fit, and the fits themselves.

    Its columns are the fields of :class:`pyrogen.evaluation.Evaluation`, with ``seconds`` for the training and
    ``parameters`` for how many are trained in model and guide. It is a ``pandas.DataFrame`` that prints rounded.

    Attributes:
        runs: The fits by name.
        evaluated_on: What the figures were computed on.
        left_out: What was not fitted, by name, and why.
    """

    _metadata = ["runs", "evaluated_on", "left_out"]  # noqa: RUF012  pandas' own way to keep attributes
    runs: dict[str, Run]
    evaluated_on: str
    left_out: dict[str, str]

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
        shown = [name for name in _COLUMNS if name in table.columns]
        table = table[shown + [name for name in table.columns if name not in shown]]
        table.runs, table.evaluated_on, table.left_out = runs, evaluated_on, left_out or {}
        return table

    @property
    def _constructor(self) -> type["Comparison"]:
        return Comparison

    def __repr__(self) -> str:
        shown = [name for name in _COLUMNS if name in self.columns and self[name].notna().any()]
        if self.empty or not shown:
            return super().__repr__()
        table = pd.DataFrame(
            {_COLUMNS[name][0]: [self._cell(name, value) for value in self[name]] for name in shown},
            index=pd.Index(self.index, name=None),
        )
        return f"{table.to_string()}\n{self._note()}"

    @staticmethod
    def _cell(name: str, value: Any) -> str:
        return "–" if pd.isna(value) else _COLUMNS[name][1].format(value)

    def _note(self) -> str:
        note = "Nats per observation"
        if "observations" in self.columns and "particles" in self.columns:
            rows = f"{self['observations'].iloc[0]} {getattr(self, 'evaluated_on', 'rows')}"
            note += f", on {rows}; log p(x) with its standard error, from {self['particles'].iloc[0]} particles"
        note += "."
        if left_out := getattr(self, "left_out", {}):
            note += f" Left out, for want of a density that the objective needs: {', '.join(left_out)}."
        if any(name in self.columns and self[name].notna().any() for name in _ESTIMATES):
            note += (
                '\nEstimates are what critics report, and bound nothing; "> x" where critics are no longer within 10 % '
                "of divergences that are known."
            )
        return note

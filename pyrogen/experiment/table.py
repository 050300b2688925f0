"""The table of a comparison."""

from typing import Any

import pandas as pd

from pyrogen.inference import Run

__all__ = ["Comparison"]

_COLUMNS = {
    "log_likelihood": ("log p(x)", "{:.2f}"),
    "log_likelihood_error": ("±", "{:.2f}"),
    "elbo": ("ELBO", "{:.2f}"),
    "rate": ("rate", "{:.2f}"),
    "distortion": ("distortion", "{:.2f}"),
    "bits_per_dimension": ("bits/dim", "{:.3f}"),
    "active_units": ("active units", "{:.0f}"),
    "effective_sample_size": ("ESS", "{:.0f}"),
    "seconds": ("train s", "{:.1f}"),
    "parameters": ("parameters", "{:d}"),
}
"""What is shown, under which heading and how rounded; the table itself has more and is not rounded."""


class Comparison(pd.DataFrame):
    """A table with one row for each fit, and the fits themselves.

    Its columns are the fields of :class:`pyrogen.evaluation.Evaluation`, with ``seconds`` for the training and
    ``parameters`` for how many are trained in model and guide. It is a ``pandas.DataFrame`` that prints rounded.

    Attributes:
        runs: The fits by name.
        evaluated_on: What the figures were computed on.
    """

    _metadata = ["runs", "evaluated_on"]  # noqa: RUF012  pandas' own way to keep attributes
    runs: dict[str, Run]
    evaluated_on: str

    @classmethod
    def of(cls, rows: list[dict[str, Any]], runs: dict[str, Run], evaluated_on: str) -> "Comparison":
        """The table of rows in the order of the runs."""
        table = cls(rows, index=pd.Index([*runs], name="guide"))
        shown = [name for name in _COLUMNS if name in table.columns]
        table = table[shown + [name for name in table.columns if name not in shown]]
        table.runs, table.evaluated_on = runs, evaluated_on
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
        return note + "."

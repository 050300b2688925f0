"""The table: its sections, how it prints, and which figures are called the best."""

import math
from typing import Any

import pandas as pd
import pytest

from pyrogen.evaluation import Evaluation
from pyrogen.experiment import table as tables
from pyrogen.experiment.table import COLUMNS, Column, Comparison, slug

NAMES = ("mean field", "flow", "implicit")
RUNS: dict[str, Any] = dict.fromkeys(NAMES)


def of(**columns: list[Any]) -> Comparison:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Comparison.of(rows, {name: RUNS[name] for name in NAMES[: len(rows)]}, "test rows")


def test_columns_are_of_the_evaluation():
    fields = {*Evaluation.__dataclass_fields__, "parameters"}
    assert COLUMNS.keys() <= fields
    assert all(column.error is None or column.error in fields for column in COLUMNS.values())


@pytest.mark.parametrize("name", [name for name, column in COLUMNS.items() if column.best])
def test_nothing_that_critics_report_has_a_best(name):
    assert "estimate" not in name and name not in ("rate", "distortion", "wasserstein")


def test_the_best_are_within_two_errors_of_the_difference():
    # 2 sqrt(0.3² + 0.4²) = 1, from which the second is 0.9 away and the third 1.1.
    near = of(log_likelihood=[-20.0, -20.9, -21.1], log_likelihood_error=[0.3, 0.4, 0.4])
    assert near.best() == {"log_likelihood": [True, True, False]}


def test_without_errors_the_best_is_what_is_shown_as_the_same():
    assert of(elbo=[-20.001, -20.004, -20.2]).best() == {"elbo": [True, True, False]}
    unknown = of(log_likelihood=[-20.0, -20.5, -21.0], log_likelihood_error=[math.nan] * 3)
    assert unknown.best() == {"log_likelihood": [True, False, False]}


def test_lower_may_be_better(monkeypatch):
    monkeypatch.setitem(COLUMNS, "fid", Column("FID", "{:.1f}", "samples", best="lowest"))
    assert of(fid=[3.0, 2.0, 9.0]).best() == {"fid": [False, True, False]}


def test_what_is_not_known_is_not_the_best():
    assert of(elbo=[math.nan, -20.0, -21.0]).best() == {"elbo": [False, True, False]}


def test_one_figure_alone_is_not_the_best():
    assert of(elbo=[math.nan, -20.0, math.nan]).best() == {}
    assert of(elbo=[-20.0]).best() == {}


def test_densities_are_not_held_against_probabilities():
    figures: dict[str, list[Any]] = {"elbo": [-20.0, 300.0, -21.0], "log_likelihood": [-19.0, 310.0, -20.0]}
    assert of(**figures, bits_per_dimension=[0.5, math.nan, 0.6]).best() == {}
    assert [*of(**figures, bits_per_dimension=[math.nan] * 3).best()] == ["log_likelihood", "elbo"]
    # A fit without a log-likelihood, such as a GAN, is no reason.
    figures = {"log_likelihood": [-19.0, math.nan, -20.0]}
    assert of(**figures, bits_per_dimension=[0.5, math.nan, 0.6]).best() == {"log_likelihood": [True, False, False]}


def test_bounds_beside_a_divergence_of_global_sites_have_no_best():
    elbo = {"elbo": [-20.0, -21.0], "log_likelihood": [-19.0, -20.0]}
    assert [*of(**elbo, global_rate=[3.0, math.nan]).best()] == ["log_likelihood"]
    assert [*of(**elbo, global_rate=[math.nan, math.nan]).best()] == ["log_likelihood", "elbo"]


def test_a_divergence_that_may_be_too_large_is_not_told_from_the_best():
    figures: dict[str, list[Any]] = {"marginal_kl": [3.0, 1.0, 1.8], "marginal_kl_error": [0.1, 0.1, 0.1]}
    table = of(**figures, marginal_kl_excess=[1.0, 0.2, 0.7])
    assert table.best() == {"marginal_kl": [False, True, True]}
    assert "up to 1.00 too large, for want of more rows" in table.note()
    assert of(**figures).best() == {"marginal_kl": [False, True, False]}


def test_an_error_that_is_not_known_is_not_0():
    figures: dict[str, list[Any]] = {"elbo": [-20.0, -20.5], "elbo_error": [1.0, math.nan]}
    assert of(**figures).best() == {"elbo": [True, False]}


def test_a_notebook_shows_what_is_printed():
    shown = of(elbo=[-20.0, -21.0], elbo_error=[0.1, 0.2], reasons=[{}, {"bound": "why"}])._repr_html_()
    assert "ELBO" in shown and "-21.00 ± 0.20" in shown and "reasons" not in shown and "Nats per observation" in shown


def test_errors_stand_beside_their_figures():
    table = of(
        elbo=[-20.0, -21.0], elbo_error=[0.125, math.nan], precision=[0.5, math.nan], precision_error=[0.01, 0.1]
    )
    assert table.cells("elbo") == ["-20.00 ± 0.12", "-21.00"]
    assert table.cells("precision") == ["0.500 ± 0.010", "–"]
    assert [*table.columns] == ["elbo", "elbo_error", "precision", "precision_error"]


def wide(monkeypatch) -> Comparison:
    """A table with as many columns of two further sections as do not fit beside the first."""
    columns: dict[str, list[Any]] = {"log_likelihood": [-19.0, -20.0], "elbo": [-20.0, -21.0]}
    for section in ("one section", "another"):
        for k in range(9):
            monkeypatch.setitem(COLUMNS, f"{section} {k}", Column(f"{section} {k}", "{:.1f}", section))
            columns[f"{section} {k}"] = [k / 10, k + 0.5]
    return of(**columns)


def test_sections_are_printed_below_each_other_where_they_do_not_fit(monkeypatch):
    printed = repr(wide(monkeypatch)).splitlines()
    assert max(map(len, printed)) <= tables.WIDTH
    assert "log p(x)" in printed[0] and "one section 0" not in printed[0]
    for title in ("one section", "another"):
        place = printed.index(title)
        assert printed[place - 1] == "" and f"{title} 8" in printed[place + 1]
        assert [line.split("  ")[0] for line in printed[place + 2 : place + 4]] == ["mean field", "flow"]
    assert printed[-1].startswith("Nats per observation")


def test_sections_are_printed_side_by_side_where_they_fit(monkeypatch):
    monkeypatch.setitem(COLUMNS, "fid", Column("FID", "{:.1f}", "another"))
    printed = repr(of(elbo=[-20.0, -21.0], fid=[3.25, 4.0])).splitlines()
    assert "ELBO" in printed[0] and "FID" in printed[0] and "3.2" in printed[1]
    assert of(elbo=[-20.0], fid=[1.0]).sections() == {"likelihood": ["elbo"], "another": ["fid"]}


def test_a_section_alone_stays_in_one_line_however_wide():
    names = [name for name, column in COLUMNS.items() if column.section == "likelihood"]
    printed = repr(of(**{name: ["1" if "shown" in name else 1.0] for name in names}))
    assert len(printed.splitlines()[0]) > tables.WIDTH
    assert all(COLUMNS[name].heading in printed.splitlines()[0] for name in names)


def test_note_says_how_many_rows_and_particles():
    table = of(elbo=[-20.0, -21.0], observations=[180, 180], particles=[300, 1000])
    assert "on 180 test rows" in table.note() and "from 300 to 1000 particles" in table.note()


def test_a_table_without_known_columns_prints_as_pandas_does():
    assert repr(Comparison({"a": [1]})) == repr(pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize(("name", "expected"), [("Normal ELBO", "normal-elbo"), ("../<b>", "b"), ("…", "fit")])
def test_slug(name, expected):
    assert slug(name) == expected

"""Fits in folders, found by these or by the comparison that they are part of, with the figures noted beside them."""

import ast
import logging
import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyrogen.data import Data
from pyrogen.data.limits import check_links, parse_table, read_text, read_yaml
from pyrogen.evaluation.parts import DEFAULT
from pyrogen.experiment.table import slug, steps_of
from pyrogen.inference import Run, load
from pyrogen.inference.folders import COMPARISON, WEIGHTS, check_length, is_run

__all__ = ["Fitted", "collect", "read_evaluations"]

TABLE, EVALUATIONS = "table.csv", "evaluation.yaml"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fit on disk.

    Attributes:
        name: What it is called in a comparison, else its folder's name.
        folder: Where it is.
        run: The fit.
        evaluations: What was noted of it by ``pyrogen evaluate``.
        row: Its row in the table of its comparison, if there is one.
        from_settings: Whether that comparison says which rows it was evaluated on: the first of the test data.
    """

    name: str
    folder: Path
    run: Run
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] | None = None
    from_settings: bool = False

    def known(self, data: Data, split: str, count: int) -> dict[str, Any] | None:
        """Figures on the first rows of a split, the most that there are, and those from the most particles; or None."""
        source = data.source or data.name
        wanted = {"data": source, "split": split, "observations": count, "steps": steps_of(self.run)}
        found = [e for e in self.evaluations if e | wanted == e and {*DEFAULT} <= {*e.get("parts", ())}]
        if self.row and self._still_holds(self.row) and self._is_of(self.row, data, split, count):
            found.append(self.row | {"seed": self.run.options.seed})
        return max(found, key=lambda entry: (_count(entry), entry["particles"]), default=None)

    def _still_holds(self, row: dict[str, Any]) -> bool:
        """Whether the run has not been trained on since."""
        return bool(row.get("steps") == steps_of(self.run))

    def _is_of(self, row: dict[str, Any], data: Data, split: str, count: int) -> bool:
        """Whether the comparison was evaluated on the first so many rows of a split."""
        # One that a program started may have had any rows, but those of the whole split are likely the split.
        sure = self.from_settings or count == len(data.test)
        return split == "test" and self.run.data == data.source and row["observations"] == count and sure


def _count(entry: dict[str, Any]) -> int:
    """How many figures are known."""
    return sum(value is not None and value == value for value in entry.values())


def collect(folders: Sequence[str | Path], *, trust: bool = False) -> list[Fitted]:
    """Load the fits in folders.

    Args:
        folders: Each that of a fit, or of a comparison, which stands for all its fits. Fits that are given twice count
            once; one whose training is not complete is passed over where it is part of a comparison.
        trust: As for :func:`pyrogen.load`.

    Returns:
        The fits, with names that differ.

    Raises:
        ValueError: If a folder holds neither, a file is damaged, or a link leads out of a folder that is not trusted.
    """
    for folder in () if trust else folders:
        check_links(Path(folder))
    places = dict.fromkeys(place for folder in folders for place in _fits_in(check_length(folder, "the run's folder")))
    found = [_fitted(place, trust) for place in places]
    return [*_named_apart(found)]


def _fits_in(folder: Path) -> Iterable[Path]:
    if is_run(folder):
        return [folder.resolve()]
    if not (folder / COMPARISON).is_file():
        raise ValueError(f"{folder} holds neither a fit nor a comparison; give a folder that pyrogen wrote")
    there = sorted(path for path in folder.glob("*") if is_run(path))
    complete = [path for path in there if (path / WEIGHTS).is_file()]
    if not complete:
        raise ValueError(f"{folder} holds no complete fit; go on with the comparison by --resume")
    for path in there:
        if path not in complete:
            _log.warning("%s is left out: its training is not complete", path)
    order = [*_table_of(folder)]
    return sorted((path.resolve() for path in complete), key=lambda p: order.index(p.name) if p.name in order else 1e9)


def _table_of(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of a comparison, by the folder's name of each fit, its name and its row of the table."""
    path = folder / TABLE
    if not (folder / COMPARISON).is_file() or not path.is_file():
        return {}
    text = read_text(path)
    try:
        table = pd.read_csv(parse_table(text), index_col="guide")
        rows = {str(name): _plain(row) for name, row in table.iterrows()}
        if any(not {"observations", "particles", "log_likelihood"} <= row.keys() for row in rows.values()):
            raise ValueError("it lacks columns")
    except (ValueError, SyntaxError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy, or move it away") from error
    return {slug(name): (name, row) for name, row in rows.items()}


def _plain(row: pd.Series) -> dict[str, Any]:
    """A row of a table without what is empty, and with whole numbers as such."""
    values = {str(name): value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
    counts = ("observations", "particles", "active_units", "latent_units", "parameters", "steps")
    values |= {name: int(value) for name, value in values.items() if name in counts}
    return values | {"reasons": _reasons(values["reasons"])} if "reasons" in values else values


def _reasons(text: str) -> dict[str, str]:
    """A mapping of strings, which is the one thing that a table holds as Python writes it."""
    read = ast.literal_eval(text)
    if not isinstance(read, dict) or not all(isinstance(each, str) for item in read.items() for each in item):
        raise ValueError(f"expected reasons by the part that they are of, got {reprlib.repr(text)}")
    return read


def _fitted(folder: Path, trust: bool) -> Fitted:
    name, row = _table_of(folder.parent).get(folder.name, (folder.name, None))
    from_settings = row is not None and "options" not in (read_yaml(folder.parent / COMPARISON) or {})
    run = load(folder, trust=trust)
    return Fitted(name, folder, run, read_evaluations(folder / EVALUATIONS), row, from_settings)


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluations noted in a file, none if there is no such file.

    Raises:
        ValueError: If it holds something else.
    """
    known = read_yaml(path) if path.exists() else []
    keys = {"data", "split", "seed", "particles", "observations"}
    if not isinstance(known, list) or any(not isinstance(e, dict) or not keys <= e.keys() for e in known):
        raise ValueError(f"{path} is no list of evaluations; move it away")
    return known


def _named_apart(found: list[Fitted]) -> Iterable[Fitted]:
    """The same, where names are there twice with the folders' before them."""
    names = [each.name for each in found]
    longer = [f"{each.folder.parent.name}/{each.name}" for each in found]
    for each, name, long in zip(found, names, longer, strict=True):
        if names.count(name) > 1:
            name = long if longer.count(long) == 1 else str(each.folder)
        yield Fitted(name, each.folder, each.run, each.evaluations, each.row, each.from_settings)

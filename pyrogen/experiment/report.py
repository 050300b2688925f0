"""The report of a comparison: one page that needs nothing else, and the same as Markdown with pictures beside it."""

import base64
import html
import io
import itertools
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from pyrogen.data import Data
from pyrogen.experiment.report_blocks import Block, comparison_blocks, fit_blocks
from pyrogen.experiment.table import COLUMNS, Comparison, printable, slug
from pyrogen.inference import Run
from pyrogen.inference.checkpoints import atomically
from pyrogen.inference.run import settings_of

__all__ = ["REPORT", "Report", "Section", "Table", "write_report"]

REPORT = ("report.html", "report.md")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """A figure of the table as it is shown."""

    text: str
    best: bool = False

    @property
    def words(self) -> bool:
        """Whether it is words, which may take several lines."""
        return re.search(r"[A-Za-z]{2}", self.text) is not None


@dataclass(frozen=True)
class Table:
    """A section of the table: its title, its headings, and of each fit the cells."""

    title: str
    headings: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Picture:
    """A drawn figure: PNG, its size in pixels, and its place below the report's folder."""

    png: bytes = field(repr=False)
    path: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return struct.unpack(">II", self.png[16:24])

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A fit, or what concerns all of them: blocks with their pictures, and the configuration.

    Attributes:
        title: The name of the fit.
        anchor: The same as the end of an address and as the name of a folder.
        about: A line on what it is.
        blocks: What is shown, each with its picture or None.
        configuration: YAML, or nothing.
    """

    title: str
    anchor: str
    about: str
    blocks: list[tuple[Block, Picture | None]]
    configuration: str = ""


@dataclass(frozen=True)
class Report:
    """All that a report says, as its templates take it."""

    title: str
    facts: dict[str, str]
    note: str
    tables: list[Table]
    legend: dict[str, str]
    undefined: dict[str, str]
    whole: Section
    fits: list[Section]
    written_by: str

    @property
    def any_best(self) -> bool:
        """Whether a figure is marked."""
        return any(cell.best for table in self.tables for row in table.rows for cell in row)

    def html(self) -> str:
        """The page."""
        return _environment(escape=True).get_template("report.html.jinja").render(report=self)

    def markdown(self) -> str:
        """The Markdown file, whose links lead to the pictures beside it."""
        return _environment(escape=False).get_template("report.md.jinja").render(report=self)


def write_report(
    folder: Path,
    table: Comparison,
    rows: tuple[Tensor, ...],
    data: Any,
    seed: int = 0,
    *,
    blocks: Mapping[str, Sequence[Block]] | None = None,
) -> Path:
    """Write ``report.html``, ``report.md`` and the pictures of the latter, in ``figures/``; files there are replaced.

    The page holds its pictures and needs no network and no script. Drawing comes first, and each file is written
    whole, so that one which is there already is lost for nothing less than its successor.

    Args:
        folder: Where to.
        table: The comparison with its runs.
        rows: The rows that it was evaluated on.
        data: What was fitted; labels of test rows colour the latents, and samples are held against training rows.
        seed: Of the draws.
        blocks: By name of a fit, what else its section shall show, such as calibration plots; under the empty name,
            what concerns all fits.

    Returns:
        The page's path.
    """
    report = _report(table, rows, data, seed, blocks or {})
    folder.mkdir(parents=True, exist_ok=True)
    for section in (report.whole, *report.fits):
        for _, picture in section.blocks:
            if picture is not None:
                with atomically(folder / picture.path) as temporary:
                    temporary.write_bytes(picture.png)
    for name, text in zip(REPORT, (report.html(), report.markdown()), strict=True):
        with atomically(folder / name) as temporary:
            temporary.write_text(printable(text), encoding="utf-8")
    return folder / REPORT[0]


def _report(
    table: Comparison, rows: tuple[Tensor, ...], data: Any, seed: int, more: Mapping[str, Sequence[Block]]
) -> Report:
    names = [str(name) for name in table.index]
    histories = {name: run.history for name, run in table.runs.items()}
    whole = [*comparison_blocks(table, histories, rows[0]), *more.get("", ())]
    seeds = table["seed"].fillna(seed) if "seed" in table else [seed] * len(names)
    fits = []
    for name, anchor, evaluation_seed in zip(names, _distinct([f"fit-{slug(n)}" for n in names]), seeds, strict=True):
        run = table.runs[name]
        shown = [*fit_blocks(run, rows, data, seed, int(evaluation_seed)), *more.get(name, ())]
        fits.append(Section(name, anchor, _about(run), _drawn(shown, anchor), _configuration(run)))
    columns = [column for section in table.sections().values() for column in section]
    return Report(
        title=f"{_name_of(data)}: {len(fits)} {'fits' if len(fits) > 1 else 'fit'}",
        facts=_facts(data, table),
        note=table.note(),
        tables=_tables(table),
        legend={COLUMNS[name].heading: COLUMNS[name].about for name in columns if COLUMNS[name].about},
        undefined=_undefined(table),
        whole=Section("All fits", "all-fits", "", _drawn(whole, "all-fits")),
        fits=fits,
        written_by=", ".join(f"{name} {version(name)}" for name in ("pyrogen", "pyro-ppl", "torch")),
    )


def _distinct(names: list[str]) -> Iterator[str]:
    """Names made different from each other by a number behind."""
    seen: set[str] = set()
    for name in names:
        candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        seen.add(chosen := next(each for each in candidates if each not in seen))
        yield chosen


def _name_of(data: Any) -> str:
    return data.name if isinstance(data, Data) else "Data of your own"


def _facts(data: Any, table: Comparison) -> dict[str, str]:
    facts = {"rows": f"evaluated on {table.evaluated_on}"}
    if isinstance(data, Data):
        values = f"{data.levels} levels" if data.levels else data.values
        binarized = f", binarisation: {data.binarize}" if data.binarize else ""
        facts = {
            "data": data.name,
            "values": f"{values}{binarized}",
            "observation": " × ".join(str(size) for size in data.event_shape) or "a number",
            "rows": f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test",
        }
    if left_out := getattr(table, "left_out", {}):
        facts |= {f"left out: {name}": why for name, why in left_out.items()}
    return facts


def _about(run: Run) -> str:
    guide = "no guide" if run.guide is None else type(run.guide).__name__
    epochs = len(run.history)
    return f"{type(run.model).__name__}, {guide}, {run.objective!r}; {epochs} {'epoch' if epochs == 1 else 'epochs'}."


def _configuration(run: Run) -> str:
    return yaml.safe_dump(settings_of(run), sort_keys=False, allow_unicode=True, width=100)


def _tables(table: Comparison) -> list[Table]:
    best = table.best()
    found = []
    for title, names in table.sections().items():
        columns = []
        for name in names:
            marks = best.get(name, [False] * len(table))
            columns.append([Cell(_minus(text), mark) for text, mark in zip(table.cells(name), marks, strict=True)])
        rows = [list(cells) for cells in zip(*columns, strict=True)]
        found.append(Table(title, [COLUMNS[name].heading for name in names], rows))
    return found


def _undefined(table: Comparison) -> dict[str, str]:
    """Why figures are not defined, by the part of the evaluation and, where not of all fits, which."""
    told: dict[tuple[str, str], list[str]] = {}
    for name, reasons in zip(table.index, table.get("reasons", [{}] * len(table)), strict=True):
        for part, why in (reasons if isinstance(reasons, Mapping) else {}).items():
            told.setdefault((part, why), []).append(str(name))
    of_all = len(table)
    return {part if len(names) == of_all else f"{part}, {', '.join(names)}": why for (part, why), names in told.items()}


def _minus(text: str) -> str:
    """A number with the sign that is as wide as a plus."""
    return f"−{text[1:]}" if re.match(r"-\d", text) else text


def _drawn(blocks: Sequence[Block], folder: str) -> list[tuple[Block, Picture | None]]:
    places = _distinct([slug(block.title) for block in blocks])
    return [
        (block, None if block.figure is None else Picture(_png(block.figure), f"figures/{folder}/{place}.png"))
        for block, place in zip(blocks, places, strict=True)
    ]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.06)
    return file.getvalue()


def _environment(*, escape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("pyrogen.experiment", "."),
        autoescape=escape,  # noqa: S701 (Markdown has an escape of its own)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": _escaped, "fence": _fence}
    return environment


def _escaped(text: str) -> str:
    """Text without a meaning to Markdown, nor to the HTML that Markdown lets through."""
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fence(text: str) -> str:
    """A fence that no line of a text can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)

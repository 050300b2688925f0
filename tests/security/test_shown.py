"""Names that are shown give no orders: neither to the terminal, nor to what draws on it."""

import functools
import warnings

import pytest
import torch

import pyrogen as pg
from pyrogen import cli
from pyrogen.cli import main
from pyrogen.distributions import Normal
from pyrogen.experiment.table import printable
from pyrogen.inference import ELBO
from pyrogen.networks import MLP

NAMES = (
    "[/x]",
    "[bold]",
    "[red on",
    "\\[/x]",
    "a\x1b[2Jb",
    "\x1b]0;title\x07",
    "\u202egnp.",
    "\r\b\x9b1m",
    "$\\frac{$",
)
FEW = ("--parts", "likelihood", "--particles", "2", "--rows", "5")


def assert_harmless(*texts: str) -> None:
    assert not {*"".join(texts)} & {*"\x1b\x07\x08\r\x9b\u202e"}, texts


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_folders_of_any_name(name, run, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = run.rename(tmp_path / name)
    assert main(["evaluate", str(folder), *FEW]) == 0
    assert main(["sample", str(folder)]) == 0
    assert main(["sample", str(folder)]) == 2  # the samples are there
    captured = capsys.readouterr()
    assert_harmless(captured.out, captured.err)
    assert printable(name) in captured.out.replace("\n", "") and captured.err.count("pyrogen: error: ") == 1


def test_fits_of_any_name(capsys, tmp_path):
    """In the bar that shows how far a comparison is, in its table, pictures and report."""
    x = torch.rand(60, 3)
    model = pg.models.LatentVariableModel(
        pg.distributions.StandardNormal(2), pg.distributions.NormalLikelihood(MLP(2, 3, hidden=(4,)))
    )
    guides = {f"{name} {number}": (Normal, ELBO()) for number, name in enumerate(NAMES)}
    options = {"epochs": 1, "particles": 2, "parts": ["likelihood"], "progress": True}
    encoder = functools.partial(MLP, 3, 4, hidden=(4,))
    table = pg.compare(model, guides, encoder=encoder, data=x, out=tmp_path / "out", **options)
    assert [*table.index] == [*guides]
    assert_harmless(capsys.readouterr().err, str(table))
    assert main(["report", str(tmp_path / "out"), "--rows", "5", "--data", "none"]) == 2
    assert_harmless(capsys.readouterr().err)


def test_warnings_of_the_command_are_one_line_each(run, monkeypatch, capsys):
    def warned(*arguments):
        print(warnings.formatwarning("\x1b[2J\nof two", UserWarning, "file.py", 3), end="")
        return 0

    before = warnings.formatwarning
    monkeypatch.setattr(cli, "_run", warned)
    assert main(["sample", str(run)]) == 0 and warnings.formatwarning is before
    assert capsys.readouterr().out == "\\x1b[2J of two\n"


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("flag", ["--data", "--family", "--config", "--out"])
def test_what_is_not_known_is_named_in_one_line(flag, name, refused, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert_harmless(refused("fit", "--steps", "1", flag, f"file/{name}" if flag == "--out" else f"no such {name}"))

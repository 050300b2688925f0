"""The README's promises: every snippet and every command line in it runs, and its two commands are the ones in use.

The Python snippets run in order, in one namespace, in an empty folder; so do the command lines, with the snippet that
begins with the comment ``# my_model.py`` under that name. To be quick both are changed as ``QUICK`` and
``QUICK_OPTIONS`` say and in no other way.
"""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import pyrogen
from pyrogen import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = {"epochs=50": "epochs=1", "draws=1000": "draws=30"}
QUICK_OPTIONS = {
    "compare": ["--epochs", "1", "--batch_size", "512", "--particles", "10", "--test_rows", "20"],
    "fit": ["--epochs", "1", "--batch_size", "512"],
    "evaluate": ["--particles", "10"],
    "sample": [],
    "report": ["--rows", "20"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def quick(snippet: str) -> str:
    for long, short in QUICK.items():
        snippet = snippet.replace(long, short)
    return snippet


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def my_model() -> str:
    (found,) = [block for block in blocks("python") if block.startswith("# my_model.py\n")]
    return found


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_quick_replacement_has_its_place():
    assert [long for long in QUICK if long not in "".join(blocks("python"))] == []


def test_python_snippets_run(empty_folder, monkeypatch, capsys):
    # A module of its own, so that classes defined in the README have one, as they have in a user's file.
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    snippets = blocks("python")
    assert len(snippets) >= 6
    for number, snippet in enumerate(snippets):
        exec(compile(quick(snippet), f"README.md, Python snippet {number}", "exec"), module.__dict__)  # noqa: S102 (our own README)
    assert module.__dict__["images"].shape == (64, 1, 8, 8)
    assert [*module.__dict__["table"].index] == ["mean field", "flow", "flow, IWAE"]
    assert len(module.__dict__["run"].history) == 1
    assert "log-likelihood" in capsys.readouterr().out


def command_lines() -> list[list[str]]:
    """What follows ``pyrogen`` in every line of the README's shell blocks that begins with it."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("pyrogen ")]


def test_command_lines_run(empty_folder, capsys):
    Path("my_model.py").write_text(my_model(), encoding="utf-8")
    given = command_lines()
    assert {line[0] for line in given} == QUICK_OPTIONS.keys()
    for line in given:
        code = cli.main([*line, *QUICK_OPTIONS[line[0]]])
        assert code == 0, f"pyrogen {shlex.join(line)}: {capsys.readouterr().err}"
    assert Path("new.png").read_bytes().startswith(b"\x89PNG")


def test_help_that_the_readme_promises(capsys):
    assert cli.main(["fit", "--prior.help"]) == 0
    assert "Mixture" in capsys.readouterr().out
    assert cli.main(["fit", "--prior.help", "Mixture"]) == 0
    assert "components" in capsys.readouterr().out


def test_the_two_commands():
    main_job, tests = (block.strip() for block in blocks("bash")[:2])
    assert all("\n" not in command and command.startswith("python3 -m venv .venv && ") for command in (main_job, tests))
    assert main_job.endswith(".venv/bin/pip install . && .venv/bin/pyrogen compare")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == tests


def columns(printed: str) -> list[str]:
    """The headings of a comparison's table, word by word."""
    return next(line for line in printed.splitlines() if "log p(x)" in line).split()


def test_table_and_folder_are_what_compare_makes(empty_folder, capsys):
    line = ["compare", "--guides", "Normal", "Implicit", "--objectives", "ELBO", "AVB", *QUICK_OPTIONS["compare"]]
    assert cli.main(line) == 0
    table, listing = blocks("text")
    assert columns(table) == columns(capsys.readouterr().out)
    head, *rows = listing.splitlines()
    folder = Path(head)
    assert folder.is_dir()
    listed, of_fit = {".lock"}, {".lock"}  # as ls does, it shows nothing that is hidden
    for row in rows:
        name = row.split()[0].rstrip("/:")
        if name != "...":
            (of_fit if row.startswith("    ") else listed).add(name)
    assert listed == {path.name for path in folder.iterdir()} - {"normal-avb", "implicit-avb"}
    assert of_fit == {path.name for path in (folder / "normal-elbo").iterdir()}


@pytest.mark.parametrize("place", ["distributions", "networks", "models"])
def test_tables_name_every_part(place):
    table = section("Swapping parts")
    parts = getattr(pyrogen, place).__all__
    # A block of a residual network is a piece of the two networks.
    assert [name for name in parts if f"`{name}`" not in table and name != "ResidualBlock"] == []


def test_data_sets_are_all_named():
    table = section("Data sets")
    assert [name for name in pyrogen.data.loading.NAMES if f"`{name}`" not in table] == []


def test_objectives_are_all_named():
    known = [
        name
        for name in pyrogen.inference.__all__
        if isinstance(kind := getattr(pyrogen.inference, name), type)
        and issubclass(kind, pyrogen.inference.Objective)
        and kind is not pyrogen.inference.Objective
    ]
    assert [name for name in known if f"`{name}(" not in section("Objectives")] == []
    for call in re.findall(r"^\| `(.*?)` \|", section("Objectives"), re.M):
        names = {name: getattr(pyrogen.inference, name) for name in known}
        objective = eval(call.replace("=...", "=0.5"), names)  # noqa: S307 (our own README)
        assert isinstance(objective, pyrogen.inference.Objective)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []
    linked = {Path(target).name for target in targets if target.startswith("examples/")}
    assert linked == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_picture_is_a_picture_and_small():
    picture = ROOT / "docs" / "comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300_000

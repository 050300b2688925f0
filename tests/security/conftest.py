"""What a stranger may send: runs, settings and data, made here."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyrogen.cli import main
from pyrogen.inference.checkpoints import read_tensors, write_tensors

SMALL = (
    *("--steps", "1", "--batch_size", "64", "--latent", "2", "--features", "4", "--progress", "false"),
    *("--encoder.hidden", "[4]", "--decoder", "MLP", "--decoder.hidden", "[4]"),
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "fit"
    assert main(["fit", *SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(fitted, tmp_path) -> Path:
    """A copy of a run, to be made hostile."""
    return Path(shutil.copytree(fitted, tmp_path / "run"))


@pytest.fixture(scope="session")
def forge() -> Callable[[Path, Callable[[dict[str, Any]], Any] | str], None]:
    return _forge


def _forge(folder: Path, change: Callable[[dict[str, Any]], Any] | str) -> None:
    """Give a run other settings, or another text for these, with sums that are right."""
    tensors, values = read_tensors(folder / "weights.safetensors")
    if not isinstance(change, str):
        settings = yaml.safe_load(values["files"]["run.yaml"])
        change(settings)
        change = yaml.safe_dump(settings, sort_keys=False)
    values["files"]["run.yaml"] = change
    (folder / "run.yaml").write_text(change)
    write_tensors(folder / "weights.safetensors", tensors, values)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """A function that gives the one line by which the command refuses."""

    def refuse(*arguments: Any) -> str:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("pyrogen: error: "), error
        return error

    return refuse


@pytest.fixture
def evil(tmp_path) -> Path:
    """A Python file that leaves a mark wherever it is imported: its model, and the function that its name leads to."""
    text = """
from pathlib import Path
from torch import nn
Path({mark!r}).touch()
class Model(nn.Module):
    def forward(self, x):
        raise ValueError("it ran")
def call(*_, **__):
    return nn.Tanh()
"""
    for name in ("evil", "evil_module"):
        (tmp_path / f"{name}.py").write_text(text.format(mark=str(tmp_path / "mark")))
    return tmp_path / "evil.py"


@pytest.fixture
def untouched(tmp_path) -> Callable[[], bool]:
    """Whether no code of a stranger's has run."""
    return lambda: not (tmp_path / "mark").exists()

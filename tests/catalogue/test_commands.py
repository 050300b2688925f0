"""Commands with wrong options and damaged files: one line on stderr and exit code 2, whatever it was."""

import shutil

import pytest
import yaml

from pyrogen.cli import main

LONG, SNOW = "x" * 5000, "ü☃"
BIG = "1" + "0" * 30
FIT = {
    "--latent": ("-1", "2.5", "1000000000000"),
    "--features": ("0", SNOW, "1000000000"),
    "--batch_size": ("0", "[]"),
    "--steps": ("0", "nan", BIG),
    "--seed": ("2.5", BIG),
    "--learning_rate": ("-1", "nan", "inf", "x"),
    "--data": ("", "nonsense", LONG, "array:missing.npz"),
    "--encoder": ("Nonsense", "os.system", "{class_path: MLP, init_args: 3}"),
    "--objective": ("", "Nonsense", "\x1b[31m"),
    "--encoder.hidden": ("[-3]", "[1000000000000]", "x"),
    "--precision": ("nonsense",),
    "--device": ("nonsense", ""),
    "--schedule": ("nonsense",),
    "--threads": ("0", "1000000000"),
    "--nonsense": ("1",),
    "--config": ("missing.yaml", LONG),
}
RUN = {
    ("evaluate", "--particles"): ("0", "x"),
    ("evaluate", "--parts"): ("nonsense",),
    ("evaluate", "--rows"): ("-1",),
    ("sample", "--n"): ("0", "1000000000000"),
    ("report", "--nonsense"): ("1",),
}
BASE = ("fit", "--steps", "1", "--latent", "2", "--features", "4", "--encoder.hidden", "[4]", "--progress", "false")
YAML = ("[", "[1]", "a: b: c", "latent: -1", "nonsense: 1", "steps: &a [*a]", "\0")
DATA = ("x", [1], {"name": 3}, {"name": "digits", "foo": 1}, {"foo": "digits"}, {"name": None})
DAMAGED = ("", "[", "\0")


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    assert main([*BASE, "--decoder", "MLP", "--decoder.hidden", "[4]", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(catalogue, capsys):
    """See that a command ends with one line on stderr and exit code 2."""

    def see(command):
        what = " ".join(command)[-90:]
        try:
            code = main(command)
        except BaseException as error:
            capsys.readouterr()
            return catalogue.count(what, f"{type(error).__name__}: {str(error)[:150]}", "unclean")
        said = capsys.readouterr().err.strip()
        clean = code == 2 and said.count("\n") == 0 and said.startswith("pyrogen: error: ") and "\x1b" not in said
        ended = "refused cleanly" if clean else "accepted wrongly" if code == 0 else "unclean"
        return catalogue.count(what, "" if clean else f"{code}, {said[-200:]}", ended)

    return see


@pytest.mark.parametrize("option", FIT)
def test_fit(option, refused):
    for value in FIT[option]:
        refused([*BASE, "--out", "run", f"{option}={value}"])


@pytest.mark.parametrize(("command", "option"), RUN)
def test_commands_on_runs(command, option, fitted, refused):
    for value in RUN[command, option]:
        refused([command, str(fitted), f"{option}={value}"])


@pytest.mark.parametrize("command", ["sample", "report"])
def test_folders_that_are_no_runs(command, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("empty", "file", LONG):
        refused([command, path])


@pytest.mark.parametrize("number", range(len(YAML)))
def test_configurations(number, tmp_path, refused):
    file = tmp_path / f"{number}{SNOW}.yaml"
    file.write_text(YAML[number], encoding="utf-8")
    refused(["fit", "--config", str(file), "--out", "run"])


@pytest.mark.parametrize("data", DATA, ids=repr)
def test_data_of_run_yaml(data, fitted, tmp_path, refused):
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(settings | {"data": data}))
    refused(["evaluate", str(folder), "--particles", "2", "--parts", "bound"])


@pytest.mark.parametrize("text", DAMAGED, ids=repr)
@pytest.mark.parametrize("file", ["run.yaml", "weights.safetensors", "history.csv"])
def test_damaged_files_of_runs(file, text, fitted, tmp_path, refused):
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    (folder / file).write_text(text, encoding="utf-8")
    refused(["sample", str(folder), "--n", "2"])

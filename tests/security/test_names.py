"""Classes that a file names are those of pyrogen, torch and Pyro, unless the user trusts it."""

import sys
from pathlib import Path

import pytest
import yaml
from torch import nn

import pyrogen as pg
from pyrogen.cli import main
from pyrogen.configuration import check_names

SILENT = ("--progress", "false", "--steps", "1")


@pytest.fixture(autouse=True)
def importable(tmp_path, monkeypatch, evil, untouched):
    """Let the file be found by its name too, and see that nothing found it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("evil_module", None)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "evil.py:Model"},
        {"model": "{folder}/evil.py:Model"},
        {"model": {"class_path": "evil_module.Model"}},
        {"model.class_path": "evil_module.Model"},
        {"prior": "evil_module.call"},
        {"likelihood": {"class_path": "evil.py:Model"}},
        {"encoder": "evil_module.Model"},
        {"decoder": "evil_module.Model"},
        {"family": "evil.py:Model"},
        {"objective": "evil.py:Model"},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": "evil_module.call"}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": {"class_path": "evil_module.Model"}}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": '{"class_path": "evil\\x5fmodule\\x2ecall"}'}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": "{class_path: evil_module.call}"}}},
        {"objective": {"class_path": "ELBO", "init_args": {"beta": {"class_path": "evil_module.call"}}}},
        {"objective": {"class_path": "AVB", "init_args": {"ratio": {"class_path": "evil_module.call"}}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": "os.system"}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": "torch.hub.load"}}},
        {"encoder": {"class_path": "MLP", "init_args": {"activation": "torch.nn.modules.module.torch.load"}}},
    ],
    ids=str,
)
def test_settings_of_a_stranger_run_no_code_of_his(settings, refused, untouched, tmp_path):
    Path("settings.yaml").write_text(yaml.safe_dump(settings).replace("{folder}", str(tmp_path)))
    message = refused("fit", "--config", "settings.yaml", *SILENT, "--out", "out")
    assert any(why in message for why in ("is code outside", "neither a module of torch", "can't import", "class_path"))
    assert untouched() and not Path("out").exists()


@pytest.mark.parametrize("key", ["guides", "guides+", "objectives"])
@pytest.mark.parametrize("value", [["evil.py:Model"], "[evil.py:Model]", [{"class_path": "evil_module.Model"}]])
def test_lists_of_parts(key, value, refused, untouched):
    Path("settings.yaml").write_text(yaml.safe_dump({key: value}))
    assert "settings.yaml" in refused("compare", "--config", "settings.yaml", *SILENT, "--out", "out")
    assert untouched()


def test_what_is_refused_is_named_with_the_mend(refused):
    Path("settings.yaml").write_text("steps: 1\nmodel: evil.py:Model\n")
    message = refused("fit", "--config", "settings.yaml")
    assert "settings.yaml: model: 'evil.py:Model' is code outside pyrogen.distributions" in message
    assert "read it, then pass trust=True (--trust on the command line)" in message


def test_a_file_leads_to_no_other_file_and_grants_no_trust(refused, untouched, run):
    Path("inner.yaml").write_text("model: evil.py:Model\n")
    for text in ("config: inner.yaml", "trust: true\nmodel: evil.py:Model", "trust: true", "overwrite: true"):
        Path("settings.yaml").write_text(text)
        message = refused("fit", "--config", "settings.yaml", "--out", "out")
        assert "which is only taken from the command line" in message
        Path("settings.yaml").write_text(f"{text}\nrun: {run}".replace("model: evil.py:Model", ""))
        if "overwrite" not in text:  # evaluate has none
            assert "which is only taken from the command line" in refused("evaluate", "--config", "settings.yaml")
    assert "there is no file {config: inner.yaml}" in refused("fit", "--config", "{config: inner.yaml}")
    assert untouched()


def test_what_the_user_names_or_trusts_is_taken(untouched, tmp_path, capsys):
    Path("settings.yaml").write_text("model: evil.py:Model\n")
    assert main(["fit", "--config", "settings.yaml", "--trust", *SILENT, "--out", "out"]) == 1
    assert not untouched()
    (tmp_path / "mark").unlink()
    assert "it ran" in capsys.readouterr().err
    assert main(["fit", "--model", "evil.py:Model", *SILENT, "--out", "out"]) == 1
    assert "it ran" in capsys.readouterr().err
    assert main(["fit", "--encoder.activation", "evil_module.Model", *SILENT, "--out", "out"]) == 2
    assert "it ran" in capsys.readouterr().err


def test_honest_settings_need_no_trust(capsys):
    settings = {
        "encoder": {"class_path": "pyrogen.networks.MLP", "init_args": {"hidden": [4], "activation": "torch.nn.Tanh"}},
        "family": {"class_path": "Flow", "init_args": {"transform": "spline_coupling", "layers": 1, "hidden": "[4]"}},
        "objective": {"class_path": "IWAE", "init_args": {"gradient": "doubly reparameterised", "particles": 2}},
        "learning_rate": 1e-3,
    }
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "settings.yaml", *SILENT, "--out", "out"]) == 0
    assert main(["fit", "--config", "out/fit.yaml", *SILENT, "--out", "again"]) == 0


class Unheard(nn.Module):
    """Of no package that is trusted, though imported already."""


@pytest.mark.parametrize("value", ["Unheard", {"a": ["b", ["c", "Unheard"]]}, b"os.system", "a.b", "x:y", "!!x", "'a"])
def test_words_and_numbers_only(value):
    with pytest.raises(ValueError, match="is code outside"):
        check_names(value)


@pytest.mark.parametrize(
    "value", [None, True, 1e-7, -3, "1e-7", "wasserstein-gp", "(1, 8, 8)", "[a, b]", "MLP", "Tanh"]
)
def test_words_and_numbers_are_harmless(value):
    check_names([value, {"key": value}])


@pytest.mark.parametrize("path", ["evil.py:Model", "/moved/evil.py:Model", "evil_module.Model", "os.system"])
@pytest.mark.parametrize(
    "command", [("evaluate",), ("sample",), ("report", "--out", "new")], ids=lambda words: words[0]
)
def test_runs_of_a_stranger_run_no_code_of_his(command, path, run, forge, refused, untouched):
    forge(run, lambda settings: settings.update(model={"class_path": path, "init_args": {}}))
    message = refused(command[0], run, *command[1:])
    assert f"'{path}' is code outside" in message and "--trust" in message
    with pytest.raises(ValueError, match="is code outside"):
        pg.load(run)
    assert untouched()
    with pytest.raises((ValueError, TypeError)):
        pg.load(run, trust=True)
    assert untouched() == (path == "os.system")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch mark']", "a: !!python/name:os.system"])
@pytest.mark.parametrize("name", ["settings.yaml", "run/evaluation.yaml", "run/run.yaml"])
def test_tags_of_yaml_do_nothing(text, name, run, refused, untouched):
    Path(name).write_text(text)
    command = ("fit", "--config", name) if name == "settings.yaml" else ("report", run, "--out", "new")
    assert name.rpartition("/")[2] in refused(*command)
    assert untouched()


@pytest.mark.parametrize("text", ["a: !!bool foo", "a: !!int ''", "a: !!timestamp foo", "a: 2024-13-45"])
def test_values_that_are_none_are_refused(text, refused):
    Path("settings.yaml").write_text(text)
    assert "settings.yaml is damaged" in refused("fit", "--config", "settings.yaml", *SILENT)


def test_settings_that_fits_write_are_of_the_same_kind(fitted, untouched):
    """A stranger's fit is made again without trust, as its run is loaded without."""
    assert main(["fit", "--config", str(fitted / "fit.yaml"), *SILENT, "--out", "again"]) == 0
    assert untouched()

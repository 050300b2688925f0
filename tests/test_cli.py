"""The command: what it writes, what it says, and how it fails."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.image import imread

import pyrogen as pg
from pyrogen.cli import main
from pyrogen.evaluation.parts import DEFAULT
from pyrogen.experiment import commands
from pyrogen.inference import LinearSchedule, NonFiniteLoss

SMALL = [
    *("--epochs", "1", "--batch_size", "512", "--latent", "2", "--features", "8", "--progress", "false"),
    *("--encoder", "MLP", "--encoder.hidden", "[8]", "--decoder", "MLP", "--decoder.hidden", "[8]"),
]
COMPARE = ["compare", *SMALL, "--guides", "Normal", "MultivariateNormal", "--objectives", "ELBO"]
COMPARE += ["--particles", "4", "--test_rows", "20"]

PLAIN = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

decoder = nn.Linear(2, 64)


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z).reshape(-1, 1, 8, 8)).to_event(3), obs=x)
"""

PROGRAMS = (
    PLAIN
    + '''
from pyro.nn import PyroModule


class Model(PyroModule):
    """A model."""

    def __init__(self, event_shape, hidden: int = 4):
        super().__init__()
        self.event_shape = event_shape
        self.hidden = hidden
        self.decoder = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = self.decoder(z).reshape(-1, *self.event_shape)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)


def broken(x):
    raise ValueError("a fault of my own")


class NotAProgram:
    pass
'''
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "out"
    assert main(["fit", *SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(fitted, tmp_path) -> Path:
    """A copy of the fitted run, to be spoiled."""
    folder = tmp_path / "run"
    for path in fitted.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(fitted)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def programs(tmp_path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(PROGRAMS)
    return path.name


def loaded(folder: str | Path, *, trust: bool = False) -> Any:
    return pg.load(folder, trust=trust)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(capsys) -> str:
    """What stands on stderr, which must be one line and no traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("pyrogen: "), error
    return error


def test_compare_prints_the_table_it_writes(tmp_path, capsys):
    assert main([*COMPARE, "--guides", "Normal", "--out", "here"]) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "here" / "table.csv", index_col="guide")
    assert [*table.index] == ["Normal ELBO"]
    assert f"{table['log_likelihood'].iloc[0]:.2f}" in printed
    assert "20 test rows" in printed and "Written to here" in printed


def test_compare_folder_is_complete(comparison):
    table = pd.read_csv(comparison / "table.csv", index_col="guide")
    assert [*table.index] == ["Normal ELBO", "MultivariateNormal ELBO"]
    for name in ("samples", "reconstructions", "curves", "latents", "comparison"):
        picture = imread(comparison / "figures" / f"{name}.png")
        assert len(np.unique(picture[..., 0])) > 10, name
    posterior = arviz.from_netcdf(comparison / "posteriors.nc")["posterior"]
    assert [*posterior["fit"].values] == [*table.index]
    for slug in ("normal-elbo", "multivariatenormal-elbo"):
        assert loaded(comparison / slug).model.prior.features == 2


def test_the_yaml_that_compare_writes_makes_the_same_table(comparison, tmp_path):
    assert main(["compare", "--config", str(comparison / "compare.yaml"), "--out", "again", "--progress", "false"]) == 0
    first, again = (pd.read_csv(f / "table.csv").drop(columns="seconds") for f in (comparison, tmp_path / "again"))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert (comparison / "compare.yaml").read_bytes() == (tmp_path / "again" / "compare.yaml").read_bytes()


def test_without_out_folders_are_numbered(monkeypatch, capsys):
    monkeypatch.setattr(commands, "compare", lambda *_, out, **__: out.mkdir(parents=True))
    for number in (1, 2):
        assert main(["compare"]) == 0
        assert f"Written to runs/compare-digits-00{number}" in capsys.readouterr().out


def test_defaults_of_compare(monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(commands, "compare", lambda model, guides, **options: asked.update(options, guides=guides))
    assert main(["compare"]) == 0
    explicit = [
        f"{family} {bound}" for family in ("Normal", "MultivariateNormal", "Flow") for bound in ("ELBO", "IWAE")
    ]
    assert [*asked["guides"]] == [*explicit, "Implicit AVB"]
    assert asked["data"].name == "digits" and len(asked["test"]) == 180


def test_fit_evaluate_sample(run, capsys):
    before = contents(run)
    assert main(["evaluate", str(run), "--particles", "5", "--rows", "30"]) == 0
    printed = capsys.readouterr().out
    assert "Evaluation on 30 observations" in printed
    (entry,) = yaml.safe_load((run / "evaluation.yaml").read_text())
    alone = pg.evaluate(loaded(run), pg.data.load("digits").test[:30], particles=5)
    assert entry["log_likelihood"] == alone.log_likelihood and entry["split"] == "test"
    assert main(["evaluate", str(run), "--particles", "5", "--split", "validation"]) == 0
    assert main(["evaluate", str(run), "--particles", "5", "--split", "validation"]) == 0
    assert [e["split"] for e in yaml.safe_load((run / "evaluation.yaml").read_text())] == ["test", "validation"]
    assert main(["sample", str(run), "--n", "9", "--mean"]) == 0
    picture = imread(run / "samples.png")
    assert picture.shape[:2] == (28, 28) and len(np.unique(picture)) > 10
    assert before.items() <= contents(run).items()


def test_evaluate_keeps_every_part_that_it_finished(run, monkeypatch):
    def fails(subject):
        raise RuntimeError("the machine gave up")

    monkeypatch.setitem(pg.evaluation.parts.PARTS, "aggregate", fails)
    with pytest.raises(RuntimeError, match="gave up"):
        main(["evaluate", str(run), "--parts", "bound", "aggregate", "--rows", "30"])
    (entry,) = yaml.safe_load((run / "evaluation.yaml").read_text())
    assert entry["parts"] == ["bound"] and math.isfinite(entry["elbo"])


def test_evaluate_notes_why_figures_are_not_defined(run):
    for parts in ("samples", "bound"):
        assert main(["evaluate", str(run), "--parts", parts, "--rows", "3"]) == 0
    (entry,) = yaml.safe_load((run / "evaluation.yaml").read_text())
    assert entry["parts"] == ["samples", "bound"]
    assert [*entry["reasons"]] == ["samples"] and "3" in entry["reasons"]["samples"]


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def cells_of(markdown: Path) -> list[list[str]]:
    """The rows of a report's first table, without what marks the best."""
    lines = re.findall(r"(?:^\|.*\n)+", markdown.read_text(encoding="utf-8"), re.M)[0].splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports without the pictures of each fit, and samples compared by their values, which are quick."""
    monkeypatch.setattr(pg.experiment.report, "fit_blocks", lambda *_: [])
    monkeypatch.setattr(commands, "compared_in", lambda *_: {})


def test_report_of_a_comparison_takes_its_figures(comparison, tmp_path, monkeypatch, capsys):
    before = contents(comparison)
    monkeypatch.setattr(commands, "evaluate", lambda *_, **__: pytest.fail("the figures are there"))
    assert main(["report", str(comparison), "--out", "page"]) == 0
    assert f"Written to {Path('page') / 'report.html'}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.html", "report.md", "figures"}
    head, _, *rows = cells_of(tmp_path / "page" / "report.md")
    table = pd.read_csv(comparison / "table.csv", index_col="guide")
    assert [row[0] for row in rows] == [*table.index]
    shown = [row[head.index("ELBO")] for row in rows]
    assert shown == [f"−{-elbo:.2f} ± {s:.2f}" for elbo, s in zip(table["elbo"], table["elbo_error"], strict=True)]
    assert "on 20 test rows" in (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert contents(comparison) == before


def test_report_of_one_fit_of_a_comparison_has_its_name_and_figures(comparison, monkeypatch, no_pictures):
    monkeypatch.setattr(commands, "evaluate", lambda *_, **__: pytest.fail("the figures are there"))
    assert main(["report", str(comparison / "normal-elbo"), "--out", "page"]) == 0
    assert [row[0] for row in cells_of(Path("page/report.md"))[2:]] == ["Normal ELBO"]


def test_report_of_several_computes_what_is_not_there_and_notes_it(comparison, run, tmp_path, no_pictures):
    before = contents(run)
    arguments = ["report", str(comparison), str(run), str(comparison / "normal-elbo"), "--particles", "4"]
    assert main([*arguments, "--rows", "20"]) == 0
    rows = cells_of(tmp_path / "runs" / "report-001" / "report.md")[2:]
    assert [row[0] for row in rows] == ["Normal ELBO", "MultivariateNormal ELBO", "run"]
    (entry,) = yaml.safe_load((run / "evaluation.yaml").read_text())
    alone = pg.evaluate(loaded(run), pg.data.load("digits").test[:20], particles=4)
    assert entry["log_likelihood"] == alone.log_likelihood and entry["observations"] == 20
    assert f"−{-alone.log_likelihood:.2f}" in rows[-1][1]
    assert before.items() <= contents(run).items()


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """How many rows each evaluation was of."""
    counted: list[int] = []
    evaluate = commands.evaluate

    def counting(fitted, x, **options):
        counted.append(len(x))
        return evaluate(fitted, x, **options)

    monkeypatch.setattr(commands, "evaluate", counting)
    return counted


def test_report_takes_what_evaluate_noted_on_the_same_rows(run, evaluated, no_pictures):
    for particles in ("3", "5"):
        assert main(["evaluate", str(run), "--particles", particles, "--rows", "30"]) == 0
    evaluated.clear()
    assert main(["report", str(run), "--rows", "30", "--out", "same"]) == 0
    assert evaluated == [] and "from 5 particles" in Path("same/report.md").read_text(encoding="utf-8")
    options = ["--particles", "3", "--split", "validation", "--rows", "30"]
    assert main(["report", str(run), *options, "--out", "other"]) == 0
    assert evaluated == [30] and "on 30 validation rows" in Path("other/report.md").read_text(encoding="utf-8")


def entries(run: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((run / "evaluation.yaml").read_text(encoding="utf-8"))


FEW = ["--rows", "20", "--particles", "3"]


def test_report_finds_what_an_evaluation_in_part_left_out(run, evaluated, no_pictures):
    assert main(["evaluate", str(run), "--parts", "bound", *FEW]) == 0
    (before,) = entries(run)
    assert main(["report", str(run), *FEW]) == 0
    assert evaluated == [20, 20]
    (entry,) = entries(run)
    assert entry["elbo"] == before["elbo"] and {*DEFAULT} <= {*entry["parts"]}
    head, _, cells = cells_of(run / "report.md")
    assert cells[head.index("log p(x)")].startswith(f"−{-entry['log_likelihood']:.2f} ± ")


def test_report_of_a_run_that_went_on_has_figures_of_its_new_state(run, evaluated, no_pictures):
    assert main(["evaluate", str(run), *FEW]) == 0
    assert main(["fit", *SMALL, "--epochs", "3", "--out", str(run), "--resume"]) == 0
    assert main(["report", str(run), *FEW]) == 0
    assert evaluated == [20, 20]
    before, entry = entries(run)
    alone = pg.evaluate(loaded(run), pg.data.load("digits").test[:20], parts=["bound"])
    assert before["steps"] < entry["steps"] and before["elbo"] != entry["elbo"] == alone.elbo
    head, _, cells = cells_of(run / "report.md")
    assert cells[head.index("ELBO")].startswith(f"−{-alone.elbo:.2f} ± ")


def test_report_of_a_compared_fit_that_went_on_has_not_the_figures_of_the_comparison(
    comparison, tmp_path, evaluated, no_pictures
):
    fit = copied(comparison, tmp_path / "copy") / "normal-elbo"
    assert main(["report", str(fit), "--out", "before"]) == 0
    assert evaluated == []
    assert main(["fit", *SMALL, "--epochs", "3", "--out", str(fit), "--resume"]) == 0
    assert main(["report", str(fit), *FEW, "--out", "after"]) == 0
    assert evaluated == [20]
    before, after = (cells_of(tmp_path / name / "report.md") for name in ("before", "after"))
    assert before[2][before[0].index("ELBO")] != after[2][after[0].index("ELBO")]


def test_report_of_a_comparison_says_why_figures_are_not_defined(comparison, tmp_path, evaluated, no_pictures):
    assert main(["report", str(comparison), "--out", "page"]) == 0
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    why = "the covariance of 128 features has full rank only for more than 128 rows, got 20 samples"
    assert f"\n- samples: {why}" in text and evaluated == []


def test_a_report_is_replaced_only_when_asked(run, capsys, no_pictures):
    small = ["--rows", "20", "--particles", "3"]
    assert main(["report", str(run), *small]) == 0
    before = contents(run)
    assert main(["report", str(run), *small]) == 2
    assert "report.html exists" in one_line(capsys)
    assert contents(run) == before
    assert main(["report", str(run), *small, "--overwrite"]) == 0
    assert contents(run).keys() == before.keys()


def test_report_refuses_fits_of_different_data(run, tmp_path, capsys, no_pictures):
    assert main(["fit", *SMALL, "--binarize", "null", "--out", "gray"]) == 0
    before = contents(tmp_path)
    assert main(["report", str(run), "gray", "--rows", "20"]) == 2
    assert "can't stand in one table" in one_line(capsys)
    assert contents(tmp_path) == before


def test_report_leaves_folders_of_others_alone(run, tmp_path, capsys, no_pictures):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for out in ("mine", "mine/notes.txt"):
        for extra in ([], ["--overwrite"]):
            assert main(["report", str(run), "--rows", "20", "--out", out, *extra]) == 2
            assert out in one_line(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.csv", "guide,elbo\nNormal ELBO,1\n"),
        ("table.csv", ""),
        ("table.csv", "guide,observations,particles,log_likelihood,reasons\nNormal ELBO,20,4,-1,{\n"),
        ("compare.yaml", "a: [1\n"),
        ("normal-elbo/evaluation.yaml", "a: 1\n"),
        ("normal-elbo/evaluation.yaml", "- a\n"),
    ],
)
def test_report_of_damaged_files(comparison, tmp_path, name, text, capsys, no_pictures):
    folder = copied(comparison, tmp_path / "copy")
    (folder / name).write_text(text)
    before = contents(folder)
    assert main(["report", str(folder), "--overwrite"]) == 2
    assert Path(name).name in one_line(capsys)
    assert contents(folder) == before


def test_report_passes_over_a_fit_that_is_not_complete(comparison, tmp_path, no_pictures):
    folder = copied(comparison, tmp_path / "copy")
    (folder / "normal-elbo" / "weights.safetensors").unlink()
    assert main(["report", str(folder), "--out", "page"]) == 0
    assert [row[0] for row in cells_of(tmp_path / "page" / "report.md")[2:]] == ["MultivariateNormal ELBO"]
    (folder / "multivariatenormal-elbo" / "weights.safetensors").unlink()
    assert main(["report", str(folder), "--out", "none"]) == 2


def test_report_of_two_comparisons_names_fits_apart(comparison, tmp_path, no_pictures):
    folder = copied(comparison, tmp_path / "copy")
    assert main(["report", str(comparison), str(folder), "--out", "page"]) == 0
    names = [row[0] for row in cells_of(tmp_path / "page" / "report.md")[2:]]
    assert len(set(names)) == 4 and "copy/Normal ELBO" in names


def test_the_record_of_a_run_is_no_settings_file(run, capsys):
    assert main(["fit", "--config", str(run / "run.yaml")]) == 2
    assert "is the record of a run; its settings for --config are in fit.yaml" in capsys.readouterr().err


def test_an_evaluation_that_cannot_be_noted_is_not_lost(run, monkeypatch, capsys, caplog):
    def full(path, *_):
        raise pg.inference.WriteError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(commands, "atomically", full)
    assert main(["evaluate", str(run), "--rows", "5", "--particles", "2", "--parts", "likelihood"]) == 0
    assert "log-likelihood" in capsys.readouterr().out and "No space left" in caplog.text


def test_samples_as_numbers(run, tmp_path):
    assert main(["sample", str(run), "--n", "7", "--out", "new.npz", "--seed", "3"]) == 0
    drawn = np.load(tmp_path / "new.npz")["samples"]  # noqa: TID251 (of our own making)
    assert np.array_equal(drawn, np.asarray(pg.sample(loaded(run), 7, seed=3)))


def test_sample_does_not_overwrite(run, tmp_path, capsys):
    (tmp_path / "new.png").write_bytes(b"mine")
    assert main(["sample", str(run), "--out", "new.png"]) == 2
    assert "new.png exists" in one_line(capsys)
    assert (tmp_path / "new.png").read_bytes() == b"mine"
    assert main(["sample", str(run), "--out", "new.png", "--overwrite"]) == 0
    assert main(["sample", str(run), "--out", "new.jpg"]) == 2


def test_the_yaml_that_fit_writes_makes_the_same_weights(fitted, tmp_path):
    assert main(["fit", "--config", str(fitted / "fit.yaml"), "--out", "again", "--progress", "false"]) == 0
    first, again = (loaded(folder).programs.state_dict() for folder in (fitted, tmp_path / "again"))
    assert all(value.equal(again[name]) for name, value in first.items())


def test_flags_win_over_the_file_and_options_of_parts_are_typed(fitted, tmp_path):
    arguments = ["--config", str(fitted / "fit.yaml"), "--out", "again", "--progress", "false", "--steps", "1"]
    given = yaml.safe_load((fitted / "fit.yaml").read_text())
    del given["epochs"]
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(given))
    arguments[1] = "file.yaml"
    parts = ["--prior", "Mixture", "--prior.components=3", "--family", "Flow", "--family.layers", "1"]
    parts += ["--objective", "IWAE", "--objective.particles", "2", "--likelihood", "ContinuousBernoulli"]
    assert main(["fit", *arguments, *parts, "--encoder.activation", "torch.nn.Tanh", "--binarize", "null"]) == 0
    run = loaded(tmp_path / "again")
    assert run.model.prior.components == 3 and run.guide.family.keywords == {"layers": 1}
    assert run.objective.particles == 2 and run.guide.encoder.activation is torch.nn.Tanh
    assert run.guide.encoder.hidden in ([8], (8,))  # from the file
    assert len(run.history) == 1 and run.options.steps == 1


def test_an_option_may_be_a_class_with_options(tmp_path):
    schedule = ["--objective.beta", "LinearSchedule", "--objective.beta.steps", "7", "--objective.beta.start=0.5"]
    assert main(["fit", *SMALL, *schedule, "--out", "flags"]) == 0
    assert loaded(tmp_path / "flags").objective.beta == LinearSchedule(7, 0.5)
    assert main(["fit", "--config", "flags/fit.yaml", "--progress", "false", "--out", "file"]) == 0
    assert loaded(tmp_path / "file").objective.beta == LinearSchedule(7, 0.5)


def test_pseudo_inputs_have_the_shape_of_the_data(tmp_path):
    assert main(["fit", *SMALL, "--prior", "Vamp", "--prior.components", "7", "--out", "out"]) == 0
    assert loaded(tmp_path / "out").model.prior.pseudo_inputs.shape == (7, 1, 8, 8)


@pytest.mark.parametrize("arguments", [["fit"], ["compare", "--guides", "Normal", "--objectives", "ELBO"]])
def test_a_program_that_could_not_be_loaded_again_is_refused_before_training(arguments, tmp_path, capsys):
    text = PROGRAMS.replace("self.hidden = hidden", "self.other_name = hidden")
    assert text != PROGRAMS
    (tmp_path / "forgetful.py").write_text(text)
    assert main([*arguments, "--model", "forgetful.py:Model", "--steps", "1", "--out", "out"]) == 2
    assert "does not keep its argument 'hidden'" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "likelihood"), [([], "Bernoulli"), (["--binarize", "null"], "QuantizedNormal")])
def test_likelihood_suits_the_data(arguments, likelihood, tmp_path):
    assert main(["fit", *SMALL, *arguments, "--out", "out"]) == 0
    found = loaded(tmp_path / "out").model.likelihood
    assert type(found).__name__ == likelihood
    assert getattr(found, "levels", 17) == 17


def test_real_vectors_from_a_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", train=rng.normal(size=(60, 3)).astype(np.float32))
    assert main(["fit", *SMALL, "--data", "array:mine.npz", "--out", "out"]) == 0
    likelihood = loaded(tmp_path / "out").model.likelihood
    assert type(likelihood).__name__ == "NormalLikelihood" and likelihood.scale == "shared"
    assert main(["sample", "out", "--n", "5"]) == 0
    assert np.load(tmp_path / "out" / "samples.npz")["samples"].shape == (5, 3)  # noqa: TID251 (of our own making)
    assert main(["sample", "out", "--out", "new.png"]) == 2


def test_data_that_are_named_are_binarised_as_in_the_fit(tmp_path, capsys, no_pictures):
    values = np.random.default_rng(0).random((60, 4)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", train=values)
    assert main(["fit", *SMALL, "--data", "array:mine.npz", "--binarize", "static", "--out", "out"]) == 0
    evaluate = ["evaluate", "out", "--parts", "bound"]
    assert main(evaluate) == 2
    assert f"give --data array:{tmp_path}/mine.npz if that is" in one_line(capsys)
    assert main([*evaluate, "--trust"]) == main([*evaluate, "--data", "array:mine.npz"]) == 0
    (entry,) = yaml.safe_load((tmp_path / "out" / "evaluation.yaml").read_text())  # of one and the same data
    assert entry["data"]["binarize"] == "static"
    np.savez(tmp_path / "others.npz", train=values[::-1])
    assert main(["fit", *SMALL, "--data", "array:others.npz", "--binarize", "static", "--out", "other"]) == 0
    assert main(["report", "out", "other", "--data", "array:mine.npz", "--particles", "2", "--out", "report"]) == 0


def test_data_that_change_between_runs_are_named(tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    command = ["fit", *SMALL, "--data", "array:mine.npz", "--out", "out"]
    np.savez(tmp_path / "mine.npz", train=values)
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    values[:, 1] += 1e-3
    np.savez(tmp_path / "mine.npz", train=values)
    before = contents(tmp_path / "out")
    assert main([*command, "--resume"]) == 2
    assert "was written by a fit that differs: data." in one_line(capsys)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["Model", "model"])
def test_a_program_of_the_users_own(name, programs, tmp_path, capsys):
    options = ["--model.hidden", "6"] if name == "Model" else []
    small = ["--steps", "2", "--features", "8", "--progress", "false", "--encoder.hidden", "[8]"]
    assert main(["fit", "--model", f"{programs}:{name}", *options, *small, "--out", "out"]) == 0
    settings = yaml.safe_load((tmp_path / "out" / "fit.yaml").read_text())
    path = settings["model"]["class_path"] if name == "Model" else settings["model"]
    assert path == f"{tmp_path / programs}:{name}"
    assert main(["evaluate", "out", "--particles", "2"]) == 2
    assert "--trust" in capsys.readouterr().err
    assert main(["evaluate", "out", "--particles", "2", "--trust"]) == 0
    if name == "Model":
        assert loaded("out", trust=True).model.hidden == 6


@pytest.mark.parametrize(
    ("command", "run"),
    [
        (["fit", "--model", "my_model.py:Model", "--encoder", "my_model.py:Encoder"], "out"),
        (["compare", "--model", "my_model.py:model", *COMPARE[-6:], "--guides", "Normal"], "out/normal-elbo"),
    ],
)
def test_a_project_may_be_moved(command, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "old").mkdir()
    encoder = "class Encoder(nn.Sequential):\n    def __init__(self, event_shape, features):\n"
    encoder += "        super().__init__(nn.Flatten(), nn.Linear(64, features))\n"
    encoder += "        self.event_shape, self.features = event_shape, features\n"
    (tmp_path / "old" / "my_model.py").write_text(PROGRAMS + encoder)
    command += ["--steps", "2", "--features", "8", "--progress", "false", "--out", "out"]
    monkeypatch.chdir("old")
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    os.rename("old", "new")
    sample = ["sample", f"new/{run}", "--n", "2", "--overwrite"]
    assert main([*sample, "--trust"]) == 2
    assert f"nor my_model.py in new/{run} or the working directory; put it into either" in one_line(capsys)
    shutil.copy("new/my_model.py", f"new/{run}")
    assert main([*sample, "--trust"]) == 0
    os.remove(f"new/{run}/my_model.py")
    monkeypatch.chdir("new")
    sample[1] = run
    assert main([*sample, "--trust"]) == 0
    assert main(sample) == 2
    assert main([*command, "--resume"]) == 0
    shutil.copytree("out", "again")
    Path("my_model.py").write_text(PROGRAMS.replace("(2), 1.0)", "(2), 2.0)") + encoder)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "differs: source." in one_line(capsys)


def test_compare_takes_a_program_of_the_users_own(programs, tmp_path):
    small = ["--steps", "2", "--features", "8", "--progress", "false", "--particles", "2", "--test_rows", "20"]
    names = ["--guides", "Normal", "MultivariateNormal", "--objectives", "ELBO"]
    assert main(["compare", "--model", f"{programs}:model", *small, *names, "--out", "out"]) == 0
    runs = [loaded(tmp_path / "out" / f, trust=True) for f in ("normal-elbo", "multivariatenormal-elbo")]
    assert all(run.source.keys() == {"model"} for run in runs)
    weights = [run.model for run in runs]
    first, second = (torch.cat([p.flatten() for p in model.parameters()]) for model in weights)
    assert not first.equal(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--data", "mnits"], "unknown data set 'mnits'; did you mean mnist"),
        (["fit", "--prior", "Mixure"], "unknown prior 'Mixure'; did you mean Mixture?"),
        (["fit", "--objective", "elbo"], "unknown objective 'elbo'; did you mean ELBO?"),
        (["compare", "--guides", "Normal", "Flwo"], "unknown family 'Flwo'; did you mean Flow?"),
        (["fit", "--family", "Flow", "--family.layer", "2"], "no option 'layer'; did you mean layers?"),
        (["fit", "--family", "Flow", "--family.layers", "many"], "Expected a <class 'int'>. Got value: many"),
        (["fit", "--family", "Flow", "--family.transform", "afine_coupling"], "did you mean affine_coupling"),
        (["fit", "--likelihood.scale", "2"], "name it"),
        (["fit", "--objective.beta", "LinerSchedule"], "Expected a dot import path string: LinerSchedule"),
        (["fit", "--objective.beta", "LinearSchedule"], "missing a required argument: 'steps'"),
        (["fit", "--objective.beta", "LinearSchedule", "--objective.beta.stps", "3"], "did you mean steps?"),
        (["fit", "--objective.beta.steps", "3"], "name that before it"),
        (["fit", "--family.layers"], "--family.layers needs a value"),
        (["compare", "--family.layers", "2"], "unrecognized arguments: --family.layers"),
        (["fit", "--epoch", "2"], "unrecognized arguments: --epoch 2; did you mean --epochs?"),
        (["fit", "--epochs", "few"], "error: epochs must be a whole number of less than 2**63 or null, got few"),
        (["fit", "--epochs", "0"], "epochs must be a whole number of at least 1"),
        (["fit", "--epochs", "2", "--steps", "2"], "either epochs or steps"),
        (["fit", "--latent", "0"], "latent must be at least 1"),
        (["fit", "--learning_rate", "-1"], "learning_rate must be a positive number"),
        (["fit", "--device", "abacus"], "abacus"),
        (["fit", "--model", "nowhere.py:Model"], "no file 'nowhere.py'"),
        (["fit", "--model", "no.such.module.Model"], "can't import 'no.such.module.Model'"),
        (["fit", "--encoder", "torch.nn.NoSuchLayer"], "no 'NoSuchLayer'"),
        (["fit", "--data", "array:none.npz"], "none.npz"),
        (["fit", "--encoder", "torch.nn.Linear"], "--encoder Linear can't be built: empty()"),
        (["fit", "--decoder", "torch.nn.Linear"], "is called as decoder(latent, shape) and gives"),
        (["fit", "--decoder", "MLP", "--decoder.activation", "torch.nn.Linear"], "--decoder MLP(activation=torch.nn.L"),
        (["fit", "--likelihood", "torch.nn.ReLU"], "--likelihood ReLU gives a Tensor, not a distribution; expected"),
        (["fit", "--likelihood", "torch.nn.Sequential"], "--likelihood Sequential gives a Tensor"),
        (["fit", "--likelihood", "torch.nn.Softmax"], "--likelihood Softmax can't be "),
        (["fit", "--likelihood", "torch.nn.Linear"], "--likelihood Linear can't be built: Linear.__init__() missing"),
        (["fit", "--likelihood", "torch.nn.ReLU", "--objective", "GAN"], "--likelihood ReLU gives a Tensor, not a dis"),
        (["fit", "--family", "torch.nn.MultiheadAttention"], "--family MultiheadAttention can't be built: "),
        (["compare", "--guides", "torch.nn.Linear"], "--family Linear can't be called: "),
        (["fit", "--family", "torch.nn.Linear"], "is called as family(features, context) and gives a module"),
        (["fit", "--prior", "torch.nn.ReLU"], "--prior ReLU can't be called: ReLU.forward() missing 1 required"),
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", "--resume"], "--out"),
        (["compare", "--overwrite"], "--out"),
        (["compare", "--guides", "Normal", "Normal"], "there twice"),
        (["evaluate", "nowhere"], "holds no run"),
        (["sample", "nowhere"], "holds no run"),
        (["report", "nowhere"], "holds neither a fit nor a comparison"),
        (["report"], "runs"),
        (["report", "a", "b", "--rows", "3", "--out", "../.."], "holds no run or report"),
        (["evaluate"], "run"),
        (["compute"], "invalid choice: 'compute'"),
        ([], "subcommand"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 1\n", "bad.yaml: there is no setting 'epoch'; did you mean epochs"),
        ("3: 4\n", "bad.yaml: there is no setting '3'"),
        ("epochs: [1\n", "bad.yaml is damaged (line 2: expected ',' or ']'"),
        ("epochs: 1\nlatent: 2\nepochs: 2\n", "bad.yaml is damaged (line 3: 'epochs' is there twice)"),
        ("prior: {class_path: Flow, init_args: {layers: 1, layers: 2}}\n", "(line 1: 'layers' is there twice)"),
        ("epochs: many\n", "bad.yaml: epochs must be a whole number of less than 2**63 or null, got many"),
        ("epochs: 2.5\n", "bad.yaml: epochs must be a whole number of less than 2**63 or null, got 2.5"),
        ("latent: x\n", "bad.yaml: latent must be a whole number of less than 2**63, got x"),
        ("learning_rate: [1]\n", "bad.yaml: learning_rate must be a finite number, got [1]"),
        ("progress: maybe\n", "bad.yaml: progress must be True or False, got maybe"),
        ("schedule: step\n", "bad.yaml: schedule must be one of ['constant', 'linear', 'cosine'], got step"),
        ("prior: 3\n", "bad.yaml: prior: expected a name such as 'Flow', or a mapping {class_path: NAME"),
        ("prior: {class_path: Flow, init_args: 3}\n", "bad.yaml: prior: expected a name such as 'Flow'"),
        ("guides: [3]\n", "bad.yaml: guides: expected a name such as 'Flow'"),
        ("guides: 3\n", "bad.yaml: guides must be a list, got 3"),
        ("parts: likelihood\n", "bad.yaml: parts must be a list, got 'likelihood'"),
        ("", "bad.yaml holds nothing; expected settings by name"),
        ("- 1\n", "bad.yaml holds [1]; expected settings by name"),
        ("epochs 3\n", "bad.yaml holds 'epochs 3'; expected settings by name"),
        ("\x00", "bad.yaml is damaged"),
    ],
)
def test_bad_configuration_files(text, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["compare", "--config", "bad.yaml"]) == 2
    assert message in (line := one_line(capsys)) and len(line) < 250
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_model_of_its_own_excludes_the_parts_of_another(programs, capsys):
    assert main(["fit", "--model", f"{programs}:Model", "--prior", "Mixture"]) == 2
    assert "prior would go unused" in one_line(capsys)
    assert main(["fit", "--model", f"{programs}:model", "--model.hidden", "3"]) == 2
    assert "takes no options" in one_line(capsys)
    assert main(["fit", "--model", f"{programs}:Model", "--model.hiden", "3"]) == 2
    assert "did you mean hidden?" in one_line(capsys)


def test_faults_in_the_users_program_show_where(programs, capsys):
    assert main(["fit", "--model", f"{programs}:broken", "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "a fault of my own" in error and "my_model.py" in error


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_an_existing_folder_is_left_alone(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        arguments = COMPARE if command == "compare" else ["fit", *SMALL]
        assert main([*arguments, "--out", "out", *extra]) == 2
        assert "out" in one_line(capsys)
        assert contents(tmp_path) == {str(tmp_path / "out" / "notes.txt"): b"mine"}


@pytest.mark.parametrize(
    "arguments",
    [["fit", *SMALL, "--out"], [*COMPARE, "--out"], ["evaluate"], ["report"], ["sample"], ["report", "run", "--out"]],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_path_that_is_too_long(arguments, tmp_path, capsys):
    assert main([*arguments, "x" * 300]) == 2
    said = one_line(capsys)
    assert re.search(r"(--out|the run's folder)\)?: 'xxx.*', of 300 characters, is too long a name or path", said)
    assert len(said) < 200 and not [*tmp_path.iterdir()]


UNUSUAL = (
    PLAIN
    + '''

class DirichletPrior(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.latent, self.log_concentration = latent, nn.Parameter(torch.zeros(latent))

    def forward(self, context=None):
        return dist.Dirichlet(self.log_concentration.exp())


class Topics(nn.Module):
    """Of shares of topics; zeros are none."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.topics = decoder, nn.Parameter(torch.randn(8, 64))

    def forward(self, z):
        shares = z / z.sum(-1, keepdim=True)
        return dist.Bernoulli((shares @ self.topics.softmax(-1)).reshape(*z.shape[:-1], 1, 8, 8)).to_event(3)


class Projected(nn.Module):
    """Of a context that is not zero, and 32 wide."""

    def __init__(self, features, context):
        super().__init__()
        self.features, self.context, self.linear = features, context, nn.Linear(32, features)

    def forward(self, context):
        return dist.Normal(self.linear(context / context.norm(dim=-1, keepdim=True)), 1.0).to_event(1)


class Encoder32(nn.Module):
    def __init__(self, event_shape, features, hidden=()):
        super().__init__()
        self.event_shape, self.features, self.hidden, self.linear = event_shape, features, hidden, nn.Linear(64, 32)

    def forward(self, x):
        return self.linear(x.flatten(-3))


class Odd(nn.Module):
    """Of as many features as the Dirichlet's simplex has dimensions, which are fewer than its values."""

    def __init__(self, features, context):
        super().__init__()
        assert features == 7
        self.features, self.context, self.linear = features, context, nn.Linear(context, 7)

    def forward(self, context):
        return dist.Normal(self.linear(context), 1.0).to_event(1)


class Two(Odd):
    """As the site of that model, whatever --latent says."""

    def __init__(self, features, context):
        super().__init__(7, context)
        assert features == 2
        self.features, self.linear = features, nn.Linear(context, 2)


class Broken(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z):
        return self.nothing(z)
'''
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prior", "pyrogen.distributions.Vamp", "--prior.components", "5"],
        ["--prior", "unusual.py:DirichletPrior", "--likelihood", "unusual.py:Topics"],
        ["--prior", "unusual.py:DirichletPrior", "--family", "unusual.py:Odd"],
        ["--family", "unusual.py:Projected", "--encoder", "unusual.py:Encoder32"],
    ],
)
def test_parts_that_fit_each_other_need_not_fit_what_is_usual(arguments, tmp_path):
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    assert main(["fit", *SMALL, "--latent", "8", *arguments, "--out", "fitted"]) == 0
    assert len(loaded("fitted", trust=True).history) > 0


def test_a_family_for_a_model_of_other_sizes_is_compared(tmp_path):
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    command = ["compare", "--model", "unusual.py:model", "--guides", "unusual.py:Two", "--parts", "likelihood"]
    command += ["--epochs", "1", "--batch_size", "512", "--particles", "4", "--test_rows", "20", "--progress", "false"]
    assert main([*command, "--out", "compared"]) == 0
    assert [*pd.read_csv("compared/table.csv", index_col="guide").index] == ["Two ELBO", "Two IWAE"]


def test_an_error_of_a_part_is_shown_where_it_came_up(tmp_path, capsys):
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    assert main(["fit", *SMALL, "--likelihood", "unusual.py:Broken", "--out", "fitted"]) != 0
    error = capsys.readouterr().err
    assert "--likelihood Broken can't be called: 'Broken' object has no attribute 'nothing'" in error
    assert "return self.nothing(z)" in error and not Path("fitted").exists()


def test_fits_and_comparisons_do_not_take_the_place_of_each_other(run, comparison, capsys):
    before = contents(run) | contents(comparison)
    for extra in ("--resume", "--overwrite"):
        assert main([*COMPARE, "--out", str(run), extra]) == 2
        assert "run holds a fit, not a comparison; give another folder (out=, --out)" in one_line(capsys)
        assert main(["fit", *SMALL, "--out", str(comparison), extra]) == 2
        assert "holds a comparison, not a fit; give another folder (out=, --out)" in one_line(capsys)
    assert contents(run) | contents(comparison) == before


def test_a_run_is_replaced_only_when_asked(run, capsys):
    before = contents(run)
    assert main(["fit", *SMALL, "--seed", "1", "--out", str(run)]) == 2
    assert "--overwrite" in one_line(capsys)
    assert contents(run) == before
    assert main(["fit", *SMALL, "--seed", "1", "--prior", "Mixure", "--out", str(run), "--overwrite"]) == 2
    assert contents(run) == before
    assert main(["fit", *SMALL, "--seed", "1", "--out", str(run), "--overwrite"]) == 0
    assert loaded(run).options.seed == 1


def test_compare_is_not_replaced(comparison, capsys):
    before = contents(comparison)
    assert main([*COMPARE, "--seed", "1", "--out", str(comparison)]) == 2
    assert main([*COMPARE, "--seed", "1", "--out", str(comparison), "--resume"]) == 2
    assert "holds another comparison (seed: 0 there, 1 now)" in capsys.readouterr().err
    assert contents(comparison) == before


def test_evaluate_of_a_comparison_names_its_fits(comparison, capsys):
    assert main(["evaluate", str(comparison)]) == 2
    assert "normal-elbo" in one_line(capsys)


@pytest.mark.parametrize("name", ["weights.safetensors", "run.yaml"])
@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_damaged_runs(run, name, command, capsys):
    path = run / name
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", os.urandom(len(whole))):
        path.write_bytes(damaged)
        assert main([command, str(run)]) == 2
        assert str(run) in one_line(capsys)
    path.unlink()
    if name == "run.yaml":  # a copy of what weights hold, which is not missed
        assert main([command, str(run)]) == 0
        return
    assert main([command, str(run)]) == 2
    assert str(run) in one_line(capsys)


def test_a_damaged_checkpoint_is_not_resumed(run, capsys):
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(run)
    assert main(["fit", *SMALL, "--out", str(run), "--resume"]) == 2
    assert "checkpoint.safetensors" in one_line(capsys)
    assert contents(run).items() >= {k: v for k, v in before.items() if "logs" not in k}.items()


def test_resume_of_a_complete_fit_changes_no_weights(run):
    before = (run / "weights.safetensors").read_bytes()
    assert main(["fit", *SMALL, "--out", str(run), "--resume"]) == 0
    assert (run / "weights.safetensors").read_bytes() == before


def test_a_reader_that_has_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from pyrogen.cli import main; raise SystemExit(main())", "fit", "--prior.help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_interruption(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_compare", interrupt)
    assert main(["compare"]) == 130
    assert "interrupted" in one_line(capsys)


def test_divergence(monkeypatch, capsys):
    def diverge(*_):
        raise NonFiniteLoss("the loss is nan at step 3")

    monkeypatch.setattr(commands, "run_fit", diverge)
    assert main(["fit"]) == 1
    assert "the loss is nan at step 3" in one_line(capsys)


def test_threads_are_few_for_small_data_and_given_back(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(commands, "compare", lambda *_, **__: seen.append(torch.get_num_threads()))
    for extra in ([], ["--threads", "3"]):
        assert main(["compare", *extra]) == 0
        assert torch.get_num_threads() == before
    assert seen == [1, 3]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("compare", ["--guides", "--objectives", "--data", "--out", "--resume", "--config", "--particles", "--prior"]),
        ("fit", ["--family", "--objective", "--model", "--root", "--epochs", "--overwrite", "--device", "--precision"]),
        ("evaluate", ["run", "--particles", "--trust", "--data", "--root"]),
        ("sample", ["run", "--n", "--out", "--mean", "--trust"]),
        ("report", ["RUN...", "--out", "--data", "--root", "--split", "--rows", "--seed", "--trust", "--overwrite"]),
    ],
)
def test_help(command, options, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in options)
    assert "<class" not in text and "type:" not in text and "known subclasses" not in text


def test_help_of_a_part(capsys):
    assert main(["fit", "--prior.help", "Mixture"]) == 0
    text = capsys.readouterr().out
    assert "components: int = 10" in text and "Jankowiak" in text
    assert main(["fit", "--objective.help"]) == 0
    assert {"AVB", "ELBO", "IWAE"} <= set(capsys.readouterr().out.strip().split(", "))
    assert main(["fit", "--prior.help", "Mixure"]) == 2


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "pyrogen", "fit", "--data", "mnits"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "did you mean mnist" in ended.stderr

"""Runs of every earlier format are loaded and resumed, from files that were written then."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.inference import AVB, ELBO, AmortizedGuide, FitOptions, fit
from pyrogen.inference.checkpoints import read_tensors, write_tensors
from pyrogen.inference.migration import FORMAT
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

FORMATS = Path(__file__).parents[1] / "formats"
SHAPE = (1, 3, 3)
FILES = ("weights.safetensors", "run.yaml", "history.csv", "checkpoint.safetensors")


def rows(count, start=0):
    return ((torch.arange(start * 9, (start + count) * 9) * 7 % 11) > 4).reshape(count, *SHAPE)


def programs(family) -> Any:
    torch.manual_seed(5)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, SHAPE, hidden=(4,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 4, hidden=(4,)), family)


def resumed(name, folder, **changed) -> Any:
    """The fit that the frozen run is of, gone on with."""
    if name == "elbo":
        data = Data("frozen", train=rows(12), validation=rows(6, 12), test=rows(6, 18), values="binary")
        own: dict[str, Any] = {"objective": ELBO(), "data": data, "patience": 3, "average": 0.9}
        model, guide = programs(Normal)
    else:
        own = {"objective": AVB(critic=partial(Critic, hidden=(4,))), "data": rows(12)}
        model, guide = programs(partial(Implicit, noise=2, hidden=(4,)))
    given = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "progress": False} | own | changed
    return fit(model, guide, given.pop("objective"), given.pop("data"), out=folder, resume=True, **given)


@pytest.fixture(params=[f"{path.parent.name}/{path.name}" for path in sorted(FORMATS.glob("*/*")) if path.is_dir()])
def frozen(request, tmp_path):
    """The name of a frozen run, where it is, and a copy that may change."""
    shutil.copytree(FORMATS / request.param, tmp_path / "run")
    return request.param.split("/")[1], FORMATS / request.param, tmp_path / "run"


def test_there_are_runs_of_every_earlier_format():
    assert {path.name for path in FORMATS.iterdir() if path.is_dir()} == {str(n) for n in range(1, FORMAT)}
    for folder in FORMATS.glob("*/*"):
        assert {path.name for path in folder.iterdir()} == {*FILES}


def test_it_is_loaded(frozen):
    name, there, _ = frozen
    run = pg.load(there)
    weights = load_file(there / "weights.safetensors")
    state = run.programs.state_dict()
    assert len(weights) >= 8 and all(torch.equal(state[each], weights[each]) for each in weights)
    text = [line.split(",") for line in (there / "history.csv").read_text().splitlines()]
    assert [*run.history.columns] == text[0] and run.history["loss"].tolist() == [float(row[2]) for row in text[1:]]
    assert run.options.epochs == 2 and run.options.average == {"elbo": 0.9, "avb": None}[name]
    assert pg.evaluate(run, rows(6), parts=["likelihood"], particles=10).to_dict()["observations"] == 6


def test_it_is_resumed(frozen):
    """With no step left to take it stands as it was written; with more it goes on, its optimizer too."""
    name, there, folder = frozen
    with safe_open(there / "checkpoint.safetensors", framework="pt") as file:
        written = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    weights = load_file(there / "weights.safetensors")
    done = resumed(name, folder).programs.state_dict()
    assert all(torch.equal(done[each], weights[each]) for each in weights)
    assert yaml.safe_load((folder / "run.yaml").read_text())["format"] == FORMAT
    longer = resumed(name, folder, epochs=3)
    assert longer.history["step"].tolist() == [3, 6, 9]
    assert longer.history["loss"].tolist()[:2] == pg.load(there).history["loss"].tolist()
    tensors, values = read_tensors(folder / "checkpoint.safetensors")
    steps = [each for each in written if each.startswith("optimizer.") and each.endswith(".step")]
    assert steps and all(tensors[each] == written[each] + 3 for each in steps)
    assert values["format"] == FORMAT and values["step"] == 9
    pg.load(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": rows(12).flip(0)}, r"data\.fingerprint was '\w{64}' and is '\w{64}'"),
        ({"data": rows(11)}, r"data\.rows was 12 and is 11"),
        ({"learning_rate": 0.1}, r"options\.learning_rate was 0\.01 and is 0\.1"),
        (
            {"objective": AVB(4, critic=partial(Critic, hidden=(4,)))},
            r"objective\.init_args\.particles was 8 and is 4",
        ),
    ],
)
def test_what_format_1_could_tell_apart_is_refused(changed, message, tmp_path):
    folder = shutil.copytree(FORMATS / "1" / "avb", tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        resumed("avb", folder, epochs=3, **changed)


def test_options_that_there_were_not_yet_are_what_fits_did_then(tmp_path):
    """Of earlier runs of format 1, which knew neither some options nor several processes."""
    folder = shutil.copytree(FORMATS / "1" / "elbo", tmp_path / "run")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("loader_workers", "matmul_precision"):
        del settings["options"][name]
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    tensors = load_file(folder / "checkpoint.safetensors")
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        values = json.loads(file.metadata()["values"])
    del values["identity"]["options"]["matmul_precision"], values["identity"]["processes"], values["compile_seconds"]
    save_file(tensors, folder / "checkpoint.safetensors", metadata={"values": json.dumps(values)})
    expected = FitOptions(epochs=2, batch_size=5, learning_rate=1e-2, patience=3, average=0.9)
    assert pg.load(folder).options == expected
    assert len(resumed("elbo", folder, epochs=3).history) == 3


def test_files_of_a_later_format_ask_for_a_later_version(tmp_path):
    run = resumed("avb", tmp_path / "run")
    later = rf"was written by a later version of pyrogen, in format {FORMAT + 1}, .* update pyrogen"
    for name in ("checkpoint.safetensors", "weights.safetensors"):
        tensors, values = read_tensors(tmp_path / "run" / name)
        write_tensors(tmp_path / "run" / name, tensors, values | {"format": FORMAT + 1})
    with pytest.raises(ValueError, match=rf"weights\.safetensors {later}"):
        pg.load(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"checkpoint\.safetensors {later}"):
        resumed("avb", tmp_path / "run")
    pg.save(run, tmp_path / "run", overwrite=True)
    assert pg.load(tmp_path / "run").history.equals(run.history)


@pytest.mark.parametrize("number", [None, 0, "2", True, [2]])
def test_what_has_no_format_is_damaged(number, tmp_path):
    resumed("avb", tmp_path / "run")
    path = tmp_path / "run" / "weights.safetensors"
    tensors, values = read_tensors(path)
    write_tensors(path, tensors, values | {"format": number})
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: its format is"):
        pg.load(tmp_path / "run")


def test_files_of_two_formats_are_not_one_run(tmp_path):
    resumed("avb", tmp_path / "run")
    shutil.copy(FORMATS / "1" / "avb" / "weights.safetensors", tmp_path / "run")
    with pytest.raises(ValueError, match=r"run\.yaml is damaged, or not of format 1 as weights\.safetensors beside it"):
        pg.load(tmp_path / "run")

"""Runs on disk: equal when they come back, whole or untouched, and never a way to run code."""

import functools
import json
import os
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from torch import nn

import pyrogen as pg
from pyrogen.distributions import (
    Bernoulli,
    Flow,
    Mixture,
    MultivariateNormal,
    Normal,
    NormalLikelihood,
    StandardNormal,
    Vamp,
)
from pyrogen.inference import ELBO, IWAE, AmortizedGuide, FitOptions, LinearSchedule, OutputExistsError, Run, fit
from pyrogen.inference import checkpoints as checkpoints_module
from pyrogen.inference.checkpoints import load_weights, read_tensors, unique_tensors, write_tensors
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP

SHAPE = (1, 4, 4)


def fitted(model, guide, x=None, objective=None, **given) -> Any:
    x = (torch.rand(12, *SHAPE) > 0.5) if x is None else x
    options: dict[str, Any] = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "progress": False} | given
    return fit(model, guide, objective or ELBO(), x, **options)


def load(folder, **parts) -> Any:
    return pg.load(folder, **parts)


def vae(prior=None, likelihood=None, family=Normal) -> Any:
    model = LatentVariableModel(prior or StandardNormal(2), likelihood or Bernoulli(MLP(2, SHAPE, hidden=(8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, hidden=(8,)), family)


def results(run, x):
    """Bounds and draws from the run's programs."""
    torch.manual_seed(0)
    with torch.no_grad(), pyro.get_param_store().scope():
        bound = IWAE(3)(run.model, run.guide).bound(x)
        drawn = pyro.poutine.trace(pyro.poutine.uncondition(run.model)).get_trace(x).nodes["x"]["value"]
    return torch.cat([bound, drawn.flatten().to(bound.dtype)])


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


PRIORS = {
    "standard normal": lambda: StandardNormal(2),
    "normal": lambda: Normal(2),
    "multivariate normal": lambda: MultivariateNormal(2),
    "mixture": lambda: Mixture(2, components=3),
    "vamp": lambda: Vamp(2, SHAPE, components=3),
    "vamp of data": lambda: Vamp(2, torch.rand(5, *SHAPE), components=3),
    "flow": lambda: Flow(2, layers=2),
}
FAMILIES = {
    "flow": Flow,
    "partial": functools.partial(Flow, layers=1, transform="planar"),
    "mapping": {"z": functools.partial(Mixture, components=2)},
    "built": MultivariateNormal(2, 6),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_every_prior_comes_back_equal_from_a_moved_folder(prior, tmp_path):
    check_round_trip(vae(prior()), tmp_path)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_way_to_give_a_family_comes_back_equal(family, tmp_path):
    check_round_trip(vae(family=family), tmp_path)


@pytest.mark.parametrize("scale", [0.5, "shared", "optimal"])
def test_likelihoods_come_back_with_their_buffers(scale, tmp_path):
    loaded = check_round_trip(vae(likelihood=NormalLikelihood(MLP(2, SHAPE), scale)), tmp_path)
    if scale == "optimal":
        assert int(loaded.model.likelihood.batches) == 6 and loaded.model.likelihood.variance != 1


def check_round_trip(programs, tmp_path) -> Any:
    run = fitted(*programs, out=tmp_path / "first")
    pg.save(run, tmp_path / "second")
    x = (torch.rand(7, *SHAPE) > 0.5).float()
    for name in ("first", "second"):
        os.rename(tmp_path / name, tmp_path / f"{name} moved")
        loaded: Any = load(tmp_path / f"{name} moved")
        assert type(loaded).__name__ == Run.__name__
        assert torch.equal(results(run, x), results(loaded, x))
        pd.testing.assert_frame_equal(loaded.history, run.history, check_exact=True)
        assert loaded.options == run.options and loaded.example == run.example and loaded.seconds == run.seconds
        assert not loaded.model.training and not loaded.guide.training
    return loaded


def test_objectives_options_and_the_data_set_come_back(tmp_path):
    data = pg.data.load("digits")
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, data.event_shape)))
    guide = AmortizedGuide(model, MLP(data.event_shape, 8))
    run = fit(
        model,
        guide,
        ELBO(2, beta=LinearSchedule(steps=3), free_bits=0.1),
        data,
        steps=2,
        optimizer=torch.optim.AdamW,
        schedule="cosine",
        patience=3,
        loader_workers=2,
        matmul_precision="high",
        progress=False,
        out=tmp_path / "run",
    )
    loaded = load(tmp_path / "run")
    assert loaded.objective.beta == LinearSchedule(steps=3) and loaded.objective.free_bits == 0.1
    assert loaded.objective.observations == len(data.train)
    assert loaded.options == run.options and loaded.options.optimizer is torch.optim.AdamW
    assert pg.data.load(**loaded.data).train.equal(data.train)
    assert "Run(model=LatentVariableModel, guide=AmortizedGuide" in repr(loaded)


def test_a_partial_optimizer_comes_back_and_a_lambda_as_the_default(tmp_path):
    sgd = functools.partial(torch.optim.SGD, momentum=0.5)
    fitted(*vae(), optimizer=sgd, schedule=lambda share: 1.0, out=tmp_path / "run")
    options = load(tmp_path / "run").options
    assert (options.optimizer.func, options.optimizer.keywords) == (torch.optim.SGD, {"momentum": 0.5})
    assert options.schedule == "constant"
    assert "not_described" in yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["options"]["schedule"]


def test_double_precision_comes_back_as_such(tmp_path):
    run = fitted(*vae(), precision="64-true", out=tmp_path / "run")
    loaded = load(tmp_path / "run")
    x = (torch.rand(7, *SHAPE) > 0.5).double()
    assert torch.equal(results(run, x), results(loaded, x))


def test_a_given_model_is_the_one_that_the_guide_reads(tmp_path):
    """A Vamp prior shares the posterior of the guide, so the two must be bound to each other."""
    run = fitted(*vae(Vamp(2, SHAPE, components=3)), out=tmp_path / "run")
    torch.manual_seed(9)
    model = LatentVariableModel(Vamp(2, SHAPE, components=3), Bernoulli(MLP(2, SHAPE, hidden=(8,))))
    loaded = load(tmp_path / "run", model=model)
    assert loaded.model is model and loaded.guide.model is model
    x = torch.zeros(3, *SHAPE)
    assert torch.equal(results(run, x), results(loaded, x))


def test_plain_functions_are_given_to_load(tmp_path):
    def build() -> Any:
        decoder, encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 4)

        def model(x):
            pyro.module("decoder", decoder)
            scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            loc, raw = encoder(x).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

        return model, guide

    model, guide = build()
    run = fitted(model, guide, torch.randn(12, 3), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"the model of .* could not be written .* pass model= to load"):
        load(tmp_path / "run")
    model, guide = build()
    with pytest.raises(ValueError, match="pass guide= to load"):
        load(tmp_path / "run", model=model)
    loaded = load(tmp_path / "run", model=model, guide=guide)
    x = torch.randn(5, 3)
    assert torch.equal(results(run, x), results(loaded, x))


MODULE = """
import pyro, torch
import pyro.distributions as dist
from torch import nn

class Decoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 3))
    def forward(self, z):
        return self.layers(z)

class Model(nn.Module):
    def __init__(self, decoder, scale=1.0):
        super().__init__()
        self.decoder = decoder
        self.scale = scale
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)
"""


def test_classes_in_a_file_of_the_users_need_trust(tmp_path):
    from pyrogen.configuration import import_object

    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    model = import_object(f"{file}:Model", trust=True)(import_object(f"{file}:Decoder", trust=True)(7), scale=0.5)
    run = fitted(model, AmortizedGuide(model, MLP(3, 4)), torch.randn(12, 3), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"mine\.py:Model' is code outside .* pass trust=True"):
        load(tmp_path / "run")
    loaded = load(tmp_path / "run", trust=True)
    assert loaded.guide.model is loaded.model and loaded.model.decoder.width == 7
    x = torch.randn(5, 3)
    assert torch.equal(results(run, x), results(loaded, x))


def test_a_program_that_has_changed_since_is_named(tmp_path):
    from pyrogen.configuration import _FILE_PREFIX, import_object

    file, folder = tmp_path / "mine.py", tmp_path / "run"

    def mine(text):
        file.write_text(text)
        for name in [name for name in sys.modules if name.startswith(_FILE_PREFIX)]:
            del sys.modules[name]  # as in a new process
        return import_object(f"{file}:Model", trust=True)(import_object(f"{file}:Decoder", trust=True)(7), scale=0.5)

    model = mine(MODULE)
    fitted(model, AmortizedGuide(model, MLP(3, 4)), torch.randn(12, 3), out=folder)
    mine("# Of this year.\n" + MODULE.replace("= decoder", "=  decoder"))
    assert load(folder, trust=True).source.keys() == {"Model", "Decoder"}  # and no warning, which would be an error
    given = mine(MODULE.replace("self.decoder(z)", "-self.decoder(z)"))
    changed = r"the source of Model has changed since .*run was fitted"
    with pytest.warns(UserWarning, match=changed):
        loaded = load(folder, trust=True)
    with pytest.warns(UserWarning, match=changed):
        load(folder, model=given)
    pg.save(loaded, tmp_path / "another run")
    with pytest.warns(UserWarning, match=changed):
        load(tmp_path / "another run", trust=True)
    edited(folder, lambda settings: settings.update(source=3))
    with pytest.raises(ValueError, match=r"run\.yaml is damaged: it lacks \['source'\]"):
        load(folder, trust=True)
    edited(folder, lambda settings: settings.pop("source"))
    assert load(folder, trust=True).source == {}  # as of earlier versions


def test_a_model_without_latents_needs_no_guide(tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

    x = torch.randn(400, 3) + 2
    run = fitted(Mean(), None, x, epochs=30, batch_size=100, learning_rate=0.1, out=tmp_path / "run")
    torch.testing.assert_close(run.model.loc.detach(), x.mean(0), atol=0.15, rtol=0)
    loaded = load(tmp_path / "run", model=Mean())
    assert loaded.guide is None and torch.equal(loaded.model.loc, run.model.loc)


@pytest.fixture
def saved(tmp_path):
    """A run that has been saved, and its folder."""
    return fitted(*vae(), out=tmp_path / "run"), tmp_path / "run"


def rewritten(folder, text):
    """The run with another text for its YAML, checksums right, as somebody would make it who means harm."""
    path = folder / "weights.safetensors"
    tensors, values = read_tensors(path)
    values["files"]["run.yaml"] = text
    write_tensors(path, tensors, values)
    (folder / "run.yaml").write_text(text)


def edited(folder, change):
    """The run with something changed in its YAML."""
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    change(settings)
    rewritten(folder, yaml.safe_dump(settings, sort_keys=False))


@pytest.mark.parametrize("name", ["weights.safetensors", "run.yaml", "history.csv"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_a_damaged_file_is_a_value_error_and_copies_may_be_missing(name, damage, saved):
    run, folder = saved
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 3] if damage == "truncated" else b"\xff\x00[{\n" * 40)
    before = contents(folder)
    if damage == "missing" and name != "weights.safetensors":
        loaded = load(folder)
        assert loaded.history.equals(run.history) and loaded.options == run.options
    else:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("key", ["model", "guide", "objective", "options", "example", "data", "seconds", "format"])
@pytest.mark.parametrize("value", [None, "nonsense", 3, [1], {"class_path": "torch.nn.Nothing"}])
def test_damaged_settings_are_value_errors_or_harmless(key, value, saved):
    _, folder = saved
    edited(folder, lambda settings: settings.pop(key))
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load(folder)
    edited(folder, lambda settings: settings.update({key: value}))
    try:
        load(folder)
    except ValueError as error:
        assert str(error)
    else:
        assert key in ("data", "seconds", "example", "guide")


def with_hostile(settings, part):
    evil = {"class_path": "os.system", "init_args": {"command": part}}
    places = {
        "model": lambda: settings["model"].update(evil),
        "deep": lambda: settings["model"]["init_args"]["likelihood"]["init_args"].update(decoder=evil),
        "guide": lambda: settings["guide"]["init_args"].update(family={"reference": "builtins.exec"}),
        "encoder": lambda: settings["guide"]["init_args"]["encoder"]["init_args"].update(
            activation={"reference": "torch.hub.load"}
        ),
        "objective": lambda: settings["objective"]["init_args"].update(beta=evil),
        "options": lambda: settings["options"].update(optimizer={"partial": "subprocess.Popen"}),
        "schedule": lambda: settings["options"].update(schedule={"reference": "os.abort"}),
        "dtype": lambda: settings["example"][0].update(dtype="load"),
    }
    places[part]()


@pytest.mark.parametrize("part", ["model", "deep", "guide", "encoder", "objective", "options", "schedule", "dtype"])
def test_hostile_settings_are_refused(part, saved, monkeypatch):
    def called(*_):
        raise AssertionError("hostile code was run")

    monkeypatch.setattr(os, "system", called)
    _, folder = saved
    edited(folder, lambda settings: with_hostile(settings, part))
    with pytest.raises(ValueError, match=r"."):
        load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch proof']",
        "format: !!python/object/new:os.system ['touch proof']",
        "model: !!python/name:os.system",
        "&a [*a]",
        "[" * 5000,
    ],
)
def test_yaml_tags_and_tricks_are_refused(text, saved, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(folder)
    rewritten(folder, text)
    with pytest.raises(ValueError, match=r"run\.yaml is damaged"):
        load(folder)
    assert not (folder / "proof").exists()


def test_weights_of_another_model_are_refused(saved, tmp_path):
    _, folder = saved
    model, guide = vae(likelihood=Bernoulli(MLP(2, SHAPE, hidden=(9,))))
    with pytest.raises(ValueError, match=r"belongs to another model, guide or objective: .* has shape"):
        load(folder, model=model, guide=guide)
    model, guide = vae(likelihood=Bernoulli(MLP(2, SHAPE, hidden=())))
    with pytest.raises(ValueError, match="it lacks"):
        load(folder, model=model, guide=guide)
    with pytest.raises(ValueError, match="holds no run"):
        load(tmp_path / "nowhere")


def test_saving_never_overwrites_unasked(saved, tmp_path):
    run, folder = saved
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        pg.save(run, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="holds no run"):
        pg.save(run, tmp_path / "thesis", overwrite=True)
    (tmp_path / "thesis" / "chapter.txt").unlink()
    assert contents(tmp_path) == before
    assert pg.save(run, folder, overwrite=True) == folder
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "history.csv", "run.yaml", "weights.safetensors"]
    (tmp_path / "thesis").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_save_that_fails_leaves_the_old_run(saved, tmp_path, monkeypatch):
    run, folder = saved
    before = contents(tmp_path)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"weights\.safetensors could .* disk full"):
            patch.setattr(os, name, failing)
            pg.save(run, folder, overwrite=True)
        assert name == "replace" or contents(tmp_path) == before
        assert load(folder).history.equals(run.history)


def failing(*_, **__):
    raise OSError("disk full")


@pytest.mark.parametrize("where", ["save_file", "half", "replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(where, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"step": 1})

    def half(stored, temporary, metadata):
        temporary.write_bytes(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if where in ("replace", "fsync"):
            patch.setattr(os, where, failing)
        else:
            patch.setattr(checkpoints_module, "save_file", half if where == "half" else failing)
        with pytest.raises(OSError, match="disk full"):
            write_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    tensors, values = read_tensors(path)
    assert torch.equal(tensors["a"], torch.ones(3)) and values == {"step": 1}
    write_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    assert read_tensors(path)[1] == {"step": 2}


def test_files_have_the_rights_that_the_user_gives_to_files(tmp_path):
    old = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", {}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_nothing_on_disk_is_pickled(saved):
    _, folder = saved
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert isinstance(json.loads(content[8 : 8 + length]), dict)
    kinds = {path.suffix for path in folder.iterdir() if path.is_file() and path.name != ".lock"}
    assert kinds == {".safetensors", ".yaml", ".csv"}


def test_tensors_of_every_type_survive(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "t": shared.T,
        "view": shared[0],
        "bits": torch.tensor([True, False]),
        "bytes": torch.get_rng_state(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "a", tensors, {"x": [1, None, "ü"], "nan": float("nan"), "third": 1 / 3})
    read, values = read_tensors(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert values["x"] == [1, None, "ü"] and np.isnan(values["nan"]) and values["third"] == 1 / 3


def test_shared_tensors_are_written_once_and_refused_weights_change_nothing():
    layer = nn.Linear(2, 2)
    twice = nn.Sequential(layer, layer)
    assert [*unique_tensors(twice)] == ["0.weight", "0.bias"]
    before = layer.weight.clone()
    for tensors in ({"0.weight": torch.zeros(2, 2)}, {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="the file belongs to another model"):
            load_weights(twice, tensors, "the file")
    assert torch.equal(layer.weight, before)


def test_options_are_checked():
    assert FitOptions(epochs=3) == FitOptions(epochs=3)
    for bad in ({"epochs": True}, {"epochs": 2.5}, {"epochs": 1, "gradient_clip": 0}, {"epochs": 1, "device": None}):
        with pytest.raises(ValueError, match=r"must be"):
            FitOptions(**bad)


def test_a_model_of_ours_with_parameters_alone_comes_back(tmp_path):
    model = ProbabilisticPCA(2, 5)
    run = fitted(model, AmortizedGuide(model, nn.Identity(), MultivariateNormal), torch.randn(12, 5))
    pg.save(run, tmp_path / "run")
    x = torch.randn(4, 5)
    assert torch.equal(results(run, x), results(load(tmp_path / "run"), x))

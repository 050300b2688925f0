"""Objects as plain values and back, and what is never built from a file of unknown origin."""

import enum
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pyro.nn import PyroModule
from torch import nn

from pyrogen.configuration import build, class_path, describe, import_object, without_moves
from pyrogen.distributions import Bernoulli, Flow, Mixture, MultivariateNormal, Normal, NormalLikelihood, StandardNormal
from pyrogen.inference import ELBO, IWAE, AmortizedGuide, CyclicalSchedule, LinearSchedule, Renyi
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP


def written(value):
    """A description that has been through YAML."""
    return yaml.safe_load(yaml.safe_dump(describe(value), sort_keys=False))


OBJECTS = {
    "elbo": ELBO(3, beta=LinearSchedule(steps=10, start=0.1), free_bits=0.5),
    "iwae": IWAE(7, gradient="doubly reparameterised", observations=12),
    "renyi": Renyi(0.3, 4, observations=None),
    "schedule": CyclicalSchedule(steps=7, rising=0.25),
    "mlp": MLP((1, 4, 4), 3, hidden=(5,), activation=nn.Tanh),
    "identity": nn.Identity(),
    "linear": nn.Linear(3, 2, bias=False),
    "convolution": nn.Conv2d(1, 2, (3, 3), stride=2, padding=1),
    "normalisation": nn.BatchNorm1d(4, momentum=0.3, affine=False),
    "embedding": nn.Embedding(3, 2),
    "sequence": nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.LeakyReLU(0.3), nn.Dropout(0.25)),
    "list": nn.ModuleList([nn.Linear(1, 2), nn.Linear(2, 1)]),
    "mapping": nn.ModuleDict({"a": nn.Linear(1, 2)}),
    "flow": Flow(2, 3, transform="spline_coupling", layers=2, hidden=(8,)),
    "model": LatentVariableModel(Mixture(2, components=3), NormalLikelihood(MLP(2, 5), scale="optimal")),
    "ppca": ProbabilisticPCA(2, (2, 3)),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "family": functools.partial(Flow, layers=2),
    "positional": functools.partial(Flow, 3, 4),
    "class": torch.optim.AdamW,
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS.keys())
def test_what_is_built_again_has_the_same_description_and_the_same_tensors(value):
    description = written(value)
    again = build(description)
    assert type(again) is type(value)
    assert describe(again) == description == describe(value)
    if isinstance(value, nn.Module):
        shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (value, again)]
        assert shapes[0] == shapes[1]
        assert repr(again) == repr(value)
    elif isinstance(value, functools.partial):
        assert (again.func, again.args, again.keywords) == (value.func, value.args, value.keywords)


def test_what_is_shared_stays_shared():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 4)))
    guide = AmortizedGuide(model, MLP(4, 8), {"z": functools.partial(Flow, layers=1)})
    text = yaml.safe_dump(describe({"model": model, "guide": guide}), sort_keys=False)
    assert text.count("LatentVariableModel") == 1
    again = build(yaml.safe_load(text))
    assert again["guide"].model is again["model"]
    assert again["guide"].family["z"].keywords == {"layers": 1}
    shared = nn.Linear(3, 3)
    twice = build(written(nn.Sequential(shared, nn.ReLU(), shared)))
    assert twice[0] is twice[2]


def test_a_built_conditional_distribution_for_each_site():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 4)))
    guide = AmortizedGuide(model, MLP(4, 8), {"z": MultivariateNormal(2, 8)})
    again = build(written(guide))
    assert type(again.conditionals["z"]) is MultivariateNormal
    assert again.conditionals["z"] is again.family["z"]


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (Colour.RED, 3),
        (torch.Size([2, 3]), [2, 3]),
        (Path("a") / "b", "a/b"),
        (1e-17, 1e-17),
        (float("inf"), float("inf")),
        (True, True),
        (None, None),
    ],
)
def test_numbers_become_plain_and_survive_yaml(value, plain):
    description = written(value)
    assert description == plain and type(description) is type(plain)


class Forgetful(nn.Module):
    def __init__(self, width):
        super().__init__()


class Starred(nn.Module):
    def __init__(self, **options):
        super().__init__()


class Keeps(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


class Own(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.ReLU())
        self.width = width


class WithoutConstructor(nn.Module):
    pass


class PyroWithoutConstructor(PyroModule):
    pass


def test_a_class_without_constructor_is_described_after_torch_compile_has_run(monkeypatch):
    """Its first use replaces `nn.Module.__init__` for as long as the process lives."""
    before = nn.Module.__init__
    monkeypatch.setattr(nn.Module, "__init__", lambda self, *args, **kwargs: before(self, *args, **kwargs))
    assert describe(WithoutConstructor())["init_args"] == {}


def test_classes_of_the_users_are_built_when_trusted_only():
    for value in (Own(3), WithoutConstructor(), PyroWithoutConstructor(), Keeps((1, "a")), Keeps(Own(2))):
        description = written(value)
        with pytest.raises(ValueError, match="which is not run unless you say so"):
            build(description)
        again = build(description, trust=True)
        assert type(again) is type(value) and describe(again) == description


def local_class():
    class Local(nn.Module):
        pass

    return Local


def circle():
    first = Keeps(None)
    first.__dict__["value"] = first
    return first


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Forgetful(3), "does not keep its argument 'width'"),
        (Starred(a=1), "takes \\*\\*options"),
        (Keeps(torch.zeros(3)), "a tensor of shape"),
        (Keeps(nn.Parameter(torch.zeros(3))), "a tensor of shape"),
        (Keeps({1: 2}), "a mapping with the key 1"),
        (Keeps({"class_path": "os.system"}), "a mapping with the key 'class_path'"),
        (Keeps(lambda x: x), "has no import path"),
        (local_class()(), "has no import path"),
        (functools.partial(lambda x: x), "has no import path"),
        (nn.Linear(2, 2).forward, "has no import path"),
        (circle(), "among its own arguments"),
        (1j, "keeps its arguments where"),
        (Keeps(torch.float32), "keeps its arguments where"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "has no import path"),
    ],
)
def test_what_cannot_be_described_says_why(value, message):
    with pytest.raises(ValueError, match=message):
        describe(value)


def test_paths_are_the_shortest_that_name_the_same_thing():
    assert class_path(nn.Linear) == "torch.nn.Linear"
    assert class_path(Normal) == "pyrogen.distributions.Normal"
    assert class_path(torch.optim.AdamW) == "torch.optim.AdamW"
    assert import_object(class_path(Own), trust=True) is Own


def nested(inner):
    """A hostile part deep inside an ordinary model."""
    network = {"class_path": "torch.nn.Sequential", "args": [{"class_path": "torch.nn.ReLU", "init_args": {}}, inner]}
    likelihood = {"class_path": "pyrogen.distributions.Bernoulli", "init_args": {"decoder": network}}
    prior = {"class_path": "pyrogen.distributions.StandardNormal", "init_args": {"features": 2}}
    return {
        "class_path": "pyrogen.models.LatentVariableModel",
        "init_args": {"prior": prior, "likelihood": likelihood},
    }


HOSTILE = [
    "os.system",
    "builtins.exec",
    "builtins.eval",
    "subprocess.Popen",
    "pickle.loads",
    "shutil.rmtree",
    "posix.system",
    "torch.hub.load",
    "torch.load",
    "torch.os.system",
    "torch.nn.os.system",
    "torch.serialization.pickle.loads",
    "torch.utils.cpp_extension.load_inline",
    "torch.jit.load",
    "torch.nn.modules.module.torch.load",
    "torch.nn.Module.load_state_dict",
    "torch.nn.functional.relu",
    "torch.nn.Parameter",
    "torch.nn.modules.module.Path",
    "torch.nn.Linear.__init__.__globals__",
    "torch.package.PackageImporter",
    "pyro.util.torch.load",
    "pyro.nn.module.torch.load",
    "pyro.get_param_store",
    "pyrogen.configuration.import_object",
    "pyrogen.configuration.importlib",
    "pyrogen.inference.run.shutil",
    "pyrogen.inference.run.clear_folder",
    "pyrogen.inference.run.Path",
    "pyrogen.inference.run.pd",
    "pyrogen.inference.load",
    "pyrogen.inference.fit",
    "pyrogen.inference.loop.Training",
    "pyrogen.data.load",
    "pyrogen.load",
    "evil.py:Model",
    "/tmp/evil.py:Model",
    "evil.Model",
    "",
    ".",
    "torch",
    "torch.nn.",
    "torch.nn..Linear",
    "..os.system",
    None,
    7,
    ["torch.nn.Linear"],
    {"reference": "os.system"},
]


@pytest.mark.parametrize("path", HOSTILE, ids=str)
@pytest.mark.parametrize("key", ["class_path", "reference", "partial"])
def test_nothing_hostile_is_imported_or_called(path, key, tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    (tmp_path / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Model: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    description = {key: path, "init_args": {"command": f"touch {proof}"}, "args": []}
    for each in (description, nested(description), [{"a": [description]}]):
        with pytest.raises(ValueError, match=r"."):
            build(each)
    positional = {key: path, "args": [f"touch {proof}"]}
    with pytest.raises(ValueError, match=r"."):
        build(nested(positional))
    assert not proof.exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "description",
    [
        {"class_path": "torch.nn.Linear", "init_args": [1, 2]},
        {"class_path": "torch.nn.Linear", "args": "ab"},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": "many", "out_features": 2}},
        {"class_path": "torch.nn.Linear", "init_args": {"nonsense": 1}},
        {"class_path": "torch.nn.Linear"},
        {"class_path": "torch.nn.Nonsense"},
        {"class_path": "pyrogen.distributions.Nonsense"},
        {"class_path": "pyrogen.distributions.nonsense.Nonsense"},
        {"class_path": "pyrogen.distributions.Flow", "init_args": {"features": {"a": 1}}},
    ],
)
def test_damaged_descriptions_are_value_errors(description):
    with pytest.raises(ValueError, match=r"can't build|expected|there is no|can't import"):
        build(description)


def test_circles_and_towers_of_aliases_are_harmless():
    with pytest.raises(ValueError, match="refers to itself"):
        build(yaml.safe_load("&a [*a]"))
    with pytest.raises(ValueError, match="refers to itself"):
        build(yaml.safe_load("&a {class_path: torch.nn.Sequential, args: [*a]}"))
    lines = ["a0: &a0 [1, 1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    tower = build(yaml.safe_load("\n".join(lines)))  # 2**60 leaves, were it not shared
    assert tower["a59"][0] is tower["a59"][1]


def test_classes_from_a_file(tmp_path, caplog):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    net = import_object(f"{file}:Net", trust=True)
    assert import_object(f"{file}:Net", trust=True) is net
    description = written(net(2, 3))
    assert description["class_path"] == f"{file}:Net"
    assert type(build(description, trust=True)) is net
    with pytest.raises(ValueError, match="not run unless you say so"):
        build(description)
    for path, message in (
        (f"{file}:Nonsense", "there is no 'Nonsense'"),
        (f"{tmp_path}/none.py:Net", "no file"),
        (f"{tmp_path}:Net", "no file"),
        ("nonsense.Net", "can't import"),
        (str(file), r"names no class or function; give FILE\.py:NAME, such as mine\.py:Model"),
        ("Net", "can't import"),
    ):
        with pytest.raises(ValueError, match=message):
            import_object(path, trust=True)
    assert caplog.text == ""
    assert type(build({"class_path": "/moved/mine.py:Net", "args": [2, 3]}, trust=True, beside=tmp_path)) is net
    assert f"/moved/mine.py is not there; {file} is taken in its place" in caplog.text
    with pytest.raises(ValueError, match=f"there is no 'Nonsense' in {file}"):
        import_object("/moved/mine.py:Nonsense", trust=True, beside=tmp_path)


def test_each_file_may_be_moved_for_itself(tmp_path):
    file = tmp_path / "stays.py"
    file.touch()
    there = {"model": "/gone/mine.py:Model", "encoder": f"{file}:Net", "other": ["/gone/mine.py:Other", 2]}
    here = {"model": "/new/mine.py:Model", "encoder": f"{file}:Net", "other": ["/new/another.py:Other", 2]}
    before, now = without_moves(there, here)
    assert before == {"model": "Model", "encoder": f"{file}:Net", "other": ["Other", 2]}
    assert now == {"model": "Model", "encoder": f"{file}:Net", "other": ["/new/another.py:Other", 2]}

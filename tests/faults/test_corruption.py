"""Runs and checkpoints whose files were changed: each is refused by name, or gives what it gave before."""

import ast
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import Dataset

import pyrogen as pg
from pyrogen import cli
from pyrogen.configuration import _FILE_PREFIX, import_object
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.inference import ELBO, AmortizedGuide, fit
from pyrogen.inference.checkpoints import read_tensors, write_tensors
from pyrogen.inference.fingerprints import fingerprint, sites_of, source_of
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

WEIGHTS, SETTINGS, HISTORY, CHECKPOINT = FILES = (
    "weights.safetensors",
    "run.yaml",
    "history.csv",
    "checkpoint.safetensors",
)
SHAPE = (1, 2, 2)
ROWS = (torch.arange(64) * 5 % 7 > 3).reshape(16, *SHAPE)


def fitted(folder, built=1, epochs=2, **given) -> Any:
    torch.manual_seed(built)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, SHAPE, hidden=(3,))))
    guide = AmortizedGuide(model, MLP(SHAPE, 3, hidden=()))
    options: dict[str, Any] = {"epochs": epochs, "batch_size": 8, "progress": False, "data": ROWS} | given
    return fit(model, guide, ELBO(), options.pop("data"), out=folder, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that is only looked at."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    fitted(folder)
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    return Path(shutil.copytree(kept, tmp_path / "run"))


def loaded(folder) -> tuple[Any, ...]:
    """All that is read of a run."""
    run = pg.load(folder)
    weights = {name: value.tolist() for name, value in run.programs.state_dict().items()}
    plain = {name: value for name, value in vars(run).items() if name not in ("model", "guide", "objective", "history")}
    return weights, run.history.to_csv(), plain, repr((run.model, run.guide, run.objective))


def looked_at(folder) -> tuple[Any, ...]:
    """All that is read of a checkpoint."""
    tensors, values = read_tensors(folder / CHECKPOINT)
    return {name: value.tolist() for name, value in tensors.items()}, values


def gone_on(folder) -> tuple[Any, ...]:
    """What a resumed fit comes to, but for its times."""
    run = fitted(folder, epochs=3, resume=True)
    weights = {name: value.tolist() for name, value in run.programs.state_dict().items()}
    return weights, run.history.drop(columns=["seconds", "rows_per_second"]).to_csv()


def outcomes(path, contents, use) -> list[str]:
    """What becomes of a run with each of some contents for one file; whatever is taken gives what it gave before."""
    whole, found = path.read_bytes(), []
    copied = path.parents[1] / f"again {use.__name__}"
    expected = use(Path(shutil.copytree(path.parent, copied)))
    for content in contents:
        shutil.rmtree(copied)
        shutil.copytree(path.parent, copied)
        (copied / path.name).write_bytes(content)
        try:
            assert use(copied) == expected
            found.append("harmless")
        except ValueError as error:
            assert path.name in str(error), str(error)
            found.append("refused")
            if use is gone_on:
                assert (copied / path.name).read_bytes() == content
    assert path.read_bytes() == whole
    return found


def flipped(content, count):
    """The content with a bit changed, at so many places spread evenly over it."""
    bits = random.Random(0)
    for number in range(count):
        changed = bytearray(content)
        changed[number * len(content) // count] ^= 1 << bits.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_no_changed_bit_goes_unnoticed(name, folder):
    """Some in every part of a file: header, tensors, values; whitespace of a header alone could be harmless."""
    content = (folder / name).read_bytes()
    found = outcomes(folder / name, flipped(content, 400), looked_at if name == CHECKPOINT else loaded)
    if name == CHECKPOINT:
        found += outcomes(folder / name, flipped(content, 20), gone_on)
    assert found.count("refused") >= 0.98 * len(found)


@pytest.mark.parametrize("name", FILES)
def test_no_file_cut_short_goes_unnoticed(name, folder):
    content = (folder / name).read_bytes()
    places = [0, 1, 7, 8, 9, *(len(content) * part // 16 for part in range(1, 16))]
    places += [len(content) - 2, *([len(content) - 1] if name in (WEIGHTS, CHECKPOINT) else [])]  # copies end a line
    use = gone_on if name == CHECKPOINT else loaded
    found = outcomes(folder / name, [*(content[:place] for place in places), content + b"\0", b"\0" * 100], use)
    assert {*found} == {"refused"}


REWRITTEN: list[tuple[str, Callable[[str], str]]] = [
    *((name, lambda text: text.replace("\n", "\r\n")) for name in (SETTINGS, HISTORY)),
    *((name, lambda text: f"\ufeff{text}") for name in (SETTINGS, HISTORY)),
    *((name, str.rstrip) for name in (SETTINGS, HISTORY)),
    (HISTORY, lambda text: re.sub(r"[^,\n]+", r'"\g<0>"', text)),
    (SETTINGS, lambda text: yaml.safe_dump(yaml.safe_load(text), default_flow_style=True, sort_keys=False)),
]


@pytest.mark.parametrize(("name", "rewrite"), REWRITTEN)
def test_a_copy_that_says_the_same_is_taken(name, rewrite, folder):
    """As an editor or a spreadsheet leaves it."""
    before, content = loaded(folder), rewrite((folder / name).read_text()).encode()
    assert content != (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    assert loaded(folder) == before and (folder / name).read_bytes() == content
    (folder / name).write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(ValueError, match="beside it are not of one run"):
        pg.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS, HISTORY])
def test_a_file_of_another_run_is_refused(name, folder, tmp_path):
    """Of one that differs in nothing but what it drew."""
    fitted(tmp_path / "other", built=2)
    shutil.copy(tmp_path / "other" / name, folder)
    with pytest.raises(ValueError, match=r"and weights\.safetensors beside it are not of one run") as error:
        pg.load(folder)
    assert name in str(error.value)
    if name != WEIGHTS:
        (folder / name).unlink()  # as the message says
        pg.load(folder)


def test_a_checkpoint_of_another_training_is_refused_unless_told(folder, tmp_path):
    fitted(tmp_path / "other", built=2)
    shutil.copy(tmp_path / "other" / CHECKPOINT, folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"differs: weights\.safetensors beside it are of another training"):
        fitted(folder, epochs=3, resume=True)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    with pytest.warns(UserWarning, match="are of another training; it goes on all the same"):
        run = fitted(folder, epochs=3, resume="anyway")
    other = fitted(tmp_path / "other", built=2, epochs=3, resume=True)
    assert [*run.history["loss"]] == [*other.history["loss"]]


@pytest.mark.parametrize("history", ["epoch,seconds\n1,soon\n", 3, None])
def test_damaged_weights_are_written_anew_from_the_checkpoint(history, folder, tmp_path):
    whole = fitted(shutil.copytree(folder, tmp_path / "whole"), epochs=3, resume=True)
    tensors, values = read_tensors(folder / WEIGHTS)
    files = None if history is None else values["files"] | {HISTORY: history}
    write_tensors(folder / WEIGHTS, tensors, values | {"files": files})
    with pytest.raises(ValueError, match=r"damaged|not of one run"):
        pg.load(folder)
    fitted(folder, epochs=3, resume=True)
    assert [*pg.load(folder).history["loss"]] == [*whole.history["loss"]]


def test_an_older_checkpoint_of_the_same_training_goes_on(folder, tmp_path):
    older = (folder / CHECKPOINT).read_bytes()
    whole = fitted(folder, epochs=4, resume=True)
    (folder / CHECKPOINT).write_bytes(older)
    assert [*fitted(folder, epochs=4, resume=True).history["loss"]] == [*whole.history["loss"]]


def test_damaged_weights_do_not_keep_a_training_from_going_on(folder, kept, tmp_path):
    expected = gone_on(shutil.copytree(kept, tmp_path / "other"))
    for content in (b"", b"\0" * 50, (folder / WEIGHTS).read_bytes()[:200]):
        again = Path(shutil.copytree(kept, tmp_path / str(len(content))))
        (again / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged, but checkpoint\.safetensors beside it is whole: .*--resume"):
            pg.load(again)
        assert gone_on(again) == expected
        pg.load(again)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(name, folder):
    (folder / name).unlink()
    (folder / name).mkdir()
    use = gone_on if name == CHECKPOINT else loaded
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        use(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"files": 3},
        {"files": {}},
        {"files": {SETTINGS: 1, HISTORY: ""}},
        {},
    ],
)
def test_weights_that_say_nonsense_are_refused(values, folder):
    tensors, _ = read_tensors(folder / WEIGHTS)
    write_tensors(folder / WEIGHTS, tensors, {"format": 2} | values)
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        pg.load(folder)


@pytest.mark.parametrize("key", ["optimizers", "tallies", "watch", "step", "best", "history", "identity", "precision"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
def test_checkpoints_that_say_nonsense_are_refused_or_harmless(key, value, folder):
    tensors, values = read_tensors(folder / CHECKPOINT)
    write_tensors(folder / CHECKPOINT, tensors, values | {key: value})
    try:
        fitted(folder, epochs=3, resume=True)
    except ValueError as error:
        assert CHECKPOINT in str(error)
    else:
        assert key in ("best", "precision", "tallies", "history") or (key, value) in [("step", 3), ("watch", {})]


class Shifted(nn.Module):
    """A program of a user's own."""

    def __init__(self, kind=dist.Normal, name="z"):
        super().__init__()
        self.kind, self.name = kind, name
        self.loc = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(self.name, self.kind(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(scaled(z) + self.loc, 1.0).to_event(1), obs=x)


class Spelled:
    """What versions of Python write each in its own way."""

    kinds: tuple[int, ...] = (0, *(1, 2))

    def text(self, z, *, of=None):
        return (
            f"it's {z[0]!r:>{10}} {{}} {z[:1, ...]}",
            rb"\n",
            -0.0,
            1e100 if of else ~z,
            lambda *a: {**a[0], "c": (b := None)},
        )


def scaled(z):
    return 2 * z


VALUES = torch.arange(48.0).reshape(12, 4) % 5


def own(folder, model=None, **given) -> Any:
    torch.manual_seed(0)
    model = Shifted() if model is None else model
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "progress": False, "data": VALUES} | given
    return fit(model, AmortizedGuide(model, nn.Linear(4, 3)), ELBO(), options.pop("data"), out=folder, **options)


def test_another_program_is_named_and_refused_unless_told(tmp_path, monkeypatch):
    own(tmp_path / "run")
    assert len(own(tmp_path / "run", epochs=2, resume=True).history) == 2
    for model, differs in (
        (Shifted(dist.Laplace), r"sites\.model\.z was 'Normal \(4,\) in data' and is 'Laplace \(4,\) in data'"),
        (Shifted(name="w"), r"sites\.model\.z was 'Normal \(4,\) in data' and is None"),
    ):
        with pytest.raises(ValueError, match=differs):
            own(tmp_path / "run", model, epochs=3, resume=True)
    monkeypatch.setitem(globals(), "scaled", another)
    with pytest.raises(ValueError, match=r"source\.scaled was '\w{16}' and is '\w{16}'"):
        own(tmp_path / "run", epochs=3, resume=True)
    with pytest.warns(UserWarning, match=r"source\.scaled was .* goes on all the same"):
        assert len(own(tmp_path / "run", epochs=3, resume="anyway").history) == 3


def another(z):
    return 2.5 * z


another.__qualname__ = "scaled"


MODULE = """
import pyro, torch
import pyro.distributions as dist
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)
"""


def test_a_program_rewritten_in_its_file_is_named_and_refused(tmp_path):
    def mine(text):
        (tmp_path / "mine.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith(_FILE_PREFIX)]:
            del sys.modules[name]  # as in a new process
        return import_object(f"{tmp_path / 'mine.py'}:Mine", trust=True)()

    own(tmp_path / "run", mine(MODULE))
    own(tmp_path / "run", mine("# Of last year.\n" + MODULE.replace("z + self", "z  +  self")), epochs=2, resume=True)
    with pytest.raises(ValueError, match=r"differs: source\.Mine was '\w{16}' and is '\w{16}'\. Resume"):
        own(tmp_path / "run", mine(MODULE.replace("z + self", "z - self")), epochs=3, resume=True)


def test_other_data_are_named_and_refused_unless_told(tmp_path):
    own(tmp_path / "run")
    data = VALUES.clone()
    data[7, 2] += 1
    with pytest.raises(ValueError, match=r"data\.fingerprint was '\w{64}' and is '\w{64}'.*resume='anyway'"):
        own(tmp_path / "run", data=data, epochs=2, resume=True)
    with pytest.warns(UserWarning, match=r"data\.fingerprint was"):
        run = own(tmp_path / "run", data=data, epochs=2, resume="anyway")
    assert [*run.history["epoch"]] == [1, 2]
    own(tmp_path / "run", data=data, epochs=3, resume=True)  # whose data they are now


def test_other_validation_data_are_named_and_refused(tmp_path):
    def data(held):
        return Data("frozen", train=ROWS, validation=held, test=ROWS[:2], values="binary")

    fitted(tmp_path / "run", epochs=1, data=data(ROWS[:4]))
    with pytest.raises(ValueError, match=r"data\.validation was '\w{64}' and is '\w{64}'"):
        fitted(tmp_path / "run", data=data(ROWS[4:8]), resume=True)


@pytest.mark.parametrize(
    ("begun", "changed", "message"),
    [
        ({}, {"learning_rate": 0.1}, r"options\.learning_rate was 0\.001 and is 0\.1"),
        ({}, {"optimizer": torch.optim.SGD}, r"options\.optimizer was None"),
        ({}, {"average": 0.9}, r"options\.average was None and is 0\.9"),
        ({"average": 0.9}, {"seed": 4}, r"options\.seed was 0 and is 4; options\.average was 0\.9 and is None"),
    ],
)
def test_other_options_go_on_when_told(begun, changed, message, tmp_path):
    first = fitted(tmp_path / "run", **begun)
    with pytest.warns(UserWarning, match=message):
        run = fitted(tmp_path / "run", epochs=3, resume="anyway", **changed)
    assert run.history.iloc[:2]["loss"].equals(first.history["loss"]) and len(run.history) == 3
    assert all(torch.isfinite(value).all() for value in run.programs.state_dict().values())


def test_what_can_not_be_loaded_is_refused_even_when_told(tmp_path):
    own(tmp_path / "run")
    model = Shifted()
    model.more = nn.Parameter(torch.zeros(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for resume in ("anyway", True):
        with pytest.raises(ValueError, match=r"weights don't fit: it lacks \['model\.more'\].* begun with") as error:
            own(tmp_path / "run", model, data=VALUES.flip(0), epochs=2, resume=resume)
        assert "anyway" not in str(error.value)  # which is no way here
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command_names_what_differs_and_goes_on_when_told(tmp_path, capsys):
    command = ["fit", "--latent", "2", "--epochs", "1", "--batch_size", "512", "--out", str(tmp_path / "run")]
    more = [*command, "--learning_rate", "0.01", "--epochs", "2"]
    assert cli.main(command) == 0
    assert cli.main([*more, "--resume"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "options.learning_rate was 0.001 and is 0.01" in said and "--resume --anyway" in said
    with pytest.warns(UserWarning, match=r"learning_rate was 0\.001 and is 0\.01; it goes on all the same"):
        assert cli.main([*more, "--resume", "--anyway"]) == 0
    assert [*pg.load(tmp_path / "run").history["learning_rate"]] == [0.001, 0.01]
    assert cli.main([*more, "--anyway"]) == 2
    assert "give it with --resume" in capsys.readouterr().err


def test_a_checkpoint_without_weights_is_pointed_to_and_outlives_an_overwrite_that_fails(folder):
    def failing(run):
        raise RuntimeError("a fault of my own")

    (folder / "weights.safetensors").unlink()
    checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"no weights\.safetensors, but checkpoint\.safetensors is whole.*--resume"):
        pg.load(folder)
    with pytest.raises(RuntimeError, match="my own"):
        fitted(folder, built=2, overwrite=True, checkpoint_every=9, callbacks=[failing])
    assert (folder / "checkpoint.safetensors").read_bytes() == checkpoint
    assert len(fitted(folder, epochs=3, resume=True).history) == len(pg.load(folder).history) == 3


@pytest.mark.parametrize("resume", ["always", None, 2])
def test_resume_is_one_of_three(resume, tmp_path):
    with pytest.raises(ValueError, match=r"resume .*'anyway'"):
        fitted(tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()


class Items(Dataset):
    """A data set of a user's own, which draws where it is told to."""

    def __init__(self, rows, noise=None):
        self.rows, self.noise = rows, noise

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] + (0 if self.noise is None else self.noise())


def test_fingerprints_of_tensors_see_all_there_is():
    x = torch.arange(6000.0).reshape(1000, 2, 3)
    known = fingerprint((x,))
    for row in (0, 1, 500, 999):
        changed = x.clone()
        changed[row, 1, 2] += 1
        assert fingerprint((changed,)) != known
    others = [(x.double(),), (x.reshape(1000, 3, 2),), (x[:999],), (x, x), (x.int(),), (x.flip(0),), ()]
    assert len({known, *map(fingerprint, others)}) == 1 + len(others)
    for same in (x.clone(), x.permute(2, 1, 0).contiguous().permute(2, 1, 0), nn.Parameter(x)):
        assert fingerprint((same,)) == known
    assert fingerprint((torch.zeros(3, dtype=torch.bfloat16),)) != fingerprint((torch.zeros(3, dtype=torch.half),))
    expanded = torch.tensor([[1.5]]).expand(3_000_000, 4)  # of which nothing is kept at a time but a part
    assert fingerprint((expanded,)) == fingerprint((expanded.contiguous(),))


def test_fingerprints_of_data_sets_see_their_length_and_some_items():
    x = torch.arange(300.0).reshape(100, 3)
    known = fingerprint(Items(x))
    assert fingerprint(Items(x.clone())) == known
    for row in (0, 99):
        changed = x.clone()
        changed[row] += 1
        assert fingerprint(Items(changed)) != known
    assert fingerprint(Items(x[:99])) != known and fingerprint(Items(x.double())) != known
    assert fingerprint(Items(x[:1])) != fingerprint(Items(x[:2]))
    state = torch.get_rng_state()
    for noise in (lambda: torch.rand(()), lambda: random.random(), lambda: torch.randn(3)):
        seen = {fingerprint(Items(x, noise)) for _ in range(3)}
        assert len(seen) == 1 and seen != {known}
        assert fingerprint(Items(x + 1, noise)) not in seen
    own_generator = torch.Generator().manual_seed(0)
    drawn = [fingerprint(Items(rows, lambda: torch.rand((), generator=own_generator))) for rows in (x, x + 1, x[:50])]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprints_of_programs_see_what_counts():
    x = torch.zeros(2, 4)
    assert sites_of(Shifted(), x) == {"z": "Normal (4,) in data", "x": "Normal (4,) in data, observed"}
    assert sites_of(None) == {}
    known = source_of(nn.ModuleList([Shifted()]))
    assert known.keys() == {"Shifted", "scaled"}
    assert source_of(nn.ModuleList([Shifted(dist.Laplace), nn.Linear(2, 2), MLP(2, 2)])) == known
    assert source_of(nn.ModuleList([nn.Linear(2, 2), MLP(2, 2)])) == {}
    assert source_of([PyroModule[Shifted]()]) == known


def test_comments_and_layout_do_not_count(tmp_path):
    text = (
        "import torch\ndef helper(z):\n    return z + 1\n\nclass Net(torch.nn.Module):\n    def forward(self, z):\n"
        "        return helper(z)\n"
    )
    versions = {
        "plain": text,
        "comment": text.replace("return helper(z)", "# soon\n\n        return helper( (z), )"),
        "other": text.replace("z + 1", "z + 2"),
        "unused": text + "\ndef unused():\n    pass\n",
    }
    found = {}
    for name, content in versions.items():
        (tmp_path / f"{name}.py").write_text(content)
        found[name] = source_of(nn.ModuleList([import_object(f"{tmp_path / name}.py:Net", trust=True)()]))
    assert found["plain"].keys() == {"Net", "helper"}
    assert found["plain"] == found["comment"] == found["unused"]
    assert found["other"]["Net"] == found["plain"]["Net"] and found["other"]["helper"] != found["plain"]["helper"]


def test_what_methods_of_any_kind_refer_to_counts(tmp_path):
    text = (
        "import functools, torch\n"
        "def helper():\n    return 1\n\n"
        "def wrapper(f):\n    return functools.wraps(f)(lambda *a: f(*a))\n\n"
        "class Net(torch.nn.Module):\n    {kind}\n    def act(self):\n        return helper()\n"
    )
    kinds = ("", "@staticmethod", "@classmethod", "@property", "@functools.cached_property", "@wrapper")
    for number, kind in enumerate(kinds):
        path = tmp_path / f"kind{number}.py"
        path.write_text(text.format(kind=kind))
        assert "helper" in source_of([import_object(f"{path}:Net", trust=True)()]), kind


@pytest.mark.parametrize(
    ("default", "use"),
    [("0", "[helper() for _ in range(2)]"), ("0", "(lambda: [helper() for _ in range(2)])()"), ("helper", "f()")],
)
def test_what_is_referred_to_within_a_comprehension_or_as_a_default_counts(default, use, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\ndef helper():\n    return 1\n\nclass Net(torch.nn.Module):\n"
        f"    def forward(self, f={default}):\n        return {use}\n"
    )
    assert source_of([import_object(f"{tmp_path / 'net.py'}:Net", trust=True)()]).keys() == {"Net", "helper"}


def test_what_an_earlier_version_did_not_record_is_no_difference(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pyrogen.inference.run.source_of", lambda parts: {"Shifted": source_of(parts)["Shifted"]})
        assert own(tmp_path / "run").source.keys() == {"Shifted"}
    assert len(own(tmp_path / "run", epochs=2, resume=True).history) == 2


def test_a_hash_of_source_is_the_same_in_every_version_of_python(monkeypatch):
    """Hashes taken with 3.11; later ones add fields to the tree and write quotes in f-strings anew."""
    known = {"Spelled": "f9768ce670770a75"}
    assert source_of([Spelled()]) == known

    def later(node):
        return [*fields(node), ("of_a_later_version", []), ("another", None)]

    fields = ast.iter_fields
    monkeypatch.setattr(ast, "iter_fields", later)
    assert source_of([Spelled()]) == known


def test_histories_are_what_the_table_beside_says(kept):
    assert pd.read_csv(kept / HISTORY)["step"].tolist() == pg.load(kept).history["step"].tolist()

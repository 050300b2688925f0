"""Comparisons by workers: the same figures as without, one more attempt for what fails, and nothing left running."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import pyrogen as pg
from pyrogen.cli import main
from pyrogen.distributions import Flow, Normal
from pyrogen.experiment import comparison, workers
from pyrogen.inference import ELBO, IWAE, NonFiniteLoss
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

# A worker takes seconds to start, so few are, and each test looks at several things.
TINY: dict[str, Any] = {"epochs": 2, "batch_size": 32, "particles": 8, "progress": False, "parts": ["likelihood"]}
GUIDES: dict[str, Any] = {
    "mean field": (Normal, ELBO()),
    "flow": (functools.partial(Flow, layers=1, hidden=(8,)), IWAE(4)),
}
TIMES = ["seconds", "rows_per_second"]


def same_figures(one: pd.DataFrame, other: pd.DataFrame) -> None:
    one, other = (pd.DataFrame(table.drop(columns="seconds")) for table in (one, other))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def same_runs(one: pg.experiment.Comparison, other: pg.experiment.Comparison) -> None:
    assert [*one.runs] == [*other.runs]
    for name, run in one.runs.items():
        its = other.runs[name]
        for key, value in run.programs.state_dict().items():
            assert its.programs.state_dict()[key].equal(value), f"{name}: {key}"
        pd.testing.assert_frame_equal(run.history.drop(columns=TIMES), its.history.drop(columns=TIMES))
        assert (run.objective.step, run.objective.observations) == (its.objective.step, its.objective.observations)
        assert run.options == its.options and its.seconds > 0


def running(marker: str) -> list[int]:
    """Processes with this among their environment's values or arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


@pytest.fixture(scope="module")
def asked(digits):
    """What cannot be imported elsewhere: a class inside a function, and a lambda."""

    class Mine(LatentVariableModel):
        """A model of the user's own."""

    torch.manual_seed(1)
    model = Mine(
        pg.distributions.StandardNormal(2), pg.distributions.Bernoulli(MLP(2, digits.event_shape, hidden=(16,)))
    )
    return model, {"encoder": lambda: MLP(digits.event_shape, 16, hidden=(16,)), "data": digits, **TINY}


@pytest.fixture(scope="module")
def alone(asked):
    """The comparison made by this process."""
    model, options = asked
    return pg.compare(model, GUIDES, **options)


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster of this machine, unless there is one that somebody else started."""
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        yield ray
        return
    with warnings.catch_warnings():
        # Ray leaves its log files and sockets to be closed at exit, and announces changes of later versions.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield ray
        ray.shutdown()


def test_processes_give_the_same_figures_and_runs(alone, asked, tmp_path, monkeypatch):
    model, options = asked
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = threading.active_count()
    table = pg.compare(model, GUIDES, workers=2, **options)
    same_figures(alone, table)
    same_runs(alone, table)
    assert table.failed == alone.failed == {}
    assert type(table.runs["flow"].model) is type(model) and table.runs["flow"].model is not model
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert threading.active_count() == threads and not [*tmp_path.iterdir()]


PROGRAMS = '''
import os
import signal
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyrogen.distributions import Normal
from torch import nn

decoder = nn.Linear(2, 64)


def once_killed():
    """End this process in the second epoch of a training, once."""
    mark, begun = Path(__file__).parent / "kill", Path(__file__).parent / "out/normal-elbo/checkpoint.safetensors"
    if torch.is_grad_enabled() and mark.exists() and begun.exists():
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def model(x):
    once_killed()
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z).reshape(-1, 1, 8, 8)).to_event(3), obs=x)


class Failing(Normal):
    """Fails in training while there is a file that says so."""

    def forward(self, context=None):
        if torch.is_grad_enabled() and (Path(__file__).parent / "fail").exists():
            raise RuntimeError("a fault of my own")
        return super().forward(context)
'''


def only_the_table(folder, table, *_):
    pd.DataFrame(table).to_csv(folder / "table.csv")


def test_what_fails_is_tried_again_reported_and_resumed(tmp_path, monkeypatch, capsys, ray_cluster):
    monkeypatch.chdir(tmp_path)
    Path("programs.py").write_text(PROGRAMS)
    command = ["compare", "--model", "programs.py:model", "--guides", "Normal", "programs.py:Failing"]
    command += ["--objectives", "ELBO", "--epochs", "2", "--batch_size", "512", "--features", "8"]
    command += ["--encoder.hidden", "[8]", "--particles", "4", "--test_rows", "20", "--parts", "likelihood"]
    command += ["--progress", "false"]
    monkeypatch.setattr(comparison, "write_artifacts", only_the_table)
    assert main([*command, "--out", "untroubled"]) == 0
    untroubled = pd.read_csv("untroubled/table.csv", index_col="guide")
    Path("kill").touch()
    Path("fail").touch()
    capsys.readouterr()

    assert main([*command, "--out", "out", "--workers", "1"]) == 1
    assert not Path("kill").exists()
    said = capsys.readouterr()
    assert "Failed: Failing ELBO (RuntimeError: a fault of my own)." in said.out
    [line] = [line for line in said.err.splitlines() if line.startswith("pyrogen:")]
    assert line == "pyrogen: error: 1 of 2 fits failed: Failing ELBO; --resume with the same --out tries again"
    table = pd.read_csv("out/table.csv", index_col="guide")
    assert [*table.index] == ["Normal ELBO"]
    same_figures(untroubled.loc[["Normal ELBO"]].dropna(axis=1), table.dropna(axis=1))
    assert {"figures.yaml", "weights.safetensors", "checkpoint.safetensors"} <= {*os.listdir("out/normal-elbo")}
    assert not [name for name in os.listdir("out") if name.startswith(".")]
    assert (Path("out") / "compare.yaml").read_bytes() == (Path("untroubled") / "compare.yaml").read_bytes()

    Path("fail").unlink()
    kept = Path("out/normal-elbo/figures.yaml").stat().st_mtime_ns
    assert main([*command, "--out", "out", "--resume", "--workers", "ray"]) == 0
    assert Path("out/normal-elbo/figures.yaml").stat().st_mtime_ns == kept
    same_figures(untroubled, pd.read_csv("out/table.csv", index_col="guide"))
    assert str(tmp_path / "programs.py:model") in Path("out/normal-elbo/run.yaml").read_text()


def test_an_error_is_raised_where_every_fit_fails(asked, monkeypatch):
    model, options = asked
    errors = {"one": NonFiniteLoss("one: the loss is nan"), "two": ChildProcessError("killed")}
    outcomes = [(name, workers.Outcome(error=errors[name])) for name in ("two", "one")]
    monkeypatch.setattr(comparison, "perform_all", lambda *_: (each for each in outcomes))
    with pytest.raises(NonFiniteLoss, match=r"^one: the loss is nan"):
        pg.compare(model, dict.fromkeys(("one", "two"), (Normal, ELBO())), workers=1, **options)


INTERRUPTED = """
import sys
import pyrogen as pg
from pyrogen.distributions import Bernoulli, Normal, StandardNormal
from pyrogen.networks import MLP

data = pg.data.load("digits")
model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, data.event_shape)))
guides = {"mean field": (Normal, pg.inference.ELBO())}
asked = {"encoder": lambda: MLP(data.event_shape, 8), "data": data, "epochs": 100_000, "out": sys.argv[1]}
pg.compare(model, guides, workers=1, **asked)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes where Linux lists them")
def test_interrupting_ends_workers_and_leaves_a_checkpoint(tmp_path):
    # A script without a guard around its main part, which worker processes must not run again.
    (tmp_path / "script.py").write_text(INTERRUPTED)
    marker = f"PYROGEN_MARKER={tmp_path}"
    environment = os.environ | dict([marker.split("=", 1)])
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    checkpoint, patience = tmp_path / "out" / "mean-field" / "checkpoint.safetensors", time.monotonic() + 300
    pipes: Any = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes) as started:
        try:
            while not checkpoint.exists():
                assert started.poll() is None and time.monotonic() < patience, "the fit has not begun"
                time.sleep(0.1)
            assert len(running(marker)) >= 2
            os.killpg(started.pid, signal.SIGINT)  # as a terminal does, to all
            _, said = started.communicate(timeout=120)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0 and said.count("KeyboardInterrupt") == 1
    patience = time.monotonic() + 60  # the tracker of semaphores goes after its parent
    while (left := running(marker)) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not left and checkpoint.exists()
    assert not [*(tmp_path / "out").glob(".*")]


def test_ray_gives_the_same_figures_and_runs(ray_cluster, alone, asked):
    model, options = asked
    table = pg.compare(model, GUIDES, workers="ray", **options)
    same_figures(alone, table)
    same_runs(alone, table)
    assert ray_cluster.is_initialized()  # which was there before


def test_a_worker_that_cannot_see_the_folder_sends_what_it_wrote(tmp_path):
    def writes(common, folder, *, resume, device):
        there = [path.name for path in folder.glob("*")]
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "new").write_bytes(b"new")
        return common["number"], folder, there, resume

    torch.save({"number": 3}, tmp_path / "common.pt")
    job = workers.prepared_job("a", writes, tmp_path / "fit", resume=True)
    job = workers.dataclasses.replace(job, files={"old": b"old"})
    place = workers._Place(torch.get_num_threads(), None, mark=tmp_path / "elsewhere")
    outcome = workers._perform(job, place, tmp_path / "common.pt")
    assert outcome.error is None and outcome.files == {"old": b"old", "inner/new": b"new"}
    number, folder, there, resume = outcome.result
    assert (number, there, resume) == (3, ["old"], True)
    assert folder != tmp_path / "fit" and not folder.exists() and not (tmp_path / "fit").exists()


def test_a_file_that_is_not_there_is_imported_from_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name, path = "_pyrogen_file_of_a_test", str(tmp_path / "gone.py")
    try:
        workers._import_file(name, path, "def three():\n    return 3\n")
        assert sys.modules[name].three() == 3 and sys.modules[name].__file__ == path
    finally:
        del sys.modules[name]


def test_an_error_that_cannot_be_sent_is_told_in_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    try:
        raise Odd("this", "that")
    except Odd as error:
        sent = workers._portable(error)
    assert type(sent) is RuntimeError and str(sent) == "Odd: this and that"
    assert "raise Odd" in sent.__notes__[0]


@pytest.mark.parametrize("asked_for", [0, -1, True, 1.5, "dask"])
def test_bad_workers(asked_for, asked):
    model, options = asked
    with pytest.raises(ValueError, match="workers is a number of processes of at least 1, or 'ray', got"):
        pg.compare(model, GUIDES, workers=asked_for, **options)


def test_without_ray_it_is_said_how_to_get_it(asked, monkeypatch, tmp_path):
    model, options = asked
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'pyrogen\[ray\]'"):
        pg.compare(model, GUIDES, workers="ray", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_sent_is_said_before_any_training(asked, tmp_path):
    model, options = asked
    objective = ELBO()
    objective.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"'locked' can't be sent to a worker .*leave workers out"):
        pg.compare(model, {"locked": (Normal, objective)}, workers=1, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

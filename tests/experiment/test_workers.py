"""Comparisons by workers: the same figures as without, one more attempt for what fails, and nothing left running."""

import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pytest
import torch

import pyrogen as pg
from pyrogen import cli
from pyrogen.cli import main
from pyrogen.configuration import class_path, import_object
from pyrogen.distributions import Flow, Normal
from pyrogen.experiment import commands, comparison, fits, workers
from pyrogen.experiment.settings import CompareSettings
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
    with quiet_ray():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield ray
        ray.shutdown()


@contextmanager
def quiet_ray():
    """Ray leaves its log files and sockets to be closed at exit, and announces changes of later versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


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
import random
import signal
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyrogen.distributions import Normal
from torch import nn

decoder = nn.Linear(2, 64)
drawn = {"shift": torch.randn(8), "scale": random.random()}


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
    """Fails in training while there is a file that says so; else it goes by what the file drew at its import."""

    def forward(self, context=None):
        if torch.is_grad_enabled() and (Path(__file__).parent / "fail").exists():
            raise RuntimeError("a fault of my own")
        return super().forward(context * drawn["scale"] + drawn["shift"])
'''


def only_the_table(folder, table, *_):
    pd.DataFrame(table).to_csv(folder / "table.csv")


def test_what_fails_is_tried_again_reported_and_resumed(tmp_path, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    joined, init, asked_of_ray = ray.is_initialized(), ray.init, {}
    monkeypatch.setattr(ray, "init", lambda **options: asked_of_ray.update(options) or init(**options))
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
    which = "Failing ELBO (see out/failing-elbo/error.txt)"
    assert line == f"pyrogen: error: 1 of 2 fits failed: {which}; --resume with the same --out tries again"
    error = Path("out/failing-elbo/error.txt").read_text()
    assert f'File "{tmp_path / "programs.py"}"' in error and 'raise RuntimeError("a fault of my own")' in error
    assert "another exception" not in error  # for it was the same twice
    table = pd.read_csv("out/table.csv", index_col="guide")
    assert [*table.index] == ["Normal ELBO"]
    same_figures(untroubled.loc[["Normal ELBO"]].dropna(axis=1), table.dropna(axis=1))
    assert {"figures.yaml", "weights.safetensors", "checkpoint.safetensors"} <= {*os.listdir("out/normal-elbo")}
    assert not [*Path("out").glob(".*-*")]
    assert (Path("out") / "compare.yaml").read_bytes() == (Path("untroubled") / "compare.yaml").read_bytes()

    Path("fail").unlink()
    kept = Path("out/normal-elbo/figures.yaml").stat().st_mtime_ns
    with quiet_ray():
        assert main([*command, "--out", "out", "--resume", "--workers", "ray"]) == 0
    # Started here, unless there was one before, for the time; and what workers warn of is shown.
    assert ray.is_initialized() == joined and asked_of_ray.get("log_to_driver", True)
    assert Path("out/normal-elbo/figures.yaml").stat().st_mtime_ns == kept
    assert not Path("out/failing-elbo/error.txt").exists() and not [*Path("out").glob(".*-*")]
    same_figures(untroubled, pd.read_csv("out/table.csv", index_col="guide"))
    assert str(tmp_path / "programs.py:model") in Path("out/normal-elbo/run.yaml").read_text()


def test_an_error_is_raised_where_every_fit_fails(asked, monkeypatch):
    model, options = asked
    errors = {"one": NonFiniteLoss("one: the loss is nan"), "two": ChildProcessError("killed")}
    outcomes = [(name, workers.Outcome(error=errors[name])) for name in ("two", "one")]
    monkeypatch.setattr(comparison, "open_pool", lambda *_: nullcontext())
    monkeypatch.setattr(comparison, "perform_all", lambda *_: (each for each in outcomes))
    with pytest.raises(NonFiniteLoss, match=r"^one: the loss is nan"):
        pg.compare(model, dict.fromkeys(("one", "two"), (Normal, ELBO())), workers=1, **options)


INTERRUPTED = """
import signal
import sys
import pyrogen as pg
from pyrogen.distributions import Bernoulli, Normal, StandardNormal
from pyrogen.networks import MLP

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
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
    assert not [*(tmp_path / "out").glob(".*-*")]


def test_ray_gives_the_same_figures_and_runs(ray_cluster, alone, asked):
    model, options = asked
    table = pg.compare(model, GUIDES, workers="ray", **options)
    same_figures(alone, table)
    same_runs(alone, table)
    assert ray_cluster.is_initialized()  # which was there before


def performed(function, folder, *, seen=False, **asked):
    """What becomes of a job in this process, as in a worker that can see its folder or not."""
    shared = Path(tempfile.mkdtemp(dir=folder.parent)) / "common.pt"  # never written twice, for it stays mapped
    workers._save({"a": function}, {"number": 3}, shared)
    mark = shared if seen else folder.parent / "mark"
    return workers._perform(
        workers.Job("a", folder, mark=mark, **asked), workers._Place(torch.get_num_threads(), None), shared
    )


def test_a_worker_that_cannot_see_the_folder_sends_what_it_wrote(tmp_path):
    def writes(common, folder, *, resume, device):
        there = [path.name for path in folder.glob("*")]
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "new").write_bytes(b"new")
        if common["number"] != 3 or not resume:
            raise ValueError("after the file was written")
        return folder, there

    outcome = performed(writes, tmp_path / "fit", resume=True, files={"old": b"old"})
    assert outcome.error is None and outcome.files == {"old": b"old", "inner/new": b"new"}
    folder, there = outcome.result
    assert there == ["old"] and folder != tmp_path / "fit" and not folder.exists()
    outcome = performed(writes, tmp_path / "fit")
    assert type(outcome.error) is ValueError and outcome.files == {"inner/new": b"new"}
    assert not (tmp_path / "fit").exists()
    assert performed(writes, tmp_path / "fit", seen=True).files == {}
    assert (tmp_path / "fit/inner/new").exists()


def test_whatever_ends_a_job_is_its_error_alone(tmp_path, monkeypatch):
    def leaves(common, folder, *, resume, device):
        sys.exit("enough")

    outcome = performed(leaves, tmp_path / "fit", seen=True)
    assert repr(outcome.error) == "RuntimeError('SystemExit: enough')"
    monkeypatch.setattr(workers._Place, "settle", leaves)
    assert type(performed(leaves, tmp_path / "fit", seen=True).error) is TypeError


class Here:
    """A pool whose outcomes are told beforehand."""

    def __init__(self, *outcomes):
        self.outcomes, self.jobs = [*outcomes], []

    def is_free(self):
        return True

    def submit(self, job):
        there = (job.folder / "checkpoint").is_file()
        self.jobs.append((job.resume, there))
        future = Future()
        future.set_result(None)
        return future

    def outcome(self, future):
        return self.outcomes.pop(0)


def test_what_a_failed_attempt_wrote_elsewhere_is_there_for_the_second(tmp_path):
    one, two = RuntimeError("one"), RuntimeError("two")
    pool = Here(workers.Outcome(error=one, files={"checkpoint": b"1"}), workers.Outcome(error=two))
    [(name, outcome)] = workers.perform_all(pool, [workers.Job("a", tmp_path / "fit")], lambda names: None)
    assert pool.jobs == [(False, False), (True, True)] and (tmp_path / "fit/checkpoint").read_bytes() == b"1"
    assert name == "a" and outcome.error is two and two.__context__ is one
    comparison._note_error(tmp_path / "fit", two)
    noted = (tmp_path / "fit/error.txt").read_text()
    assert noted.index("RuntimeError: one") < noted.index("RuntimeError: two")


OF_A_FILE = """
import random
import threading

drawn = [random.random()]


class Mine:
    inherent = drawn[0]


def three():
    return 3, drawn, __file__


def waits(lock=threading.Lock()):
    lock.acquire()
"""


def test_what_a_file_drew_at_its_import_is_the_same_in_a_worker_that_lacks_the_file(tmp_path):
    path = tmp_path / "gone.py"
    path.write_text(OF_A_FILE)
    three = import_object(f"{path}:three", trust=True)
    module = sys.modules[three.__module__]
    before = module.Mine.inherent, three()

    def job(common, folder, *, resume, device):
        there = sys.modules[three.__module__]
        same = there.three is three and class_path(three) == f"{there.__file__}:three"
        return there.Mine.inherent, three(), same, sorted({"three", "Mine", "waits"} & {*vars(there)})

    workers._save({"a": job}, None, tmp_path / "common.pt")
    path.unlink()
    try:
        del sys.modules[three.__module__]
        functions, _ = workers._load(tmp_path / "common.pt")
        # What nothing needs may well be what can't be sent.
        assert functions["a"](None, None, resume=False, device=None) == (*before, True, ["Mine", "three"])
    finally:
        del sys.modules[three.__module__]


def test_what_torch_and_pyro_were_set_to_is_so_in_workers(tmp_path):
    now = functools.partial(workers._Place, torch.get_num_threads(), None)
    before = now()
    try:
        with pyro.settings.context(cholesky_relative_jitter=3.0, validate_distributions_torch=False):
            torch.set_default_dtype(torch.float64)
            torch.set_float32_matmul_precision("medium")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = True
            place = now(directory=tmp_path)
        before.settle()
        assert now() == before != place
        place.settle()
        assert now() == place
        dataclasses.replace(place, pyro_settings={"of a script's own": 1}).settle()
    finally:
        before.settle()


def starts_nothing(pool, job):
    future = Future()
    pool.seats[future] = pool.idle.popleft()
    future.set_result(workers.Outcome())
    return future


def test_sigterm_tidies_up(tmp_path, monkeypatch):
    monkeypatch.setattr(workers._Processes, "submit", starts_nothing)
    closed = []
    monkeypatch.setattr(workers._Processes, "close", lambda pool: closed.append(pool))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray has one of its own
    try:
        with pytest.raises(SystemExit) as ended, workers.open_pool(1, {}, None, "cpu", 1, tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143 and closed and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_cores_and_gpus_are_shared_among_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(workers, "cpu_count", lambda: 8)

    def places(asked, fits, device="auto"):
        with workers.open_pool(asked, {}, None, device, fits, tmp_path) as pool:
            return [(place.threads, place.device) for place in pool.places]

    monkeypatch.setattr(workers._Processes, "submit", starts_nothing)

    assert places(3, 5) == [(2, "cuda:0"), (2, "cuda:1"), (2, "cuda:0")]
    assert places(3, 5, "cpu") == places(3, 5, "cuda:1") == [(2, None)] * 3
    assert places(3, 1) == [(8, "cuda:0")] and places(16, 16, "cpu") == [(1, None)] * 16
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert places(1, 5, "cpu") == [(2, None)]


class Enough(Exception):
    """Nothing after this matters to a test."""


def enough(*arguments, **_):
    raise Enough(*arguments)


def test_fits_that_are_made_take_no_cores_from_others(asked, tmp_path, monkeypatch):
    model, options = asked
    monkeypatch.setattr(comparison, "open_pool", lambda *asked: enough(f"for {asked[4]}"))
    monkeypatch.setattr(comparison, "_check_same", lambda *_: None)
    made = earlier_comparison(tmp_path / "out").parent / "flow/figures.yaml"
    for count in (2, 1):
        with pytest.raises(Enough, match=f"for {count}"):
            pg.compare(model, GUIDES, workers=2, out=tmp_path / "out", resume=True, **options)
        made.parent.mkdir(exist_ok=True)
        made.touch()


def test_no_gpu_is_begun_that_is_not_used(asked, monkeypatch):
    model, options = asked
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"cuda:{device} was begun"))
    for module, name in ((fits, "fit"), (commands, "fit"), (commands, "compare")):
        monkeypatch.setattr(module, name, enough)
    with pytest.raises(Enough):
        pg.compare(model, GUIDES, device="cpu", **options)
    for command in ("fit", "compare"):
        with pytest.raises(Enough):
            main([command, "--device", "cpu"])


def test_nothing_that_is_started_gets_an_interrupt(tmp_path, monkeypatch):
    class Starts:
        def __init__(self, *_, **__):
            pass

        def submit(self, *task):
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
            return Future()

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Starts)
    workers._Processes(tmp_path / "common.pt", "cpu", 1).submit(workers.Job("a", tmp_path))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_worker_without_its_parent_tidies_up_and_ends(tmp_path, monkeypatch):
    ended, scratch = threading.Event(), tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "common.pt").touch()
    parents = [1, 1, 7]
    monkeypatch.setattr(workers.os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(workers.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    method, handler = multiprocessing.get_start_method(allow_none=True), signal.getsignal(signal.SIGINT)
    try:
        workers._stay_with(1, method, scratch)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert ended.wait(10) and not parents and not scratch.exists()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_of_a_worker_that_was_replaced_nothing_is_said(tmp_path):
    with workers._processes({}, None, "cpu", tmp_path, 1):
        for how in ("stopped", "was restarted"):
            warnings.warn(f"A worker {how} while some jobs were given to the executor.", UserWarning, stacklevel=1)


@pytest.mark.parametrize(("signal_", "memory"), [("SIGKILL(-9)", True), ("SIGSEGV(-11)", False)])
def test_a_process_that_is_killed_may_have_been_short_of_memory(signal_, memory):
    error = workers._ended(RuntimeError(f"A worker.\n\nThe exit codes of the workers are {{{signal_}}}\nDetails."))
    assert str(error).startswith(f"the process of the worker ended ({signal_})")
    assert ("short of memory" in str(error)) == memory


def test_what_fits_share_is_sent_once(tmp_path):
    shared = torch.randn(100_000)

    def fit(number):
        return lambda *_, **__: shared.sum() + number

    workers._save({str(n): fit(n) for n in range(3)}, {"data": shared}, tmp_path / "common.pt")
    assert (tmp_path / "common.pt").stat().st_size < 500_000


@pytest.fixture
def cluster_of(ray_cluster, monkeypatch):
    """A Ray cluster that says to have these machines, and what its jobs ask for."""

    def made(machines, device="auto", jobs=2):
        demanded = {}
        nodes = [{"Alive": True, "Resources": each} for each in machines]
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        monkeypatch.setattr(ray_cluster, "nodes", lambda: nodes)
        monkeypatch.setattr(ray_cluster, "put", lambda value: value)
        monkeypatch.setattr(ray_cluster, "remote", lambda **options: demanded.update(options) or (lambda f: f))
        cluster = workers._Cluster(memoryview(b""), device, jobs)
        assert cluster.place.threads == demanded["num_cpus"]
        return cluster.elsewhere, demanded["num_cpus"], demanded["num_gpus"]

    return made


def test_a_job_of_ray_asks_for_no_more_than_one_machine_has(cluster_of):
    mixed = [{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert cluster_of(mixed) == (True, 2, 1)
    assert cluster_of(mixed, jobs=1) == (True, 4, 1)
    assert cluster_of(mixed, "cpu") == (True, 34, 0)
    assert cluster_of([{"CPU": 8.0}]) == (False, 4, 0)
    assert cluster_of([{"CPU": 4.0}] * 2, jobs=1) == (True, 4, 0)
    with pytest.raises(ValueError, match=r"no machine .* has a core and a GPU for a fit"):
        cluster_of([{"CPU": 4.0}], "cuda")


@pytest.mark.parametrize(("machines", "lacks"), [([{}], "a core for"), ([{"GPU": 1.0}, {"CPU": 4.0}], "and a GPU for")])
def test_a_cluster_that_can_make_no_fit_is_refused_before_anything_is_lost(
    machines, lacks, cluster_of, asked, tmp_path
):
    with pytest.raises(ValueError, match=lacks):
        cluster_of(machines)
    model, options = asked
    kept = earlier_comparison(tmp_path / "out")
    with pytest.raises(ValueError, match=lacks):
        pg.compare(model, GUIDES, workers="ray", out=kept.parent, overwrite=True, **options)
    assert kept.exists()


def earlier_comparison(folder):
    folder.mkdir()
    (folder / "compare.yaml").touch()
    (folder / "kept").touch()
    return folder / "kept"


def test_a_fit_of_ray_that_failed_elsewhere_goes_on_from_its_checkpoint(ray_cluster, tmp_path):
    def fails_once(common, folder, *, resume, device):
        if resume:
            return (folder / "checkpoint").read_bytes(), str(folder)
        folder.mkdir()
        (folder / "checkpoint").write_bytes(b"half")
        raise RuntimeError("after a checkpoint")

    with workers.open_pool("ray", {"a": fails_once}, None, "cpu", 1, tmp_path) as pool:
        # As if there were more machines, of which none sees the folder.
        pool.elsewhere, pool.mark = True, tmp_path / "mark"
        [(_, outcome)] = workers.perform_all(pool, [workers.Job("a", tmp_path / "fit")], lambda names: None)
    read, where = outcome.result
    assert read == b"half" == (tmp_path / "fit/checkpoint").read_bytes() and where != str(tmp_path / "fit")


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


def test_an_error_of_the_users_own_is_shown_with_its_place(tmp_path, monkeypatch, capsys):
    path = tmp_path / "own.py"
    path.write_text("def fails():\n    raise ValueError('expected 3')\n")

    def run(arguments):
        try:
            import_object(f"{path}:fails", trust=True)()
        except ValueError as error:
            sent = workers._portable(error)
        raise sent

    monkeypatch.setattr(cli, "_run", run)
    assert main([]) == 1
    assert f'File "{path}", line 2, in fails' in capsys.readouterr().err


@pytest.mark.parametrize("asked_for", [0, -1, True, 1.5, "dask"])
def test_bad_workers(asked_for, asked, monkeypatch, capsys):
    model, options = asked
    with pytest.raises(ValueError, match=r"workers .*got"):
        pg.compare(model, GUIDES, workers=asked_for, **options)
    monkeypatch.setattr(CompareSettings, "load_data", lambda self: pytest.fail("data are loaded"))
    assert main(["compare", "--workers", str(asked_for)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pyrogen: error: workers is a number of processes of at least 1, or 'ray', got")


def test_without_ray_it_is_said_how_to_get_it(asked, monkeypatch, tmp_path):
    model, options = asked
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'pyrogen\[ray\]'"):
        pg.compare(model, GUIDES, workers="ray", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Locked:
    """What can't be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, share):
        return 1.0


@pytest.mark.parametrize("asked_for", [1, "ray"])
def test_what_cannot_be_sent_is_said_before_anything_is_lost(asked_for, asked, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a cluster is started"))
    model, options = asked
    objective = ELBO()
    objective.lock = threading.Lock()
    guides = {"mean field": (Normal, ELBO()), "locked": (Normal, objective)}
    with pytest.raises(ValueError, match=r"'locked' can't be sent to a worker .*leave workers out"):
        pg.compare(model, guides, workers=asked_for, out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    kept = earlier_comparison(tmp_path / "out")
    with pytest.raises(ValueError, match=r"what all fits share can't be sent to a worker .*lock.*leave workers out"):
        pg.compare(model, GUIDES, workers=asked_for, schedule=Locked(), out=kept.parent, overwrite=True, **options)
    assert kept.exists()


class Unreadable:
    """What only the process can read that made it."""

    def __call__(self, share):
        return 1.0

    def __reduce__(self):
        return _read_by, (os.getpid(),)


def _read_by(process):
    if os.getpid() != process:
        raise LookupError("where am I?")
    return Unreadable()


def test_workers_that_cannot_do_any_job_are_known_before_anything_is_lost(asked, tmp_path):
    model, options = asked
    kept = earlier_comparison(tmp_path / "out")
    left = kept.parent / f".table.csv-{16 * 'a'}"
    left.touch()
    with pytest.raises(ValueError, match=r"a worker can't read what it was sent \(LookupError: where am I\?\)"):
        pg.compare(model, GUIDES, workers=1, schedule=Unreadable(), out=kept.parent, overwrite=True, **options)
    assert kept.exists() and left.exists()


def test_what_killed_writes_left_is_cleared_where_a_comparison_goes_on(asked, tmp_path, monkeypatch):
    model, options = asked
    left = [tmp_path / "out" / inner / f".x.png-{16 * 'a'}" for inner in ("", "figures")]
    monkeypatch.setattr(comparison, "write_artifacts", only_the_table)
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "out/compare.yaml").touch()
    monkeypatch.setattr(comparison, "_check_same", lambda *_: None)
    pg.compare(model, {"mean field": GUIDES["mean field"]}, out=tmp_path / "out", resume=True, **options)
    assert not any(path.exists() for path in left)

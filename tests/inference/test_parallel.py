"""Training by several processes: what two of them find is what one finds, and what happens to one happens to both.

Run as a script, by ``torchrun``, this file trains all of ``CASES`` and the rest of :func:`main` in its processes, and
each writes what it found into a folder.
"""

import itertools
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import pyrogen as pg
from pyrogen import cli
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, Delta, Implicit, NormalLikelihood, StandardNormal
from pyrogen.inference import (
    AVB,
    ELBO,
    GAN,
    AmortizedGuide,
    NonFiniteLoss,
    OutputExistsError,
    Run,
    compilation,
    fit,
    loop,
)
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.inference.loop import CHECKPOINT, Training
from pyrogen.inference.parallel import Processes, alone, connect, environment, is_first
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

X = (torch.rand(110, 6, generator=torch.Generator().manual_seed(0)) < 0.4).double()
B = 8
COMMAND = ["fit", "--data", "digits", "--steps", "3", "--progress", "false", "--out"]
SMALL = partial(Critic, hidden=(8,))


def split(train, validation) -> Data:
    return Data("halves", train=train, validation=validation, test=validation, values="binary", binarize="threshold")


def points(rows=97) -> Any:
    """A model with a point mass for a guide, so that nothing is drawn."""
    torch.manual_seed(rank())  # the first process's weights are everybody's
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    return model, AmortizedGuide(model, MLP(6, 8, (8,)), Delta), X[:rows]


def validated() -> Any:
    model, guide, _ = points()
    return model, guide, split(X[:90].bool(), X[90:].bool())


class Rare(nn.Module):
    """A model with a parameter that only batches with a certain row know."""

    def __init__(self):
        super().__init__()
        self.loc, self.shift = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        marked = x[:, :1] > 1
        shift = marked * self.shift if marked.any() else torch.zeros(6)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc + shift, 1.0).to_event(1), obs=x)


def rare() -> Any:
    x = X.clone()
    x[3], x[50] = 2.0, 3.0
    return Rare(), None, x


def equal_rows(family=None) -> Any:
    """Rows of which each process sees the same; with the same draws both do what one of them does alone."""
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 6, (8,))))
    guide = None if family is None else AmortizedGuide(model, MLP(6, 8, (8,)), family)
    return model, guide, X[:1].repeat(112, 1)


class Following(Critic):
    """A critic with a buffer that follows the rows it is given, and that its scores depend on."""

    mean: torch.Tensor

    def __init__(self, *arguments, **given):
        super().__init__(*arguments, hidden=(8,), **given)
        self.register_buffer("mean", torch.zeros(self.width))

    def features_of(self, z, context=None):
        if self.training:
            self.mean.lerp_(z.detach().reshape(-1, self.width).mean(0), 0.1)
        return super().features_of(z - self.mean.clone(), context)


def other_rows(family=None) -> Any:
    """Rows that differ, and a model and a guide with buffers that follow them."""
    torch.manual_seed(rank())
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(decoder))
    guide = None if family is None else AmortizedGuide(model, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), family)
    return model, guide, X


TWICE: dict[str, Any] = {
    "a last batch of one row": (points, ELBO, {}),
    "a last batch of several rows": (partial(points, 110), ELBO, {}),
    "averages, clipping, a schedule": (points, ELBO, {"average": 0.9, "gradient_clip": 0.1, "schedule": "cosine"}),
    "compiled": (points, ELBO, {"compile": True}),
    "patience": (validated, ELBO, {"learning_rate": 0.5, "patience": 2, "epochs": 30}),
    "a parameter that is not always there": (rare, ELBO, {"optimizer": partial(torch.optim.AdamW, weight_decay=0.1)}),
}
"""Of two processes with B rows each the same as of one with 2 B."""
ALIKE: dict[str, Any] = {
    "two optimizers": (partial(equal_rows, Implicit), partial(AVB, 4, critic=SMALL), {}),
    "steps of critics": (equal_rows, partial(GAN, "wasserstein-gp", critic=SMALL), {"gradient_clip": 0.1}),
}
"""The same as of one with B, where rows and draws are the same in both."""
APART: dict[str, Any] = {
    "two optimizers, rows and draws": (partial(other_rows, Implicit), partial(AVB, 4, critic=Following), {}),
    "steps of critics, rows and draws": (other_rows, partial(GAN, "wasserstein-gp", critic=Following), {}),
}
"""Each process with rows and draws of its own."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def fitted(case, batch_size=B, **given) -> Run:
    make, objective, options = {**TWICE, **ALIKE, **APART}[case]
    torch.set_default_dtype(torch.float64)
    length = {"steps": 20} if case in {**ALIKE, **APART} else {"epochs": 4}
    if "epochs" in options:
        length = {}
    try:
        model, guide, data = make()
        common: dict[str, Any] = {"learning_rate": 0.01, "precision": "64-true", "progress": False, "device": "cpu"}
        return fit(model, guide, objective(), data, batch_size=batch_size, **common | length | options | given)
    finally:
        torch.set_default_dtype(torch.float32)


def found(run) -> dict[str, Any]:
    """A run as it is kept."""
    history = run.history.drop(columns=["seconds", "rows_per_second"])
    return {"state": run.programs.state_dict(), "history": history.to_dict("list")}


def assert_same(these, those, rel=1e-9):
    assert these["state"].keys() == those["state"].keys()
    for name, value in these["state"].items():
        torch.testing.assert_close(value, those["state"][name], rtol=rel, atol=rel, msg=name)
    assert these["history"].keys() == those["history"].keys()
    for name, column in these["history"].items():
        if name == "inactive_units":
            assert column == those["history"][name]
        else:
            assert column == pytest.approx(those["history"][name], rel=rel, nan_ok=True), name


def noisy(objective=ELBO(), **given) -> Run:  # noqa: B008 (fit takes a copy)
    """Draws, batch normalisation and dropout."""
    torch.manual_seed(5)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    options: dict[str, Any] = {"batch_size": B, "progress": False, "steps": 17, "average": 0.9, "device": "cpu"}
    return fit(model, AmortizedGuide(model, encoder), objective, X.float(), **options | given)


class Sick(nn.Module):
    """A model that turns a certain row into NaN."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = torch.where(x[:, :1] > 2, torch.nan, self.loc)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Shaky(Dataset):
    """Data of which one row can't be read a second time."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.read += index == 7
        if self.read > 1:
            raise OSError("row 7 is gone")
        return X[index].float()


def sick(**given) -> Run:
    x = X.float()
    x[5] = 3.0
    options: dict[str, Any] = {"batch_size": B, "epochs": 2, "progress": False, "device": "cpu"} | given
    return fit(Sick(), None, ELBO(), options.pop("data", x), **options)


def changed(again, **given) -> Run:
    """A compiled fit whose program does something else when it is run once more for the place of a NaN."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at = loop.stop_at

        def changing(*arguments):
            patch.setattr(Sick, "forward", again)
            stop_at(*arguments)

        patch.setattr(loop, "stop_at", changing)
        patch.setattr(compilation, "lowered", lambda graph, inputs: graph)
        return sick(compile=True, seed=1, **given)  # of which the NaN is in a batch of full size, and not the first


def gone(self, x):
    raise OSError("the program is gone")


def cured(self, x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)


def said(function, *arguments, **given) -> Any:
    """The type of the error that is raised, what it says, and after how many seconds."""
    started = time.perf_counter()
    try:
        function(*arguments, **given)
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - started
    return None


def collapse(run):
    raise RuntimeError("the callback collapsed")


def main(folder: Path) -> None:
    """What every process does."""
    results: dict[str, Any] = {}
    lowered, compilation.lowered = compilation.lowered, lambda graph, inputs: graph
    for case in [*TWICE, *APART]:
        results[case] = found(fitted(case))
    compilation.lowered = lowered
    seed, Processes.seed = Processes.seed, lambda self, seed: seed  # type: ignore[method-assign]
    for case in ALIKE:
        results[case] = found(fitted(case))
    Processes.seed = seed  # type: ignore[method-assign]
    results["whole"] = found(noisy(out=folder / "whole"))
    noisy(out=folder / "part", steps=5)
    results["part"] = found(noisy(out=folder / "part", resume=True))
    first = rank() == 0
    results["firsts"] = found(
        noisy(out=folder / "firsts" if first else None, callbacks=[lambda run: len(run.history) == 2] if first else [])
    )
    results["firsts, later"] = found(noisy(out=folder / "firsts" if first else None, resume=True))
    calls: list[int] = []

    def stop(run):
        calls.append(rank())
        return True

    results["skipped"] = found(sick(non_finite="skip", epochs=3))
    called = noisy(callbacks=[stop])
    results["calls"] = calls, len(called.history)
    pg.save(called, folder / "saved")
    results["errors"] = {
        "NaN": said(sick, out=folder / "sick"),
        "NaN seen late": said(late, sick),
        "NaN, then an error": said(changed, gone),
        "NaN, then none": said(changed, cured),
        "unreadable": said(sick, data=Shaky()),
        "unreadable, seen late": said(late, sick, data=Shaky()),
        "exists": said(noisy, out=folder / "whole"),
        "options": said(noisy, learning_rate=-1.0),
        "unlike": said(noisy, batch_size=B + rank()),
        "other objective": said(noisy, ELBO(1 + rank())),
        "other data": said(sick, data=X[rank() :].float()),
        "other validation": said(sick, data=split(X[:90].bool(), X[90 + rank() :].bool())),
        "no validation": said(sick, data=split(X[:90].bool(), X[90:].bool()) if first else X[:90].bool()),
        "nowhere to resume": said(noisy, resume=True),
        "callback": said(noisy, callbacks=[collapse]),
        "one device": said(noisy, device="cpu:0"),
    }
    results["codes"] = [cli.main([*COMMAND, str(folder / "command")]) for _ in range(2)]
    results["compare"] = cli.main(["compare", "--epochs", "1"])
    with alone():
        run = fitted("compiled", 2 * B, compile=False)
        results["alone"] = found(run)
        pg.save(run, folder / f"alone in {rank()}")
    torch.save(results, folder / f"{rank()}.pt")
    sick()


def late(function, **given) -> Any:
    """As where losses are looked at now and then."""
    before = Training.__init__

    def changed(self, *arguments):
        before(self, *arguments)
        self.look_every = 4

    Training.__init__ = changed  # type: ignore[method-assign]
    try:
        return function(**given)
    finally:
        Training.__init__ = before  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def ran(environments, *command) -> Any:
    """Exit codes, what was printed and what was complained of, of a command in environments side by side."""
    root = str(Path(pg.__file__).parents[1])
    everywhere = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, *command], env=everywhere | each, **pipes) for each in environments]
    try:
        printed = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], *("".join(each) for each in zip(*printed, strict=True))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What both processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("together")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    codes, out, err = ran([{}], *launch, __file__, str(folder))
    assert (folder / "0.pt").exists() and (folder / "1.pt").exists(), err
    results = [torch.load(folder / f"{each}.pt", weights_only=False) for each in (0, 1)]  # noqa: TID251 (of our own making)
    return folder, results, codes, out, err


@pytest.mark.parametrize("case", TWICE)
def test_two_processes_are_as_one_with_twice_the_batch(case, together, traced_only):
    """In double precision, of weights and of the whole history; both processes end with the very same."""
    _, results, *_ = together
    assert_same(results[0][case], results[1][case], rel=0.0)
    known = found(fitted(case, 2 * B))
    assert_same(results[0][case], known)
    if case == "patience":
        assert 3 < len(known["history"]["loss"]) < 30


@pytest.mark.parametrize("case", ALIKE)
def test_critics_of_two_processes_are_those_of_one(case, together):
    _, results, *_ = together
    assert_same(results[0][case], results[1][case], rel=0.0)
    known, states = found(fitted(case)), results[0][case]["state"]
    assert any(name.startswith("critics.") for name in states)
    for name, value in known["state"].items():
        torch.testing.assert_close(states[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", APART)
def test_programs_and_critics_stay_the_same_where_rows_and_draws_differ(case, together):
    """Weights and buffers of all, exactly, after steps that each process took by itself."""
    _, results, *_ = together
    state = results[0][case]["state"]
    assert any(name.startswith("critics.") and name.endswith(".mean") for name in state)
    assert any(name.endswith("running_mean") for name in state)
    assert_same(results[0][case], results[1][case], rel=0.0)


def test_callbacks_and_a_folder_may_be_given_to_the_first_alone(together):
    """What it was stopped in goes on bit for bit, so the random states of both were kept."""
    _, results, *_ = together
    assert_same(results[0]["firsts"], results[1]["firsts"], rel=0.0)
    assert len(results[0]["firsts"]["history"]["loss"]) == 2
    for each in results:
        assert_same(results[0]["whole"], {**each["firsts, later"], "history": results[0]["whole"]["history"]}, rel=0.0)


def test_going_on_gives_the_run_never_interrupted(together):
    """Bit for bit, with the random states of both."""
    folder, results, *_ = together
    for one, other in itertools.product(("whole", "part"), (0, 1)):
        assert_same(results[0]["whole"], {**results[other][one], "history": results[0]["whole"]["history"]}, rel=0.0)
        assert results[0][one]["history"]["loss"] == pytest.approx(results[other][one]["history"]["loss"], rel=0)
    (tensors, values), (others, other_values) = (read_tensors(folder / each / CHECKPOINT) for each in ("whole", "part"))
    assert tensors.keys() == others.keys() and {"random.cpu", "random of 1.cpu"} <= tensors.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert not torch.equal(tensors["random.cpu"], tensors["random of 1.cpu"])
    assert values["identity"] == other_values["identity"] and values["step"] == 17
    assert pg.load(folder / "part").history["step"].tolist() == [5, 7, 14, 17]
    with pytest.raises(ValueError, match="differs: processes was 2 and is 1"):
        noisy(out=folder / "part", resume=True, steps=20)


def test_all_skip_a_step_that_one_can_not_take(together):
    _, results, *_ = together
    assert_same(results[0]["skipped"], results[1]["skipped"], rel=0.0)
    assert results[0]["skipped"]["history"]["skipped"] == [1, 1, 1]
    assert torch.isfinite(torch.tensor(results[0]["skipped"]["history"]["loss"])).all()


def test_the_first_calls_back_and_all_stop(together):
    _, results, *_ = together
    assert results[0]["calls"] == ([0], 1) and results[1]["calls"] == ([], 1)


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        (
            "NaN",
            NonFiniteLoss,
            r"the loss is nan at step \d \(epoch 1\); it began at the log-likelihood of the observed",
        ),
        ("NaN seen late", NonFiniteLoss, r"the loss is nan at step \d \(epoch 1\); it began at"),
        (
            "NaN, then an error",
            NonFiniteLoss,
            "began at what can't be told, for the batch once more raised OSError: the program is gone",
        ),
        ("NaN, then none", NonFiniteLoss, "began at what can't be told, for the batch once more.* gave a finite loss"),
        ("unreadable", OSError, "row 7 is gone"),
        ("unreadable, seen late", OSError, "row 7 is gone"),
        ("exists", OutputExistsError, "exists and is not empty"),
        ("options", ValueError, "learning_rate must be a positive number"),
        (
            "unlike",
            ValueError,
            "must call fit alike.*: options.batch_size was 8 and is 9, in the first and in process 1",
        ),
        ("other objective", ValueError, "must call fit alike.*: objective.*.particles was 1 and is 2"),
        ("other data", ValueError, "must call fit alike.*: data.rows was 110 and is 109"),
        ("other validation", ValueError, "must call fit alike.*: validation.rows was 20 and is 19"),
        ("no validation", ValueError, "must call fit alike.*: validation.rows was 20 and is 0"),
        ("nowhere to resume", ValueError, "resume needs out="),
        ("callback", RuntimeError, "the callback collapsed"),
        ("one device", ValueError, "device='cpu:0' is one device, and there are 2 processes; give device='cpu'"),
    ],
)
def test_an_error_of_one_is_the_same_error_of_all(case, kind, message, together):
    _, results, *_ = together
    (name, text, seconds), (other_name, other_text, _) = (each["errors"][case] for each in results)
    assert (name, text) == (other_name, other_text)
    assert name == kind.__name__ and seconds < 60
    with pytest.raises(kind, match=message):
        raise kind(text)


def test_the_step_of_a_loss_that_is_not_finite_is_named_also_when_it_is_seen_late(together):
    _, results, *_ = together
    steps = {results[0]["errors"][case][1].partition("(")[0] for case in ("NaN", "NaN seen late")}
    assert len(steps) == 1


def test_a_script_that_fails_ends(together):
    _, _, codes, _, err = together
    assert codes == [1] and "NonFiniteLoss: the loss is nan" in err


def test_the_command_prints_and_writes_once(together):
    folder, results, _, out, err = together
    assert [each["codes"] for each in results] == [[0, 2], [0, 2]]
    assert out.count("Written to") == 1 and err.count("pyrogen: error: the folder") == 1
    assert err.count("waiting for 2 processes, as torchrun says\n") == 1
    run = pg.load(folder / "command")
    assert run.history["step"].tolist() == [3] and (folder / "command" / "fit.yaml").exists()
    assert len(list((folder / "command" / "logs").iterdir())) == 1
    assert pg.load(folder / "saved").history["epoch"].tolist() == [1]


def test_a_comparison_is_refused(together):
    _, results, _, _, err = together
    assert [each["compare"] for each in results] == [2, 2] and err.count("a comparison is made in one process") == 1


def test_a_process_may_fit_alone(together):
    folder, results, *_ = together
    for number, each in enumerate(results):
        written, _ = read_tensors(folder / f"alone in {number}" / "weights.safetensors")
        assert all(torch.equal(value, each["alone"]["state"][name]) for name, value in written.items())
    assert results[0]["alone"]["history"] != results[1]["alone"]["history"]
    assert_same(results[0]["alone"], found(fitted("compiled", 2 * B, compile=False)), rel=1e-12)


def slurm(number: int) -> dict[str, str]:
    """What SLURM says to one of two tasks on one machine."""
    task = {"SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_NODEID": 0, "SLURM_NTASKS": 2}
    job = {"SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_ID": 77, "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    return {name: str(value) for name, value in {**task, **job}.items()}


def test_under_slurm(tmp_path):
    """Two tasks of a job as SLURM starts them: the command, no torchrun."""
    port = {"MASTER_PORT": str(free_port())}
    codes, out, err = ran([slurm(0) | port, slurm(1) | port], "-m", "pyrogen", *COMMAND, str(tmp_path / "run"))
    assert codes == [0, 0] and out.count("Written to") == 1
    assert err.count("waiting for 2 processes, as SLURM says; start them by srun, or ask for --ntasks=1") == 1
    identity = read_tensors(tmp_path / "run" / CHECKPOINT)[1]["identity"]
    assert identity["processes"] == 2


@pytest.mark.parametrize(("name", "number"), [("RANK", "1"), ("SLURM_PROCID", "3"), ("RANK", "many")])
def test_a_process_that_fails_before_it_meets_others_says_so(name, number, monkeypatch, capsys):
    monkeypatch.setenv(name, number)
    assert cli.main(["fit", "--data", "nothing", "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyrogen: error: ") and error.endswith(f" (in process {number})\n")


def test_what_started_a_process_is_read_off_its_environment(monkeypatch):
    assert environment() is None and is_first()
    for name, value in slurm(1).items():
        monkeypatch.setenv(name, value)
    around = environment()
    assert type(around).__name__ == "SLURMEnvironment" and around is not None
    assert (around.world_size(), around.global_rank(), is_first()) == (2, 1, False)
    with alone():
        assert environment() is None and Processes(connect("cpu", "32-true")).alone
    with monkeypatch.context() as inner:
        inner.delenv("SLURM_NTASKS_PER_NODE")
        with pytest.raises(ValueError, match=r"tasks of this SLURM job can't be told apart: .*--ntasks-per-node=2"):
            environment()
        inner.setenv("SLURM_JOB_NAME", "interactive")
        assert environment() is None
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # torchrun started by SLURM
    around = environment()
    assert type(around).__name__ == "TorchElasticEnvironment" and around is not None and around.world_size() == 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert environment() is None


def test_alone_nothing_is_exchanged():
    processes = Processes(connect("cpu", "32-true"))
    weight = nn.Parameter(torch.ones(2))
    loss = torch.tensor(2.0)
    assert processes.alone and processes.first and processes.seed(7) == 7
    assert processes.average([weight], loss, 1.0) is loss and weight.grad is None
    assert processes.gather(3) == [3] and processes.broadcast("a") == "a" and processes.sum([loss]) == [2.0]
    with pytest.raises(KeyError), processes.together():
        raise KeyError


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Writing that is killed or fails at any step, folders that others write, disks that are full or may only be read."""

import contextlib
import errno
import io
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, Normal, StandardNormal
from pyrogen.experiment import commands
from pyrogen.inference import ELBO, AmortizedGuide, NonFiniteLoss, OutputExistsError, checkpoints, events, fit
from pyrogen.inference.checkpoints import WriteError, write_tensors
from pyrogen.inference.events import Events
from pyrogen.inference.folders import clear_folder, held, locked
from pyrogen.inference.run import write_run
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

SHAPE = (1, 2, 2)
ROWS = (torch.arange(64) * 5 % 7 > 3).reshape(16, *SHAPE)
LEFTOVER = re.compile(r"\..+-[0-9a-f]{16}")


def fitted(folder, built=1, epochs=2, **given) -> Any:
    torch.manual_seed(built)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, SHAPE, hidden=(3,))))
    guide = AmortizedGuide(model, MLP(SHAPE, 3, hidden=()))
    options: dict[str, Any] = {"epochs": epochs, "batch_size": 8, "progress": False} | given
    return fit(model, guide, ELBO(), ROWS, out=folder, **options)


def state(run) -> tuple[Any, ...]:
    """All that tells one run from another."""
    weights = {name: value.tolist() for name, value in run.programs.state_dict().items()}
    return weights, run.history.to_csv(), run.options, run.seconds


def without_times(run) -> tuple[Any, ...]:
    weights = {name: value.tolist() for name, value in run.programs.state_dict().items()}
    return weights, run.history.drop(columns=["seconds", "rows_per_second"]).to_csv()


def contents(folder):
    """Every file below a folder with its bytes, but for the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def leftovers(folder):
    return [path for path in folder.rglob("*") if LEFTOVER.fullmatch(path.name)]


class Killed(BaseException):
    """What a process that is killed does not live to see."""


class Steps:
    """Counts what changes the disk, and at a step raises instead.

    With ``killed``, half of what was to be written is, and from then on nothing changes any more, as no code runs
    after a kill; else the one step fails as on a full disk.
    """

    def __init__(self, patch, at, *, killed):
        self.at, self.killed, self.count = at, killed, 0
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "chmod"):
            patch.setattr(os, name, self.step(getattr(os, name)))
        patch.setattr(io, "open", self.step(io.open, only_if=lambda path, mode="r", *_: "r" not in mode))
        patch.setattr(os, "open", self.step(os.open, only_if=lambda path, flags, *_, **__: flags & os.O_CREAT))
        patch.setattr(Path, "write_bytes", self.step(Path.write_bytes, half=_half_of_bytes))
        patch.setattr(checkpoints, "save_file", self.step(checkpoints.save_file, half=_half_of_file))

    def step(self, function, only_if=lambda *_, **__: True, half=lambda *_, **__: None):
        def stepping(*given, **named):
            if str(given[0]).endswith(".lock") or not only_if(*given, **named):
                return function(*given, **named)
            self.count += 1
            if self.count == self.at or (self.killed and self.count > self.at):
                if self.count == self.at:
                    half(*given, **named)
                raise Killed if self.killed else OSError(28, "No space left on device")
            return function(*given, **named)

        return stepping


def _half_of_bytes(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])


def _half_of_file(tensors, path, **_):
    Path(path).write_bytes(b"\x40" * 100)


def at_every_step(monkeypatch, act, places, *, killed, stride=1, least=10):
    """Act on a place after the other, with each step of it killed or failing in turn, until it comes to its end.

    Gives the places, and what was raised there.
    """
    for at, place in zip(itertools.count(1, stride), places, strict=False):
        with monkeypatch.context() as patch:
            steps = Steps(patch, at, killed=killed)
            try:
                act(place)
                error = None
            except (Killed, OSError) as raised:
                error = raised
        yield place, error
        if steps.count < at:
            assert error is None and at > least
            return


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder that a fit has left, evaluated, and a run to be saved over it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    fitted(folder)
    (folder / "evaluation.yaml").write_text("[]\n")
    (folder / "figures" / "fit-run").mkdir(parents=True)
    (folder / "figures" / "fit-run" / "a.png").write_bytes(b"picture")
    return folder, fitted(None, built=2, epochs=3)


def copies(folder, place):
    """Copies of a folder, each made when it is asked for."""
    return (Path(shutil.copytree(folder, place / str(number))) for number in itertools.count(1))


@pytest.mark.parametrize("killed", [True, False])
def test_a_save_stopped_at_any_step_leaves_the_old_run_or_the_new(killed, two, tmp_path, monkeypatch):
    folder, new = two
    old, before = state(pg.load(folder)), contents(folder)
    whole = without_times(fitted(shutil.copytree(folder, tmp_path / "whole"), epochs=4, resume=True))
    seen = set()

    def act(there):
        pg.save(new, there, overwrite=True)

    for there, error in at_every_step(monkeypatch, act, copies(folder, tmp_path), killed=killed):
        found = state(pg.load(there))
        assert found in (old, state(new))
        is_old = found == old
        seen.add(is_old)
        if not killed:
            assert error is None or isinstance(error, OSError)
            if is_old and error is not None:
                assert contents(there).items() <= before.items()
                assert re.search(r"weights\.safetensors could not be written: No space left.* Free some", str(error))
        if not is_old:  # whatever was found of the old one is gone
            assert not {"evaluation.yaml", "logs", "figures"} & {path.name for path in there.iterdir()}
            if (there / "checkpoint.safetensors").exists():
                with pytest.raises(ValueError, match="beside it are of another training"):
                    fitted(there, epochs=4, resume=True)
        else:
            on = fitted(shutil.copytree(there, tmp_path / f"{there.name} on"), epochs=4, resume=True)
            assert without_times(on) == whole
        if error is not None:  # what is left over goes with the next
            pg.save(new, there, overwrite=True)
            assert state(pg.load(there)) == state(new)
        assert not leftovers(there)
        assert {*contents(there)} == {"weights.safetensors", "run.yaml", "history.csv"}
    assert seen == {True, False}


def test_a_save_into_a_new_folder_killed_at_any_step_can_be_made_again(two, tmp_path, monkeypatch):
    _, new = two
    seen = set()
    places = (tmp_path / str(number) / "run" for number in itertools.count(1))
    for there, _ in at_every_step(monkeypatch, lambda there: pg.save(new, there), places, killed=True):
        whole = (there / "weights.safetensors").exists()
        seen.add(whole)
        if whole:
            assert state(pg.load(there)) == state(new)
        pg.save(new, there, overwrite=whole)  # which leftovers alone do not ask for
        assert state(pg.load(there)) == state(new) and not leftovers(there)
    assert seen == {True, False}


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("act", ["save", "write", "clear"])
def test_a_run_of_format_1_is_lost_at_no_step(act, killed, two, tmp_path, monkeypatch):
    """Its weights alone would be no run."""
    folder, new = Path(__file__).parents[1] / "formats" / "1" / "elbo", two[1]
    old = state(pg.load(folder))
    acts = {"save": lambda there: pg.save(new, there, overwrite=True), "write": partial(write_run, new)}
    seen = set()
    for there, error in at_every_step(
        monkeypatch, acts.get(act, clear_folder), copies(folder, tmp_path), killed=killed, least=4
    ):
        if act == "clear" and not (there / "weights.safetensors").exists():
            with pytest.raises(ValueError, match=r"holds no run|has no weights"):
                pg.load(there)
            seen.add("none")
            continue
        found = state(pg.load(there))
        assert found == old or (act != "clear" and found == state(new))
        seen.add("old" if found == old else "new")
        if error is not None and act != "clear":
            acts[act](there)
            assert state(pg.load(there)) == state(new)
    assert seen == {"old", "none" if act == "clear" else "new"}


@pytest.mark.parametrize("killed", [True, False])
def test_a_checkpoint_stopped_at_any_step_leaves_a_run_that_goes_on(killed, two, tmp_path, monkeypatch):
    folder, _ = two
    old = without_times(pg.load(folder))
    whole = without_times(fitted(shutil.copytree(folder, tmp_path / "whole"), epochs=3, resume=True))
    epochs = set()

    def act(there):
        fitted(there, epochs=3, resume=True)

    for there, error in at_every_step(monkeypatch, act, copies(folder, tmp_path), killed=killed, stride=3):
        found = pg.load(there)
        epochs.add(len(found.history))
        assert len(found.history) != 2 or without_times(found) == old
        if isinstance(error, WriteError):
            assert str(there) in str(error) and "nothing that was there before is lost" in str(error)
            assert "Training stands at step" in str(error) and "the last checkpoint is" in str(error)
        assert without_times(fitted(there, epochs=3, resume=True)) == whole
        assert without_times(pg.load(there)) == whole and not leftovers(there)
    assert epochs == {2, 3}


@pytest.mark.filterwarnings("ignore:.*Training goes on without logs")
@pytest.mark.parametrize("killed", [True, False])
def test_a_fit_over_a_run_stopped_at_any_step_leaves_the_old_run_or_the_new(killed, two, tmp_path, monkeypatch):
    folder, _ = two
    old, before = state(pg.load(folder)), contents(folder)
    whole = without_times(fitted(tmp_path / "new", built=3))
    logs = {name for name in before if name.startswith("logs")}
    seen = set()

    def act(there):
        fitted(there, built=3, overwrite=True, configuration={"built": 3})

    for there, _ in at_every_step(monkeypatch, act, copies(folder, tmp_path), killed=killed, stride=3):
        found = pg.load(there)
        is_old = state(found) == old
        seen.add("old" if is_old else len(found.history))
        try:
            assert without_times(
                fitted(shutil.copytree(there, tmp_path / f"{there.name} on"), built=3, resume=True)
            ) == (without_times(found) if is_old else whole)
        except ValueError as refused:
            assert re.search(r"beside it are of another training|was written by a fit that differs", str(refused))
        if is_old:  # what is there is of the old run
            assert all(before[name] == content for name, content in contents(there).items() if name in before)
            assert not {*contents(there)} - {*before} - {path.name for path in leftovers(there)}
        else:
            assert not {"evaluation.yaml", "figures"} & {path.name for path in there.iterdir()}
            assert not logs & {*contents(there)}
        act(there)
        assert without_times(pg.load(there)) == whole and not leftovers(there)
        assert (there / "fit.yaml").read_text() == "built: 3\n"
    assert seen == {"old", 1, 2}


def test_a_fit_that_fails_over_a_run_leaves_all_of_it(two, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / "run")
    before = contents(folder)
    said = r"no checkpoint was written; the earlier run in .*run stays"
    with pytest.raises(NonFiniteLoss, match=said):
        fitted(folder, built=3, epochs=9, learning_rate=1e30, checkpoint_every=9, overwrite=True)
    assert contents(folder) == before
    fitted(folder, built=3, epochs=3, checkpoint_every=2, overwrite=True, callbacks=[lambda run: True])
    logged = {name for name in contents(folder) if name.startswith("logs")}
    assert len(pg.load(folder).history) == len(logged) == 1 and not logged & {*before}


MINE = ("notes.txt", "figures/thesis.png", "logs/mine.txt", "thesis/report.html", "thesis/run.txt")


def with_mine(folder, *places):
    """Put files of somebody else's into a folder; what they hold."""
    for name in (*MINE, *places):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")
    return dict.fromkeys((*MINE, *places), b"mine")


@pytest.mark.parametrize("act", ["save", "fit", "begun"])
def test_what_somebody_else_put_into_the_folder_of_a_run_stays(act, two, tmp_path):
    folder, new = shutil.copytree(two[0], tmp_path / "run"), two[1]
    before, mine = contents(folder), with_mine(folder)
    linked = tmp_path / "linked.png"
    linked.write_bytes(b"mine")
    (folder / "samples.png").symlink_to(linked)
    if act == "save":
        pg.save(new, folder, overwrite=True)
    else:
        if act == "begun":
            (folder / "weights.safetensors").unlink()
        fitted(folder, built=3, overwrite=True)
    after = contents(folder)
    assert mine.items() <= after.items() and linked.read_bytes() == b"mine"
    assert not {name for name, content in before.items() if after.get(name) == content}
    assert not {*before} & {*after} - {"weights.safetensors", "run.yaml", "history.csv", "checkpoint.safetensors"}
    assert not (folder / "figures" / "fit-run").exists() and not (folder / "samples.png").is_symlink()


def compared(folder, names=("a", "b"), **given) -> Any:
    model = fitted(None, epochs=1).model
    options: dict[str, Any] = {"epochs": 1, "parts": ["bound"], "progress": False, "encoder": lambda: MLP(SHAPE, 3)}
    return pg.compare(model, {name: (Normal, ELBO()) for name in names}, data=ROWS, out=folder, **options | given)


def test_what_somebody_else_put_into_the_folder_of_a_comparison_stays(tmp_path):
    folder = tmp_path / "compared"
    compared(folder)
    before = contents(folder)
    mine = with_mine(folder, "a/notes.txt", "b/notes.txt")
    compared(folder, names=("a", "c"), overwrite=True)
    after = contents(folder)
    assert mine.items() <= after.items()
    assert {name for name in after if name.startswith("b/")} == {"b/notes.txt"}
    assert not {name for name, content in before.items() if after.get(name) == content and name.startswith(("a", "b"))}
    assert len(pg.load(folder / "c").history) == len(pg.load(folder / "a").history) == 1
    assert not (folder / "b" / ".lock").exists()


@pytest.mark.parametrize("given", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_fits_and_comparisons_do_not_take_the_place_of_each_other(given, two, tmp_path):
    folder = tmp_path / "compared"
    compared(folder)
    run = shutil.copytree(two[0], tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match="run holds a fit, not a comparison; give another folder"):
        compared(run, **given)
    with pytest.raises(OutputExistsError, match="compared holds a comparison, not a fit; give another folder"):
        fitted(folder, **given)
    if not given.get("resume"):
        with pytest.raises(OutputExistsError, match="compared holds a comparison, not a fit; give another folder"):
            pg.save(two[1], folder, **given)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("place", "given"),
    [("a", {}), ("a", {"overwrite": True}), ("other", {}), ("other", {"resume": True}), ("notes", {"overwrite": True})],
)
def test_a_comparison_is_for_its_own_fits(place, given, two, tmp_path):
    folder = tmp_path / "compared"
    compared(folder, names=("a",))
    with_mine(folder, "notes/mine.txt")
    before = contents(tmp_path)
    for act in (
        lambda: fitted(folder / place, **given),
        lambda: pg.save(two[1], folder / place, overwrite="overwrite" in given),
        lambda: compared(folder / place, **given),
    ):
        with pytest.raises(OutputExistsError, match=r"lies in a comparison|holds a fit"):
            act()
    assert contents(tmp_path) == before


def test_nothing_of_a_comparison_goes_before_the_next_can_begin(tmp_path):
    resource = pytest.importorskip("resource")
    folder, elsewhere = tmp_path / "compared", tmp_path / "elsewhere"
    compared(folder, names=("a",))
    (folder / "notes").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"the guide's name 'xxx.* is too long a name or path"):
        compared(folder, names=("a", "x" * 300), overwrite=True)
    with pytest.raises(OutputExistsError, match="notes is a file; remove it, or give the guide 'notes' another name"):
        compared(folder, names=("a", "notes"), overwrite=True)
    with locked(folder / "a"), pytest.raises(OutputExistsError, match="a is being written by another"):
        compared(folder, names=("a",), overwrite=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with pytest.raises(WriteError, match="File too large"):
            compared(folder, names=("a",), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    (folder / "a").rename(elsewhere)
    (folder / "a").symlink_to(elsewhere)
    with pytest.raises(OutputExistsError, match="a is a link; remove it"):
        compared(folder, names=("a",), overwrite=True)
    assert len(pg.load(elsewhere).history) == 1
    assert compared(folder, names=("a",), resume=True).failed == {}


@pytest.mark.parametrize("path", ["x" * 300, "/".join(["x" * 99] * 50)], ids=["name", "path"])
def test_a_path_that_is_too_long_is_named_before_training(path, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, said = two[1], rf"'xxx.{{1,30}}xxx', of {len(path)} characters, is too long a name or path .* a shorter one"
    never: Any = {"callbacks": [lambda run: pytest.fail("it was trained")]}
    for name, act in (
        (r"out \(--out\)", lambda: fitted(path, **never)),
        (r"out \(--out\)", lambda: compared(path)),
        ("folder", lambda: pg.save(run, path)),
        ("folder", lambda: pg.load(path)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {said}$"):
            act()
    with pytest.raises(ValueError, match=r"^out \(--out\): .* holds characters that no name of a file can have"):
        fitted("\udc00", **never)
    assert not [*tmp_path.iterdir()]


def test_leftovers_of_killed_writes_go_and_make_no_folder_foreign(tmp_path):
    names = [f".weights.safetensors-{'0a' * 8}", f".run.yaml-{'f' * 16}", f".a-b.c-{'9' * 16}"]
    others = [".weights.safetensors-xyz", f"a-{'0' * 16}", f".a-{'0' * 15}", f".a-{'g' * 16}"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    fitted(tmp_path)
    assert not leftovers(tmp_path)
    for name in (*names, *others):
        (tmp_path / name).write_bytes(b"half")
    fitted(tmp_path, epochs=3, resume=True)
    assert not leftovers(tmp_path) and all((tmp_path / name).exists() for name in others)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / others[0]).write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="holds no run of pyrogen's"):
        fitted(alone, overwrite=True)
    assert (alone / others[0]).read_bytes() == b"mine"


HOLDS = """
import sys, time
sys.path.insert(0, {here!r})
from test_folders import fitted

def wait(run):
    print("trained", flush=True)
    time.sleep(600)

fitted({folder!r}, epochs=3, callbacks=[wait])
"""


@pytest.fixture
def holder(tmp_path):
    """Another process in the middle of a fit, and its folder."""
    text = HOLDS.format(here=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"trained\n"
        yield process, tmp_path / "run"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_of_two_processes_with_one_folder_one_is_told_of_the_other(holder, tmp_path):
    process, folder = holder
    run, before = fitted(None), contents(folder)
    said = rf"run is being written by another fit, comparison or save \(process {process.pid} on .*\); wait"
    model = run.model
    compared: dict[str, Any] = {"guides": {"a": (Normal, ELBO())}, "encoder": lambda: MLP(SHAPE, 3), "data": ROWS}
    for act in (
        lambda: fitted(folder),
        lambda: fitted(folder, epochs=3, resume=True),
        lambda: fitted(folder, overwrite=True),
        lambda: pg.save(run, folder, overwrite=True),
        lambda: pg.compare(model, **compared, epochs=1, out=folder, overwrite=True, progress=False),
    ):
        with pytest.raises(OutputExistsError, match=said):
            act()
    assert contents(folder) == before
    assert len(pg.load(folder).history) == 1  # reading asks nobody
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = fitted(tmp_path / "whole", epochs=3)
    assert without_times(fitted(folder, epochs=3, resume=True)) == without_times(whole)


def test_a_run_is_read_while_another_is_written(two, tmp_path, monkeypatch):
    """Weights and copies are then of two states for a moment, which is no damage."""
    folder, new = shutil.copytree(two[0], tmp_path / "run"), two[1]

    def meanwhile(path):
        found = checkpoints.read_tensors(path)
        monkeypatch.setattr("pyrogen.inference.reading.read_tensors", checkpoints.read_tensors)
        pg.save(new, folder, overwrite=True)
        return found

    monkeypatch.setattr("pyrogen.inference.reading.read_tensors", meanwhile)
    assert state(pg.load(folder)) == state(new)


def test_a_folder_that_fills_while_data_are_checked_is_refused(tmp_path, monkeypatch):
    """Whoever comes second may have looked before the first one wrote."""
    from pyrogen.inference import training

    checked = training.check_programs

    def meanwhile(*given, **named):
        monkeypatch.setattr(training, "check_programs", checked)
        fitted(tmp_path / "run")
        return checked(*given, **named)

    monkeypatch.setattr(training, "check_programs", meanwhile)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        fitted(tmp_path / "run", built=2)
    assert state(pg.load(tmp_path / "run"))[0] == state(fitted(None))[0]


def test_two_commands_at_once_make_one_run(tmp_path):
    command = [sys.executable, "-m", "pyrogen", "fit", "--epochs", "3", "--latent", "2", "--out", str(tmp_path / "run")]
    options: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    lines = next(text for process, text in zip(both, said, strict=True) if process.returncode).splitlines()
    assert re.search(r"error: .*run (exists and is not empty|is being written by another)", lines[-1]), said
    assert len(pg.load(tmp_path / "run").history) == 3


def test_a_fit_does_not_share_its_folder_within_its_process(tmp_path):
    errors = []

    def act(run):
        for other in (lambda: pg.save(run, tmp_path / "run", overwrite=True), lambda: fitted(tmp_path / "run")):
            try:
                other()
            except OutputExistsError as error:
                errors.append(str(error))

    fitted(tmp_path / "run", callbacks=[act])
    assert len(errors) == 4 and all(f"process {os.getpid()} on" in error for error in errors)
    thread = threading.Thread(target=lambda: fitted(tmp_path / "run", epochs=3, resume=True))
    thread.start()
    thread.join()
    assert len(pg.load(tmp_path / "run").history) == 3


def test_a_lock_is_given_back_whatever_comes(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path / "run", overwrite=True):
            assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
            raise ZeroDivisionError
        assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {".lock": ""}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_refused(code, two, tmp_path, monkeypatch):
    """A soft lock, to which the library would turn, stays for ever after a kill."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", missing)
    said = rf"\.lock could not be locked: {os.strerror(code)}\. Give a folder on a disk that knows locks"
    with pytest.raises(WriteError, match=said):
        pg.save(two[1], tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    monkeypatch.undo()
    pg.save(two[1], tmp_path / "run")


def test_the_file_of_a_lock_is_the_same_for_all(tmp_path):
    """Who finds another file would not be kept out by those who wait at this one."""
    found = []
    for _ in range(2):
        with held(tmp_path, overwrite=True):
            found.append((tmp_path / ".lock").stat().st_ino)
    assert found == [(tmp_path / ".lock").stat().st_ino] * 2


def noted(folder, run, seed) -> dict[str, Any]:
    """Note an evaluation, as ``pyrogen evaluate`` does."""
    data = Data("frozen", train=ROWS, validation=ROWS, test=ROWS, values="binary")
    settings = commands.EvaluateSettings(run=str(folder), seed=seed)
    found = pg.evaluate(run, ROWS, parts=["bound"], seed=seed)
    return commands._note_evaluation(folder, run, data, settings, found)


def test_evaluations_of_one_run_at_once_are_all_noted(two, tmp_path, monkeypatch):
    folder = shutil.copytree(two[0], tmp_path / "run")
    run = pg.load(folder)
    read = commands.read_evaluations

    def slowly(path):
        entries = read(path)
        time.sleep(0.3)
        return entries

    monkeypatch.setattr(commands, "read_evaluations", slowly)
    threads = [threading.Thread(target=noted, args=(folder, run, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["seed"] for entry in read(folder / "evaluation.yaml")) == [0, 1, 2]


def test_an_evaluation_goes_on_where_a_fit_holds_the_folder(two, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(two[0], tmp_path / "run")
    monkeypatch.setattr(commands, "NOTING", 0.1)
    with held(folder, overwrite=True):
        entry = noted(folder, pg.load(folder), 0)
    assert entry["parts"] == ["bound"] and math.isfinite(entry["elbo"])
    assert (folder / "evaluation.yaml").read_text() == "[]\n"
    assert re.search(r"evaluation\.yaml is not written: .*run is being written by another fit", caplog.text)
    assert noted(folder, pg.load(folder), 0)["elbo"] == entry["elbo"]
    assert [each["elbo"] for each in commands.read_evaluations(folder / "evaluation.yaml")] == [entry["elbo"]]


def test_only_one_of_many_holds_a_folder_at_a_time(tmp_path):
    inside, seen = [], []

    def act():
        for _ in range(40):
            with contextlib.suppress(OutputExistsError), held(tmp_path / "run", overwrite=False):
                inside.append(None)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*seen} == {1} and len(seen) > 40


@pytest.fixture
def small(tmp_path):
    """A disk of 400 kB, where one may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("a disk can't be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place):
    """Leave no room on a disk."""
    with open(place / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"0" * 512)


def test_a_disk_that_fills_up_costs_nothing_that_was_written(small, tmp_path, caplog):
    folder = small / "run"

    def filling(run):
        if len(run.history) == 2:
            fill(small)

    with pytest.raises(WriteError) as error:
        fitted(folder, epochs=5, callbacks=[filling])
    for said in (
        f"{folder / 'checkpoint.safetensors'} could not be written: ",
        "No space left on device",
        "Free some space there",
        "nothing that was there before is lost",
        f"Training stands at step 6, and the last checkpoint is {folder / 'checkpoint.safetensors'}",
    ):
        assert said in str(error.value)
    assert len(pg.load(folder).history) == 2 and not leftovers(folder)
    with pytest.raises(WriteError, match="No space"):
        pg.save(pg.load(folder), folder, overwrite=True)
    assert len(pg.load(folder).history) == 2
    (small / "filler").unlink()
    resumed = fitted(folder, epochs=5, resume=True)
    assert without_times(resumed) == without_times(fitted(tmp_path / "whole", epochs=5))


def test_a_limit_on_the_size_of_files_costs_nothing_that_was_written(tmp_path):
    """Which is the same fault where no disk may be mounted."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limiting(run):
        if len(run.history) == 2:
            assert (tmp_path / "run" / "checkpoint.safetensors").stat().st_size > 6000
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))

    try:
        with pytest.raises(WriteError, match=r"checkpoint\.safetensors could not .*File too large.* at step 6"):
            fitted(tmp_path / "run", epochs=5, callbacks=[limiting])
        assert len(pg.load(tmp_path / "run").history) == 2 and not leftovers(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    whole = fitted(tmp_path / "whole", epochs=5)
    assert without_times(fitted(tmp_path / "run", epochs=5, resume=True)) == without_times(whole)


def test_on_a_full_disk_nothing_is_begun(small):
    fill(small)
    with pytest.raises(WriteError, match=rf"{small / 'run'}.* could not be written: No space left on device\. Free"):
        fitted(small / "run", callbacks=[lambda run: pytest.fail("it was trained")])
    (small / "filler").unlink()
    fitted(small / "run")


def test_a_training_does_not_wait_for_logs_that_can_not_be_written(small):
    """The library's own writer leaves them to a thread, and waits for it when it has died."""
    (small / "run").mkdir()
    log = Events(small / "run" / "logs")
    log.log_metrics({"loss": 1.0}, 1)
    fill(small)
    with pytest.warns(UserWarning, match=r"logs could not be written: No space left.* Free some space") as warned:
        for step in range(2, 4000):
            log.log_metrics({"loss": 1.0, "rate": 2.0}, step)
    assert len(warned) == 1
    log.finalize("finished")


def test_a_training_goes_on_without_logs(tmp_path, monkeypatch):
    """Which hold nothing that its own files have not."""
    whole, count = fitted(tmp_path / "whole"), itertools.count()

    def full(self, content):
        if next(count) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(events.RecordWriter, "write", full)
    with pytest.warns(UserWarning, match=r"logs could not be .* goes on without logs; history\.csv has") as warned:
        run = fitted(tmp_path / "run")
    assert len(warned) == 1 and next(count) == 7
    assert without_times(pg.load(tmp_path / "run")) == without_times(run) == without_times(whole)


def test_logs_of_one_second_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for value in (1.0, 2.0):
        log = Events(tmp_path / "logs")
        log.log_metrics({"loss": value}, 1)
        log.finalize("finished")
    assert len([*(tmp_path / "logs").iterdir()]) == 2


@pytest.fixture
def read_only(tmp_path):
    """A folder that holds a run and may not be written."""
    place = tmp_path / "place"
    place.mkdir()
    if os.geteuid():
        fitted(place / "run")
        before = [(path, path.stat().st_mode) for path in (place / "run", place)]
        for path, _ in before:
            path.chmod(0o555)
        yield place
        for path, mode in before:
            path.chmod(mode)
        return
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(place)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no folder can be made that root may not write")
    fitted(place / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_folder_that_may_not_be_written_is_named_before_training(read_only):
    never: Any = {"callbacks": [lambda run: pytest.fail("it was trained")]}
    run, before = pg.load(read_only / "run"), contents(read_only)
    for act in (
        lambda: fitted(read_only / "new", **never),
        lambda: fitted(read_only / "deep" / "new", **never),
        lambda: fitted(read_only / "run", epochs=3, resume=True, **never),
        lambda: fitted(read_only / "run", overwrite=True, **never),
        lambda: pg.save(run, read_only / "run", overwrite=True),
        lambda: write_tensors(read_only / "a.safetensors", {}, {}),
    ):
        with pytest.raises(
            WriteError, match=rf"{read_only}/\S* could not be written: .*Give a folder in which you may"
        ):
            act()
    assert contents(read_only) == before


def test_whether_a_folder_can_be_written_is_seen_before_data_are_read(read_only):
    class Unreadable(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            pytest.fail("data were read")

    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, SHAPE)))
    with pytest.raises(WriteError, match="could not be written"):
        fit(model, AmortizedGuide(model, MLP(SHAPE, 3)), ELBO(), Unreadable(), epochs=1, out=read_only / "new")


def test_a_clock_set_back_changes_nothing(tmp_path, monkeypatch):
    whole = fitted(tmp_path / "whole", epochs=4)
    times = itertools.count(2e9, -1e6)
    monkeypatch.setattr(time, "time", lambda: next(times))
    fitted(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (0, 0))
    assert without_times(fitted(tmp_path / "run", epochs=4, resume=True)) == without_times(whole)
    seconds = pd.read_csv(tmp_path / "run" / "history.csv")["seconds"]
    assert seconds.is_monotonic_increasing and (seconds > 0).all()
    pg.save(whole, tmp_path / "run", overwrite=True)
    assert state(pg.load(tmp_path / "run")) == state(whole)

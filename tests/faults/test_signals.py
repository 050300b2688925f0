"""Fits that are told to stop, or are killed: what they leave, and what going on gives."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen import cli
from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.experiment import commands
from pyrogen.inference import ELBO, AmortizedGuide, Run, fit
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.inference.loop import CHECKPOINT
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
TIMES = ["seconds", "rows_per_second"]


class Sends(nn.Module):
    """An encoder that sends its own process a signal at one of its calls in training."""

    number, at = signal.SIGINT, 0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(MLP(6, 8, (8,)), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return self.layers(x)


def fitted(number=signal.SIGINT, at=0, **given) -> Run:
    Sends.number, Sends.at = number, at
    torch.manual_seed(1)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    guide = AmortizedGuide(model, Sends(), example=torch.zeros(2, 6))
    x = (torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    options: dict[str, Any] = {"batch_size": 8, "epochs": 4, "progress": False, "device": "cpu", "average": 0.9}
    return fit(model, guide, ELBO(), x, **options | given)


@pytest.fixture(autouse=True)
def _handlers_as_in_a_new_process():
    """Whatever other tests have left in this one."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def same(one: Path, other: Path) -> None:
    (tensors, values), (others, other_values) = (read_tensors(folder / CHECKPOINT) for folder in (one, other))
    assert tensors.keys() == others.keys() and values["tallies"] == other_values["tallies"]
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    histories = [pg.load(folder, trust=True).history.drop(columns=TIMES) for folder in (one, other)]
    assert histories[0].equals(histories[1])


@pytest.mark.parametrize("at", [2, 7, 10])  # within the first epoch, in the last step of it, within the second
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(number, error, at, tmp_path, caplog):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    fitted(out=tmp_path / "whole")
    with pytest.raises(error) as raised:
        fitted(number, at, out=tmp_path / "part")
    if error is SystemExit:
        assert raised.value.code == 143
    said = caplog.text if error is SystemExit else str(raised.value)
    assert f"stopped after step {at}; resume=True (--resume) goes on from {tmp_path / 'part'}" in said
    assert read_tensors(tmp_path / "part" / CHECKPOINT)[1]["step"] == at
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    fitted(out=tmp_path / "part", resume=True)
    same(tmp_path / "whole", tmp_path / "part")


def test_a_signal_in_the_last_step_ends_what_follows_a_finished_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fitted(signal.SIGINT, 28, out=tmp_path / "run")
    assert pg.load(tmp_path / "run", trust=True).history["step"].tolist() == [7, 14, 21, 28]


def test_without_a_folder_it_stops_at_once():
    with pytest.raises(KeyboardInterrupt):
        fitted(signal.SIGINT, 3)


def test_a_handler_of_the_user_s_own_stays(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        run = fitted(signal.SIGTERM, 3, out=tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and len(run.history) == 4


def test_in_a_thread_signals_are_left_to_the_main_one(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(fitted(out=tmp_path / "run")))
    thread.start()
    thread.join()
    assert len(runs[0].history) == 4


@pytest.mark.parametrize(
    ("command", "said"), [("fit", "--resume with the same --out goes on"), ("evaluate", "nothing is half written")]
)
def test_what_the_command_says(command, said, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main([command, "somewhere"]) == 130
    assert said in capsys.readouterr().err


def test_a_command_that_is_interrupted_says_so_once_and_leaves_its_settings(monkeypatch, tmp_path, capsys, caplog):
    def interrupt(run):
        os.kill(os.getpid(), signal.SIGINT)

    small = ["--latent", "2", "--epochs", "3", "--batch_size", "512", "--progress", "false"]
    with monkeypatch.context() as patched:
        patched.setattr(commands, "fit", partial(fit, callbacks=[interrupt]))
        assert cli.main(["fit", *small, "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err
    assert said == f"pyrogen: stopped after step 3; resume=True (--resume) goes on from {tmp_path / 'run'}\n"
    assert not caplog.records
    settings = ["--config", str(tmp_path / "run" / "fit.yaml"), "--progress", "false"]
    assert cli.main(["fit", *settings, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert len(pg.load(tmp_path / "run").history) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fits_that_are_killed_give_the_same_in_the_end():
    """A short form of the soak, with real SIGKILL, SIGTERM and Ctrl-C at random moments."""
    command = [sys.executable, str(SOAK), "--kills", "12", "--others", "0", "--minutes", "0", "--epochs", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=SOAK.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all held\n")


def test_what_a_killed_writer_left_is_cleared_and_is_no_run_of_somebody_else(tmp_path):
    left = tmp_path / "run" / ".run.yaml-2f557957fcc3354a"
    left.parent.mkdir()
    left.write_text("half")
    fitted(out=tmp_path / "run")
    assert not left.exists()
    left.write_text("half")
    fitted(out=tmp_path / "run", resume=True, epochs=5)
    assert not left.exists()

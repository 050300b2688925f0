"""What a run says of where it comes from."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import pyrogen as pg
from pyrogen.inference import provenance
from pyrogen.models import ProbabilisticPCA
from pyrogen.networks import MLP

CPU = torch.device("cpu")


def fitted(**options):
    torch.manual_seed(0)
    model = ProbabilisticPCA(2, 4)
    guide = pg.inference.AmortizedGuide(model, MLP(4, 8, (8,)))
    return pg.fit(model, guide, pg.inference.ELBO(), torch.ones(20, 4), **options)


def git(folder, *words):
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_the_revision_of_the_code_around_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.provenance(CPU)["revision"] is None
    git(tmp_path, "init")
    (tmp_path / "model.py").write_text("1")
    git(tmp_path, "add", "model.py")
    git(tmp_path, "commit", "-m", "one")
    revision = provenance.provenance(CPU)["revision"]
    assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    (tmp_path / "notes").write_text("of no file that git knows")
    assert provenance.provenance(CPU)["revision"] == revision
    (tmp_path / "model.py").write_text("2")
    assert provenance.provenance(CPU)["revision"] == revision + "+"
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance(CPU)["revision"] is None


def test_a_repository_s_settings_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "one")
    (tmp_path / "evil").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "evil").chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(tmp_path / "evil"))
    assert provenance.provenance(CPU)["revision"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_it_is_written_with_a_run_and_stays_with_it(resumed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/fit.py", "--seed", "3 4"])
    options: dict[str, Any] = {"steps": 2, "progress": False, "device": "cpu", "out": tmp_path / "run"}
    run = fitted(**options)
    assert run.made["command"] == "fit.py --seed '3 4'"
    assert run.made["machine"]["threads"] == torch.get_num_threads() and run.made["machine"]["device"] == "cpu"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/look.py"])
    if resumed:
        options["steps"] = 4
        fitted(resume=True, **options)
    loaded = pg.load(tmp_path / "run")
    pg.save(loaded, tmp_path / "again")
    assert pg.load(tmp_path / "again").made == loaded.made
    assert loaded.made["command"].startswith("look.py" if resumed else "fit.py")

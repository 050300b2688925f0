"""What may run code that is read: the linter bans it, and here stand all exceptions."""

import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

BANNED = {
    "import pickle\npickle.loads(b'')": {"TID251", "S301"},
    "import cloudpickle\ncloudpickle.loads(b'')": {"TID251"},
    "import dill\ndill.loads(b'')": {"TID251", "S301"},
    "import marshal\nmarshal.loads(b'')": {"TID251", "S302"},
    "import shelve\nshelve.open('x')": {"TID251", "S301"},
    "import joblib\njoblib.load('x')": {"TID251"},
    "import pandas as pd\npd.read_pickle('x')": {"TID251", "S301"},
    "import pandas as pd\npd.eval('x')": {"TID251"},
    "import numpy as np\nnp.load('x', allow_pickle=True)": {"TID251"},
    "import numpy as np\nnp.load('x')": {"TID251"},
    "import torch\ntorch.load('x', weights_only=False)": {"TID251"},
    "import torch\ntorch.load('x')": {"TID251"},
    "from torch import load\nload('x')": {"TID251"},
    "import torch\ntorch.hub.load('x', 'y')": {"TID251"},
    "import torch\ntorch.jit.load('x')": {"TID251"},
    "import torch\ntorch.package.PackageImporter('x')": {"TID251"},
    "import yaml\nyaml.load('x', yaml.Loader)": {"TID251", "S506"},
    "import yaml\nyaml.unsafe_load('x')": {"TID251"},
    "import yaml\nyaml.full_load('x')": {"TID251"},
    "eval('1')": {"S307"},
    "exec('1')": {"S102"},
    "import importlib\nimportlib.import_module('x')": {"TID251"},
    "from importlib.util import module_from_spec\nmodule_from_spec(1)": {"TID251"},
    "import runpy\nrunpy.run_path('x')": {"TID251"},
    "import os\nos.system('x')": {"TID251", "S605"},
    "import subprocess\nsubprocess.run('x', shell=True)": {"S602"},
    "import tarfile\ntarfile.open('x').extractall()": {"TID251", "S202"},
    "import shutil\nshutil.unpack_archive('x')": {"TID251"},
    "import os\nos.chmod('x', 0o777)": {"S103"},
    "import jinja2\njinja2.Environment()": {"S701"},
    "import markupsafe\nmarkupsafe.Markup(x := input())": {"S704"},
    "import xml.etree.ElementTree as e\ne.fromstring('x')": {"S314"},
    "import urllib.request\nurllib.request.urlopen(x := input())": {"S310"},
}

EXCEPTIONS = {
    "pyrogen/configuration.py": ["TID251 (was asked for above)", "TID251 (only what the user trusts)"],
    "pyrogen/data/published.py": ["TID251 (only its error; torchvision checks the sums of what it unpickles)"],
    "pyrogen/evaluation/frames.py": ["TID251 (a name of ours)", "TID251 (as above)"],
    "pyrogen/evaluation/inception_v3.py": ["TID251 (as published, and tensors only)"],
    "pyrogen/experiment/report.py": ["S701 (Markdown has an escape of its own)"],
    "pyrogen/experiment/workers.py": [
        "TID251 (between this process and its own workers)",
        "TID251 (what the parent wrote)",
    ],
    "pyrogen/inference/parallel.py": [
        "TID251 (of an error, to see whether it can be sent)",
        "S301 (of our own making)",
    ],
}


def waived(path: Path) -> Iterator[str]:
    """What a file asks the linter to pass over among the bans, each with what stands behind it."""
    with tokenize.open(path) as file:
        comments = [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    for comment in comments:
        assert not re.search(r"ruff: noqa|flake8: noqa|noqa(?!:)", comment), f"{path}: {comment}"
        if found := re.search(r"noqa: (.*\b(?:S\d|TID)\d*.*)", comment):
            yield found[1]


def test_the_linter_finds_what_is_banned(tmp_path):
    ruff = Path(sys.executable).with_name("ruff")
    for number, text in enumerate(BANNED):
        (tmp_path / f"x{number}.py").write_text(f"{text}\n")
    command = [ruff, "check", "--no-cache", "--config", ROOT / "pyproject.toml", "--output-format", "concise", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [re.findall(rf"x{number}\.py:\d+:\d+: ([A-Z]+\d+)", done.stdout) for number in range(len(BANNED))]
    missed = {text: codes - {*there} for (text, codes), there in zip(BANNED.items(), found, strict=True)}
    assert not {text: codes for text, codes in missed.items() if codes}, done.stdout


def test_exceptions_are_these():
    found = {str(path.relative_to(ROOT)): [*waived(path)] for path in sorted((ROOT / "pyrogen").rglob("*.py"))}
    assert {path: each for path, each in found.items() if each} == EXCEPTIONS


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks"])
def test_other_exceptions_have_reasons(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for each in waived(path):
            assert re.fullmatch(r"[A-Z]+\d+ \(.+\)", each), f"{path}: {each}"

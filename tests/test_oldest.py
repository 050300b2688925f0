"""The file of oldest versions names what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_are_those_that_are_asked_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(re.sub(r"\[.*?\]", "", each).split(">=") for each in asked)
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() - lowest.keys() == {"pyparsing"}  # newer ones warn that Matplotlib 3.9 is old
    for name, version in lowest.items():
        assert (pinned[name] + ".0.0").startswith(version + "."), name

"""Benchmarks that nothing else runs in the tests still take the data that they make up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCALING = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


@pytest.mark.parametrize(("axis", "size"), [("processes", 1), ("importance sampling", 100)])
def test_a_point_of_scaling_is_measured(axis, size):
    done = subprocess.run([sys.executable, SCALING, "--point", axis, str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["milliseconds"] > 0 and found["MiB"] > 100

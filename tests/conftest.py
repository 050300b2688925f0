"""What every test shares: seeds, and the rule that no test leaves torch or Pyro changed."""

import pyro
import pytest
import torch

from pyrogen.evaluation.frames import import_arviz
from pyrogen.inference import compilation, tracing


def pytest_configure():
    """Import ArviZ before there are workers: where several do so for the first time on a day, some fail."""
    import_arviz("arviz")


def _global_state() -> dict[str, object]:
    return {
        "torch default type": torch.get_default_dtype(),
        "torch gradient mode": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch distribution checks": torch.distributions.Distribution._validate_args,
        "Pyro parameters": sorted(pyro.get_param_store().keys()),
        "Pyro handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "Pyro settings": dict(pyro.settings.get()),
    }


@pytest.fixture(autouse=True)
def _no_leaks():
    torch.manual_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test leaves global state changed: {changed}"


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def parameter_store():
    """A parameter store of the test's own, for programs that are run as Pyro runs them."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def traced_only(monkeypatch):
    """What is traced runs as a graph operation by operation, which spares the time of compiling it."""
    for module in (compilation, tracing):
        monkeypatch.setattr(module, "lowered", lambda graph, inputs: graph)

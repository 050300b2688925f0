"""Steps that are not taken, for their loss or gradients are not finite; and the norm of gradients."""

import math
import signal
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Implicit, NormalLikelihood, StandardNormal
from pyrogen.inference import AVB, ELBO, GAN, AmortizedGuide, CriticOptions, NonFiniteLoss, fit, loop
from pyrogen.inference.batches import training_and_validation
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP


class Mean(nn.Module):
    """x ~ N(loc, 1), with a loss or only a gradient that is not finite at some of its calls."""

    def __init__(self, sick=(), gradient_only=False):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))
        self.sick, self.gradient_only, self.calls = sick, gradient_only, 0

    def forward(self, x):
        loc = self.loc
        if self.training:
            self.calls += 1
            self.seen += 1
            if self.calls in self.sick:
                # The slope of a root at 0 is infinite, and 0 times that no number.
                loc = loc + ((loc * 0).abs().sqrt() if self.gradient_only else loc * math.nan)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Marked(nn.Module):
    """The same, with NaN in the rows that begin with a number above 5."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = torch.where(x[:, :1] > 5, torch.nan, self.loc)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def fitted(model, x, **given) -> Any:
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "learning_rate": 0.1, "progress": False, "device": "cpu"}
    return fit(model, None, ELBO(), x, **options | given)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_what_is_not_finite_is_skipped_and_nothing_else(gradient_only):
    x = torch.randn(8, 3)
    run = fitted(Mean({3, 4, 9}, gradient_only), x, epochs=10, non_finite="skip")
    loc = torch.zeros(3)
    for _ in range(7):
        loc = loc - 0.1 * (loc - x.mean(0))
    torch.testing.assert_close(run.model.loc.detach(), loc)
    assert run.history["skipped"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 0]
    assert run.history["loss"].isna().tolist() == [skipped > 0 for skipped in run.history["skipped"]]
    assert run.history["step"].tolist() == [*range(1, 11)]
    assert run.model.seen == 7  # buffers too are as they were
    with pytest.raises(NonFiniteLoss):
        fitted(Mean({3}, gradient_only), x, epochs=10)


def test_a_compiled_fit_skips_the_same_steps(traced_only):
    x = torch.randn(64, 3)
    x[[5, 40], 0] = 6.0
    runs = [fitted(Marked(), x, epochs=3, batch_size=8, non_finite="skip", compile=each) for each in (False, True)]
    for run in runs:
        assert run.history["skipped"].between(1, 2).all() and run.history["loss"].notna().all()
    torch.testing.assert_close(runs[0].model.loc, runs[1].model.loc)
    assert runs[0].model.loc.abs().max() > 0


def test_too_many_in_a_row_stop(monkeypatch):
    monkeypatch.setattr(loop, "MOST_SKIPPED", 4)
    x = torch.randn(8, 3)
    assert len(fitted(Mean({2, 3, 4, 6, 7, 8}), x, epochs=10, non_finite="skip").history) == 10
    model = Mean({3, 4, 5, 6})
    said = r"of 4 steps .* are not finite, the last at step 6 .*'stop' names .* weights of step 0 again"
    with pytest.raises(NonFiniteLoss, match=said):
        fitted(model, x.repeat(10, 1), epochs=1, batch_size=8, non_finite="skip")
    assert not model.loc.detach().any()


class Overflowing(nn.Module):
    """x ~ N(loc², 1), whose loss is finite at first and no more after an enormous step."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc**2, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("rows", "given", "last"),
    [
        (12 * 4, {"epochs": 1}, 12),
        (12 * 4, {"epochs": 3}, 24),  # of the first epoch a step was taken, and a fit may go on
        (12 * 4, {"steps": 15}, 15),
        (2 * 4, {"epochs": 100}, 12),
        (4, {"epochs": 3}, 3),
    ],
)
def test_a_finite_step_that_spoils_all_others_is_no_success(rows, given, last, tmp_path):
    model = Overflowing()
    options: dict[str, Any] = {"learning_rate": 1e30, "batch_size": 4, "non_finite": "skip", "out": tmp_path}
    said = rf"of {last - 1} steps .*, the last at step {last} \(epoch .* weights of step 0 again"
    with pytest.raises(NonFiniteLoss, match=said) as error:
        fitted(model, torch.randn(rows, 3), **options | given)
    assert model.loc.tolist() == [1.0, 1.0, 1.0]
    assert ("no checkpoint was written" in str(error.value)) == (not (tmp_path / "checkpoint.safetensors").exists())


def test_steps_skipped_before_an_interruption_count_after_it(tmp_path, monkeypatch):
    """The fit that goes on from within an epoch stops where one that nobody disturbed does."""
    x = torch.randn(12 * 4, 3)
    options: dict[str, Any] = {"learning_rate": 1e30, "batch_size": 4, "epochs": 1, "non_finite": "skip"}
    skip = loop.Training._skip

    def interrupted(self, buffers):
        skip(self, buffers)
        if self.in_a_row == 7:
            signal.raise_signal(signal.SIGTERM)  # what runs in the background may ignore Ctrl-C

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(loop.Training, "_skip", interrupted)
        fitted(Overflowing(), x, out=tmp_path, **options)
    assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == 8
    with pytest.raises(NonFiniteLoss, match="of 11 steps"):
        fitted(Overflowing(), x, out=tmp_path, resume=True, **options)


class Sometimes(nn.Module):
    """A critic that says NaN at a few of its calls."""

    def __init__(self, *arguments, **given):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 1), 0

    def forward(self, x, context=None):
        self.calls += self.training
        scores = self.layer(x.reshape(-1, 3)).reshape(x.shape[:-1])
        return scores * math.nan if self.training and 5 <= self.calls < 7 else scores


def test_steps_of_critics_alone_are_skipped_too():
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
    options: Any = {"steps": 12, "progress": False, "device": "cpu", "critic": CriticOptions(steps=3)}
    x = torch.randn(16, 3)

    run = fit(model, None, GAN(critic=Sometimes), x, non_finite="skip", **options)
    assert all(torch.isfinite(p).all() for p in run.objective.critics.parameters())
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
    with pytest.raises(NonFiniteLoss):
        fit(model, None, GAN(critic=Sometimes), x, **options)


def test_the_norm_of_gradients_is_that_before_clipping():
    x = torch.randn(8, 3)
    run = fitted(Mean(), x, epochs=2, gradient_clip=1e-3)
    assert run.history["gradient_norm"][0] == pytest.approx(x.mean(0).norm().item(), rel=1e-5)
    assert run.history["gradient_norm"][1] < run.history["gradient_norm"][0]
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
    guide = AmortizedGuide(model, MLP(3, 8, (4,)), Implicit)
    run = fit(model, guide, AVB(2), x, steps=1, progress=False, device="cpu")
    assert 0 < run.history["gradient_norm"][0] < math.inf


def test_the_norm_is_a_mean_over_every_tenth_step():
    x = torch.randn(88, 3)
    run = fitted(Mean(), x, epochs=1, batch_size=4, learning_rate=1e-9)  # 22 steps
    batches, _ = training_and_validation(x, 4, 0)
    means = [x.mean(0).norm() for x, *_ in [*batches.epoch(0, torch.device("cpu"))][::10]]
    assert run.history["gradient_norm"][0] == pytest.approx(float(sum(means)) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"non_finite": "ignore"}, "non_finite is 'stop' or 'skip', got 'ignore'"),
        ({"non_finite": "skip", "precision": "16-mixed"}, "skips steps by itself"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported:UserWarning")
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(Mean(), torch.randn(8, 3), epochs=1, **options)

"""The training loop: it learns, logs, stops, and goes on from a checkpoint bit for bit."""

import functools
import io
import re
import sys
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, Flow, Normal, NormalLikelihood, StandardNormal
from pyrogen.inference import (
    ELBO,
    IWAE,
    AmortizedGuide,
    LinearSchedule,
    NonFiniteLoss,
    OutputExistsError,
    Run,
    fit,
    loop,
)
from pyrogen.inference.checkpoints import read_tensors
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.loop import CHECKPOINT
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP, ConvDecoder, ConvEncoder

COLUMNS = [
    *("epoch", "step", "loss", "distortion", "rate", "validation", "learning_rate", "gradient_norm", "seconds"),
    *("rows_per_second", "inactive_units"),
]


@pytest.fixture(scope="module")
def digits():
    """100 digits to train on, binarised anew at each epoch, and 30 to validate."""
    whole = pg.data.load("digits")
    return Data(
        "few digits",
        train=whole.train[:100],
        validation=whole.validation[:30],
        test=whole.test[:30],
        values="binary",
        binarize="dynamic",
    )


def programs(seed=1) -> Any:
    """A small model of digits with batch normalisation and dropout in its encoder, and its guide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8), hidden=(16,))))
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        return model, AmortizedGuide(model, encoder)


def short_fit(data, objective=None, **given) -> Any:
    model, guide = programs()
    options: dict[str, Any] = {"epochs": 4, "batch_size": 32, "progress": False} | given
    return fit(model, guide, objective or ELBO(), data, **options)


def everything(folder):
    """All of a checkpoint but the times."""
    tensors, values = read_tensors(folder / CHECKPOINT)
    history = pd.DataFrame(values.pop("history")).drop(columns=["seconds", "rows_per_second"])
    for name in ("seconds", "identity"):
        values.pop(name)
    return tensors, values, history


def assert_same(first, second):
    """Two folders hold the same training: weights, optimizer, random states, history."""
    (tensors, values, history), (others, other_values, other_history) = everything(first), everything(second)
    assert tensors.keys() == others.keys()
    differing = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not differing
    assert values == other_values
    pd.testing.assert_frame_equal(history, other_history, check_exact=True)


class Crash(Exception):
    """What a test throws into a training."""


def crash_at(step, monkeypatch):
    """Make the training fail before the step of this number, in the middle of its epoch."""
    from pyrogen.inference.loop import Training

    original = Training._step

    def failing(self, batch):
        if self.step == step:
            raise Crash
        return original(self, batch)

    monkeypatch.setattr(Training, "_step", failing)


VARIANTS = {
    "elbo": {},
    "schedules": {"objective": ELBO(beta=LinearSchedule(steps=10)), "schedule": "cosine"},
    "own schedule": {"schedule": lambda share: 1.0 - share**2, "gradient_clip": 0.5},
    "iwae": {"objective": IWAE(3, gradient="doubly reparameterised")},
    "momentum": {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9), "learning_rate": 1e-2},
    "adamw": {"optimizer": torch.optim.AdamW, "schedule": "linear"},
    "patience": {"patience": 3, "validate_every": 1, "learning_rate": 0.5},
    "double": {"precision": "64-true"},
}


@pytest.mark.parametrize("how", ["callback", "crash"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_resuming_gives_the_run_never_interrupted(options, how, digits, tmp_path, monkeypatch):
    whole = short_fit(digits, out=tmp_path / "whole", **options)
    part = tmp_path / "part"
    if how == "callback":
        stopped = short_fit(digits, out=part, callbacks=[lambda run: len(run.history) == 2], **options)
        assert len(stopped.history) == 2
    else:
        with monkeypatch.context() as patch:
            crash_at(10, patch)  # the third epoch is steps 8 to 11
            with pytest.raises(Crash):
                short_fit(digits, out=part, **options)
    torch.rand(7)  # whatever else happens to the random state meanwhile
    resumed = short_fit(digits, out=part, resume=True, **options)
    assert_same(tmp_path / "whole", part)
    for name, value in whole.programs.state_dict().items():
        assert torch.equal(value, resumed.programs.state_dict()[name]), name
    assert len(whole.history) >= 3


@pytest.mark.parametrize("kind", ["model", "function", "module"])
def test_resuming_modules_whose_channels_come_last(kind, digits, traced_only, tmp_path):
    """A checkpoint holds tensors row by row; what a fused optimizer gathers lies as its parameters do."""

    def trained(folder, epochs):
        torch.manual_seed(1)
        decoder = ConvDecoder(2, (1, 8, 8), channels=(8, 16)).to(memory_format=torch.channels_last)
        encoder = ConvEncoder((1, 8, 8), 16, channels=(8, 16)).to(memory_format=torch.channels_last)
        model = LatentVariableModel(StandardNormal(2), Bernoulli(decoder))
        guide = AmortizedGuide(model, encoder)
        options: Any = {"epochs": epochs, "batch_size": 32, "progress": False, "out": folder, "resume": True}
        return fit(registering(model, decoder), guide, ELBO(), digits, **options)

    def registering(model, decoder):
        """The model as one that registers parameters, of which Pyro stores copies where they lie otherwise."""

        class Registering(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                pyro.module("decoder", decoder)
                return self.model(x)

        def function(x):
            pyro.module("decoder", decoder)
            return model(x)

        return {"model": model, "function": function, "module": Registering()}[kind]

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "part", 2)
    resumed = trained(tmp_path / "part", 4)
    assert_same(tmp_path / "whole", tmp_path / "part")
    for one, other in zip(whole.programs.parameters(), resumed.programs.parameters(), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    kernels = [p for p in resumed.programs.parameters() if p.dim() == 4]
    assert len(kernels) == 4 and sum(not kernel.is_contiguous() for kernel in kernels) == 2
    module = ELBO()(resumed.model, resumed.guide)
    compiled = Compiled(module)
    compiled.backward(digits.train[:8].float().round())
    assert compiled.why_not is None
    assert all(kernel.grad is not None and kernel.grad.stride() == kernel.stride() for kernel in kernels)


def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_there(digits, tmp_path):
    short_fit(digits, epochs=None, steps=6, out=tmp_path / "part")
    short_fit(digits, epochs=None, steps=11, out=tmp_path / "part", resume=True)
    short_fit(digits, epochs=None, steps=11, out=tmp_path / "whole")
    tensors, _, history = everything(tmp_path / "part")
    others, _, _ = everything(tmp_path / "whole")
    assert all(torch.equal(tensors[name], others[name]) for name in others)
    assert list(history["step"]) == [4, 6, 8, 11]


def test_more_epochs_go_on_with_a_finished_run(digits, tmp_path):
    short_fit(digits, epochs=2, out=tmp_path / "a")
    longer = short_fit(digits, epochs=4, out=tmp_path / "a", resume=True)
    assert list(longer.history["epoch"]) == [1, 2, 3, 4]
    short_fit(digits, epochs=4, out=tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")
    again = short_fit(digits, epochs=4, out=tmp_path / "a", resume=True)
    assert len(again.history) == 4
    with pytest.raises(ValueError, match="larger epochs or steps"):
        short_fit(digits, epochs=3, out=tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "options.batch_size was 32 and is 16"),
        ({"seed": 5}, "options.seed was 0 and is 5"),
        ({"learning_rate": 0.1}, "options.learning_rate was 0.001 and is 0.1"),
        ({"optimizer": torch.optim.SGD}, "options.optimizer was None and is .*SGD"),
        ({"objective": IWAE(3)}, "objective.class_path was 'pyrogen.inference.ELBO' and is 'pyrogen.inference.IWAE'"),
        ({"objective": ELBO(beta=0.5)}, "objective.init_args.beta was 1.0 and is 0.5"),
    ],
)
def test_resuming_with_something_changed_is_refused(change, message, digits, tmp_path):
    short_fit(digits, epochs=1, out=tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        short_fit(digits, out=tmp_path / "run", resume=True, **change)
    assert contents(tmp_path) == before


def test_resuming_with_other_rows_or_another_model_is_refused(digits, tmp_path):
    x = digits.validation
    short_fit(x, epochs=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"data.rows was 30 and is 20|observations was 30 and is 20"):
        short_fit(x[:20], epochs=2, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"data.fingerprint was '\w+' and is '\w+'"):
        short_fit(x.flip(-1), epochs=2, out=tmp_path / "run", resume=True)
    model = LatentVariableModel(StandardNormal(3), Bernoulli(MLP(3, (1, 8, 8))))
    again: dict[str, Any] = {"epochs": 2, "resume": True, "progress": False}
    with pytest.raises(ValueError, match=r"written by a fit that differs: model\.init_args\.prior"):
        fit(model, AmortizedGuide(model, MLP((1, 8, 8), 8)), ELBO(), x, batch_size=32, out=tmp_path / "run", **again)


def contents(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("begun", [False, True])
def test_resume_says_where_there_is_nothing_to_go_on_from(begun, digits, tmp_path, caplog):
    out = tmp_path / "run"
    if begun:
        out.mkdir()
        (out / "run.yaml").write_text("")
    said = [f"{out} holds no checkpoint to go on from, so training begins anew"]
    assert len(short_fit(digits, epochs=1, out=out, resume=True).history) == 1
    assert [record.getMessage() for record in caplog.records] == said
    short_fit(digits, epochs=2, out=out, resume=True)
    short_fit(digits, epochs=1, out=tmp_path / "other")
    assert [record.getMessage() for record in caplog.records] == said


def test_resume_wins_over_overwrite_and_says_how_to_begin_anew(digits, tmp_path):
    begun = short_fit(digits, epochs=1, out=tmp_path / "run").history["seconds"][0]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="begin anew without resume, with overwrite=True, or go on all the same"):
        short_fit(digits, out=tmp_path / "run", resume=True, overwrite=True, seed=5)
    assert contents(tmp_path) == before
    run = short_fit(digits, epochs=2, out=tmp_path / "run", resume=True, overwrite=True)
    assert len(run.history) == 2 and run.history["seconds"][0] == begun


@pytest.mark.parametrize("out", [3, b"bytes", "a\0b", ["run"]])
def test_an_output_folder_is_a_text_or_a_path(out, digits):
    with pytest.raises(ValueError, match=r"^out must be a text or a path or None, got "):
        short_fit(digits, out=out)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(damage, digits, tmp_path):
    short_fit(digits, epochs=1, out=tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    data = {
        "truncated": path.read_bytes()[:-100],
        "garbage": b"\x00garbage" * 50,
        "empty": b"",
        "other": (tmp_path / "run" / "weights.safetensors").read_bytes(),
    }[damage]
    path.write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors"):
        short_fit(digits, out=tmp_path / "run", resume=True)
    assert contents(tmp_path) == before


def test_an_output_folder_is_never_overwritten_unasked(digits, tmp_path):
    short_fit(digits, epochs=1, out=tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        short_fit(digits, out=tmp_path / "run")
    assert contents(tmp_path) == before
    for bad in ({"device": "abacus"}, {"epochs": 0}, {"optimizer": lambda parameters, lr: parameters["nonsense"]}):
        with pytest.raises((ValueError, TypeError)):
            short_fit(digits, out=tmp_path / "run", overwrite=True, **bad)
        with pytest.raises(ValueError, match="the data lie outside"):
            short_fit(torch.full((8, 1, 8, 8), 0.5), out=tmp_path / "run", overwrite=True)
        assert contents(tmp_path) == before
    run = short_fit(digits, epochs=2, out=tmp_path / "run", overwrite=True)
    assert len(run.history) == len(pg.load(tmp_path / "run").history) == 2


def test_a_folder_that_no_run_wrote_is_neither_overwritten_nor_resumed(digits, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for option in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match=r"holds no run of pyrogen's"):
            short_fit(digits, out=tmp_path, **option)
    assert contents(tmp_path) == {tmp_path / "thesis.txt": b"years of work"}
    with pytest.raises(OutputExistsError, match="is a file"):
        short_fit(digits, out=tmp_path / "thesis.txt", overwrite=True)


def test_a_run_that_crashed_in_its_first_epoch_can_be_begun_again(digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at(2, patch)
        with pytest.raises(Crash):
            short_fit(digits, out=tmp_path / "run")
    assert len(short_fit(digits, epochs=1, out=tmp_path / "run", resume=True).history) == 1


def test_training_learns_in_place_and_the_history_is_as_documented(digits, tmp_path):
    model, guide = programs()
    seen = []
    objective = ELBO()
    run: Any = fit(
        model,
        guide,
        objective,
        digits,
        epochs=30,
        batch_size=32,
        learning_rate=1e-2,
        validate_every=4,
        callbacks=[lambda run: seen.append(len(run.history))],
        progress=False,
        out=tmp_path / "run",
    )
    assert run.__class__.__name__ == Run.__name__ and run.model is model and run.guide is guide
    assert objective.step == 0 and objective.observations is None  # the caller's objective stays as it was
    assert seen == list(range(1, 31))
    history = run.history
    assert list(history.columns) == COLUMNS
    assert list(history["epoch"]) == seen and list(history["step"]) == [4 * n for n in seen]
    # 100 random binary digits cost 64 log 2 = 44.4 nats at logits of 0, and about 0.1 nats a pixel more at N(0, 1).
    assert 40 < history["loss"].iloc[0] < 55 and history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]
    torch.testing.assert_close(
        torch.tensor(history["loss"]), torch.tensor(history["distortion"] + history["rate"]), rtol=1e-5, atol=1e-4
    )
    assert list(history["epoch"][history["validation"].notna()]) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert -50 < history["validation"].iloc[-1] < -15
    assert not model.training and not guide.training
    pd.testing.assert_frame_equal(pg.load(tmp_path / "run").history, history, check_exact=True)
    logged = pd.read_csv(tmp_path / "run" / "history.csv")
    pd.testing.assert_frame_equal(logged, history, rtol=1e-9)
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents.*"))


def test_the_validation_bound_is_the_objectives_own(digits):
    """At fixed weights: the mean over the validation rows of IWAE's bound, from the seed."""
    model, guide = programs()
    run = fit(
        model,
        guide,
        IWAE(500),
        digits,
        epochs=1,
        batch_size=100,
        learning_rate=1e-9,
        progress=False,
    )
    with torch.no_grad():
        objective = IWAE(500)(model, guide)
        torch.manual_seed(0)
        # 1000 rows at a time, copies counted: the same draws as in training, so the same number.
        bounds = torch.cat([objective.bound(x.float()) for x in digits.validation.split(2)])
    assert run.history["validation"].iloc[-1] == pytest.approx(float(bounds.mean()), rel=1e-6)


def test_steps_may_be_fewer_than_an_epoch_and_the_last_batch_may_be_partial(digits):
    run = short_fit(digits, epochs=None, steps=2)
    assert list(run.history["step"]) == [2] and run.history["validation"].notna().all()
    sizes = []
    x = digits.validation.float()

    def model(x):
        sizes.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 64), 1.0).to_event(1), obs=x.flatten(1))

    guide = AmortizedGuide(model, nn.Flatten(), example=x[:2])
    sizes.clear()
    fit(model, guide, ELBO(), x, epochs=1, batch_size=16, progress=False)
    assert sizes[-2:] == [16, 14]


def test_patience_stops_and_keeps_the_best_weights(digits):
    """With an absurd learning rate the bound falls sooner or later."""
    saved = {}

    def keep(run):
        saved[len(run.history)] = {name: value.clone() for name, value in run.programs.state_dict().items()}

    run = short_fit(digits, epochs=60, learning_rate=0.3, patience=2, callbacks=[keep])
    best = int(run.history["validation"].idxmax()) + 1
    assert len(run.history) == best + 2 < 60
    for name, value in run.programs.state_dict().items():
        assert torch.equal(value, saved[best][name])


def test_any_callback_can_stop_and_all_are_called(digits):
    calls = []

    def stop(run):
        calls.append("a")
        return True

    callbacks = [stop, lambda run: calls.append("b")]
    assert len(short_fit(digits, callbacks=callbacks).history) == 1
    assert calls == ["a", "b"]


def test_what_callbacks_draw_changes_nothing(digits):
    quiet, noisy = short_fit(digits), short_fit(digits, callbacks=[lambda run: print(end=str(torch.rand(3))[:0])])
    assert all(map(torch.equal, quiet.programs.state_dict().values(), noisy.programs.state_dict().values()))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", lambda share: 1 / (1 + share)])
def test_schedules_give_the_learning_rate_of_the_epochs_last_step(schedule, digits):
    run = short_fit(digits, schedule=schedule, learning_rate=1e-3)
    shares = [3 / 16, 7 / 16, 11 / 16, 15 / 16]
    factors = {
        "constant": [1.0] * 4,
        "linear": [13 / 16, 9 / 16, 5 / 16, 1 / 16],
        "cosine": [0.91573480615, 0.59754516100, 0.22221488349, 0.00960735979],  # (1 + cos πs) / 2
    }
    expected = factors[schedule] if isinstance(schedule, str) else [1 / (1 + share) for share in shares]
    assert list(run.history["learning_rate"]) == pytest.approx([1e-3 * factor for factor in expected], rel=1e-9)


def test_gradients_are_clipped(digits):
    model, guide = programs()
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    fit(
        model,
        guide,
        ELBO(),
        digits,
        steps=1,
        learning_rate=1.0,
        optimizer=torch.optim.SGD,
        gradient_clip=0.25,
        progress=False,
    )
    moved = zip((*model.parameters(), *guide.parameters()), before, strict=True)
    assert float(sum((p.detach() - old).square().sum() for p, old in moved).sqrt()) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-mixed", torch.float32)])
def test_precisions_run_on_the_cpu(precision, dtype, digits, tmp_path):
    run = short_fit(digits, precision=precision, out=tmp_path / "run")
    assert {p.dtype for p in run.programs.parameters()} == {dtype}
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    loaded = pg.load(tmp_path / "run")
    x = digits.validation[:4].to(dtype)
    bounds = []
    for each in (run, loaded):
        torch.manual_seed(0)
        with torch.no_grad():
            bounds.append(ELBO()(each.model, each.guide).bound(x))
    assert torch.equal(*bounds)


def test_data_take_the_models_precision(digits):
    model = ProbabilisticPCA(2, 5)
    guide = AmortizedGuide(model, nn.Identity(), Normal)
    run = fit(model, guide, ELBO(), torch.randn(20, 5, dtype=torch.float64), epochs=1, progress=False)
    assert next(run.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("bad", [{"device": "abacus"}, {"device": "cpu:x"}, {"precision": "3-true"}, {"device": 3}])
def test_unknown_devices_and_precisions_are_refused(bad, digits):
    with pytest.raises(ValueError, match=r"device=|device must|precision="):
        short_fit(digits, **bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_clear_error(digits):
    with pytest.raises(ValueError, match="device='cuda'"):
        short_fit(digits, device="cuda")


def test_the_progress_bar_shows_the_time_left(digits, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "200")
    short_fit(digits, progress=True)
    assert re.search(r"fit .*16/16 .*left \d:\d\d:\d\d.* loss \d+\.\d\d", screen.getvalue())


def test_nothing_is_printed_without_progress(digits, capfd, tmp_path):
    short_fit(digits, out=tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_the_random_state_of_the_caller_is_given_back(digits, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model, guide = programs()
    fit(model, guide, ELBO(), digits, epochs=1, progress=False)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(3)
    crash_at(2, monkeypatch)
    with pytest.raises(Crash):
        fit(model, guide, ELBO(), digits, epochs=1, batch_size=32, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert not model.training


def test_the_seed_alone_decides(digits):
    torch.manual_seed(1)
    first = short_fit(digits, seed=4)
    torch.manual_seed(2)
    second, other = short_fit(digits, seed=4), short_fit(digits, seed=5)
    states = [run.programs.state_dict() for run in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][n], states[2][n]) for n, p in first.programs.named_parameters())


def test_losses_are_looked_at_now_and_then_where_a_look_costs_time(digits, monkeypatch, traced_only):
    """As on a GPU: the training is the same, the first loss of an epoch is looked at, and at its end none is unseen."""
    known = short_fit(digits)
    looks = []
    original = loop.Training._look

    def looking(self, *arguments):
        looks.append([each.step for each in self.unseen])
        original(self, *arguments)

    monkeypatch.setattr(loop.Training, "_look", looking)
    monkeypatch.setattr(loop, "LOOK_EVERY", {})
    monkeypatch.setattr(loop, "LOOK_ELSEWHERE", 3)
    run = short_fit(digits)
    assert looks == [[0], [1, 2, 3], [4], [5, 6, 7], [8], [9, 10, 11], [12], [13, 14, 15]]
    for name, value in known.programs.state_dict().items():
        assert torch.equal(value, run.programs.state_dict()[name]), name
    monkeypatch.setattr(loop, "PAYS_FROM", -1.0)
    monkeypatch.setattr(loop, "TIMED", 5)
    traced = short_fit(digits, compile="auto")
    assert traced.compile_seconds > 0


@pytest.mark.parametrize(("every", "origin"), [(1, "log-likelihood of the observed site"), (3, "its figures distor")])
def test_a_loss_seen_late_is_named_by_its_step(every, origin, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": every})
    original = loop.Training._gradients

    def spoiled(self, batch):
        with torch.no_grad():  # as the sixth step, the second of the second epoch, finds it
            for parameter in self.run.model.parameters():
                parameter.mul_(torch.nan if self.step == 5 else 1.0)
        return original(self, batch)

    monkeypatch.setattr(loop.Training, "_gradients", spoiled)
    with pytest.raises(
        NonFiniteLoss, match=rf"the loss is nan at step 6 \(epoch 2\); it began at .*{origin}"
    ) as raised:
        short_fit(digits, out=tmp_path / "run")
    assert ("device='cpu' names the site" in str(raised.value)) == (every > 1)
    assert ("for the step before made" in str(raised.value)) == (every == 1)
    assert pg.load(tmp_path / "run").history["epoch"].tolist() == [1]  # nothing was written after it


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_matrix_products_is_that_of_the_fit_alone(precision, digits):
    before = torch.get_float32_matmul_precision()
    seen = []
    callbacks = [lambda run: seen.append(torch.get_float32_matmul_precision())]
    run = short_fit(digits, epochs=1, callbacks=callbacks, matmul_precision=precision)
    assert seen == [precision] and run.options.matmul_precision == precision
    with pytest.raises(ZeroDivisionError):
        short_fit(digits, epochs=1, callbacks=[lambda run: 1 / 0], matmul_precision=precision)
    assert torch.get_float32_matmul_precision() == before


class Rows(torch.utils.data.Dataset):
    """A data set of the digits."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_data_set_read_by_other_processes_gives_the_same_run(digits, tmp_path):
    x = digits.validation
    tensors, whole, read = (
        short_fit(data, epochs=2, loader_workers=workers) for data, workers in ((x, 0), (Rows(x), 0), (Rows(x), 2))
    )
    for other in (whole, read):
        assert all(map(torch.equal, tensors.programs.state_dict().values(), other.programs.state_dict().values()))
    short_fit(Rows(x), epochs=1, out=tmp_path / "run")
    short_fit(Rows(x), epochs=2, out=tmp_path / "run", resume=True, loader_workers=1)
    assert pg.load(tmp_path / "run").options.loader_workers == 1


class Poisoned(nn.Module):
    """A conditional distribution whose location turns to NaN at the n-th training call."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner = inner
        self.calls = calls
        self.count = 0

    def forward(self, context=None):
        self.count += self.training
        q = self.inner(context)
        if self.training and self.count == self.calls:
            loc = torch.full(q.batch_shape + q.event_shape, torch.nan)
            return dist.Normal(loc, 1.0).to_event(len(q.event_shape))
        return q


@pytest.mark.parametrize("place", ["likelihood", "guide", "prior"])
def test_a_nan_loss_stops_names_its_site_and_leaves_the_checkpoint(place, tmp_path):
    x = torch.randn(64, 5)

    def build(calls) -> Any:
        def poisoned(part, where):
            return Poisoned(part, calls) if place == where else part

        torch.manual_seed(0)
        model = LatentVariableModel(
            poisoned(StandardNormal(2), "prior"), poisoned(NormalLikelihood(MLP(2, 5)), "likelihood")
        )
        guide = AmortizedGuide(model, MLP(5, 8))
        guide.conditionals["z"] = poisoned(guide.conditionals["z"], "guide")
        return model, guide

    sites = {"likelihood": "observed site 'x'", "guide": "guide's site 'z'", "prior": "latent site 'z'"}
    poisoned_model, poisoned_guide = build(10)
    options: dict[str, Any] = {"epochs": 4, "batch_size": 16, "progress": False, "out": tmp_path / "run"}
    with pytest.raises(
        NonFiniteLoss, match=rf"at step 10 \(epoch 3\); it began at .*{sites[place]}.*the last checkpoint"
    ) as error:
        fit(poisoned_model, poisoned_guide, ELBO(), x, **options)
    assert str(tmp_path / "run" / CHECKPOINT) in str(error.value)
    model, guide = build(0)
    loaded = pg.load(tmp_path / "run", model=model, guide=guide)
    assert all(torch.isfinite(p).all() for p in loaded.programs.parameters()) and len(loaded.history) == 2


@pytest.mark.parametrize("every", [1, 3])
def test_after_a_divergence_programs_have_weights_that_can_be_used(every, digits, monkeypatch, tmp_path):
    """Those of the last start of an epoch, not those to which a step of enormous size led."""
    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": every})
    model, guide = programs()
    options: dict[str, Any] = {"batch_size": 32, "progress": False, "out": tmp_path / "run"}

    def wild(share):  # from the second step of the second epoch on, of four
        return 1e30 if share > 0.3 else 1.0

    with pytest.raises(NonFiniteLoss, match=r"\(epoch 2\); .* model and guide have their weights of step 4 again"):
        fit(model, guide, ELBO(), digits, epochs=4, schedule=wild, **options)
    found = {name: value for part in (model, guide) for name, value in part.state_dict().items()}
    other, its_guide = programs()
    fit(other, its_guide, ELBO(), digits, epochs=1, **options | {"out": None})
    known = {name: value for part in (other, its_guide) for name, value in part.state_dict().items()}
    weights = [name for name in found if "running" not in name and "batches" not in name]  # the step's own were kept
    assert weights and all(torch.equal(found[name], known[name]) for name in weights)
    assert torch.isfinite(pg.evaluation.log_likelihood(model, guide, digits.test, particles=2)).all()
    with pytest.warns(UserWarning, match="options.schedule"):
        again = fit(model, guide, ELBO(), digits, epochs=4, **options, resume="anyway")
    assert len(again.history) == 4


def test_weights_that_are_not_finite_are_named_before_any_training(digits):
    model, guide = programs()
    with torch.no_grad():
        guide.encoder[1].bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"the weights 'encoder\.1\.bias' of model or guide are NaN or infinite"):
        fit(model, guide, ELBO(), digits, epochs=1, progress=False)


def test_a_run_goes_on_after_a_nan(digits, tmp_path, monkeypatch):
    """The same as without the mishap, once its cause is gone."""
    with monkeypatch.context() as patch:
        count = iter(range(100))
        original = ELBO.loss_of
        patch.setattr(
            ELBO, "loss_of", lambda self, terms: original(self, terms) * (1 if next(count) < 9 else torch.nan)
        )
        with pytest.raises(NonFiniteLoss, match="it began at the objective itself"):
            short_fit(digits, out=tmp_path / "part")
    short_fit(digits, out=tmp_path / "part", resume=True)
    short_fit(digits, out=tmp_path / "whole")
    assert_same(tmp_path / "part", tmp_path / "whole")


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize("clip", [None, 1.0])
def test_weights_that_a_gradient_spoiled_are_never_kept(clip, digits, tmp_path, monkeypatch):
    original, steps = ELBO.loss_of, iter(range(100))

    def loss_of(self, terms):
        loss = original(self, terms)
        return BadGradient.apply(loss) if next(steps) == 8 else loss  # after a check, the last step of the second epoch

    monkeypatch.setattr(ELBO, "loss_of", loss_of)
    with pytest.raises(NonFiniteLoss, match="spoiled weights"):
        short_fit(digits, out=tmp_path / "run", gradient_clip=clip)
    loaded = pg.load(tmp_path / "run")
    assert len(loaded.history) == 1 and all(torch.isfinite(p).all() for p in loaded.programs.parameters())


def test_plain_functions_train_with_their_modules_parameters_and_buffers(digits, tmp_path):
    def build():
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))
        encoder = nn.Linear(64, 4)

        def model(x):
            pyro.module("decoder", decoder)
            scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x.flatten(1))

        def guide(x):
            pyro.module("encoder", encoder)
            shift = pyro.param("shift", torch.zeros(2))
            loc, raw = encoder(x.flatten(1)).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc + shift, raw.exp()).to_event(1))

        return model, guide, decoder

    model, guide, decoder = build()
    out = tmp_path / "run"
    run = fit(model, guide, ELBO(), digits, epochs=4, batch_size=32, learning_rate=1e-2, progress=False, out=out)
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert int(decoder[1].num_batches_tracked) == 16
    names = run.programs.state_dict()
    assert not torch.equal(names["model.scale"], torch.zeros(2)) and not torch.equal(
        names["guide.shift"], torch.zeros(2)
    )
    assert not pyro.get_param_store().keys()
    other_model, other_guide, other_decoder = build()
    loaded = pg.load(out, model=other_model, guide=other_guide)
    assert torch.equal(other_decoder[1].running_mean, decoder[1].running_mean)
    x = digits.test.float()
    bounds = []
    for each in (run, loaded):
        torch.manual_seed(0)
        with torch.no_grad():
            bounds.append(ELBO()(each.model, each.guide).bound(x))
    assert torch.equal(*bounds)


def test_two_fits_in_one_process_share_no_parameters_by_name():
    def build(scale):
        def model(x):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, scale), obs=x)

        return model

    pyro.param("loc", torch.tensor(7.0))
    try:
        options: dict[str, Any] = {"epochs": 60, "batch_size": 50, "learning_rate": 0.1, "progress": False}
        first: Any = fit(build(1.0), None, ELBO(), torch.randn(200) + 3, **options)
        second: Any = fit(build(1.0), None, ELBO(), torch.randn(200) - 3, **options)
        # The mean of 200 draws has standard error 0.07; the last steps of Adam move by at most 0.1.
        assert first.model.loc.item() == pytest.approx(3, abs=0.5)
        assert second.model.loc.item() == pytest.approx(-3, abs=0.5)
        assert pyro.param("loc").item() == 7
    finally:
        pyro.clear_param_store()


def test_a_model_is_fitted_again_and_with_another_guide(digits):
    model, guide = programs()
    fit(model, guide, ELBO(), digits, epochs=1, progress=False, precision="64-true")
    fit(model, guide, ELBO(), digits, epochs=1, progress=False)
    assert next(model.parameters()).dtype == torch.float64
    model.float()
    fit(model, AmortizedGuide(model, MLP((1, 8, 8), 8), Flow), ELBO(), digits, epochs=1, progress=False)
    other = LatentVariableModel(StandardNormal(2), model.likelihood)
    with pytest.raises(ValueError, match="no guide for them"):
        fit(other, None, ELBO(), digits, epochs=1, progress=False)


def test_flows_train_with_particles(digits):
    model, _ = programs()
    guide = AmortizedGuide(model, MLP((1, 8, 8), 8), functools.partial(Flow, layers=1))
    run = fit(model, guide, ELBO(4), digits, epochs=3, learning_rate=1e-2, batch_size=20, progress=False)
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"epochs": None}, "either epochs or steps"),
        ({"steps": 3}, "either epochs or steps"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"schedule": "exponential"}, "schedule is 'constant'"),
        ({"optimizer": "adam"}, "optimizer is a callable"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"resume": True}, "resume needs out="),
        ({"configuration": {}}, "configuration is written to out="),
        ({"loader_workers": -1}, "loader_workers must be a whole number of at least 0"),
        ({"matmul_precision": "low"}, "matmul_precision is 'highest', 'high' or 'medium'"),
    ],
)
def test_options_that_do_not_fit_are_refused(bad, message, digits):
    with pytest.raises(ValueError, match=message):
        short_fit(digits, **bad)


def test_frozen_parameters_stay_as_they_are(digits):
    model, guide = programs()
    before = {name: p.clone() for name, p in model.requires_grad_(False).named_parameters()}
    fit(model, guide, ELBO(), digits, epochs=1, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad
    assert all(p.requires_grad for p in guide.parameters())


def test_patience_needs_validation_data_and_an_objective_must_be_ours(digits):
    with pytest.raises(ValueError, match="patience needs validation data"):
        short_fit(digits.validation, patience=2)
    with pytest.raises(TypeError, match="expected an objective"):
        short_fit(digits, objective=pyro.infer.Trace_ELBO())
    model, guide = programs()
    wrong: Any = (
        (LatentVariableModel, guide, ELBO(), r"model is the class .* as LatentVariableModel\(prior, likelihood\)"),
        (model, AmortizedGuide, ELBO(), r"guide is the class .* give an object of it, as AmortizedGuide\(model, enc"),
        (model, guide, ELBO, r"objective is the class ELBO; give an object of it, as ELBO\(\)"),
        (dict, guide, ELBO(), "model is the class dict; give an object of it"),
    )
    for one, other, objective, expected in wrong:
        with pytest.raises(TypeError, match=expected):
            fit(one, other, objective, digits, epochs=1, progress=False)
    with pytest.raises(TypeError, match="guide is the class AmortizedGuide"):
        pg.evaluation.log_likelihood(model, AmortizedGuide, digits.test)
    with pytest.raises(ValueError, match=r"optimizer LBFGS needs a closure, .* such as torch\.optim\.Adam"):
        short_fit(digits, optimizer=torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"optimizer gives a NoneType; .* such as torch\.optim\.Adam"):
        short_fit(digits, optimizer=lambda parameters, lr: None)
    frozen = ProbabilisticPCA(2, 5).requires_grad_(False)
    with pytest.raises(ValueError, match="has a parameter to train"):
        fit(frozen, AmortizedGuide(frozen, nn.Identity()).requires_grad_(False), ELBO(), torch.randn(9, 5), epochs=1)

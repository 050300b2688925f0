"""How critics are trained beside the program: their watch, warm-up, own steps, rates and betas; averaged weights."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.distributions import Delta, Implicit
from pyrogen.inference import AVB, ELBO, GAN, AmortizedGuide, CriticOptions
from pyrogen.inference.loop import Training
from pyrogen.inference.ratios import Logistic
from pyrogen.inference.watch import CriticWatch
from pyrogen.networks import Critic

SMALL = partial(Critic, hidden=(4,))
ROWS = 6
RATE = 1e-2


def silently(watch, accuracy, steps, **options):
    """One look, with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look({"loss": 1.0, "accuracy_z": accuracy}, steps, **options)


STATES = {
    "saturated": (0.995, "critic of 'z' has been saturated for 1000"),
    "at chance": (0.505, "'z' has been at chance"),
}


@pytest.mark.parametrize(("accuracy", "message"), STATES.values(), ids=STATES.keys())
def test_the_watch_warns_once_after_a_thousand_steps(accuracy, message):
    watch = CriticWatch()
    silently(watch, accuracy, 600)
    silently(watch, accuracy, 399)
    with pytest.warns(UserWarning, match=message) as caught:
        watch.look({"loss": 1.0, "accuracy_z": accuracy}, 1)
    assert len(caught) == 1
    silently(watch, accuracy, 5000)


@pytest.mark.parametrize("accuracy", [0.505, 0.995])
@pytest.mark.parametrize("between", [0.52, 0.98])
def test_the_count_restarts_when_the_accuracy_comes_back(accuracy, between):
    watch = CriticWatch()
    silently(watch, accuracy, 999)
    silently(watch, between, 1)
    silently(watch, accuracy, 999)
    with pytest.warns(UserWarning, match="for 1000 steps"):
        watch.look({"accuracy_z": accuracy}, 1)


def test_the_watch_counts_each_critic_and_each_state_apart():
    watch = CriticWatch()
    silently(watch, 0.995, 600)
    silently(watch, 0.505, 600)
    with pytest.warns(UserWarning, match="critic of 'y' has been saturated"):
        watch.look({"accuracy_z": 0.6, "accuracy_y": 1.0}, 1000)
    with pytest.warns(UserWarning, match="critic of 'z' has been saturated"):
        watch.look({"accuracy_z": 1.0, "accuracy_y": 1.0}, 1000)
    with pytest.warns(UserWarning, match="critic of 'z' has been at chance"):
        watch.look({"accuracy_z": 0.5}, 1000)


def test_a_critic_that_settles_at_chance_may():
    watch = CriticWatch()
    silently(watch, 0.5, 2000, settling={"z"})
    with pytest.warns(UserWarning, match="saturated"):
        watch.look({"accuracy_z": 1.0}, 1000, {"z"})
    with pytest.warns(UserWarning, match="at chance"):
        watch.look({"accuracy_y": 0.5}, 1000, {"z"})


def test_the_watch_goes_on_from_its_state():
    watch = CriticWatch()
    silently(watch, 0.995, 999)
    again = CriticWatch(**watch.state())
    with pytest.warns(UserWarning, match="saturated for 1000 steps"):
        again.look({"accuracy_z": 0.995}, 1)
    assert again == CriticWatch(**again.state()) != watch
    silently(CriticWatch(**again.state()), 0.995, 1000)


class Model(PyroModule):
    """z ~ N(location, 1), x ~ N(W z, 1)."""

    def __init__(self):
        super().__init__()
        self.location = nn.Parameter(torch.zeros(2))
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.location, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 1.0).to_event(1), obs=x)


class Generator(PyroModule):
    """x = W z, z ~ N(0, I)."""

    def __init__(self):
        super().__init__()
        self.likelihood = Implicit(3, context=2, noise=0, network=nn.Linear(2, 3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)


class Sure(Logistic):
    """A critic that is always right, or is said to be."""

    def _accuracy(self, t1, t0):
        return torch.ones(())


def flat(parameters):
    return torch.cat([torch.zeros(0), *(p.detach().flatten() for p in parameters)])


class Recorded:
    """A fit of one step an epoch, with the weights after each step and what did the training."""

    def __init__(self, monkeypatch, objective, steps, *, family=Implicit, data=None, model=Model, **options):
        trainings = []

        class Kept(Training):
            def __init__(self, *args):
                super().__init__(*args)
                trainings.append(self)

        monkeypatch.setattr("pyrogen.inference.training.Training", Kept)
        torch.manual_seed(3)
        program = model()
        guide = None if model is Generator else AmortizedGuide(program, nn.Linear(3, 4), family)
        data = torch.randn(ROWS, 3) if data is None else data
        objective.prepare(program, guide, torch.zeros(2, 3))
        self.program, self.critics = [self.weights(program, guide)], [flat([*objective.critics.parameters()])]
        self.run = pg.fit(
            program, guide, objective, data, steps=steps, batch_size=ROWS, learning_rate=RATE, progress=False,
            callbacks=[self.note], **options,
        )  # fmt: skip
        (self.training,) = trainings
        self.end = self.weights(self.run.model, self.run.guide)

    @staticmethod
    def weights(model, guide):
        return flat([*model.parameters(), *(guide.parameters() if guide is not None else ())])

    def note(self, run):
        self.program.append(self.weights(run.model, run.guide))
        self.critics.append(flat(run.objective.critics.parameters()))


def avb():
    return AVB(2, critic=SMALL)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_program_waits_until_the_warmup_is_over(warmup, monkeypatch):
    fit = Recorded(monkeypatch, avb(), 5, critic=CriticOptions(warmup=warmup, steps=2))
    for step in range(1, 6):
        assert torch.equal(fit.program[step], fit.program[step - 1]) == (step <= warmup)
        assert not torch.equal(fit.critics[step], fit.critics[step - 1])
    assert taken(fit, "program") == 5 - warmup and taken(fit, "critic") == 10


def test_the_first_step_after_the_warmup_is_adams_first(monkeypatch):
    """Its size is the learning rate wherever there is a gradient: no moments were gathered before."""
    fit = Recorded(monkeypatch, avb(), 4, critic=CriticOptions(warmup=3))
    assert is_a_first_step(fit.program[4] - fit.program[3], RATE)


def is_a_first_step(moved, rate):
    """Whether sizes are the rate: they are less only where a gradient is as small as Adam's ε, in a few places."""
    size = moved.abs()
    return size.max() < 1.01 * rate and size.median() > 0.99 * rate


def taken(fit, kind):
    """The number of steps that an optimizer has taken with every one of its parameters."""
    (count,) = {int(state["step"]) for state in fit.training.optimizers[kind].state.values()}
    return count


STEPS = {
    "as by default": (avb, Model, None, 1),
    "as given": (avb, Model, 3, 3),
    "as a Wasserstein critic's": (partial(GAN, "wasserstein-gp", critic=SMALL), Generator, None, 5),
    "given to a Wasserstein critic": (partial(GAN, "wasserstein-gp", critic=SMALL), Generator, 2, 2),
}


@pytest.mark.parametrize(("make", "model", "given", "steps"), STEPS.values(), ids=STEPS.keys())
def test_critics_take_as_many_steps(make, model, given, steps, monkeypatch):
    fit = Recorded(monkeypatch, make(), 4, model=model, critic=CriticOptions(steps=given))
    assert taken(fit, "critic") == 4 * steps
    assert taken(fit, "program") == 4


@pytest.mark.parametrize("rate", [None, 3e-3])
def test_the_learning_rate_of_critics(rate, monkeypatch):
    fit = Recorded(monkeypatch, avb(), 4, critic=CriticOptions(learning_rate=rate), schedule="linear")
    assert is_a_first_step(fit.critics[1] - fit.critics[0], rate or RATE)
    assert is_a_first_step(fit.program[1] - fit.program[0], RATE)
    found = {kind: optimizer.param_groups[0]["lr"] for kind, optimizer in fit.training.optimizers.items()}
    assert found == pytest.approx({"program": RATE / 4, "critic": (rate or RATE) / 4})  # of the last of four steps


def test_the_betas_of_critics(monkeypatch):
    for options, expected in ((None, (0.5, 0.999)), (CriticOptions(betas=(0.3, 0.9)), (0.3, 0.9))):
        fit = Recorded(monkeypatch, avb(), 1, critic=options)
        assert fit.training.optimizers["critic"].param_groups[0]["betas"] == expected
        assert fit.training.optimizers["program"].param_groups[0]["betas"] == (0.9, 0.999)


def test_critics_without_moments_go_by_the_sign_of_the_gradient(monkeypatch):
    fit = Recorded(monkeypatch, avb(), 5, critic=CriticOptions(betas=(0.0, 0.0)))
    assert all(is_a_first_step(fit.critics[step + 1] - fit.critics[step], RATE) for step in range(5))
    assert not all(is_a_first_step(fit.program[step + 1] - fit.program[step], RATE) for step in range(5))


DECAY = 0.25
"""So small that six steps see both the faster average of the first two and the decay itself."""


def averages(weights):
    """The moving average after each step, the share that it keeps of itself being (1 + t)/(10 + t) up to the decay."""
    found = [weights[0].double()]
    for step, new in enumerate(weights[1:]):
        kept = min(DECAY, (1 + step) / (10 + step))
        found.append(kept * found[-1] + (1 - kept) * new.double())
    return [each.float() for each in found]


def test_the_run_ends_with_averaged_weights_and_trains_with_its_own(monkeypatch):
    fit, plain = (Recorded(monkeypatch, avb(), 6, average=average) for average in (DECAY, None))
    torch.testing.assert_close(fit.end, averages(fit.program)[-1], rtol=1e-5, atol=1e-6)
    assert (fit.end - fit.program[-1]).abs().max() > 1e-3
    for averaged, own in ((fit.program, plain.program), (fit.critics, plain.critics)):
        assert all(torch.equal(a, b) for a, b in zip(averaged, own, strict=True))
    assert torch.equal(plain.end, plain.program[-1])
    assert torch.equal(flat(fit.run.objective.critics.parameters()), fit.critics[-1])


def split():
    x = torch.randn(3 * ROWS, 3)
    return Data("made", train=x[:ROWS], validation=x[ROWS : 2 * ROWS], test=x[2 * ROWS :], values="real")


def bound(fit, weights, x):
    """log p(x, z) at the point mass that the guide has for z, with these weights in place of those of the run."""
    model, guide = fit.run.model, fit.run.guide
    torch.nn.utils.vector_to_parameters(weights, [*model.parameters(), *guide.parameters()])
    with torch.no_grad():
        z = guide.conditionals["z"](guide.encoder(x)).v
        log_p = dist.Normal(z @ model.weight, 1.0).log_prob(x).sum(-1)
        return float((log_p + dist.Normal(model.location, 1.0).log_prob(z).sum(-1)).mean())


@pytest.mark.parametrize("average", [DECAY, None])
def test_averaged_weights_are_validated(average, monkeypatch):
    data = split()
    fit = Recorded(monkeypatch, ELBO(), 6, family=Delta, data=data, average=average)
    used = averages(fit.program) if average else fit.program
    for found, weights in zip(fit.run.history["validation"], used[1:], strict=True):
        assert found == pytest.approx(bound(fit, weights, data.validation), abs=1e-5)
    last = [bound(fit, weights[-1], data.validation) for weights in (averages(fit.program), fit.program)]
    assert abs(last[0] - last[1]) > 1e-3


def test_patience_keeps_the_averaged_weights_of_the_best_epoch(monkeypatch):
    """A schedule that turns round half way makes the bound fall again."""
    fit = Recorded(
        monkeypatch, ELBO(), 20, family=Delta, data=split(), average=DECAY, patience=2,
        schedule=lambda share: 1.0 if share < 0.3 else -3.0,
    )  # fmt: skip
    validation = fit.run.history["validation"]
    best = int(validation.argmax()) + 1
    assert best == len(validation) - 2 < 18
    torch.testing.assert_close(fit.end, averages(fit.program)[best], rtol=1e-5, atol=1e-6)


def sure():
    return AVB(2, critic=SMALL, ratio=Sure)


def test_fit_warns_of_a_saturated_critic(monkeypatch, tmp_path):
    """The count goes on where a run was interrupted."""
    monkeypatch.setattr("pyrogen.inference.watch.LONG", 4)
    Recorded(monkeypatch, sure(), 3, out=tmp_path / "run")
    with pytest.warns(UserWarning, match="critic of 'z' has been saturated for 4 steps"):
        Recorded(monkeypatch, sure(), 4, out=tmp_path / "run", resume=True)

"""Compiled objectives beside the objectives themselves: the same losses and gradients, from the same random numbers."""

import logging
import random
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.inference import (
    AVB,
    ELBO,
    GAN,
    AmortizedGuide,
    CriticOptions,
    DonskerVaradhan,
    LinearSchedule,
    NonFiniteLoss,
    loop,
)
from pyrogen.inference.compilation import MOST, Compiled
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

SMALL = partial(Critic, hidden=(8,))
X = (torch.rand(70, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
STEPS = {"epochs": 3, "batch_size": 16, "progress": False, "learning_rate": 0.01}


def programs(family=Normal, likelihood=Bernoulli, encoder=None):
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), likelihood(MLP(2, 6, (8,))))
    return model, AmortizedGuide(model, encoder or MLP(6, 8, (8,)), family)


def fitted(make, objective, **options):
    model, guide = make()
    return pg.fit(model, guide, objective(), X, **STEPS | options)


def losses(make, objective, **options):
    run = fitted(make, objective, **options)
    return run, run.history["loss"].tolist()


def said(caplog):
    """What the library has logged."""
    return [record.message for record in caplog.records if record.name.startswith("pyrogen")]


def noisy():
    torch.manual_seed(1)
    return programs(encoder=nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.2)))


def functions():
    """Programs that keep their parameters in Pyro's store."""
    decoder = nn.Linear(2, 6)
    encoder = nn.Linear(6, 2)
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *encoder.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))

    def model(x):
        pyro.module("decoder", decoder)
        shift = pyro.param("shift", torch.zeros(6))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z) + shift).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return model, guide


CASES = {
    "autocast": (programs, ELBO, {"precision": "bf16-mixed"}),
    "a schedule from 0": (programs, partial(ELBO, beta=LinearSchedule(8)), {}),
    "dropout and moving averages": (noisy, ELBO, {}),
    "functions with parameters": (functions, ELBO, {}),
    "two optimizers": (partial(programs, Implicit), partial(AVB, 4, critic=SMALL), {}),
    "a ratio with a moving average": (partial(programs, Implicit), partial(AVB, 4, ratio=DonskerVaradhan), {}),
    "steps of critics, and a penalty": (
        lambda: (programs(likelihood=pg.distributions.NormalLikelihood)[0], None),
        partial(GAN, "wasserstein-gp", critic=SMALL),
        {"critic": CriticOptions(steps=3)},
    ),
    "warm-up, averages and clipping": (
        partial(programs, Implicit),
        partial(AVB, 4, critic=SMALL),
        {"critic": CriticOptions(warmup=3), "average": 0.9, "gradient_clip": 0.1},
    ),
    "double precision": (programs, ELBO, {"precision": "64-true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_fit_is_the_fit(case, traced_only, caplog):
    """Of 70 rows in batches of 16, the last of each epoch an incomplete one, which runs as it is."""
    make, objective, options = CASES[case]
    run, known = losses(make, objective, compile=False, **options)
    again, found = losses(make, objective, compile=True, **options)
    assert not said(caplog)
    assert found == pytest.approx(known, rel=1e-4)
    for (name, a), b in zip(run.programs.state_dict().items(), again.programs.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=1e-3, msg=name)
    assert run.objective.step == again.objective.step
    columns = [name for name in run.history if name not in ("seconds", "rows_per_second", "inactive_units")]
    for name in columns:
        assert again.history[name].tolist() == pytest.approx(run.history[name].tolist(), rel=1e-3, nan_ok=True), name


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_fit_is_the_fit(case, recorder, traced_only, caplog):
    make, objective, options = CASES[case]
    options = {"device": recorder.device} | options
    run, known = losses(make, objective, compile=False, **options)
    assert recorder.count == 0
    again, found = losses(make, objective, compile=True, **options)
    assert not said(caplog)
    # Gradients of each kind, and a step by each: of a critic alone there may be others.
    alone = run.options.critic.steps is not None
    assert recorder.count == 2 * (1 + alone) + (len(run.objective.critics) > 0) + (case == "a schedule from 0")
    assert found == pytest.approx(known, rel=1e-4)
    for (name, a), b in zip(run.programs.state_dict().items(), again.programs.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=1e-3, msg=name)
    assert run.objective.step == again.objective.step


def test_figures_of_other_shapes_and_types_are_recorded(recorder, traced_only, caplog):
    class Detailed(ELBO):
        def estimate(self, model, guide, *batch):
            found = super().estimate(model, guide, *batch)
            each = found.terms.log_likelihood.detach().mean(0)
            return replace(
                found, metrics=found.metrics | {"each": each, "rows": torch.tensor(len(each)).to(each.device)}
            )

    module = Detailed()(*programs()).to(recorder.device)
    compiled, x = Compiled(module), X.to(recorder.device)
    for _ in range(4):
        torch.manual_seed(1)
        module(x)
        known = module.latest.metrics
        torch.manual_seed(1)
        compiled.backward(x)
        torch.testing.assert_close(dict(module.latest.metrics), dict(known), rtol=1e-5, atol=1e-6)
    assert recorder.count == 1 and compiled.why_not is None and not said(caplog)


def test_a_recorded_fit_goes_on_bit_for_bit(recorder, traced_only, tmp_path):
    options = STEPS | {"compile": True, "device": recorder.device, "schedule": "cosine", "resume": True}

    def trained(folder, epochs):
        model, guide = programs(Implicit)
        stop = [lambda run: len(run.history) == epochs]
        return pg.fit(model, guide, AVB(4, critic=SMALL), X, out=folder, callbacks=stop, **options | {"epochs": 6})

    whole = trained(tmp_path / "whole", 6)
    assert len(trained(tmp_path / "part", 2).history) == 2
    resumed = trained(tmp_path / "part", 6)
    assert whole.history["loss"].tolist() == resumed.history["loss"].tolist()
    for a, b in zip(whole.programs.parameters(), resumed.programs.parameters(), strict=True):
        assert a.equal(b)


def test_recorded_losses_may_be_differentiated_later(recorder, traced_only):
    """Two losses before their gradients; draws that are fresh and follow the seed; weights in another place."""
    model, guide = programs()
    module = ELBO(beta=LinearSchedule(10))(model, guide).to(recorder.device)
    compiled, x = Compiled(module), X.to(recorder.device)

    def gradients(loss_of):
        module.elbo.step = 0
        module.zero_grad()
        torch.manual_seed(1)
        losses = [loss_of(rows) for rows in (x[:16], x[16:32], x[32:48])]
        (losses[0] + 2 * losses[1] + 3 * losses[2]).backward()
        return [float(loss.detach()) for loss in losses], [p.grad.clone() for p in module.parameters()]

    for _ in range(2):
        known, expected = gradients(module)
        for _ in range(2):
            found, gained = gradients(compiled)
            assert len({*found}) == 3 and found == pytest.approx(known, rel=1e-5)
            torch.testing.assert_close(gained, expected, rtol=1e-4, atol=1e-5)
        for parameter in module.parameters():
            parameter.data = 2 * parameter.data
    assert compiled.why_not is None and recorder.count == 4  # of a weight of 0 and of others, in two places


def test_by_the_compiler(caplog):
    """As above, with TorchInductor itself."""
    caplog.set_level(logging.INFO, "pyrogen")
    _, known = losses(programs, partial(ELBO, beta=LinearSchedule(8)), compile=False)
    run, found = losses(programs, partial(ELBO, beta=LinearSchedule(8)), compile=True)
    assert found == pytest.approx(known, rel=1e-4)
    # One graph for a weight of 0, as at the first step, and one for others.
    assert [" compiled for (16, 6) in " in message for message in said(caplog)] == [True, True]
    assert 0 < run.compile_seconds < run.seconds and f"compiled in {run.compile_seconds:.1f} s)" in repr(run)


def test_equal_gradients_are_clipped_once(traced_only):
    class Twice(nn.Module):
        """A decoder two of whose parameters have the same gradient."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 6, bias=False)
            self.one, self.other = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

        def forward(self, z):
            return self.layer(z) + (self.one + self.other)

    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(Twice()))
    compiled = Compiled(ELBO()(model, AmortizedGuide(model, nn.Linear(6, 4))))
    compiled.backward(X)
    assert compiled.why_not is None
    parameters = [p for p in compiled.module.parameters() if p.grad is not None]
    nn.utils.clip_grad_norm_(parameters, 0.1)
    assert torch.stack([p.grad.norm() for p in parameters]).norm() == pytest.approx(0.1, rel=1e-4)


class Transposed(nn.Module):
    """A decoder whose gradients autograd leaves in another layout, transposed and expanded, than its parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(3))

    def forward(self, z):
        return torch.einsum("oi,bi->ob", self.weight, z).T + self.bias.sum()


@pytest.mark.parametrize("options", [{}, {"gradient_clip": 0.1}], ids=["alone", "clipped"])
def test_gradients_of_other_layouts(options, traced_only, caplog):
    def make():
        torch.manual_seed(0)
        model = LatentVariableModel(StandardNormal(2), Bernoulli(Transposed()))
        return model, AmortizedGuide(model, nn.Linear(6, 4))

    _, known = losses(make, ELBO, compile=False, **options)
    _, found = losses(make, ELBO, compile=True, **options)
    assert not said(caplog)
    assert found == pytest.approx(known, rel=1e-4)


class Averaging(nn.Module):
    """An encoder that puts a new tensor in place of its buffer."""

    mean: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        if self.training:
            self.mean = 0.998 * self.mean + 0.002 * x.mean(0)
        return self.layer(x - self.mean)


class FollowsSteps(ELBO):
    """An objective that reads the number of the step other than by a schedule."""

    def loss_of(self, terms):
        return super().loss_of(terms) * (1.0 + self.step / 10)


@pytest.mark.parametrize("kind", ["buffers", "steps"])
def test_what_changes_in_python_is_not_compiled(kind, traced_only, caplog):
    def make():
        torch.manual_seed(1)
        return programs(encoder=Averaging()) if kind == "buffers" else programs()

    def objective():
        return FollowsSteps() if kind == "steps" else ELBO()

    known, expected = losses(make, objective, compile=False)
    run, found = losses(make, objective, compile=True)
    assert len(said(caplog)) == 1 and ("buffers" if kind == "buffers" else "numbers that change") in said(caplog)[0]
    assert found == expected
    for a, b in zip(known.programs.buffers(), run.programs.buffers(), strict=True):
        assert a.equal(b)


def test_parameters_frozen_on_the_way_stay(traced_only):
    def moved(compile):
        model, guide = programs()
        encoder, seen = guide.encoder, []

        def freeze(run):
            encoder.requires_grad_(False)
            seen.append([p.detach().clone() for p in encoder.parameters()])

        pg.fit(model, guide, ELBO(), X, callbacks=[freeze], compile=compile, **STEPS)
        assert len(seen) > 1
        return any(not a.equal(b) for a, b in zip(seen[0], seen[-1], strict=True))

    assert [moved(False), moved(True)] == [False, False]


def test_parameters_of_no_module_are_not_compiled(traced_only):
    class Plain:
        def __init__(self):
            self.network = nn.Linear(6, 4)

        def __call__(self, x):
            loc, scale = self.network(x).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    guide = Plain()
    compiled = Compiled(ELBO()(programs()[0], guide))
    compiled(X).backward()
    assert "no module" in compiled.why_not and guide.network.weight.grad is not None


def test_layouts_of_batches_and_evaluations(traced_only):
    """A batch of other strides has a graph of its own, and a loss without gradients is no step."""
    compiled = Compiled(ELBO()(*programs()))
    compiled(X)
    compiled(X.T.contiguous().T)
    with torch.no_grad():
        compiled(X)
    assert compiled.why_not is None and len(compiled._graphs) == 2 and compiled.module.elbo.step == 2


def test_draws_are_fresh_and_follow_the_seed(traced_only):
    compiled = Compiled(ELBO()(*programs()))
    first, second = (float(compiled(X).detach()) for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    third = float(compiled(X).detach())
    torch.manual_seed(5)
    assert float(compiled(X).detach()) == third == pytest.approx(float(seeded_loss(5)), rel=1e-5)


def seeded_loss(seed):
    module = ELBO()(*programs())
    torch.manual_seed(seed)
    return module(X).detach()


def test_a_loop_of_ones_own(traced_only):
    """The loss has gradients like any other, also where it is a part of another."""
    found = []
    for wrap in (lambda module: module, Compiled):
        module = ELBO()(*programs())
        loss_of = wrap(module)
        torch.manual_seed(1)
        (3 * loss_of(X) + next(module.parameters()).sum()).backward()
        found.append([p.grad for p in module.parameters()])
        assert module.latest is not None and {*module.latest.metrics} == {"distortion", "rate"}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_weights_modes_and_settings_are_followed(traced_only):
    """New values of parameters, buffers and weights of terms; parameters that are frozen; evaluation mode."""
    model, guide = noisy()
    objective = ELBO()
    module = objective(model, guide)
    compiled = Compiled(module)

    def check():
        losses, gradients = [], []
        for loss_of in (module, compiled):
            torch.manual_seed(1)
            module.zero_grad(set_to_none=True)
            loss = loss_of(X)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append([p.grad for p in module.parameters()])
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)

    module.eval()
    check()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.5)
    check()
    objective.beta = 0.3
    check()
    model.likelihood.requires_grad_(False)
    check()


def test_only_so_many_graphs_are_compiled(traced_only):
    compiled = Compiled(ELBO()(*programs()))
    for rows in range(1, MOST + 4):
        assert compiled(X[:rows]).isfinite()
    assert len(compiled._graphs) == MOST


class Choosy(nn.Module):
    """A model that looks at its data before it says how wide it is."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 6)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = 1.0 if x.mean() > 0 else 2.0
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)


class Capricious(Choosy):
    """One with numbers of its own."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1 + random.random()).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Choosy, "asks in Python for the value of a tensor"), (Capricious, "neither tensors nor drawn by torch")],
)
def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(kind, why, traced_only, caplog):
    def make():
        torch.manual_seed(0)
        random.seed(0)
        model = kind()
        return model, AmortizedGuide(model, nn.Linear(6, 8))

    _, found = losses(make, ELBO, compile=True)
    (message,) = said(caplog)
    assert why in message and "ELBO(particles=1) runs as it is, not compiled" in message
    if kind is Choosy:
        assert found == losses(make, ELBO, compile=False)[1]


def test_without_a_compiler_the_graph_runs_operation_by_operation(monkeypatch, caplog):
    def missing(*_, **__):
        raise RuntimeError("no C++ compiler\n was found")

    monkeypatch.setattr("torch._inductor.compile", missing)
    compiled = Compiled(ELBO()(*programs()))
    torch.manual_seed(2)
    assert float(compiled(X).detach()) == pytest.approx(float(seeded_loss(2)), rel=1e-5)
    assert said(caplog) == [
        "the traced graph runs operation by operation, for it can't be compiled: no C++ compiler was found"
    ]


def test_a_loss_that_is_not_finite_names_where_it_began(traced_only):
    def spoil(run):
        with torch.no_grad():
            next(run.model.parameters()).fill_(torch.nan)

    with pytest.raises(NonFiniteLoss, match="log-likelihood of the observed site 'x'"):
        fitted(programs, ELBO, compile=True, callbacks=[spoil])


def test_a_resumed_compiled_fit_is_bit_for_bit_the_same(traced_only, tmp_path):
    whole = fitted(programs, ELBO, compile=True, out=tmp_path / "whole")
    stopped = fitted(programs, ELBO, compile=True, out=tmp_path / "cut", callbacks=[lambda run: True])
    assert len(stopped.history) == 1
    resumed = fitted(programs, ELBO, compile=True, out=tmp_path / "cut", resume=True)
    for a, b in zip(whole.programs.state_dict().values(), resumed.programs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("pays_from", "expected"), [(0.0, 1), (1e9, 0)])
def test_auto_compiles_what_would_take_long(pays_from, expected, traced_only, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pyrogen")
    monkeypatch.setattr(loop, "PAYS_FROM", pays_from)
    run, found = losses(programs, ELBO, compile="auto", epochs=8)
    assert len(said(caplog)) == expected
    assert found == pytest.approx(losses(programs, ELBO, compile=False, epochs=8)[1], rel=1e-4)
    assert run.options.compile == "auto"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="compile is True, False or 'auto', got 'yes'"):
        fitted(programs, ELBO, compile="yes")


@pytest.mark.filterwarnings("ignore")  # of half precision on a CPU
def test_scaled_losses_are_not_compiled():
    with pytest.raises(ValueError, match="'16-mixed' scales losses outside of what is compiled"):
        fitted(programs, ELBO, compile=True, precision="16-mixed", device="cpu")


def test_functions_in_a_loop_of_ones_own(traced_only, caplog):
    """The modules that they refer to have gradients; parameters of Pyro's store do not come along."""
    compiled = Compiled(ELBO()(*functions()))
    compiled(X)
    assert compiled.why_not is not None and "['scale', 'shift'] stand in Pyro's store alone" in compiled.why_not
    toy, encoder = pg.data.LinearGaussian(), nn.Linear(4, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    compiled = Compiled(ELBO()(toy.model, guide))
    compiled(toy.x[:5]).backward()
    assert compiled.why_not is None and encoder.weight.grad is not None

"""Objectives with critics: critic and program never mix, what masks and batches do, bad input is refused.

That exact ratios give exact gradients is shown in ``test_exact_ratios.py``.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.inference import (
    AAE,
    AVB,
    ELBO,
    GAN,
    IWAE,
    NWJ,
    VGH,
    WAE,
    AlphaGAN,
    AmortizedGuide,
    CriticOptions,
    DonskerVaradhan,
    Hinge,
    Hybrid,
    JensenShannon,
    LeastSquares,
    Logistic,
    Telescoping,
    VGHPlusPlus,
    Wasserstein,
)
from pyrogen.inference.draws import Draws
from pyrogen.inference.terms import frozen
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

SMALL = partial(Critic, hidden=(16,))
SHAPE = (1, 4, 4)
OBJECTIVES = {
    "AVB": partial(AVB, 3, critic=SMALL),
    "AVB, full": partial(AVB, 5, covariance="full", critic=SMALL),
    "AVB, no contrast": partial(AVB, 1, contrast="none", critic=SMALL),
    "AAE": partial(AAE, critic=SMALL),
    "AlphaGAN": partial(AlphaGAN, critic=SMALL),
    "VGH": partial(VGH, critic=SMALL),
    "VGH++": partial(VGHPlusPlus, critic=SMALL),
}


def programs(family=Implicit, prior=None):
    model = LatentVariableModel(prior or StandardNormal(2), Bernoulli(MLP(2, SHAPE, (8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, (8,)), family)


def generator():
    return LatentVariableModel(StandardNormal(2), Implicit(SHAPE, context=2, noise=0, network=MLP(2, SHAPE, (8,))))


def observations():
    return torch.rand(6, *SHAPE).round()


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.usefixtures("parameter_store")
def test_gradients_of_program_and_critics_never_mix(make):
    model, guide = programs()
    objective, x = make(), observations()
    module = objective(model, guide)
    critics = [*objective.critics.parameters()]
    program = [*model.parameters(), *guide.parameters()]
    assert critics
    for part, others in (("critic", program), ("program", critics)):
        torch.manual_seed(3)
        module.zero_grad(set_to_none=True)
        if part == "critic":
            objective.critic_loss(model, guide, x).backward()
        else:
            draws = Draws(model, guide, (x,), objective.particles)
            with frozen(critics):
                loss = objective.of_program(draws).loss
            loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in others)
    module.zero_grad(set_to_none=True)
    module(x).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_svi_and_two_optimizers_take_the_same_step(make, parameter_store):
    results = []
    for how in ("svi", "two optimizers"):
        pyro.clear_param_store()
        torch.manual_seed(4)
        model, guide = programs()
        objective, x = make(), observations()
        objective.prepare(model, guide, x)
        torch.manual_seed(5)
        if how == "svi":
            pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective).step(x)
        else:
            module = objective(model, guide)
            critics = [*objective.critics.parameters()]
            apart = {id(p) for p in critics}
            ours = [p for p in module.parameters() if id(p) not in apart]
            optimizers = [torch.optim.Adam(parameters, lr=1e-2) for parameters in (ours, critics)]
            module(x).backward()
            for optimizer in optimizers:
                optimizer.step()
        modules = (model, guide, objective.critics)
        results.append(torch.cat([p.detach().flatten() for each in modules for p in each.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_fit_saves_loads_and_resumes(make, tmp_path):
    x = observations()
    results = []
    for out, lengths in (("whole", (4,)), ("part", (2, 4))):
        for epochs in lengths:
            torch.manual_seed(6)
            model, guide = programs()
            run = pg.fit(
                model, guide, make(), x, epochs=epochs, batch_size=4, progress=False, out=tmp_path / out,
                resume=epochs != lengths[0], average=0.9, critic=CriticOptions(steps=2, warmup=1),
            )  # fmt: skip
        results.append(run.programs.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert any(name.startswith("critics.") for name in results[0])
    again = pg.load(tmp_path / "whole")
    for name, value in again.programs.state_dict().items():
        assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("loss", ["non-saturating", "wasserstein-gp", "hinge", "least-squares"])
def test_a_gan_trains_without_a_guide(loss, tmp_path):
    run = pg.fit(
        generator(), None, GAN(loss, critic=SMALL), observations(), epochs=2, batch_size=4, progress=False,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.guide is None and "validation_estimate" not in run.history
    again = pg.load(tmp_path / "run")
    assert repr(again.objective) == repr(run.objective)
    assert pg.sample(again, 3).shape == (3, *SHAPE)


def test_explicit_sites_under_avb_are_those_of_the_elbo():
    model, guide = programs(Normal)
    x = observations()
    values = []
    for objective in (AVB(3), ELBO(3)):
        module = objective(model, guide)
        torch.manual_seed(7)
        values.append(module(x))
    torch.testing.assert_close(*values)


class Shared(PyroModule):
    """A global site beside a per-observation one."""

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)


class Named(PyroModule):
    """Observations that are names of classes."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=self.decoder(z)), obs=x)


class ImplicitPrior(PyroModule):
    def __init__(self, width):
        super().__init__()
        self.prior = Implicit(width, hidden=(8,))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Masked(PyroModule):
    """The latent counts in rows whose first value is positive."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Helped(nn.Module):
    """A guide with an implicit helper site."""

    def __init__(self):
        super().__init__()
        self.helper = Implicit(1, hidden=(4,))
        self.location = nn.Linear(1, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", self.helper(), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(self.location(a), 1.0).to_event(1))


class MaskedData(PyroModule):
    """What is not positive was not observed."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0).to_event(1), obs=x)


class Mixture(PyroModule):
    """A likelihood whose draws have no gradients."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            weights = dist.Categorical(torch.ones(len(x), 2))
            pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(z, 1.0)), obs=x[:, 0])


def own_ratio(score, loss):
    """A ratio of one's own, of a critic's scores."""

    class Own(nn.Module):
        def __init__(self, critic):
            super().__init__()
            self.critic = critic

        def log_ratio(self, z, context=None):
            return score(self.critic(z, context))

        def loss(self, numerator, denominator, context=None):
            return loss(self.critic(numerator, context))

    return Own


def summed(scores):
    return scores.sum()


def with_one_more(scores):
    return scores.unsqueeze(-1)


def on_a_surface():
    model, _, x = vectors(Masked())
    guide = AmortizedGuide(model, nn.Linear(2, 4), partial(Implicit, noise=1), example=(x,))
    return model, guide, x


def vectors(model, width=2):
    x = torch.randn(6, width)
    return model, AmortizedGuide(model, nn.Linear(width, 4), Implicit, example=(x,)), x


def with_global():
    model, x = Shared(), torch.randn(6, 2)
    return model, AmortizedGuide(model, nn.Linear(2, 4), {"shift": Implicit, "z": Implicit}, example=(x,)), x


def with_names():
    model, x = Named(), torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    return model, AmortizedGuide(model, nn.Sequential(Column(), nn.Linear(1, 4)), Normal, example=(x,)), x


class Column(nn.Module):
    def forward(self, x):
        return x.unsqueeze(-1)


def images(family=Implicit):
    return *programs(family), observations()


def generated():
    model = generator()
    return model, AmortizedGuide(model, MLP(SHAPE, 6)), observations()


def test_masked_rows_have_no_rate():
    torch.manual_seed(0)
    model, guide, x = vectors(Masked())
    module = AVB(3, critic=SMALL)(model, guide)
    module(x)
    ratios, counts = module.latest.terms.ratios["z"], x[:, 0] > 0
    assert counts.any() and not counts.all()
    assert (ratios[:, ~counts] == 0).all() and (ratios[:, counts] != 0).all()


def test_an_implicit_prior_has_moments_in_batches_of_any_size():
    torch.manual_seed(0)
    model, guide, _ = vectors(ImplicitPrior(9), 9)
    objective = AVB(2, covariance="full", critic=SMALL)  # 9 values need 10 draws
    run = pg.fit(model, guide, objective, torch.randn(5, 9), epochs=2, batch_size=4, progress=False)
    assert run.history["rate_estimate"].notna().all()


@pytest.mark.parametrize("make", [AVB, partial(AVB, contrast="none"), AAE], ids=["AVB", "AVB, no contrast", "AAE"])
def test_the_decoder_runs_once_a_step(make):
    model, guide = programs()
    module, calls = make(critic=SMALL)(model, guide), []
    model.likelihood.register_forward_hook(lambda *_: calls.append(1))
    module(observations())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "kind", [Logistic, JensenShannon, DonskerVaradhan, NWJ, LeastSquares, Hinge, Wasserstein, Telescoping]
)
def test_every_ratio_serves_in_visible_space(kind):
    """Also those that take as many data as samples, where there are reconstructions and samples of the model."""
    torch.manual_seed(0)
    critic = partial(SMALL, outputs=3 if kind is Telescoping else 1)
    weights = {"log_likelihood": 0.0, "latent": 0.0, "visible_reconstructions": 1.0, "visible_samples": 1.0}
    objective = Hybrid(**weights, visible_ratio=kind, critic=critic)
    objective(*programs())(observations()).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in objective.critics.parameters()])
    assert 0 < gradients.abs().sum() < math.inf


def test_a_ratio_of_ones_own():
    class Own(nn.Module):
        def __init__(self, critic):
            super().__init__()
            self.critic = critic

        def log_ratio(self, z, context=None):
            return self.critic(z, context)

        def loss(self, numerator, denominator, context=None):
            both = self.critic(numerator, context), self.critic(denominator, context)
            return nn.functional.softplus(-both[0]).mean() + nn.functional.softplus(both[1]).mean()

    runs = []
    for ratio in (Own, Logistic):
        torch.manual_seed(0)
        model, guide = programs()
        objective = VGHPlusPlus(critic=SMALL, ratio=ratio, visible_ratio=ratio)
        runs.append(pg.fit(model, guide, objective, observations(), steps=3, batch_size=6, progress=False))
    assert runs[0].history["loss"].iloc[-1] == pytest.approx(runs[1].history["loss"].iloc[-1], abs=1e-5)
    assert runs[0].history["accuracy_visible"].iloc[-1] == runs[1].history["accuracy_visible"].iloc[-1]


def test_critics_are_kept_for_programs_that_they_fit_and_no_others():
    objective, x = AVB(2, critic=SMALL), observations()
    objective(*programs())(x)
    kept = [*objective.critics.parameters()]
    objective(*programs())(x)
    assert all(a is b for a, b in zip(kept, objective.critics.parameters(), strict=True))
    explicit = AVB(2, critic=SMALL)
    explicit(*programs(Normal))(x)
    with pytest.raises(ValueError, match=r"built for programs with other sites: none, where 'z' of \d+ weights"):
        explicit(*programs())(x)
    with pytest.raises(ValueError, match="use a new one"):
        model, guide = programs()
        pg.fit(model, guide, explicit, x, epochs=1, progress=False)


def two_scores(shape, context):
    return Critic(shape, context, hidden=(4,), outputs=2)


def without_context(shape):
    return Critic(shape)


class OneScore(nn.Module):
    """The mean score of all samples."""

    def __init__(self, shape, context):
        super().__init__()
        self.critic = SMALL(shape, context)

    def forward(self, z, context=None):
        return self.critic(z, context).mean()


BAD = {
    "ELBO": (images, ELBO(), "site 'z' has no density"),
    "IWAE": (images, IWAE(2), "site 'z' has no density"),
    "one particle": (images, AVB(1), "expected particles of at least 2"),
    "no guide": (
        lambda: (programs()[0], None, observations()),
        AVB(),
        "AVB teaches a guide .* but guide is None",
    ),
    "a guide too many": (images, GAN(), "GAN uses no guide"),
    "implicit likelihood": (generated, AVB(), "needs the likelihood of the observed sites"),
    "implicit likelihood, ELBO": (generated, ELBO(), "the observed site 'x' has no density"),
    "implicit global site, AVB": (with_global, AVB(critic=SMALL), "the global site 'shift' is implicit"),
    "implicit global site, AAE": (with_global, AAE(critic=SMALL), "the global site 'shift' is implicit"),
    "implicit global site, WAE": (with_global, WAE(), "the global site 'shift' is implicit"),
    "implicit global site, VGH": (with_global, VGH(critic=SMALL), "the global site 'shift' is implicit"),
    "implicit helper site": (
        lambda: (Masked(), Helped(), torch.randn(6, 2)),
        AVB(critic=SMALL),
        "helper site 'a' is implicit",
    ),
    "names seen by a critic": (with_names, VGH(critic=SMALL), "the Categorical at 'x' has none"),
    "two scores": (images, AAE(critic=two_scores), "one score for each sample"),
    "two scores, AVB": (images, AVB(critic=two_scores), "one score for each sample"),
    "one score": (images, AAE(critic=OneScore), "one score for each sample"),
    "a critic that is made": (images, AAE(critic=Critic(2)), "expected what makes a critic"),
    "a ratio that is made": (images, AAE(ratio=Logistic(Critic(2))), "expected what makes a ratio"),
    "a critic with other arguments": (images, AAE(critic=without_context), "is called as critic"),
    "masked data, VGH": (lambda: vectors(MaskedData()), VGH(critic=SMALL), "observed site 'x' is masked"),
    "masked data, l1": (
        lambda: vectors(MaskedData()),
        Hybrid(2, reconstruction=1.0),
        "observed site 'x' is masked",
    ),
    "no gradients of draws": (
        lambda: vectors(Mixture()),
        VGH(critic=SMALL),
        "MixtureSameFamily at the .* 'x' have",
    ),
    "masked latents, AAE": (lambda: vectors(Masked()), AAE(critic=SMALL), "train this model with AVB"),
    "too little noise": (on_a_surface, AVB(critic=SMALL), "guide's draws at site 'z' .* they lie on a surface"),
    "a critic without a context": (images, AVB(critic=lambda *_: nn.Linear(2, 1)), "does not fit what it looks at"),
    "a ratio's name": (images, AVB(ratio="Logistic"), "what makes a ratio of a critic, got 'Logistic'"),
    "a ratio of all": (images, AVB(ratio=own_ratio(summed, torch.mean)), "one score for each sample"),
    "a ratio of too many": (images, VGH(visible_ratio=own_ratio(with_one_more, torch.mean)), "one score for each"),
    "a loss of each": (images, AVB(ratio=own_ratio(torch.clone, torch.clone)), "loss of Own must be one number"),
    "no ratio": (images, AAE(ratio=nn.Identity), "expected a ratio, a module with log_ratio"),
}


@pytest.mark.parametrize(("make", "objective", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_training(make, objective, message, tmp_path):
    model, guide, x = make()
    with pytest.raises((ValueError, TypeError), match=message):
        pg.fit(model, guide, objective, x, epochs=1, progress=False, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:You passed")  # half precision on the CPU
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "AVB has none here, at most an estimate"),
        ({"precision": "16-mixed"}, "critics have their own; use 'bf16-mixed'"),
        ({"critic": CriticOptions(warmup=2)}, "the program would never move"),
        ({"critic": {"steps": 2}}, r"critic is CriticOptions\(...\)"),
        ({"critic": CriticOptions}, r"critic is CriticOptions\(...\)"),
    ],
)
def test_options_that_critics_do_not_go_with(options, message, tmp_path):
    model, guide, x = images()
    data = Data("bits", x, x, x, "binary") if "patience" in options else x
    with pytest.raises(ValueError, match=message):
        pg.fit(model, guide, AVB(2, critic=SMALL), data, epochs=1, progress=False, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AVB(beta=-1.0), "beta cannot be negative"),
        (lambda: AVB(beta=math.nan), "beta must be a finite number"),
        (lambda: AVB(2.5), "particles must be a whole number"),
        (lambda: AAE(weight=-1.0), "weight cannot be negative"),
        (lambda: VGHPlusPlus(reconstruction=-1.0), "reconstruction cannot be negative"),
        (lambda: Hybrid(log_likelihood=0.0, latent=0.0), "all weights are 0"),
        (lambda: Hybrid(covariance="round"), "covariance is 'diagonal' or 'full'"),
        (lambda: AVB(beta="1"), "beta must be a number, got '1'"),
        (lambda: GAN(r1="1"), "r1 must be a number, got '1'"),
        (lambda: CriticOptions("1e-3"), "learning_rate must be a positive number"),
        (lambda: CriticOptions(betas=0.5), "two numbers in"),
        (lambda: CriticOptions(steps=1.5), "steps must be a whole number of at least 1, got 1.5"),
        (lambda: CriticOptions(warmup=0.5), "warmup must be a whole number of at least 0"),
        (lambda: GAN(gradient_penalty=-1.0), "gradient_penalty cannot be negative"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

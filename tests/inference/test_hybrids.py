"""Objectives with critics: exact ratios give exact gradients, critic and program never mix, bad input is refused."""

from functools import partial

import pyro
import pytest
import torch
from torch import nn

import pyrogen as pg
from pyrogen.data import LinearGaussian
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.inference import AAE, AVB, ELBO, GAN, IWAE, VGH, AlphaGAN, AmortizedGuide, CriticOptions, VGHPlusPlus
from pyrogen.inference.contrasts import SiteContrast
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


class Sampled(nn.Module):
    """A normal family that keeps its density to itself."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.normal = Normal(features, context)

    def forward(self, context=None):
        base = self.normal(context).base_dist

        def draw(shape):
            noise = torch.randn(*shape, self.features, dtype=base.loc.dtype)
            return base.loc + base.scale * noise

        return ImplicitDistribution(draw, base.batch_shape[:-1], (self.features,))


def programs(family=Implicit, prior=None):
    model = LatentVariableModel(prior or StandardNormal(2), Bernoulli(MLP(2, SHAPE, (8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, (8,)), family)


def generator():
    return LatentVariableModel(StandardNormal(2), Implicit(SHAPE, context=2, noise=0, network=MLP(2, SHAPE, (8,))))


def observations():
    return torch.rand(6, *SHAPE).round()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("contrast", ["adaptive", "none"])
def test_with_the_exact_ratio_the_gradient_is_that_of_the_explicit_bound(contrast, monkeypatch):
    """The score of q has mean zero only in expectation, so the comparison is with sticking the landing."""
    toy = LinearGaussian()
    x = toy.x[:5].double()
    torch.manual_seed(1)
    guide = AmortizedGuide(toy.model, nn.Linear(4, 3), Sampled)
    twin = AmortizedGuide(toy.model, guide.encoder, guide.conditionals["z"].normal)

    def exact(self, draws):
        conditional = guide.conditionals["z"].normal
        held = torch.func.functional_call(
            conditional, {k: v.detach() for k, v in conditional.named_parameters()}, (draws.traces.features.detach(),)
        )
        z = draws.model["z"]["value"]
        return held.log_prob(z) - draws.model["z"]["fn"].log_prob(z)

    monkeypatch.setattr(SiteContrast, "estimate", exact)
    gradients = []
    for objective, program in ((AVB(4, contrast=contrast, critic=SMALL), guide), (_landing(), twin)):
        module = objective(toy.model, program)
        torch.manual_seed(2)
        module(x)
        estimate = module.latest
        torch.manual_seed(2)
        parameters = [*guide.encoder.parameters(), *guide.conditionals["z"].normal.parameters()]
        gradients.append(torch.autograd.grad(estimate.loss, parameters))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


class _landing(ELBO):
    """Sticking the landing with the log-ratio by Monte Carlo, which is what a critic estimates."""

    def __init__(self) -> None:
        super().__init__(4, sticking_the_landing=True)


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


BAD = {
    "ELBO": (lambda: programs(), ELBO(), "site 'z' has no density"),
    "IWAE": (lambda: programs(), IWAE(2), "site 'z' has no density"),
    "one particle": (lambda: programs(), AVB(1), "expected particles of at least 2"),
    "no guide": (lambda: (programs()[0], None), AVB(), "there is no guide for them"),
    "a guide too many": (lambda: programs(), GAN(), "GAN uses no guide"),
    "implicit likelihood": (
        lambda: (model := generator(), AmortizedGuide(model, MLP(SHAPE, 6))),
        AVB(),
        "needs the likelihood of the observed sites",
    ),
}


@pytest.mark.parametrize(("make", "objective", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_training(make, objective, message, tmp_path):
    model, guide = make()
    with pytest.raises(ValueError, match=message):
        pg.fit(model, guide, objective, observations(), epochs=1, progress=False, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""ALI, VAE/GAN and FactorVAE: gradients go where they should and nowhere else, short fits do what they should."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn import functional as F

import pyrogen as pg
from pyrogen.configuration import build, describe
from pyrogen.distributions import Bernoulli, Implicit, Normal, NormalLikelihood, StandardNormal
from pyrogen.inference import (
    ALI,
    ELBO,
    GAN,
    VAEGAN,
    AmortizedGuide,
    CriticOptions,
    FactorVAE,
    Hinge,
    LeastSquares,
    Logistic,
    Wasserstein,
)
from pyrogen.inference.draws import Draws
from pyrogen.inference.terms import frozen
from pyrogen.inference.total_correlation import permuted
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

SMALL = partial(Critic, hidden=(16,))
SHAPE = (1, 4, 4)
OBJECTIVES = {
    "ALI": (partial(ALI, critic=SMALL), Implicit),
    "ALI, explicit": (partial(ALI, "least-squares", critic=SMALL), Normal),
    "VAEGAN": (partial(VAEGAN, critic=SMALL), Normal),
    "VAEGAN, implicit": (partial(VAEGAN, 3, critic=SMALL), Implicit),
    "FactorVAE": (partial(FactorVAE, 2, critic=SMALL), Normal),
}
EACH = pytest.mark.parametrize(("make", "family"), OBJECTIVES.values(), ids=OBJECTIVES.keys())


def programs(family=Normal):
    model = LatentVariableModel(Normal(2), Bernoulli(MLP(2, SHAPE, (8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, (8,)), family)


def generator():
    """Programs without noise in visible space, so that what is shown at the same latent values is the same."""
    model = LatentVariableModel(Normal(2), Implicit(SHAPE, context=2, noise=0, network=MLP(2, SHAPE, (8,))))
    return model, AmortizedGuide(model, MLP(SHAPE, 6, (8,)))


def observations(rows=6):
    return torch.rand(rows, *SHAPE).round()


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def prepared(objective, model, guide, x):
    """The objective and one run of its programs; its critic is moved so that no gradient vanishes by its start."""
    objective.prepare(model, guide, x)
    with torch.no_grad():
        for parameter in objective.critics.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return objective, Draws(model, guide, (x,), objective.particles)


def close(ours, expected):
    assert any(each.any() for each in expected)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("parameter_store")
@EACH
def test_gradients_of_program_and_critics_never_mix(make, family):
    model, guide = programs(family)
    objective, x = make(), observations()
    module = objective(model, guide)
    critics, program = [*objective.critics.parameters()], [*model.parameters(), *guide.parameters()]
    objective.critic_loss(model, guide, x).backward()
    assert any(p.grad.any() for p in critics) and all(p.grad is None for p in program)
    module.zero_grad(set_to_none=True)
    draws = Draws(model, guide, (x,), objective.particles)
    with frozen(critics):
        loss = objective.of_program(draws).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in program) and all(p.grad is None for p in critics)
    module.zero_grad(set_to_none=True)
    module(x).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.usefixtures("float64", "parameter_store")
def test_parts_of_vaegan_teach_whom_they_should():
    """Against both losses written out: the guide's has no verdict, the model's has γ and no rate but in its prior."""
    model, guide = generator()
    x, gamma = observations(), 3.0
    objective, draws = prepared(VAEGAN(reconstruction=gamma, critic=SMALL), model, guide, x)
    estimate = objective.of_program(draws)
    ratio = objective.critics["visible"].ratio
    features = ratio.critic.features_of
    q, p = draws.guide["z"]["fn"].base_dist, draws.model["z"]["fn"].base_dist
    rate = torch.distributions.kl_divergence(q, p).sum(-1).mean()
    similarity = 0.5 * (features(x) - features(draws.reconstructions)).square().sum(-1).mean()
    verdicts = F.softplus(-ratio(draws.reconstructions)).mean() + F.softplus(-ratio(draws.samples)).mean()
    of_guide, decoder, prior = [*guide.parameters()], [*model.likelihood.parameters()], [*model.prior.parameters()]
    close(gradients(estimate.loss, of_guide), gradients(rate + similarity, of_guide))
    close(gradients(estimate.loss, decoder), gradients(gamma * similarity + verdicts, decoder))
    close(gradients(estimate.loss, prior), gradients(rate + F.softplus(-ratio(draws.samples)).mean(), prior))
    torch.testing.assert_close(estimate.loss, rate + (1 + gamma) * similarity + verdicts)


@pytest.mark.usefixtures("float64")
def test_similarity_teaches_the_guide_alone_in_programs_that_are_functions(parameter_store):
    """Their weights are known from Pyro's store, not from a module."""
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)

    def model(x):
        pyro.module("decoder", decoder)
        shift = pyro.param("shift", torch.ones(4), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + shift, 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    x = torch.randn(5, 4)
    objective, draws = prepared(VAEGAN(reconstruction=0.0, critic=SMALL), model, guide, x)
    # With γ = 0 and no verdict that has a slope, nothing is left for the model.
    for parameter in objective.critics["visible"].ratio.critic.last.parameters():
        parameter.data.zero_()
    loss = objective.of_program(draws).loss
    shift = pyro.get_param_store()._params["shift"]
    held = gradients(loss, [*decoder.parameters(), shift])
    assert not any(each.any() for each in held)
    assert all(each.any() for each in gradients(loss, [*encoder.parameters()]))
    assert shift.requires_grad


LOSSES = {
    "non-saturating": (lambda t: F.softplus(t), lambda t: F.softplus(-t)),
    "wasserstein-gp": (lambda t: t, lambda t: -t),
    "hinge": (lambda t: t, lambda t: -t),
    "least-squares": (lambda t: 0.5 * t.square(), lambda t: 0.5 * (1 - t).square()),
}


@pytest.mark.usefixtures("float64", "parameter_store")
@pytest.mark.parametrize("loss", LOSSES)
def test_ali_teaches_guide_and_model_by_swapped_labels(loss):
    model, guide = generator()
    x = observations()
    objective, draws = prepared(ALI(loss, critic=SMALL), model, guide, x)
    estimate = objective.of_program(draws)
    ratio = objective.critics["joint"].ratio
    for_guide, for_model = LOSSES[loss]
    inferred = for_guide(ratio(x, draws.guide["z"]["value"])).mean()
    drawn = for_model(ratio(draws.prior["x"]["value"], draws.prior["z"]["value"])).mean()
    of_guide, of_model = [*guide.parameters()], [*model.parameters()]
    close(gradients(estimate.loss, of_guide), gradients(inferred, of_guide))
    close(gradients(estimate.loss, of_model), gradients(drawn, of_model))
    torch.testing.assert_close(estimate.loss, inferred + drawn)


@pytest.mark.usefixtures("float64", "parameter_store")
@pytest.mark.parametrize(("loss", "kind"), [*zip(LOSSES, (Logistic, Wasserstein, Hinge, LeastSquares), strict=True)])
def test_critic_of_ali_sees_pairs(loss, kind):
    model, guide = generator()
    x = observations()
    objective, draws = prepared(ALI(loss, critic=SMALL), model, guide, x)
    joint = objective.critics["joint"]
    assert type(joint.ratio) is kind
    shown, contexts = draws.prior["x"]["value"], (draws.guide["z"]["value"], draws.prior["z"]["value"])
    torch.manual_seed(1)  # a gradient penalty is taken at random places
    ours, _ = joint.loss_and_accuracies(draws)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, joint.ratio.loss(x, shown, contexts))


def test_ali_reads_images_by_convolutions_with_latent_values_beside():
    shape = (1, 8, 8)
    model = LatentVariableModel(StandardNormal(3), Bernoulli(MLP(3, shape, (8,))))
    guide = AmortizedGuide(model, MLP(shape, 6, (8,)), Implicit)
    objective = ALI(critic=SMALL)
    objective.prepare(model, guide, torch.rand(4, *shape).round())
    critic = objective.critics["joint"].ratio.critic
    assert critic.shape == shape and critic.context == 3 and critic.convolutions is not None


RHO = 0.8
TOTAL_CORRELATION = -0.5 * math.log(1 - RHO**2)  # 0.51 nats


class Correlated(nn.Module):
    """q(z | x) is the same correlated normal for every x, so q(z) is known; ρ is its parameter."""

    def __init__(self):
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(RHO))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            one, rho = torch.ones_like(self.rho), self.rho
            covariance = torch.stack([torch.stack([one, rho]), torch.stack([rho, one])])
            pyro.sample("z", dist.MultivariateNormal(x.new_zeros(2), covariance).expand([len(x)]))


class Plane(nn.Module):
    """z in two dimensions, seen through noise."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


class Exact(nn.Module):
    """log q(z)/∏ q(z_j) of the correlated normal."""

    def forward(self, z, context=None):
        quadratic = (z.square().sum(-1) - 2 * RHO * z.prod(-1)) / (1 - RHO**2) - z.square().sum(-1)
        return TOTAL_CORRELATION - 0.5 * quadratic


@pytest.mark.usefixtures("float64", "parameter_store")
def test_total_correlation_with_the_exact_ratio():
    """Value and gradient of γ E T against γ TC and its derivative in ρ; both bounds are five standard errors."""
    model, guide, x = Plane(), Correlated(), torch.randn(20_000, 2)
    estimates = []
    for gamma in (0.0, 2.5):
        objective = FactorVAE(gamma=gamma, critic=lambda size, context: Exact())
        objective.prepare(model, guide, x)
        torch.manual_seed(1)
        estimates.append(objective.of_program(Draws(model, guide, (x,))))
    term = estimates[1].loss - estimates[0].loss
    value = estimates[1].metrics["total_correlation_estimate"]
    torch.testing.assert_close(term, 2.5 * value)
    assert abs(value.item() - TOTAL_CORRELATION) < 5 * RHO / math.sqrt(len(x))  # T has standard deviation ρ
    torch.manual_seed(1)
    torch.testing.assert_close(estimates[0].loss, ELBO()(model, guide)(x))
    (slope,) = torch.autograd.grad(term / 2.5, [guide.rho])
    exact = RHO / (1 - RHO**2)  # along one draw it is ρ (ε₁ − ρ ε₂ / √(1 − ρ²))², of standard deviation √2 times that
    assert abs(slope.item() - exact) < 5 * math.sqrt(2) * exact / math.sqrt(len(x))


@pytest.mark.usefixtures("parameter_store")
def test_critic_of_factorvae_learns_the_total_correlation():
    """Within 0.1 of 0.51 nats, as for five seeds of five."""
    model, guide, x = Plane(), Correlated(), torch.zeros(512, 2)
    objective = FactorVAE(critic=partial(Critic, hidden=(32, 32)))
    module = objective(model, guide)
    optimizer = torch.optim.Adam(objective.critics.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        module.critic_loss(x).backward()
        optimizer.step()
    with torch.no_grad():
        estimate = module.elbo.estimate(model, guide, torch.zeros(20_000, 2))
    assert abs(estimate.metrics["total_correlation_estimate"].item() - TOTAL_CORRELATION) < 0.1


def test_permuted_keeps_columns_and_breaks_rows():
    z = torch.arange(1000.0).unsqueeze(-1).expand(-1, 3)
    mixed = permuted(z)
    assert torch.equal(mixed.sort(0).values, z)
    # Of independent permutations about one row in a thousand has two equal values.
    assert (mixed[:, 0] == mixed[:, 1]).sum() < 10 and (mixed[:, 1] == mixed[:, 2]).sum() < 10


@pytest.mark.usefixtures("float64", "parameter_store")
def test_factorvae_reports_the_elbo():
    model, guide = programs()
    x = observations()
    values = []
    for objective in (FactorVAE(3, critic=SMALL), ELBO(3)):
        module = objective(model, guide)
        torch.manual_seed(2)
        values.append(module.bound(x))
    torch.testing.assert_close(*values)


@pytest.mark.usefixtures("parameter_store")
def test_factorvae_lowers_the_total_correlation():
    """Data that are correlated where the model has independent values; both fits from the same start.

    ELBO ends near 0.35 nats; of six seeds FactorVAE ended between 0.02 and 0.10.
    """
    x = torch.randn(1024, 2) @ torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]])).T
    found = []
    for objective in (ELBO(), FactorVAE(critic=partial(Critic, hidden=(32, 32)))):
        torch.manual_seed(3)
        model = Plane()
        guide = AmortizedGuide(model, nn.Linear(2, 4), example=x[:2])
        pg.fit(model, guide, objective, x, steps=400, learning_rate=5e-3, critic=CriticOptions(1e-2), progress=False)
        q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist
        covariance = torch.cov(q.loc.T) + q.scale.square().mean(0).diag()
        found.append(-0.5 * (covariance.det() / covariance.diagonal().prod()).log().item())
    assert found[0] > 0.2 and found[1] < 0.5 * found[0]


class Line(nn.Module):
    """q(z | x) of a linear model."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        nn.init.constant_(self.line.weight, 0.5)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.line(x), self.log_scale.exp()).to_event(1))


def test_ali_finds_model_and_posterior():
    """x = w z + b + 0.3 ε on data of mean 0.5 and scale 1: w² = 0.91, b = 0.5, q(z|x) = N(w (x − b), 0.3²).

    Of four seeds none was off by more than 0.06.
    """
    x = 0.5 + torch.randn(1024, 1)
    decoder = nn.Linear(1, 1)
    nn.init.constant_(decoder.weight, 0.5)  # so that the sign is settled
    guide = Line()
    run = pg.fit(
        LatentVariableModel(StandardNormal(1), NormalLikelihood(decoder, scale=0.3)), guide,
        ALI(r1=0.5, critic=partial(Critic, hidden=(32, 32))), x, steps=400, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    assert {"verdict_guide", "verdict_model", "accuracy_joint"} <= {*run.history.columns}
    w, b = math.sqrt(0.91), 0.5
    found = [decoder.weight, decoder.bias, guide.line.weight, guide.line.bias, guide.log_scale.exp()]
    for ours, exact in zip(found, (w, b, w, -w * b, 0.3), strict=True):
        assert abs(ours.item() - exact) < 0.15


@pytest.mark.usefixtures("parameter_store")
def test_vaegan_learns_to_reconstruct():
    """Four patterns: reconstructions end at less than half the error of the mean; four seeds at 0.33 to 0.42."""
    patterns = torch.rand(4, *SHAPE).round()
    x = 0.1 + 0.8 * patterns[torch.randint(4, (512,))] + 0.02 * torch.randn(512, *SHAPE)
    network = nn.Sequential(MLP(2, SHAPE, (32,)), nn.Sigmoid())
    model = LatentVariableModel(StandardNormal(2), Implicit(SHAPE, context=2, noise=0, network=network))
    guide = AmortizedGuide(model, MLP(SHAPE, 16, (32,)))
    objective = VAEGAN(critic=partial(Critic, hidden=(32, 32)))
    run = pg.fit(model, guide, objective, x, steps=200, batch_size=64, learning_rate=5e-3, progress=False)
    with torch.no_grad():
        shown = Draws(run.model, run.guide, (x,)).reconstructions
    assert (shown - x).square().mean().sqrt() < 0.5 * (x - x.mean(0)).square().mean().sqrt()
    assert {"similarity", "rate", "verdict_samples", "accuracy_visible"} <= {*run.history.columns}
    assert run.history["rate"].iloc[-1] > 0.5  # the latent values are in use


@EACH
def test_svi_and_two_optimizers_take_the_same_step(make, family, parameter_store):
    results = []
    for how in ("svi", "two optimizers"):
        pyro.clear_param_store()
        torch.manual_seed(4)
        model, guide = programs(family)
        objective, x = make(), observations()
        objective.prepare(model, guide, x)
        torch.manual_seed(5)
        critics = [*objective.critics.parameters()]
        if how == "svi":
            pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective).step(x)
        else:
            module = objective(model, guide)
            both = [*model.parameters(), *guide.parameters()], critics
            optimizers = [torch.optim.Adam(parameters, lr=1e-2) for parameters in both]
            module(x).backward()
            for optimizer in optimizers:
                optimizer.step()
        modules = (model, guide, objective.critics)
        results.append(torch.cat([p.detach().flatten() for each in modules for p in each.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@EACH
def test_fit_saves_loads_and_resumes(make, family, tmp_path):
    x = observations()
    results = []
    for out, lengths in (("whole", (4,)), ("part", (2, 4))):
        for epochs in lengths:
            torch.manual_seed(6)
            model, guide = programs(family)
            run = pg.fit(
                model, guide, make(), x, epochs=epochs, batch_size=4, progress=False, out=tmp_path / out,
                resume=epochs != lengths[0], critic=CriticOptions(steps=2),
            )  # fmt: skip
        results.append(run.programs.state_dict())
    again = pg.load(tmp_path / "whole")
    assert repr(again.objective) == repr(run.objective)
    assert any(name.startswith("critics.") for name in results[0])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, again.programs.state_dict()[name]), name


def test_descriptions_build_equal_objectives():
    for objective in (ALI("hinge", r1=0.5), VAEGAN(2, reconstruction=3.0, contrast="none"), FactorVAE(2, gamma=6.4)):
        again = build(describe(objective))
        assert describe(again) == describe(objective) and repr(again) == repr(objective)


class Featureless(nn.Module):
    def __init__(self, features, context):
        super().__init__()
        self.critic = Critic(features, context, hidden=(4,))

    def forward(self, z, context=None):
        return self.critic(z, context)


class Global(nn.Module):
    def __init__(self, local=True):
        super().__init__()
        self.local = local

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            if self.local:
                shift = shift + pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1)).sum(-1)
            pyro.sample("x", dist.Normal(shift.unsqueeze(-1) * torch.ones_like(x), 1.0).to_event(1), obs=x)


class Discrete(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


class DiscreteGuide(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).expand([len(x), 2]).to_event(1))


class Masked(nn.Module):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(x[:, 0] > 0))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guided(model, family=Normal):
    return model, AmortizedGuide(model, nn.Linear(2, 4), family, example=torch.zeros(2, 2))


def scalar(family=Normal):
    model = LatentVariableModel(StandardNormal(1), NormalLikelihood(MLP(1, 2, (4,)), scale=0.5))
    return guided(model, family)


BAD = {
    "ALI without a guide": (lambda: (Plane(), None), ALI, "ALI .* but guide is None"),
    "VAEGAN without a guide": (lambda: (Plane(), None), VAEGAN, "VAEGAN .* but guide is None"),
    "FactorVAE without a guide": (lambda: (Plane(), None), FactorVAE, "but guide is None"),
    "no features": (
        lambda: guided(Plane()), partial(VAEGAN, critic=Featureless), "Featureless has no method features_of"
    ),
    "implicit guide": (lambda: guided(Plane(), Implicit), FactorVAE, "site 'z' has no density"),
    "one particle": (lambda: guided(Plane(), Implicit), VAEGAN, "expected particles of at least 2"),
    "one latent value": (scalar, FactorVAE, "has 1 in the plate"),
    "no log-ratio": (lambda: guided(Plane()), partial(FactorVAE, ratio=Wasserstein), "estimates no density ratio"),
    "global site": (lambda: guided(Global()), ALI, r"latent sites \['shift'\] are global"),
    "only global, ALI": (lambda: guided(Global(local=False)), ALI, "needs a latent site for each observation"),
    "only global, VAEGAN": (lambda: guided(Global(local=False)), VAEGAN, "needs a latent site for each observation"),
    "only global, FactorVAE": (lambda: guided(Global(local=False)), FactorVAE, "has 0 in the plate"),
    "discrete, ALI": (lambda: (Discrete(), DiscreteGuide()), ALI, "latent site 'z' is discrete"),
    "discrete, VAEGAN": (lambda: (Discrete(), DiscreteGuide()), VAEGAN, "latent site 'z' is discrete"),
    "discrete, FactorVAE": (lambda: (Discrete(), DiscreteGuide()), FactorVAE, "latent site 'z' is discrete"),
    "masked": (lambda: guided(Masked()), ALI, "latent site 'z' is masked"),
    "masked, FactorVAE": (lambda: guided(Masked()), FactorVAE, "latent site 'z' is masked"),
    "wrong critic": (
        lambda: guided(Plane()), partial(ALI, critic=lambda shape, context: Critic(3, context)),
        "built for samples of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "objective", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_training(make, objective, message, tmp_path):
    model, guide = make()
    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match=message):
        pg.fit(model, guide, objective(), x, epochs=1, progress=False, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message):  # and by the objective itself
        objective().prepare(model, guide, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALI("saturating"), "loss is one of non-saturating"),
        (lambda: GAN("saturating"), "loss is one of non-saturating"),
        (lambda: VAEGAN(reconstruction=-1.0), "reconstruction cannot be negative"),
        (lambda: FactorVAE(gamma=-1.0), "gamma cannot be negative"),
        (lambda: ALI().bound(), "ALI bounds no log-likelihood"),
        (lambda: VAEGAN().bound(), "VAEGAN bounds no log-likelihood"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Objectives with the aggregate posterior, against direct sums, the ELBO and each other."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.configuration import build, describe
from pyrogen.distributions import (
    Bernoulli,
    Delta,
    Flow,
    Implicit,
    MultivariateNormal,
    Normal,
    NormalLikelihood,
    SemiImplicit,
    StandardNormal,
)
from pyrogen.inference import (
    ELBO,
    WAE,
    AmortizedGuide,
    BetaTCVAE,
    EnergyKernel,
    GaussianKernel,
    InfoVAE,
    InverseMultiquadraticKernel,
    fit,
    maximum_mean_discrepancy,
)
from pyrogen.inference.batches import Batches
from pyrogen.inference.terms import run_programs
from pyrogen.models import LatentVariableModel, ProbabilisticPCA
from pyrogen.networks import MLP

pytestmark = pytest.mark.usefixtures("float64", "parameter_store")

OBJECTIVES = [
    WAE(),
    WAE(3.0, cost="squared error", kernel=GaussianKernel(), particles=2),
    WAE(cost="absolute error", kernel=EnergyKernel()),
    InfoVAE(0.5, 5.0),
    InfoVAE(1.0, 5.0, particles=3),
    BetaTCVAE(),
    BetaTCVAE(2.0, alpha=0.5, gamma=3.0, weighting="stratified", particles=2),
]
IDS = [f"{type(objective).__name__} {i}" for i, objective in enumerate(OBJECTIVES)]


@pytest.fixture
def ppca():
    model = ProbabilisticPCA(2, 4)
    return model, AmortizedGuide(model, nn.Identity(), Normal), torch.randn(6, 4)


class Hierarchy(nn.Module):
    """z in two dimensions, below it three u of a nested plate, below them x: every observed value has its own u."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("parts", 3, dim=-2):
                u = pyro.sample("u", dist.Normal(self.gain * z.sum(-1), 0.5))
                pyro.sample("x", dist.Normal(u, 0.5), obs=x.T)


class Parts(nn.Module):
    """One latent site of three values in a nested plate."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), self.scale))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)


def seeded_estimate(objective, model, guide, x, seed=3):
    torch.manual_seed(seed)
    return objective.estimate(model, guide, x)


# The discrepancy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
def test_wae_is_its_cost_and_the_discrepancy_of_draws_from_guide_and_prior(ppca, particles):
    model, guide, x = ppca
    kernel = GaussianKernel(1.5)
    estimate = seeded_estimate(WAE(7.0, kernel=kernel, particles=particles), model, guide, x)
    torch.manual_seed(3)
    terms = run_programs(model, guide, (x,), particles)
    z = terms.guide_trace.nodes["z"]["value"].view(particles, 6, 2)
    prior = torch.randn(particles, 6, 2)  # the prior's draws are the next ones
    mmd = torch.stack([maximum_mean_discrepancy(a, b, kernel) for a, b in zip(z, prior, strict=True)]).mean()
    torch.testing.assert_close(estimate.loss, -terms.log_likelihood.mean() + 7 * mmd)
    torch.testing.assert_close(estimate.metrics["mmd"], mmd.detach())
    torch.testing.assert_close(estimate.metrics["distortion"], -terms.log_likelihood.mean().detach())
    assert estimate.metrics.keys() == {"distortion", "mmd"}


def test_sites_of_a_hierarchy_are_compared_side_by_side():
    model, x = Hierarchy(), torch.randn(5, 3)
    guide = AmortizedGuide(model, nn.Identity(), example=x)
    estimate = seeded_estimate(WAE(2.0, kernel=EnergyKernel()), model, guide, x)
    torch.manual_seed(3)
    terms = run_programs(model, guide, (x,))
    drawn: Any = terms.guide_trace.nodes
    posterior = torch.cat([drawn["z"]["value"], drawn["u"]["value"].T], -1)
    z = torch.randn(5, 2)
    prior = torch.cat([z, (model.gain * z.sum(-1) + 0.5 * torch.randn(3, 5)).T], -1)
    mmd = maximum_mean_discrepancy(posterior, prior, EnergyKernel())
    torch.testing.assert_close(estimate.loss, -terms.log_likelihood.mean() + 2 * mmd)
    # Both sides learn: the guide's draws move to the prior's, and what the model draws below z to the guide's.
    mmd_alone = seeded_estimate(WAE(2.0, cost="squared error", kernel=EnergyKernel()), model, guide, x)
    gradient = torch.autograd.grad(mmd_alone.loss - mmd_alone.metrics["squared_error"], model.gain)[0]
    assert gradient.abs() > 1e-6


class Sampled(dist.Normal):
    """A normal that has lost its density."""

    def log_prob(self, value):
        raise AssertionError("a density was asked for")


class OfSamples(nn.Module):
    """Guide or prior without a density."""

    def __init__(self, features, context=0):
        super().__init__()
        self.features = features
        self.linear = nn.Linear(max(context, 1), features)

    def forward(self, context=None):
        loc = self.linear(torch.ones(1)) if context is None else self.linear(context)
        return Sampled(loc, 1.0).to_event(1)


@pytest.mark.parametrize("cost", [None, "squared error"])
@pytest.mark.parametrize("family", [OfSamples, Delta])
def test_wae_asks_no_latent_site_for_a_density(family, cost):
    model = LatentVariableModel(OfSamples(2), NormalLikelihood(MLP(2, 4)))
    guide = AmortizedGuide(model, nn.Identity(), family)
    x = torch.randn(6, 4)
    module = WAE(cost=cost)(model, guide)
    module(x).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    if family is Delta:
        return
    with pytest.raises(AssertionError, match="density was asked for"):  # as it would be in a bound
        ELBO(sticking_the_landing=True)(model, guide)(x)


def test_prior_draws_do_not_run_the_decoder():
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    calls = []
    decoder.register_forward_hook(lambda *_: calls.append(1))
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(decoder))
    guide = AmortizedGuide(model, nn.Identity())
    calls.clear()
    WAE()(model, guide)(torch.randn(6, 4))
    assert len(calls) == 1


def test_prior_is_drawn_at_the_guides_global_sites_which_keep_their_divergence():
    """z ~ N(θ, 1) and guide θ ≈ 50: draws from the prior at a θ of its own would be 50 away."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        theta = pyro.sample("theta", dist.Normal(torch.tensor(50.0), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(theta, 1.0))

    kernel = EnergyKernel()
    estimate = WAE(kernel=kernel, observations=400).estimate(model, guide, torch.randn(200))
    assert abs(estimate.metrics["mmd"]) < 0.2  # 100 otherwise
    kl = torch.distributions.kl_divergence(dist.Normal(50.0, 0.1), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(estimate.metrics["global_rate"], kl / 400)
    loss = estimate.metrics["distortion"] + 10 * estimate.metrics["mmd"] + kl / 400
    torch.testing.assert_close(estimate.loss, loss)


@pytest.mark.parametrize("cost", ["squared error", "absolute error"])
def test_cost_in_data_space(cost):
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 2, 3), (4,))))
    guide = AmortizedGuide(model, MLP((1, 2, 3), 4, (4,)))
    x = torch.rand(6, 1, 2, 3).round()
    estimate = seeded_estimate(WAE(0.0, cost=cost), model, guide, x)
    torch.manual_seed(3)
    terms = run_programs(model, guide, (x,))
    z = terms.guide_trace.nodes["z"]["value"]
    difference = x - torch.sigmoid(model.likelihood.decoder(z))
    sizes = difference.square() if cost == "squared error" else difference.abs()
    torch.testing.assert_close(estimate.loss, sizes.sum() / 6)
    torch.testing.assert_close(estimate.metrics[cost.replace(" ", "_")], sizes.sum().detach() / 6)
    torch.testing.assert_close(estimate.metrics["distortion"], -terms.log_likelihood.mean().detach())


def test_cost_leaves_out_what_is_masked():
    seen = torch.rand(6, 4) < 0.5

    class Model(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).mask(seen).to_event(1), obs=x)

    class Whole(Model):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                with pyro.poutine.mask(mask=seen[:, 0]):
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(6, 4)
    guide = AmortizedGuide(Whole(), nn.Identity(), Delta, example=x)
    z = guide(x)["z"]
    loss = WAE(0.0, cost="squared error").estimate(Whole(), guide, x).loss
    torch.testing.assert_close(loss, (x - z).square().sum(-1)[seen[:, 0]].sum() / 6)
    loss = WAE(0.0, cost="squared error").estimate(Model(), guide, x).loss
    torch.testing.assert_close(loss, (x - z)[seen].square().sum() / 6)


def test_wae_drives_the_aggregate_posterior_to_the_prior():
    """Its moments over one draw for each of 512 observations are within three standard errors of those of N(0, I).

    These are 0.063 for the norm of the mean and 0.11 for that of the covariance's error, by sampling alone. Seen over
    five seeds are at most 0.09 and 0.25, and without a weight at least 1.7 and 1.0.
    """
    x = torch.randn(512, 2) @ torch.tensor([[1.5, 0.4], [0.0, 0.6]]) + torch.tensor([2.0, -1.0])

    def moments(weight):
        torch.manual_seed(1)
        model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 2, ()), scale=0.5))
        guide = AmortizedGuide(model, nn.Identity(), Normal)
        options: Any = {"steps": 200, "batch_size": 64, "learning_rate": 0.04, "schedule": "linear", "progress": False}
        fit(model, guide, WAE(weight), x, **options)
        with torch.no_grad():
            z = guide(x)["z"]
        return z.mean(0).norm(), (z.T.cov() - torch.eye(2)).norm()

    mean, covariance = moments(100.0)
    assert mean < 0.19 and covariance < 0.33
    mean, covariance = moments(0.0)
    assert mean > 0.38 and covariance > 0.66


def test_a_batch_of_one_row_counts_its_cost_alone(ppca):
    model, guide, x = ppca
    with pytest.warns(UserWarning, match="batch of one row has no unbiased discrepancy"):
        estimate = WAE().estimate(model, guide, x[:1])
    assert estimate.metrics["mmd"] == 0 and estimate.loss == estimate.metrics["distortion"]


# InfoVAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: ProbabilisticPCA(2, 3), Hierarchy])
def test_infovae_is_the_elbo_at_alpha_0_and_weight_1(make):
    model, x = make(), torch.randn(6, 3)
    guide = AmortizedGuide(model, nn.Identity(), example=x)
    results = []
    for objective in (InfoVAE(0.0, 1.0, particles=2), ELBO(2)):
        loss = seeded_estimate(objective, model, guide, x).loss
        results.append((loss, *torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])))
    for came, expected in zip(*results, strict=True):
        assert torch.equal(came, expected)


def test_infovae_is_the_wae_at_alpha_1(ppca):
    model, guide, x = ppca
    came = seeded_estimate(InfoVAE(1.0, 8.0), model, guide, x)
    torch.testing.assert_close(came.loss, seeded_estimate(WAE(8.0), model, guide, x).loss)
    assert came.metrics["rate"] > 0
    point_mass = AmortizedGuide(model, nn.Identity(), Delta)
    assert InfoVAE(1.0).estimate(model, point_mass, x).loss.isfinite()


def test_infovae_weighs_divergence_and_discrepancy(ppca):
    model, guide, x = ppca
    came = seeded_estimate(InfoVAE(0.3, 4.0), model, guide, x)
    m = came.metrics
    torch.testing.assert_close(came.loss.detach(), m["distortion"] + 0.7 * m["rate"] + 3.3 * m["mmd"])
    elbo = seeded_estimate(ELBO(), model, guide, x).metrics
    assert m["rate"] == elbo["rate"] and m["distortion"] == elbo["distortion"]


@pytest.mark.parametrize("objective", [InfoVAE(0.3, 4.0), BetaTCVAE()], ids=["InfoVAE", "BetaTCVAE"])
def test_bound_is_the_elbo(ppca, objective):
    model, guide, x = ppca
    torch.manual_seed(3)
    came = objective.bound(model, guide, x)
    torch.manual_seed(3)
    assert torch.equal(came, ELBO().bound(model, guide, x))


# β-TCVAE -------------------------------------------------------------------------------------------------------------


def decomposition(q, p, z, log_weights):
    """The three terms at draws z ``(K, B, D)`` from q ``(B, D)`` by loops: (mutual information, correlation, KL)."""
    sums = torch.zeros(3)
    rows = z.shape[1]
    for draws in z:
        for i in range(rows):
            each = torch.stack([dist.Normal(q.loc[j], q.scale[j]).log_prob(draws[i]) for j in range(rows)])
            joint = torch.logsumexp(each.sum(-1) + log_weights[i], 0)
            marginals = torch.logsumexp(each + log_weights[i][:, None], 0).sum()
            own, prior = each[i].sum(), p.log_prob(draws[i]).sum()
            sums += torch.stack([own - joint, joint - marginals, marginals - prior])
    return sums / (len(z) * rows)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("weighting", ["minibatch", "stratified"])
@pytest.mark.parametrize("make", [lambda: ProbabilisticPCA(3, 4), Parts])
def test_three_terms_equal_their_direct_sums(make, weighting, particles):
    model = make()
    x = torch.randn(5, 3 if isinstance(model, Parts) else 4)
    guide = AmortizedGuide(model, nn.Identity(), example=x)
    objective = BetaTCVAE(4.0, alpha=0.5, gamma=2.0, weighting=weighting, particles=particles, observations=20)
    estimate = seeded_estimate(objective, model, guide, x)
    torch.manual_seed(3)
    trace = run_programs(model, guide, (x,), particles).guide_trace.nodes["z"]
    z, fn = trace["value"], trace["fn"]
    if isinstance(model, Parts):  # plates (parts, data) in front
        z, q = z.T, dist.Normal(fn.loc.T[:5], fn.scale.T[:5])
        p = dist.Normal(0.0, model.scale.detach())
    else:
        q = dist.Normal(fn.base_dist.loc[:5], fn.base_dist.scale[:5])
        p = dist.Normal(0.0, 1.0)
    weights = torch.full((5, 5), 1 / 100)
    if weighting == "stratified":
        weights = torch.full((5, 5), 19 / 80).fill_diagonal_(1.0).div(torch.full((5, 5), 1.0).fill_diagonal_(20.0))
    expected = decomposition(q, p, z.view(particles, 5, 3), weights.log()).detach()
    names = ("mutual_information", "total_correlation", "dimension_wise_kl")
    came = torch.stack([estimate.metrics[name] for name in names])
    torch.testing.assert_close(came, expected)
    loss = estimate.metrics["distortion"] + (torch.tensor([0.5, 4.0, 2.0]) * expected).sum()
    torch.testing.assert_close(estimate.loss.detach(), loss)


@pytest.mark.parametrize("weighting", ["minibatch", "stratified"])
def test_three_terms_add_up_to_the_rate_at_the_draws(ppca, weighting):
    model, guide, x = ppca
    estimate = seeded_estimate(BetaTCVAE(1.0, weighting=weighting, observations=30), model, guide, x)
    torch.manual_seed(3)
    terms = run_programs(model, guide, (x,))  # log q - log p, not its closed form
    names = ("mutual_information", "total_correlation", "dimension_wise_kl")
    torch.testing.assert_close(sum(estimate.metrics[name] for name in names), terms.ratio.mean().detach())
    torch.testing.assert_close(estimate.loss, -terms.log_weights.mean())
    assert estimate.metrics["rate"] == seeded_estimate(ELBO(), model, guide, x).metrics["rate"]


def test_stratified_weights_of_all_data_give_the_exact_aggregate_posterior(ppca):
    """Guides that ignore x: no mutual information, and no correlation, whatever is drawn."""
    model, _, x = ppca

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.ones(len(x), 2), 0.5).to_event(1))

    metrics = BetaTCVAE(weighting="stratified").estimate(model, guide, x).metrics
    for name in ("mutual_information", "total_correlation"):
        torch.testing.assert_close(metrics[name], torch.zeros(()), atol=1e-12, rtol=0)
    minibatch = BetaTCVAE().estimate(model, guide, x).metrics
    assert minibatch["mutual_information"].item() == pytest.approx(math.log(6))  # as the docstring says: too high


def test_size_of_the_data_shifts_minibatch_weighting_by_a_constant(ppca):
    model, guide, x = ppca
    losses = [seeded_estimate(BetaTCVAE(6.0, observations=n), model, guide, x).loss for n in (None, 600)]
    # log q(z) falls by log 100 and so does each of two log q(z_j): mutual information +1, correlation -1 + 2, rest -2.
    shift = (1 + 6 * (2 - 1) - 2) * math.log(100)
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(shift))
    first, second = (torch.autograd.grad(loss, [*guide.parameters()]) for loss in losses)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


# As objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_every_parameter_gets_a_gradient(objective):
    model = LatentVariableModel(Normal(3), Bernoulli(MLP(3, (1, 2, 2), (8,))))
    guide = AmortizedGuide(model, MLP((1, 2, 2), 8, (8,)))
    module = objective(model, guide)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # some starts are saddles
        optimizer.zero_grad()
        module(torch.rand(6, 1, 2, 2).round()).backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def with_fixed_draws(objective):
    """The objective, drawing the same at every estimate, however it is run."""

    class Fixed(type(objective)):  # type: ignore[misc]
        def estimate(self, *given):
            torch.manual_seed(11)
            return super().estimate(*given)

    fixed = object.__new__(Fixed)
    fixed.__dict__.update(objective.__dict__)
    return fixed


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_module_svi_and_fit_give_the_same_loss(ppca, objective):
    model, guide, x = ppca
    x = x[Batches((x,), None, 6, 0).order(0)]  # so that fit, which shuffles, sees the rows as they are
    fixed = with_fixed_draws(objective)
    loss = fixed(model, guide)(x).item()
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), loss=fixed)
        assert svi.step(x) == pytest.approx(loss, rel=1e-12)
        assert svi.evaluate_loss(x) == pytest.approx(loss, rel=1e-12)
    inverse = torch.argsort(Batches((x,), None, 6, 0).order(0))
    run = fit(model, guide, fixed, x[inverse], steps=1, batch_size=6, progress=False)
    assert run.history["loss"][0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "columns"),
    [
        (WAE(), ["distortion", "mmd"]),
        (WAE(cost="squared error"), ["squared_error", "distortion", "mmd"]),
        (InfoVAE(), ["distortion", "rate", "mmd"]),
        (BetaTCVAE(), ["distortion", "rate", "mutual_information", "total_correlation", "dimension_wise_kl"]),
    ],
)
def test_training_logs_every_figure(ppca, objective, columns):
    model, guide, _ = ppca
    run = fit(model, guide, objective, torch.randn(40, 4), epochs=2, batch_size=16, progress=False)
    assert [*run.history.columns][2 : 3 + len(columns)] == ["loss", *columns]
    assert run.history[columns].notna().all(axis=None)
    assert run.objective.observations == 40 and run.objective.step == 6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_description_builds_an_equal_objective(ppca, objective):
    model, guide, x = ppca
    again = build(describe(objective))
    torch.testing.assert_close(
        seeded_estimate(again, model, guide, x).loss, seeded_estimate(objective, model, guide, x).loss
    )


def test_wae_has_no_bound(ppca):
    model, guide, x = ppca
    assert WAE.validates_as is None
    with pytest.raises(ValueError, match=r"bounds no log-likelihood; evaluate estimates it"):
        WAE().bound(model, guide, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WAE(-1.0), "weight cannot be negative, got -1.0"),
        (lambda: WAE(cost="l2"), "cost is None, 'squared error' or 'absolute error', got 'l2'"),
        (lambda: InfoVAE(0.2, 0.5), r"cannot be negative, got -0.3; with alpha=0.2 choose a weight of at least 0.8"),
        (lambda: BetaTCVAE(-2.0), "beta cannot be negative"),
        (lambda: BetaTCVAE(gamma=-2.0), "gamma cannot be negative"),
        (lambda: BetaTCVAE(weighting="all"), "weighting is 'minibatch' or 'stratified', got 'all'"),
        (lambda: WAE(particles=0), "particles must be a whole number of at least 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family", [Flow, MultivariateNormal, Delta])
def test_betatcvae_names_a_guide_whose_values_are_not_independent(family):
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 4)))
    guide = AmortizedGuide(model, nn.Identity(), family)
    with pytest.raises(ValueError, match=r"the guide's distribution at site 'z'.*independent values"):
        BetaTCVAE().prepare(model, guide, torch.randn(3, 4))


def test_betatcvae_names_a_guide_whose_density_holds_for_its_own_draws_only():
    def scalar(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(4, 1)
    guide = AmortizedGuide(scalar, nn.Identity(), SemiImplicit, example=x)
    with pytest.raises(ValueError, match=r"the guide's distribution at site 'z', a SemiImplicit"):
        BetaTCVAE().prepare(scalar, guide, x)


def test_betatcvae_names_a_prior_whose_values_are_not_independent():
    model = LatentVariableModel(MultivariateNormal(2), NormalLikelihood(MLP(2, 4)))
    with pytest.raises(ValueError, match=r"the model's distribution at site 'z'.*independent values"):
        BetaTCVAE().prepare(model, AmortizedGuide(model, nn.Identity()), torch.randn(3, 4))


@pytest.mark.parametrize("cost", ["squared error", "absolute error"])
def test_wae_takes_a_generator_for_a_decoder(cost):
    decoder = MLP(2, 4)
    model = LatentVariableModel(StandardNormal(2), Implicit(4, context=2, noise=0, network=decoder))
    guide, x = AmortizedGuide(model, nn.Linear(4, 3), Delta, example=torch.zeros(2, 4)), torch.randn(5, 4)
    found = WAE(cost=cost).estimate(model, guide, x).metrics[cost.replace(" ", "_")]
    error = x - decoder(guide(x)["z"])
    expected = error.square() if cost == "squared error" else error.abs()
    torch.testing.assert_close(found, expected.sum(-1).mean())


def test_betatcvae_needs_one_site():
    x = torch.randn(4, 3)
    guide = AmortizedGuide(Hierarchy(), nn.Identity(), example=x)
    with pytest.raises(ValueError, match=r"one per-observation latent site.*\['z', 'u'\]"):
        BetaTCVAE().prepare(Hierarchy(), guide, x)


@pytest.mark.parametrize("objective", [WAE(), InfoVAE()], ids=["WAE", "InfoVAE"])
def test_matching_needs_sites_that_can_be_compared(objective):
    def masked(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=x > 0):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def shared(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def by_data(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            y = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if y is x:
                pyro.sample("late", dist.Normal(torch.zeros(()), 1.0))

    x = torch.randn(4)
    for model, message in (
        (masked, "'z' is masked"),
        (shared, "the model has none in the plate"),
        (by_data, r"\['late'\] only when something is observed"),
    ):

        def guide(x, model=model):
            if model is shared:
                pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
                return
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0))
                if model is by_data:
                    pyro.sample("late", dist.Normal(x, 1.0))

        with pytest.raises(ValueError, match=message):
            objective.prepare(model, guide, x)


def test_wae_names_a_likelihood_without_a_mean():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            flow = dist.TransformedDistribution(dist.Normal(z, 1.0).to_event(1), [dist.transforms.SigmoidTransform()])
            pyro.sample("x", flow, obs=x)

    guide = AmortizedGuide(model, nn.Identity(), example=torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"TransformedDistribution at the observed site 'x' has none"):
        WAE(cost="squared error").prepare(model, guide, torch.rand(4, 2))
    assert WAE().estimate(model, guide, torch.rand(4, 2)).loss.isfinite()


def test_default_kernel_is_that_of_the_paper(ppca):
    model, guide, x = ppca
    assert WAE().kernel == InfoVAE().kernel == InverseMultiquadraticKernel()
    for objective in (WAE(), InfoVAE()):
        named = type(objective)(kernel=InverseMultiquadraticKernel())
        assert seeded_estimate(named, model, guide, x).loss == seeded_estimate(objective, model, guide, x).loss

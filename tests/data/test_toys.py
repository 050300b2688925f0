import math
from typing import Any

import pyro
import pyro.poutine as poutine
import pytest
import torch

from pyrogen.data import EightSchools, FourPoints, LinearGaussian, grid, ring

TOYS = [
    (LinearGaussian(latent=2, observed=4), {"z": (2,)}),
    (LinearGaussian(latent=3, observed=1), {"z": (3,)}),
    (EightSchools(), {"mu": (), "tau": (), "eta": (8,)}),
    (FourPoints(), {"z": (2,)}),
    (ring(), {}),
    (grid(), {}),
]
IDS = [f"{type(toy).__name__} {i}" for i, (toy, _) in enumerate(TOYS)]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("toy", "latents"), TOYS, ids=IDS)
def test_a_toy_is_a_program_as_the_contract_has_it(toy, latents):
    x = toy.x[:7]
    trace = poutine.trace(toy.model).get_trace(x)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert set(sites) == {*latents, "x", "data"}
    assert sites["x"]["is_observed"] and sites["x"]["fn"].batch_shape == (len(x),)
    assert sites["x"]["value"].shape == x.shape
    for name, shape in latents.items():
        assert sites[name]["value"].shape == (len(x), *shape)
        assert [frame.name for frame in sites[name]["cond_indep_stack"]] == ["data"]
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize(("toy", "latents"), TOYS, ids=IDS)
def test_without_the_observation_only_the_length_is_read(toy, latents):
    blank = torch.full((5, *toy.x.shape[1:]), float("nan"))
    trace = poutine.trace(poutine.uncondition(toy.model)).get_trace(blank)
    value = trace.nodes["x"]["value"]
    assert value.shape == blank.shape and value.isfinite().all()


@pytest.mark.parametrize(("toy", "latents"), TOYS, ids=IDS)
def test_particles_stand_in_a_plate_outside(toy, latents):
    def particles(x):
        with pyro.plate("particles", 3, dim=-2):
            toy.model(x)

    trace = poutine.trace(particles).get_trace(toy.x[:6])
    trace.compute_log_prob()
    for name, shape in latents.items():
        value: Any = trace.nodes[name]["value"]
        assert value.shape == (3, len(toy.x[:6]), *shape)
    log_prob: Any = trace.nodes["x"]["log_prob"]
    assert log_prob.shape == (3, len(toy.x[:6]))


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_linear_gaussian_obeys_bayes_rule(scale):
    """log p(x) = log p(x, z) - log p(z | x) at any z, which ties model, posterior and evidence."""
    toy = LinearGaussian(latent=2, observed=5, scale=scale, seed=1)
    x = toy.sample(6, seed=7).double()
    for z in (torch.zeros(6, 2), torch.randn(6, 2), 3 * torch.randn(6, 2)):
        trace = poutine.trace(poutine.condition(toy.model, data={"z": z.double()})).get_trace(x)
        trace.compute_log_prob()
        joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        evidence = joint - toy.posterior(x).log_prob(z.double())
        torch.testing.assert_close(evidence, toy.log_likelihood(x), rtol=1e-9, atol=1e-9)


def test_linear_gaussian_by_hand():
    toy = LinearGaussian(latent=1, observed=1, scale=0.5)
    w, x = toy.weight.item(), 1.3
    variance = w**2 + 0.25
    expected = -0.5 * (x**2 / variance + math.log(2 * math.pi * variance))
    point = torch.tensor([[x]], dtype=torch.float64)
    assert toy.log_likelihood(point).item() == pytest.approx(expected, abs=1e-12)
    posterior = toy.posterior(point)
    assert posterior.mean.item() == pytest.approx(w * x / variance, abs=1e-12)
    assert posterior.variance.item() == pytest.approx(0.25 / variance, abs=1e-12)


def test_linear_gaussian_samples_have_the_exact_covariance():
    toy = LinearGaussian()
    n = 100_000
    x = toy.sample(n, seed=5).double()
    exact = toy.weight.double() @ toy.weight.double().T + 0.25 * torch.eye(4)
    diagonal = exact.diagonal()
    deviation = ((diagonal[:, None] * diagonal + exact**2) / n).sqrt()
    # 10 covariances and 4 means within five standard deviations: fails once in 1e5 seeds.
    assert ((x.T @ x / n - exact).abs() < 5 * deviation).all()
    assert (x.mean(0).abs() < 5 * (diagonal / n).sqrt()).all()


def test_linear_gaussian_follows_its_seed():
    a, b, c = LinearGaussian(), LinearGaussian(), LinearGaussian(seed=1)
    assert torch.equal(a.weight, b.weight) and torch.equal(a.x, b.x)
    assert not torch.equal(a.weight, c.weight)
    assert LinearGaussian(observations=10).x.shape == (10, 4)
    assert repr(a) == "LinearGaussian(latent=2, observed=4, scale=0.5, seed=0, observations=1000)"


def test_linear_gaussian_gives_gradients_to_x():
    toy = LinearGaussian()
    x = toy.x[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(toy.log_likelihood(x).sum(), x)
    # Fisher's identity in closed form: the score is -(x - W E[z | x]) / scale^2.
    expected = -(x - toy.posterior(x).mean @ toy.weight.T) / toy.scale**2
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent to be at least 1, got 0"),
        ({"observations": 0}, "observations to be at least 1, got 0"),
        ({"scale": 0.0}, "scale, a standard deviation, to be positive, got 0.0"),
    ],
)
def test_linear_gaussian_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussian(**options)


def test_eight_schools_agrees_with_the_published_grid():
    exact = EightSchools().exact
    assert exact.log_evidence == pytest.approx(-12.711, abs=5e-4)
    assert exact.mean_mu == pytest.approx(0.776, abs=5e-4)
    assert exact.sd_mu == pytest.approx(0.324, abs=5e-4)
    assert exact.mean_abs_tau == pytest.approx(0.702, abs=5e-4)
    assert exact.mean_tau == pytest.approx(0.0, abs=1e-12)


def test_the_program_of_eight_schools_has_the_exact_evidence():
    """Importance sampling with the exact conditional of eta: weights depend on mu and tau alone."""
    toy, n = EightSchools(), 200_000
    x, s = toy.x.double(), toy.scale.double()
    mu, tau = torch.randn(2, n, dtype=torch.float64)
    precision = 1 + (tau[:, None] / s) ** 2
    mean = tau[:, None] / s**2 * (x - mu[:, None]) / precision
    eta = mean + torch.randn(n, 8, dtype=torch.float64) / precision.sqrt()
    log_q = torch.distributions.Normal(mean, precision.rsqrt()).log_prob(eta).sum(-1)
    latents = {"mu": mu, "tau": tau, "eta": eta}
    trace = poutine.trace(poutine.condition(toy.model, data=latents)).get_trace(x.expand(n, 8))
    trace.compute_log_prob()
    log_w = trace.nodes["x"]["log_prob"] + trace.nodes["eta"]["log_prob"] - log_q
    w = log_w.exp()
    deviation = w.std() / n**0.5
    # Five standard deviations fail once in 2e6 seeds.
    assert abs(w.mean() - math.exp(toy.exact.log_evidence)) < 5 * deviation
    assert deviation / w.mean() < 0.02, "the check is sharp"


def test_four_points_attain_their_bound():
    toy = FourPoints(repeats=1)
    assert toy.x.dtype == torch.bool and toy.x.flatten(1).sum(1).tolist() == [1, 1, 1, 1]
    assert toy.log_likelihood_bound == pytest.approx(-1.3862943611)
    quadrants = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    x = toy.x.double()
    given = []  # log p(x | quadrant); all four have probability 1/4 under the prior
    for z in quadrants:
        trace = poutine.trace(poutine.condition(toy.model, data={"z": z.expand(4, 2)})).get_trace(x)
        trace.compute_log_prob()
        given.append(trace.nodes["x"]["log_prob"])
    log_p = torch.stack(given).logsumexp(0) - math.log(4)
    assert (log_p < toy.log_likelihood_bound).all() and (log_p > toy.log_likelihood_bound - 1e-7).all()


def test_four_points_repeat_each_image_alike():
    images, counts = FourPoints(repeats=9).x.unique(dim=0, return_counts=True)
    assert len(images) == 4 and counts.tolist() == [9] * 4
    with pytest.raises(ValueError, match="repeats to be at least 1, got 0"):
        FourPoints(repeats=0)

"""Annealed importance sampling and its sandwich against log-likelihoods that are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyrogen.data import LinearGaussian
from pyrogen.distributions import Implicit, StandardNormal
from pyrogen.distributions.implicit import NoDensityError
from pyrogen.evaluation import annealed_importance_sampling, annealing, bidirectional_monte_carlo, importance_sampling
from pyrogen.inference import AmortizedGuide, tracing
from pyrogen.models import LatentVariableModel, ProbabilisticPCA


def ppca(latent=3, observed=8):
    torch.manual_seed(0)
    model = ProbabilisticPCA(latent, observed)
    with torch.no_grad():
        model.log_scale.fill_(math.log(0.5))
    return model


def test_within_a_fifth_of_a_nat_with_errors_that_cover_it():
    """50 repeats, as rows of one call: squared errors over their variances are a chi-squared, 1e-6 off either side."""
    model = ppca()
    x = torch.randn(1, 8).expand(50, -1)
    found = annealing(model, x, chains=32, steps=100)
    off = found.log_likelihood - model.log_likelihood(x)
    assert off.abs().mean() < 0.2
    squares = (off / found.standard_error).square().sum()
    assert stats.chi2.ppf(1e-6, 50) < squares < stats.chi2.ppf(1 - 1e-6, 50)
    assert 0.6 < found.acceptance.mean() < 0.9
    assert (found.effective_sample_size >= 1).all() and (found.effective_sample_size <= 32).all()


def test_weights_are_unbiased_however_few_the_steps():
    model = ppca().double()
    x = torch.randn(2, 8, dtype=torch.float64)
    found = annealing(model, x, chains=4000, steps=10, leapfrogs=3)
    off = found.log_likelihood - model.log_likelihood(x)
    assert (off.abs() < 5 * found.standard_error).all() and found.standard_error.max() < 0.2


def test_the_sandwich_holds_the_entropy_of_the_data():
    r"""E log p(x) = −½ log det(2πe (W Wᵀ + σ² I)), which the model's own observations have on average.

    Of 300 observations the gap was 4.1 nats with 10 steps and 0.25 ± 0.04 with 100.
    """
    model, count = ppca(), 150
    few, many = (bidirectional_monte_carlo(model, torch.zeros(count, 8), chains=4, steps=s) for s in (10, 100))
    covariance = model.weight @ model.weight.T + model.scale.square() * torch.eye(8)
    exact = -0.5 * torch.logdet(2 * math.pi * math.e * covariance).item()
    slack = 5 * math.sqrt(8 / 2 / count)  # log p(x) has the variance of χ²(8) / 2
    assert many.lower.mean() - slack < exact < many.upper.mean() + slack
    assert 0 < many.gap < 0.25 + 5 * many.standard_error and many.gap + 5 * many.standard_error < few.gap


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def repeats(x):
    """Three latents for each observation, in a plate to the left of it."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("repeats", 3, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.movedim(0, 1))


def idle(x):
    """The prior of a latent is masked where x is not positive: there it is drawn from it all the same."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(x > 0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def idle_values(x):
    """The same for the second of two values."""
    with pyro.plate("data", len(x)):
        prior = dist.Normal(torch.zeros(len(x), 2), 1.0).mask(torch.tensor([True, False])).to_event(1)
        pyro.sample("x", dist.Normal(pyro.sample("z", prior).sum(-1), 1.0), obs=x)


def named(x):
    """What is between latent and observation has a name."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.deterministic("m", 2 * z, event_dim=0), 1.0), obs=x)


def normal(variance):
    return lambda x: dist.Normal(0.0, variance**0.5).log_prob(x)


LINE = torch.tensor([0.5, -1.0, 2.0])
KNOWN = {
    "positive": (counts, torch.tensor([0.0, 1.0, 4.0]), lambda x: dist.GammaPoisson(3.0, 2.0).log_prob(x)),
    "hierarchical": (chain, LINE, normal(3.0)),
    "nested plate": (
        repeats,
        torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0)),
        lambda x: normal(2.0)(x).sum((1, 2)),
    ),
    "masked": (idle, LINE, normal(2.0)),
    "masked values": (idle_values, LINE, normal(3.0)),
    "deterministic": (named, LINE, normal(5.0)),
}


@pytest.mark.parametrize(("model", "x", "exact"), KNOWN.values(), ids=KNOWN.keys())
def test_programs_of_many_forms(model, x, exact):
    """Of data, and on average of 400 observations of the model's own, with the entropy of 5000 others between."""
    found = annealing(model, x, chains=64, steps=30, leapfrogs=5)
    off = (found.log_likelihood - exact(x)).abs()
    assert (off <= 5 * found.standard_error + 1e-5).all() and off.max() < 0.3
    both = bidirectional_monte_carlo(model, x[:1].expand(400, *x.shape[1:]), chains=2, steps=3, leapfrogs=3)
    program = pyro.poutine.uncondition(model)
    drawn = pyro.poutine.trace(program).get_trace(x[:1].expand(5000, *x.shape[1:])).nodes["x"]["value"]
    log_p = exact(drawn.movedim(1, 0) if model is repeats else drawn)
    slack = 5 * log_p.std() / 20
    assert both.lower.mean() - slack < log_p.mean() < both.upper.mean() + slack
    assert both.gap > 3 * both.standard_error > 0


def test_rows_seeds_and_the_random_state():
    model, x = ppca(), torch.randn(5, 8)
    state = torch.get_rng_state()
    first = annealed_importance_sampling(model, x, chains=4, steps=5, leapfrogs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, annealed_importance_sampling(model, x, chains=4, steps=5, leapfrogs=2, seed=3))
    assert not torch.equal(first, annealed_importance_sampling(model, x, chains=4, steps=5, leapfrogs=2, seed=4))
    assert annealed_importance_sampling(model, x, chains=4, steps=5, rows=8).shape == (5,)
    assert annealing(model, x, chains=1, steps=5).standard_error.isnan().all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def broken(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sqrt(), 1.0, validate_args=False), obs=x)


def test_what_has_no_annealed_estimate_is_refused():
    x = torch.zeros(3, 2)

    def shared(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    for held, came in ((None, "none"), ({"s": torch.tensor(0.0)}, r"\['s'\]")):
        with pytest.raises(ValueError, match=rf"expected held to have values of \['t'\], got {came}"):
            annealing(shared, x, held=held)
    exact = dist.Normal(0.5, 2**0.5).log_prob(x[:, 0])
    found = annealed_importance_sampling(shared, x, chains=64, steps=50, held={"t": torch.tensor(0.5)})
    assert (found - exact).abs().max() < 0.2

    def flat(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    for estimate in (annealing, bidirectional_monte_carlo):
        with pytest.raises(ValueError, match="the model has none: its log-likelihood is exact"):
            estimate(flat, x)
        generator = LatentVariableModel(StandardNormal(2), Implicit(2, context=2, noise=0))
        with pytest.raises(NoDensityError, match=r"needs log p\(x, z\).*\['x'\] is implicit"):
            estimate(generator, x)
        for name in ("chains", "steps", "leapfrogs"):
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
                estimate(ppca(), x, **{name: 0})
        with pytest.raises(ArithmeticError, match="log-likelihood of a chain is NaN"):
            estimate(broken, torch.ones(3), chains=8, steps=2)


def test_what_is_printed():
    model = ppca()
    assert "with 4 chains of 5 steps" in str(annealing(model, torch.randn(3, 8), chains=4, steps=5))
    assert "a gap of" in str(bidirectional_monte_carlo(model, torch.randn(3, 8), chains=4, steps=5))


def test_chains_of_one_observation_go_in_parts():
    """Never more rows than asked for go through the model, and all parts count, each with draws of its own."""
    model, most = ppca().double(), []
    x = torch.randn(2, 8, dtype=torch.float64)

    def watched(x):
        most.append(len(x))
        return model(x)

    found = annealing(watched, x, chains=1000, steps=10, leapfrogs=3, rows=300)
    assert max(most) == 300
    off = found.log_likelihood - model.log_likelihood(x)
    assert (off.abs() < 5 * found.standard_error).all()
    # Repeated draws would be worth no more than a part of them, three times less.
    one = annealing(model, x, chains=300, steps=10, leapfrogs=3, rows=300)
    assert (found.effective_sample_size > 2 * one.effective_sample_size).all()
    both = bidirectional_monte_carlo(watched, x, chains=700, steps=100, rows=300)
    assert max(most) == 300 and (both.lower < both.upper + 0.1).all() and both.gap < 0.5


@pytest.mark.parametrize("kind", ["annealing", "bidirectional", "importance"])
def test_compiled_figures_are_the_figures(kind, traced_only, monkeypatch):
    graphs = []
    made = tracing.Traced._made

    def noted(*given):
        graphs.append(given)
        return made(*given)

    monkeypatch.setattr(tracing, "UNCOMPILED", 2)
    monkeypatch.setattr(tracing.Traced, "_made", noted)
    toy = LinearGaussian()
    guide = AmortizedGuide(toy.model, nn.Linear(4, 8))

    def figures(compile: bool) -> list:
        short: dict = {"chains": 4, "steps": 10, "rows": 20, "compile": compile}
        if kind == "annealing":  # six observations in parts of five and one
            return [*vars(annealing(toy.model, toy.x[:6], **short)).values()][:4]
        if kind == "bidirectional":
            return [*vars(bidirectional_monte_carlo(toy.model, toy.x[:6], **short)).values()][:2]
        # A row with 20 copies at a time, and at last two rows with ten, of which the fifth is one alone again.
        found = importance_sampling(toy.model, guide, toy.x[:5], particles=70, rows=20, compile=compile)
        return [*vars(found).values()][:3]

    expected = figures(compile=False)
    assert not graphs
    for known, found in zip(expected, figures(compile=True), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)
    assert len(graphs) == (1 if kind == "importance" else 4)

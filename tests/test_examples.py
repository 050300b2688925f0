"""Every example runs as a user runs it, with few steps, and prints what its documentation says.

That few steps do not spoil a point is no concern here; the exact answers that the examples compare with are, and are
checked against other ways to get them.
"""

import importlib.util
import math
import runpy  # noqa: TID251 (the examples of this repository)
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pyro import poutine

from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.models import LatentVariableModel

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "two_sites": ["found", "true", "share[0] * share[1]", "log p(x) of test data"],
    "swapping_priors": ["standard normal", "mixture", "VampPrior", "flow", "less than the truth"],
    "comparing_guides": [
        "mean field",
        "mean field, IWAE",
        "full covariance",
        "mixture",
        "flow",
        "exact log p(x): -1.3",
    ],
    "posterior_with_arviz": ["hdi_3%", "eta[0, 7]", "flow, weighted", "Pareto k", "exact"],
    "implicit_guide": ["normal, ELBO", "implicit, AVB", "rate, held out", "no model is better than -1.386"],
    "prior_afterwards": ["autoencoder, N(0, I)", "VAE, mixture of ten", "reconstructions", "coverage"],
    "constrained_and_global": ["exact mean", "exact sd", "rate, counts ["],
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)  # noqa: TID251 (as above)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_example_runs(name, monkeypatch, capsys):
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "3"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert [text for text in PRINTED[name] if text not in printed] == []


@pytest.mark.parametrize("name", PRINTED)
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


def test_two_sites_exact_distribution(parameter_store):
    # The covariance of 400 000 draws from the program itself. Its entries are at most 2.6, so their standard errors at
    # most 2.6 · √(2 / 400 000) = 0.006; 5 of these for 16 entries: failure rate below 1e-5.
    program = load("two_sites").TwoLevels(share=(1.5, 1.0), spread=0.6, noise=0.5)
    with torch.no_grad():
        exact = program.exact().covariance_matrix
        assert exact.max() < 2.9
        drawn = poutine.uncondition(program)(torch.zeros(400_000, 4))
    torch.testing.assert_close(torch.cov(drawn.T), exact, rtol=0, atol=0.033)


def test_comparing_guides_exact_log_likelihood():
    # Brute force over a grid of both latents.
    module, x = load("comparing_guides"), torch.tensor([[-2.0], [0.1], [3.0]])
    grid = torch.linspace(-7.0, 7.0, 1401, dtype=torch.float64)
    products = torch.outer(grid, grid)
    log_prior = -0.5 * (grid**2).unsqueeze(0) - 0.5 * (grid**2).unsqueeze(1) - math.log(2 * math.pi)
    log_x = torch.distributions.Normal(products, module.NOISE).log_prob(x.double().unsqueeze(-1))
    expected = (log_prior + log_x).flatten(1).logsumexp(-1) + 2 * math.log(0.01)
    torch.testing.assert_close(module.exact_log_likelihood(x), expected, rtol=0, atol=1e-6)


def test_constrained_and_global_exact_posterior():
    # Self-normalised importance sampling from the prior of b: log p(x | b) with each rate integrated out by torch's own
    # negative binomial. The posterior is 0.1 wide under a prior 1.4 wide, so 400 000 draws are worth some 20 000, and
    # the mean's standard error is below 0.001: 6 of these, failure rate below 1e-8.
    module = load("constrained_and_global")
    x = torch.poisson(torch.full((30, module.COUNTS), 3.0))
    mean, spread, _, _ = module.exact_posterior_of_b(x)
    b = torch.distributions.Gamma(2.0, 1.0).sample((400_000,)).double()
    # A gamma-mixed Poisson total of n counts is negative binomial with success probability n / (n + b).
    totals = torch.distributions.NegativeBinomial(module.SHAPE, probs=module.COUNTS / (module.COUNTS + b))
    log_w = sum(totals.log_prob(total) for total in x.sum(-1).double())
    weights = torch.softmax(torch.as_tensor(log_w), 0)
    assert 1 / (weights**2).sum() > 20_000
    found = (weights * b).sum()
    assert abs(found - mean) < 0.006
    assert abs((weights * (b - found) ** 2).sum().sqrt() - spread) < 0.006


def test_implicit_guide_exact_log_likelihood():
    # The best model, of which each image takes a quarter; the grid's points on an axis all go to one side.
    class Quarters(torch.nn.Module):
        def forward(self, z):
            on = torch.nn.functional.one_hot(2 * (z[..., 0] > 0).long() + (z[..., 1] > 0).long(), 4)
            return (40.0 * on - 20.0).reshape(*z.shape[:-1], 1, 2, 2)

    module = load("implicit_guide")
    model = LatentVariableModel(StandardNormal(2), Bernoulli(Quarters()))
    found = module.exact_log_likelihood(model, torch.eye(4).reshape(4, 1, 2, 2))
    assert found == pytest.approx(-math.log(4), abs=2e-3)


def test_posterior_with_arviz_moments():
    mu, tau, weights = np.array([1.0, 3.0]), np.array([-2.0, 2.0]), np.array([0.25, 0.75])
    expected = {"E mu": 2.5, "sd mu": math.sqrt(0.75), "E tau": 1.0, "E |tau|": 2.0}
    assert load("posterior_with_arviz").moments(mu, tau, weights) == pytest.approx(expected)

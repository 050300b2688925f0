"""Implicit guides and priors on programs whose posterior is known exactly, by adversarial variational Bayes.

    OMP_NUM_THREADS=1 python benchmarks/posteriors.py

- ``linear``: x = W z + noise with d = 2, D = 4, an implicit guide. Errors of the posterior means and of the covariances
  of each of 256 observations, relative to the exact ones.
- ``schools``: eight schools with two mirrored modes in τ; implicit guides for μ and τ | μ, and for η | μ, τ, which
  given these is normal, a normal one through layers of its own. The weight of the latent term falls to 1 from above, so
  that both modes are there before the likelihood parts them. ``Normal`` under the ELBO, beside it, finds only one.
- ``points``: four one-hot images, a decoder that is learned; the exact log-likelihood by quadrature, at most −log 4.
- ``sites``: two latent sites, of which the guide's first is explicit and the second implicit given the first.
- ``prior``: an implicit prior that is learned, with a normal guide; the true prior is N((1, −1), diag(.6², 1)).

Each has the bound that it shall meet beside it.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyrogen as pg
from pyrogen.data import EightSchools, FourPoints, LinearGaussian
from pyrogen.distributions import Bernoulli, Implicit, Normal, StandardNormal
from pyrogen.inference import AVB, ELBO, AmortizedGuide, CriticOptions, LinearSchedule, Objective, Run
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

FAMILY = partial(Implicit, hidden=(64, 64))
CRITIC = partial(Critic, hidden=(64, 64))
ADAM = partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True)
"""The settings of Mescheder et al. (2017): without the usual momentum."""


def train(model: Any, guide: Any, objective: Objective, data: Tensor, seed: int, **options: Any) -> Run:
    settings: dict[str, Any] = {
        "optimizer": ADAM,
        "learning_rate": 1e-3,
        "critic": CriticOptions(learning_rate=3e-3),
        "schedule": "linear",
        "average": 0.998,
    }
    return pg.fit(model, guide, objective, data, seed=seed, progress=False, **(settings | options))


@torch.no_grad()
def draws_of(run: Run, x: Tensor, n: int) -> dict[str, Tensor]:
    """Posterior draws of each site, ``(n, B, *event_shape)``."""
    return pg.evaluation.posterior_samples(run.model, run.guide, x, n)


def covariance(z: Tensor) -> Tensor:
    """Covariances over the first dimension of ``(n, B, d)``: ``(B, d, d)``."""
    centred = z - z.mean(0)
    return torch.einsum("nbi,nbj->bij", centred, centred) / (len(z) - 1)


def relative(found: Tensor, exact: Tensor) -> float:
    """The mean size of the error over the mean size of what is exact, both by observation."""
    return float((found - exact).flatten(1).norm(dim=1).mean() / exact.flatten(1).norm(dim=1).mean())


def linear(seed: int, share: float) -> dict[str, tuple[float, str, bool]]:
    toy = LinearGaussian()
    guide = AmortizedGuide(toy.model, nn.Linear(4, 8), FAMILY)
    run = train(toy.model, guide, AVB(8, critic=CRITIC), toy.x, seed, steps=round(2500 * share), batch_size=32)
    x = toy.x[:256]
    z, exact = draws_of(run, x, 4000)["z"], toy.posterior(x)
    mean = relative(z.mean(0), exact.mean)
    spread = relative(covariance(z), exact.covariance_matrix.expand(len(x), 2, 2))
    return {
        "mean error": (mean, "<= 0.02", mean <= 0.02),
        "covariance error": (spread, "<= 0.08", spread <= 0.08),
    }


class LayeredNormal(nn.Module):
    """A mean-field normal whose parameters are a multilayer perceptron of the context."""

    def __init__(self, features: int | tuple[int, ...], context: int) -> None:
        super().__init__()
        self.features = features
        self.context = context
        self.layers, self.normal = MLP(context, 64, (64,), activation=nn.SiLU), Normal(features, 64)

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        return self.normal(nn.functional.silu(self.layers(context)))


def schools(seed: int, share: float) -> dict[str, tuple[float, str, bool]]:
    toy, found = EightSchools(), {}
    annealed = LinearSchedule(max(1, round(1500 * share)), start=6.0, end=1.0)
    implicit: dict[str, Any] = {"mu": FAMILY, "tau": FAMILY, "eta": LayeredNormal}
    fits: list[tuple[Any, Objective, int, float]] = [
        (implicit, AVB(64, beta=annealed, critic=CRITIC), 5000, 6e-3),
        (Normal, ELBO(64), 3000, 3e-3),
    ]
    for family, objective, steps, rate in fits:
        guide = AmortizedGuide(toy.model, nn.Linear(8, 8), family)
        run = train(
            toy.model,
            guide,
            objective,
            toy.x.repeat(100, 1),  # so that an epoch has a hundred steps
            seed,
            steps=round(steps * share),
            batch_size=1,
            learning_rate=rate,
            critic=CriticOptions(learning_rate=1e-2),
        )
        drawn = draws_of(run, toy.x, 20_000)
        mu, tau = drawn["mu"], drawn["tau"]
        values = {
            "E mu": (mu.mean(), toy.exact.mean_mu, 0.05),
            "sd mu": (mu.std(), toy.exact.sd_mu, 0.05),
            "E |tau|": (tau.abs().mean(), toy.exact.mean_abs_tau, 0.07),
            "E tau": (tau.mean(), toy.exact.mean_tau, 0.1),
        }
        if family is implicit:
            for name, (value, exact, bound) in values.items():
                found[name] = (float(value), f"{exact:.3f} +- {bound}", abs(float(value) - exact) <= bound)
        else:
            value, exact, bound = values["E tau"]
            found["Normal E tau"] = (float(value), "one mode alone", abs(float(value) - exact) > bound)
    return found


def points(seed: int, share: float) -> dict[str, tuple[float, str, bool]]:
    toy = FourPoints()
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 2, 2), (64, 64))))
    guide = AmortizedGuide(model, MLP((1, 2, 2), 16, (32,)), FAMILY)
    run = train(model, guide, AVB(8, critic=CRITIC), toy.x, seed, steps=round(4000 * share), batch_size=64)
    axis = torch.linspace(-6, 6, 481)
    z = torch.cartesian_prod(axis, axis)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * (axis[1] - axis[0]).log()
    with torch.no_grad():
        likelihood = run.model.likelihood(z)  # type: ignore[operator]
        values = [torch.logsumexp(likelihood.log_prob(x.float()) + log_prior, 0) for x in toy.x[:4]]
    log_p = float(torch.stack(values).mean())
    return {"log p(x)": (log_p, ">= -1.45", log_p >= -1.45)}


class TwoSites(PyroModule):
    """a ~ N(0, 1), b ~ N(a, 1), x ~ N((a + b, b), 0.5²)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([a + b, b], -1), 0.5).to_event(1), obs=x)

    @staticmethod
    def posterior(x: Tensor) -> dist.MultivariateNormal:
        prior = torch.linalg.inv(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
        shown = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        inverse = torch.linalg.inv(prior + shown.T @ shown / 0.25)
        return dist.MultivariateNormal(x @ shown @ inverse / 0.25, covariance_matrix=inverse)


def sites(seed: int, share: float) -> dict[str, tuple[float, str, bool]]:
    model = TwoSites()
    a = torch.randn(1000, 1)
    b = a + torch.randn(1000, 1)
    x = torch.cat([a + b, b], -1) + 0.5 * torch.randn(1000, 2)
    guide = AmortizedGuide(model, nn.Linear(2, 8), {"a": Normal, "b": FAMILY})
    run = train(model, guide, AVB(8, critic=CRITIC), x, seed, steps=round(3000 * share), batch_size=32)
    z = torch.cat([*draws_of(run, x[:256], 4000).values()], -1)
    exact = model.posterior(x[:256])
    mean = relative(z.mean(0), exact.mean)
    spread = relative(covariance(z), exact.covariance_matrix.expand(256, 2, 2))
    return {"mean error": (mean, "<= 0.04", mean <= 0.04), "covariance error": (spread, "<= 0.1", spread <= 0.1)}


class ImplicitPrior(PyroModule):
    """z ~ p(z), a learned implicit distribution; x ~ N(z, 0.5²)."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = Implicit(2, hidden=(32, 32))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def prior(seed: int, share: float) -> dict[str, tuple[float, str, bool]]:
    location, scale = torch.tensor([1.0, -1.0]), torch.tensor([0.6, 1.0])
    model = ImplicitPrior()
    x = location + scale * torch.randn(4000, 2) + 0.5 * torch.randn(4000, 2)
    guide = AmortizedGuide(model, nn.Linear(2, 8), Normal)
    run = train(model, guide, AVB(4, critic=CRITIC), x, seed, steps=round(4000 * share), batch_size=64)
    with torch.no_grad():
        drawn = run.model.prior().sample((20_000,))  # type: ignore[operator]
    found = torch.stack([drawn.mean(0), drawn.std(0)])
    precision = 1 / scale.square() + 4
    z = draws_of(run, x[:256], 2000)["z"]
    mean = relative(z.mean(0), (location / scale.square() + 4 * x[:256]) / precision)
    spread = float((z.std(0).mean(0) * precision.sqrt() - 1).abs().max())
    error = float((found - torch.stack([location, scale])).abs().max())
    return {
        "prior's moments": (error, "<= 0.1", error <= 0.1),
        "posterior means": (mean, "<= 0.05", mean <= 0.05),
        "posterior scales": (spread, "<= 0.1", spread <= 0.1),
    }


PROBLEMS: dict[str, Callable[[int, float], dict[str, tuple[float, str, bool]]]] = {
    "linear": linear,
    "schools": schools,
    "points": points,
    "sites": sites,
    "prior": prior,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    arguments = parser.parse_args()
    print("python", *sys.argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {os.cpu_count()} cores")
    for name in arguments.problems:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            started = time.perf_counter()
            found = PROBLEMS[name](seed, arguments.share)
            seconds = time.perf_counter() - started
            for figure, (value, bound, holds) in found.items():
                mark = "" if holds else "  MISSED"
                print(f"{name:8} seed {seed}  {figure:20} {value:8.3f}  {bound:16} {seconds:5.0f} s{mark}", flush=True)


if __name__ == "__main__":
    main()

"""Ten sick fits and ten healthy ones: does ``diagnose`` name the sickness, and is it silent where all is well?

    OMP_NUM_THREADS=1 python benchmarks/diagnosis.py

Every fit is a real one on a small problem, sick by a real cause: too large or too small a weight of the latent term, a
decoder that can do without z, a critic with next to no learning rate or 500 times the program's, adversarial
training without a penalty, an overfitted scale or one that was never fitted. A sick fit is judged rightly if its
sickness is among the names (others may be consequences of it), a healthy one if nothing is found.

Thresholds were chosen, and the sick fits made sick, on seeds below 80; the default's begin at 100. More than two wrong
judgements of the twenty end it with exit status 1.
"""

import argparse
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import ConditionalAutoRegressiveNN, PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import pyrogen as pg
from pyrogen.data import Data, grid, ring
from pyrogen.distributions import (
    Bernoulli,
    Flow,
    Implicit,
    Normal,
    NormalLikelihood,
    QuantizedNormal,
    StandardNormal,
)
from pyrogen.evaluation.diagnosis import Diagnosis, diagnose
from pyrogen.inference import (
    AAE,
    AVB,
    ELBO,
    GAN,
    IWAE,
    AmortizedGuide,
    CriticOptions,
    Hybrid,
    LinearSchedule,
    Logistic,
    Objective,
    Run,
)
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

SHAPE, WIDTH = (1, 8, 8), 128
BINARY, GRAY = pg.data.load("digits"), pg.data.load("digits", binarize=None)
OCTAVES, R1 = 4, 0.02
WRONG = 2
"""How many may be judged wrongly."""
Fitted = tuple[Run, Any]
"""A run, and its data unless these can be loaded again."""


def digits(
    objective: Objective,
    seed: int,
    *,
    family: Any = Normal,
    latent: int = 8,
    likelihood: nn.Module | None = None,
    data: Data = BINARY,
    **options: Any,
) -> Fitted:
    likelihood = likelihood or Bernoulli(MLP(latent, SHAPE, (WIDTH,)))
    model = LatentVariableModel(StandardNormal(latent), likelihood)
    guide = AmortizedGuide(model, nn.Sequential(MLP(SHAPE, WIDTH, (WIDTH,)), nn.ReLU()), family)
    options = {"epochs": 40, "learning_rate": 2e-3} | options
    return pg.fit(model, guide, objective, data, seed=seed, device="cpu", progress=False, **options), data


class Autoregressive(nn.Module):
    """Pixel by pixel, each given those before it and z: a decoder that needs no z."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        order = torch.arange(math.prod(SHAPE))
        self.network = ConditionalAutoRegressiveNN(len(order), latent, [256], param_dims=[1], permutation=order)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> "PixelByPixel":
        return PixelByPixel(self.network, z)


class PixelByPixel(dist.TorchDistribution):
    support = constraints.independent(constraints.boolean, len(SHAPE))
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, network: nn.Module, z: Tensor) -> None:
        self.network, self.z = network, z
        super().__init__(z.shape[:-1], torch.Size(SHAPE), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PixelByPixel":
        return PixelByPixel(self.network, self.z.expand(*batch_shape, self.z.shape[-1]))

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.flatten(-len(SHAPE))
        return dist.Bernoulli(logits=self.network(x, self.z)).log_prob(x).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        z = self.z.expand(*sample_shape, *self.z.shape)
        x = z.new_zeros(*z.shape[:-1], math.prod(SHAPE))
        for pixel in range(x.shape[-1]):
            x[..., pixel] = torch.bernoulli(self.network(x, z)[..., pixel].sigmoid())
        return x.unflatten(-1, SHAPE)


class TwoSites(PyroModule):
    """Two numbers for the kind of an image, and given these eight for the image."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.decoder = MLP(2, 16, (32,)), MLP(8, SHAPE, (WIDTH,))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            loc, raw = self.middle(kind).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, 0.1 + F.softplus(raw)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(len(SHAPE)), obs=x)


def two_sites(seed: int) -> Fitted:
    model = TwoSites()
    encoder = nn.Sequential(MLP(SHAPE, WIDTH, (WIDTH,)), nn.ReLU())
    guide = AmortizedGuide(model, encoder, example=torch.zeros(2, *SHAPE))
    return pg.fit(
        model, guide, ELBO(), BINARY, epochs=60, learning_rate=2e-3, seed=seed, device="cpu", progress=False
    ), BINARY


class Residual(nn.Module):
    """z and a multilayer perceptron that starts small."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(2, 2, (64, 64))
        nn.init.normal_(self.network.layers[-1].weight, std=0.01)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        return z + self.network(z)


class Encoder(nn.Module):
    """Features of x, and x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(2, 64, (64,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.network(x).relu()], -1)


class Waves(nn.Module):
    """A critic that is also shown the waves of its samples, by which it sees narrow modes early."""

    def __init__(self, features: int | tuple[int, ...], context: int = 0) -> None:
        super().__init__()
        size = features if isinstance(features, int) else math.prod(features)
        self.critic = Critic((1 + 2 * OCTAVES) * size, context, hidden=(64, 64), activation=nn.ReLU)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        waves = (z.unsqueeze(-1) * 2.0 ** torch.arange(OCTAVES)).flatten(-2)
        return self.critic(torch.cat([z, waves.sin(), waves.cos()], -1), context)


def plane(
    objective: Objective,
    seed: int,
    x: Tensor,
    generator: nn.Module,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    critic_learning_rate: float | None = None,
    **options: Any,
) -> Fitted:
    x = x / x.std()
    model = LatentVariableModel(StandardNormal(2), Implicit(2, context=2, noise=0, network=generator))
    run = pg.fit(
        model,
        AmortizedGuide(model, Encoder()) if objective.uses_guide else None,
        objective,
        x,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True),
        critic=CriticOptions(learning_rate=critic_learning_rate),
        seed=seed,
        device="cpu",
        progress=False,
        **options,
    )
    return run, x


def small(features: int | tuple[int, ...], context: int = 0) -> Critic:
    return Critic(features, context, hidden=(64, 64))


def without_penalty(seed: int, x: Tensor) -> Fitted:
    return plane(GAN(critic=small), seed, x, MLP(2, 2, (64, 64)), steps=1500)


def few_digits(seed: int) -> Fitted:
    """A hundred binary images taken for real numbers, whose scale is learned."""
    train = BINARY.prepare(BINARY.train[:100])
    validation, test = BINARY.validation.float(), BINARY.test.float()
    data = Data("a hundred digits", train=train, validation=validation, test=test, values="real")
    likelihood = NormalLikelihood(MLP(8, SHAPE, (256,)), scale="shared")
    return digits(ELBO(), seed, likelihood=likelihood, data=data, epochs=400, batch_size=32)


def hybrid() -> Hybrid:
    return Hybrid(
        log_likelihood=0.0,
        reconstruction=20.0,
        visible_samples=3.0,
        visible_ratio=partial(Logistic, r1=R1),
        critic=Waves,
    )


AVERAGED: dict[str, Any] = {"schedule": "linear", "average": 0.99}


def ring_of(scale: float) -> Callable[[int], Tensor]:
    return lambda seed: ring(scale=scale).sample(10_000, seed)


@dataclass(frozen=True)
class Case:
    """A fit from a seed, and what is wrong with it; None for a healthy one."""

    name: str
    expected: str | None
    fit: Callable[[int], Fitted]


CASES = [
    Case(
        "implicit guide, beta rising to 30",
        "posterior collapse",
        lambda s: digits(
            AVB(4, beta=LinearSchedule(steps=250, end=30.0)), s, family=Implicit, epochs=15, batch_size=64
        ),
    ),
    Case(
        "autoregressive decoder",
        "posterior collapse",
        lambda s: digits(ELBO(), s, latent=16, likelihood=Autoregressive(16), epochs=30, learning_rate=1e-2),
    ),
    Case(
        "GAN, critic's learning rate 1e-9",
        "critic failure",
        lambda s: plane(GAN(critic=small), s, ring_of(0.05)(s), Residual(), steps=600, critic_learning_rate=1e-9),
    ),
    Case(
        "AAE, critic's learning rate 1",
        "critic failure",
        lambda s: digits(AAE(), s, family=Implicit, epochs=30, critic=CriticOptions(learning_rate=1.0)),
    ),
    Case("GAN without penalty, ring", "mode dropping", lambda s: without_penalty(s, ring_of(0.02)(s))),
    Case("GAN without penalty, grid", "mode dropping", lambda s: without_penalty(s, grid().sample(10_000, s))),
    Case("beta 0.001", "prior hole", lambda s: digits(ELBO(beta=1e-3), s)),
    Case("AAE of weight 0.001", "prior hole", lambda s: digits(AAE(weight=1e-3), s, family=Implicit, epochs=30)),
    Case("100 images, learned scale", "overconfident likelihood", few_digits),
    Case(
        "fixed scale 2",
        "uninformative likelihood",
        lambda s: digits(ELBO(), s, data=GRAY, likelihood=NormalLikelihood(MLP(8, SHAPE, (WIDTH,)), 2.0)),
    ),
    Case("VAE", None, lambda s: digits(ELBO(), s)),
    Case("VAE, 50 latent units", None, lambda s: digits(ELBO(), s, latent=50)),
    Case("IWAE", None, lambda s: digits(IWAE(8), s)),
    Case("flow guide", None, lambda s: digits(ELBO(), s, family=Flow, epochs=30)),
    Case("AVB, implicit guide", None, lambda s: digits(AVB(4), s, family=Implicit, epochs=15, batch_size=64)),
    Case("AAE", None, lambda s: digits(AAE(), s, family=Implicit)),
    Case("two sites", None, two_sites),
    Case(
        "quantised normal",
        None,
        lambda s: digits(ELBO(), s, data=GRAY, likelihood=QuantizedNormal(MLP(8, SHAPE, (WIDTH,)), 17)),
    ),
    Case(
        "Hybrid, ring",
        None,
        lambda s: plane(
            hybrid(), s, ring_of(0.05)(s), Residual(), steps=2000, batch_size=128, learning_rate=2e-3, **AVERAGED
        ),
    ),
    Case(
        "WGAN-GP, ring",
        None,
        lambda s: plane(
            GAN("wasserstein-gp", critic=Waves),
            s,
            ring_of(0.1)(s),
            Residual(),
            steps=1800,
            learning_rate=2e-3,
            **AVERAGED,
        ),
    ),
]


def judge(case: Case, seed: int) -> tuple[Diagnosis, bool, float, float]:
    """What is said of a case, whether that is right, and the seconds that fit and diagnosis took."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a training says itself that its critic has won
        run, data = case.fit(seed)
    fitted = time.perf_counter()
    found = diagnose(run, data)
    right = not found if case.expected is None else case.expected in found.names
    return found, right, fitted - started, time.perf_counter() - fitted


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=100, help="of the first case; each has one of its own")
    parser.add_argument("--cases", nargs="+", type=int, default=[*range(len(CASES))], help="by number, from 0")
    parser.add_argument("--verbose", action="store_true", help="print the evidence too")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    processor = platform.processor() or platform.machine()
    print("python " + " ".join(sys.argv))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor}, {os.cpu_count()} cores")
    print(f"{'fit':36}{'expected':26}{'seconds':>16}  right  said")
    score = 0
    for number in arguments.cases:
        case = CASES[number]
        found, right, fit, look = judge(case, arguments.seed + number)
        score += right
        said = ", ".join(found.names) or "nothing"
        print(
            f"{case.name:36}{case.expected or 'nothing':26}{fit:8.1f} +{look:6.1f}  {'yes' if right else 'NO':7}{said}",
            flush=True,
        )
        if arguments.verbose or found.unchecked:
            print("    " + str(found).replace("\n", "\n    "))
    print(f"{score} of {len(arguments.cases)} right")
    if len(arguments.cases) - score > WRONG:
        sys.exit(f"expected no more than {WRONG} wrong")


if __name__ == "__main__":
    main()

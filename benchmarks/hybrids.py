"""VAE, AVB, AAE, VGH, VGH++ and GAN on MNIST and colour MNIST: pictures, and the marginal KL of each.

    OMP_NUM_THREADS=1 python benchmarks/hybrids.py --root DATA --out hybrids

All fits of a data set have one architecture, one optimizer and one likelihood. MNIST's pixels are put above or below
one half, for a Bernoulli likelihood and fully connected networks; colours stay 8-bit levels, of a normal around the
output of a convolutional decoder. A critic sees the likelihood's mean; a GAN is the same model without a guide. All
guides but the VAE's are implicit. For each data set there is a picture of samples, one of reconstructions, and a table
of test data:

- ``marginal KL`` is an estimate of KL(q(z) ‖ p(z)) by a critic fitted afterwards, with an explicit guide too; "> x" is
  beyond what such critics are trusted with.
- ``log p(x)``, in nats, is by importance sampling, where the guide is implicit with an explicit one fitted to the
  frozen model. It is that of a likelihood which VGH and VGH++ were not trained by.
- ``l1`` is the distance of data and reconstruction, a mean over values in [0, 1].
- ``accuracy`` is that of the critic in visible space, over the last epoch.
"""

import argparse
import dataclasses
import math
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyrogen as pg
from pyrogen.data import Data
from pyrogen.data.dataset import Binarization
from pyrogen.distributions import Bernoulli, Implicit, Normal, QuantizedNormal, StandardNormal
from pyrogen.evaluation import evaluate, held_out_marginal_kl_estimate, reconstruct, sample
from pyrogen.experiment.figures import reconstructions, samples
from pyrogen.inference import (
    AAE,
    AVB,
    ELBO,
    GAN,
    VGH,
    AlphaGAN,
    AmortizedGuide,
    CriticOptions,
    Objective,
    Run,
    VGHPlusPlus,
)
from pyrogen.inference.contrasts import CriticBuilder
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, ConvDecoder, ConvEncoder, Critic

LATENT, SCALE = {"mnist": 10, "color_mnist": 20}, 0.1
HIDDEN, CHANNELS, HEAD = (256, 256), (32, 32), 256
OPTIMIZER = partial(torch.optim.Adam, betas=(0.5, 0.999))
SHOWN = 64
BINARIZE: dict[str, Binarization | None] = {"mnist": "threshold", "color_mnist": None}


CRITICS: dict[str, CriticBuilder] = {
    "mnist": partial(Critic, hidden=HIDDEN, channels=()),
    "color_mnist": partial(Critic, hidden=(HEAD,), channels=CHANNELS),
}
FITS: dict[str, tuple[type[nn.Module] | None, Callable[[CriticBuilder], Objective]]] = {
    "VAE": (Normal, lambda critic: ELBO()),
    "AVB": (Implicit, lambda critic: AVB(2, critic=critic)),
    "AAE": (Implicit, lambda critic: AAE(critic=critic)),
    "VGH": (Implicit, lambda critic: VGH(critic=critic)),
    "VGH++": (Implicit, lambda critic: VGHPlusPlus(reconstruction=0.1, critic=critic)),
    "GAN": (None, lambda critic: GAN(r1=1.0, critic=critic)),
    "AlphaGAN": (Implicit, lambda critic: AlphaGAN(reconstruction=0.1, critic=critic)),
}


def programs(data: Data, family: type[nn.Module] | None) -> tuple[LatentVariableModel, AmortizedGuide | None]:
    encoder: nn.Module
    latent = LATENT[data.name]
    if data.levels is None:
        likelihood: nn.Module = Bernoulli(MLP(latent, data.event_shape, HIDDEN))
        encoder = MLP(data.event_shape, HIDDEN[-1], HIDDEN[:-1])
    else:
        # Far outside of [0, 1] a location no longer moves the mean, by which alone a GAN or a VGH teaches it.
        decoder = nn.Sequential(ConvDecoder(latent, data.event_shape, CHANNELS, hidden=(HEAD,)), nn.Sigmoid())
        likelihood = QuantizedNormal(decoder, data.levels, scale=SCALE)
        encoder = ConvEncoder(data.event_shape, HEAD, CHANNELS, hidden=())
    model = LatentVariableModel(StandardNormal(latent), likelihood)
    if family is None:
        return model, None
    return model, AmortizedGuide(model, nn.Sequential(encoder, nn.ReLU()), family)


def train(name: str, data: Data, arguments: argparse.Namespace) -> Run:
    family, objective = FITS[name]
    torch.manual_seed(arguments.seed)
    return pg.fit(
        *programs(data, family),
        objective(CRITICS[data.name]),
        data,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer=OPTIMIZER,
        critic=CriticOptions(learning_rate=arguments.learning_rate),
        schedule=arguments.schedule,
        average=0.99,
        seed=arguments.seed,
        validate_every=10**6,
        progress=False,
    )


def row(name: str, run: Run, test: Tensor, arguments: argparse.Namespace) -> str:
    """A line of the table; what is not defined is a dash."""
    log_p, l1 = math.nan, math.nan
    marginal = "-"
    if run.guide is not None:
        log_p = evaluate(
            run,
            test[: arguments.evaluated],
            parts="likelihood",
            particles=arguments.particles,
            explicit_steps=arguments.explicit_steps,
            ratio_steps=0,
        ).log_likelihood
        rebuilt: Any = reconstruct(run.model, run.guide, test)
        l1 = float((rebuilt - test).abs().mean())
        marginal = held_out_marginal_kl_estimate(run.model, run.guide, test).shown
    accuracy = run.history.get("accuracy_visible")
    figures = [
        f"{run.seconds:8.0f}",
        f"{marginal:>22}",
        f"{_figure(log_p, '.1f'):>10}",
        f"{_figure(l1, '.4f'):>8}",
        f"{_figure(math.nan if accuracy is None else accuracy.iloc[-1], '.2f'):>9}",
    ]
    return f"{name:10}" + "".join(figures)


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Train all fits on one data set; write the pictures and print the table."""
    data = pg.data.load(name, root=arguments.root, binarize=BINARIZE[name])
    data = dataclasses.replace(
        data,
        train=data.train[: arguments.rows],
        validation=data.validation[:100],  # a fit looks at them after its last epoch
        train_labels=None,
        validation_labels=None,
        source={},
    )
    test = pg.data.as_float(data.test[: arguments.test])
    print(f"\n{name}, {arguments.epochs} epochs of {len(data.train)} images, figures of {len(test)} test images")
    print(f"{'':10}{'seconds':>8}{'marginal KL, estimate':>22}{'log p(x)':>10}{'l1':>8}{'accuracy':>9}", flush=True)
    drawn: dict[str, Any] = {}
    rebuilt: dict[str, Any] = {}
    for fit in arguments.fits:
        run = train(fit, data, arguments)
        drawn[fit] = sample(run, SHOWN, mean=True)
        if run.guide is not None:
            rebuilt[fit] = reconstruct(run.model, run.guide, test[:SHOWN])
        print(row(fit, run, test, arguments), flush=True)
    for figure, kind in (
        (samples(drawn, test[:SHOWN]), "samples"),
        (reconstructions(test, rebuilt), "reconstructions"),
    ):
        if figure is not None:
            figure.savefig(arguments.out / f"{name}-{kind}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["mnist", "color_mnist"]
    parser.add_argument("--data", nargs="+", default=names, choices=names)
    parser.add_argument("--root", default=None, help="where MNIST is, or is downloaded to")
    parser.add_argument("--fits", nargs="+", default=[*FITS][:6], choices=[*FITS])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of model, guide and critics")
    parser.add_argument("--schedule", default="constant", choices=["constant", "linear"], help="of these rates")
    parser.add_argument("--rows", type=int, default=None, help="train on the first so many images; by default on all")
    parser.add_argument("--test", type=int, default=4000, help="test images that l1 and the marginal KL are of")
    parser.add_argument("--evaluated", type=int, default=200, help="test images whose log p(x) is estimated")
    parser.add_argument("--particles", type=int, default=100, help="of that estimate")
    parser.add_argument(
        "--explicit-steps", type=int, default=300, help="of the explicit guide for it; 0 leaves it out of the table"
    )
    parser.add_argument("--out", type=Path, default=Path("hybrids"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name in arguments.data:
        compare(name, arguments)


if __name__ == "__main__":
    main()

"""What people rightly pass in another guise: numbers of numpy and torch, arrays, iterators, negative seeds."""

import numpy as np
import pytest
import torch

import pyrogen as pg
from pyrogen.configuration import describe
from pyrogen.distributions import Normal, NormalLikelihood, StandardNormal
from pyrogen.inference import (
    AAE,
    ALI,
    AVB,
    ELBO,
    GAN,
    VAEGAN,
    WAE,
    AlphaGAN,
    AmortizedGuide,
    BetaTCVAE,
    CriticOptions,
    FactorVAE,
    FitOptions,
    Hybrid,
    InfoVAE,
    Renyi,
    VGHPlusPlus,
)
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

X = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
MODEL = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, (4,))))
GUIDE = AmortizedGuide(MODEL, MLP(3, 4, (4,)))


def test_options_become_plain_numbers(tmp_path):
    critic = CriticOptions(steps=np.int64(2), warmup=np.int32(0), betas=np.array([0.5, 0.5]))
    counts = {"epochs": np.int64(1), "batch_size": torch.tensor(6), "loader_workers": np.int64(0)}
    run = pg.fit(
        MODEL, GUIDE, ELBO(), X, seed=np.int64(-3), critic=critic, **counts, out=tmp_path / "run", progress=np.False_
    )
    expected = FitOptions(epochs=1, batch_size=6, seed=-3, critic=CriticOptions(steps=2, betas=(0.5, 0.5)))
    assert run.options == expected
    assert type(run.options.seed) is type(run.options.batch_size) is type(run.options.critic.steps) is int
    assert pg.inference.load(tmp_path / "run").options == expected


@pytest.mark.parametrize("hidden", [np.array([8, 4]), torch.tensor([8, 4]), iter([8, 4]), {"a": 8, "b": 4}.values()])
def test_widths_come_as_any_numbers_in_order(hidden):
    network = MLP(np.int64(3), torch.Size([2]), hidden)
    assert network.hidden == (8, 4)
    assert [type(width) for width in network.hidden] == [int, int]
    assert network(X).shape == (12, 2)


@pytest.mark.parametrize("beta", [torch.tensor(0.5), np.array(0.5), np.float32(0.5)])
def test_a_weight_is_any_real_number(beta):
    losses = []
    for each in (beta, 0.5):
        torch.manual_seed(0)
        losses.append(ELBO(beta=each)(MODEL, GUIDE)(X))
    assert torch.equal(*losses)


WEIGHTS = [
    (ELBO, ("beta", "free_bits")),
    (Renyi, ("alpha",)),
    (WAE, ("weight",)),
    (InfoVAE, ("alpha", "weight")),
    (BetaTCVAE, ("beta", "alpha", "gamma")),
    (FactorVAE, ("gamma",)),
    (AAE, ("weight",)),
    (AVB, ("beta",)),
    (AlphaGAN, ("reconstruction",)),
    (VAEGAN, ("reconstruction",)),
    (VGHPlusPlus, ("reconstruction",)),
    (Hybrid, ("log_likelihood", "reconstruction", "latent", "visible_reconstructions", "visible_samples")),
    (GAN, ("r1", "gradient_penalty")),
    (ALI, ("r1", "gradient_penalty")),
]


@pytest.mark.parametrize("number", [np.array(0.5), np.float32(0.5)], ids=["array", "numpy"])
@pytest.mark.parametrize(("kind", "names"), WEIGHTS, ids=[kind.__name__ for kind, _ in WEIGHTS])
def test_weights_are_kept_as_plain_numbers(kind, names, number):
    plain, other = kind(**dict.fromkeys(names, 0.5)), kind(**dict.fromkeys(names, number))
    assert [type(getattr(other, name)) for name in names] == [float] * len(names)
    assert repr(other) == repr(plain) and describe(other) == describe(plain)


def test_a_weight_that_is_learned_stays_what_it_is():
    beta = torch.nn.Parameter(torch.tensor(0.5))
    assert ELBO(beta=beta).beta is beta and WAE(weight=beta).weight is beta


def test_a_comparison_takes_negative_seeds_and_says_what_data_it_needs():
    settings = {"encoder": MLP(3, 4, (4,)), "steps": 1, "parts": ["bound"], "progress": False}
    guides = {"a": (Normal, ELBO())}
    assert pg.compare(MODEL, guides, data=X, seed=np.int64(-2), **settings).shape[0] == 1
    with pytest.raises(TypeError, match=r"expected data as a tensor .* got str"):
        pg.compare(MODEL, guides, data="digits", **settings)


def test_a_gpu_out_of_memory_passes_as_it_is():
    class Encoder(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        AmortizedGuide(MODEL, Encoder())


def test_without_a_guide_a_function_says_what_it_needs_one_for():
    with pytest.raises(ValueError, match="there is no guide for them"):
        pg.evaluation.marginal_kl(MODEL, None, X)

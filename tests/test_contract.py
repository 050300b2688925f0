"""One contract for all: every prior with every posterior family and every likelihood trains a step and evaluates.

A new family, likelihood or objective joins by one line in a catalogue below.
"""

from functools import partial

import pytest
import torch

import pyrogen as pg
from pyrogen.configuration import build, describe
from pyrogen.distributions import (
    Bernoulli,
    CategoricalLikelihood,
    ContinuousBernoulli,
    Delta,
    DiscretizedLogisticMixture,
    Flow,
    Implicit,
    LaplaceLikelihood,
    Mixture,
    MultivariateNormal,
    Normal,
    NormalLikelihood,
    QuantizedNormal,
    StandardNormal,
    Vamp,
)
from pyrogen.evaluation import log_likelihood, rate_distortion
from pyrogen.inference import (
    AAE,
    ALI,
    AVB,
    ELBO,
    GAN,
    IWAE,
    VAEGAN,
    VGH,
    WAE,
    AlphaGAN,
    AmortizedGuide,
    BetaTCVAE,
    FactorVAE,
    Hybrid,
    InfoVAE,
    Renyi,
    VGHPlusPlus,
)
from pyrogen.inference.compilation import Compiled
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

LATENT, SHAPE = 3, (1, 4, 4)

PRIORS = {
    "standard normal": partial(StandardNormal, LATENT),
    "normal": partial(Normal, LATENT),
    "multivariate normal": partial(MultivariateNormal, LATENT),
    "mixture": partial(Mixture, LATENT, components=4),
    "vamp": partial(Vamp, LATENT, SHAPE, components=4),
    "flow": partial(Flow, LATENT),
    "coupling flow": partial(Flow, LATENT, transform="spline_coupling", layers=2),
}
FAMILIES = {
    "normal": Normal,
    "multivariate normal": MultivariateNormal,
    "mixture": partial(Mixture, components=4),
    "flow": Flow,
    "spline flow": partial(Flow, transform="spline_autoregressive", layers=2),
    "point mass": Delta,
}
LIKELIHOODS = {
    "Bernoulli": (Bernoulli, {}, "binary"),
    "continuous Bernoulli": (ContinuousBernoulli, {}, "unit"),
    "normal": (NormalLikelihood, {"scale": 0.5}, "unit"),
    "normal, shared scale": (NormalLikelihood, {"scale": "shared"}, "unit"),
    "normal, scale per pixel": (NormalLikelihood, {"scale": "per pixel"}, "unit"),
    "normal, optimal scale": (NormalLikelihood, {"scale": "optimal"}, "unit"),
    "Laplace": (LaplaceLikelihood, {}, "unit"),
    "quantized normal": (QuantizedNormal, {}, "levels"),
    "logistic mixture": (DiscretizedLogisticMixture, {"components": 2}, "levels"),
    "categorical": (CategoricalLikelihood, {}, "levels"),
}
CRITIC = partial(Critic, hidden=(8,))
EXPLICIT, ANY = ("normal",), ("normal", "implicit")
OBJECTIVES = {
    "ELBO": (partial(ELBO, 2), EXPLICIT),
    "IWAE": (partial(IWAE, 2), EXPLICIT),
    "Renyi": (partial(Renyi, 0.5, 2), EXPLICIT),
    "WAE": (partial(WAE, 5.0), ANY),
    "InfoVAE": (partial(InfoVAE, 0.5), EXPLICIT),
    "BetaTCVAE": (partial(BetaTCVAE, 4.0), EXPLICIT),
    "FactorVAE": (partial(FactorVAE, 2, critic=CRITIC), EXPLICIT),
    "AVB": (partial(AVB, 4, critic=CRITIC), ANY),
    "AVB, no contrast": (partial(AVB, 1, contrast="none", critic=CRITIC), ("implicit",)),
    "AAE": (partial(AAE, critic=CRITIC), ANY),
    "Hybrid": (partial(Hybrid, 4, reconstruction=1.0, visible_samples=1.0, critic=CRITIC), ANY),
    "AlphaGAN": (partial(AlphaGAN, critic=CRITIC), ANY),
    "VGH": (partial(VGH, critic=CRITIC), ANY),
    "VGHPlusPlus": (partial(VGHPlusPlus, critic=CRITIC), ANY),
    "VAEGAN": (partial(VAEGAN, 4, critic=CRITIC), ANY),
    "ALI": (partial(ALI, critic=CRITIC), ANY),
    "GAN": (partial(GAN, critic=CRITIC), ("none",)),
}
"""Each with the guides that it serves."""


def observations(values):
    x = torch.rand(6, *SHAPE)
    return {"binary": x.round(), "unit": x, "levels": (255 * x).round() / 255}[values]


def make_model(prior, likelihood):
    family, options, values = LIKELIHOODS[likelihood]
    decoder = MLP(LATENT, family.decoder_shape(SHAPE, **options), (8,))
    return LatentVariableModel(PRIORS[prior](), family(decoder, **options)), observations(values)


# A mixture of point masses is no density.
PAIRS = [(prior, family) for prior in PRIORS for family in FAMILIES if (prior, family) != ("vamp", "point mass")]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("prior", "family"), PAIRS)
def test_trains_a_step_and_evaluates(prior, family, likelihood):
    model, x = make_model(prior, likelihood)
    guide = AmortizedGuide(model, MLP(SHAPE, 8, (8,)), FAMILIES[family])
    before = [parameter.detach().clone() for parameter in model.likelihood.parameters()]
    run = pg.fit(model, guide, ELBO(), x, steps=1, batch_size=6, progress=False)
    assert torch.isfinite(torch.tensor(run.history["loss"][0]))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.likelihood.parameters(), strict=True))
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.isfinite().all()
    if family != "point mass":
        assert log_likelihood(run.model, run.guide, x, particles=3).isfinite().all()
        assert rate_distortion(run.model, run.guide, x).elbo.shape == (6,)


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(2), Renyi(0.5, 2)], ids=repr)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "point mass"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_parameter_gets_a_gradient(prior, family, objective):
    model, x = make_model(prior, "Bernoulli")
    guide = AmortizedGuide(model, MLP(SHAPE, 8, (8,)), FAMILIES[family])
    module = objective(model, guide)
    # Some starts are saddles (zero weights behind a layer): a step away from them every parameter counts.
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_mixture_of_point_masses_is_refused():
    model, _ = make_model("vamp", "Bernoulli")
    with pytest.raises(ValueError, match="mixture of point masses has no density"):
        AmortizedGuide(model, MLP(SHAPE, 8), Delta)


@pytest.mark.parametrize(("prior", "family"), PAIRS)
def test_description_builds_an_equal_model_and_guide(prior, family):
    model, x = make_model(prior, "Bernoulli")
    guide = AmortizedGuide(model, MLP(SHAPE, 8, (8,)), FAMILIES[family])
    again, its_guide = build(describe([model, guide]))
    assert repr(again) == repr(model) and repr(its_guide) == repr(guide)
    again.load_state_dict(model.state_dict())
    its_guide.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    expected = ELBO()(model, guide)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ELBO()(again, its_guide)(x), expected)


SERVED = [(objective, guide) for objective, (_, guides) in OBJECTIVES.items() for guide in guides]


def make_programs(guide):
    torch.manual_seed(2)
    model, x = make_model("normal", "Bernoulli")
    if guide == "none":
        return model, None, x
    return model, AmortizedGuide(model, MLP(SHAPE, 8, (8,)), Implicit if guide == "implicit" else Normal), x


def test_every_objective_is_in_the_catalogue():
    known = [
        name
        for name in pg.inference.__all__
        if isinstance(kind := getattr(pg.inference, name), type) and issubclass(kind, pg.inference.Objective)
    ]
    assert {*known} - {"Objective"} <= OBJECTIVES.keys()


@pytest.mark.parametrize(("name", "guide"), SERVED)
def test_every_objective_teaches_every_parameter(name, guide):
    model, guide, x = make_programs(guide)
    module = OBJECTIVES[name][0]()(model, guide)
    # As above: away from a start at which a whole layer has no gradient yet.
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(("name", "guide"), SERVED)
def test_every_objective_fits_saves_and_loads(name, guide, tmp_path):
    model, guide, x = make_programs(guide)
    run = pg.fit(model, guide, OBJECTIVES[name][0](), x, steps=2, batch_size=4, progress=False, out=tmp_path / "run")
    assert torch.isfinite(torch.tensor(run.history["loss"].iloc[-1]))
    again = pg.load(tmp_path / "run")
    assert describe(again.objective) == describe(run.objective) and repr(again.objective) == repr(run.objective)
    ours, theirs = run.programs.state_dict(), again.programs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "guide"), SERVED)
def test_every_objective_gives_the_same_again(name, guide):
    """Bit for bit, from the same seed, whatever random numbers were drawn in between."""
    runs = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model, its_guide, x = make_programs(guide)
        torch.rand(7)
        runs.append(pg.fit(model, its_guide, OBJECTIVES[name][0](), x, steps=4, batch_size=4, seed=3, progress=False))
    one, other = (run.programs.state_dict() for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    times = ["seconds", "rows_per_second"]
    assert runs[0].history.drop(columns=times).equals(runs[1].history.drop(columns=times))


def gradients_of(module, x, gradients):
    """The loss, the gradients by name and the figures from a seed, by a function that puts gradients in place."""
    torch.manual_seed(3)
    module.zero_grad(set_to_none=True)
    loss = gradients(x)
    return loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, module.latest.metrics


def check_traced(module, x):
    """Traced and as it is, an objective has the same loss, gradients and figures from the same random numbers."""

    def as_it_is(x):
        loss = module(x)
        loss.backward()
        return loss.detach()

    module(x)
    compiled = Compiled(module)
    known = gradients_of(module, x, as_it_is)
    traced = gradients_of(module, x, lambda x: compiled.backward(x).loss)
    assert compiled.why_not is None
    torch.testing.assert_close(traced, known, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "guide"), SERVED)
def test_every_objective_can_be_traced(name, guide, traced_only):
    model, guide, x = make_programs(guide)
    check_traced(OBJECTIVES[name][0]()(model, guide), x)


@pytest.mark.parametrize(("prior", "family"), [*zip(PRIORS, [*FAMILIES, "normal"], strict=True)])
def test_every_family_can_be_traced(prior, family, traced_only):
    for likelihood in LIKELIHOODS if prior == "normal" else ["Bernoulli"]:
        model, x = make_model(prior, likelihood)
        check_traced(ELBO(2)(model, AmortizedGuide(model, MLP(SHAPE, 8, (8,)), FAMILIES[family])), x)

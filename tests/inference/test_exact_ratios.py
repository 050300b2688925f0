"""With exact ratios in place of critics, losses and gradients are those of explicit losses written down by hand.

Posterior and prior are normal distributions that are programmed as samplers, so that objectives must ask their critics
while the densities are known here. The explicit losses have the same noise. A score has mean zero only in expectation,
so densities of the guide are held: only draws carry its gradient.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.nn import functional as F

from pyrogen.distributions.implicit import ImplicitDistribution
from pyrogen.inference import AAE, AVB, VGH, AlphaGAN, AmortizedGuide, VGHPlusPlus
from pyrogen.inference.adaptive import Reference
from pyrogen.inference.hybrids import Hybrid
from pyrogen.inference.ratios import Hinge, Logistic
from pyrogen.networks import Critic

SMALL = partial(Critic, hidden=(4,))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
KINDS = {"real": (1, False), "positive": (1, True), "plate": (3, False), "positive in a plate": (3, True)}
"""Number P of the elements of a nested plate, 1 without one, and whether the site is positive."""

REAL = ["real", "plate"]
WIDTH, FEATURES, N, ROWS = 4, 3, 2, 5

pytestmark = pytest.mark.usefixtures("float64")


def log_normal(u, mean, lower):
    """log N(u; mean, L Lᵀ) of ``(..., n)`` by the definition; L is ``(..., n, n)``."""
    white = (torch.linalg.inv(lower) @ (u - mean).unsqueeze(-1)).squeeze(-1)
    log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white.square() + torch.tensor(2 * torch.pi).log()).sum(-1) - log_det


class Noise:
    """Standard normal noise that remembers what it gave to draws with gradients."""

    def __init__(self):
        self.given = []

    def __call__(self, shape):
        noise = torch.randn(*shape, N)
        if torch.is_grad_enabled():
            self.given.append(noise)
        return noise


class Sampled(nn.Module):
    """N(m(c), L(c) L(c)ᵀ) with correlated values, as a sampler."""

    def __init__(self, features, context):
        super().__init__()
        self.features = features
        self.context = context
        self.linear = nn.Linear(context, 5)
        self.noise = Noise()

    def forward(self, context):
        mean, lower = moments(self.linear(context))
        return ImplicitDistribution(
            lambda shape: mean + (lower @ self.noise(shape).unsqueeze(-1)).squeeze(-1), mean.shape[:-1], (N,)
        )


class Shown(Sampled):
    """The same distribution with its density."""

    def forward(self, context):
        mean, lower = moments(self.linear(context))
        return dist.MultivariateNormal(mean, scale_tril=lower)


def moments(outputs):
    """Mean and lower triangle from five numbers."""
    mean, scale, below = outputs.split([2, 2, 1], -1)
    lower = torch.diag_embed((0.5 * scale).exp()) + F.pad(below.unsqueeze(-1), (0, 1, 1, 0))
    return mean, lower


class Program(PyroModule):
    """u ~ N(location, scale²) in each of P places, z = u or exp u, x ~ Bernoulli of a linear map of all z."""

    def __init__(self, kind, implicit):
        super().__init__()
        self.places, self.positive = KINDS[kind]
        self.implicit = implicit
        self.location = nn.Parameter(0.5 * torch.randn(self.places, N))
        self.log_scale = nn.Parameter(0.3 * torch.randn(self.places, N))
        self.weight = nn.Parameter(0.5 * torch.randn(self.places, N, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.noise, self.drawn = Noise(), []

    def prior(self):
        location, scale = self.location, self.log_scale.exp()
        location, scale = (v.unsqueeze(1) if self.places > 1 else v[0] for v in (location, scale))
        if self.implicit:
            return ImplicitDistribution(lambda s: location + scale * self.noise(s), location.shape[:-1], (N,))
        return (dist.LogNormal if self.positive else dist.Normal)(location, scale).to_event(1)

    def logits(self, z):
        """``(R, P, n)`` gives ``(R, D)``."""
        return torch.einsum("rpi,pij->rj", z, self.weight) + self.bias

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.places > 1:
                with pyro.plate("parts", self.places, dim=-2):
                    z = pyro.sample("z", self.prior()).movedim(0, 1)
            else:
                z = pyro.sample("z", self.prior()).unsqueeze(1)
            self.drawn.append(z.detach())
            pyro.sample("x", dist.Bernoulli(logits=self.logits(z)).to_event(1), obs=x)


class Exact(Logistic):
    """A log-ratio that is known; its critic is trained as ever, and not asked."""

    def __init__(self, learned, function):
        super().__init__(learned.critic)
        self.function = function

    def log_ratio(self, z, context=None):
        assert (context is None) == (self.critic.context == 0)
        return self.function(z, context)


class Problem:
    """Both programs with a batch, and their densities in places: ``(R, P, n)`` rows, elements of the plate, values."""

    def __init__(self, kind, implicit=False, particles=3, family=Sampled):
        torch.manual_seed(1)
        self.model, self.particles = Program(kind, implicit), particles
        self.guide = AmortizedGuide(self.model, nn.Linear(WIDTH, FEATURES), family)
        self.x = torch.rand(ROWS, WIDTH).round()
        self.rows = self.x.repeat(particles, 1)

    def own(self, noise):
        """Noise of a site in the order of this class."""
        return noise.movedim(0, 1) if self.model.places > 1 else noise.unsqueeze(1)

    def posterior(self, features, held):
        """Moments of q in all places, ``(..., P, n)`` and ``(..., P, n, n)``."""
        layers = [self.guide.conditionals["z"].linear]
        if self.model.places > 1:
            layers.insert(0, self.guide.contexts["z"].spread)
        for index, layer in enumerate(layers):
            weight, bias = (p.detach() if held else p for p in (layer.weight, layer.bias))
            features = F.linear(features, weight, bias)
            if index == 0 and self.model.places > 1:
                features = features.unflatten(-1, (self.model.places, -1))
        return moments(features if self.model.places > 1 else features.unsqueeze(-2))

    def log_q(self, u, features, held=True):
        """log q(u | features) in each place."""
        return log_normal(u, *self.posterior(features, held))

    def log_p(self, u, held=False):
        """log p(u) in each place."""
        location, log_scale = self.model.location, self.model.log_scale
        if held:
            location, log_scale = location.detach(), log_scale.detach()
        return log_normal(u, location, torch.diag_embed(log_scale.exp()))

    def log_aggregate(self, u, together):
        """log of the mean of q over the batch, ``(R)`` of all places ``together`` or ``(R, P)`` of each."""
        every = self.log_q(u.unsqueeze(1), self.guide.encoder(self.x).detach())
        every = every.sum(-1) if together else every
        return every.logsumexp(1) - torch.tensor(float(ROWS)).log()

    def draws(self):
        """What the guide drew, with gradients."""
        mean, lower = self.posterior(self.guide.encoder(self.rows), held=False)
        if isinstance(self.guide.conditionals["z"], Shown):
            noise = torch.linalg.inv(lower) @ (self.model.drawn[0] - mean).unsqueeze(-1)
            return mean + (lower @ noise.detach()).squeeze(-1)
        noise = self.guide.conditionals["z"].noise.given[0]
        return mean + (lower @ self.own(noise).unsqueeze(-1)).squeeze(-1)

    def prior_draws(self):
        """What an implicit prior drew, with gradients."""
        (noise,) = self.model.noise.given
        return self.model.location + self.model.log_scale.exp() * self.own(noise)

    def log_likelihood(self, u):
        logits = self.model.logits(u.exp() if self.model.positive else u)
        return (self.rows * logits - F.softplus(logits)).sum(-1)

    def parameters(self):
        return {**dict(self.model.named_parameters("model")), **dict(self.guide.named_parameters("guide"))}

    def compare(self, objective, expected):
        """See that an objective's loss and its gradients are those of an explicit loss, a function of nothing."""
        parameters = self.parameters()
        torch.manual_seed(2)
        self.guide.conditionals["z"].noise.given.clear()
        self.model.noise.given.clear()
        self.model.drawn.clear()
        module = objective(self.model, self.guide)
        module(self.x)
        estimate = module.latest
        ours = torch.autograd.grad(estimate.loss, [*parameters.values()])
        loss = expected()
        torch.testing.assert_close(estimate.of_program, loss.detach(), **CLOSE)
        for name, a, b in zip(parameters, ours, torch.autograd.grad(loss, [*parameters.values()]), strict=True):
            assert b.abs().max() > 1e-3, name
            torch.testing.assert_close(a, b, **CLOSE, msg=f"{{}} at {name}".format)


def gradient_only(value):
    return value - value.detach()


def teaching(log_ratio):
    """−E w log q/p along draws of the model, the sum over a plate ``(R, P)``; w ∝ q/p has the mean 1. No value."""
    weights = log_ratio.detach().exp()
    return gradient_only(-(weights / weights.mean() * log_ratio).sum(-1).mean())


class Contrasted:
    """The exact ratios of one site, in the order of its critics: ``(K, B, P, n)``."""

    def __init__(self, problem, monkeypatch):
        self.problem = problem
        self.places = problem.model.places
        original = Reference.of

        def kept(*args):
            self.reference = original(*args)
            return self.reference

        monkeypatch.setattr(Reference, "of", staticmethod(kept))

    def at(self, values, context, first):
        """Of numbers for all places the one that the end of the context tells."""
        if self.places == 1:
            return values.squeeze(-1)
        place = context[..., first:]
        assert place.shape[-1] == self.places
        return (values * place).sum(-1)

    def log_q(self, z, context):
        features = context[..., :FEATURES]
        assert context.shape[-1] == FEATURES + (self.places if self.places > 1 else 0)
        return self.at(self.problem.log_q(z.unsqueeze(-2), features), context, FEATURES)

    def log_p(self, z, context):
        return self.at(self.problem.log_p(z.unsqueeze(-2), held=True), context, 0)

    def both(self, z, context):
        place = context[..., FEATURES:]
        return self.log_q(z, context) - self.log_p(z, place)

    def against_prior(self, z, context):
        rows = z.reshape(-1, 1, N).expand(-1, self.places, -1)
        log_q = self.problem.log_aggregate(rows, together=False).reshape(*z.shape[:-1], self.places)
        return self.at(log_q, context, 0) - self.log_p(z, context)

    def whitened(self, log_density, white, context):
        """log of a density of whitened values over the standard normal one, by the change of variables."""
        mean, lower = self.reference.mean, self.reference.lower
        if lower.dim() == mean.dim():
            lower = torch.diag_embed(lower)
        z = mean + torch.einsum("...ij,...j->...i", lower, white)
        volume = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_density(z, context) + volume - log_normal(white, torch.zeros(N), torch.eye(N))

    def put_into(self, contrast):
        if contrast.of_both is not None:
            contrast.of_both = Exact(contrast.of_both, self.both)
        if contrast.of_guide is not None:
            contrast.of_guide.ratio = Exact(contrast.of_guide.ratio, partial(self.whitened, self.log_q))
        if contrast.of_model is not None:
            contrast.of_model.ratio = Exact(contrast.of_model.ratio, partial(self.whitened, self.log_p))
        if contrast.of_prior is not None:
            contrast.of_prior = Exact(contrast.of_prior, self.against_prior)


CONTRASTS = {
    "diagonal": partial(AVB, contrast="adaptive", covariance="diagonal"),
    "full": partial(AVB, contrast="adaptive", covariance="full"),
    "none": partial(AVB, contrast="none"),
}


def avb(make, problem, monkeypatch):
    objective = make(problem.particles, beta=0.7, critic=SMALL)
    objective.prepare(problem.model, problem.guide, problem.x)
    Contrasted(problem, monkeypatch).put_into(objective.critics["z"])
    return objective


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", CONTRASTS.values(), ids=CONTRASTS.keys())
def test_avb_of_an_implicit_guide(make, kind, monkeypatch):
    problem = Problem(kind)

    def expected():
        u = problem.draws()
        rate = (problem.log_q(u, problem.guide.encoder(problem.rows).detach()) - problem.log_p(u)).sum(-1)
        return (0.7 * rate - problem.log_likelihood(u)).mean()

    problem.compare(avb(make, problem, monkeypatch), expected)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("make", CONTRASTS.values(), ids=CONTRASTS.keys())
def test_avb_of_an_implicit_guide_and_an_implicit_prior(make, kind, monkeypatch):
    """The prior learns along its own draws."""
    problem = Problem(kind, implicit=True)

    def expected():
        u, own = problem.draws(), problem.prior_draws()
        held = problem.log_p(u, held=True)
        rate = (problem.log_q(u, problem.guide.encoder(problem.rows).detach()) - held).sum(-1)
        of_prior = teaching(problem.log_aggregate(own, together=False) - problem.log_p(own, held=True))
        return (0.7 * rate - problem.log_likelihood(u)).mean() + 0.7 * of_prior

    problem.compare(avb(make, problem, monkeypatch), expected)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("make", CONTRASTS.values(), ids=CONTRASTS.keys())
def test_avb_of_an_explicit_guide_and_an_implicit_prior(make, kind, monkeypatch):
    """With adaptive contrast the guide's own density is not held: it needs no critic."""
    problem = Problem(kind, implicit=True, family=Shown)

    def expected():
        u, own, features = problem.draws(), problem.prior_draws(), problem.guide.encoder(problem.rows)
        without_critic = make.keywords["contrast"] == "adaptive"
        log_q = problem.log_q(u, features if without_critic else features.detach(), held=not without_critic)
        of_prior = teaching(problem.log_aggregate(own, together=False) - problem.log_p(own, held=True))
        rate = (log_q - problem.log_p(u, held=True)).sum(-1)
        return (0.7 * rate - problem.log_likelihood(u)).mean() + 0.7 * of_prior

    problem.compare(avb(make, problem, monkeypatch), expected)


def marginal(problem, z):
    """log q(z)/p(z) of all places together, with parameters held: ``(R, P * n)`` gives ``(R)``."""
    u = z.reshape(-1, problem.model.places, N)
    return problem.log_aggregate(u, together=True) - problem.log_p(u, held=True).sum(-1)


def latent(objective, problem):
    """The objective with the exact marginal ratio."""
    objective.prepare(problem.model, problem.guide, problem.x)
    contrast = objective.critics["latent"]
    contrast.ratio = Exact(contrast.ratio, lambda z, context: marginal(problem, z))
    return objective


@pytest.mark.parametrize("kind", KINDS)
def test_aae_with_an_explicit_prior(kind):
    problem = Problem(kind)

    def expected():
        u = problem.draws()
        rate = problem.log_aggregate(u, together=True) - problem.log_p(u).sum(-1)
        return (0.7 * rate - problem.log_likelihood(u)).mean()

    problem.compare(latent(AAE(3, weight=0.7, critic=SMALL), problem), expected)


@pytest.mark.parametrize("kind", REAL)
def test_aae_with_an_implicit_prior(kind):
    problem = Problem(kind, implicit=True)

    def expected():
        u = problem.draws()
        of_prior = teaching(marginal(problem, problem.prior_draws()).unsqueeze(-1))
        return (0.7 * marginal(problem, u) - problem.log_likelihood(u)).mean() + 0.7 * of_prior

    problem.compare(latent(AAE(3, weight=0.7, critic=SMALL), problem), expected)


def of_data(x, context=None):
    """A known log-ratio of data to the model in visible space."""
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0])
    return (slope * x + 0.7 * x.square()).sum(-1) - 0.4


class Known(nn.Module):
    """A critic whose output is known, with a parameter so that it can be trained."""

    def __init__(self, shape, context):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, z, context=None):
        return of_data(z) + self.nothing


class KnownHinge(Hinge):
    """A critic that gives no log-ratio; a program minimises −T."""

    def __init__(self, critic):
        super().__init__(Known((WIDTH,), 0))


class KnownLogistic(Logistic):
    """A verdict is a log-ratio, not the non-saturating loss."""

    def __init__(self, critic):
        super().__init__(Known((WIDTH,), 0))


FIVE = {
    "log_likelihood": 0.7,
    "reconstruction": 0.3,
    "latent": 0.5,
    "visible_reconstructions": 1.3,
    "visible_samples": 1.7,
}
POINTS = {
    "five weights": (partial(Hybrid, 3, match="marginal", **FIVE), [*FIVE.values()], True),
    "not through the guide": (
        partial(Hybrid, 3, match="marginal", through_guide=False, **FIVE),
        [*FIVE.values()],
        False,
    ),
    "AlphaGAN": (partial(AlphaGAN, reconstruction=0.4), [0.0, 0.4, 1.0, 1.0, 1.0], False),
    "VGH": (VGH, [0.0, 0.0, 1.0, 1.0, 0.0], True),
    "VGH++": (partial(VGHPlusPlus, reconstruction=0.4), [0.0, 0.4, 1.0, 1.0, 1.0], True),
}


@pytest.mark.parametrize("visible", [KnownLogistic, KnownHinge])
@pytest.mark.parametrize(("make", "weights", "through_guide"), POINTS.values(), ids=POINTS.keys())
def test_hybrids_are_the_weighted_sum(make, weights, through_guide, visible):
    """Both verdicts are −T here: log p_model/p_data for a ratio, a generator's loss for a hinge critic."""
    problem = Problem("real", particles=make().particles)

    def expected():
        u = problem.draws()
        shown, held = (torch.sigmoid(problem.model.logits(z)) for z in (u, u.detach()))
        rate = problem.log_aggregate(u, together=True) - problem.log_p(u).sum(-1)
        terms = [
            -problem.log_likelihood(u).mean(),
            (problem.rows - shown).abs().sum(-1).mean(),
            rate.mean(),
            -of_data(shown if through_guide else held).mean(),
            -of_data(samples(problem, u)).mean() if weights[-1] else 0.0,
        ]
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    problem.compare(latent(make(critic=SMALL, visible_ratio=visible), problem), expected)


def samples(problem, u):
    """What the model showed at draws of its own, with gradients."""
    own = next(z for z in problem.model.drawn if not torch.equal(z, u))
    location, scale = problem.model.location, problem.model.log_scale.exp()
    noise = ((own - location) / scale).detach()
    return torch.sigmoid(problem.model.logits(location + scale * noise))


def test_a_hybrid_with_conditional_terms(monkeypatch):
    """All five weights, with the rate site by site."""
    problem = Problem("real")
    objective = Hybrid(3, critic=SMALL, visible_ratio=KnownLogistic, **FIVE)
    objective.prepare(problem.model, problem.guide, problem.x)
    Contrasted(problem, monkeypatch).put_into(objective.critics["z"])

    def expected():
        u = problem.draws()
        shown = torch.sigmoid(problem.model.logits(u))
        rate = (problem.log_q(u, problem.guide.encoder(problem.rows).detach()) - problem.log_p(u)).sum(-1)
        loss = (0.5 * rate - 0.7 * problem.log_likelihood(u)).mean() - 1.3 * of_data(shown).mean()
        return loss + 0.3 * (problem.rows - shown).abs().sum(-1).mean() - 1.7 * of_data(samples(problem, u)).mean()

    problem.compare(objective, expected)

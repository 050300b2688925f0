"""Implicit distributions: shapes, gradients, the untrained start, and what they say where a density is asked for."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to
from torch import nn
from torch.distributions import constraints

from pyrogen.configuration import build, describe
from pyrogen.distributions import Implicit, Normal
from pyrogen.distributions.implicit import ImplicitDistribution, NoDensityError, is_implicit
from pyrogen.inference import AmortizedGuide
from pyrogen.networks import MLP, ConvDecoder

FAMILIES = {
    "posterior": lambda: Implicit(3, 4),
    "injected": lambda: Implicit(3, 4, inject=True),
    "one hidden layer, injected": lambda: Implicit(3, 4, hidden=(8,), inject=True),
    "linear": lambda: Implicit(3, 4, hidden=()),
    "little noise": lambda: Implicit(3, 4, noise=2),
    "no noise": lambda: Implicit(3, 4, noise=0),
    "own network": lambda: Implicit(3, 4, noise=2, network=nn.Linear(6, 3)),
    "image": lambda: Implicit((2, 3, 5), 4),
    "scalar": lambda: Implicit((), 4),
    "generator": lambda: Implicit((1, 8, 8), 4, noise=0, network=ConvDecoder(4, (1, 8, 8))),
    "prior": lambda: Implicit(3),
    "prior, own network": lambda: Implicit(3, noise=2, network=MLP(2, 3)),
}


@pytest.fixture(params=list(FAMILIES.values()), ids=list(FAMILIES))
def family(request):
    return request.param()


def distribution(family, *batch):
    return family(torch.randn(*batch, family.context)) if family.context else family().expand(batch)


@pytest.mark.parametrize("batch", [(), (7,), (5, 1, 7)])
@pytest.mark.parametrize("sample", [(), (2,), (2, 3)])
def test_shapes(family, batch, sample):
    q = distribution(family, *batch)
    assert q.batch_shape == batch and q.event_shape == family.shape
    assert q.rsample(torch.Size(sample)).shape == (*sample, *batch, *family.shape)
    assert q.expand((4, *batch)).sample(torch.Size(sample)).shape == (*sample, 4, *batch, *family.shape)
    assert q.support.event_dim == len(family.shape) and q.support.check(q.sample()).shape == batch


def test_every_parameter_and_the_context_get_a_gradient(family):
    context = torch.randn(7, family.context, requires_grad=True) if family.context else None
    family(context).expand((7,)).rsample().square().sum().backward()
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert context is None or (context.grad.abs().sum(1) > 0).all()


def test_samples_without_gradient_come_from_the_same_law(family):
    q = distribution(family, 7)
    torch.manual_seed(3)
    drawn = q.rsample()
    torch.manual_seed(3)
    sampled = q.sample()
    assert drawn.requires_grad and not sampled.requires_grad
    torch.testing.assert_close(sampled, drawn.detach(), rtol=0, atol=0)


def test_description_and_copies_give_the_same_draws(family):
    again = build(describe(family))
    assert repr(again) == repr(family)
    again.load_state_dict(family.state_dict())
    for other in (again, copy.deepcopy(family)):
        torch.manual_seed(3)
        context = torch.randn(7, family.context) if family.context else None
        draws = []
        for each in (family, other):
            torch.manual_seed(5)
            draws.append(each(context).rsample())
        assert torch.equal(*draws)
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in family.parameters())


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize(("features", "noise"), [(3, None), (3, 2), (20, None)])
def test_untrained_is_nearly_the_mean_field_normal(features, noise, inject):
    """Mean and covariance of 40 000 draws against N(W c + b, I).

    What the hidden layers add has size 0.1 (the start) for standardised inputs, so a mean may be off by a few tenths
    and a variance by some hundredths; sampling errors are 0.005 and 0.007.
    """
    family = Implicit(features, 6, noise=noise, inject=inject)
    context = torch.randn(6)
    z = family(context).sample(torch.Size([40_000]))
    mean = family.default.location(context)
    assert (z.mean(0) - mean).abs().max() < 0.3
    assert (z.mean(0) - mean).square().mean().sqrt() < 0.15
    assert ((z.var(0) - 1).abs() < 0.25).all()
    if noise is None:
        # Independent up to the hidden layers' part: correlations of about 0.1 at most.
        assert (torch.corrcoef(z.T) - torch.eye(features)).abs().max() < 0.2


def test_linear_family_is_exactly_normal_at_the_start(float64):
    """Without hidden layers the law is normal and its moments can be read off the weights."""
    family = Implicit(3, 4, hidden=())
    family.default.layers[0].weight.data.zero_()
    context = torch.randn(4)
    torch.manual_seed(2)
    z = family(context).sample(torch.Size([6]))
    torch.manual_seed(2)
    noise = torch.randn(6, family.noises)
    torch.testing.assert_close(z, family.default.location(context) + noise[:, :3])


def test_expanded_elements_are_drawn_independently():
    """Correlation between the two elements of an expanded batch; its standard error is 0.01, so 5 of these."""
    for q in (Implicit(1)().expand((2,)), Implicit(1, 3)(torch.zeros(1, 3)).expand((2,))):
        a, b = q.sample(torch.Size([10_000])).squeeze(-1).T
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05
        assert not torch.equal(a, b)


def test_a_function_of_the_context_is_the_same_at_every_draw():
    network = MLP(4, 2)
    context = torch.randn(5, 4)
    q = Implicit(2, 4, noise=0, network=network)(context)
    torch.testing.assert_close(q.rsample(torch.Size([3])), network(context).expand(3, 5, 2))


def test_context_comes_before_the_noise():
    class Record(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    network = Record(7, 2)
    context = torch.randn(5, 3)
    Implicit(2, 3, noise=4, network=network)(context).rsample(torch.Size([10]))
    assert network.seen.shape == (50, 7)
    assert torch.equal(network.seen[:, :3], context.repeat(10, 1))
    assert network.seen[:, 3:].unique().numel() == 200


@pytest.mark.parametrize(
    "support",
    [
        constraints.positive,
        constraints.unit_interval,
        constraints.simplex,
        constraints.independent(constraints.real, 1),
    ],
    ids=str,
)
def test_mapped_to_a_support(support):
    family = Implicit(3, 4)
    transform = biject_to(support)
    q = dist.TransformedDistribution(family(torch.randn(7, 4)), [transform])
    z = q.rsample()
    inside = support.check(z)
    assert inside.all() and z.shape[0] == 7
    z.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in family.parameters())
    with pytest.raises(NoDensityError):
        q.log_prob(z.detach())


def test_inside_plates_and_wrappers():
    family = Implicit((2, 3))

    def program():
        with pyro.plate("rows", 5, dim=-1), pyro.plate("columns", 4, dim=-2):
            whole = pyro.sample("whole", family())
            masked = pyro.sample("masked", family().mask(False))
            pyro.sample("event", family().expand_by([6]).to_event(1))
        return whole, masked

    trace = poutine.trace(program).get_trace()
    whole, masked, event = (trace.nodes[name]["value"] for name in ("whole", "masked", "event"))
    assert whole.shape == masked.shape == (4, 5, 2, 3) and whole.unique().numel() == 120
    assert event.shape == (4, 5, 6, 2, 3)


def test_what_counts_as_implicit():
    q = Implicit(3, 4)(torch.zeros(2, 4))
    transformed = dist.TransformedDistribution(q, [biject_to(constraints.positive)])
    expanded = dist.torch_distribution.ExpandedDistribution(q, torch.Size((5, 2)))
    for fn in (q, q.to_event(1), q.mask(torch.ones(2).bool()), q.expand((5, 2)), expanded, transformed):
        assert is_implicit(fn), fn
        assert is_implicit(fn.mask(True).expand_by([6]).to_event(1))
    normal = Normal(3, 4)(torch.zeros(2, 4))
    for fn in (normal, normal.mask(True), dist.TransformedDistribution(normal, [biject_to(constraints.positive)])):
        assert not is_implicit(fn), fn


@pytest.mark.parametrize("objective", [pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO])
def test_objectives_of_pyro_name_the_site_and_those_that_do_without(objective, parameter_store):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(5, 2)
    guide = AmortizedGuide(model, nn.Identity(), Implicit)
    with pytest.raises(ValueError, match=r"(?s)site 'z'.*can only be sampled.*pyrogen.inference.*AVB, AAE"):
        objective().differentiable_loss(model, guide, x)

    prior = Implicit(2)

    def implicit_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("hidden", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"(?s)site 'hidden'.*AVB, AAE"):
        objective().differentiable_loss(implicit_model, AmortizedGuide(implicit_model, nn.Identity()), x)


def test_density_and_moments_are_refused():
    q = Implicit(3)()
    with pytest.raises(NoDensityError, match=r"can only be sampled.*AVB.*GAN.*Normal"):
        q.log_prob(torch.zeros(3))
    assert issubclass(NoDensityError, ValueError) and issubclass(NoDensityError, NotImplementedError)
    for moment in ("mean", "variance"):
        with pytest.raises(NotImplementedError):
            getattr(q, moment)
    assert repr(q) == "ImplicitDistribution(batch_shape=(), event_shape=(3,))"


@pytest.mark.parametrize(
    ("context", "given", "message"),
    [
        (4, None, r"expected a context of shape \(..., 4\), got none"),
        (4, torch.zeros(7, 3), r"expected a context of shape \(..., 4\), got shape \(7, 3\)"),
        (4, torch.zeros(()), r"expected a context of shape \(..., 4\), got shape \(\)"),
        (0, torch.zeros(7, 3), r"built without a context but got one of shape \(7, 3\)"),
        (4, np.zeros((7, 4)), r"expected a context of shape \(..., 4\), got array"),
        (4, torch.full((7, 4), torch.nan), "the context holds NaN or infinity"),
    ],
)
def test_wrong_context_is_refused(context, given, message):
    with pytest.raises(ValueError, match=message):
        Implicit(2, context)(given)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="expected some noise, or noise=0 with a context"):
        Implicit(2, noise=0)
    for options in ({"noise": -1}, {"noise": 2.5}, {"context": -3}):
        with pytest.raises(ValueError, match="is a whole number, 0 or more, got"):
            Implicit(2, **options)
    for options in ({"network": nn.Linear(21, 2)}, {"noise": 0}, {"hidden": ()}):
        with pytest.raises(ValueError, match="inject=True puts noise into"):
            Implicit(2, 3, inject=True, **options)


@pytest.mark.parametrize("network", [nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 2), nn.Unflatten(1, (1, 2)))])
@pytest.mark.parametrize("batch", [(), (7,), (3, 7)])
def test_network_of_another_shape_is_refused_at_the_first_draw(network, batch):
    q = Implicit(2, 3, noise=2, network=network)(torch.zeros(*batch, 3))
    rows = max(1, torch.Size(batch).numel())
    came = tuple(network(torch.zeros(rows, 5)).shape)
    with pytest.raises(ValueError) as error:
        q.rsample()
    for part in (f"({rows}, 5)", f"({rows}, 2)", str(came), "context first"):
        assert part in str(error.value)


def test_scalar_network_output_is_refused():
    class Total(nn.Module):
        def forward(self, x):
            return x.sum()

    with pytest.raises(ValueError, match=r"its output has shape \(\)"):
        Implicit(2, 3, noise=2, network=Total())(torch.zeros(3)).rsample()


def test_noise_follows_the_module_s_precision():
    assert Implicit(2).double()().rsample().dtype == torch.float64
    assert Implicit(2, 3).double()(torch.zeros(5, 3).double()).rsample().dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert Implicit(2, 3)(torch.zeros(5, 3)).rsample().dtype == torch.float32


def test_a_distribution_of_one_s_own():
    q = ImplicitDistribution(lambda shape: torch.randn(*shape, 2).cumsum(-1), (3,), (2,))
    assert q.rsample().shape == (3, 2) and q.expand((4, 3)).sample((5,)).shape == (5, 4, 3, 2)

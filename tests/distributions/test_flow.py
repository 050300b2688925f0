"""Flows against the change of variables, against numerical integration, and against an exact posterior."""

import copy
import math
from functools import partial
from typing import cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from scipy.stats import kstest
from torch import nn

from pyrogen.distributions.flow import Flow
from pyrogen.distributions.flow_transforms import BUILDERS, Name

DOUBLE = torch.float64
CATALOGUE = {
    f"{name}-{direction}-{context}-{features}": partial(
        Flow, features, context, transform=cast(Name, name), direction=direction, layers=3, hidden=(16, 12)
    )
    for name in BUILDERS
    for direction in ("sampling", "density")
    for context in (0, 2)
    for features in (1, 3)
}


@pytest.fixture(params=list(CATALOGUE.values()), ids=list(CATALOGUE))
def build(request):
    return request.param


@pytest.fixture
def flow(build):
    return away_from_the_identity(build)


def away_from_the_identity(build, scale=0.3):
    """A flow in double precision with random weights, so that nothing holds only because it does nothing."""
    torch.manual_seed(1)
    flow = build().to(DOUBLE)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


def context_of(flow, *batch, dtype=DOUBLE):
    return torch.randn(*batch, flow.context, dtype=dtype) if flow.context else None


def batch_of(flow, *batch):
    return batch if flow.context else ()


def invertible(flow, direction):
    return flow.transform != "planar" or flow.fast == direction


def apply(transforms, x):
    for transform in transforms:
        x = transform(x)
    return x


# The contract of a family.


@pytest.mark.parametrize("batch", [(), (4,), (5, 1, 2)])
def test_shapes_and_gradients(flow, batch):
    context = context_of(flow, *batch)
    batch = batch_of(flow, *batch)
    q = flow(context)
    assert q.batch_shape == batch
    assert q.event_shape == (flow.features,)
    assert q.has_rsample
    assert q.support.event_dim == 1
    if invertible(flow, "sampling"):
        z = q.rsample((6,))
        assert z.shape == (6, *batch, flow.features)
        assert z.dtype == DOUBLE
        assert q.support.check(z).all()
        log_prob = q.log_prob(z)
        assert log_prob.shape == (6, *batch)
        assert log_prob.dtype == DOUBLE
        (log_prob.sum() + z.square().sum()).backward()
    else:
        log_prob = q.log_prob(torch.randn(6, *batch, flow.features, dtype=DOUBLE))
        assert log_prob.shape == (6, *batch)
        log_prob.sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_every_parameter_gets_a_gradient_at_the_start(build):
    torch.manual_seed(0)
    flow = build()
    q = flow(context_of(flow, 64, dtype=torch.float32))
    if invertible(flow, "sampling"):
        q.log_prob(q.rsample((8,))).sum().backward()
    else:
        q.log_prob(torch.randn(64, flow.features)).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_context_matters(flow):
    if not flow.context:
        return
    value = torch.randn(flow.features, dtype=DOUBLE)
    q = flow(context_of(flow, 2))
    if invertible(flow, "density"):
        first, second = q.log_prob(value)
        assert (first - second).abs() > 1e-3
    else:
        first, second = apply(q.transforms, value.expand(2, -1))
        assert (first - second).abs().max() > 1e-3


def test_state_round_trip(build):
    first, second = away_from_the_identity(build), build().to(DOUBLE)
    second.load_state_dict(first.state_dict())
    context = context_of(first, 4)
    x = torch.randn(*batch_of(first, 4), first.features, dtype=DOUBLE)
    direction = "sampling" if invertible(first, "sampling") else "density"
    outputs = []
    for flow in (first, second):
        q = flow(context)
        outputs.append(apply(q.transforms, x) if direction == "sampling" else q.log_prob(x))
    assert torch.equal(*outputs)


def test_permutations_are_in_the_state():
    torch.manual_seed(0)
    first, second = (Flow(12, transform="affine_coupling", layers=6) for _ in range(2))
    assert not torch.equal(first.permutations, second.permutations)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.permutations, second.permutations)
    for order in first.permutations:
        assert torch.equal(order.sort().values, torch.arange(12))


def test_copies_after_use(flow):
    context = context_of(flow, 4)
    q = flow(context)
    if invertible(flow, "sampling"):
        q.log_prob(q.rsample())
    else:
        q.log_prob(torch.randn(4, flow.features, dtype=DOUBLE))
    other = copy.deepcopy(flow)
    assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in flow.parameters()})


def test_representation_and_arguments(build):
    flow = build()
    features, context = build.args
    expected = {"features": features, "context": context} | build.keywords
    assert {name: getattr(flow, name) for name in expected} == expected
    assert f"{features}, context={context}, transform={flow.transform}, {flow.direction}" in repr(flow)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", BUILDERS)
def test_starts_near_the_mean_field_normal(name, context):
    torch.manual_seed(0)
    flow = Flow(6, context, transform=name, direction="density")
    value, given = torch.randn(500, 6), torch.randn(500, context) if context else None
    loc, _ = flow.affine(given).chunk(2, -1)
    normal = dist.Normal(loc, torch.ones(6)).to_event(1)
    difference = flow(given).log_prob(value) - normal.log_prob(value)
    # Nats, for 4 layers: each has weights of 1 % of the usual ones.
    assert 0 < difference.abs().max() < 0.5


@pytest.mark.parametrize("features", [(), (1,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("context", [0, 2])
def test_event_shapes(features, context):
    flow = away_from_the_identity(partial(Flow, features, context, layers=2, hidden=(8,)))
    q = flow(context_of(flow, 5))
    assert q.event_shape == features
    assert q.support.event_dim == len(features)
    z = q.rsample((7,))
    assert z.shape == (7, *batch_of(flow, 5), *features)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_default_directions():
    assert Flow(3).fast == "density"
    assert Flow(3, 2).fast == "sampling"
    assert Flow(3).direction is None
    assert partial(Flow, layers=8)(3, 2).layers == 8


# The density.


def test_change_of_variables(flow):
    context = context_of(flow, 4)
    rows = context if flow.context else [None] * 4
    noise = dist.Normal(torch.zeros(flow.features, dtype=DOUBLE), 1).to_event(1)
    x = torch.randn(4, flow.features, dtype=DOUBLE)
    for row, given in zip(x, rows, strict=True):
        transforms = flow(given).transforms
        if flow.fast == "sampling":
            value = apply(transforms, row)
            jacobian = torch.autograd.functional.jacobian(partial(apply, flow(given).transforms), row)
            expected = noise.log_prob(row) - jacobian.det().abs().log()
        else:
            value = row
            inverse = [transform.inv for transform in reversed(flow(given).transforms)]
            jacobian = torch.autograd.functional.jacobian(partial(apply, inverse), row)
            expected = noise.log_prob(apply(inverse, row)) + jacobian.det().abs().log()
        if invertible(flow, "density"):
            torch.testing.assert_close(flow(given).log_prob(value), expected)
        else:
            q = flow(given)
            torch.manual_seed(3)
            value = q.rsample()
            torch.manual_seed(3)
            row = q.base_dist.rsample()
            jacobian = torch.autograd.functional.jacobian(partial(apply, flow(given).transforms), row)
            torch.testing.assert_close(q.log_prob(value), noise.log_prob(row) - jacobian.det().abs().log())


def test_inversion_returns_the_noise(flow):
    if flow.transform == "planar":
        return
    q = flow(context_of(flow, 5))
    x = torch.randn(*batch_of(flow, 5), flow.features, dtype=DOUBLE)
    z = apply(q.transforms, x).clone()
    back = apply([transform.inv for transform in reversed(q.transforms)], z)
    assert (back - x).abs().max() < 1e-8


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_density_integrates_to_one(name, features):
    flow = away_from_the_identity(
        partial(Flow, features, transform=name, direction="density", layers=2, hidden=(8,)), scale=0.1
    )
    edge, count = 8.0, 321
    grid = torch.linspace(-edge, edge, count, dtype=DOUBLE)
    points = torch.cartesian_prod(*[grid] * features).reshape(-1, features)
    with torch.no_grad():
        log_total = flow().log_prob(points).logsumexp(0) + features * math.log(2 * edge / (count - 1))
    # The trapezoidal rule on a step of 0.05; its error comes from the kinks in the slopes of the splines.
    assert abs(log_total) < 1e-3


@pytest.mark.parametrize("direction", ["sampling", "density"])
@pytest.mark.parametrize("name", list(BUILDERS)[:4])
def test_samples_follow_the_density(name, direction):
    """The first feature's samples against its integrated density; fails for 1 of 10 000 seeds by chance."""
    flow = away_from_the_identity(
        partial(Flow, 2, transform=name, direction=direction, layers=2, hidden=(8,)), scale=0.1
    )
    with torch.no_grad():
        draws = flow().sample((4000,))[:, 0]
        grid = torch.linspace(-12, 12, 401, dtype=DOUBLE)
        points = torch.cartesian_prod(grid, grid)
        density = flow().log_prob(points).exp().reshape(401, 401).sum(1) * 0.06
    cdf = (density.cumsum(0) - density / 2) * 0.06  # up to the middle of each cell

    def distribution_function(x):
        cell = ((torch.as_tensor(x) + 12) / 0.06).clamp(0, 399)
        low = cell.long()
        return (cdf[low] + (cell - low) * (cdf[low + 1] - cdf[low])).numpy()

    assert kstest(draws.numpy(), distribution_function).pvalue > 1e-4


@pytest.mark.parametrize("name", list(BUILDERS)[:4])
def test_single_precision(name):
    flow = away_from_the_identity(partial(Flow, 8, 6, transform=name, layers=8), scale=0.02).float()
    q = flow(torch.randn(500, 6))
    z = q.rsample()
    # The rounding of a float32 at the scale of the result, some 10 nats, is 1e-6; 8 layers add to it.
    assert (q.log_prob(z) - q.log_prob(z.clone())).abs().max() < 1e-4


def test_inversion_does_not_depend_on_the_default_precision():
    flow = away_from_the_identity(partial(Flow, 3, 2, layers=2, hidden=(8,))).float()
    context, value = torch.randn(4, 2), torch.randn(4, 3)
    expected = flow(context).log_prob(value)
    torch.set_default_dtype(DOUBLE)
    try:
        torch.testing.assert_close(flow(context).log_prob(value), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", BUILDERS)
def test_far_values_are_finite(name):
    flow = away_from_the_identity(partial(Flow, 3, transform=name, direction="density", hidden=(8,)))
    value = torch.tensor([[1e4, -1e4, 0.0], [3.0, -3.0, 3.0]], requires_grad=True)
    log_prob = flow.float()().log_prob(value)
    inputs = [value, *flow.parameters()]
    slopes = torch.autograd.grad(log_prob.sum(), inputs)
    assert log_prob.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)


# The caches.


class Passes:
    """Counts how often the networks of a flow run."""

    def __init__(self, flow):
        self.count = 0
        for module in flow.steps.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.add)
                return
        raise AssertionError("no network to count")

    def add(self, *_):
        self.count += 1


@pytest.mark.parametrize("direction", ["sampling", "density"])
@pytest.mark.parametrize("name", ["affine_autoregressive", "spline_autoregressive"])
def test_passes(name, direction):
    flow = Flow(5, 2, transform=name, direction=direction, layers=2, hidden=(8,))
    passes = Passes(flow)
    q = flow(torch.randn(3, 2))
    z = q.rsample()
    sequential = 5 if direction == "density" else 1
    assert passes.count == sequential
    q.log_prob(z)
    assert passes.count == sequential, "the density of its own sample has to come from the cache"
    passes.count = 0
    q.log_prob(z.clone())
    assert passes.count == 6 - sequential


@pytest.mark.parametrize("name", ["affine_coupling", "spline_coupling"])
@pytest.mark.parametrize("direction", ["sampling", "density"])
def test_couplings_are_fast_both_ways(name, direction):
    flow = Flow(5, 2, transform=name, direction=direction, layers=2, hidden=(8,))
    passes = Passes(flow)
    q = flow(torch.randn(3, 2))
    z = q.rsample()
    assert passes.count == 1
    q.log_prob(z)
    assert passes.count == 1
    q.log_prob(z.clone())
    assert passes.count <= 3


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_own_samples_hit_the_cache_after_expansion(shape):
    flow = Flow(shape, 2, layers=2)
    passes = Passes(flow)

    def guide(context):
        with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 4, dim=-1):
            return pyro.sample("z", flow(context))

    trace = pyro.poutine.trace(guide).get_trace(torch.randn(4, 2))
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (7, 4, *shape)  # type: ignore[union-attr]
    assert site["log_prob"].shape == (7, 4)
    assert passes.count == 1
    q = flow(torch.randn(4, 2)).expand((5, 4))
    passes.count = 0
    z = q.rsample()
    again = q.expand((6, 5, 4)).log_prob(z)
    assert again.shape == (6, 5, 4)
    torch.testing.assert_close(again[3], q.log_prob(z))
    assert passes.count == 1


def test_expansion_gives_independent_draws(flow):
    if not invertible(flow, "sampling"):
        return
    q = flow(context_of(flow, 1, 2)).expand((3, 4, 2))
    z = q.rsample()
    assert z.shape == (3, 4, 2, flow.features)
    assert z.reshape(-1).unique().numel() == z.numel()
    if invertible(flow, "density"):
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_values_broadcast_to_the_batch(flow):
    if not invertible(flow, "density"):
        return
    context = context_of(flow, 4)
    value = torch.randn(flow.features, dtype=DOUBLE)
    scored = flow(context).log_prob(value)
    assert scored.shape == batch_of(flow, 4)
    for index in range(4):
        given = None if context is None else context[index]
        one = scored[index] if flow.context else scored
        torch.testing.assert_close(flow(given).log_prob(value), one)


def gradients(flow, log_prob):
    return torch.autograd.grad(log_prob.sum(), list(flow.parameters()), allow_unused=True)


def test_samples_without_a_graph_are_scored_for_their_gradients(flow):
    """What reweighted wake-sleep and the score-function estimator need: the gradient at a fixed value."""
    if flow.transform == "planar":
        return
    context = context_of(flow, 4)
    q = flow(context)
    z = q.sample((3,))
    assert not z.requires_grad
    expected = gradients(flow, flow(context).log_prob(z.clone()))
    for got, wanted in zip(gradients(flow, q.log_prob(z)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_gradients_samples_are_scored_from_the_cache():
    flow = Flow(4, 2, transform="planar", layers=3)
    with torch.no_grad():
        q = flow(torch.randn(5, 2))
        z = q.sample()
        assert q.log_prob(z).shape == (5,)
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    q = flow(torch.randn(5, 2))
    assert q.log_prob(q.rsample()).shape == (5,)


def test_values_changed_in_place_are_scored_anew(flow):
    if not invertible(flow, "density"):
        return
    q = flow(context_of(flow, 4))
    value = torch.randn(4, flow.features, dtype=DOUBLE)
    before = q.log_prob(value)
    value += 1
    after = q.log_prob(value)
    torch.testing.assert_close(after, q.log_prob(value.clone()))
    assert (after - before).abs().min() > 1e-6


def test_the_same_value_after_a_step_of_the_optimiser(flow):
    if not invertible(flow, "density"):
        return
    optimiser = torch.optim.SGD(flow.parameters(), lr=1e-3)
    data = torch.randn(10, flow.features, dtype=DOUBLE)
    context = context_of(flow, 10)
    before = flow(context).log_prob(data)
    before.sum().backward()
    optimiser.step()
    after = flow(context).log_prob(data)
    after.sum().backward()
    torch.testing.assert_close(after, flow(context).log_prob(data.clone()))
    assert (after - before).abs().max() > 1e-6


# Learning.


@pytest.mark.parametrize("name", ["affine_autoregressive", "affine_coupling", "planar"])
def test_learns_a_correlated_posterior(name):
    """Reverse KL to a bivariate normal of correlation 0.9: the mean field one stays at 0.83 nats."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    target = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), covariance)
    flow = Flow(2, 1, transform=name, layers=2, hidden=(16,))
    context = torch.zeros(1)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 500)
    for _ in range(500):
        q = flow(context)
        z = q.rsample((64,))
        loss = (q.log_prob(z) - target.log_prob(z)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        q = flow(context)
        z = q.sample((10_000,))
        divergence = (q.log_prob(z) - target.log_prob(z)).mean()
    # An affine map of z2 given z1 contains the target; planar layers only approach it.
    assert divergence < (0.1 if name == "planar" else 0.02)


# Extension, and errors.


def radial(features, context, hidden):
    return T.Radial(features)


def conditional_radial(features, context, hidden):
    return T.conditional_radial(features, context, list(hidden))


def spline_of_pyro(features, context, hidden):
    return T.spline_coupling(features, hidden_dims=list(hidden))


def no_transform(features, context, hidden):
    return nn.Linear(features, features)


@pytest.mark.parametrize(
    ("transform", "context"), [(radial, 0), (radial, 2), (conditional_radial, 2), (spline_of_pyro, 0)]
)
@pytest.mark.filterwarnings("ignore:torch.tensor:UserWarning")
def test_transforms_of_ones_own(transform, context):
    torch.manual_seed(0)
    flow = Flow(4, context, transform=transform, layers=2, hidden=(8,), direction="sampling")
    given = torch.randn(5, 2) if context else None
    q = flow(given)
    z = q.rsample((6,))
    log_prob = q.log_prob(z)
    log_prob.sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
    copy.deepcopy(flow)
    other = flow(given)
    other.rsample((6,))
    torch.testing.assert_close(q.log_prob(z), log_prob)
    if transform is not spline_of_pyro:
        with pytest.raises(NotImplementedError, match="transform has no inverse"):
            other.log_prob(z.detach())


def test_planar_says_what_it_cannot():
    q = Flow(3, 2, transform="planar")(torch.randn(4, 2))
    with pytest.raises(
        NotImplementedError, match=r"transform='planar' and direction='sampling' cannot score .*rsample\(\)"
    ):
        q.log_prob(torch.randn(4, 3))
    p = Flow(3, transform="planar")()
    for draw in (p.sample, p.rsample):
        with pytest.raises(NotImplementedError, match=r"direction='density' cannot draw .*direction=\"sampling\""):
            draw()
    assert p.log_prob(torch.randn(4, 3)).shape == (4,)


def test_errors():
    with pytest.raises(ValueError, match=r"transform must be one of affine_autoregressive, .*got 'iaf'"):
        Flow(3, transform="iaf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='direction must be "sampling", "density" or None, got \'both\''):
        Flow(3, direction="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hidden widths must be 5 or more.*got \(4,\)"):
        Flow(5, hidden=(4,))
    with pytest.raises(ValueError, match="got layers=0"):
        Flow(5, layers=0)
    with pytest.raises(ValueError, match=r"hidden=\(\)"):
        Flow(5, hidden=())
    with pytest.raises(TypeError, match=r"no_transform must build a Conditional.*built a Linear"):
        Flow(5, transform=no_transform)
    with pytest.raises(ValueError, match="context"):
        Flow(3, 2)()
    with pytest.raises(ValueError, match="context"):
        Flow(3)(torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected a context of shape \(..., 2\)"):
        Flow(3, 2)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"expected a value of shape \(\.\.\., 3\), got \(4, 1\)"):
        Flow(3)().log_prob(torch.zeros(4, 1))

"""Every density in single precision over all that a network can put out, against double precision.

Numbers are network outputs (locations, raw scales, logits, coefficients) and values, all up to 1.3e30. Where the
density in double precision is a number of single precision, that in single precision has to be finite and as near as
its rounding allows, and its gradient finite. Elsewhere it may be -∞; it is never NaN nor ∞.

A new distribution, flow, model or ratio joins by an entry: each catalogue is compared with what the package exports.

Tolerances are sums of rounding errors, in units of U: half the distance of 1 to the next number. A sum, product or
quotient costs 1 of itself, an elementary function 2 to 4. What a relative error e of a scale does to z²/2 is e z². Of
networks, the first-order effect of rounding each product of a weight and each value between layers is taken.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call
from torch.nn.functional import softplus

import pyrogen as pg
from pyrogen import distributions as families
from pyrogen.distributions.bounds import bounded
from pyrogen.distributions.decoding import SMALLEST_SCALE, positive
from pyrogen.distributions.families import positive_scale
from pyrogen.distributions.flow_transforms import BOX, BUILDERS, Planar
from pyrogen.distributions.levels import LogisticMixtureLevels, NormalLevels
from pyrogen.distributions.supports import to_support
from pyrogen.inference import ELBO, AmortizedGuide, ratios
from pyrogen.inference.divergences import closed_form_kl
from pyrogen.models import ProbabilisticPCA

U = 2.0**-24
LARGEST = torch.finfo(torch.float32).max
FAR = 2.0**100  # 1.3e30
ROWS = 4
SCALE_ERROR = 8
"""Of a likelihood's scale: exponential and logarithm 3 each, the floor 1, and 1 to spare."""
RAW_ERROR = 20
"""Of a family's: an offset is added to the raw scale before, which costs it 12 at most, near the floor."""

run = settings(derandomize=True, deadline=None, database=None, max_examples=30)

# Where exponentials, squares, products and quotients of single precision begin and end to overflow.
EDGES = [0.0, 1e-38, 1e-30, 1e-20, 1e-8, 1e-3, 0.5, 1.0, 3.0, 10.0, 20.0, 88.0, 104.0, 1e3, 1e4, 1e8, 1e13, 4e18, 2e19]
EDGES += [1e20, 1e26, FAR]
NUMBER = st.sampled_from([sign * edge for edge in EDGES for sign in (1, -1)]) | st.floats(-FAR, FAR, width=32)
UNIT = st.sampled_from([0.0, 1e-20, 1e-3, 0.5, 1.0]) | st.floats(0, 1, width=32)
BIT = st.sampled_from([0.0, 1.0])
LEVEL = st.sampled_from([k / 255 for k in (0, 1, 51, 127, 128, 254, 255)])
TERNARY = st.sampled_from([0.0, 0.5, 1.0])


def rows(*columns: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.tuples(*columns), min_size=ROWS, max_size=ROWS).map(torch.tensor)


@dataclass(frozen=True, repr=False)
class Case:
    """A density, of as many numbers as there are columns.

    Attributes:
        columns: Where the numbers of a row come from, parameters first.
        log_prob: From rows of numbers to densities.
        exact: From the same in double precision to densities and their tolerances in units of U.
    """

    columns: Sequence[st.SearchStrategy]
    log_prob: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], tuple[Tensor, Tensor]]


def check(case: Case, numbers: Tensor, *, sign: int = 1) -> None:
    """What the module's docstring says; of a divergence, which may be ∞ where a density may be -∞, with the sign -1."""
    numbers = numbers.float().requires_grad_()
    found = sign * case.log_prob(numbers)
    (gradient,) = torch.autograd.grad(found.sum(), numbers)
    exact, tolerance = case.exact(numbers.detach().double())
    exact, tolerance = sign * exact.detach(), U * torch.nan_to_num(tolerance.detach(), nan=math.inf)
    assert not exact.isnan().any()
    assert not found.isnan().any() and (found < math.inf).all()
    assert not gradient.isnan().any()
    known = exact.abs() + tolerance < LARGEST
    off = (found.double() - exact).abs()
    assert (off <= tolerance)[known].all(), (found, exact, tolerance)
    assert gradient[known].isfinite().all()


def likelihood(kind: Callable, outputs: int, event: Sequence[int] = (2,), **options: Any) -> Callable[[Tensor], Tensor]:
    """A likelihood whose decoder puts out the first numbers of a row, of the values that follow."""
    shape = kind.decoder_shape(event, **options)  # type: ignore[attr-defined]
    decoder = nn.Unflatten(1, shape) if len(shape) > 1 else nn.Identity()
    made = kind(decoder, **options)
    return lambda x: made(x[:, :outputs]).log_prob(x[:, outputs:].reshape(-1, *event))


def as_given(kind: Callable, features: int, **options: Any) -> Any:
    """A family whose context is its parameters."""
    outputs = kind(features, **options).parameters_of.outputs
    made = kind(features, outputs, **options)
    with torch.no_grad():
        made.parameters_of.linear.weight.copy_(torch.eye(outputs))
        made.parameters_of.linear.bias.zero_()
    return made


def family(kind: Callable, features: int, **options: Any) -> Callable[[Tensor], Tensor]:
    """The density of a family whose parameters come first, of the values that follow."""
    made = as_given(kind, features, **options)
    return lambda x: made(x[:, : made.context]).log_prob(x[:, made.context :])


# Values by hand.


def of_normal(z: Tensor, scale: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """Sums over the last dimension. The square of z has an error of 2 (error + 2) + 1, a logarithm one of the scale's
    error and its own; then four operations and the sum."""
    log_prob = -0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    size = 0.5 * z.square() + scale.log().abs() + 1
    return log_prob.sum(-1), (2 * error + 9 + z.shape[-1]) * size.sum(-1)


def bernoulli(x: Tensor) -> tuple[Tensor, Tensor]:
    logits, values = x.chunk(2, -1)
    return -softplus((1 - 2 * values) * logits).sum(-1), 8 * (logits.abs() + 1).sum(-1)


def continuous_bernoulli(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mirrored to negative logits; near 0 by a series."""
    logits, values = x.chunk(2, -1)
    u, distance = logits.abs(), torch.where(logits < 0, values, 1 - values)
    closed = -u * distance - torch.log(-torch.expm1(-u) / u.clamp_min(1e-300))
    log_prob = torch.where(u < 1e-6, logits * (values - 0.5), closed)
    return log_prob.sum(-1), 16 * (u + u.clamp_min(1).log() + 1).sum(-1)


def normal_likelihood(x: Tensor, scale: Callable[[Tensor], Any], error: float) -> tuple[Tensor, Tensor]:
    loc, raw, values = x[:, :2], x[:, 2:-2], x[:, -2:]
    sigma = scale(raw) * torch.ones_like(loc)
    return of_normal((values - loc) / sigma, sigma, error)


def optimal_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    loc, values = x.chunk(2, -1)
    sigma = (values - loc).square().mean().sqrt().clamp_min(SMALLEST_SCALE).expand_as(loc)
    return of_normal((values - loc) / sigma, sigma, 4 + x.numel() / 2)


def laplace(x: Tensor, scale: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    loc, raw, values = x[:, :2], x[:, 2:-2], x[:, -2:]
    b = scale(raw) * torch.ones_like(loc)
    distance = (values - loc).abs() / b
    log_prob = -distance - (2 * b).log()
    return log_prob.sum(-1), (SCALE_ERROR + 8) * (distance + (2 * b).log().abs() + 1).sum(-1)


def conditioned(log_prob: Tensor, factors: Sequence[Tensor], sizes: Sequence[Tensor]) -> Tensor:
    """What relative errors of 1 in some factors do to densities, element by element; sizes are those that err."""
    slopes = torch.autograd.grad(log_prob.sum(), factors)
    return sum(((size * slope).abs() for size, slope in zip(sizes, slopes, strict=True)), torch.zeros(()))


def quantized_normal(x: Tensor, scale: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """The offset of a level has the error of its location; masses are differences that lose a factor of 20."""
    loc, raw, values = x[:, :2].clone().requires_grad_(), x[:, 2:-2], x[:, -2:]
    sigma = (scale(raw) * torch.ones_like(loc)).requires_grad_()
    log_prob = NormalLevels(loc, sigma).log_prob(values)
    bent = conditioned(log_prob, (loc, sigma), (4 * loc, (SCALE_ERROR + 8) * sigma))
    z = (values - loc) / sigma
    return log_prob.sum(-1), (bent + 8 * (0.5 * z.square() + log_prob.abs()) + 100).sum(-1)


def logistic_mixture(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two components of two values: logits, locations, raw scales; all terms of a logarithm have one sign."""
    logits, loc, raw = x[:, :12].reshape(-1, 3, 2, 2).unbind(1)
    loc, sigma = (0.5 + loc).requires_grad_(), positive(raw).requires_grad_()
    log_prob = LogisticMixtureLevels(logits, loc, sigma, event_dim=1).log_prob(x[:, 12:])
    bent = conditioned(log_prob, (loc, sigma), (4 * loc, (SCALE_ERROR + 8) * sigma)).sum((-1, -2))
    return log_prob, bent + 16 * log_prob.abs() + 100


def colours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two components of one pixel: two logits, then three colours' locations, raw scales and coefficients."""
    logits, rest = x[:, :2, None, None, None], x[:, 2:20].reshape(-1, 3, 2, 3, 1, 1)
    loc, raw, coefficients = rest.unbind(1)
    loc, sigma = (0.5 + loc).requires_grad_(), positive(raw).requires_grad_()
    mixture = LogisticMixtureLevels(logits, loc, sigma, coefficients.tanh(), event_dim=3)
    log_prob = mixture.log_prob(x[:, 20:].reshape(-1, 3, 1, 1))
    # A location is moved by at most 1, with an error of 4.
    bent = conditioned(log_prob, (loc, sigma), (4 * (loc.abs() + 2), (SCALE_ERROR + 8) * sigma)).flatten(1).sum(-1)
    return log_prob, bent + 16 * log_prob.abs() + 100


def categorical(x: Tensor) -> tuple[Tensor, Tensor]:
    log_p = x[:, :6].reshape(-1, 3, 2).log_softmax(1)
    log_prob = log_p.gather(1, (2 * x[:, 6:]).round().long().unsqueeze(1)).squeeze(1)
    return log_prob.sum(-1), 8 * (log_prob.abs() + 2).sum(-1)


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw, values = x.chunk(3, -1)
    return of_normal((values - loc) / positive_scale(raw), positive_scale(raw), RAW_ERROR)


def standard_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    return of_normal(x, torch.ones_like(x), 0)


def whitened(x: Tensor, unit: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """T⁻¹ x and its error, of vectors ``(..., D)`` with a relative one; substitution is exact for a T off by D."""
    inverse = torch.linalg.solve_triangular(unit, torch.eye(unit.shape[-1]).double(), upper=False).abs()
    y = torch.linalg.solve_triangular(unit, x.unsqueeze(-1), upper=False).squeeze(-1)

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix * vector.abs().unsqueeze(-2)).sum(-1)

    return y, times(inverse, error * x.abs() + unit.shape[-1] * times(unit.abs(), y))


def triangles(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Location, scales and the unit triangle of nine numbers."""
    loc, raw, below = x.split(3, -1)
    unit = torch.diag_embed(torch.ones_like(raw))
    unit[..., [1, 2, 2], [0, 0, 1]] = below
    return loc, positive_scale(raw), unit


def multivariate_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale, unit = triangles(x[:, :9])
    y, error = whitened((x[:, 9:] - loc) / scale, unit, RAW_ERROR + 2)
    log_prob, tolerance = of_normal(y, scale, 0)
    return log_prob, tolerance + (y.abs() * error + U * error.square()).sum(-1) + 3 * RAW_ERROR


def mixture(loc: Tensor, raw: Tensor, logits: Tensor, values: Tensor, error: float = 0.0) -> tuple[Tensor, Tensor]:
    """Components ``(R, K, D)`` of which locations have a relative error; weights ``(R, K)``."""
    scale = positive_scale(raw)
    z = (values.unsqueeze(-2) - loc) / scale
    log_p, tolerance = of_normal(z, scale, RAW_ERROR + 12 * error)
    weighted = logits.log_softmax(-1) + log_p
    tolerance = tolerance + 8 * logits.log_softmax(-1).abs() + error * (z * loc / scale).abs().sum(-1)
    # The log-sum follows the components as it weighs them; rounded, one weighs twice as much at most.
    log_prob = weighted.logsumexp(-1)
    return log_prob, (2 * weighted.softmax(-1) * tolerance).sum(-1) + 8 * (log_prob.abs() + 2)


def split_mixture(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    loc, raw, logits, values = x.split([2 * d, 2 * d, 2, d], -1)
    return mixture(loc.unflatten(-1, (2, d)), raw.unflatten(-1, (2, d)), logits, values)


# Modules whose numbers are not a decoder's output nor a context.


def shared_scale(kind: Callable) -> Callable[[Tensor], Tensor]:
    """A likelihood whose scale is a parameter, another one for each row."""
    made = kind(nn.Identity(), scale="shared")

    def log_prob(x: Tensor) -> Tensor:
        each = [functional_call(made, {"raw_scale": row[2]}, (row[None, :2],)).log_prob(row[3:]) for row in x]
        return torch.cat(each)

    return log_prob


def vamp(x: Tensor) -> Tensor:
    """Two pseudo-inputs, which are the parameters of their posteriors."""
    prior = families.Vamp(2, inputs=(4,), components=2)
    prior.bind(as_given(families.Normal, 2))
    given = [({"pseudo_inputs": row[:8].reshape(2, 4)}, row[8:]) for row in x]
    return torch.stack([functional_call(prior, inputs, ()).log_prob(value) for inputs, value in given])


def exact_vamp(x: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw = x[:, :8].reshape(-1, 2, 2, 2).unbind(2)
    return mixture(loc, raw, torch.zeros_like(loc[..., 0]), x[:, 8:])


class Sum(nn.Module):
    """Context and noise, added."""

    def forward(self, x: Tensor) -> Tensor:
        context, noise = x.chunk(2, -1)
        return context + noise


def semi_implicit(x: Tensor) -> Tensor:
    made = families.SemiImplicit(2, 4, noise=4, mixing=Sum(), draws=2)
    made.components.load_state_dict(as_given(families.Normal, 2).state_dict())
    torch.manual_seed(0)
    return made(x[:, :4]).log_prob(x[:, 4:])


def exact_semi_implicit(x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    parameters = x[:, :4].unsqueeze(1) + torch.randn(3, len(x), 4).double().movedim(0, 1)
    loc, raw = parameters.chunk(2, -1)
    return mixture(loc, raw, torch.zeros_like(loc[..., 0]), x[:, 4:], error=1.0)


WEIGHT = torch.tensor([[1.0, 0.5], [-2.0, 0.25], [0.5, 1.5]])
PCA_ERROR = 160.0
"""Of σ: its logarithm, 40 at most, has an error of 3; the exponential 3 more."""


def pca(row: Tensor) -> ProbabilisticPCA:
    """A model with log σ and the mean from a row."""
    model = ProbabilisticPCA(2, 3)
    for name, value in {"weight": WEIGHT, "log_scale": row[0], "mean": row[1:4]}.items():
        delattr(model, name)
        setattr(model, name, value)
    return model


def pca_site(x: Tensor) -> Tensor:
    """log p(x | z = 0)."""

    def log_prob(row: Tensor) -> Tensor:
        program = poutine.condition(pca(row), {"z": torch.zeros(1, 2)})
        node = poutine.trace(program).get_trace(row[None, 4:]).nodes["x"]
        return node["fn"].log_prob(node["value"])

    return torch.cat([log_prob(row) for row in x])


def exact_pca_site(x: Tensor) -> tuple[Tensor, Tensor]:
    sigma = bounded(x[:, :1], 40.0).exp()
    return of_normal((x[:, 4:] - x[:, 1:4]) / sigma, sigma.expand(-1, 3), PCA_ERROR)


def pca_whole(x: Tensor) -> Tensor:
    return torch.cat([pca(row).log_likelihood(row[None, 4:]) for row in x])


def exact_pca_whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """By singular values; in double precision and rounded once, but for what the rest of a projection loses."""
    u, s, _ = torch.linalg.svd(WEIGHT.double(), full_matrices=False)
    log_sigma = bounded(x[:, :1], 40.0)
    sigma, d = log_sigma.exp(), x[:, 4:] - x[:, 1:4]
    along = d @ u
    rest = (d - along @ u.T) / sigma
    variances = s.square() + sigma.square()
    quadratic = (along.square() / variances).sum(-1) + rest.square().sum(-1)
    log_prob = -0.5 * (quadratic + variances.log().sum(-1) + 2 * log_sigma[:, 0] + 3 * math.log(2 * math.pi))
    lost = 2.0**-48 * (d / sigma).norm(dim=-1)
    return log_prob, 4 * log_prob.abs() + 8 + (lost * (rest.norm(dim=-1) + lost)) / U


def pca_posterior(x: Tensor) -> Tensor:
    return torch.cat([pca(row).posterior(row[None, 4:7]).log_prob(row[7:]) for row in x])


def exact_pca_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    sigma, weight = bounded(x[:, :1], 40.0).exp(), WEIGHT.double()
    m = weight.T @ weight + sigma.square().unsqueeze(-1) * torch.eye(2).double()
    loc = torch.linalg.solve(m, (x[:, 4:7] - x[:, 1:4]) @ weight)
    lower = torch.linalg.cholesky(torch.linalg.inv(m)) * sigma.unsqueeze(-1)
    scale = lower.diagonal(dim1=-2, dim2=-1)
    unit = lower / scale.unsqueeze(-1)
    y, error = whitened((x[:, 7:] - loc) / scale, unit, 8)
    _, moved = whitened(loc / scale, unit, 8)
    log_prob, tolerance = of_normal(y, scale, 8)
    error = error + moved
    return log_prob, tolerance + (y.abs() * error + U * error.square()).sum(-1)


# Divergences.


def kl_of(q: Callable, p: Callable) -> Callable[[Tensor], Tensor]:
    def kl(x: Tensor) -> Tensor:
        found = closed_form_kl(q(x), p(x))
        assert found is not None
        return found

    return kl


def normal_of(first: int) -> Callable[[Tensor], dist.Distribution]:
    made = as_given(families.Normal, 3)
    return lambda x: made(x[:, first : first + 6])


def full_of(first: int) -> Callable[[Tensor], dist.Distribution]:
    made = as_given(families.MultivariateNormal, 3)
    return lambda x: made(x[:, first : first + 9])


def exact_kl(x: Tensor, full_q: bool, full_p: bool) -> tuple[Tensor, Tensor]:
    """A column of q's triangle is a product, which costs it RAW_ERROR + 1, and is divided by p's scale."""

    def parts(numbers: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        if full:
            return triangles(numbers)
        loc, raw = numbers.chunk(2, -1)
        return loc, positive_scale(raw), torch.eye(3).double().expand(len(x), 3, 3)

    count = 9 if full_q else 6
    (loc_q, scale_q, unit_q), (loc_p, scale_p, unit_p) = parts(x[:, :count], full_q), parts(x[:, count:], full_p)
    columns = (scale_q.unsqueeze(-1) * unit_q).movedim(-1, 0)
    vectors = torch.cat([columns, (loc_q - loc_p).unsqueeze(0)]) / scale_p
    y, error = whitened(vectors, unit_p, 2 * RAW_ERROR + 3)
    logs = scale_p.log() - scale_q.log()
    kl = 0.5 * (y.square().sum((0, -1)) - 3) + logs.sum(-1)
    bent = (y.abs() * error + U * error.square()).sum((0, -1))
    size = 0.5 * y.square().sum((0, -1)) + (scale_p.log().abs() + scale_q.log().abs() + 2).sum(-1)
    return kl, bent + 20 * size + 6 * RAW_ERROR


# Flows.


class Scored(nn.Module):
    """A flow of three values or one, with a context of two numbers and the weights of its layers made larger."""

    def __init__(self, name: str, direction: str, features: int, larger: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_spline = name != "planar" and (features == 1 or "spline" in name)
        self.flow = families.Flow(
            features,
            2,
            transform=name,
            direction=direction,
            layers=2,
            hidden=(8, 8),  # type: ignore[arg-type]
        )
        with torch.no_grad():
            for parameter in self.flow.steps.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter)).mul_(larger)

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x[:, :2]).log_prob(x[:, 2:])

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.of_row(row) for row in x]
        return torch.stack([log_prob for log_prob, _ in found]), torch.stack([error for _, error in found])

    def of_row(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """First-order effects, of a product of 12 terms and what follows it, and of 24 errors of values between layers.
        These get the size of its box for a spline, in which a bin's small differences lose a factor of 500, also in the
        slope, and what a planar move is a difference of. A log-determinant has a few terms for each value. Of
        what two ways lead to, errors can add up where slopes cancel: hence 4 times all that."""
        q = self.flow(row[:2])
        x, log_prob, size, between, sizes = row[2:], torch.zeros(()).double(), torch.zeros(()), [], []
        for transform in reversed(q.transforms):
            y, x = x, transform.inv(x)
            log_det = transform.log_abs_det_jacobian(x, y).sum()
            log_prob, size = log_prob - log_det, size + log_det.detach().abs() + 8
            between.append(x)
            sizes.append(24 * (x.abs() + BOX * self.is_spline + difference(transform.inv)))
        log_prob = log_prob - (0.5 * x.square() + 0.5 * math.log(2 * math.pi)).sum()
        weights = [*self.flow.parameters()]
        slopes = torch.autograd.grad(log_prob, [*weights, *between], allow_unused=True, materialize_grads=True)
        sizes = [*(16 * weight for weight in weights), *sizes]
        bent = torch.stack([(size * slope).abs().sum() for size, slope in zip(sizes, slopes, strict=True)]).sum()
        terms = size + x.detach().square().sum()
        return log_prob.detach(), 4 * (bent + 8 * terms + 500 * 4 * self.is_spline * x.numel())


def difference(transform: Any) -> Tensor | float:
    """The size of what a planar transform's direction is a difference of; nothing for others."""
    if not isinstance(transform, Planar):
        return 0.0
    _, u, w = transform._params()
    return u.abs() + (softplus(-(u * w).sum()) + 1) * w.abs() / w.square().sum()


@cache
def flow_case(name: str, direction: str, features: int, larger: float) -> Case:
    scored = Scored(name, direction, features, larger)
    return Case([NUMBER] * (2 + features), scored, copy.deepcopy(scored).double().exact)


# Catalogues.


def floored(raw: Tensor) -> Tensor:
    return SMALLEST_SCALE + softplus(raw)


def numbers(count: int, *values: st.SearchStrategy) -> list[st.SearchStrategy]:
    return [*[NUMBER] * count, *values]


DENSITIES: dict[str, list[Case]] = {
    "Bernoulli": [Case(numbers(2, BIT, BIT), likelihood(families.Bernoulli, 2), bernoulli)],
    "ContinuousBernoulli": [
        Case(numbers(2, UNIT, UNIT), likelihood(families.ContinuousBernoulli, 2), continuous_bernoulli)
    ],
    "NormalLikelihood": [
        Case(
            numbers(4),
            likelihood(families.NormalLikelihood, 2, scale=0.5),
            partial(normal_likelihood, scale=lambda _: 0.5, error=0),
        ),
        Case(
            numbers(6),
            likelihood(families.NormalLikelihood, 4, scale="per pixel"),
            partial(normal_likelihood, scale=floored, error=SCALE_ERROR),
        ),
        Case(
            numbers(5),
            shared_scale(families.NormalLikelihood),
            partial(normal_likelihood, scale=floored, error=SCALE_ERROR),
        ),
        Case(numbers(4), likelihood(families.NormalLikelihood, 2, scale="optimal"), optimal_normal),
    ],
    "LaplaceLikelihood": [
        Case(numbers(4), likelihood(families.LaplaceLikelihood, 2), partial(laplace, scale=lambda _: 1.0)),
        Case(
            numbers(6),
            likelihood(families.LaplaceLikelihood, 4, scale="per pixel"),
            partial(laplace, scale=floored),
        ),
        Case(numbers(5), shared_scale(families.LaplaceLikelihood), partial(laplace, scale=floored)),
    ],
    "QuantizedNormal": [
        Case(
            numbers(2, LEVEL, LEVEL),
            likelihood(families.QuantizedNormal, 2, scale=0.1),
            partial(quantized_normal, scale=lambda _: 0.1),
        ),
        Case(
            numbers(4, LEVEL, LEVEL),
            likelihood(families.QuantizedNormal, 4, scale="per pixel"),
            partial(quantized_normal, scale=floored),
        ),
    ],
    "DiscretizedLogisticMixture": [
        Case(
            numbers(12, LEVEL, LEVEL),
            likelihood(families.DiscretizedLogisticMixture, 12, components=2),
            logistic_mixture,
        ),
        Case(
            numbers(20, LEVEL, LEVEL, LEVEL),
            likelihood(families.DiscretizedLogisticMixture, 20, (3, 1, 1), components=2),
            colours,
        ),
    ],
    "CategoricalLikelihood": [
        Case(numbers(6, TERNARY, TERNARY), likelihood(families.CategoricalLikelihood, 6, levels=3), categorical)
    ],
    "StandardNormal": [Case(numbers(3), families.StandardNormal(3)().log_prob, standard_normal)],
    "Normal": [Case(numbers(6), family(families.Normal, 2), normal)],
    "MultivariateNormal": [Case(numbers(12), family(families.MultivariateNormal, 3), multivariate_normal)],
    "Mixture": [
        Case(numbers(12), family(families.Mixture, 2, components=2), partial(split_mixture, d=2)),
        Case(numbers(7), family(families.Mixture, 1, components=2), partial(split_mixture, d=1)),
    ],
    "Vamp": [Case(numbers(10), vamp, exact_vamp)],
    "SemiImplicit": [Case(numbers(6), semi_implicit, exact_semi_implicit)],
    "ProbabilisticPCA": [
        Case(numbers(7), pca_site, exact_pca_site),
        Case(numbers(7), pca_whole, exact_pca_whole),
        Case(numbers(9), pca_posterior, exact_pca_posterior),
    ],
}
ELSEWHERE = {"Flow", "LatentVariableModel"}
"""Tested below; and a program of parts that are tested here."""
WITHOUT = {"Delta", "Implicit"}
"""Those that have no density."""
DIVERGENCES = {
    "normal, normal": Case(
        numbers(12), kl_of(normal_of(0), normal_of(6)), partial(exact_kl, full_q=False, full_p=False)
    ),
    "full, normal": Case(numbers(15), kl_of(full_of(0), normal_of(9)), partial(exact_kl, full_q=True, full_p=False)),
    "normal, full": Case(numbers(15), kl_of(normal_of(0), full_of(6)), partial(exact_kl, full_q=False, full_p=True)),
    "full, full": Case(numbers(18), kl_of(full_of(0), full_of(9)), partial(exact_kl, full_q=True, full_p=True)),
}
FLOWS = [
    (name, direction, features)
    for name in BUILDERS
    for direction in ("sampling", "density")
    for features in (1, 3)
    if (name, direction) != ("planar", "sampling")  # which scores nothing but its own draws
]


def test_every_density_is_in_a_catalogue():
    assert {*families.__all__, *pg.models.__all__} == DENSITIES.keys() | ELSEWHERE | WITHOUT
    assert {name for name, _, _ in FLOWS} == BUILDERS.keys()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{name}-{i}") for name, cases in DENSITIES.items() for i, case in enumerate(cases)]
)
@run
@given(data=st.data())
def test_densities(case, data):
    check(case, data.draw(rows(*case.columns)))


@pytest.mark.parametrize("case", DIVERGENCES.values(), ids=DIVERGENCES)
@run
@given(data=st.data())
def test_divergences(case, data):
    check(case, data.draw(rows(*case.columns)), sign=-1)


@pytest.mark.parametrize(("name", "direction", "features"), FLOWS)
@run
@given(data=st.data(), larger=st.sampled_from([1.0, 10.0, 1e3, 1e8]))
def test_flows(name, direction, features, data, larger):
    case = flow_case(name, direction, features, larger)
    check(case, data.draw(rows(*case.columns)))


# Supports.

HALF_LINES = [
    constraints.positive,
    constraints.nonnegative,
    constraints.greater_than(1.0),
    constraints.greater_than(torch.tensor(-3e8)),
    constraints.greater_than_eq(1e-20),
    constraints.less_than(0.0),
    constraints.less_than(2.0),
]


@pytest.mark.parametrize("support", HALF_LINES, ids=str)
@run
@given(numbers=st.lists(NUMBER, min_size=8, max_size=8))
def test_half_lines_are_never_left(support, numbers):
    raw = torch.tensor(numbers, requires_grad=True)
    transform = to_support(support)
    y = transform(raw)
    log_det = transform.log_abs_det_jacobian(raw, y)
    assert support.check(y).all() and y.isfinite().all() and log_det.isfinite().all()
    (slope,) = torch.autograd.grad((y + log_det).sum(), raw)
    assert slope.isfinite().all()
    assert transform.inv(y).isfinite().all()


@run
@given(raw=st.floats(-75, 75))
def test_half_lines_are_exponentials_where_single_precision_tells_no_difference(raw):
    """s is u (1 - ε), ε = |u/80|¹⁶/16, which single precision can tell from 1 beyond 28; its slope and inverse too."""
    u = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
    transform = to_support(constraints.positive)
    y = transform(u)
    (slope,) = torch.autograd.grad(y, u)
    assert transform.log_abs_det_jacobian(u, y).item() == pytest.approx(slope.log().item(), abs=1e-9)
    assert transform.inv(y).item() == pytest.approx(raw, rel=1e-9, abs=1e-12)
    assert y.log().item() == pytest.approx(raw, rel=1.01 * (abs(raw) / 80) ** 16 / 16 + 1e-12, abs=1e-12)
    single = torch.tensor(raw, dtype=torch.float32)
    if abs(raw) < 28:
        assert torch.equal(transform(single), single.exp())


def test_half_lines_remember_draws_for_their_density():
    """Of 1 + e⁻⁴⁰ nothing but 1 is left, and at 1e4 nothing but the end of the line."""
    for loc in (-40.0, 1e4):
        normal = dist.Normal(torch.full((5,), loc), 1.0)
        transform = to_support(constraints.greater_than(1.0), cache_size=1)
        y = dist.TransformedDistribution(normal, [transform]).rsample()
        x, _ = transform._cached_x_y
        expected = normal.log_prob(x) - transform.log_abs_det_jacobian(x, y)
        torch.testing.assert_close(dist.TransformedDistribution(normal, [transform]).log_prob(y), expected)
        assert (transform.inv(y.clone()) - x).abs().min() > 10  # which is lost to all who don't


def test_half_lines_remember_no_draw_without_its_graph():
    transform = to_support(constraints.positive, cache_size=1)
    y = transform(torch.tensor([0.3, -2.0])).requires_grad_()
    (slope,) = torch.autograd.grad(transform.inv(y).sum(), y)
    torch.testing.assert_close(slope, 1 / y.detach())


def positive_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.full((3,), 2.0), 1.0).to_event(1))
        size = pyro.sample("size", dist.Pareto(1.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Laplace(rate.sum(-1) + size, scale), obs=x)


@pytest.mark.usefixtures("parameter_store")
@pytest.mark.parametrize("family", [families.Normal, families.Flow])
@pytest.mark.parametrize("raw", [-1e4, -104.0, -20.0, 90.0, 1e4])
def test_guides_of_positive_sites_at_extreme_outputs(family, raw):
    guide = AmortizedGuide(positive_sites, nn.Unflatten(0, (-1, 1)), family)
    for conditional in guide.conditionals.values():
        start = conditional.parameters_of if family is families.Normal else conditional.affine
        start.start_at(torch.full((start.outputs // 2,), raw), 0)
    trace = poutine.trace(guide).get_trace(torch.ones(4))
    for name, site in guide.sites.items():
        node = trace.nodes[name]
        assert site.support.check(node["value"]).all() and node["value"].isfinite().all()
        assert node["fn"].log_prob(node["value"]).isfinite().all()
    loss = ELBO(2)(positive_sites, guide)(torch.ones(4))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters() if parameter.grad is not None)


def test_closed_form_divergence_of_positive_values_is_kept():
    q = dist.TransformedDistribution(dist.Normal(0.3, 0.5), [to_support(constraints.positive, cache_size=1)])
    expected = torch.distributions.kl_divergence(dist.LogNormal(0.3, 0.5), dist.LogNormal(0.0, 1.0))
    torch.testing.assert_close(closed_form_kl(q, dist.LogNormal(0.0, 1.0)), expected)
    other = dist.TransformedDistribution(dist.Normal(0.3, 0.5), [to_support(constraints.greater_than(1.0))])
    assert closed_form_kl(other, dist.LogNormal(0.0, 1.0)) is None


# What is not hidden.


@pytest.mark.parametrize("family", [families.Normal, families.MultivariateNormal, families.Mixture, families.Flow])
def test_a_gradient_of_the_models_own_that_is_not_a_number_is_seen(family):
    """The root of a negative number, which is left out of the value and not of the gradient."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.where(z > 0, z.sqrt(), torch.zeros(()))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.zeros(64, 2)
    guide = AmortizedGuide(model, nn.Identity(), family, example=x[:2])
    with pytest.raises(pg.inference.NonFiniteLoss):
        pg.fit(model, guide, ELBO(), x, steps=5, batch_size=64, progress=False)


@pytest.mark.parametrize("family", [families.Normal, families.Mixture, families.Flow])
def test_half_precision_has_gradients(family):
    made = family(2, 3)
    with torch.autocast("cpu", torch.float16):
        made(torch.randn(4, 3)).log_prob(torch.randn(4, 2)).sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in made.parameters())


def test_divergences_that_users_register_are_taken():
    class Own(dist.Normal):
        pass

    @torch.distributions.kl.register_kl(Own, torch.distributions.Normal)
    def _own(q: Any, p: Any) -> Tensor:
        return torch.full(q.batch_shape, 42.0)

    q, p = Own(torch.zeros(3, 2), 1.0), dist.Normal(torch.zeros(2), 1.0)
    assert (closed_form_kl(q, p.expand((3, 2))) == 42).all()
    assert (closed_form_kl(q.to_event(1), p.to_event(1)) == 84).all()


def test_principal_components_of_whole_numbers():
    model, x = ProbabilisticPCA(2, 3), torch.tensor([[1, 0, 3], [2, 2, 0]])
    torch.testing.assert_close(model.log_likelihood(x), model.log_likelihood(x.float()))
    torch.testing.assert_close(model.posterior(x).mean, model.posterior(x.float()).mean)


# Gradients of draws.


@pytest.mark.parametrize(("features", "raw"), [(400, 0.0), (20, -1e4), (20, 1e4)])
def test_draws_of_a_mixture_have_finite_gradients(features, raw):
    """In single precision the density of these values is 0 or ∞."""
    made = families.Mixture(features, components=3)
    with torch.no_grad():
        made.parameters_of.free[3 * features : 6 * features] = raw
    made().rsample((4,)).sum().backward()
    gradient = made.parameters_of.free.grad
    assert gradient.isfinite().all() and gradient[: 3 * features].abs().sum() > 0


# Ratios.

RATIOS = {
    ratios.Logistic: 8.0,
    ratios.JensenShannon: 8.0,
    ratios.DonskerVaradhan: 8.0,
    ratios.NWJ: 64.0,  # an exponential of up to 31, whose argument has been rounded
    ratios.LeastSquares: 16.0,
    ratios.Wasserstein: 8.0,
    ratios.Hinge: 8.0,
}
"""Those that read something off a critic's output, and the errors of that, besides those of sums."""


def test_every_ratio_is_in_the_catalogue():
    kinds = [kind for kind in vars(pg.inference).values() if isinstance(kind, type) and issubclass(kind, ratios.Ratio)]
    assert {*kinds} - RATIOS.keys() == {ratios.Ratio, pg.inference.Telescoping}
    assert issubclass(pg.inference.Telescoping, ratios.Logistic)


@pytest.mark.parametrize("kind", RATIOS)
@run
@given(outputs=st.lists(NUMBER, min_size=8, max_size=8))
def test_ratios(kind, outputs):
    """A mean has the errors of its largest terms. A loss that is past the largest number is ∞, as it should be."""

    def found(outputs: Tensor) -> dict[str, Tensor]:
        ratio, (t1, t0) = kind(nn.Identity()).to(outputs.dtype), outputs.chunk(2)
        read = {
            "loss": ratio._critic_loss(t1, t0),
            "divergence": ratio._divergence(t1, t0),
            "generator": ratio._generator_loss(t1).mean(),
        }
        return read | {"log ratio": ratio._log_ratio(t1).mean()} if kind.gives_log_ratio else read

    single = torch.tensor(outputs, requires_grad=True)
    double = single.detach().double()
    exact = found(double)
    size = 8 + double.abs().mean()
    if kind is ratios.NWJ:
        size = size + ratios._tangent_exp(double[4:] - 1).mean()
    for name, value in found(single).items():
        terms = 8 * (1 + double.square().mean()) if kind is ratios.LeastSquares and name != "log ratio" else size
        tolerance = U * (RATIOS[kind] + len(outputs)) * terms
        (slope,) = torch.autograd.grad(value, single, retain_graph=True)
        assert not value.isnan() and slope.isfinite().all(), name
        if exact[name].abs() + terms < LARGEST:
            assert (value.double() - exact[name]).abs() <= tolerance, name

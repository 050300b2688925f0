"""Distributions on levels: they sum to one, agree with float64, and sample what they score."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_ndtr, logsumexp
from scipy.stats import chi2
from torch import Tensor, nn

from pyrogen.distributions.level_likelihoods import (
    CategoricalLikelihood,
    DiscretizedLogisticMixture,
    QuantizedNormal,
)
from pyrogen.distributions.levels import CategoricalLevels, Levels, LogisticMixtureLevels, NormalLevels

# Float32: 256 terms, each right to about 1e-6 of itself (a cancellation of at most 20 in the interval).
DTYPES = [(torch.float64, 1e-8), (torch.float32, 1e-5)]


def grid(levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(levels, dtype=dtype) / (levels - 1)


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_levels_constraint_takes_the_grid_and_no_more(levels):
    constraint = Levels(levels)
    for dtype in (torch.float32, torch.float64):
        x = grid(levels, dtype)
        assert constraint.check(x).all()
        assert not constraint.check(x[:-1] + 0.3 / (levels - 1)).any()
        outside = torch.tensor([-1 / (levels - 1), levels / (levels - 1), math.nan], dtype=dtype)
        assert not constraint.check(outside).any()
    assert repr(constraint) == f"Levels({levels})" and constraint.is_discrete and constraint.event_dim == 0
    assert constraint == Levels(levels) and constraint != Levels(levels + 1)


def test_levels_constraint_on_stored_bytes_and_rounded_types():
    assert Levels(256).check(torch.arange(256, dtype=torch.uint8) / 255).all()
    assert Levels(256).check(grid(256).half()).all() and Levels(17).check(grid(17).bfloat16()).all()
    # Bytes that were never divided by 255 are caught, but for 0 and 1, which are levels.
    assert Levels(256).check(torch.arange(256, dtype=torch.uint8)).sum() == 2


@pytest.mark.parametrize("levels", [0, 1, -3, 2.0, True, "256"])
def test_bad_numbers_of_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be an integer of at least 2"):
        QuantizedNormal(nn.Linear(1, 1), levels=levels)


@pytest.mark.parametrize("components", [0, -1, 1.5, True])
def test_bad_numbers_of_components_are_refused(components):
    with pytest.raises(ValueError, match="components must be a positive integer"):
        DiscretizedLogisticMixture(nn.Linear(1, 1), components=components)


def test_categorical_by_hand():
    d = CategoricalLevels(torch.tensor([0.0, math.log(2.0), math.log(5.0)], dtype=torch.float64))
    torch.testing.assert_close(d.log_prob(grid(3)).exp(), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64) / 8)
    assert d.mean.item() == pytest.approx((0.5 * 2 + 5) / 8)


def test_normal_by_hand():
    # Three levels with a standard deviation of a half: the edges of the middle one lie half a deviation away.
    p = NormalLevels(torch.tensor(0.5, dtype=torch.float64), 0.5, levels=3).log_prob(grid(3)).exp()
    inside = math.erf(0.5 / math.sqrt(2))
    assert p.tolist() == pytest.approx([(1 - inside) / 2, inside, (1 - inside) / 2], abs=1e-12)


def test_logistic_by_hand():
    d = LogisticMixtureLevels(*torch.tensor([[[0.0]], [[0.5]], [[0.5]]]).double(), event_dim=1, levels=3)
    p = d.log_prob(grid(3)[:, None]).exp()
    edge = 1 / (1 + math.exp(0.5))
    assert p.tolist() == pytest.approx([edge, 1 - 2 * edge, edge], abs=1e-12)


LOCS = [-50.0, -1.0, -0.01, 0.0, 0.301, 0.5, 1.0, 1.7, 50.0]
SCALES = [1e-3, 4e-3, 0.05, 0.07842, 0.0785, 0.2, 1.0, 20.0, 1e4]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    loc, scale = torch.tensor(list(itertools.product(LOCS, SCALES)), dtype=dtype).T
    return loc, scale


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_normal_sums_to_one(dtype, tolerance, levels):
    d = NormalLevels(*pairs(dtype), levels=levels)
    total = d.log_prob(grid(levels, dtype)[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_mixture_sums_to_one(dtype, tolerance, levels):
    loc, scale = (v[:, None, None] for v in pairs(dtype))
    loc, scale = torch.cat([loc, loc.flip(0)], 1), torch.cat([scale, scale], 1)  # two components each
    logits = torch.tensor([[0.3], [-0.5]], dtype=dtype).expand_as(loc)
    d = LogisticMixtureLevels(logits, loc, scale, event_dim=1, levels=levels)
    total = d.log_prob(grid(levels, dtype)[:, None, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_categorical_sums_to_one(dtype, tolerance):
    torch.manual_seed(0)
    logits = torch.cat([torch.randn(3, 256), 100 * torch.randn(3, 256), torch.zeros(1, 256)]).to(dtype)
    total = CategoricalLevels(logits).log_prob(grid(256, dtype)[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


def normal_reference(k: np.ndarray, loc: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    """Log-masses in float64 from SciPy's log-CDFs, or by quadrature where their difference cancels."""
    steps = levels - 1
    a, b = ((k - 0.5) / steps - loc) / scale, ((k + 0.5) / steps - loc) / scale
    a, b = (
        np.where(a + b > 0, -b, a),
        np.where(a + b > 0, -a, b),
    )  # both to the left, where log-CDFs keep digits
    with np.errstate(divide="ignore"):
        difference = log_ndtr(b) + np.log1p(-np.exp(log_ndtr(a) - log_ndtr(b)))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half = 0.5 / (steps * scale)
    middle = (k / steps - loc) / scale
    log_density = -0.5 * (middle[..., None] + half[..., None] * nodes) ** 2 - 0.5 * math.log(2 * math.pi)
    quadrature = np.log(half) + logsumexp(log_density, -1, b=weights)
    inside = np.where(half * np.abs(middle) < 10, quadrature, difference)
    inside = np.where(half > 2, difference, inside)
    lowest, highest = log_ndtr((0.5 / steps - loc) / scale), log_ndtr((loc - (steps - 0.5) / steps) / scale)
    return np.where(k == 0, lowest, np.where(k == steps, highest, inside))


# Float32 reads x - loc to eps * max(|loc|, 1), which moves a log-mass by its slope, |x - loc| / scale^2, of
# that: under 2e-4 within 3 deviations of 1e-3, and further out small against the log-mass itself.
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-8), (torch.float32, 2e-5, 2e-4)])
@pytest.mark.parametrize("levels", [2, 256])
def test_normal_agrees_with_reference_far_out(dtype, rtol, atol, levels):
    loc, scale = pairs(dtype)
    k = torch.arange(levels)[:: max(1, levels // 15)].tolist() + [levels - 1]
    got = NormalLevels(loc, scale, levels).log_prob(grid(levels, dtype)[k][:, None])
    k_, loc_, scale_ = np.broadcast_arrays(np.array(k)[:, None], loc.double().numpy(), scale.double().numpy())
    reference = torch.tensor(normal_reference(k_, loc_, scale_, levels))
    torch.testing.assert_close(got.double(), reference, rtol=rtol, atol=atol)


@pytest.mark.parametrize("levels", [2, 256])
def test_normal_gradients_are_finite_and_agree_with_float64(levels):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = grid(levels, dtype)[:: max(1, levels // 15)][:, None]
        loc, scale = (v.to(dtype).expand(len(x), -1).clone().requires_grad_() for v in pairs(torch.float32))
        log_p = NormalLevels(loc, scale, levels).log_prob(x)
        # In deviations: a gradient that is zero by symmetry is compared with the steepness around it.
        gradients.append([(g * scale).double() for g in torch.autograd.grad(log_p.sum(), (loc, scale))])
    for single, double in zip(*gradients, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3)


def test_gradients_in_float64_by_finite_differences():
    torch.manual_seed(0)
    x = grid(9)[torch.randint(9, (4, 3, 1, 2))]
    loc = torch.randn(4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    # Also around the switch between the narrow and the wide form: 0.05 deviations wide is a scale of 2.5.
    raw = torch.tensor([-3.0, 0.0, 0.913, 0.92], dtype=torch.float64).reshape(4, 1, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, r: NormalLevels(m, r.exp(), 9).log_prob(x), (loc, raw))

    def mixture(logits, m, r, c):
        return LogisticMixtureLevels(logits, m, r.exp(), c.tanh(), event_dim=3, levels=9).log_prob(x)

    sizes = [(4, 2, 1, 1, 2)] + 3 * [(4, 2, 3, 1, 2)]
    arguments = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(mixture, arguments)


def colour_mixture(levels: int, dtype: torch.dtype = torch.float64, scale: float = 0.15) -> LogisticMixtureLevels:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    s = scale * normal(3, 3, 1, 1).exp()
    return LogisticMixtureLevels(
        normal(3, 1, 1, 1),
        0.5 + 0.3 * normal(3, 3, 1, 1),
        s,
        normal(3, 3, 1, 1).tanh(),
        event_dim=3,
        levels=levels,
    )


def all_colours(levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cartesian_prod(*3 * [grid(levels, dtype)])[:, :, None, None]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("levels", [2, 4, 9])
def test_colours_sum_to_one(dtype, tolerance, levels):
    p = colour_mixture(levels, dtype).log_prob(all_colours(levels, dtype)).exp()
    assert p.shape == (levels**3,)
    assert p.sum().item() == pytest.approx(1, abs=tolerance)


def logistic_masses(loc: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    """The masses of all levels, on the last axis: plain differences of CDFs, for moderate arguments."""
    edges = (np.arange(levels - 1) + 0.5) / (levels - 1)
    cdf = expit((edges - np.asarray(loc)[..., None]) / np.asarray(scale)[..., None])
    return np.diff(cdf, prepend=0.0, append=1.0)


def test_colours_of_256_levels_by_their_conditionals():
    d = colour_mixture(256)
    logits, loc, s, c = (t.numpy().reshape(3, -1) for t in (d.logits, d.loc, d.scale, d.coefficients))
    weights = np.exp(logits[:, 0] - logsumexp(logits))
    for r, g in [(0, 0), (0, 255), (37, 120), (200, 3), (255, 255)]:
        red, green = r / 255 - 0.5, g / 255 - 0.5
        p = weights * logistic_masses(loc[:, 0], s[:, 0], 256)[:, r]
        p = p * logistic_masses(loc[:, 1] + c[:, 0] * red, s[:, 1], 256)[:, g]
        blue = logistic_masses(loc[:, 2] + c[:, 1] * red + c[:, 2] * green, s[:, 2], 256)
        x = torch.stack([torch.full((256,), r / 255).double(), torch.full((256,), g / 255).double(), grid(256)], 1)
        got = d.log_prob(x[:, :, None, None]).exp()
        torch.testing.assert_close(got, torch.tensor(p @ blue), rtol=1e-9, atol=0)
        # Given red and green, blue's levels sum to one.
        assert got.sum().item() == pytest.approx(p.sum(), rel=1e-12)


@pytest.mark.parametrize("loc", [-50.0, 0.3, 50.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_logistic_mixture_far_out_agrees_with_float64(loc, scale):
    x = grid(256)[torch.randint(256, (40, 3, 1, 1), generator=torch.Generator().manual_seed(0))]
    x[:2] = torch.tensor([0.0, 1.0])[:, None, None, None]
    results = []
    for dtype in (torch.float32, torch.float64):
        m = torch.full((2, 3, 1, 1), loc, dtype=dtype, requires_grad=True)
        s = torch.full((2, 3, 1, 1), scale, dtype=torch.float32).to(dtype).requires_grad_()
        logits = torch.tensor([100.0, -100.0], dtype=dtype).reshape(2, 1, 1, 1).requires_grad_()
        c = torch.full((2, 3, 1, 1), 0.5, dtype=dtype, requires_grad=True)
        log_p = LogisticMixtureLevels(logits, m, s, c, event_dim=3).log_prob(x.to(dtype))
        results.append([log_p, *torch.autograd.grad(log_p.sum(), (m, s, logits, c))])
    for single, double in zip(*results, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-3)


def assert_frequencies(counts: Tensor, p: Tensor) -> None:
    """A chi-square test that a true sampler fails once in a million runs."""
    expected = p * counts.sum()
    kept = expected > 5
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]]).double()
    wanted = torch.cat([expected[kept], expected[~kept].sum()[None]]).double()
    statistic = ((observed - wanted) ** 2 / wanted.clamp_min(1e-3)).sum().item()
    assert statistic < chi2.isf(1e-6, int(kept.sum()))


def test_samples_have_the_probabilities_that_are_scored():
    torch.manual_seed(0)
    d = NormalLevels(torch.tensor([0.1, 0.6]), torch.tensor([0.2, 0.05]), levels=17)
    x = d.sample((20_000,))
    for i in range(2):
        counts = (x[:, i] * 16).round().long().bincount(minlength=17)
        assert_frequencies(counts, d.log_prob(grid(17, torch.float32)[:, None])[:, i].exp())
    c = CategoricalLevels(torch.randn(17))
    assert_frequencies((c.sample((20_000,)) * 16).round().long().bincount(minlength=17), c.log_prob(grid(17)).exp())


def test_colour_samples_have_the_probabilities_that_are_scored():
    torch.manual_seed(0)
    d = colour_mixture(4)
    k = (d.sample((30_000,)) * 3).round().long().reshape(-1, 3)
    counts = (k @ torch.tensor([16, 4, 1])).bincount(minlength=64)
    assert_frequencies(counts, d.log_prob(all_colours(4)).exp())


@pytest.mark.parametrize("levels", [4, 256])
def test_means_are_within_half_a_level(levels):
    loc, scale = pairs(torch.float64)
    loc, scale = loc[scale > 3e-3], scale[scale > 3e-3]
    d = NormalLevels(loc, scale, levels)
    exact = (d.log_prob(grid(levels)[:, None]).exp() * grid(levels)[:, None]).sum(0)
    half = 0.5 / (levels - 1) + 1e-9
    assert (d.mean - exact).abs().max() <= half
    # With scales well over a level, rounding averages out; the two folded tails keep their mass exactly.
    smooth = (scale * (levels - 1) > 1) & (loc > 0.2) & (loc < 0.8) & (scale < 0.06)
    assert (d.mean - exact)[smooth].abs().sum() < 1e-6 * (1 + smooth.sum())
    mixture = LogisticMixtureLevels(
        torch.zeros(2, 1).double(),
        torch.tensor([[0.2], [0.9]]).double(),
        torch.full((2, 1), 0.1).double(),
        event_dim=1,
        levels=levels,
    )
    p = mixture.log_prob(grid(levels)[:, None]).exp()
    assert abs(mixture.mean.item() - (p @ grid(levels)).item()) <= half


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_means_are_mirrored_about_one_half_and_right_far_away(scale):
    loc = torch.tensor([0.5, 0.6, 0.9, 1.0, 1.3, 4.0, 1e3, 1e7, 1e20], requires_grad=True)

    def means(x):
        normal = NormalLevels(x, torch.full_like(x, scale), 17).mean
        parameters = torch.zeros(1, 1), x.unsqueeze(0), torch.full((1, len(x)), scale)
        return torch.stack([normal, LogisticMixtureLevels(*parameters, event_dim=1, levels=17).mean])

    found = means(loc)
    torch.testing.assert_close(found, 1 - means(1 - loc), rtol=0, atol=1e-6)
    assert (found[:, -3:] == 1).all()
    (slope,) = torch.autograd.grad(found.sum(), loc)
    (mirrored,) = torch.autograd.grad(means(1 - loc).sum(), loc)
    torch.testing.assert_close(slope, -mirrored, rtol=1e-3, atol=1e-6)
    assert slope[0] > 0.1 and (slope[-3:] == 0).all()


def test_colour_mean_follows_the_coupling():
    d = colour_mixture(256, scale=0.02)
    x = all_colours(16)
    narrow = LogisticMixtureLevels(d.logits, d.loc, d.scale, d.coefficients, event_dim=3, levels=16)
    exact = (narrow.log_prob(x).exp()[:, None] * x.flatten(1)).sum(0)
    # Half a level from rounding to 16 levels, and as much again carried from one colour to the next.
    assert (d.mean.flatten() - exact).abs().max() < 1 / 15


def test_channels_are_read_in_the_documented_order():
    shape = DiscretizedLogisticMixture.decoder_shape((3, 1, 1), components=2)
    assert shape == (20, 1, 1)
    linear = nn.Linear(1, 20)
    with torch.no_grad():
        linear.bias.copy_(torch.arange(20.0) / 10)
    d = DiscretizedLogisticMixture(nn.Sequential(linear, nn.Unflatten(1, shape)), components=2)(torch.zeros(1))
    torch.testing.assert_close(d.logits.flatten(), torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(d.loc.squeeze(), 0.5 + torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.6, 0.7]]))
    raw = torch.tensor([[0.8, 0.9, 1.0], [1.1, 1.2, 1.3]])
    torch.testing.assert_close(d.scale.squeeze(), 1e-3 + torch.log1p(raw.exp()))
    torch.testing.assert_close(d.coefficients.squeeze(), torch.tensor([[1.4, 1.5, 1.6], [1.7, 1.8, 1.9]]).tanh())


def test_categorical_parameters_are_one_block_a_level():
    # Channels 0-1 are level 0 of both values, 2-3 level 1, 4-5 level 2.
    decoder = nn.Linear(1, 6)
    d = CategoricalLikelihood(decoder, levels=3)(torch.zeros(1)).base_dist
    torch.testing.assert_close(d.logits, decoder.bias.reshape(3, 2).T)


def test_coefficients_need_three_colours():
    with pytest.raises(ValueError, match=r"coefficients need an event of shape \(3, H, W\)"):
        p = torch.ones(2, 4)
        LogisticMixtureLevels(p, p, p, coefficients=p, event_dim=1)


def test_values_off_the_grid():
    on = torch.tensor(128 / 255)
    for d in (NormalLevels(torch.tensor(0.4), 0.1), CategoricalLevels(torch.zeros(256))):
        with pytest.raises(ValueError, match=r"support \(Levels\(256\)\)"):
            d.log_prob(torch.tensor(0.5))
        d._validate_args = False
        assert d.log_prob(torch.tensor(0.501)) == d.log_prob(on)
        assert d.log_prob(torch.tensor(7.0)) == d.log_prob(torch.tensor(1.0))

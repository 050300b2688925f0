"""Marginal densities against integrals of the joint one, and densities by neighbours against all distances."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from torch.distributions import constraints

from pyrogen.distributions import Flow
from pyrogen.evaluation.single_values import marginal_log_prob, neighbour_log_density, unconstrained
from pyrogen.inference.programs import Site

pytestmark = pytest.mark.usefixtures("float64")


def correlated(shift=0.0):
    return dist.MultivariateNormal(torch.tensor([0.5, -1.0]) + shift, torch.tensor([[1.0, 0.6], [0.6, 0.8]]))


KNOWN = {
    "independent": lambda: dist.Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])).to_event(1),
    "multivariate": correlated,
    "low rank": lambda: dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.tensor([0.2, 0.5])),
    "diagonal mixture": lambda: dist.MixtureOfDiagNormals(
        torch.randn(3, 2), 0.5 + torch.rand(3, 2), torch.tensor([0.0, 1.0, -1.0])
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.tensor([0.0, 1.0])), correlated(torch.tensor([[0.0], [2.0]]))
    ),
    "element-wise": lambda: dist.TransformedDistribution(
        correlated(), [T.AffineTransform(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -2.0]), event_dim=1)]
    ),
    "composed": lambda: dist.TransformedDistribution(
        correlated(), [T.ComposeTransform([T.SigmoidTransform(), T.AffineTransform(0.0, 3.0)])]
    ),
    "independent transform": lambda: dist.TransformedDistribution(
        correlated(), [T.IndependentTransform(T.ExpTransform(), 1)]
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_marginals_are_integrals_of_the_joint_density(name):
    fn = KNOWN[name]()
    lower, upper = {"composed": (0.0, 3.0), "independent transform": (0.0, 60.0)}.get(name, (-16.0, 16.0))
    grid = torch.linspace(lower, upper, 40_002)[1:-1]
    draws = fn.sample((3,))
    found = marginal_log_prob(fn, draws)
    assert found.shape == draws.shape
    for j in range(2):
        z = draws[:, None].expand(3, len(grid), 2).clone()
        z[..., 1 - j] = grid
        integral = torch.trapezoid(fn.log_prob(z).exp(), grid, dim=1).log()
        # The trapezoid rule on 40 000 points; it misses what tails of exp reach past 60.
        assert torch.allclose(found[:, j], integral, atol=1e-4)


def test_marginals_over_batches_and_shapes():
    reshaped = dist.TransformedDistribution(
        dist.MultivariateNormal(torch.randn(5, 4), torch.eye(4) + 0.5), [T.ReshapeTransform((4,), (2, 2))]
    )
    values = torch.randn(3, 5, 2, 2)
    of_base = dist.Normal(reshaped.base_dist.loc, 1.5**0.5).log_prob(values.flatten(2)).view(3, 5, 2, 2)
    assert torch.allclose(marginal_log_prob(reshaped, values), of_base)
    positive = dist.TransformedDistribution(reshaped, [T.ExpTransform()])
    assert torch.allclose(marginal_log_prob(positive, values.exp()), of_base - values)
    assert marginal_log_prob(dist.Gamma(2.0, torch.ones(5)), torch.ones(3, 5)).shape == (3, 5)
    alone = Flow(1, context=2)(torch.zeros(5, 2))  # the one value of an event is its own marginal
    assert torch.equal(marginal_log_prob(alone, value := alone.sample())[:, 0], alone.log_prob(value))


def test_what_has_no_marginals_in_closed_form():
    flow = Flow(2)()
    simplex = dist.Dirichlet(torch.ones(3))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(4)), dist.Dirichlet(torch.ones(4, 3)))
    for fn in (flow, simplex, mixture, dist.TransformedDistribution(correlated(), [T.StickBreakingTransform()])):
        assert marginal_log_prob(fn, fn.sample()) is None


@pytest.mark.parametrize(
    ("support", "single"),
    [
        (constraints.real, True),
        (constraints.independent(constraints.positive, 1), True),
        (constraints.interval(-1.0, 2.0), True),
        (constraints.simplex, False),
    ],
)
def test_densities_of_unconstrained_values(support, single):
    """The change of a density is the determinant of the map's derivative, here by differences of the draws' own map."""
    z = dist.Dirichlet(torch.ones(3)).sample((6,))
    u, gain, found = unconstrained(Site("z", (3,), support, ()), z)
    assert found == single and u.shape == ((6, 3) if single else (6, 2)) and gain.shape == ((6, 3) if single else (6,))
    back = dist.transforms.biject_to(support)
    determinants = []
    for row in u:
        derivative = torch.autograd.functional.jacobian(lambda each: back(each)[: len(each)], row)
        determinants.append(derivative.det().abs().log())
    assert torch.allclose(gain.reshape(6, -1).sum(1), torch.stack(determinants), atol=1e-9)


def test_neighbours_by_all_distances():
    z, p = torch.randn(200, 3), torch.randn(300, 3)
    distances = (z[:, None] - z).abs()
    distances[range(200), range(200)] = math.inf
    for others, all_distances in ((199, distances), (300, (z[:, None] - p).abs())):
        radius = all_distances.sort(1).values[:, 9]
        constant = torch.digamma(torch.tensor(10.0)) - torch.digamma(torch.tensor(others + 1.0))
        expected = constant - torch.log(2 * radius)
        found = neighbour_log_density(z, z if others == 199 else p, own=others == 199)
        assert torch.allclose(found, expected, atol=1e-9)
    assert torch.equal(neighbour_log_density(z[:50], z, own=True), neighbour_log_density(z, z, own=True)[:50])


def test_divergences_by_neighbours():
    """Means over 100 columns, each of 1000 draws with a standard error of about 0.03, 0.06 for two samples: five of a
    tenth of that, and 0.02 for the distance from N(0, 1) to a narrow mixture's two samples."""
    narrow = 3 * (2.0 * torch.randint(2, (5000, 100)) - 1) + 0.2 * torch.randn(5000, 100)
    log_q = neighbour_log_density(narrow[:1000], narrow, own=True)
    expected = -math.log(2) + 0.5 * (0.2**2 + 9 - 1) - math.log(0.2)
    found = (log_q - dist.Normal(0.0, 1.0).log_prob(narrow[:1000])).mean()
    assert found == pytest.approx(expected, abs=0.015)
    shifted, normal = 1 + torch.randn(5000, 100), torch.randn(5000, 100)
    log_q = neighbour_log_density(shifted[:1000], shifted, own=True)
    found = (log_q - neighbour_log_density(shifted[:1000], normal, own=False)).mean()
    assert found == pytest.approx(0.5, abs=0.05)


def test_what_neighbours_cannot_estimate():
    with pytest.raises(ValueError, match="needs more draws than 10"):
        neighbour_log_density(torch.zeros(10, 1), torch.zeros(10, 1), own=True)
    with pytest.raises(ValueError, match="more than 10 draws of a latent value coincide"):
        neighbour_log_density(torch.zeros(11, 1), torch.zeros(11, 1), own=True)

"""The normal families: their parameters' places, and precision where scales differ."""

import numpy as np
import pyro
import pytest
import torch

from pyrogen.distributions import Delta, Flow, Mixture, MultivariateNormal, Normal


@pytest.mark.parametrize("family", [Delta, Flow, Mixture, MultivariateNormal, Normal])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((7, 4)), r"expected a context of shape \(..., 4\), got array"),
        (torch.zeros(()), r"expected a context of shape \(..., 4\), got shape \(\)"),
        (torch.full((7, 4), torch.nan), "the context holds NaN or infinity"),
    ],
)
def test_wrong_context_is_refused(family, given, message):
    with pytest.raises(ValueError, match=message):
        family(2, 4)(given)


def test_the_factor_is_scales_times_a_unit_triangle():
    family = MultivariateNormal(3)
    with torch.no_grad():
        family.parameters_of.free.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0, 0.0, 0.0, 0.3, -0.2, 0.7]))
    q = family()
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.3, 1.0, 0.0], [-0.2, 0.7, 1.0]])
    torch.testing.assert_close(q.scale_tril, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(q.loc, torch.tensor([0.5, -1.0, 2.0]))


def test_own_draws_have_their_density_however_different_the_scales():
    # Six orders of magnitude in single precision. The mean of 2000 log-densities has a standard error of
    # √(5 / 2000) = 0.05: 6 of these, failure rate below 1e-8.
    torch.manual_seed(0)
    family, d = MultivariateNormal(10), 10
    with torch.no_grad():
        family.parameters_of.free[d : 2 * d] = torch.linspace(-14.0, 5.0, d)[torch.randperm(d)]
        family.parameters_of.free[2 * d :] = torch.randn(d * (d - 1) // 2)
    q = family()
    scales = q.scale_tril.diagonal()
    assert scales.max() / scales.min() > 1e6
    found = q.log_prob(q.sample((2000,))).double().mean()
    assert abs(found + q.entropy().double()) < 0.3


@pytest.mark.parametrize("family", [Normal, MultivariateNormal])
def test_a_family_is_compiled_in_one_piece(family):
    built, context = family(2, context=3), torch.randn(5, 3)
    mean = torch.compile(lambda context: built(context).mean, backend="eager", fullgraph=True)
    with pyro.validation_enabled(False):  # of which torch's own part is not compiled
        assert torch.equal(mean(context), built(context).mean)

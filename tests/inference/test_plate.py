"""The plate of a batch's rows says what Pyro's does, in less time where nothing is validated."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations

from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.inference.programs import sample_sites
from pyrogen.models import LatentVariableModel
from pyrogen.models.plate import data_plate
from pyrogen.networks import MLP, ConvDecoder


def traced(program, *batch):
    """Value, log-density and shapes of each site, without that of the plate."""
    torch.manual_seed(0)
    trace = poutine.trace(program).get_trace(*batch)
    trace.compute_log_prob()
    sites = sample_sites(trace)
    frames = {name: [(f.name, f.dim, f.size) for f in site["cond_indep_stack"]] for name, site in sites.items()}
    values = {name: (site["value"], site["log_prob"], site["fn"].batch_shape) for name, site in sites.items()}
    return frames, values


def program(plate):
    def inner(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with plate(len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), scale))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("c", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b[..., None].expand(*b.shape, 2), 1.0).to_event(1), obs=x)

    return inner


def outer(inner):
    def whole(x):
        with pyro.plate("copies", 4, dim=-3):
            inner(x)

    return whole


@pytest.mark.parametrize("wrap", [lambda inner: inner, outer], ids=["alone", "within another"])
def test_sites_are_those_of_pyros_plate(wrap):
    x = torch.randn(5, 2)
    known = traced(wrap(program(lambda rows: pyro.plate("data", rows))), x)
    with pyro.validation_enabled(False):
        assert not isinstance(data_plate(5), pyro.plate)
        assert traced(wrap(program(data_plate)), x)[0] == known[0]
        torch.testing.assert_close(traced(wrap(program(data_plate)), x)[1], known[1], rtol=0, atol=0)
    with pyro.validation_enabled(True):
        assert isinstance(data_plate(5), pyro.plate)


def test_a_distribution_of_other_rows_is_refused():
    def wrong():
        with data_plate(4):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="Shape mismatch inside plate"):
        wrong()


@pytest.mark.parametrize("objective", [ELBO(), ELBO(3), IWAE(4)], ids=repr)
def test_objectives_are_the_same_with_and_without_validation(objective):
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 6, (8,))))
    module = objective(model, AmortizedGuide(model, MLP(6, 8, (8,))))
    x, found = (torch.rand(7, 6) < 0.4).float(), []
    for validate in (True, False):
        module.zero_grad()
        torch.manual_seed(1)
        with pyro.validation_enabled(validate):
            module(x).backward()
        found.append([module.latest.loss, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("decoder", [lambda: MLP(2, (1, 8, 8), (8,)), lambda: ConvDecoder(2, (1, 8, 8), (8,))])
def test_pyro_can_draw_the_model(decoder, validate, parameter_store):
    model = LatentVariableModel(StandardNormal(2), Bernoulli(decoder()))
    with pyro.validation_enabled(validate):
        relations = get_model_relations(model, (torch.zeros(3, 1, 8, 8),))
    assert relations["plate_sample"] == {"data": ["z", "x"]} and relations["sample_sample"] == {"z": [], "x": ["z"]}

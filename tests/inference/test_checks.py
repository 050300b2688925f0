"""What does not fit is refused before any training, with the name of the site."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import biject_to, constraints
from torch.utils.data import Dataset

import pyrogen as pg
from pyrogen.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    Flow,
    Mixture,
    Normal,
    NormalLikelihood,
    StandardNormal,
    Vamp,
)
from pyrogen.inference import ELBO, AmortizedGuide, fit
from pyrogen.inference.batches import training_and_validation
from pyrogen.inference.checks import check_programs, check_values
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

X = torch.rand(6, 3)


def program(site=None, *, plate="data", size=None, observed=True, name="z"):
    """A model or guide of one latent site."""
    site = dist.Normal(torch.zeros(2), 1.0).to_event(1) if site is None else site

    def run(x):
        with pyro.plate(plate, size or len(x)):
            pyro.sample(name, site)
            if observed:
                pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    return run


def guide(site=None, **options):
    return program(site, observed=False, **options)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([*X], r"LatentVariableModel is called as LatentVariableModel\(x\), .* argument, and there are 6"),
        ((X, X), r"LatentVariableModel\(x\), .* argument, and there are 2"),
    ],
)
def test_several_tensors_for_a_program_of_one(data, expected):
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 3)))
    with pytest.raises(TypeError, match=expected):
        fit(model, AmortizedGuide(model, MLP(3, 4)), ELBO(), data, epochs=1, progress=False)


def test_one_tensor_for_a_program_of_two():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(y + z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    for use in (
        lambda: fit(model, guide(dist.Normal(0.0, 1.0)), ELBO(), X, epochs=1, progress=False),
        lambda: pg.evaluation.log_likelihood(model, guide(dist.Normal(0.0, 1.0)), X, particles=2),
    ):
        with pytest.raises(TypeError, match=r"model is called as model\(x, y\), but .* argument, and there are 1"):
            use()
    with pytest.raises(TypeError, match=r"MLP is called as MLP\(x\), but .* argument, and there are 2"):
        AmortizedGuide(model, MLP(3, 4), example=(X, X))


def test_what_wraps_a_program_may_take_other_tensors():
    model = LatentVariableModel(StandardNormal(2), ContinuousBernoulli(MLP(2, 3)))

    @functools.wraps(model.forward)
    def of_two(x, y):
        return model(x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert len(fit(of_two, guide, ELBO(), (X, X), epochs=1, progress=False).history) == 1


def test_errors_of_a_program_come_without_pyros_table_of_shapes():
    """Which stands below them where they are shown in full."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ torch.ones(3, 3), 1.0).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        fit(model, guide(), ELBO(), X, epochs=1, progress=False)
    assert "Trace Shapes" not in str(raised.value) and "Trace Shapes" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match=r"could not run on a stand-in batch of two rows \(RuntimeError: ") as raised:
        AmortizedGuide(model, MLP(3, 4))
    assert "\n" not in str(raised.value) and "pass example=" in str(raised.value).lower()


@pytest.mark.parametrize(
    ("likelihood", "parameter", "pixels"),
    [(Bernoulli, "Bernoulli logits", 5), (NormalLikelihood, "SafeNormal loc", 2000)],
)
def test_weights_that_are_huge_are_named_where_the_decoder_gives_nan(likelihood, parameter, pixels):
    model = LatentVariableModel(StandardNormal(2), likelihood(MLP(2, pixels)))
    guide, x = AmortizedGuide(model, MLP(pixels, 4)), torch.zeros(4, pixels)
    run = fit(model, guide, ELBO(), x, steps=1, progress=False, device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.sign() * 1e30)
    said = rf"^LatentVariableModel gives the distribution {parameter} that are not finite; the .* weights is 1e\+30\. "
    uses: list[Any] = [
        lambda: pg.evaluate(run, x),
        lambda: pg.sample(run, 2),
        lambda: pg.to_arviz(run, x),
        lambda: fit(model, guide, ELBO(), x, steps=1, progress=False, device="cpu"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=said) as raised:
            use()
        assert "tensor(" not in str(raised.value)
    with pytest.raises(ValueError, match=rf"could not run on a stand-in batch .*: {said[1:]}"):
        AmortizedGuide(model, MLP(pixels, 4))


def two_sites(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def auxiliary(x):
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def outside(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))


def per_observation(x):
    """A guide with parameters for each of seven observations."""
    with pyro.plate("data", 7):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(7, 2)), 1.0).to_event(1))


POSITIVE = dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
BAD = {
    "no data plate": (program(plate="rows"), guide(plate="rows"), 'no plate named "data"'),
    "plate of another size": (program(size=4), guide(size=4), 'plate "data" has size 4 for a batch of 6'),
    "nothing observed": (guide(), guide(), "observes nothing"),
    "discrete latent": (program(dist.Bernoulli(0.5)), guide(dist.Bernoulli(0.5)), "latent site 'z' is discrete"),
    "missing and extra": (program(), guide(name="w"), r"missing: \['z'\], extra: \['w'\]"),
    "extra": (program(), two_sites, r"missing: none, extra: \['extra'\]"),
    "shape": (program(), guide(dist.Normal(torch.zeros(3), 1.0).to_event(1)), r"\(6, 2\) in the model but \(6, 3\)"),
    "outside the plate": (program(), outside, "inside the plate"),
    "not amortized": (program(), per_observation, "the guide draws site 'z' for .* rows when it is given"),
    "autoguide": (program(), AutoNormal(program()), "the guide draws site 'z.*' for .* rows when it is given"),
    "support": (program(POSITIVE), guide(), "support IndependentConstraint.* in the model but IndependentConstraint"),
    "support of a flow": (
        program(POSITIVE),
        guide(
            dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(0.0, 2.0)])
            .expand([2])
            .to_event(1)
        ),
        "site 'z' has support",
    ),
    "no guide": (program(), None, r"latent sites \['z'\] but there is no guide"),
}


@pytest.mark.parametrize(("model", "other", "message"), BAD.values(), ids=BAD.keys())
def test_programs_that_do_not_fit_are_refused_before_training(model, other, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_programs(model, other, X)
    with pytest.raises(ValueError, match=message.replace("6", "2")):
        fit(model, other, ELBO(), X, epochs=1, progress=False, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_without_a_distribution_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", torch.zeros(len(x), 3), obs=x)

    with pytest.raises(TypeError, match=r"site 'x' has a tensor.*; expected a distribution, such as pyro"):
        check_programs(model, guide(), X)


@pytest.mark.parametrize("other", [guide(), auxiliary, guide(dist.Delta(torch.ones(2), event_dim=1))])
def test_programs_that_fit_pass(other):
    check_programs(program(), other, X)


@pytest.mark.parametrize(
    "site",
    [
        dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
        dist.Beta(torch.ones(2), 1.0).to_event(1),
        dist.Dirichlet(torch.ones(3)),
        dist.LKJCholesky(3, torch.tensor(1.0)),
    ],
    ids=lambda site: str(site.support),
)
@pytest.mark.parametrize("family", [Normal, Flow])
def test_every_support_has_its_amortised_guide(site, family):
    model = program(site)
    check_programs(model, AmortizedGuide(model, nn.Identity(), family, example=X), X)


def test_a_guide_that_follows_the_advice_fits_and_a_point_mass_must_lie_inside():
    support = constraints.independent(constraints.interval(2.0, 5.0), 1)
    model = program(dist.Uniform(torch.full((2,), 2.0), 5.0).to_event(1))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    check_programs(model, guide(dist.TransformedDistribution(base, [biject_to(support)])), X)
    check_programs(model, guide(dist.Delta(torch.full((2,), 3.0), event_dim=1)), X)
    with pytest.raises(ValueError, match="site 'z' has support"):
        check_programs(model, guide(dist.Delta(torch.full((2,), 6.0), event_dim=1)), X)


@pytest.mark.parametrize(
    "prior", [Mixture(2), Mixture(1), Flow(2), Vamp(2, (1, 2, 2), components=3)], ids=["2", "1", "flow", "vamp"]
)
def test_every_prior_passes(prior):
    model = LatentVariableModel(prior, Bernoulli(MLP(1 if prior.features == 1 else 2, (1, 2, 2))))
    check_programs(model, AmortizedGuide(model, MLP((1, 2, 2), 4)), torch.zeros(5, 1, 2, 2))


def test_checks_leave_no_mark():
    norm: Any = nn.BatchNorm1d(3)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(norm(x), 1.0).to_event(1), obs=x)

    state = torch.get_rng_state()
    norm.weight.requires_grad_(False)
    check_values(model, training_and_validation(X, 4, 0)[0])
    check_programs(model, None, X)
    assert int(norm.num_batches_tracked) == 0 and norm.training and not norm.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


class Lazy(Dataset):
    """Rows that no one sees before they are read."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


def values_of(likelihood, data):
    check_values(LatentVariableModel(StandardNormal(2), likelihood), training_and_validation(data, 4, 0)[0])


def rows_with(value, at, count=5000):
    x = torch.zeros(count, 3)
    x[at, 1] = value
    return x


@pytest.mark.parametrize("kind", [lambda x: x, Lazy], ids=["tensor", "data set"])
@pytest.mark.parametrize("likelihood", [Bernoulli, ContinuousBernoulli])
def test_a_single_pixel_outside_the_support_is_found(likelihood, kind):
    values_of(likelihood(MLP(2, 3)), kind(rows_with(1.0, 4999)))
    for at in (0, 4500):
        with pytest.raises(ValueError, match=r"outside the support of the observed site 'x'.* from 0 to 1.5"):
            values_of(likelihood(MLP(2, 3)), kind(rows_with(1.5, at)))


def test_gray_pixels_are_no_binary_data():
    with pytest.raises(ValueError, match="choose a likelihood for such values"):
        values_of(Bernoulli(MLP(2, 3)), torch.full((5, 3), 0.5))


def test_values_are_checked_where_the_model_flattens_them_first():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1), obs=x.flatten(1))

    x = torch.zeros(5000, 2, 2)
    check_values(model, training_and_validation(x, 4, 0)[0])
    x[4321] = 0.5
    with pytest.raises(ValueError, match="outside the support of the observed site 'x'"):
        check_values(model, training_and_validation(x, 4, 0)[0])


def test_nan_in_a_data_set_is_found():
    with pytest.raises(ValueError, match="NaN or infinity, first in row 4700"):
        values_of(ContinuousBernoulli(MLP(2, 3)), Lazy(rows_with(torch.nan, 4700)))


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [
        ([torch.ones(3), torch.ones(4)], r"\(3,\) and \(4,\)"),
        ([(torch.ones(3), 1), (torch.ones(2, 3), 1)], r"\(\(3,\), \(\)\) and \(\(2, 3\), \(\)\)"),
        ([(torch.ones(3),), (torch.ones(3), 1)], r"\(\(3,\),\) and \(\(3,\), \(\)\)"),
    ],
)
def test_rows_of_different_shapes_are_refused(rows, shapes):
    with pytest.raises(ValueError, match=f"rows of the data have different shapes, such as {shapes}; give a Dataset"):
        fit(program(), guide(), ELBO(), Lazy(rows), epochs=1, progress=False)


def test_a_support_that_follows_from_draws_is_not_checked():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 0.001))
            pyro.sample("x", dist.Uniform(0.0, 100 * z), obs=x)

    check_values(model, training_and_validation(torch.tensor([1.0, 99.9, 100.1]), 4, 0)[0])


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 3), (5,), (5, 3, 1)])
def test_another_event_shape_is_refused(shape):
    with pytest.raises(ValueError, match="the data give the observed site 'x' the shape"):
        values_of(Bernoulli(MLP(2, 3)), torch.zeros(shape))


def test_validation_rows_are_checked_too():
    from pyrogen.data import Data

    data = Data(
        "mine",
        train=torch.zeros(5, 3),
        validation=torch.full((5, 3), 0.5),
        test=torch.zeros(5, 3),
        values="unit interval",
    )
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 3)))
    with pytest.raises(ValueError, match="outside the support"):
        fit(model, AmortizedGuide(model, nn.Identity()), ELBO(), data, epochs=1, progress=False)

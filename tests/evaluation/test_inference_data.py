import warnings
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyrogen.distributions import Bernoulli, StandardNormal
from pyrogen.evaluation import inference_data, to_arviz
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x once a day
    import arviz

OLD = int(arviz.__version__.split(".")[0]) == 0
needs_old = pytest.mark.skipif(not OLD, reason="checks functions as ArviZ 0.x has them")


@pytest.fixture
def images(make_run):
    x = (torch.rand(3, 1, 4, 5) > 0.5).float()
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 5))))
    return make_run(model, AmortizedGuide(model, MLP((1, 4, 5), 8)), x), x


def nested(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        with pyro.plate("parts", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum((0, -1)), scale), obs=x)


def test_groups_names_and_coordinates(images):
    run, x = images
    tree = to_arviz(run, x, draws=50, chains=2, prior_draws=30, predictive_draws=10)
    shapes = {
        (group, name): dict(zip(v.dims, v.shape, strict=True))
        for group in tree.groups()
        if group != "/"
        for name, v in tree[group].data_vars.items()
    }
    shapes = {(group.strip("/"), name): sizes for (group, name), sizes in shapes.items()}
    draws = {"chain": 2, "draw": 50, "observation": 3}
    pixels = {"observation": 3, "x_channel": 1, "x_row": 4, "x_column": 5}
    assert shapes == {
        ("posterior", "z"): draws | {"z_dim": 2},
        ("log_likelihood", "x"): draws,
        ("sample_stats", "log_weight"): draws,
        ("sample_stats", "pareto_k"): {"observation": 3},
        ("posterior_predictive", "x"): {"chain": 2, "draw": 10} | pixels,
        ("prior", "z"): {"chain": 1, "draw": 30, "observation": 3, "z_dim": 2},
        ("prior_predictive", "x"): {"chain": 1, "draw": 10} | pixels,
        ("observed_data", "x"): pixels,
    }
    assert tree["posterior_predictive"].draw.values.tolist() == [*range(0, 50, 5)]
    assert tree["posterior"].draw.values.tolist() == [*range(50)]
    assert np.array_equal(tree["observed_data"]["x"], x)
    attributes = tree["posterior"].attrs
    assert attributes["creation_library"] == "pyrogen" and attributes["objective"] == "ELBO(particles=1)"
    assert {"created_at", "creation_library_version"} <= attributes.keys()


def test_groups_can_be_left_out(images):
    run, x = images
    tree = to_arviz(run, x, draws=5, chains=1, prior_draws=0, predictive_draws=0)
    names = {group.strip("/") for group in tree.groups()} - {""}
    assert names == {"posterior", "log_likelihood", "sample_stats", "observed_data"}
    assert "pareto_k" not in tree["sample_stats"]  # five draws have no tail to be fitted


@pytest.mark.parametrize("rows", [3, 64, 4096])
def test_nested_plates_and_global_sites(rows, make_run):
    x = torch.randn(5)
    run = make_run(nested, AmortizedGuide(nested, MLP((), 4), example=x), x)
    tree = to_arviz(run, x, draws=15, chains=2, prior_draws=6, predictive_draws=3, rows=rows)
    posterior, stats = tree["posterior"], tree["sample_stats"]
    assert posterior["scale"].dims == ("chain", "draw")
    assert posterior["z"].dims == ("chain", "draw", "observation", "parts", "z_dim")
    assert tree["observed_data"]["x"].dims == ("observation",)
    assert stats["log_weight_global"].dims == ("chain", "draw")
    # Everything from the draws alone, in numpy: the log-likelihood, at every draw and observation.
    z, scale = posterior["z"].values, posterior["scale"].values[..., None]
    residual = (x.numpy() - z.sum((-1, -2))) / scale
    expected = -0.5 * residual**2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values, expected, rtol=1e-3, atol=1e-3)
    predictive = tree["posterior_predictive"]["x"]
    assert predictive.sizes == {"chain": 2, "draw": 3, "observation": 5}
    assert np.unique(predictive.values).size == 30


def test_predictive_draws_belong_to_the_draws_whose_numbers_they_have(make_run):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1e-5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(4, 1)
    for rows in (5, 4096):
        tree = to_arviz(make_run(model, guide, x), x, draws=23, chains=3, predictive_draws=4, rows=rows)
        predicted = tree["posterior_predictive"]["x"].squeeze()
        latents = tree["posterior"]["z"].sel(draw=predicted.draw).squeeze()
        np.testing.assert_allclose(predicted.values, latents.values, atol=1e-3)
        prior = tree["prior"]["z"].sel(draw=tree["prior_predictive"].draw)
        np.testing.assert_allclose(tree["prior_predictive"]["x"].values, prior.values, atol=1e-3)


def test_weights_of_an_exact_posterior_are_equal(ppca, exact, make_run):
    model, x = ppca
    tree = to_arviz(make_run(model, exact, x), x[:6], draws=100)
    log_w = tree["sample_stats"]["log_weight"].values
    truth = model.log_likelihood(x[:6]).detach().numpy()
    np.testing.assert_allclose(log_w, np.broadcast_to(truth, log_w.shape), atol=1e-9)
    assert (tree["sample_stats"]["pareto_k"] == 0).all()


def test_pareto_k_tells_a_good_guide_from_a_bad_one(ppca, wide, make_run):
    """Scales too small by a factor s leave tails with k = 1 - s^2, 0.91 here; too large ones leave none."""
    model, x = ppca

    def narrow(x):
        posterior = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior.mean, 0.3 * posterior.stddev).to_event(1))

    good, bad = (
        to_arviz(make_run(model, guide, x), x[:8], draws=1000)["sample_stats"]["pareto_k"].values
        for guide in (wide, narrow)
    )
    assert good.max() < 0.5 and np.median(bad) > 0.7


def test_a_point_mass_has_no_weights(ppca, point_mass, make_run):
    model, x = ppca
    tree = to_arviz(make_run(model, point_mass, x), x[:4], draws=30)
    assert "sample_stats" not in {group.strip("/") for group in tree.groups()}
    np.testing.assert_allclose(tree["posterior"]["z"].std("draw"), 0.0, atol=1e-12)


@needs_old
def test_arviz_reads_it(images, tmp_path):
    run, x = images
    data = to_arviz(run, x, draws=100)
    assert isinstance(data, arviz.InferenceData)
    table = arviz.summary(data)
    assert list(table.index)[:2] == ["z[0, 0]", "z[0, 1]"] and len(table) == 6
    # Independent draws: R̂ is 1 but for the noise of 4 chains of 100.
    assert (table["r_hat"] < 1.05).all()
    assert arviz.extract(data, var_names="z").shape == (3, 2, 400)
    path = tmp_path / "run.nc"
    data.to_netcdf(str(path))
    again = arviz.from_netcdf(str(path))
    assert set(again.groups()) == set(data.groups())
    for group in data.groups():
        xarray.testing.assert_equal(again[group], data[group])
    again.close()


@needs_old
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23 with Matplotlib 3.11
def test_arviz_draws_it(images):
    import matplotlib

    matplotlib.use("Agg")
    run, x = images
    data = to_arviz(run, x, draws=50)
    axes = arviz.plot_pair(data, var_names=["z"], coords={"observation": 0})
    matplotlib.pyplot.close(np.ravel(axes)[0].figure)
    axes = arviz.plot_dist_comparison(data, var_names=["z"], coords={"observation": 0, "z_dim": 0})
    matplotlib.pyplot.close(np.ravel(axes)[0].figure)


@needs_old
def test_leave_one_out_is_exact_for_global_sites(global_mean, make_run):
    """The eight leave-one-out predictive densities in closed form; their sum lies well below the in-sample one.

    1600 draws: the error of each log-density is about 0.5 / sqrt(1600), of the sum, whose parts partly cancel, under
    0.05; four of these fail once in 10^4.
    """
    run = make_run(global_mean.model, global_mean.guide, global_mean.x)
    data = to_arviz(run, global_mean.x, draws=400, prior_draws=10)
    x = global_mean.x
    loc, variance = (x.sum() - x) / 8, 1 / 8
    exact = dist.Normal(loc, (1 + variance) ** 0.5).log_prob(x).sum()
    inside = global_mean.log_predictive(x).sum()
    assert inside - exact > 1.0
    assert arviz.loo(data).elpd_loo == pytest.approx(float(exact), abs=0.2)
    # Joint weights are the evidence where the guide is exact: all equal.
    joint = data["log_likelihood"]["x"].sum("observation") + data["sample_stats"]["log_weight_global"]
    assert float(joint.std()) < 1e-9


def test_a_data_tree_is_what_the_next_arviz_takes(images, monkeypatch, tmp_path):
    run, x = images
    expected = to_arviz(run, x, draws=30)
    monkeypatch.setattr(inference_data, "version", lambda package: "1.2.0")
    tree = to_arviz(run, x, draws=30)
    assert isinstance(tree, xarray.DataTree)
    assert {"posterior", "prior", "sample_stats", "observed_data"} <= set(tree.children)
    xarray.testing.assert_equal(tree["posterior"].to_dataset(), _dataset(expected, "posterior"))
    tree.to_netcdf(tmp_path / "tree.nc")
    with xarray.open_datatree(tmp_path / "tree.nc") as again:
        xarray.testing.assert_equal(again["posterior"].to_dataset(), tree["posterior"].to_dataset())


def _dataset(tree, group):
    found = tree[group]
    return found.to_dataset() if isinstance(found, xarray.DataTree) else found


@pytest.mark.skipif(find_spec("arviz_base") is None, reason="arviz-base is not installed")
def test_arviz_base_reads_it(images, monkeypatch):
    import arviz_base

    run, x = images
    monkeypatch.setattr(inference_data, "version", lambda package: "1.2.0")
    tree = to_arviz(run, x, draws=30)
    assert arviz_base.convert_to_datatree(tree) is tree
    assert arviz_base.extract(tree, var_names="z").sizes == {"observation": 3, "z_dim": 2, "sample": 120}


needs_stats = pytest.mark.skipif(find_spec("arviz_stats") is None, reason="arviz-stats is not installed")


@pytest.mark.parametrize("major", [pytest.param(0, marks=needs_old), pytest.param(1, marks=needs_stats)])
def test_pareto_k_of_pareto_weights_is_theirs(major):
    """The mean over 100 fits to a tail of 190 values each has an error of about (1 + k) / sqrt(19 000) = 0.014.

    ArviZ's weak prior pulls k by up to 0.02 towards 0.5; 0.08 beside that fails once in 10^7.
    """
    exponential = np.random.default_rng(0).exponential(size=(100, 4000))
    for k in (0.2, 0.5, 0.9):
        found = inference_data.pareto_k(k * exponential, major=major)
        assert found is not None and found.mean() == pytest.approx(k, abs=0.1)
    tied = np.repeat([[0.0, 5.0]], 50, axis=1)
    np.testing.assert_equal(inference_data.pareto_k(tied, major=major), [np.inf])
    np.testing.assert_equal(inference_data.pareto_k(np.zeros((2, 50)), major=major), [0.0, 0.0])


def test_without_the_new_statistics_there_is_no_pareto_k(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(inference_data, "_import", missing)
    assert inference_data.pareto_k(np.eye(2, 30), major=1) is None


def test_without_arviz_it_says_what_to_install(monkeypatch):
    def missing(package):
        raise inference_data.PackageNotFoundError(package)

    monkeypatch.setattr(inference_data, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install arviz"):
        inference_data._arviz_major()
    monkeypatch.setattr(
        inference_data, "version", lambda package: "0.8.2" if package == "arviz-base" else missing(package)
    )
    assert inference_data._arviz_major() == 1


@pytest.mark.parametrize("option", ["draws", "chains", "prior_draws", "predictive_draws"])
def test_numbers_out_of_range_are_refused(images, option):
    run, x = images
    with pytest.raises(ValueError, match=f"{option} must be a whole number"):
        to_arviz(run, x, **{option: -1})


def test_without_a_guide_there_is_no_posterior(ppca, make_run):
    model, x = ppca
    with pytest.raises(ValueError, match="no guide"):
        to_arviz(make_run(model, None, x), x)

import warnings
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyrogen.distributions import Bernoulli, Implicit, SemiImplicit, StandardNormal
from pyrogen.evaluation import frames, posterior_groups, to_arviz
from pyrogen.evaluation.inference_data import reference_posterior
from pyrogen.evaluation.reference import nuts
from pyrogen.inference import AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces 1.x once a day
    import arviz

OLD = int(arviz.__version__.split(".")[0]) == 0
aliases = pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # 0.23 with Matplotlib 3.11
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
        ("log_likelihood", "marginal"): draws,
        ("sample_stats", "log_prior_z"): draws,
        ("sample_stats", "log_guide_z"): draws,
        ("sample_stats", "lp"): draws,
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


def test_a_point_mass_has_no_weights(ppca, point_mass, make_run):
    model, x = ppca
    tree = to_arviz(make_run(model, point_mass, x), x[:4], draws=30)
    assert {*tree["sample_stats"].data_vars} == {"log_prior_z", "lp"}
    assert np.isnan(tree["log_likelihood"]["marginal"]).all()
    assert tree["log_likelihood"].attrs["leave_one_out"].startswith("not known")
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
@aliases
def test_arviz_draws_it(images):
    import matplotlib

    matplotlib.use("Agg")
    run, x = images
    data = to_arviz(run, x, draws=50)
    axes = arviz.plot_pair(data, var_names=["z"], coords={"observation": 0})
    matplotlib.pyplot.close(np.ravel(axes)[0].figure)
    axes = arviz.plot_dist_comparison(data, var_names=["z"], coords={"observation": 0, "z_dim": 0})
    matplotlib.pyplot.close(np.ravel(axes)[0].figure)


def test_a_data_tree_is_what_the_next_arviz_takes(images, monkeypatch, tmp_path):
    run, x = images
    expected = to_arviz(run, x, draws=30)
    monkeypatch.setattr(frames, "version", lambda package: "1.2.0")
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
    monkeypatch.setattr(frames, "version", lambda package: "1.2.0")
    tree = to_arviz(run, x, draws=30)
    assert arviz_base.convert_to_datatree(tree) is tree
    assert arviz_base.extract(tree, var_names="z").sizes == {"observation": 3, "z_dim": 2, "sample": 120}


def test_without_the_new_statistics_there_is_no_pareto_k(images, monkeypatch):
    def missing(*arguments, **options):
        raise ModuleNotFoundError

    run, x = images
    monkeypatch.setattr(posterior_groups, "tail_shapes", missing)
    assert "pareto_k" not in to_arviz(run, x, draws=30)["sample_stats"]


def test_without_arviz_it_says_what_to_install(monkeypatch):
    def missing(package):
        raise frames.PackageNotFoundError(package)

    monkeypatch.setattr(frames, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install arviz"):
        frames.arviz_major()
    monkeypatch.setattr(frames, "version", lambda package: "0.8.2" if package == "arviz-base" else missing(package))
    assert frames.arviz_major() == 1


@pytest.mark.parametrize("option", ["draws", "chains", "prior_draws", "predictive_draws"])
def test_numbers_out_of_range_are_refused(images, option):
    run, x = images
    with pytest.raises(ValueError, match=f"{option} must be a whole number"):
        to_arviz(run, x, **{option: -1})


def test_without_a_guide_there_is_no_posterior(ppca, make_run):
    model, x = ppca
    with pytest.raises(ValueError, match="no guide"):
        to_arviz(make_run(model, None, x), x)


def test_densities_at_the_sites_written_out(make_run):
    x = torch.randn(5)
    guide = AmortizedGuide(nested, MLP((), 4), example=x)
    tree = to_arviz(make_run(nested, guide, x), x, draws=20, chains=2, prior_draws=0, predictive_draws=0)
    posterior, stats, likelihood = (tree[group] for group in ("posterior", "sample_stats", "log_likelihood"))
    z, scale = (torch.as_tensor(posterior[name].values) for name in ("z", "scale"))
    log_z, log_scale = dist.Normal(0.0, 1.0).log_prob(z).sum((-1, -2)), dist.LogNormal(0.0, 1.0).log_prob(scale)
    np.testing.assert_allclose(stats["log_prior_z"], log_z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["log_prior_scale"], log_scale, rtol=1e-4, atol=1e-4)
    assert stats["log_guide_scale"].dims == stats["lp"].dims == ("chain", "draw")
    assert stats["log_guide_z"].dims == ("chain", "draw", "observation")
    joint = (likelihood["x"] + stats["log_prior_z"]).sum("observation") + stats["log_prior_scale"]
    np.testing.assert_allclose(stats["lp"], joint, rtol=1e-4)
    ratio = likelihood["x"] + stats["log_prior_z"] - stats["log_guide_z"]
    np.testing.assert_allclose(stats["log_weight"], ratio, rtol=1e-3, atol=1e-3)
    whole = stats["log_prior_scale"] - stats["log_guide_scale"]
    np.testing.assert_allclose(stats["log_weight_global"], whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [SemiImplicit, Implicit])
def test_densities_as_far_as_they_are_known(family, make_run):
    model, x = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (4,)))), (torch.rand(3, 4) > 0.5).float()
    run = make_run(model, AmortizedGuide(model, MLP(4, 8), family), x)
    tree = to_arviz(run, x, draws=20, chains=2, prior_draws=0, predictive_draws=0)
    stats, likelihood = tree["sample_stats"], tree["log_likelihood"]
    prior = dist.Normal(0.0, 1.0).log_prob(torch.as_tensor(tree["posterior"]["z"].values)).sum(-1)
    np.testing.assert_allclose(stats["log_prior_z"], prior, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats["lp"], likelihood["x"] + stats["log_prior_z"], rtol=1e-4)
    if family is Implicit:
        assert {*stats.data_vars} == {"log_prior_z", "lp"} and np.isnan(likelihood["marginal"]).all()
    else:  # the estimated density is the one that the weight is made of, not another
        np.testing.assert_allclose(stats["log_weight"], stats["lp"] - stats["log_guide_z"], rtol=1e-4, atol=1e-4)


def test_draws_outside_the_prior_have_a_density_all_the_same(make_run):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", TooWide(0.0, 1.0))

    class TooWide(dist.Uniform):
        def rsample(self, sample_shape=()):
            return 2 * super().rsample(sample_shape)

        def log_prob(self, value):
            return dist.Uniform(0.0, 2.0).log_prob(value)

    x = torch.zeros(3)
    stats = to_arviz(make_run(model, guide, x), x, draws=40, predictive_draws=0)["sample_stats"]
    outside = np.isinf(stats["log_prior_z"].values)
    assert 0.2 < outside.mean() < 0.8  # of 480
    np.testing.assert_allclose(stats["log_guide_z"], -np.log(2), rtol=1e-5)
    assert (stats["log_weight"].values[outside] == -np.inf).all()


def test_deterministic_sites_belong_to_the_posterior(make_run):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z, event_dim=0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(3)
    run = make_run(model, AmortizedGuide(model, MLP((), 4), example=x), x)
    tree = to_arviz(run, x, draws=5, prior_draws=6)
    for group in ("posterior", "prior"):
        np.testing.assert_allclose(tree[group]["twice"], 2 * tree[group]["z"])
    assert {*tree["observed_data"].data_vars} == {*tree["posterior_predictive"].data_vars} == {"x"}
    assert {*tree["log_likelihood"].data_vars} == {"x", "marginal"}


def test_labels_and_names(make_run):
    x = (torch.rand(3, 3, 2, 2) > 0.5).float()
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (3, 2, 2))))
    run = make_run(model, AmortizedGuide(model, MLP((3, 2, 2), 8)), x)
    few = {"draws": 5, "prior_draws": 2, "predictive_draws": 2}
    tree = to_arviz(run, x, **few)
    assert tree["observed_data"]["x_channel"].values.tolist() == ["red", "green", "blue"]
    labels = {"observation": ["a", "b", "c"], "unit": torch.tensor([4, 2]), "x_channel": range(3)}
    tree = to_arviz(run, x, **few, dims={"z": ["unit"]}, coords=labels)
    for group in ("posterior", "prior"):
        assert tree[group]["z"].dims == ("chain", "draw", "observation", "unit")
        assert tree[group]["unit"].values.tolist() == [4, 2]
    assert tree["posterior"]["z"].sel(observation="b", unit=2).shape == (4, 5)
    assert tree["observed_data"]["x_channel"].values.tolist() == [0, 1, 2]
    for options, message in (
        ({"dims": {"y": ["unit"]}}, "names the dimensions of 'y', but the model has the sites"),
        ({"dims": {"z": ["a", "b"]}}, "must give 1 different names to the site 'z'"),
        ({"dims": {"z": "draw"}}, "must give 1 different names to the site 'z'"),
        ({"dims": {"z": "x_row", "x": ["u", "v", "w"]}}, None),
        ({"dims": {"z": "x_channel"}}, "dimension 'x_channel' of the site 'x' has 3 elements, but 2 at another"),
        ({"coords": {"unit": [1, 2]}}, "labels the dimension 'unit', but those there are to label are"),
        ({"coords": {"observation": [1, 2]}}, "must have 3 different labels for the dimension 'observation'"),
        ({"coords": {"observation": [7, 7, 1]}}, "to labels that repeat, such as classes, add a number"),
    ):
        if message is None:
            assert "x_row" in to_arviz(run, x, **few, **options)["posterior"].dims
            continue
        with pytest.raises(ValueError, match=message):
            to_arviz(run, x, **few, **options)


def conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.fixture(scope="module")
def reference():
    """A few draws for two observations; not a reference, but its form."""
    generator = torch.Generator().manual_seed(0)
    return nuts(conjugate, None, torch.randn(2, 2, generator=generator), draws=20, warmup=40, chains=2)


@pytest.mark.parametrize("major", [pytest.param(0, marks=needs_old), 1])
def test_a_reference_beside_the_guide(major, reference, make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(frames, "version", lambda package: f"{major}.3.0")
    (x,) = reference.x
    run = make_run(conjugate, AmortizedGuide(conjugate, MLP(2, 4)), x)
    coords = {"observation": ["first", "second"]}
    tree = to_arviz(run, x, draws=30, prior_draws=10, predictive_draws=5, reference=reference, coords=coords)
    np.testing.assert_array_equal(tree["reference"]["z"], reference.samples["z"])
    assert tree["reference"]["z"].dims == tree["posterior"]["z"].dims
    assert tree["sample_stats_reference"]["diverging"].dims == ("chain", "draw", "observation")
    assert (
        tree["reference"].attrs["converged"] == "False" and "NOT A REFERENCE" in tree["reference"].attrs["diagnostics"]
    )
    alone = reference_posterior(tree)
    assert type(alone) is type(tree)
    np.testing.assert_array_equal(alone["posterior"]["z"], reference.samples["z"])
    assert "diverging" in alone["sample_stats"] and "prior" in alone and "log_likelihood" not in alone
    for name, data in {"tree": tree, "alone": alone}.items():
        path = tmp_path / f"{name}.nc"
        data.to_netcdf(str(path))
        again = xarray.open_datatree(path) if major else arviz.from_netcdf(str(path))
        kept, found = frames.datasets_of(data), frames.datasets_of(again)
        assert kept.keys() == found.keys()
        for group in kept:
            xarray.testing.assert_identical(found[group], kept[group])
    with pytest.raises(ValueError, match="the tree has no group 'reference'"):
        reference_posterior(alone)
    with pytest.raises(ValueError, match="the very 2 observations of x"):
        to_arviz(run, x + 1, draws=30, reference=reference)


@needs_old
@aliases
def test_arviz_draws_guide_and_reference(reference, make_run):
    import matplotlib

    matplotlib.use("Agg")
    (x,) = reference.x
    tree = to_arviz(make_run(conjugate, AmortizedGuide(conjugate, MLP(2, 4)), x), x, draws=30, reference=reference)
    alone, names = reference_posterior(tree), ["guide", "NUTS"]
    one = {"var_names": ["z"], "coords": {"observation": 0}}
    for axes in (
        arviz.plot_forest([tree, alone], model_names=names, var_names=["z"]),
        arviz.plot_density([tree, alone], data_labels=names, var_names=["z"]),
        arviz.plot_pair(alone, ax=arviz.plot_pair(tree, **one), **one),
        arviz.plot_pair(alone.sel(observation=0), var_names=["z"], divergences=True),
        arviz.plot_trace(tree, **one),
        arviz.plot_trace(alone, **one),
        arviz.plot_ppc(tree, num_pp_samples=5),
    ):
        matplotlib.pyplot.close(np.ravel(axes)[0].figure)
    assert list(arviz.summary(alone).index) == list(arviz.summary(tree).index)

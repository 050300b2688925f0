"""compare: fair, complete on disk, resumable, and clear about what does not fit."""

import ast
import functools
import math
from pathlib import Path
from typing import Any

import arviz
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import yaml
from torch import nn

import pyrogen as pg
from pyrogen.distributions import Flow, Implicit, MultivariateNormal, Normal
from pyrogen.experiment import Comparison
from pyrogen.experiment.collection import _table_of
from pyrogen.inference import AVB, ELBO, GAN, IWAE, AmortizedGuide, CriticOptions, NonFiniteLoss, OutputExistsError
from pyrogen.networks import MLP, Critic

TINY: dict[str, Any] = {"epochs": 2, "batch_size": 32, "particles": 8, "progress": False}
GUIDES: dict[str, Any] = {
    "mean field": (Normal, ELBO()),
    "flow": (functools.partial(Flow, layers=1, hidden=(8,)), IWAE(4)),
}


def encoder_of(digits):
    return lambda: MLP(digits.event_shape, 16, hidden=(16,))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A comparison with its folder, for tests that only read."""
    torch.manual_seed(1)
    model = pg.models.LatentVariableModel(
        pg.distributions.StandardNormal(2), pg.distributions.Bernoulli(MLP(2, digits.event_shape, hidden=(16,)))
    )
    folder = tmp_path_factory.mktemp("comparison") / "out"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=folder, **TINY)
    unchanged = all(value.equal(before[name]) for name, value in model.state_dict().items())
    return table, folder, unchanged


def test_table_has_a_row_for_each_guide_and_keeps_the_runs(finished):
    table, _, _ = finished
    assert isinstance(table, Comparison)
    assert [*table.index] == [*table.runs] == [*GUIDES]
    assert {"elbo", "rate", "distortion", "log_likelihood", "active_units", "seconds", "parameters"} <= {*table}
    torch.testing.assert_close(
        torch.tensor(table["elbo"].to_numpy()), -torch.tensor((table["rate"] + table["distortion"]).to_numpy())
    )
    guide = table.runs["mean field"].programs
    assert table.loc["mean field", "parameters"] == sum(p.numel() for p in guide.parameters())
    assert table.loc["mean field", "seconds"] == table.runs["mean field"].seconds > 0


def test_table_prints_rounded_and_survives_pandas(finished):
    table, _, _ = finished
    assert f"{table['elbo'].iloc[0]:.2f}" in repr(table)
    assert "24 test rows" in repr(table) and "8 particles" in repr(table)
    ordered = table.sort_values("elbo")
    assert isinstance(ordered, Comparison) and ordered.runs is table.runs
    assert "ELBO" in repr(table[["elbo"]])
    assert "–" in repr(table.assign(log_likelihood=[float("nan"), 1.0]))


def test_figures_of_the_table_are_those_of_evaluate(finished, digits):
    table, _, _ = finished
    for name, run in table.runs.items():
        alone = pg.evaluate(run, digits.test, particles=8, seed=0)
        assert table.loc[name, "log_likelihood"] == alone.log_likelihood
        assert table.loc[name, "elbo"] == alone.elbo


def test_the_model_itself_is_not_trained(finished):
    assert finished[2]


def test_equal_entries_get_equal_figures(model, digits):
    # Same weights, noise and order of data for every fit: otherwise these two rows would differ.
    twice = {"one": (Normal, ELBO()), "two": (Normal, ELBO())}
    table = pg.compare(model, twice, encoder=encoder_of(digits), data=digits, **TINY)
    figures = table.drop(columns="seconds")
    one, two = (pd.DataFrame(figures).loc[name] for name in ("one", "two"))
    pd.testing.assert_series_equal(one, two, check_names=False, check_exact=True)
    alone = pg.compare(model, {"two": (Normal, ELBO())}, encoder=encoder_of(digits), data=digits, **TINY)
    assert alone["elbo"].iloc[0] == table.loc["two", "elbo"]


def test_an_encoder_module_is_copied(model, digits):
    encoder = MLP(digits.event_shape, 16, hidden=(16,))
    table = pg.compare(model, {"a": (Normal, ELBO()), "b": (Normal, ELBO())}, encoder=encoder, data=digits, **TINY)
    guides: list[Any] = [run.guide for run in table.runs.values()]
    assert len({id(guide.encoder) for guide in guides} | {id(encoder)}) == 3
    assert table["elbo"].nunique() == 1


def test_objective_is_not_changed(model, digits):
    objective = ELBO()
    pg.compare(model, {"a": (Normal, objective)}, encoder=encoder_of(digits), data=digits, **TINY)
    assert objective.step == 0 and objective.observations is None


def test_random_state_is_given_back(model, digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    pg.compare(model, {"a": (Normal, ELBO())}, encoder=encoder_of(digits), data=digits, **TINY)
    assert torch.get_rng_state().equal(state)


def test_folder_is_complete(finished):
    table, folder, _ = finished
    written = pd.read_csv(folder / "table.csv", index_col="guide", converters={"reasons": ast.literal_eval})
    pd.testing.assert_frame_equal(written, pd.DataFrame(table).replace({None: math.nan}), check_dtype=False)
    for name in ("samples", "reconstructions", "curves", "latents", "comparison"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
    configuration = yaml.safe_load((folder / "compare.yaml").read_text())
    assert [*configuration["guides"]] == [*GUIDES]
    for slug in ("mean-field", "flow"):
        assert (folder / slug / "weights.safetensors").is_file()


def test_fits_on_disk_load_with_the_same_weights(finished):
    table, folder, _ = finished
    loaded = pg.load(folder / "flow")
    for name, value in table.runs["flow"].programs.state_dict().items():
        assert loaded.programs.state_dict()[name].equal(value)


def test_posteriors_open_with_arviz(finished, digits):
    _, folder, _ = finished
    tree = arviz.from_netcdf(folder / "posteriors.nc")
    posterior = tree["posterior"]
    assert [*posterior["fit"].values] == [*GUIDES]
    assert dict(posterior["z"].sizes) == {"fit": 2, "chain": 4, "draw": 250, "observation": 16, "z_dim": 2}
    assert bool(posterior["z"].notnull().all())
    assert "fit" not in tree["observed_data"]["x"].dims
    summary = arviz.summary(tree.sel(fit="flow"), var_names=["z"])
    assert len(summary) == 32


def test_an_existing_folder_is_left_alone(finished, model, digits):
    _, folder, _ = finished
    before = contents(folder)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=folder, **TINY)
    assert contents(folder) == before


def test_bad_input_leaves_a_folder_alone_even_with_overwrite(finished, model, digits):
    _, folder, _ = finished
    before = contents(folder)
    with pytest.raises(ValueError, match="epochs must be"):
        pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=folder, overwrite=True, epochs=0)
    with pytest.raises(ValueError, match="outside the support"):
        pg.compare(
            model, GUIDES, encoder=encoder_of(digits), data=digits.test + 0.5, out=folder, overwrite=True, **TINY
        )
    assert contents(folder) == before


def test_resume_reads_complete_fits_and_goes_on_with_the_others(model, digits, tmp_path, monkeypatch):
    whole = pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=tmp_path / "whole", **TINY)
    stopped = tmp_path / "stopped"
    fit, fitted = pg.experiment.fits.fit, []

    def interrupted(*arguments, **options):
        fitted.append(options["out"].name)
        if options["out"].name == "flow":
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(pg.experiment.fits, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=stopped, **TINY)
    monkeypatch.setattr(pg.experiment.fits, "fit", fit)
    weights = (stopped / "mean-field" / "weights.safetensors").read_bytes()
    evaluate, evaluated = pg.experiment.fits.evaluate, []

    def counted(run, *arguments, **options):
        evaluated.append(run)
        return evaluate(run, *arguments, **options)

    monkeypatch.setattr(pg.experiment.fits, "evaluate", counted)
    table = pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, out=stopped, resume=True, **TINY)
    assert evaluated == [table.runs["flow"]]
    assert fitted == ["mean-field", "flow"]
    assert (stopped / "mean-field" / "weights.safetensors").read_bytes() == weights
    pd.testing.assert_frame_equal(
        pd.DataFrame(table.drop(columns="seconds")), pd.DataFrame(whole.drop(columns="seconds"))
    )


def test_resume_says_once_where_there_is_nothing_to_go_on_with(model, digits, tmp_path, caplog):
    for _ in range(2):
        options: dict[str, Any] = {"out": tmp_path / "out", "resume": True, **TINY}
        pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, **options)
        said = [record.getMessage() for record in caplog.records if "anew" in record.getMessage()]
        assert said == [f"{tmp_path / 'out'} holds no comparison to go on with, so it begins anew"]


def test_resume_refuses_another_comparison(finished, model, digits):
    _, folder, _ = finished
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds another comparison \(options.*'epochs': 2"):
        pg.compare(
            model, GUIDES, encoder=encoder_of(digits), data=digits, out=folder, resume=True, **(TINY | {"epochs": 3})
        )
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("guides", "message"),
    [
        ({}, "at least one entry"),
        ({"a": Normal}, r"must be a pair \(family, objective\)"),
        ({"a": (Normal, "ELBO")}, r"must be a pair \(family, objective\)"),
        ({"a b": (Normal, ELBO()), "A-B": (Normal, ELBO())}, "names that give the folder 'a-b'"),
        ({"a": ({"y": Normal}, ELBO())}, r"family names the sites \['y'\]"),
    ],
)
def test_bad_guides(model, digits, guides, message):
    with pytest.raises(ValueError, match=message):
        pg.compare(model, guides, encoder=encoder_of(digits), data=digits, **TINY)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([], "expected test as a tensor or a tuple of tensors, got none"),
        (torch.zeros(0, 1, 8, 8), "test: the data are empty"),
        (torch.zeros(4, 3), r"test: the data give the observed site 'x' the shape \(2, 3\)"),
        (torch.full((4, 1, 8, 8), 0.5), "test: the data lie outside the support"),
        ((torch.zeros(4, 1, 8, 8),) * 2, "test: .* argument, and there are 2"),
    ],
)
def test_bad_test_rows_are_seen_before_any_training(model, digits, test, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        pg.compare(model, GUIDES, encoder=encoder_of(digits), data=digits, test=test, out=tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


def test_a_diverging_fit_is_named(model, digits):
    with pytest.raises(NonFiniteLoss, match=r"^wild: the loss is"):
        pg.compare(
            model, {"wild": (Normal, ELBO())}, encoder=encoder_of(digits), data=digits, **TINY, learning_rate=1e30
        )


def test_plain_tensors_are_evaluated_as_the_table_says(tmp_path):
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    model = pg.models.ProbabilisticPCA(2, 3)
    options: dict[str, Any] = {"encoder": lambda: MLP(3, 8, hidden=(8,)), "data": x[:40], **TINY}
    table = pg.compare(model, {"a": (MultivariateNormal, ELBO())}, **options)
    assert "40 rows of the training data itself" in repr(table)
    table = pg.compare(model, {"a": (MultivariateNormal, ELBO())}, test=x[40:], out=tmp_path / "out", **options)
    assert "20 test rows" in repr(table)
    assert (tmp_path / "out" / "figures" / "samples.png").is_file()
    assert not (tmp_path / "out" / "figures" / "reconstructions.png").exists()


decoder = nn.Linear(2, 3)


def program(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


def calls_program(x):
    program(x)


def test_fits_of_a_plain_function_share_no_weights():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    before = [p.tolist() for p in decoder.parameters()]
    twice = {"one": (Normal, ELBO()), "two": (Normal, ELBO())}
    table = pg.compare(program, twice, encoder=lambda: MLP(3, 8, hidden=(8,)), data=x, **TINY)
    assert [p.tolist() for p in decoder.parameters()] == before
    assert table["elbo"].nunique() == 1
    own = [{id(p) for p in run.model.parameters()} for run in table.runs.values()]
    assert own[0] and not own[0] & own[1]
    assert any(not p.equal(q) for p, q in zip(table.runs["one"].model.parameters(), decoder.parameters(), strict=True))


def test_a_function_that_hides_its_modules_is_refused():
    with pytest.raises(ValueError, match="write it as a PyroModule"):
        pg.compare(calls_program, {"a": (Normal, ELBO())}, encoder=lambda: MLP(3, 8), data=torch.randn(10, 3), **TINY)


def test_guide_sees_an_example_where_the_model_reads_its_data():
    def reads(x):
        size = x.shape[1]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    table = pg.compare(reads, {"a": (Normal, ELBO())}, encoder=lambda: MLP(3, 8), data=torch.randn(10, 3), **TINY)
    assert isinstance(table.runs["a"].guide, AmortizedGuide)


def test_guides_without_a_density_and_a_model_without_a_guide(model, digits, tmp_path):
    small = functools.partial(Critic, hidden=(8,))
    guides = {
        "implicit": (functools.partial(Implicit, hidden=(8,)), AVB(2, critic=small)),
        "without": (functools.partial(Implicit, hidden=(8,)), ELBO()),
        "gan": (None, GAN(critic=small)),
    }
    options: dict[str, Any] = TINY | {"encoder": encoder_of(digits), "data": digits, "test": digits.test[:40]}
    with pytest.raises(ValueError, match="without: site 'z' has no density"):
        pg.compare(model, guides, **options)
    table = pg.compare(
        model, guides, skip_unserved=True, out=tmp_path / "all", critic=CriticOptions(steps=2), **options
    )
    assert [*table.index] == ["implicit", "gan"] and [*table.left_out] == ["without"]
    assert "Left out" in repr(table) and "rate (estimate)" in repr(table) and "normal guide" in repr(table)
    assert math.isfinite(table.loc["implicit", "log_likelihood"]) and math.isnan(table.loc["implicit", "rate"])
    assert math.isnan(table.loc["gan", "log_likelihood"])
    assert table.runs["implicit"].options.critic.steps == 2 and table.runs["gan"].guide is None
    figures = {path.stem for path in (tmp_path / "all" / "figures").glob("*.png")}
    assert figures == {"samples", "reconstructions", "curves", "critics", "latents", "comparison"}
    posterior = arviz.from_netcdf(tmp_path / "all" / "posteriors.nc")["posterior"]
    assert [*posterior["fit"].values] == ["implicit"]


def test_nothing_that_can_be_served(model, digits):
    with pytest.raises(ValueError, match="no objective serves any of the guides"):
        pg.compare(
            model, {"a": (Implicit, ELBO())}, encoder=encoder_of(digits), data=digits, skip_unserved=True, **TINY
        )


NESTED = 100_000 * "-" + "1"


@pytest.mark.parametrize("reasons", ["{'gap': 'none', 'likelihood': 1}", "[1]", "__import__('os')", "{'gap'", NESTED])
def test_a_table_whose_reasons_are_no_mapping_of_strings_is_damaged(reasons, tmp_path):
    (tmp_path / "compare.yaml").touch()
    row = {"observations": 1, "particles": 2, "log_likelihood": -1.0}
    for written in (str({"gap": "it isn't known"}), reasons):
        pd.DataFrame([row | {"reasons": written}], index=pd.Index(["one"], name="guide")).to_csv(tmp_path / "table.csv")
        if written != reasons:
            assert _table_of(tmp_path)["one"] == ("one", row | {"reasons": {"gap": "it isn't known"}})
    with pytest.raises(ValueError, match=r"table\.csv is damaged"):
        _table_of(tmp_path)

"""Figures: drawn, not blank, and refused where data have no such picture."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pyrogen.experiment.figures

figures: Any = pyrogen.experiment.figures
NAMES = ("mean field", "flow")


def drawn(figure: Figure) -> int:
    """How many colours a figure has when it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(canvas.buffer_rgba())
    return len(np.unique(pixels.view(np.uint32)))


@pytest.fixture
def images():
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def histories():
    epochs = np.arange(1, 21)
    return {
        name: pd.DataFrame({"epoch": epochs, "loss": 50 / epochs + k + 20, "validation": -52 / epochs - k - 20})
        for k, name in enumerate(NAMES)
    }


def test_blank_figures_are_seen_as_such():
    assert drawn(Figure()) == 1


def test_images_make_grids(images):
    assert drawn(figures.samples(dict.fromkeys(NAMES, images), images)) > 100
    assert drawn(figures.reconstructions(images, dict.fromkeys(NAMES, images))) > 100


def test_colour_images_keep_their_colours():
    red = torch.zeros(4, 3, 8, 8)
    red[:, 0] = 1.0
    figure = figures.samples({"red": red}, red)
    assert np.allclose(figure.axes[1].images[0].get_array()[4, 4], [1.0, 0.0, 0.0])


def test_every_fit_has_its_title_and_axes_their_units(images, histories):
    figure = figures.samples(dict.fromkeys(NAMES, images), images)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["data", *NAMES]
    axes = figures.curves(histories).axes[0]
    assert axes.get_ylabel() == "loss (nats per observation)" and axes.get_xlabel() == "epoch"
    assert {*NAMES} <= {text for text in axes.get_legend_handles_labels()[1]}
    assert axes.get_yscale() == "log"


def test_curves_of_negative_losses_have_a_linear_axis(histories):
    for history in histories.values():
        history["loss"] -= 60
        history["validation"] += 60
    figure = figures.curves(histories)
    assert figure.axes[0].get_yscale() == "linear"
    assert drawn(figure) > 10


def test_curves_without_validation(histories):
    for history in histories.values():
        history["validation"] = np.nan
    assert drawn(figures.curves(histories)) > 10


def test_vectors_are_points(images):
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    figure = figures.samples(dict.fromkeys(NAMES, x + 1), x)
    assert figure.axes[1].get_xlabel() == "$x_1$"
    assert drawn(figure) > 10
    assert "of 5" in figures.samples({"a": torch.randn(9, 5)}, torch.randn(9, 5)).axes[1].get_xlabel()


def test_what_has_no_picture_gives_none():
    scalars = torch.randn(9, 1)
    assert figures.samples({"a": scalars}, scalars) is None
    assert figures.reconstructions(scalars, {"a": scalars}) is None
    assert figures.latents({"a": scalars}) is None


def test_two_latents_are_shown_themselves_and_more_by_their_components():
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    axes = figures.latents({"a": z}).axes[0]
    assert axes.get_xlabel() == "$z_1$"
    assert np.allclose(axes.collections[0].get_offsets(), z)
    # Three latents, of which only the last two vary: these are found.
    wide = torch.cat([torch.zeros(60, 1), 3 * z[:, :1], z[:, 1:]], 1)
    axes = figures.latents({"a": wide}).axes[0]
    assert axes.get_xlabel().startswith("component 1 of 3")
    shown = torch.as_tensor(np.asarray(axes.collections[0].get_offsets()))
    assert torch.allclose(torch.cdist(shown, shown), torch.cdist(wide.double(), wide.double()), atol=1e-5)


def test_labels_have_colours_and_a_legend():
    labels = torch.arange(12) % 3
    figure = figures.latents({"a": torch.randn(12, 2)}, labels, ("zero", "one", "two"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["zero", "one", "two"]
    assert len({tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections}) == 3


@pytest.mark.parametrize("shown", [True, False])
def test_summary(images, histories, shown):
    table = pd.DataFrame({"log_likelihood": [-20.0, -19.0], "log_likelihood_error": [0.2, 0.3]}, index=[*NAMES])
    x = images if shown else torch.randn(16, 3)
    parts = dict.fromkeys(NAMES, x)
    figure = figures.comparison(table, histories, x, parts, parts)
    assert len(figure.axes) == (8 if shown else 2)
    assert drawn(figure) > 50


def test_names_mean_nothing_to_matplotlib(images, histories):
    names = ("a$b", "$\\frac$", "_hidden")
    assert drawn(figures.samples(dict.fromkeys(names, images), images)) > 100
    assert drawn(figures.reconstructions(images, dict.fromkeys(names, images))) > 100
    figure = figures.curves(dict.fromkeys(names, next(iter(histories.values()))))
    assert drawn(figure) > 10 and len(figure.legends[0].get_texts()) == len(names) + 2
    table = pd.DataFrame({"log_likelihood": [-20.0] * 3, "log_likelihood_error": [0.2] * 3}, index=[*names])
    assert drawn(figures.likelihoods(table)) > 10


def test_narrow_curves_of_one_fit_name_no_fit(histories):
    one = figures.curves({"flow": histories["flow"]}, narrow=True)
    assert [text.get_text() for text in one.legends[0].get_texts()] == ["training", "validation"]
    both = figures.curves(histories, narrow=True)
    assert {*NAMES} < {text.get_text() for text in both.legends[0].get_texts()}
    assert drawn(one) > 10 and drawn(both) > 10


def test_critics_above_each_other(histories):
    for history in histories.values():
        history["critic_loss"] = history["accuracy_z"] = 0.6
    wide, narrow = figures.critics(histories), figures.critics(histories, narrow=True)
    assert len(narrow.axes) == 3 and narrow.get_figheight() > narrow.get_figwidth() < wide.get_figwidth()
    assert drawn(narrow) > 10


def test_no_log_likelihood_no_figure():
    assert figures.likelihoods(pd.DataFrame({"log_likelihood": [np.nan], "log_likelihood_error": [np.nan]})) is None

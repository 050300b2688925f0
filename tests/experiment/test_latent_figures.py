"""Pictures of one fit: names in their places, and contours that hold what they say."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import pyrogen.experiment.latent_figures
from pyrogen.experiment.latent_figures import box_of, density_of, highest_density_levels, image_grid

latent_figures: Any = pyrogen.experiment.latent_figures
NORMAL = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))


def pixels(figure: Any) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_lines_and_columns_have_their_names_in_the_middle():
    images = torch.zeros(2, 3, 1, 4, 6)
    images[1, 2] = 1.0
    axes = image_grid(images, ["a", "b"], ["x", "y", "z"]).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y", "z"]
    shown: Any = axes.images[0].get_array()
    lit = np.argwhere(shown[..., 0] == 1.0)
    assert (axes.get_yticks()[1], axes.get_xticks()[2]) == tuple((lit.min(0) + lit.max(0)) / 2)


def test_levels_of_a_normal_density_hold_what_they_say():
    grid = np.linspace(-5, 5, 401)
    density = np.exp(-(grid[:, None] ** 2 + grid**2) / 2)
    # A share m of a normal distribution in the plane lies within the radius r of m = 1 - exp(-r² / 2).
    for mass in (0.5, 0.95):
        (level,) = highest_density_levels(density, (mass,))
        assert level == pytest.approx(1 - mass, rel=0.01)


def test_kernel_estimates_agree_with_the_density():
    box = ((-4.0, 4.0), (-4.0, 4.0))
    found = density_of(NORMAL, box)
    middles = torch.linspace(-4, 4, 2 * latent_figures.BINS + 1)[1::2].double().numpy()
    cell = 8 / latent_figures.BINS
    exact = np.exp(-(middles[:, None] ** 2 + middles**2) / 2) / (2 * math.pi) * cell**2
    assert found.sum() == pytest.approx(1, abs=2e-3)
    # Scott's kernel, h = 20000^(-1/6) = 0.19, takes h² = 4 % off the peak, and the number of points under one, 20000 ·
    # 4π h² / 2π = 1500, another 3 %; three times that is allowed.
    assert np.abs(found - exact).max() < 0.13 * exact.max()


def test_kernels_are_narrow_where_the_distribution_is():
    angle = 2 * math.pi * torch.rand(2000, generator=torch.Generator().manual_seed(1))
    ring = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * NORMAL[:2000]
    box = box_of(ring)
    found = density_of(ring, box)
    middles = [np.linspace(*side, 2 * latent_figures.BINS + 1)[1::2] for side in box]
    radius = np.hypot(middles[0][:, None], middles[1])
    # Of the ring itself 99.7 % lie there; a kernel of Scott's width, 0.4, would leave 64 %.
    assert found[(radius > 1.7) & (radius < 2.3)].sum() > 0.93


def test_draws_of_one_observation_do_not_make_islands():
    # 50 observations of a standard normal and 100 draws so close to each that alone they would be islands.
    centres = NORMAL[:50].repeat_interleave(100, 0)
    cloud = centres + 0.02 * NORMAL[:5000]
    box = box_of(cloud)
    alone, together = density_of(cloud, box), density_of(cloud, box, together=100)
    assert (together > 1e-6).mean() > 3 * (alone > 1e-6).mean()


def test_axes_are_not_swapped():
    points = NORMAL * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])
    found = density_of(points, ((-4.0, 4.0), (-4.0, 4.0)))
    assert np.unravel_index(found.argmax(), found.shape)[0] == pytest.approx(0.75 * latent_figures.BINS, abs=2)
    assert found.sum(1).max() > 2 * found.sum(0).max()


def test_a_box_holds_nearly_all_of_every_cloud():
    (left, right), (bottom, top) = box_of(NORMAL, NORMAL + 3)
    for cloud in (NORMAL, NORMAL + 3):
        inside = (cloud[:, 0] > left) & (cloud[:, 0] < right) & (cloud[:, 1] > bottom) & (cloud[:, 1] < top)
        assert inside.double().mean() > 0.99


def contours_of(axes: Any) -> list[Any]:
    return [each for each in axes.collections if type(each).__name__ == "QuadContourSet"]


def test_aggregate_shows_points_by_label_and_both_contours():
    box = box_of(NORMAL)
    density = density_of(NORMAL, box)
    labels = torch.arange(100) % 3
    figure = latent_figures.aggregate(NORMAL[:100], density, density, box, ("z[0]", "z[1]"), labels, ("a", "b", "c$"))
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[0]", "z[1]")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["q(z)", "p(z)", "a", "b", r"c\$"]
    assert sum(len(c.get_offsets()) for c in axes.collections if type(c).__name__ == "PathCollection") == 100
    for contours in contours_of(axes):
        outer = contours.get_paths()[0].vertices
        # 95 % of a standard normal in the plane lie within √(2 log 20) = 2.45; kernel and draws leave some 0.05.
        assert np.linalg.norm(outer, axis=1).mean() == pytest.approx(2.45, abs=0.15)
    assert len(np.unique(pixels(figure).reshape(-1, 4), axis=0)) > 50


def test_a_point_mass_has_no_contours():
    points = torch.zeros(50, 2)
    box = box_of(points, NORMAL)
    figure = latent_figures.aggregate(points, np.zeros((96, 96)), density_of(NORMAL, box), box, ("a", "b"))
    assert len(contours_of(figure.axes[0])) == 1


def test_vectors_and_single_numbers():
    figure = latent_figures.vectors(NORMAL[:500], NORMAL[500:1500])
    assert len(contours_of(figure.axes[0])) == 2
    figure = latent_figures.vectors(NORMAL[:, :1], NORMAL[:, :1] + 1)
    data, samples = figure.axes[0].lines
    for line, mean in ((data, 1.0), (samples, 0.0)):
        x, y = (np.asarray(values) for values in line.get_data())
        assert np.trapezoid(y, x) == pytest.approx(1, abs=0.01)
        assert np.trapezoid(x * y, x) == pytest.approx(mean, abs=0.05)
    assert len(np.unique(pixels(figure).reshape(-1, 4), axis=0)) > 10

"""Pictures of ranks and coverage: lines where they belong, failing units named, bands that hold exact guides."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyrogen.evaluation.simulation_based import SimulationBasedCalibration
from pyrogen.evaluation.tarp import TARP
from pyrogen.evaluation.uniform_ranks import ecdf_band
from pyrogen.experiment import calibration_figures


def drawn(figure):
    """How many colours a figure has when it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return len(np.unique(np.ascontiguousarray(canvas.buffer_rgba()).view(np.uint32)))


@pytest.fixture
def calibrations():
    good = {"z": torch.randint(20, (200, 3)), "s": torch.randint(20, (200,))}
    narrow = torch.where(torch.rand(200) < 0.5, 0, 19)
    return {
        "good": SimulationBasedCalibration(good, 19),
        "bad": SimulationBasedCalibration(good | {"s": narrow}, 19),
        "all bad": SimulationBasedCalibration({"z": narrow.unsqueeze(1).expand(-1, 10)}, 19),
    }


def test_ranks_have_a_line_a_unit_and_failing_ones_a_name(calibrations):
    figure = calibration_figures.ranks(calibrations)
    assert drawn(figure) > 50
    good, good_histogram, bad, bad_histogram, all_bad, _ = figure.axes
    assert good.get_title().startswith("good: p = ") and good.get_legend() is None
    assert len(good.lines) == 5  # four units and the axis
    assert [text.get_text() for text in bad.get_legend().get_texts()] == ["s: draws too narrow"]
    texts = [text.get_text() for text in all_bad.get_legend().get_texts()]
    assert len(texts) == 7 and texts[-1] == "4 more fail"
    assert bad_histogram.get_title() == "s, the smallest p-value"
    for axes in (good_histogram, bad_histogram):
        assert sum(bar.get_height() * bar.get_width() for bar in axes.patches[:20]) == pytest.approx(200)
    line = next(line for line in bad.lines if line.get_label() == "s: draws too narrow")
    s = calibrations["bad"].ranks["s"]
    expected = [(s < j).double().mean().item() - j / 20 for j in range(21)]
    assert np.allclose(line.get_ydata(), expected, atol=1e-6)


@pytest.mark.parametrize("draws", [3, 10, 19, 99])
def test_histograms_of_any_number_of_draws(draws):
    found = SimulationBasedCalibration({"z": torch.randint(draws + 1, (100,))}, draws)
    axes = calibration_figures.ranks({"a": found}).axes[1]
    bars = [bar for bar in axes.patches if hasattr(bar, "get_width")]
    assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(100)
    assert len(bars) == {3: 4, 10: 11, 19: 20, 99: 20}[draws]


def test_coverage_has_a_curve_a_fit_and_the_band_of_the_fewest_simulations():
    results = {"many": TARP(torch.randint(20, (500,)), 19), "few": TARP(torch.randint(10, (100,)), 19)}
    figure = calibration_figures.coverage(results)
    assert drawn(figure) > 50
    left, right = figure.axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels[0].startswith("many (p = ") and labels[1].startswith("few (p = ")
    few = next(line for line in right.lines if line.get_label() == labels[1])
    assert np.allclose(few.get_ydata(), results["few"].coverage - results["few"].levels)
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    lower, upper = ecdf_band(100, 19)
    assert band.min() == pytest.approx(float(lower.min())) and band.max() == pytest.approx(float(upper.max()))


@pytest.mark.parametrize("draw", [calibration_figures.ranks, calibration_figures.coverage])
def test_no_results_are_refused(draw):
    with pytest.raises(ValueError, match="expected at least one result by name of the fit"):
        draw({})

"""Diversity of samples: identical, random and real, and its pairs by hand."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

import pyrogen as pg
from pyrogen.evaluation.class_diversity import diversity


def test_pairs_of_two_by_hand():
    """With two images a class there is one pair, and all drawn pairs are that one, either way round."""
    images = torch.rand(6, 3, 28, 30)
    similarity = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0, betas=(0.0448 / 0.3304, 0.2856 / 0.3304))
    expected = [1 - float(similarity(images[k : k + 1], images[3 + k : 4 + k])) for k in range(3)]
    found = diversity(images, torch.tensor([0, 1, 7, 0, 1, 7]), pairs=5)
    assert [*found.per_class] == [0, 1, 7]
    assert [*found.per_class.values()] == pytest.approx(expected, abs=1e-5)
    assert found.diversity == pytest.approx(sum(expected) / 3, abs=1e-5) and found.error < 1e-6
    assert str(found) == (
        f"diversity {found.diversity:.3f} ± {found.error:.3f}: 1 − MS-SSIM at 2 scales from 28 pixels (6 samples, 5 "
        "pairs in each of 3 classes)"
    )


@pytest.mark.parametrize(
    ("side", "scales", "compared"),
    [(4, 2, 16), (8, 2, 16), (15, 2, 30), (43, 2, 43), (44, 3, 44), (99, 4, 99), (176, 5, 176)],
)
def test_scales_and_enlarging(side, scales, compared):
    """As many scales as torchmetrics takes, of which none is empty: copies are alike and noise is not."""
    images, labels = F.interpolate(torch.rand(8, 1, 200, 200), (side, side)), torch.zeros(8, dtype=torch.long)
    found = diversity(images, labels, pairs=4)
    assert (found.scales, found.side) == (scales, compared) and found.diversity > 0.5
    assert diversity(images[:1].expand(8, -1, -1, -1), labels, pairs=4).diversity == pytest.approx(0, abs=1e-5)


def test_digits_by_their_labels_and_by_a_classifier():
    """Digits of one class are more alike than any, by far more than five standard errors of both."""
    data = pg.data.load("digits", binarize=None)
    images, labels = data.train, data.train_labels
    within, across = diversity(images, labels), diversity(images, torch.zeros_like(labels), pairs=1000)
    assert within.diversity + 5 * within.error < across.diversity - 5 * across.error
    one_hot = F.one_hot(labels).double()
    assert diversity(images, one_hot) == diversity(images, labels)
    assert diversity(images, labels, seed=1) != diversity(images, labels)


def test_the_random_state_is_left():
    state = torch.get_rng_state()
    diversity(torch.full((4, 1, 16, 16), 0.5), torch.zeros(4, dtype=torch.long), pairs=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_errors():
    images, labels = torch.rand(4, 1, 16, 16), torch.arange(4)
    with pytest.raises(ValueError, match="no class has two of the 4 samples"):
        diversity(images, labels)
    with pytest.raises(ValueError, match=r"samples as images \(N, C, H, W\), got \(4, 256\)"):
        diversity(images.flatten(1), labels)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\], got values from -"):
        diversity(images - 0.5, labels)
    with pytest.raises(ValueError, match="one label a row of samples"):
        diversity(images, labels[:3])
    with pytest.raises(ValueError, match="expected samples to be finite"):
        diversity(images * torch.nan, labels)
    with pytest.raises(ValueError, match="pairs must be a whole number"):
        diversity(images, labels // 2, pairs=0)

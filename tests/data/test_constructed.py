from typing import Any

import pytest
import torch

from pyrogen.data import constructed, load


def test_color_mnist_blends_two_colours_by_intensity(mnist_root):
    gray = load("mnist", root=mnist_root, binarize=None)
    data = load("color_mnist", root=mnist_root)
    assert data.event_shape == (3, 28, 28) and data.train.dtype == torch.uint8
    assert (data.values, data.levels, data.binarize) == ("levels", 256, None)
    for split in ("train", "validation", "test"):
        x, u = getattr(data, split), getattr(gray, split).double() / 255
        # The tiny files have a pixel of intensity 0 and one of 1 in each image: there the colours can be
        # read.
        background, foreground = x[:, :, 0, 1, None, None].double(), x[:, :, 0, 2, None, None].double()
        exact = background + (foreground - background) * u
        assert (x - exact).abs().max() <= 0.5 + 1e-9
        assert torch.equal(getattr(data, f"{split}_labels"), getattr(gray, f"{split}_labels"))
    colours = data.train[:, :, 0, 1:3].reshape(50, 6)
    assert len(colours.unique(dim=0)) == 50, "each image has colours of its own"


def test_the_seed_decides_colours_and_stacks(mnist_root, monkeypatch):
    monkeypatch.setattr(constructed, "STACKED_TRAIN", 40)
    for name in ("color_mnist", "stacked_mnist"):
        a, b, c = (load(name, root=mnist_root, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(a.train, b.train) and not torch.equal(a.train, c.train)
        assert torch.equal(a.test, b.test) and not torch.equal(a.test, c.test)
        assert torch.equal(load(**c.source).test, c.test)


def test_the_colouring_is_frozen():
    """Published figures on a constructed set hold only while its recipe gives the same bytes."""
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    generator = torch.Generator().manual_seed(0)
    x = constructed._coloured(images, generator)
    foreground, background = torch.tensor([172, 47, 117]), torch.tensor([192, 67, 251])
    assert x[0, :, 0, 2].tolist() == foreground.tolist() and x[0, :, 0, 0].tolist() == background.tolist()
    exact = background + (foreground - background) * 100 / 255
    assert x[0, :, 0, 1].tolist() == exact.round().int().tolist()


def test_stacked_mnist_stacks_digits_of_its_own_split(mnist_root, monkeypatch):
    monkeypatch.setattr(constructed, "STACKED_TRAIN", 500)
    gray = load("mnist", root=mnist_root, binarize=None)
    data: Any = load("stacked_mnist", root=mnist_root)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [500, 10, 12]
    assert data.event_shape == (3, 28, 28) and data.train.dtype == torch.uint8
    for split, first in (("train", 0), ("validation", 50), ("test", 0)):
        x, source = getattr(data, split), getattr(gray, split)
        rows = x[:, :, 0, 0].long() - first  # the first pixel of a tiny image is its number
        assert torch.equal(x, source.squeeze(1)[rows])
        a, b, c = getattr(gray, f"{split}_labels")[rows].unbind(1)
        assert torch.equal(getattr(data, f"{split}_labels"), 100 * a + 10 * b + c)
    assert len(data.train_labels.unique()) > 300


def test_stacked_mnist_has_the_size_of_the_literature():
    assert constructed.STACKED_TRAIN == 128_000


@pytest.mark.parametrize("name", ["color_mnist", "stacked_mnist"])
def test_colour_is_not_binarised(mnist_root, monkeypatch, name):
    monkeypatch.setattr(constructed, "STACKED_TRAIN", 40)
    with pytest.raises(ValueError, match=f"{name}: expected gray pixels"):
        load(name, root=mnist_root, binarize="dynamic")

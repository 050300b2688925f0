from typing import Any

import numpy as np
import pytest
import torch

from pyrogen.data import NAMES, load


def same(a, b):
    return all(torch.equal(getattr(a, split), getattr(b, split)) for split in ("train", "validation", "test"))


def test_digits_keep_their_seventeen_levels():
    from sklearn.datasets import load_digits

    data: Any = load("digits", binarize=None)
    assert (data.values, data.levels, data.binarize) == ("levels", 17, None)
    assert data.event_shape == (1, 8, 8) and data.train.dtype == torch.float32
    assert [len(x) for x in (data.train, data.validation, data.test)] == [1437, 180, 180]
    rows = torch.cat([data.train, data.validation, data.test]) * 16
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    assert torch.equal(rows, rows.round()) and rows.max() == 16

    # Every image of the source is there once, with its own label.
    def key(images, labels):
        flat = np.concatenate([np.asarray(images).reshape(len(labels), 64), np.asarray(labels)[:, None]], 1)
        return flat[np.lexsort(flat.T)]

    source = load_digits()
    assert np.array_equal(key(rows, labels), key(source.images, source.target))


def test_digits_are_split_alike_whatever_the_seed():
    a, b = load("digits", binarize=None, seed=0), load("digits", binarize=None, seed=1)
    assert same(a, b)


def test_digits_are_binarised_dynamically_unless_told():
    data, gray = load("digits"), load("digits", binarize=None)
    assert (data.values, data.levels, data.binarize) == ("binary", None, "dynamic")
    assert torch.equal(data.train, gray.train)
    assert data.validation.dtype == data.test.dtype == torch.bool
    # Certain pixels stay what they are.
    assert not data.test[gray.test == 0].any() and data.test[gray.test == 1].all()
    # The number of ones is a sum of Bernoullis: five standard deviations fail once in 2e6 seeds.
    mean, variance = gray.test.double().sum(), (gray.test * (1 - gray.test)).double().sum()
    assert abs(data.test.sum() - mean) < 5 * variance.sqrt()


def test_static_binarisation_shares_its_test_images_with_dynamic():
    dynamic, static = load("digits"), load("digits", binarize="static")
    assert torch.equal(dynamic.validation, static.validation) and torch.equal(dynamic.test, static.test)
    assert static.train.dtype == torch.bool and static.binarize == "static"
    assert torch.equal(static.prepare(static.train), static.train.float())


def test_threshold_is_above_a_half():
    data, gray = load("digits", binarize="threshold"), load("digits", binarize=None)
    assert (gray.train == 0.5).any(), "the boundary occurs"
    assert torch.equal(data.train, gray.train > 0.5) and torch.equal(data.test, gray.test > 0.5)
    assert data.values == "binary"


def test_drawn_images_follow_the_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = (load("digits", binarize="static", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a, b) and not torch.equal(a.test, c.test)


@pytest.mark.parametrize("binarize", ["auto", "static", "threshold", None])
def test_source_loads_the_same_data_again(binarize):
    data = load("digits", binarize=binarize, seed=3)
    again = load(**data.source)
    assert same(data, again) and repr(again) == repr(data) and again.source == data.source


def test_paths_in_source_hold_from_another_folder(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", train=np.arange(40.0).reshape(20, 2))
    monkeypatch.chdir(tmp_path)
    data = load("array:x.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert data.name == "array:x.npz" and same(data, load(**data.source))


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("MNIST", "mnist"),
        ("minst", "mnist"),
        ("fashion-mnist", "fashion_mnist"),
        ("CIFAR-10", "cifar10"),
        ("digit", "digits"),
        ("folder", "folder:PATH"),
        ("array:", "array:FILE.npz"),
        ("fodler:pictures", "folder:PATH"),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_one_and_all(name, guess):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; did you mean [^?]*{guess}") as caught:
        load(name)
    assert str(caught.value).endswith("Known are " + ", ".join(NAMES))


def test_a_name_that_is_near_to_none():
    with pytest.raises(ValueError, match="unknown data set 'qqq'; Known are digits"):
        load("qqq")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"binarize": "yes"}, ValueError, "binarize to be None or one of .*'dynamic'.*got 'yes'"),
        ({"binarize": True}, ValueError, "binarize to be None or one of .*got True"),
        ({"size": 16}, ValueError, "size only with celeba and folder:PATH, got size=16 with digits"),
        ({"size": 0}, ValueError, "1 to 8192, got 0"),
        ({"seed": 0.5}, TypeError, "seed to be an integer, got 0.5"),
        ({"root": 3}, TypeError, "root to be the path of a folder, got int"),
        ({"name": 3}, TypeError, "name of a data set.*got int"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        load(**{"name": "digits", **options})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (np.arange(40.0).reshape(20, 2), "gray pixels in .0, 1. to binarise, got real values"),
        (np.zeros((20, 3, 4, 4), np.uint8), r"got colour images \(3, 4, 4\); use binarize=None"),
    ],
)
@pytest.mark.parametrize("binarize", ["dynamic", "static", "threshold"])
def test_colour_and_real_values_are_not_binarised(tmp_path, train, message, binarize):
    np.savez(tmp_path / "x.npz", train=train)
    with pytest.raises(ValueError, match=message):
        load(f"array:{tmp_path / 'x.npz'}", binarize=binarize)

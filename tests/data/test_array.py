from typing import Any

import numpy as np
import pytest
import torch

from pyrogen.data import load

RNG = np.random.default_rng(0)
UNIT = RNG.random((20, 3))


def saved(tmp_path, **arrays):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("train", "values", "levels", "dtype"),
    [
        ((UNIT * 255).astype(np.uint8), "levels", 256, torch.uint8),
        (UNIT > 0.5, "binary", None, torch.bool),
        (UNIT, "unit interval", None, torch.float32),
        (UNIT.astype(np.float16), "unit interval", None, torch.float32),
        (UNIT * 2, "real", None, torch.float32),
        (UNIT - 0.5, "real", None, torch.float32),
    ],
)
def test_the_type_says_what_values_are(tmp_path, train, values, levels, dtype):
    data = load(f"array:{saved(tmp_path, train=train)}")
    assert (data.values, data.levels, data.binarize) == (values, levels, None)
    assert data.train.dtype == data.test.dtype == dtype and data.event_shape == (3,)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [16, 2, 2]
    rows = torch.cat([data.train, data.validation, data.test])
    expected = torch.from_numpy(train).to(dtype)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_splits_and_labels_are_kept_as_given(tmp_path):
    arrays = {"train": UNIT, "validation": UNIT[:4], "test": UNIT[4:9]}
    labels = {"train_labels": np.arange(20), "test_labels": np.arange(5, dtype=np.uint8)}
    data: Any = load(f"array:{saved(tmp_path, **arrays, **labels)}")
    assert np.array_equal(data.train, UNIT.astype(np.float32))
    assert np.array_equal(data.validation, data.train[:4]) and np.array_equal(data.test, data.train[4:9])
    assert data.train_labels.tolist() == list(range(20)) and data.train_labels.dtype == torch.int64
    assert data.validation_labels is None and data.test_labels.tolist() == [0, 1, 2, 3, 4]


def test_a_missing_split_is_a_seeded_tenth_of_train_with_its_labels(tmp_path):
    path = saved(tmp_path, train=np.arange(20.0)[:, None], test=np.ones((5, 1)), train_labels=np.arange(20))
    data: Any = load(f"array:{path}")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [18, 2, 5]
    assert data.train[:, 0].tolist() == data.train_labels.tolist()
    assert data.validation[:, 0].tolist() == data.validation_labels.tolist()
    assert set(data.train_labels.tolist()) | set(data.validation_labels.tolist()) == set(range(20))
    assert data.test_labels is None
    assert torch.equal(load(**data.source).validation, data.validation)
    others = [load(f"array:{path}", seed=seed).validation for seed in range(1, 5)]
    assert not all(torch.equal(other, data.validation) for other in others)


def test_real_values_in_one_split_make_all_real(tmp_path):
    assert load(f"array:{saved(tmp_path, train=UNIT, validation=UNIT, test=-UNIT)}").values == "real"


def test_gray_arrays_can_be_binarised(tmp_path):
    path = saved(tmp_path, train=(UNIT * 255).astype(np.uint8))
    data = load(f"array:{path}", binarize="dynamic")
    assert (data.values, data.levels) == ("binary", None) and data.train.dtype == torch.uint8
    assert data.test.dtype == torch.bool


NAN = UNIT.copy()
NAN[3, 1] = np.nan
OBJECTS = np.array([{"a": 1}, None], dtype=object)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": UNIT}, r"an array named train, found \['x_train'\]"),
        ({"train": UNIT, "val": UNIT}, r"found also \['val'\]; rename or remove"),
        ({"train": NAN}, r"train to be finite, but 1 of 60 values are NaN"),
        ({"train": UNIT, "test": UNIT + np.inf}, r"test to be finite, but 60 of 60"),
        ({"train": np.full((5, 1), 1e300)}, r"5 of 5 values are NaN or infinite \(or too large for"),
        ({"train": OBJECTS}, r"cannot be read as plain arrays .*not of objects"),
        ({"train": np.zeros((0, 3))}, r"at least one row and one value, got \(0, 3\)"),
        ({"train": np.zeros((5, 0))}, r"at least one row and one value, got \(5, 0\)"),
        ({"train": np.zeros(5)}, r"\(rows, \*event_shape\).*got \(5,\); reshape numbers to \(rows, 1\)"),
        ({"train": np.zeros((5, 2), np.int64)}, r"bool, uint8 or floats, got int64; use astype\(np\.uint8\)"),
        ({"train": np.zeros((5, 2), complex)}, r"bool, uint8 or floats, got complex128"),
        ({"train": np.array([["a"]])}, r"bool, uint8 or floats, got <U1"),
        ({"train": UNIT, "test": UNIT > 0.5}, r"one type in all splits, got .*'test': 'bool'"),
        ({"train": UNIT, "test": UNIT[:, :2]}, r"one event shape in all splits, got .*'test': \(2,\)"),
        ({"train": UNIT[:2]}, r"at least 3 rows to split, got 2 in train; add rows"),
        ({"train": UNIT, "train_labels": np.arange(3)}, r"train_labels to be integers of shape \(20,\)"),
        ({"train": UNIT, "train_labels": np.zeros(20)}, r"train_labels to be integers .*got float64"),
        ({"train": UNIT, "test_labels": np.arange(3)}, r"found test_labels but no test"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_file(tmp_path, arrays, message):
    path = saved(tmp_path, **arrays)
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        load(f"array:{path}")


@pytest.mark.parametrize("kept", [0, 10, 300, -5])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = saved(tmp_path, train=UNIT)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path} cannot be read as plain .*np\.savez\('x\.npz', train="):
        load(f"array:{path}")


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_bytes_are_noticed(tmp_path, compressed):
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, train=UNIT)
    content = bytearray(path.read_bytes())
    for i in range(250, 260):
        content[i] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{path} cannot be read as plain arrays"):
        load(f"array:{path}")


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", UNIT)
    with pytest.raises(ValueError, match=r"x\.npy cannot be read .*a single array or .*, not an \.npz"):
        load(f"array:{tmp_path / 'x.npy'}")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.npz file at .*none\.npz, found nothing; check the path"):
        load(f"array:{tmp_path / 'none.npz'}")

"""Data sets and toy problems with wrong arguments, and damaged files given as data."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from pyrogen import data

X = torch.rand(4, 3)
LONG, SNOW = "x" * 5000, "ü☃"
UNKNOWN = ("NaN", "infinite")
"""Values may be missing in a data set; whoever computes with them refuses them."""
ELSEWHERE = {
    "NAMES": "a tuple",
    "DataNotFoundError": "an error",
    "EightSchools": "takes nothing",
    "EightSchoolsPosterior": "a record of known figures",
}

Call = namedtuple("Call", "function arguments kinds right", defaults=({}, {}))
CALLS = {
    "Data": Call(
        data.Data,
        {"name": "x", "train": X, "validation": X, "test": X, "values": "real"},
        right={"name": ("another", "empty", "snow", "long")} | dict.fromkeys(("train", "validation", "test"), UNKNOWN),
    ),
    "FourPoints": Call(data.FourPoints, {"repeats": 2}),
    "GaussianMixture2d": Call(
        data.GaussianMixture2d, {"means": torch.rand(3, 2), "scale": 0.1, "observations": 5, "seed": 0}
    ),
    "LinearGaussian": Call(
        data.LinearGaussian, {"latent": 2, "observed": 4, "scale": 0.5, "seed": 0, "observations": 5}
    ),
    "as_float": Call(
        data.as_float, {"x": X}, right={"x": ("NaN", "infinite", "one number", "without rows", "sparse", "on meta")}
    ),
    "grid": Call(data.grid, {"side": 2, "spacing": 1.0, "scale": 0.1}),
    "ring": Call(data.ring, {"modes": 3, "radius": 1.0, "scale": 0.1}),
    "load": Call(
        data.load,
        {"name": "digits", "root": None, "binarize": "auto", "seed": 0, "size": None},
        right={"root": ("missing", "long", "a zero byte"), "binarize": ("None",)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name, catalogue):
    catalogue.try_all(name, CALLS[name])


def test_every_public_name_is_in_the_catalogue(check_complete):
    check_complete(data, CALLS, ELSEWHERE)


def _npz(path, **arrays):
    np.savez(path, **arrays)


FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "text": lambda path: path.write_text("nothing of the kind " + SNOW),
    "other names": lambda path: _npz(path, nothing=np.ones(3)),
    "objects": lambda path: _npz(path, train=np.array([{}, []], dtype=object)),
    "a number": lambda path: _npz(path, train=np.ones(())),
    "no rows": lambda path: _npz(path, train=np.ones((0, 3))),
    "NaN": lambda path: _npz(path, train=np.full((5, 3), np.nan)),
    "texts": lambda path: _npz(path, train=np.array(["a", "b"])),
    "complex": lambda path: _npz(path, train=np.ones((5, 3), dtype=complex)),
    "unequal": lambda path: _npz(path, train=np.ones((5, 3)), test=np.ones((5, 4)), validation=np.ones((5, 3))),
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_arrays(name, tmp_path, catalogue):
    path = tmp_path / f"{SNOW}.npz"
    FILES[name](path)
    catalogue.refused(name, lambda: data.load(f"array:{path}"), SNOW)


IMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "cut": lambda path: path.write_bytes(_png(path)[:60]),
    "another size": lambda path: Image.new("RGB", (7, 3)).save(path),
    "another mode": lambda path: Image.new("L", (4, 4)).save(path),
}


def _png(path):
    Image.effect_noise((4, 4), 50).convert("RGB").save(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", IMAGES)
def test_damaged_images(name, tmp_path, catalogue):
    for number in range(12):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:02}.png")
    IMAGES[name](tmp_path / f"05{SNOW}.png")
    catalogue.refused(name, lambda: data.load(f"folder:{tmp_path}"), SNOW)


@pytest.mark.parametrize(
    "name", [LONG, f"array:{LONG}.npz", f"folder:{LONG}", "array:", "folder:", SNOW, "digits:x", "array:\0"]
)
def test_wrong_names(name, catalogue):
    catalogue.refused(name[:20], lambda: data.load(name), name[:20].partition(":")[2] or name)

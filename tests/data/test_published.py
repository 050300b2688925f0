import pickle  # noqa: TID251 (CIFAR-10 is published so)
import struct
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pyrogen.data import DataNotFoundError, load


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_the_last_sixth_of_the_training_images_is_validation(tmp_path, write_tiny_mnist, name, kind):
    write_tiny_mnist(tmp_path, kind=kind)
    data: Any = load(name, root=tmp_path, binarize=None)
    assert (data.values, data.levels) == ("levels", 256) and data.train.dtype == torch.uint8
    assert data.event_shape == (1, 28, 28)
    assert data.train[:, 0, 0, 0].tolist() == list(range(50))
    assert data.validation[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test[:, 0, 0, 0].tolist() == list(range(12))
    assert data.validation_labels.tolist() == list(range(10))
    assert data.source == {"name": name, "root": str(tmp_path), "binarize": None, "seed": 0, "size": None}
    raw = np.frombuffer((tmp_path / kind / "raw" / "train-images-idx3-ubyte").read_bytes(), np.uint8)[16:]
    assert np.array_equal(torch.cat([data.train, data.validation]).numpy().ravel(), raw)


def test_mnist_is_binary_by_custom_and_fashion_is_not(tmp_path, write_tiny_mnist):
    write_tiny_mnist(tmp_path)
    write_tiny_mnist(tmp_path, kind="FashionMNIST")
    assert load("mnist", root=tmp_path).binarize == "dynamic"
    assert load("fashion_mnist", root=tmp_path).values == "levels"
    assert load("fashion_mnist", root=tmp_path, binarize="static").test.dtype == torch.bool


def test_root_is_taken_from_the_environment(mnist_root, monkeypatch):
    monkeypatch.setenv("PYROGEN_DATA", str(mnist_root))
    data = load("mnist", binarize=None)
    assert data.source["root"] == str(mnist_root)
    monkeypatch.delenv("PYROGEN_DATA")
    assert torch.equal(load(**data.source).test, data.test)


def test_root_is_a_cache_at_home_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=str(tmp_path / ".cache" / "pyrogen" / "MNIST" / "raw")):
        load("mnist")


def test_real_mnist(shared_root):
    data: Any = load("mnist", root=shared_root, binarize=None)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [50_000, 10_000, 10_000]
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    pixels = torch.cat([data.train, data.validation]).double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.1307, 0.3081)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mnist", "MNIST/raw with train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw with train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py with data_batch_1"),
        ("celeba", "celeba with the folder img_align_celeba and list_eval_partition.txt.*gdown"),
        ("omniglot", "omniglot-py with images_background.zip"),
        ("color_mnist", "MNIST/raw"),
        ("stacked_mnist", "MNIST/raw"),
    ],
)
def test_a_failed_download_names_the_set_the_root_the_layout_and_the_mend(tmp_path, name, layout):
    root = tmp_path / "sets"
    called = "mnist" if name in ("color_mnist", "stacked_mnist") else name
    message = f"{called} was not found under {root} and could not be downloaded .*no network.*"
    with pytest.raises(DataNotFoundError, match=f"(?s){message}Expected {root}/{layout}.*root=.*PYROGEN_"):
        load(name, root=root)


def test_what_is_absent_is_downloaded(tmp_path, monkeypatch, write_tiny_mnist):
    calls: list[str] = []

    def download(self):
        if not calls:
            write_tiny_mnist(tmp_path)
        calls.append(self.root)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(load("mnist", root=tmp_path).train) == 50
    assert calls == [str(tmp_path)]
    load("mnist", root=tmp_path)
    assert len(calls) == 1, "files that are there are not downloaded again"


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-100],
        lambda b: b[:10],
        lambda b: b"",
        lambda b: b"\0" * 16 + b[16:],
        lambda b: b"text" + b,
    ],
)
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_files_are_named_with_the_mend(mnist_root, damage, file):
    path = mnist_root / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"mnist: the files under {mnist_root} are damaged .*load again"):
        load("mnist", root=mnist_root)


def test_images_and_labels_of_different_number_are_refused(mnist_root):
    labels = struct.pack(">ii", 2049, 11) + bytes(11)
    (mnist_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=r"shape \(12,\), in test_labels, got \(11,\)"):
        load("mnist", root=mnist_root)


class OldNumpyType:
    """Pickles to the call that the published CIFAR-10 files contain, of which numpy 2.4 complains."""

    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        rows = slice(10 * i, 10 * i + 10)
        batch = {"data": images[rows], "labels": list(range(10)), "type": OldNumpyType()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))

    data: Any = load("cifar10", root=tmp_path)
    assert (data.values, data.levels, data.binarize) == ("levels", 256, None)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [45, 5, 10]
    stored = torch.cat([data.train, data.validation, data.test])
    assert np.array_equal(stored.numpy(), images.reshape(60, 3, 32, 32)), "channels first, as in the file"
    assert data.validation_labels.tolist() == [5, 6, 7, 8, 9] and data.classes[3] == "class 3"
    with pytest.raises(ValueError, match="cifar10: expected gray pixels"):
        load("cifar10", root=tmp_path, binarize="dynamic")


@pytest.fixture
def celeba_root(tmp_path, monkeypatch):
    """Three, two and two portraits: a flat colour in the central 140×140 pixels, black outside."""
    monkeypatch.setattr("torchvision.datasets.celeba.check_integrity", lambda *args: True)
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 8)]
    for i, name in enumerate(names):
        image = Image.new("RGB", (178, 218))
        image.paste((200, 40 * i, 0), (19, 39, 159, 179))
        image.save(folder / "img_align_celeba" / name, "JPEG", quality=100, subsampling=0)
    splits = [0, 0, 0, 1, 1, 2, 2]
    tables = {
        "list_eval_partition.txt": [f"{n} {s}" for n, s in zip(names, splits, strict=True)],
        "identity_CelebA.txt": [f"{n} {100 + i}" for i, n in enumerate(names)],
        "list_bbox_celeba.txt": ["7", "image_id x y w h", *(f"{n} 1 2 3 4" for n in names)],
        "list_landmarks_align_celeba.txt": ["7", "a b", *(f"{n} 1 2" for n in names)],
        "list_attr_celeba.txt": ["7", "Smiling Young", *(f"{n} -1 1" for n in names)],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(("size", "side"), [(None, 64), (32, 32)])
def test_celeba_is_cropped_and_resized(celeba_root, size, side):
    data: Any = load("celeba", root=celeba_root, size=size)
    assert data.event_shape == (3, side, side) and data.train.dtype == torch.uint8
    assert data.train_labels.tolist() == [100, 101, 102]
    assert data.validation_labels.tolist() == [103, 104] and data.test_labels.tolist() == [105, 106]
    rows = torch.cat([data.train, data.validation, data.test]).int()
    colours = torch.tensor([[200, 40 * i, 0] for i in range(7)])[:, :, None, None]
    # JPEG at quality 100 is a few levels off at an edge; a crop off by a pixel would show black, 200 levels
    # off.
    assert (rows - colours).abs().max() < 20
    assert load(**data.source).train.equal(data.train)


def test_a_missing_portrait_is_named(celeba_root):
    (celeba_root / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(DataNotFoundError, match=r"000002\.jpg"):
        load("celeba", root=celeba_root)


def test_omniglot(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.omniglot.check_integrity", lambda *args: True)
    folder = tmp_path / "omniglot-py"
    for part, characters in (("images_background", 3), ("images_evaluation", 2)):
        for c in range(characters):
            for i in range(10):
                path = folder / part / "Alphabet" / f"character{c:02d}" / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("1", (105, 105), 1)  # white paper
                image.paste(0, (0, 0, 105, 30 * (c + 1)))  # black ink, more for later characters
                image.save(path)

    data: Any = load("omniglot", root=tmp_path, binarize=None)
    assert data.event_shape == (1, 28, 28) and data.train.dtype == torch.uint8
    assert [len(x) for x in (data.train, data.validation, data.test)] == [27, 3, 20]
    labels = torch.cat([data.train_labels, data.validation_labels])
    assert labels.bincount().tolist() == [10, 10, 10]
    assert data.test_labels.tolist() == [3] * 10 + [4] * 10, "other characters than those of the background"
    rows, ink = torch.cat([data.train, data.validation]), 30 * (labels + 1) / 105
    assert torch.allclose(rows.double().mean((1, 2, 3)) / 255, ink.double(), atol=1 / 255)
    assert torch.all(rows[:, 0, 0] == 255) and torch.all(rows[:, 0, -1] == 0)
    assert torch.equal(load("omniglot", root=tmp_path, seed=5).train, data.train), "the split is fixed"
    assert load("omniglot", root=tmp_path).binarize == "dynamic"

"""Small files in the layout of the published sets, and no way to the network."""

import os
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing may be downloaded, whatever a test forgets to put in place."""

    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", refuse)
    monkeypatch.delenv("PYROGEN_DATA", raising=False)


@pytest.fixture(scope="session")
def shared_root():
    """A root with the real MNIST, where there is one."""
    named = os.environ.get("PYROGEN_DATA")
    root = Path(named) if named else Path(__file__).parents[3] / "shared" / "data"
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip("needs MNIST under PYROGEN_DATA or ../shared/data")
    return root


def write_mnist(root: Path, train: int = 60, test: int = 12, kind: str = "MNIST") -> None:
    """Tiny idx files: image i starts with the pixels i, 0 and 255, noise follows; its label is i % 10."""
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, n in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = np.arange(n), 0, 255
        labels = (np.arange(n) % 10).astype(np.uint8)
        header = struct.pack(">iiii", 2051, n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, n) + labels.tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


@pytest.fixture
def write_tiny_mnist():
    return write_mnist

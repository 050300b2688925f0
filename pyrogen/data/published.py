"""Published data sets: scikit-learn's digits, and torchvision's, downloaded on demand."""

import os
import pickle  # noqa: TID251 (only its error; torchvision checks the sums of what it unpickles)
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from pyrogen.data.dataset import Data
from pyrogen.data.limits import size_in_words
from pyrogen.data.splits import hold_out

__all__ = [
    "DataNotFoundError",
    "celeba",
    "cifar10",
    "default_root",
    "digits",
    "fashion_mnist",
    "mnist",
    "omniglot",
]

T = TypeVar("T")
# Splits that are ours are the same whatever the caller's seed: a test row must never be somebody's training
# row.
SPLIT_SEED = 0
# What torchvision's readers raise on damaged files, as seen in their code.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    RuntimeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_CELEBA_CROP = 140
_IDX = 16 + 60_000 * 28 * 28
"""Bytes of the longest file of MNIST and its like; torchvision reads each as a whole."""


class DataNotFoundError(FileNotFoundError):
    """A data set is not under the root and could not be downloaded."""


def default_root() -> Path:
    """The folder of data sets: the environment variable ``PYROGEN_DATA``, otherwise ``~/.cache/pyrogen``."""
    return Path(os.environ.get("PYROGEN_DATA") or Path.home() / ".cache" / "pyrogen").expanduser()


def _open(name: str, root: Path, layout: str, read: Callable[[bool], T]) -> T:
    """Read a data set from root, or download it there first: ``read(download)``."""
    try:
        return read(False)
    except _DAMAGE as error:
        absent = isinstance(error, FileNotFoundError) or "not found" in str(error)
        if not absent:
            raise ValueError(
                f"{name}: the files under {root} are damaged ({type(error).__name__}: {error}); expected "
                f"{layout}; delete them and load again to download them anew, or copy them afresh"
            ) from error
    try:
        return read(True)
    except Exception as error:  # a download can fail in any way; the mend is the same for all
        raise DataNotFoundError(
            f"{name} was not found under {root} and could not be downloaded ({type(error).__name__}: "
            f"{error}). Expected {layout}. Put these files there, give the folder that has them as root=... "
            f"or in the environment variable PYROGEN_DATA, or load again with a connection to the internet"
        ) from error


def digits() -> Data:
    """Handwritten digits that ship with scikit-learn: 1797 images of 8×8 pixels with 17 gray levels.

    Split by a fixed shuffle into 1437/180/180. Pixels are stored as floats k/16.
    """
    from sklearn.datasets import load_digits  # only here: it is slow to import and the other sets do without

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    train, validation, test = hold_out(len(images), parts=2, seed=SPLIT_SEED)
    return Data(
        "digits",
        train=images[train],
        validation=images[validation],
        test=images[test],
        values="levels",
        levels=17,
        train_labels=labels[train],
        validation_labels=labels[validation],
        test_labels=labels[test],
    )


def _published(
    name: str, images: Tensor, labels: Tensor, held: int, test: Tensor, test_labels: Tensor, classes
) -> Data:
    """A data set whose source has training and test rows: the last ``held`` training rows are validation."""
    kept = len(images) - held
    return Data(
        name,
        train=images[:kept],
        validation=images[kept:],
        test=test,
        values="levels",
        levels=256,
        train_labels=labels[:kept],
        validation_labels=labels[kept:],
        test_labels=test_labels,
        classes=tuple(classes),
    )


def _mnist_like(name: str, kind: type[torchvision.datasets.MNIST], root: Path) -> Data:
    layout = (
        f"{root / kind.__name__ / 'raw'} with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        f"t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
    )

    def read(download: bool) -> Data:
        for path in (root / kind.__name__ / "raw").glob("*-ubyte"):
            if not path.is_file() or path.stat().st_size > _IDX:
                raise ValueError(f"{path.name} is {size_in_words(path.stat().st_size)} long, not {size_in_words(_IDX)}")
        train = kind(str(root), train=True, download=download)
        test = kind(str(root), train=False)
        images, test_images = train.data.unsqueeze(1), test.data.unsqueeze(1)
        # A sixth is the customary 10 000 of the published 60 000.
        return _published(name, images, train.targets, len(images) // 6, test_images, test.targets, kind.classes)

    return _open(name, root, layout, read)


def mnist(root: Path) -> Data:
    """MNIST (LeCun et al. 1998), 28×28: the last 10 000 of the training images are validation."""
    return _mnist_like("mnist", torchvision.datasets.MNIST, root)


def fashion_mnist(root: Path) -> Data:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), split as MNIST is."""
    return _mnist_like("fashion_mnist", torchvision.datasets.FashionMNIST, root)


def cifar10(root: Path) -> Data:
    """CIFAR-10 (Krizhevsky 2009), 3×32×32: the last 5 000 of the training images are validation."""
    layout = f"{root / 'cifar-10-batches-py'} with data_batch_1 ... data_batch_5, test_batch and batches.meta"

    def read(download: bool) -> Data:
        with warnings.catch_warnings():
            # The published pickles were written by an old numpy, of which a new one complains.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            train = torchvision.datasets.CIFAR10(str(root), train=True, download=download)
            test = torchvision.datasets.CIFAR10(str(root), train=False)
        images = torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous()
        test_images = torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous()
        labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
        return _published("cifar10", images, labels, len(images) // 10, test_images, test_labels, train.classes)

    return _open("cifar10", root, layout, read)


def celeba(root: Path, size: int) -> Data:
    """CelebA (Liu et al. 2015, arXiv 1411.7766): torchvision's splits, 3×64×64; labels are people.

    A common recipe: the central 140×140 pixels of the aligned image, resized to ``size`` (64 if not told).
    Every image is decoded, half a millisecond to a millisecond each: minutes for all 202 599, and at 64
    pixels 2.5 GB of memory. To load it faster the next time, ``np.savez`` the tensors and use
    ``array:FILE.npz``.
    """
    folder = root / "celeba"
    layout = (
        f"{folder} with the folder img_align_celeba and list_eval_partition.txt, identity_CelebA.txt, "
        f"list_attr_celeba.txt, list_bbox_celeba.txt and list_landmarks_align_celeba.txt"
        f" (downloading them needs the package gdown)"
    )

    def crop(image) -> Tensor:
        image = transforms.center_crop(image.convert("RGB"), [_CELEBA_CROP, _CELEBA_CROP])
        return transforms.pil_to_tensor(transforms.resize(image, [size, size], antialias=True))

    def read(download: bool) -> Data:
        open_split = torchvision.datasets.CelebA
        train = open_split(str(root), "train", "identity", transform=crop, download=download)
        validation, test = (open_split(str(root), s, "identity", transform=crop) for s in ("valid", "test"))
        return Data(
            "celeba",
            train=_decoded(train),
            validation=_decoded(validation),
            test=_decoded(test),
            values="levels",
            levels=256,
            train_labels=train.identity[:, 0],
            validation_labels=validation.identity[:, 0],
            test_labels=test.identity[:, 0],
        )

    return _open("celeba", root, layout, read)


def omniglot(root: Path) -> Data:
    """Omniglot (Lake, Salakhutdinov and Tenenbaum 2015), resized to 28×28, ink 1 on paper 0.

    The background set (964 characters, 19 280 images) is train, less a fixed random tenth for validation; the
    evaluation set (659 other characters, 13 180 images) is test, and its labels go on where those of the
    background set end. Resized from 105×105 with antialiasing, so figures differ a little from those on the
    file of Burda, Grosse and Salakhutdinov (2016, arXiv 1509.00519). Decoding takes about 15 seconds.
    """
    folder = root / "omniglot-py"
    layout = (
        f"{folder} with images_background.zip and images_evaluation.zip and, extracted beside them, the "
        f"folders images_background and images_evaluation (alphabet/character/*.png)"
    )

    def ink(image) -> Tensor:
        return 255 - transforms.pil_to_tensor(transforms.resize(image, [28, 28], antialias=True))

    def read(download: bool) -> Data:
        background, evaluation = (
            torchvision.datasets.Omniglot(str(root), background=b, transform=ink, download=download)
            for b in (True, False)
        )
        (images, labels), (test, test_labels) = _characters(background), _characters(evaluation)
        train, validation = hold_out(len(images), parts=1, seed=SPLIT_SEED)
        return Data(
            "omniglot",
            train=images[train],
            validation=images[validation],
            test=test,
            values="levels",
            levels=256,
            train_labels=labels[train],
            validation_labels=labels[validation],
            test_labels=test_labels + labels.max() + 1,
        )

    return _open("omniglot", root, layout, read)


def _decoded(images: torchvision.datasets.VisionDataset) -> Tensor:
    """All images of a torchvision data set, decoded one at a time into one uint8 tensor (N, C, H, W)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        first = images[0][0]
        rows = torch.empty((len(images), *first.shape), dtype=torch.uint8)
        for i in range(len(images)):
            rows[i] = images[i][0]
    return rows


def _characters(images: torchvision.datasets.Omniglot) -> tuple[Tensor, Tensor]:
    """Images and labels in the order of their paths.

    torchvision lists folders as the file system gives them, so its order, and with it the split and the
    labels, would differ from machine to machine.
    """
    names = [(images._characters[label], file) for file, label in images._flat_character_images]
    order = sorted(range(len(names)), key=names.__getitem__)
    number = {character: i for i, character in enumerate(sorted(images._characters))}
    return _decoded(images)[order], torch.tensor([number[names[i][0]] for i in order])

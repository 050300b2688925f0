"""Load a data set by its name."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from pyrogen.arguments import is_whole, plain
from pyrogen.data.array import array
from pyrogen.data.constructed import color_mnist, stacked_mnist
from pyrogen.data.dataset import Binarization, Data, as_float
from pyrogen.data.folder import folder
from pyrogen.data.published import celeba, cifar10, default_root, digits, fashion_mnist, mnist, omniglot

__all__ = ["NAMES", "load"]

NAMES = (
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "celeba",
    "omniglot",
    "color_mnist",
    "stacked_mnist",
    "folder:PATH",
    "array:FILE.npz",
)
# The field models these as binary images; all others keep their values unless asked.
_BINARY_BY_CUSTOM = ("digits", "mnist", "omniglot")
_WITHOUT_ROOT = ("digits", "folder", "array")
_WITH_SIZE = ("celeba", "folder")
_CELEBA_SIZE = 64
_LARGEST = 8192


def load(
    name: str = "digits",
    *,
    root: str | os.PathLike[str] | None = None,
    binarize: Binarization | Literal["auto"] | None = "auto",
    seed: int = 0,
    size: int | None = None,
) -> Data:
    """Load a data set by its name, downloading it through torchvision if need be.

    ====================  ====================================================================================
    name                  what
    ====================  ====================================================================================
    ``digits``            1×8×8, 17 levels, 1437/180/180 by a fixed shuffle; ships with scikit-learn
    ``mnist``             1×28×28, 50 000/10 000/10 000: the last 10 000 training images are validation
    ``fashion_mnist``     as ``mnist``
    ``cifar10``           3×32×32, 45 000/5 000/10 000: the last 5 000 training images are validation
    ``celeba``            3×64×64, torchvision's splits; central 140×140 pixels resized to ``size`` (64)
    ``omniglot``          1×28×28, background set less a fixed tenth / that tenth / evaluation set
    ``color_mnist``       3×28×28, MNIST in a random colour on a random background per image, from ``seed``
    ``stacked_mnist``     3×28×28, three random digits as channels, 128 000/10 000/10 000, from ``seed``
    ``folder:PATH``       images in class folders, or a zip of such; folders ``train``, ``validation`` and
                          ``test`` are the splits, those missing random tenths of the rest, from ``seed``
    ``array:FILE.npz``    arrays ``train`` and optionally ``validation``, ``test``, ``train_labels``, ...
    ====================  ====================================================================================

    Args:
        name: One of the above.
        root: The folder that holds, or shall hold, the data sets that torchvision reads. By default the
            environment variable ``PYROGEN_DATA``, otherwise ``~/.cache/pyrogen``.
        binarize: ``"dynamic"``: training images stay gray and :meth:`Data.prepare` draws each pixel anew from
            Bernoulli(pixel); validation and test are drawn once, from ``seed``. ``"static"``: all three are
            drawn once, with the same validation and test. ``"threshold"``: pixel > 0.5. ``None``: values stay
            as they are. ``"auto"``: ``"dynamic"`` for digits, mnist and omniglot, ``None`` for all others.
        seed: The seed of all that is drawn here: binary images, colours, stacks, and the splits of
            ``folder:`` and ``array:``. Leave it at 0 to have the same data as others; published splits never
            depend on it.
        size: For ``celeba`` and ``folder:``, the side of the images in pixels.

    Returns:
        The data, as tensors on the CPU. ``load(**data.source)`` gives them again.

    Raises:
        ValueError: If the name is not known, an option does not fit the data, or a file is damaged.
        DataNotFoundError: If the files are not under ``root`` and cannot be downloaded.
        FileNotFoundError: If the path of ``folder:`` or ``array:`` does not exist.

    Example:
        >>> data = load("digits")
        >>> data
        Data('digits', values='binary', binarize='dynamic', event_shape=(1, 8, 8), train=1437 float32,
             validation=180 bool, test=180 bool)
        >>> load("digits", binarize=None).levels
        17
    """
    kind, _, path = _checked_name(name).partition(":")
    _check_options(kind, root, binarize, seed, size)
    seed = int(seed)
    folder_of_sets = None if kind in _WITHOUT_ROOT else _absolute(root if root is not None else default_root())
    how = ("dynamic" if kind in _BINARY_BY_CUSTOM else None) if binarize == "auto" else binarize
    data = _gray(kind, path, folder_of_sets, seed, size)
    if how is not None:
        data = _binarized(data, how, seed)
    source = {
        "name": f"{kind}:{_absolute(path)}" if path else kind,
        "root": None if folder_of_sets is None else str(folder_of_sets),
        "binarize": how,
        "seed": seed,
        "size": size,
    }
    return dataclasses.replace(data, name=name, source=source)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().absolute()


def _checked_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a data set, such as 'digits', got {type(name).__name__}")
    kind, colon, path = name.partition(":")
    plain = [known for known in NAMES if ":" not in known]
    if name in plain or (kind in ("folder", "array") and path):
        return name
    wanted = kind.lower().replace("-", "_") + colon
    known = {known.partition(":")[0] + (":" if ":" in known else ""): known for known in NAMES}
    near = [known[wanted]] if wanted in known else [known[k] for k in difflib.get_close_matches(wanted, known)]
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown data set {name!r}; {guess}Known are {', '.join(NAMES)}")


def _check_options(kind: str, root, binarize, seed, size) -> None:
    choices = ("auto", *get_args(Binarization))
    if binarize is not None and binarize not in choices:
        raise ValueError(f"expected binarize to be None or one of {choices}, got {binarize!r}")
    if root is not None and not isinstance(root, str | os.PathLike):
        raise TypeError(f"expected root to be the path of a folder, got {type(root).__name__}")
    if isinstance(seed, bool) or not isinstance(plain(seed), int):
        raise TypeError(f"expected seed to be an integer, got {seed!r}")
    if not is_whole(seed):
        raise ValueError(f"expected seed to be a whole number of less than 2**63, got {seed!r}")
    if size is not None and not (is_whole(size) and 1 <= size <= _LARGEST):
        raise ValueError(f"expected size to be a number of pixels, 1 to {_LARGEST}, got {size!r}")
    if size is not None and kind not in _WITH_SIZE:
        raise ValueError(f"expected size only with celeba and folder:PATH, got size={size} with {kind}; leave it out")


def _gray(kind: str, path: str, root: Path | None, seed: int, size: int | None) -> Data:
    """The data set as its source has it."""
    if root is None:
        match kind:
            case "digits":
                return digits()
            case "folder":
                return folder(_absolute(path), size, seed)
        return array(_absolute(path), seed)
    match kind:
        case "celeba":
            return celeba(root, size or _CELEBA_SIZE)
        case "color_mnist":
            return color_mnist(root, seed)
        case "stacked_mnist":
            return stacked_mnist(root, seed)
    return {"mnist": mnist, "fashion_mnist": fashion_mnist, "cifar10": cifar10, "omniglot": omniglot}[kind](root)


def _binarized(data: Data, how: Binarization, seed: int) -> Data:
    if data.values == "real" or (len(data.event_shape) == 3 and data.event_shape[0] != 1):
        what = "real values" if data.values == "real" else f"colour images {data.event_shape}"
        raise ValueError(
            f"{data.name}: expected gray pixels in [0, 1] to binarise, got {what}; use binarize=None "
            f"with a likelihood for {data.values!r} values"
        )
    generator = torch.Generator().manual_seed(seed)

    def binary(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return x
        pixels = as_float(x)
        return pixels > 0.5 if how == "threshold" else torch.bernoulli(pixels, generator=generator).bool()

    # Training rows last, so that dynamic and static binarisation share their validation and test images.
    validation, test = binary(data.validation), binary(data.test)
    train = data.train if how == "dynamic" else binary(data.train)
    return dataclasses.replace(
        data, train=train, validation=validation, test=test, values="binary", levels=None, binarize=how
    )

"""Images in folders, or in a zip of such folders."""

import io
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pyrogen.data.dataset import Data
from pyrogen.data.limits import check_claim, read_bytes, read_member
from pyrogen.data.splits import hold_out

__all__ = ["IMAGE_SUFFIXES", "folder"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
_SPLIT_OF = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Parts = tuple[str, ...]


def folder(path: Path, size: int | None, seed: int) -> Data:
    """Images in folders, or in a zip of such folders, which is read without being extracted.

    Class folders name the labels (in sorted order); images beside no class folder have none. With a folder
    ``train``, the folders ``train``, ``validation`` (or ``valid``, ``val``) and ``test`` are the splits. Each
    split that is missing is a random tenth of the training images, so without any the images are split
    80/10/10. Hidden files and files that are no images are passed over, and so is a single folder around
    everything. Links are followed, but no folder may be there twice by them.

    Args:
        path: A folder or a zip file.
        size: If given, each image is cropped at its centre to a square and resized to ``size`` pixels.
        seed: The seed of the split.

    Returns:
        The images as ``uint8``, with one channel (gray) or three (colour; transparency is dropped).

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If there are no images, one cannot be read or has more than ``PIL.Image.MAX_IMAGE_PIXELS``, or
            shapes differ; the file is named. If all would take far more memory than their files can stand for, see
            :mod:`pyrogen.data.limits`.
    """
    with _opened(path) as (names, read, held):
        splits = _splits(path, names, seed)
        labels, classes = _labels(path, splits)
        images: dict[str, Tensor] = {}
        shape: tuple[int, ...] | None = None
        for split, members in splits.items():
            images[split] = _decoded(path, [name for name, _ in members], read, held, size, shape)
            shape = tuple(images[split].shape[1:])
    return Data(
        f"folder:{path}",
        train=images["train"],
        validation=images["validation"],
        test=images["test"],
        values="levels",
        levels=256,
        train_labels=labels["train"],
        validation_labels=labels["validation"],
        test_labels=labels["test"],
        classes=classes,
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes], Callable[[list[str]], int]]]:
    """The sorted names of all images at path, relative and with slashes, what reads one, and the bytes of some."""
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in _files(path))
        yield (
            [name for name in names if _is_image(name)],
            lambda name: read_bytes(path / name),
            lambda names: sum({(s.st_dev, s.st_ino): s.st_size for s in (os.stat(path / n) for n in names)}.values()),
        )
    elif not path.exists():
        raise FileNotFoundError(f"expected a folder of images or a zip of one at {path}, found nothing; check the path")
    elif not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(
            f"expected a folder of images or a zip of one, but {path} is neither (or a zip cut short); "
            f"copy the file again or give the folder itself"
        )
    else:
        with zipfile.ZipFile(path) as archive:
            yield (
                sorted(name for name in archive.namelist() if _is_image(name)),
                lambda name: read_member(archive, name),
                lambda names: min(path.stat().st_size, sum(archive.getinfo(name).compress_size for name in names)),
            )


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder, also behind links."""
    seen: dict[str, str] = {}
    for top, _, names in os.walk(path, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            raise ValueError(f"{path}: {top} is the folder {seen[real]} once more, by a link; remove the link")
        seen[real] = top
        yield from (Path(top, name) for name in names)


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)


def _splits(path: Path, names: list[str], seed: int) -> dict[str, list[tuple[str, Parts]]]:
    """Which images are in which split: each as its name and its path within the split."""
    if not names:
        raise ValueError(f"expected images ({', '.join(IMAGE_SUFFIXES)}) in {path}, found none; check the path")
    members = list(zip(names, _unwrapped([PurePosixPath(name).parts for name in names]), strict=True))
    splits: dict[str, list[tuple[str, Parts]]] = {"train": members, "validation": [], "test": []}
    if any(parts[0] == "train" and len(parts) > 1 for _, parts in members):
        splits["train"] = []
        for name, parts in members:
            if parts[0] not in _SPLIT_OF or len(parts) == 1:
                raise ValueError(
                    f"{path}: expected beside the folder train only validation (or valid, val) and test, "
                    f"found {name}; move it into one of them or remove it"
                )
            splits[_SPLIT_OF[parts[0]]].append((name, parts[1:]))
    missing = [split for split, members in splits.items() if not members]
    everything = splits["train"]
    try:
        pieces = hold_out(len(everything), parts=len(missing), seed=seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; add images, or folders train, validation and test") from None
    for split, rows in zip(["train", *missing], pieces, strict=True):
        splits[split] = [everything[i] for i in rows.tolist()]
    return splits


def _unwrapped(paths: list[Parts]) -> list[Parts]:
    """The paths without the folders that wrap everything, as most zips have one."""
    while all(len(parts) > 1 and parts[0] == paths[0][0] != "train" for parts in paths):
        paths = [parts[1:] for parts in paths]
    return paths


def _labels(
    path: Path, splits: dict[str, list[tuple[str, Parts]]]
) -> tuple[dict[str, Tensor | None], tuple[str, ...] | None]:
    """One integer a row for the folder an image lies in, and the folders' names; None without folders."""
    members = [member for split in splits.values() for member in split]
    loose = [name for name, parts in members if len(parts) == 1]
    if len(loose) == len(members):
        return dict.fromkeys(splits), None
    if loose:
        raise ValueError(
            f"{path}: expected all images in class folders or none, but {loose[0]} lies beside the class "
            f"folders; move it into one or remove it"
        )
    classes = tuple(sorted({parts[0] for _, parts in members}))
    number = {name: i for i, name in enumerate(classes)}
    return {split: torch.tensor([number[p[0]] for _, p in rows]) for split, rows in splits.items()}, classes


def _decoded(
    path: Path,
    names: list[str],
    read: Callable[[str], bytes],
    held: Callable[[list[str]], int],
    size: int | None,
    shape: tuple[int, ...] | None,
) -> Tensor:
    """Decode images one at a time into one uint8 tensor (N, C, H, W), all of the given shape if any."""
    rows: Tensor | None = None
    for i, name in enumerate(names):
        try:
            pixels = _pixels(read(name), size)
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}: the image {name} cannot be read ({type(error).__name__}: {error}); replace or remove it"
            ) from error
        shape = shape or pixels.shape
        if pixels.shape != shape:
            mend = "give size=... to crop and resize all" if pixels.shape[0] == shape[0] else "convert or remove it"
            raise ValueError(
                f"{path}: expected all images to have one shape (channels, height, width), but {name} has "
                f"{pixels.shape} and those before it {shape}; {mend}"
            )
        if rows is None:
            rows = _room(path, len(names), held(names), shape)
        rows[i] = torch.from_numpy(pixels)
    assert rows is not None  # no split is empty
    return rows


def _room(path: Path, count: int, held: int, shape: tuple[int, ...]) -> Tensor:
    """Memory for so many images, as far as their files can stand for so much."""
    what = f"{path}: {count} images of shape {shape}"
    mend = "give a smaller size=..., or write them as array:FILE.npz"
    check_claim(count * math.prod(shape), held, what, mend)
    try:
        return torch.empty((count, *shape), dtype=torch.uint8)
    except RuntimeError as error:
        raise ValueError(f"{what} do not fit into memory; give a smaller size=...") from error


def _pixels(content: bytes, size: int | None) -> np.ndarray:
    """One image file as uint8 (C, H, W), with one channel or three."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(content))
    with opened:
        image = ImageOps.exif_transpose(opened)  # photographs say in a tag which way is up
        if image.mode in ("1", "LA"):
            image = image.convert("L")
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA").convert("RGB")
        elif image.mode in ("RGBA", "RGBX", "CMYK", "YCbCr"):
            image = image.convert("RGB")
        elif image.mode not in ("L", "RGB"):
            raise ValueError(f"expected 8-bit gray or colour, got mode {image.mode}")
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

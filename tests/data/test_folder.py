import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyrogen.data import load


def picture(path, value, size=(6, 5), mode="RGB"):
    """A flat image; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def zipped(folder, path, wrap=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, wrap + file.relative_to(folder).as_posix())
    return path


def same(a, b):
    return all(torch.equal(getattr(a, split), getattr(b, split)) for split in ("train", "validation", "test"))


@pytest.fixture
def classes(tmp_path):
    """Ten cats of colour (0..9, 10, 0) and ten dogs of colour (0..9, 20, 0)."""
    folder = tmp_path / "pets"
    for i in range(10):
        picture(folder / "cat" / f"{i}.png", (i, 10, 0))
        picture(folder / "dog" / f"{i}.PNG", (i, 20, 0))
    return folder


def test_class_folders_without_splits_are_split_at_random(classes):
    data: Any = load(f"folder:{classes}")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [16, 2, 2]
    assert (data.values, data.levels, data.event_shape) == ("levels", 256, (3, 5, 6))
    assert data.train.dtype == torch.uint8 and data.classes == ("cat", "dog")
    rows = torch.cat([data.train, data.validation, data.test])
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    assert torch.equal(rows[:, 1, 0, 0].long(), 10 + 10 * labels), "each image has its class"
    assert len(rows[:, :, 0, 0].unique(dim=0)) == 20, "each image is there once"
    assert same(data, load(f"folder:{classes}"))
    assert not same(data, load(f"folder:{classes}", seed=1))
    assert same(data, load(**data.source))


@pytest.mark.parametrize("wrap", ["", "pets/", "a/b/"])
def test_a_zip_is_read_as_the_folder_is(classes, tmp_path, wrap):
    path = zipped(classes, tmp_path / "pets.zip", wrap)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(wrap + "__MACOSX/cat/._1.png", b"resource fork")
        archive.writestr(wrap + "cat/.hidden.png", b"hidden")
        archive.writestr(wrap + "README.txt", b"about")
    data = load(f"folder:{path}")
    assert same(data, load(f"folder:{classes}")) and data.classes == ("cat", "dog")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets", "pets.zip"], "nothing is extracted"


@pytest.mark.parametrize("validation", ["validation", "valid", "val"])
def test_folders_named_as_splits_are_the_splits(tmp_path, validation):
    for split, n in (("train", 4), (validation, 2), ("test", 3)):
        for i in range(n):
            picture(tmp_path / split / "one" / f"{i}.png", 10 * n + i, mode="L")
    picture(tmp_path / "test" / "zero" / "0.png", 99, mode="L")
    data: Any = load(f"folder:{tmp_path}")
    assert data.event_shape == (1, 5, 6)
    assert data.train[:, 0, 0, 0].tolist() == [40, 41, 42, 43]
    assert data.validation[:, 0, 0, 0].tolist() == [20, 21]
    assert data.test[:, 0, 0, 0].tolist() == [30, 31, 32, 99]
    assert data.test_labels.tolist() == [0, 0, 0, 1], "labels count the classes of all splits"


def test_a_missing_split_is_a_tenth_of_train(tmp_path):
    for i in range(20):
        picture(tmp_path / "train" / "a" / f"{i:02d}.png", i, mode="L")
    picture(tmp_path / "test" / "a" / "0.png", 200, mode="L")
    data = load(f"folder:{tmp_path}")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [18, 2, 1]
    assert data.test[0, 0, 0, 0] == 200
    rows = torch.cat([data.train, data.validation])[:, 0, 0, 0]
    assert sorted(rows.tolist()) == list(range(20))


def test_images_in_no_class_folder_have_no_labels(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.bmp", i, mode="L")
    data = load(f"folder:{tmp_path}", binarize="threshold")
    assert data.train_labels is None and data.classes is None
    assert data.train.dtype == torch.bool and len(data.train) == 3


def test_size_crops_the_centre_and_resizes(tmp_path):
    for i in range(3):
        wide = Image.new("RGB", (40, 20), (0, 0, 0))
        wide.paste((255, 255, 255), (10, 0, 30, 20))
        wide.save(tmp_path / f"wide{i}.png")
        picture(tmp_path / f"large{i}.png", (255, 255, 255), size=(64, 64))
    data = load(f"folder:{tmp_path}", size=8)
    rows = torch.cat([data.train, data.validation, data.test])
    assert data.event_shape == (3, 8, 8) and torch.all(rows == 255)
    assert data.source["size"] == 8 and same(data, load(**data.source))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, [255]),
        ("L", 77, [77]),
        ("LA", (77, 9), [77]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 128), [1, 2, 3]),
    ],
)
def test_gray_and_colour_of_every_kind(tmp_path, mode, value, expected):
    for i in range(3):
        picture(tmp_path / f"{i}.png", value, mode=mode)
    assert load(f"folder:{tmp_path}").train[0, :, 0, 0].tolist() == expected


def test_a_palette_with_transparency_is_read_as_colour(tmp_path):
    for i in range(3):
        image = Image.new("P", (6, 5), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(tmp_path / f"{i}.png", transparency=bytes([0, 100]))
    assert load(f"folder:{tmp_path}").train[0, :, 0, 0].tolist() == [10, 20, 30]


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    for i in range(3):
        image = Image.new("L", (8, 4), 0)
        image.paste(255, (0, 0, 4, 4))  # the left half is white
        image.save(tmp_path / f"{i}.png", exif=exif)
    data = load(f"folder:{tmp_path}")
    assert data.event_shape == (1, 8, 4)
    assert torch.all(data.train[:, :, :4] == 255) and torch.all(data.train[:, :, 4:] == 0)


def refuse(path, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        load(f"folder:{path}", **options)


def test_an_image_of_another_shape_is_named(classes):
    picture(classes / "dog" / "odd.png", (0, 0, 0), size=(7, 7))
    refuse(classes, r"one shape .*but (dog/odd\.png has \(3, 7, 7\)|.* has \(3, 5, 6\)).*give size=")


def test_a_gray_image_among_colours_is_named(classes):
    picture(classes / "cat" / "a.png", 3, mode="L")
    refuse(classes, r"but cat/a\.png has \(1, 5, 6\) and those before it \(3, 5, 6\); convert or remove it")


def test_an_odd_image_in_another_split_is_named(tmp_path):
    for split in ("train", "val", "test"):
        picture(tmp_path / split / "0.png", 0, mode="L", size=(9, 9) if split == "test" else (6, 5))
    refuse(tmp_path, r"but test/0\.png has \(1, 9, 9\)")


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_corrupt_image_is_named(classes, tmp_path, content, as_zip):
    file = classes / "cat" / "3.png"
    noise = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    path = zipped(classes, tmp_path / "pets.zip") if as_zip else classes
    refuse(path, r"the image cat/3\.png cannot be read .*replace or remove it", size=5)


def test_a_damaged_member_of_a_zip_is_named(classes, tmp_path):
    path = zipped(classes, tmp_path / "pets.zip")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("dog/2.PNG").header_offset
    content = bytearray(path.read_bytes())
    content[start + 60] ^= 0xFF
    path.write_bytes(bytes(content))
    refuse(path, r"the image dog/2\.PNG cannot be read \(BadZipFile: Bad CRC")


def test_sixteen_bits_are_refused(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((5, 6), 1000, np.uint16)).save(tmp_path / f"{i}.png")
    refuse(tmp_path, r"\.png cannot be read .*expected 8-bit gray or colour, got mode I")


def test_a_zip_cut_short_is_refused(classes, tmp_path):
    path = zipped(classes, tmp_path / "pets.zip")
    path.write_bytes(path.read_bytes()[:-50])
    refuse(path, r"pets\.zip is neither .*copy the file again")


def test_nothing_there(tmp_path):
    refuse(
        tmp_path / "none",
        "expected a folder of images or a zip.*found nothing; check the path",
        FileNotFoundError,
    )


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    refuse(tmp_path, r"expected images \(\.png, \.jpg.* found none")


def test_too_few_images(tmp_path):
    picture(tmp_path / "0.png", 0, mode="L")
    picture(tmp_path / "1.png", 0, mode="L")
    refuse(tmp_path, "at least 3 rows to split, got 2; add images")


def test_a_stray_image_beside_class_folders_is_named(classes):
    picture(classes / "stray.png", (0, 0, 0))
    refuse(classes, r"stray\.png lies beside the class folders")


@pytest.mark.parametrize("extra", ["extras/0.png", "0.png"])
def test_a_stray_image_beside_splits_is_named(tmp_path, extra):
    for i in range(5):
        picture(tmp_path / "train" / f"{i}.png", 0, mode="L")
    picture(tmp_path / extra, 0, mode="L")
    refuse(tmp_path, f"beside the folder train only validation .*found {extra}; move it")


def test_colour_is_not_binarised(classes):
    refuse(classes, r"got colour images \(3, 5, 6\)", binarize="static")

"""No path in a run or an archive leads out of its folder, unless the user says so."""

import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import pyrogen as pg
from pyrogen.cli import main

FEW = ("--parts", "likelihood", "--particles", "2", "--rows", "5")
COMMANDS = pytest.mark.parametrize("command", ["evaluate", "report"])


@pytest.fixture
def secret(tmp_path) -> Path:
    """Data of the user's own, which a stranger's run may not lead to."""
    np.savez(tmp_path / "secret.npz", train=np.random.default_rng(0).random((40, 1, 8, 8)) > 0.5)
    return tmp_path / "secret.npz"


def few(command: str) -> tuple[str, ...]:
    return FEW if command == "evaluate" else (*FEW[2:], "--out", "new")


@COMMANDS
@pytest.mark.parametrize("path", ["{0}/secret.npz", "secret.npz", "run/../secret.npz", "~/../{0}/secret.npz"])
def test_data_of_a_run_lie_in_its_folder(command, path, run, secret, forge, refused):
    name = f"array:{path.format(secret.parent)}"
    forge(run, lambda settings: settings.update(data={"name": name, "binarize": None}))
    message = refused(command, run, *few(command))
    assert "outside of that folder" in message and f"--data {name}" in message and "--trust" in message


def test_data_that_are_named_or_trusted_are_read(run, secret, forge, capsys):
    forge(run, lambda settings: settings.update(data={"name": f"array:{secret}", "binarize": None}))
    assert main(["evaluate", str(run), *FEW, "--data", f"array:{secret}"]) == 0
    assert main(["evaluate", str(run), *FEW, "--trust"]) == 0
    shutil.copy(secret, run / "own.npz")
    forge(run, lambda settings: settings.update(data={"name": f"array:{run}/own.npz", "binarize": None}))
    assert main(["evaluate", str(run), *FEW]) == 0


@COMMANDS
@pytest.mark.parametrize("name", ["folder:/", "folder:{0}", "mnist"])
def test_folders_of_a_run(command, name, run, forge, refused, tmp_path):
    """A root is where a data set would be downloaded to."""
    source = {"name": name.format(tmp_path), "root": str(tmp_path / "root") if name == "mnist" else None}
    forge(run, lambda settings: settings.update(data=source))
    message = refused(command, run, *few(command))
    flag = f"--root {tmp_path / 'root'}" if name == "mnist" else f"--data {source['name']}"
    assert "outside of that folder" in message and flag in message
    assert not (tmp_path / "root").exists()


def test_a_root_that_is_the_users_own(run, forge, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PYROGEN_DATA", str(tmp_path / "sets"))
    (tmp_path / "sets" / "MNIST" / "raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "sets" / "MNIST" / "raw" / f"{name}-ubyte").write_bytes(b"damaged")
    for root, flags in ((tmp_path / "sets", ()), (tmp_path / "other", ("--root", tmp_path / "sets"))):
        forge(run, lambda settings, root=root: settings.update(data={"name": "mnist", "root": str(root)}))
        assert "mnist: the files under" in refused("evaluate", run, *FEW, *flags)


@pytest.mark.parametrize(
    "data", ["digits", 3, [1], {"root": "/"}, {"name": 3}, {"name": "array:"}, {"name": "x", "y": 1}]
)
def test_settings_of_data_that_are_none(data, run, forge, refused):
    forge(run, lambda settings: settings.update(data=data))
    refused("evaluate", run, *FEW)


@pytest.mark.parametrize("name", ["weights.safetensors", "run.yaml", "history.csv", "evaluation.yaml", "deep/figures"])
def test_links_do_not_lead_out_of_a_run(name, run, refused, tmp_path, capsys):
    place, target = run / name, tmp_path / "elsewhere"
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(target)
    else:
        target.mkdir()
    place.symlink_to(target)
    for arguments in (["evaluate", run, *FEW], ["sample", run], ["report", run, "--out", "new"]):
        message = refused(*arguments)
        assert f"{place} is a link that leads out of" in message and "--trust" in message
    with pytest.raises(ValueError, match="leads out of"):
        pg.load(run)
    assert main(["sample", str(run), "--trust"]) == 0


def test_links_within_a_run_and_to_it(run, tmp_path):
    (run / "weights.safetensors").rename(run / "kept")
    (run / "weights.safetensors").symlink_to("kept")
    (tmp_path / "short").symlink_to(run)
    pg.load(run), pg.load(tmp_path / "short")


def test_fits_of_a_comparison_are_in_its_folder(run, refused, tmp_path):
    """As one would be that is the user's own run, in which figures would then be noted."""
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    (comparison / "compare.yaml").write_text("data: digits\n")
    (comparison / "fit").symlink_to(run)
    before = sorted(path.name for path in run.iterdir())
    message = refused("report", comparison, "--rows", "5")
    assert "is a link that leads out of" in message and "--trust" in message
    assert sorted(path.name for path in run.iterdir()) == before


def test_what_is_resumed_has_no_links_out_of_it(run, refused, tmp_path):
    (tmp_path / "logs").mkdir()
    (run / "logs").rename(tmp_path / "old")
    (run / "logs").symlink_to(tmp_path / "logs")
    assert "leads out of" in refused("fit", "--out", run, "--resume", "--steps", "2")
    assert not [*(tmp_path / "logs").iterdir()]


NAMES = ("../{0}.png", "/tmp/pyrogen-{0}.png", "..\\{0}.png", "a/../../{0}.png", "C:\\{0}.png", "{0}\x1b[2J.png")


@pytest.mark.parametrize("pattern", NAMES, ids=ascii)
def test_names_in_a_zip_lead_nowhere(pattern, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(5):
            archive.writestr(pattern.format(number), content)
    before = sorted(path.name for path in tmp_path.iterdir())
    try:
        data = pg.data.load(f"folder:{tmp_path}/images.zip")
    except ValueError as error:
        assert ".." in pattern and "found none" in str(error)  # as what is hidden, it is passed over
    else:
        assert data.event_shape == (1, 4, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == before and not Path("/tmp/pyrogen-0.png").exists()


def test_a_link_in_a_zip_is_no_image(refused, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(5):
            info = zipfile.ZipInfo(f"{number}.png")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/hostname")
    assert "the image 0.png cannot be read" in refused("fit", "--data", "folder:images.zip", "--out", "out")


@pytest.mark.parametrize("place", [".", "b"])
def test_links_of_images_go_round_in_no_circle(place, refused, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / "a" / "more").symlink_to(tmp_path / "images" / place)
    message = refused("fit", "--data", "folder:images", "--out", "out")
    assert "once more, by a link; remove the link" in message


@pytest.mark.parametrize(
    "name",
    ["run/run.yaml", "run/weights.safetensors", "run/history.csv", "run/evaluation.yaml", "x.npz", "i/0.png", "c.yaml"],
)
def test_pipes_are_not_waited_for(name, run, refused, tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    command = {
        "x.npz": ("fit", "--data", "array:x.npz"),
        "0.png": ("fit", "--data", "folder:i"),
        "c.yaml": ("fit", "--config", "c.yaml"),
    }.get(Path(name).name, ("report", "run", "--out", "new"))
    refused(*command)


def test_a_configuration_names_data_as_the_user_does(secret, capsys):
    """What a settings file asks to be read is read, and stays where it is."""
    Path("settings.yaml").write_text(yaml.safe_dump({"data": f"array:{secret}", "steps": 1, "latent": 2}))
    assert main(["fit", "--config", "settings.yaml", "--out", "out", "--progress", "false"]) == 0

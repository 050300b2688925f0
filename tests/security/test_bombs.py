"""Files that claim more memory than there is are refused, each with one line, before it is taken."""

import contextlib
import copy
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as header
from PIL import Image

import pyrogen as pg
from pyrogen.data import limits
from pyrogen.inference.allowance import Allowance

ALLOWED = 800e6
"""Bytes by which a refusal may raise the peak of memory: 512 MiB of tensors, and what is around them."""
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory can only be limited on Linux")

ARRAYS: dict[str, Callable[[Path], None]] = {}
IMAGES: dict[str, Callable[[Path], None]] = {}


def among(table: dict[str, Callable[[Path], None]]) -> Callable:
    return lambda make: table.setdefault(make.__name__.replace("_", " "), make)


def npy(shape: tuple[int, ...], dtype: str = "|u1", content: bytes = bytes(100)) -> bytes:
    """An array whose header says what it likes."""
    file = io.BytesIO()
    header.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def zipped(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)


def claiming(path: Path, size: int) -> None:
    """Let a zip's directory, and the head of its first member, say that this has so many bytes."""
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", content, content.index(signature) + place, size)
    path.write_bytes(content)


def zeros(path: Path, name: str, count: int, head: bytes = b"") -> None:
    """A zip of so many zeros, a thousandth as long."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive, archive.open(name, "w") as file:
        file.write(head)
        for _ in range(count // 2**20):
            file.write(bytes(2**20))


def endless(path: Path) -> None:
    """A terabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(2**40)


@among(ARRAYS)
def header_of_terabytes(path: Path) -> None:
    zipped(path, "train.npy", npy((10**6, 10**6)))


@among(ARRAYS)
def header_of_terabytes_of_labels(path: Path) -> None:
    np.savez(path, train=np.zeros((10, 2), np.uint8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_labels.npy", npy((10**12,)))


@among(ARRAYS)
def header_that_overflows(path: Path) -> None:
    zipped(path, "train.npy", npy((2**40, 2**40)))


@among(ARRAYS)
def header_with_a_huge_value(path: Path) -> None:
    zipped(path, "train.npy", npy((3,), "|V2000000000"))


@among(ARRAYS)
def header_that_is_negative(path: Path) -> None:
    zipped(path, "train.npy", npy((-5, -(2**40))))


@among(ARRAYS)
def header_of_many_dimensions(path: Path) -> None:
    zipped(path, "train.npy", npy((1,) * 2000))


@among(ARRAYS)
def inflated_zeros(path: Path) -> None:
    count = limits.FREE // 2**20 + 8
    zeros(path, "train.npy", count * 2**20, npy((count, 2**20), content=b""))


@among(ARRAYS)
def inflated_zeros_of_an_unknown_name(path: Path) -> None:
    zeros(path, "other.npy", limits.FREE + 2**23)


@among(ARRAYS)
def directory_that_lies(path: Path) -> None:
    zipped(path, "train.npy", npy((4 * 10**9, 1)), zipfile.ZIP_DEFLATED)
    claiming(path, 4 * 10**9)


@among(ARRAYS)
def packed_by_bzip2(path: Path) -> None:
    zipped(path, "train.npy", npy((10**4, 10**4), content=bytes(10**8)), zipfile.ZIP_BZIP2)


@among(ARRAYS)
def packed_by_lzma(path: Path) -> None:
    zipped(path, "train.npy", npy((10**4, 10**3), content=bytes(10**7)), zipfile.ZIP_LZMA)


@among(ARRAYS)
def single_array(path: Path) -> None:
    path.write_bytes(npy((10**6, 10**6)))


@among(ARRAYS)
def pickled_objects(path: Path) -> None:
    zipped(path, "train.npy", npy((10**9,), "|O"))


among(ARRAYS)(endless)


def png(width: int, height: int) -> bytes:
    """A picture whose head says how large it is, and which then has next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = {b"IHDR": head, b"IDAT": zlib.compress(bytes(100)), b"IEND": b""}
    chunks = (
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@among(IMAGES)
def picture_of_gigapixels(path: Path) -> None:
    for number in range(3):
        (path / f"{number}.png").write_bytes(png(60_000, 60_000))


@among(IMAGES)
def picture_of_so_many_pixels_that_pillow_warns(path: Path) -> None:
    for number in range(3):
        (path / f"{number}.png").write_bytes(png(12_000, 12_000))


@among(IMAGES)
def one_large_and_many_small(path: Path) -> None:
    Image.new("L", (8000, 8000)).save(path / "0.png")
    for number in range(1, 100):
        Image.new("L", (2, 2)).save(path / f"{number}.png")


@among(IMAGES)
def many_flat(path: Path) -> None:
    Image.new("L", (2000, 2000)).save(path / "0.png")
    for number in range(1, 100):
        os.link(path / "0.png", path / f"{number}.png")


@among(IMAGES)
def one_file_under_many_names(path: Path) -> None:
    """Noise, of which every name counts as another image, and the file once."""
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)
    Image.fromarray(noise).save(path / "0.png")
    for number in range(1, 1000):
        os.link(path / "0.png", path / f"{number}.png")


@among(IMAGES)
def zip_of_members_that_overlap(path: Path) -> None:
    """All entries of the directory but the first lead to its place."""
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    with zipfile.ZipFile(path / "images.zip", "w") as archive:
        archive.writestr("0000.png", file.getvalue())
        first = archive.getinfo("0000.png")
        for number in range(1, 1000):
            other = copy.copy(first)
            other.filename = f"{number:04}.png"
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other


@among(IMAGES)
def long_picture(path: Path) -> None:
    for number in range(3):
        endless(path / f"{number}.png")


def more(path: Path) -> None:
    """Put some honest images into a zip."""
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(1, 10):
            file = io.BytesIO()
            Image.new("L", (4, 4)).save(file, "png")
            archive.writestr(f"{number}.png", file.getvalue())


@among(IMAGES)
def zip_of_zeros(path: Path) -> None:
    zeros(path / "images.zip", "0.bmp", limits.FREE + 2**23)
    more(path / "images.zip")


@among(IMAGES)
def zip_that_lies(path: Path) -> None:
    zipped(path / "images.zip", "0.png", bytes(1000), zipfile.ZIP_DEFLATED)
    more(path / "images.zip")
    claiming(path / "images.zip", 4 * 10**9)


@among(IMAGES)
def zip_by_bzip2(path: Path) -> None:
    zipped(path / "images.zip", "0.bmp", bytes(10**8), zipfile.ZIP_BZIP2)
    more(path / "images.zip")


TEXTS = {
    "tower of aliases": "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]),
    "tower of merges": "\n".join(
        ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))]
    ),
    "tower of text": f"a: [&a {'x' * 100_000}{', *a' * 10_000}]",
    "circle": "a: &a [*a]",
    "depth": "[" * 100_000,
    "many values": f"a: [{'1,' * limits.NODES}1]",
    "long text": f"# {'x' * limits.TEXT}",
    "long number": f"a: {'9' * 10_000}",
}


def part(*path: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Put values into the settings of a run, at a place."""

    def change(settings: dict[str, Any]) -> None:
        place = settings
        for name in path:
            place = place[name]
        place.update(values)

    return change


def named(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


LIKELIHOOD = ("model", "init_args", "likelihood", "init_args")
DECODER = (*LIKELIHOOD, "decoder", "init_args")
RUNS = {
    "wide layer": part(*DECODER, hidden=[10**9]),
    "two wide layers": part(*DECODER, hidden=[30_000, 30_000]),
    "many layers": part(*DECODER, hidden=[4] * 50_000),
    "large output": part(*DECODER, outputs=[10**6, 10**6]),
    "overflow": part(*DECODER, outputs=[2**40, 2**40]),
    "many latents": part("model", "init_args", "prior", "init_args", features=10**11),
    "features": part("guide", "init_args", "encoder", "init_args", outputs=10**10),
    "masks": part("model", "init_args", prior=named("pyrogen.distributions.Flow", features=10**5)),
    "components": part(
        "model", "init_args", prior=named("pyrogen.distributions.Mixture", features=2, components=10**9)
    ),
    "transforms": part("model", "init_args", prior=named("pyrogen.distributions.Flow", features=2, layers=10**9)),
    "embedding": part(*LIKELIHOOD, decoder=named("torch.nn.Embedding", num_embeddings=10**12, embedding_dim=4)),
    "copies without weights": part(
        *LIKELIHOOD,
        decoder=named("torch.nn.TransformerEncoder", encoder_layer=named("torch.nn.Identity"), num_layers=10**9),
    ),
    "copies": part(
        *LIKELIHOOD,
        decoder=named(
            "torch.nn.TransformerEncoder",
            encoder_layer=named("torch.nn.TransformerEncoderLayer", d_model=1, nhead=1, dim_feedforward=1),
            num_layers=10**9,
        ),
    ),
    "example": part(example=[{"shape": [10**6, 10**6], "dtype": "float32"}]),
    "example of bytes": part(example=[{"shape": [2**31], "dtype": "uint8"}]),
}


def safetensors(length: int = 0, **tensors: tuple[list[int], list[int]]) -> bytes:
    """A file whose head may have another length, and tensors any shapes and places."""
    head = {name: {"dtype": "F32", "shape": shape, "data_offsets": at} for name, (shape, at) in tensors.items()}
    text = json.dumps(head).encode()
    return struct.pack("<Q", length or len(text)) + text + bytes(100)


TENSORS = {
    "long head": safetensors(2**40),
    "large tensor": safetensors(a=([10**6, 10**6], [0, 4 * 10**12])),
    "tensor larger than its place": safetensors(a=([10**9], [0, 100])),
    "tensor that overflows": safetensors(a=([2**33, 2**33], [0, 100])),
}
SETTINGS, IN_RUNS, IN_COMPARISONS = "settings.yaml", ("run.yaml", "evaluation.yaml"), "compare.yaml"
SLOW = {(file, "many values") for file in (*IN_RUNS, IN_COMPARISONS)}
"""To parse so many takes seconds, so one file has to do."""
ENDLESS = ("history.csv", "run.yaml", "evaluation.yaml", "table.csv")
NAMES = [
    *(f"array: {name}" for name in ARRAYS),
    *(f"images: {name}" for name in IMAGES),
    "idx",
    *(f"{file}: {name}" for name in TEXTS for file in (SETTINGS, *IN_RUNS, IN_COMPARISONS) if (file, name) not in SLOW),
    *(f"run: {name}" for name in RUNS),
    *(f"weights: {name}" for name in TENSORS),
    *(f"endless: {name}" for name in ENDLESS),
]


def arguments(name: str, home: Path, fitted: Path, forge: Callable) -> list[str]:
    """Make a hostile sample, and say by which command it is read."""
    kind, _, what = name.partition(": ")
    fit, report = ["fit", "--out", str(home / "out"), "--progress", "false"], ["report", "--out", str(home / "new")]
    if kind == "array":
        ARRAYS[what](home / "x.npz")
        return [*fit, "--data", f"array:{home}/x.npz"]
    if kind == "images":
        IMAGES[what](home)
        return [*fit, "--data", f"folder:{home / 'images.zip' if 'zip' in what else home}"]
    if kind == "idx":
        (home / "MNIST" / "raw").mkdir(parents=True)
        for each in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            endless(home / "MNIST" / "raw" / f"{each}-ubyte")
        return [*fit, "--data", "mnist", "--root", str(home)]
    if kind == SETTINGS:
        (home / kind).write_text(TEXTS[what])
        return [*fit, "--config", str(home / kind)]
    run = Path(shutil.copytree(fitted, home / "comparison" / "fit"))
    comparison = run.parent
    (comparison / "compare.yaml").write_text("data: digits\n")
    (comparison / "table.csv").write_text("guide,observations,particles,log_likelihood\nfit,1,1,-1.0\n")
    if kind == IN_COMPARISONS:
        (comparison / kind).write_text(TEXTS[what])
        return [*report, str(comparison)]
    if kind == "endless":
        endless(comparison / what if what == "table.csv" else run / what)
        return [*report, str(comparison)]
    if kind == "weights":
        (run / "weights.safetensors").write_bytes(TENSORS[what])
    elif kind == "run.yaml":
        forge(run, TEXTS[what])
    elif kind == "run":
        forge(run, RUNS[what])
    else:
        (run / kind).write_text(TEXTS[what])
    return [*report, str(run)]


@pytest.fixture(scope="module")
def answers(fitted, forge, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What became of every command, all given in one process that has a gigabyte left."""
    home = tmp_path_factory.mktemp("bombs")
    commands = {}
    for number, name in enumerate(NAMES):
        (home / str(number)).mkdir()
        commands[name] = arguments(name, home / str(number), fitted, forge)
    warm = ["evaluate", str(fitted), "--parts", "likelihood", "--rows", "5", "--particles", "2"]
    (home / "task.json").write_text(json.dumps({"commands": commands, "warm": warm}))
    script = [sys.executable, Path(__file__).with_name("bounded.py"), home / "task.json", home / "answers.json"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads((home / "answers.json").read_text())


@LINUX
@pytest.mark.parametrize("name", NAMES)
def test_bombs_are_refused_by_one_line(name, answers):
    answer = answers[name]
    assert answer["code"] == 2, answer
    assert answer["said"].startswith("pyrogen: error: ") and answer["said"].count("\n") == 1, answer
    assert "MemoryError" not in answer["said"] and len(answer["said"]) < 2000
    assert answer["taken"] < ALLOWED, answer


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_honest_arrays_of_any_size_are_read(save, tmp_path, monkeypatch):
    """Far above what a file may claim in any case, which is lowered here: noise is as long as its file."""
    monkeypatch.setattr(limits, "FREE", 1000)
    x = np.random.default_rng(0).integers(0, 256, (3000, 1, 8, 8), dtype=np.uint8)
    save(tmp_path / "x.npz", train=x, test=np.eye(300, 64, dtype=np.uint8).reshape(300, 1, 8, 8))
    data = pg.data.load(f"array:{tmp_path}/x.npz")
    assert len(data.train) + len(data.validation) == 3000 and len(data.test) == 300


def test_honest_images_of_any_number_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE", 4000)
    rng = np.random.default_rng(0)
    for number in range(50):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    assert len(pg.data.load(f"folder:{tmp_path}").train) == 40


def test_what_a_file_claims_is_bounded_by_what_it_holds():
    limits.check_claim(limits.FREE, 0, "an array", "stop")
    limits.check_claim(limits.RATIO * limits.FREE, limits.FREE, "an array", "stop")
    with pytest.raises(ValueError, match=r"an array would take 53\.7 GB, more than 200 times the 268 MB"):
        limits.check_claim(limits.RATIO * limits.FREE + 1, limits.FREE, "an array", "stop")


def test_trusted_runs_may_take_more(fitted, forge, tmp_path):
    run = Path(shutil.copytree(fitted, tmp_path / "run"))
    forge(run, part("guide", "init_args", "encoder", "init_args", hidden=[4, 400_000, 400]))
    with pytest.raises(ValueError, match=r"takes over 5.. MB, far more than its weights"):
        pg.load(run)
    with pytest.raises(ValueError, match="belongs to another model"):
        pg.load(run, trust=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(10**5, 10**5),
        lambda: torch.arange(0.0, 1.0, 1e-12),
        lambda: torch.randperm(10**12, generator=torch.Generator()),
        lambda: torch.ones(10**5)[:, None] * torch.ones(10**5),
        lambda: torch.ones(10**5, 1) @ torch.ones(1, 10**5),
        lambda: torch.ones(1).repeat(10**12),
        lambda: torch.ones(1).expand(10**12).clone(),
        lambda: torch.ones(10, 10).tile(10**5, 10**5),
        lambda: torch.nn.functional.pad(torch.ones(1), (0, 10**12)),
        lambda: torch.nn.functional.one_hot(torch.tensor([0]), 10**12),
        lambda: [torch.zeros(10**6) for _ in range(10**6)],
        lambda: [torch.nn.Parameter(torch.zeros(())) for _ in range(10**9)],
        lambda: torch.nn.Linear(10**5, 10**5),
    ],
)
def test_allowances_hold(make):
    with pytest.raises(ValueError, match="it takes over 100 MB"), Allowance(10**8, "it"):
        make()


@pytest.mark.parametrize("excessive", [lambda: torch.zeros(10**9), lambda: [copy.copy(each) for each in [1] * 10**6]])
def test_what_catches_a_refusal_is_refused_all_the_same(excessive):
    with pytest.raises(ValueError, match="it takes over"), Allowance(10**8, "it"), contextlib.suppress(ValueError):
        excessive()
    allowance, after = Allowance(10**8, "it"), []
    with pytest.raises(ValueError, match="it takes over"), allowance:
        with contextlib.suppress(ValueError):
            excessive()
        after.append(torch.zeros(1))
    assert not after


def test_allowances_are_of_what_is_there_at_a_time():
    allowance = Allowance(10**8, "it")
    with allowance:
        kept = torch.zeros(10**7)
        for _ in range(50):
            x = torch.ones(5 * 10**6)
            assert (x.view(10, -1).t() + 1).sum() == 10**7
        other = kept[1:]
    with pytest.raises(ValueError, match="it takes over"), allowance:
        torch.zeros(2 * 10**7)
    del kept, other, x
    with allowance:
        assert torch.zeros(2 * 10**7).sum() == 0

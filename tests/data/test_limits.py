"""What is read of a file, and what of it is refused; whole hostile files stand in tests/security."""

import os
import zipfile

import pytest

from pyrogen.data import limits
from pyrogen.data.limits import check_claim, parse_table, parse_yaml, read_bytes, read_member, read_text, size_in_words


def test_sizes_in_words():
    assert [size_in_words(count) for count in (999, 1e6, 2.5e14, 2e15)] == [
        "999 bytes",
        "1 MB",
        "250 TB",
        "over 1000 TB",
    ]


def test_a_claim_is_measured_by_the_file():
    check_claim(limits.FREE, 1, "they", "do")
    check_claim(1000 * limits.FREE, 5 * limits.FREE, "they", "do")
    with pytest.raises(ValueError, match=r"^they would take 268 MB, more than 200 times the 1 bytes .*, do$"):
        check_claim(limits.FREE + 1, 1, "they", "do")


def test_only_ordinary_files_of_bounded_length_are_read(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345" and read_text(path) == "12345"
    with pytest.raises(ValueError, match="is longer than 4 bytes"):
        read_bytes(path, 4)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="damaged"):
        read_text(path)
    with pytest.raises(ValueError, match="no ordinary file"):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no ordinary file"):
        read_bytes(tmp_path / "pipe")


def test_members_of_an_archive(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small", "1234")
        archive.writestr("odd", "1234", zipfile.ZIP_BZIP2)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert read_member(archive, "small") == b"1234"
        with pytest.raises(ValueError, match="odd is packed by another method than store or deflate"):
            read_member(archive, "odd")
        monkeypatch.setattr(limits, "FREE", 3)
        with pytest.raises(ValueError, match="small is 4 bytes long, and at most 3 bytes are read"):
            read_member(archive, "small")


def test_tables(monkeypatch):
    assert parse_table('a,b\n"1\n",2\n\n').read() == 'a,b\n"1\n",2\n\n'
    assert parse_table("").read() == ""
    with pytest.raises(ValueError, match="lines are not of 2 cells each"):
        parse_table("a,b\n1\n")
    with pytest.raises(ValueError, match="field larger than field limit"):
        parse_table("a\n" + "1" * 200_000)
    monkeypatch.setattr(limits, "TABLE", 10)
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        parse_table("a" * 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected the node content"),
        ("a: b: c", "mapping values are not allowed"),
        ("[" * 5000, "recursion"),
        ("!!bool foo", "foo"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("a: &a [*a, *a]", "more than"),
        ("- 1\n" * 300, "more than 200 values"),
        ("[&a [1, 1, 1, 1, 1, 1, 1, 1, 1], " + "*a, " * 30 + "]", "more than 200 values"),
        (" " * 4000, "longer than 3 kB"),
    ],
)
def test_what_is_no_plain_yaml(text, message, monkeypatch):
    if "[[" not in text:
        monkeypatch.setattr(limits, "NODES", 200)
        monkeypatch.setattr(limits, "TEXT", 3000)
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_plain_yaml():
    assert parse_yaml("") is None
    assert parse_yaml("a: [1, 1e3, 1:30, yes, 2020-01-01]")["a"][:2] == [1, "1e3"]
    assert parse_yaml("a: &b {c: 1}\nd: *b") == {"a": {"c": 1}, "d": {"c": 1}}


def test_keys_stand_once_but_for_what_is_merged():
    assert parse_yaml("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n  z: 3")["c"] == {"x": 1, "y": 2, "z": 3}
    with pytest.raises(ValueError, match="line 3: 'x' is there twice"):
        parse_yaml("a:\n  x: 1\n  x: 2")

"""How much a file may claim: what comes from disk is measured before memory is taken for it.

A few bytes can declare terabytes: in an archive's directory, an array's header, an image's size, aliases of YAML. What
is declared may be :data:`RATIO` times what the file holds, and :data:`FREE` bytes in any case; text is read up to a
length. Data that are stored as they are can be of any size.
"""

import csv
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import yaml

__all__ = [
    "FREE",
    "NODES",
    "RATIO",
    "TABLE",
    "TEXT",
    "check_claim",
    "check_links",
    "check_member",
    "parse_table",
    "parse_yaml",
    "read_bytes",
    "read_member",
    "read_text",
    "read_yaml",
    "size_in_words",
]

FREE = 2**28
"""Bytes that every file may claim, 256 MiB."""
RATIO = 200
"""How many times what it holds a file may claim. Honest data stay below, and what is made to exhaust memory above."""
TEXT = 2**22
TABLE = 2**26
"""Bytes that are read of a text and of a table: 4 and 64 MiB."""
LONGEST_TIME = 64
"""Characters of a number of base 60, such as 1:30:00."""
NODES = 250_000
"""Values of a YAML file, each counted wherever an alias repeats it, and a long text as several."""
OF_A_VALUE = 64
"""Characters of a text that count as a value."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What zipfile unpacks in steps; of the others it may unpack everything at once."""


def size_in_words(count: float) -> str:
    """A number of bytes in words.

    Example:
        >>> size_in_words(3_200_000)
        '3.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return "over 1000 TB"


def check_claim(claimed: int, held: int, what: str, mend: str) -> None:
    """See that data do not claim far more memory than the file that they come from can stand for.

    Args:
        claimed: Bytes that the data would take.
        held: Bytes of the file.
        what: What is about to be read.
        mend: What to do if it is right.

    Raises:
        ValueError: If they do.
    """
    if claimed > max(FREE, RATIO * held):
        raise ValueError(
            f"{what} would take {size_in_words(claimed)}, more than {RATIO} times the {size_in_words(held)} of their "
            f"files, as if made to exhaust memory; if that is right, {mend}"
        )


def check_links(folder: Path) -> None:
    """See that no symbolic link in a folder, at any depth, leads out of it.

    Raises:
        ValueError: If one does.
    """
    home = folder.resolve()
    for top, folders, files in os.walk(folder):
        for path in (Path(top, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise ValueError(
                    f"{path} is a link that leads out of {folder}, to {path.resolve()}; put the file itself there, or "
                    "pass trust=True (--trust on the command line)"
                )


def read_bytes(path: Path, most: int = FREE) -> bytes:
    """The contents of an ordinary file.

    Raises:
        ValueError: If it is none, or longer than that.
    """
    if path.exists() and not path.is_file():  # a pipe may never end
        raise ValueError(f"{path} is no ordinary file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} is longer than {size_in_words(most)}, the most that is read of such a file")
    return content


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The contents of one file in a zip, no longer than the archive's directory says.

    Raises:
        ValueError: If it is long or packed in an unusual way.
    """
    info = archive.getinfo(name)
    check_member(info)
    if info.file_size > FREE:
        raise ValueError(
            f"{name} is {size_in_words(info.file_size)} long, and at most {size_in_words(FREE)} are read of such a file"
        )
    with archive.open(info) as stream:
        return stream.read(info.file_size)


def check_member(info: zipfile.ZipInfo) -> None:
    """Raise a ``ValueError`` for what can't be unpacked in steps."""
    if info.compress_type not in _METHODS:
        raise ValueError(f"{info.filename} is packed by another method than store or deflate; pack it anew with these")


def read_text(path: Path, most: int = TEXT) -> str:
    """The text of an ordinary file.

    Raises:
        ValueError: If it is none, is longer than that, or is no UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error


def parse_table(text: str) -> io.StringIO:
    """The text of a table, for ``pandas.read_csv``, which would fill up short lines.

    Raises:
        ValueError: If it is long, or lines have not as many cells as the first.
    """
    if len(text) > TABLE:
        raise ValueError(f"it is longer than {size_in_words(TABLE)}")
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        width = len(next(rows, []))
        if any(len(row) not in (0, width) for row in rows):
            raise ValueError(f"its lines are not of {width} cells each")
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return io.StringIO(text)


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file.

    Raises:
        ValueError: If it is damaged, long, or repeats itself by aliases without end.
    """
    text = read_text(path)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); mend it, or restore it from a copy") from error


def parse_yaml(text: str) -> Any:
    """The plain values in a text of YAML.

    Raises:
        ValueError: If it is damaged, long, or repeats itself by aliases without end.
    """
    if len(text) > TEXT:
        raise ValueError(f"it is longer than {size_in_words(TEXT)}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _repeated(node, {}) > NODES:
            raise ValueError(f"it stands for more than {NODES} values")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, TypeError) as error:  # as of "!!bool foo"
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """A safe loader that stops at so many nodes."""

    composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.composed += 1
        event = self.peek_event()
        if isinstance(event, yaml.ScalarEvent) and ":" in event.value and len(event.value) > LONGEST_TIME:
            event.implicit = (False, True)  # else a number of base 60, which takes time with the square of its length
        if self.composed > NODES:
            raise ValueError(f"it holds more than {NODES} values")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):  # of which there may be several
                if (key.tag, key.value) in seen:  # of which YAML would take the last
                    raise ValueError(f"line {key.start_mark.line + 1}: '{key.value}' is there twice")
                seen.add((key.tag, key.value))
        return node


def _repeated(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are, those under an alias counted each time."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // OF_A_VALUE
    if id(node) not in known:
        known[id(node)] = NODES + 1  # for one that holds itself
        parts = [each for part in node.value for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = min(NODES + 1, 1 + sum(_repeated(part, known) for part in parts))
    return known[id(node)]

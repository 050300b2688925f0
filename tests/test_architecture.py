"""How the packages stand to each other: imports point one way only, and names are where a reader looks for them."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyrogen

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyrogen"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = ("arguments", "networks", "distributions", "models", "inference", "evaluation", "experiment", "cli")
"""From the ground up: each imports only what stands before it."""
BESIDE = ("data", "configuration")
"""They stand beside, import nothing of pyrogen's but what checks arguments, and serve from inference upwards."""


def part_of(path: Path) -> str:
    """The package or the single module, directly under pyrogen, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts of pyrogen that a file imports, wherever in the file that stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: import by the full name, not a relative one"
            names = [node.module or ""]
            if node.module == "pyrogen":
                names = [f"pyrogen.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "pyrogen":
                yield rest.partition(".")[0]


def allowed(part: str) -> set[str]:
    if part in BESIDE:
        return {part, "arguments"}
    below = FLOORS[: FLOORS.index(part) + 1]
    return {*below, *(BESIDE if "inference" in below else ())}


def test_every_part_has_its_place():
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts == {*FLOORS, *BESIDE}


@pytest.mark.parametrize("part", [*FLOORS, *BESIDE])
def test_imports_point_one_way(part):
    files = [path for path in MODULES if part_of(path) == part]
    wrong = {
        f"{path.relative_to(ROOT)} imports pyrogen.{name}"
        for path in files
        for name in imported(path)
        if name not in allowed(part)
    }
    assert files and not wrong


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=part_of)
def test_packages_only_reexport(path):
    documentation, *statements = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(documentation, ast.Expr)
    assigned = {
        target.id
        for node in statements
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert all(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in statements)
    assert assigned == ({"__all__", "__version__"} if path.parent == PACKAGE else {"__all__"})


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name != "__main__.py"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_module_says_what_is_public(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    lists = [
        node.value
        for node in body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    assert len(lists) == 1, "no __all__"
    public = ast.literal_eval(lists[0])
    defined = {node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    defined |= {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert set(public) <= defined and len(public) == len(set(public))


@pytest.mark.parametrize("name", ["models", "inference"])
def test_links_at_the_root(name):
    link = ROOT / name
    assert link.is_symlink() and os.readlink(link) == f"pyrogen/{name}"
    module = getattr(pyrogen, name)
    assert module.__name__ == f"pyrogen.{name}"
    assert all(getattr(module, each).__module__.startswith(f"pyrogen.{name}.") for each in module.__all__)


@pytest.mark.parametrize("given", [None, "0"])
def test_an_import_leaves_the_environment_as_it_was(given):
    """What Lightning Fabric sets costs every step of an optimizer; see pyrogen/inference/fabric.py."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    text = "import os; before = dict(os.environ); import pyrogen.cli; print(dict(os.environ) == before)"
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_lightning_is_imported_in_one_place():
    importing = [path.name for path in MODULES if "lightning_fabric" in path.read_text(encoding="utf-8")]
    assert importing == ["fabric.py", "parallel.py"]  # the latter names its logger

"""Objects as plain values and back: how a run is written as YAML and built again without unpickling anything.

An object is described by its class and its constructor's arguments, which are read from the attributes of the same
names, as ``torch.nn`` modules keep theirs. An object that stands in two places is described once and shared, in YAML
by an anchor.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["build", "class_path", "describe", "import_object"]

TRUSTED = ("pyrogen", "pyro", "torch")
_FILE_PREFIX = "_pyrogen_file_"


def describe(value: Any, _seen: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """A plain value (numbers, strings, lists, mappings) from which :func:`build` makes an equal object.

    Raises:
        ValueError: If a constructor's argument is not kept as an attribute, or something can't be named by an import
            path (a lambda, a class inside a function).

    Example:
        >>> from pyrogen.distributions import StandardNormal
        >>> describe(StandardNormal(2))
        {'class_path': 'pyrogen.distributions.StandardNormal', 'init_args': {'features': 2}}
    """
    seen = {} if _seen is None else _seen
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [describe(item, seen) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item, seen) for key, item in value.items()}
    if isinstance(value, (type, FunctionType)):
        return {"reference": class_path(value)}
    if isinstance(value, functools.partial):
        return {"partial": class_path(value.func), "init_args": describe(value.keywords, seen)}
    if id(value) not in seen:
        # The object is kept beside its description, lest its id be used again.
        seen[id(value)] = (_describe_object(value, seen), value)
    return seen[id(value)][0]


def _describe_object(value: Any, seen: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
    if isinstance(value, (nn.Sequential, nn.ModuleList)):
        return {"class_path": class_path(type(value)), "args": [describe(part, seen) for part in value]}
    if isinstance(value, torch.Tensor):
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} is an argument of a constructor; keep a plain value under the "
            "argument's name (its shape, say) and the tensor as a parameter or buffer"
        )
    described = {"class_path": class_path(type(value)), "init_args": {}}
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if not hasattr(value, name):
            if isinstance(value, nn.Module) and name in ("device", "dtype"):
                continue
            raise ValueError(
                f"{type(value).__name__} does not keep its argument '{name}' as an attribute, so it can't be built "
                f"again from a file; write `self.{name} = {name}` in its constructor"
            )
        argument = getattr(value, name)
        # torch's own layers keep a parameter under the name of the switch that asked for it, such as `bias`.
        described["init_args"][name] = True if isinstance(argument, nn.Parameter) else describe(argument, seen)
    return described


def class_path(value: type | FunctionType) -> str:
    """The shortest import path of a class or function; ``FILE.py:NAME`` for one that came from a file."""
    name, module = value.__qualname__, sys.modules.get(value.__module__)
    if module is None or "<" in name or value.__module__ == "__main__":
        raise ValueError(
            f"{value.__module__}.{name} has no import path by which it could be found again; define it at the top "
            "level of a module"
        )
    if value.__module__.startswith(_FILE_PREFIX):
        return f"{module.__file__}:{name}"
    packages = value.__module__.split(".")
    for end in range(1, len(packages)):
        package = ".".join(packages[:end])
        if getattr(sys.modules.get(package), name, None) is value:
            return f"{package}.{name}"
    return f"{value.__module__}.{name}"


def import_object(path: str, *, trust: bool = False) -> Any:
    """The class or function at an import path, or at ``FILE.py:NAME``.

    Args:
        path: Such as ``pyrogen.distributions.Normal`` or ``my_model.py:Model``.
        trust: Whether code outside pyrogen, Pyro and torch may be imported.

    Raises:
        ValueError: If it may not be imported or is not there.
    """
    file, colon, name = path.rpartition(":")
    if not trust and (colon or path.split(".")[0] not in TRUSTED):
        raise ValueError(
            f"'{path}' is code outside {', '.join(TRUSTED)}, which is not run unless you say so; read it, then pass "
            "trust=True (--trust on the command line)"
        )
    if colon:
        module: ModuleType = _import_file(file)
    else:
        package, _, name = path.rpartition(".")
        try:
            module = importlib.import_module(package)
        except (ImportError, ValueError) as error:
            raise ValueError(f"can't import '{path}': {error}") from error
    value = getattr(module, name, None)
    if value is None:
        raise ValueError(f"there is no '{name}' in {module.__file__}")
    if not trust and not (path.startswith("pyrogen.") or (isinstance(value, type) and issubclass(value, nn.Module))):
        raise ValueError(f"'{path}' is no module of torch or Pyro; pass trust=True (--trust) to use it all the same")
    return value


def _import_file(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"no file '{file}' (looked for {path})")
    name = _FILE_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"'{file}' is not a Python file; give FILE.py:NAME")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def build(description: Any, *, trust: bool = False, _made: dict[int, Any] | None = None) -> Any:
    """The object that a description names; what is described once and shared is built once and shared.

    Args:
        description: What :func:`describe` returned.
        trust: Whether classes outside pyrogen, Pyro and torch may be imported.

    Raises:
        ValueError: If a class is not trusted, not there, or does not take the arguments.

    Example:
        >>> build({"class_path": "pyrogen.distributions.StandardNormal", "init_args": {"features": 2}})
        StandardNormal(2)
    """
    made = {} if _made is None else _made
    if isinstance(description, list):
        return tuple(build(item, trust=trust, _made=made) for item in description)
    if not isinstance(description, Mapping):
        return description
    if id(description) not in made:
        made[id(description)] = _build_mapping(description, trust, made)
    return made[id(description)]


def _build_mapping(description: Mapping[str, Any], trust: bool, made: dict[int, Any]) -> Any:
    def inner(value: Any) -> Any:
        return build(value, trust=trust, _made=made)

    if "reference" in description:
        return import_object(description["reference"], trust=trust)
    arguments = {key: inner(value) for key, value in description.get("init_args", {}).items()}
    if "partial" in description:
        return functools.partial(import_object(description["partial"], trust=trust), **arguments)
    if "class_path" not in description:
        return {key: inner(value) for key, value in description.items()}
    path = description["class_path"]
    try:
        return import_object(path, trust=trust)(*map(inner, description.get("args", [])), **arguments)
    except TypeError as error:
        raise ValueError(f"can't build {path} from {arguments}: {error}") from error

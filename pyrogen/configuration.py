"""Objects as plain values and back: how a run is written as YAML and built again without unpickling anything.

An object is described by its class and its constructor's arguments, which are read from the attributes of the same
names, as ``torch.nn`` modules keep theirs. An object that stands in two places is described once and shared, in YAML
by an anchor.

What :func:`build` makes without being trusted is only this: modules of torch and Pyro, optimizers of torch, and the
public classes of pyrogen's own parts. No function is called and nothing else is imported.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import nn

__all__ = ["build", "check_names", "class_path", "describe", "import_object", "without_moves"]

_log = logging.getLogger(__name__)

TRUSTED = (
    "pyrogen.distributions",
    "pyrogen.inference",
    "pyrogen.models",
    "pyrogen.networks",
    "pyro.distributions",
    "pyro.nn",
    "torch.nn",
    "torch.optim",
)
"""Packages whose classes may be built from a file of unknown origin."""

_FILE_PREFIX = "_pyrogen_file_"
_KEYS = ("class_path", "reference", "partial")
_WITHOUT_ARGUMENTS = (object, nn.Module, nn.Identity, PyroModule)
"""Classes whose constructor keeps no arguments; named as classes, for `torch.compile` replaces `nn.Module.__init__`."""


def describe(value: Any, _seen: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """A plain value (numbers, strings, lists, mappings) from which :func:`build` makes an equal object.

    Lists and tuples alike come back as tuples.

    Raises:
        ValueError: If a constructor's argument is not kept as an attribute, or something can't be named by an import
            path (a lambda, a class inside a function).

    Example:
        >>> from pyrogen.distributions import StandardNormal
        >>> describe(StandardNormal(2))
        {'class_path': 'pyrogen.distributions.StandardNormal', 'init_args': {'features': 2}}
    """
    seen = {} if _seen is None else _seen
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return _plain_scalar(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [describe(item, seen) for item in value]
    if isinstance(value, Mapping):
        return _describe_mapping(value, seen)
    if isinstance(value, type):
        return {"reference": class_path(value)}
    if id(value) not in seen:
        # The value is kept beside its description, lest its id be used again.
        seen[id(value)] = None, value
        try:
            seen[id(value)] = _describe_object(value, seen), value
        except ValueError:
            del seen[id(value)]
            raise
    described = seen[id(value)][0]
    if described is None:
        raise ValueError(f"a {type(value).__name__} is among its own arguments; build it without the circle")
    return described


def _plain_scalar(value: Any) -> Any:
    """A number or a string without the type that numpy or an enumeration gives it; YAML knows only the plain ones."""
    if isinstance(value, np.generic):
        value = value.item()
    plain = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if plain is None:
        if value is None:
            return None
        raise ValueError(f"{value!r} is no plain number or string; pass one")
    return plain(value)


def _describe_mapping(value: Mapping, seen: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
    odd = [key for key in value if not isinstance(key, str) or key in _KEYS]
    if odd:
        raise ValueError(f"a mapping with the key {odd[0]!r} can't be written; use strings other than {_KEYS} for keys")
    return {str(key): describe(item, seen) for key, item in value.items()}


def _describe_object(value: Any, seen: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
    if isinstance(value, FunctionType):
        return {"reference": class_path(value)}
    if isinstance(value, functools.partial):
        positional = {"args": [describe(item, seen) for item in value.args]} if value.args else {}
        return {"partial": class_path(value.func), **positional, "init_args": describe(value.keywords, seen)}
    if isinstance(value, torch.Tensor):
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} is an argument of a constructor; keep a plain value under the "
            "argument's name (its shape, say) and the tensor as a parameter or buffer"
        )
    path, constructor = class_path(type(value)), type(value).__init__
    if constructor is nn.Sequential.__init__:
        if list(value._modules) != [str(index) for index in range(len(value))]:
            raise ValueError("the parts of an nn.Sequential have names of their own; build it without names")
        return {"class_path": path, "args": [describe(part, seen) for part in value]}
    if constructor is nn.ModuleList.__init__:
        return {"class_path": path, "args": [[describe(part, seen) for part in value]]}
    if constructor is nn.ModuleDict.__init__:
        return {"class_path": path, "args": [_describe_mapping(dict(value.items()), seen)]}
    return {"class_path": path, "init_args": _arguments(value, seen)}


def _arguments(value: Any, seen: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
    """The arguments of an object's constructor, by name."""
    constructor = type(value).__init__
    if type(value).__new__ is not object.__new__ or not hasattr(value, "__dict__"):
        raise ValueError(f"{value!r} keeps its arguments where they can't be read back; make it inside what needs it")
    if next(owner for owner in type(value).__mro__ if "__init__" in vars(owner)) in _WITHOUT_ARGUMENTS:
        return {}
    of_torch = getattr(constructor, "__module__", "").startswith("torch.")
    arguments = {}
    for name, parameter in [*inspect.signature(constructor).parameters.items()][1:]:
        if of_torch and (name in ("device", "dtype") or name.startswith("_")):
            continue
        if parameter.kind is parameter.VAR_KEYWORD and not of_torch:
            raise ValueError(
                f"{type(value).__name__} takes **{name}, of which nothing can be read back; name its arguments"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if not hasattr(value, name):
            raise ValueError(
                f"{type(value).__name__} does not keep its argument '{name}' as an attribute, so it can't be built "
                f"again from a file; write `self.{name} = {name}` in its constructor"
            )
        # Where a method has the argument's name, the value is kept under that name with an underscore behind.
        argument = getattr(value, f"{name}_" if callable(getattr(type(value), name, None)) else name)
        # torch's own layers keep a parameter under the name of the switch that asked for it, such as `bias`.
        switch = of_torch and isinstance(argument, nn.Parameter)
        arguments[name] = True if switch else describe(argument, seen)
    return arguments


def class_path(value: Callable) -> str:
    """The shortest import path of a class or function; ``FILE.py:NAME`` for one that came from a file.

    Raises:
        ValueError: If nothing at that path is this very class or function.
    """
    name, home = getattr(value, "__qualname__", type(value).__name__), getattr(value, "__module__", None) or ""
    module = sys.modules.get(home)
    if home == "__main__" or getattr(module, name, None) is not value:
        raise ValueError(
            f"{home}.{name} has no import path by which it could be found again; define it at the top level of a module"
        )
    if home.startswith(_FILE_PREFIX):
        return f"{getattr(module, '__file__', None)}:{name}"
    packages = home.split(".")
    for end in range(1, len(packages)):
        package = ".".join(packages[:end])
        if getattr(sys.modules.get(package), name, None) is value:
            return f"{package}.{name}"
    return f"{home}.{name}"


def import_object(path: str, *, trust: bool = False, beside: Path | None = None) -> Any:
    """The class or function at an import path, or at ``FILE.py:NAME``.

    Args:
        path: Such as ``pyrogen.distributions.Normal`` or ``my_model.py:Model``.
        trust: Whether any code may be imported, and anything be named; else only modules of torch and Pyro, optimizers
            of torch and public classes of pyrogen's parts.
        beside: A folder in which a file is looked for that is no longer where it was, before the working directory.

    Raises:
        ValueError: If it may not be imported or is not there.
    """
    if not isinstance(path, str):
        raise ValueError(f"expected an import path such as 'pyrogen.distributions.Normal', got {path!r}")
    if not trust and not _is_under(path, TRUSTED):
        raise ValueError(
            f"'{path}' is code outside {', '.join(TRUSTED)}, which is not run unless you say so; read it, then pass "
            "trust=True (--trust on the command line)"
        )
    if path.endswith(".py"):
        raise ValueError(f"'{path}' names no class or function; give FILE.py:NAME, such as {Path(path).name}:Model")
    file, colon, name = path.rpartition(":")
    package, _, name = (file, "", name) if colon else path.rpartition(".")
    try:
        module = _import_file(file, beside) if colon else importlib.import_module(package)  # noqa: TID251 (was asked for above)
    except (ImportError, ValueError) as error:
        raise ValueError(f"can't import '{path}': {error}") from error
    value = getattr(module, name, None)
    if value is None:
        raise ValueError(f"there is no '{name}' in {module.__file__ if colon else package}")
    if not trust and not _is_harmless(value):
        raise ValueError(
            f"'{path}' is neither a module of torch or Pyro, nor an optimizer of torch, nor a public class of "
            "pyrogen's; read the file it stands in, then pass trust=True (--trust on the command line)"
        )
    return value


def without_moves(there: Any, here: Any) -> tuple[Any, Any]:
    """Two plain values with the name alone of each ``FILE.py:NAME`` whose file is gone from where the first has it.

    It may have been moved, and by what they hold files are compared elsewhere.

    Example:
        >>> without_moves(["/gone/my_model.py:Model", 2], ["/home/of/my_model.py:Model", 2])
        (['Model', 2], ['Model', 2])
    """
    gone = {(Path(file).name, name) for file, name in _named_in_files(there) if not Path(file).is_file()}
    return _without_files(there, gone), _without_files(here, gone)


def _named_in_files(value: Any) -> Iterator[tuple[str, str]]:
    """File and name of each ``FILE.py:NAME`` in plain values."""
    if isinstance(value, (Mapping, list)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _named_in_files(each)
    elif isinstance(value, str) and value.rpartition(":")[0].endswith(".py"):
        file, _, name = value.rpartition(":")
        yield file, name


def _without_files(value: Any, gone: set[tuple[str, str]]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_files(each, gone) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_files(each, gone) for each in value]
    return next((name for file, name in _named_in_files(value) if (Path(file).name, name) in gone), value)


def check_names(value: Any) -> None:
    """See that plain values from a file of unknown origin name no code but that which :func:`build` makes untrusted.

    Every string counts, whatever it is for, and what is neither a word nor a number is taken for a name.

    Raises:
        ValueError: If one does, see :func:`import_object`.

    Example:
        >>> check_names({"class_path": "Flow", "init_args": {"transform": "affine_coupling", "hidden": [64]}})
        >>> check_names("os.system")
        Traceback (most recent call last):
        ValueError: 'os.system' is code outside ...
    """
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            check_names(each)
        return
    # Text may be read as YAML once more, and that has no escapes where it is words and numbers in brackets.
    for piece in re.split(r"[\s,()\[\]]+", str(value)):
        named = [each for each in _descendants(nn.Module) if each.__name__ == piece]
        if named and not any(map(_is_harmless, named)):
            import_object(class_path(named[0]))
        elif not (re.fullmatch(r"[\w+-]*", piece) or _is_number(piece)):
            import_object(piece)


def _descendants(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [*direct, *(below for each in direct for below in _descendants(each))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_under(path: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted path of public names lies in one of the packages."""
    parts = path.split(".")
    return all(part.isidentifier() and not part.startswith("_") for part in parts) and any(
        path.startswith(package + ".") for package in packages
    )


def _is_harmless(value: Any) -> bool:
    """Whether a class may be built with arguments of unknown origin; it must come from a trusted package itself."""
    if not isinstance(value, type) or not f"{value.__module__}.".startswith(tuple(f"{name}." for name in TRUSTED)):
        return False
    if value.__module__.startswith("pyrogen."):
        package = sys.modules[".".join(value.__module__.split(".")[:2])]
        return value.__name__ in getattr(package, "__all__", ())
    return issubclass(value, (nn.Module, torch.optim.Optimizer))


def _import_file(file: str, beside: Path | None) -> ModuleType:
    path = Path(file).resolve()
    if beside is not None and not path.is_file():
        moved = [place.resolve() / path.name for place in (beside, Path())]
        gone, path = path, next((each for each in moved if each.is_file()), path)
        if path != gone:
            _log.warning("%s is not there; %s is taken in its place", gone, path)
    if not path.is_file():
        nor = "" if beside is None else f", nor {path.name} in {beside} or the working directory; put it into either"
        raise ValueError(f"no file '{file}' (looked for {path}){nor}")
    name = _FILE_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"'{file}' is not a Python file; give FILE.py:NAME")
        module = importlib.util.module_from_spec(spec)  # noqa: TID251 (only what the user trusts)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def build(
    description: Any, *, trust: bool = False, beside: Path | None = None, _made: dict[int, Any] | None = None
) -> Any:
    """The object that a description names; what is described once and shared is built once and shared.

    Args:
        description: What :func:`describe` returned.
        trust: Whether anything it names may be imported and called, see :func:`import_object`.
        beside: As for that.

    Raises:
        ValueError: If a class is not trusted, not there, or does not take the arguments.

    Example:
        >>> build({"class_path": "pyrogen.distributions.StandardNormal", "init_args": {"features": 2}})
        StandardNormal(2)
    """
    made = {} if _made is None else _made
    if not isinstance(description, (list, Mapping)):
        return description
    if id(description) not in made:
        made[id(description)] = _UNDER_WAY
        made[id(description)] = _build_new(description, trust, beside, made)
    if made[id(description)] is _UNDER_WAY:
        raise ValueError("a description refers to itself, so nothing can be built from it")
    return made[id(description)]


_UNDER_WAY = object()


def _build_new(
    description: list[Any] | Mapping[str, Any], trust: bool, beside: Path | None, made: dict[int, Any]
) -> Any:
    def inner(value: Any) -> Any:
        return build(value, trust=trust, beside=beside, _made=made)

    if isinstance(description, list):
        return tuple(map(inner, description))
    kind = next((key for key in _KEYS if key in description), None)
    if kind is None:
        return {key: inner(value) for key, value in description.items()}
    path = description[kind]
    positional, named = description.get("args", []), description.get("init_args", {})
    if not isinstance(positional, list) or not isinstance(named, Mapping):
        raise ValueError(f"expected a list of args and a mapping of init_args for {path}")
    target = import_object(path, trust=trust, beside=beside)
    if kind == "reference":
        return target
    arguments, keywords = [*map(inner, positional)], {str(key): inner(value) for key, value in named.items()}
    try:
        if kind == "partial":
            return functools.partial(target, *arguments, **keywords)
        return target(*arguments, **keywords)
    except Exception as error:  # whatever a constructor makes of a damaged file
        raise ValueError(f"can't build {path} from {reprlib.repr(arguments or keywords)}: {error}") from error

"""Parts by name: any class by its short name, its import path or ``FILE.py:NAME``, with the arguments for it.

A part is written as ``Flow``, or with arguments as ``{class_path: Flow, init_args: {layers: 2}}``, on the command line
and in YAML alike. An argument may be a part itself, such as a schedule of the weight β.
"""

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from pyrogen import distributions, inference, models, networks
from pyrogen.configuration import import_object

__all__ = ["ODD", "ROLES", "Part", "call", "describe_part", "in_role", "misplaced", "names", "resolve"]

ROLES = ("model", "prior", "likelihood", "encoder", "decoder", "family", "objective")


BUILDERS = {"ratio": 1, "visible_ratio": 1, "critic": 2}
"""Options of objectives that are called for what they are to be, with so many arguments."""


ODD = (TypeError, RuntimeError, AttributeError, LookupError, AssertionError)
"""Errors of code that was made for something else."""


_ASKED = {
    "prior": "prior(latent) and gives what, called without arguments, is a distribution, as StandardNormal",
    "likelihood": "likelihood(decoder) and gives what, called with z, is a distribution, as Bernoulli",
    "decoder": "decoder(latent, shape) and gives a module from (B, latent) to (B, *shape), as MLP",
    "family": "family(features, context) and gives a module whose call with a context is a distribution, as Normal",
    "encoder": "encoder(event_shape, features) and gives a module from x to (B, features), as MLP",
}
"""What a role asks of a part, for messages."""


class Part:
    """A class or function by name, and the arguments that it shall get.

    Args:
        name: A short name, an import path, or ``FILE.py:NAME``.
        init_args: Its arguments by name, as plain values.

    Example:
        >>> Part.read({"class_path": "Flow", "init_args": {"layers": 2}})
        Flow(layers=2)
    """

    # No dataclass: jsonargparse would take its fields for flags.
    def __init__(self, name: str, init_args: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.init_args = dict(init_args or {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and (self.name, self.init_args) == (other.name, other.init_args)

    def __hash__(self) -> int:
        return hash(self.name)

    @classmethod
    def read(cls, value: Any) -> "Part":
        """The part that a string or a mapping with ``class_path`` and ``init_args`` names.

        Raises:
            ValueError: If it is neither.
        """
        if isinstance(value, Part):
            return value
        if isinstance(value, str) and value:
            return cls(value)
        if isinstance(value, Mapping) and {"class_path"} <= value.keys() <= {"class_path", "init_args"}:
            arguments = value.get("init_args") or {}
            if isinstance(arguments, Mapping):
                return cls(str(value["class_path"]), arguments)
        raise ValueError(
            f"expected a name such as 'Flow', or a mapping {{class_path: NAME, init_args: {{...}}}}, got "
            f"{reprlib.repr(value)}"
        )

    def plain(self) -> str | dict[str, Any]:
        """What :meth:`read` reads; a file's path is made absolute."""
        file, colon, name = self.name.rpartition(":")
        name = f"{Path(file).resolve()}:{name}" if colon else self.name
        return {"class_path": name, "init_args": dict(self.init_args)} if self.init_args else name

    def __repr__(self) -> str:
        name = self.name.rpartition(":")[2].rpartition(".")[2]
        arguments = ", ".join(f"{key}={value}" for key, value in self.init_args.items())
        return f"{name}({arguments})" if arguments else name


def names(role: str) -> dict[str, Any]:
    """The short names that a role knows, with what they stand for; an ``option`` of a part may be any class."""
    if role == "option":
        packages: list[Any] = [models, networks, distributions, inference]
        known = {name: getattr(package, name) for package in packages for name in package.__all__}
        return {name: value for name, value in known.items() if isinstance(value, type)}
    package: Any = {"model": models, "encoder": networks, "decoder": networks, "objective": inference}.get(
        role, distributions
    )
    known = {name: getattr(package, name) for name in package.__all__}
    if role == "objective":
        return {name: value for name, value in known.items() if _is_objective(value)}
    if role in ("prior", "family", "likelihood"):
        is_likelihood = role == "likelihood"
        known = {name: value for name, value in known.items() if hasattr(value, "decoder_shape") is is_likelihood}
    return {name: value for name, value in known.items() if isinstance(value, type)}


def _is_objective(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, inference.Objective) and value is not inference.Objective


def resolve(part: Part, role: str) -> Any:
    """The class, function or object that a part names.

    What a user names is trusted: a module or a file of the user's own is imported.

    Raises:
        ValueError: If the name is not known, with the names that are near it, or can't be imported.

    Example:
        >>> resolve(Part("Mixture"), "prior")
        <class 'pyrogen.distributions.mixtures.Mixture'>
    """
    known = names(role)
    if part.name in known:
        return known[part.name]
    if "." in part.name or ":" in part.name:
        return import_object(part.name, trust=True)
    raise ValueError(
        f"unknown {role} '{part.name}'; {_guess(part.name, known)}Known are {', '.join(sorted(known))}; else give an "
        "import path such as package.module.NAME, or FILE.py:NAME"
    )


def _guess(name: str, known: Iterable[str]) -> str:
    """Which known names may have been meant by one that is not."""
    near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=3, cutoff=0.5)
    meant = [each for each in known if each.lower() in near]
    return f"did you mean {' or '.join(meant)}? " if meant else ""


def call(part: Part, role: str, *positional: Any, **filled: Any) -> Any:
    """Build a part: call what it names with the role's own arguments and the part's.

    Args:
        part: The part.
        role: One of ``ROLES``.
        positional: What everything of this role is called with, such as ``(features, context)`` for a family.
        filled: What goes to a parameter of that name, where there is one and the part does not say it itself.

    Raises:
        ValueError: If an argument is not known, is of a wrong type, or is missing.
    """
    return _build(partial_of(part, role, len(positional), **filled), part, role, *positional)


def partial_of(part: Part, role: str, positional: int, **filled: Any) -> Any:
    """What a part names, with the part's arguments but without the role's own; itself where there are none."""
    target = resolve(part, role)
    if not callable(target):
        raise ValueError(f"the {role} '{part.name}' is of type {type(target).__name__}; expected a class or a function")
    parameters = inspect.signature(target).parameters
    given = {key for key in filled if key in parameters and key not in part.init_args}
    arguments = _typed(target, part, role, positional, given)
    arguments |= {key: value for key, value in filled.items() if key in parameters and key not in arguments}
    return functools.partial(target, **arguments) if arguments else target


def _build(target: Callable, part: Part, role: str, *positional: Any) -> Any:
    try:
        inspect.signature(target).bind(*positional)
    except TypeError as error:
        raise ValueError(
            f"can't build the {role} {part!r}: {error}; options follow the name, as in "
            "--prior Mixture --prior.components 20"
        ) from error
    with in_role(part, role, "can't be built"):
        return target(*positional)


@contextmanager
def in_role(part: Part, role: str, why: str) -> Iterator[None]:
    """Within, errors of what was made for something else are said to be the part's, and why."""
    try:
        yield
    except ODD as error:
        raise misplaced(part, role, f"{why}: {error}").with_traceback(error.__traceback__) from error


def misplaced(part: Part, role: str, why: str) -> ValueError:
    """The error for a part that can't have its role, with what the role asks for."""
    if role not in _ASKED:
        return ValueError(f"the {role} {part!r} {why}")
    return ValueError(f"--{role} {part!r} {why}; expected what is called as {_ASKED[role]} is")


def _typed(target: Callable, part: Part, role: str, positional: int, given: set[str]) -> dict[str, Any]:
    """The part's arguments, checked against the types that the class declares and made into these."""
    if not part.init_args:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    add(target, skip={*given, *([positional] if positional else [])}, fail_untyped=False, as_group=False)
    options = [action.dest for action in parser._actions if "help" not in action.dest]
    for key in part.init_args:
        if key not in options:
            raise ValueError(
                f"the {role} {part.name} has no option '{key}'; {_guess(key, options)}It has "
                f"{', '.join(options) or 'none'}"
            )
    built = {key: _option(value, BUILDERS.get(key)) for key, value in part.init_args.items()}
    try:
        values = parser.instantiate(parser.parse_object(built)).as_dict()
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        for key, value in part.init_args.items():
            if isinstance(value, str) and f'Parser key "{key}"' in message:
                message = _choice_message(target, key, value) or message
        raise ValueError(f"the {role} {part!r}: {message}") from error
    return {key: tuple(v) if isinstance(v := values[key], list) else v for key in part.init_args}


def _option(value: Any, builder: int | None) -> Any:
    """An argument as it stands, or built where it is a part itself; of a builder, what builds it."""
    is_part = (
        "class_path" in value if isinstance(value, Mapping) else isinstance(value, str) and value in names("option")
    )
    if is_part and builder is not None:
        return partial_of(Part.read(value), "option", builder)
    return call(Part.read(value), "option") if is_part else value


def _choice_message(target: Callable, key: str, value: str) -> str | None:
    """What to say of a word that is none of those to choose from; None where there is no such choice."""
    try:
        choices = _choices(inspect.signature(target, eval_str=True).parameters[key].annotation)
    except (NameError, TypeError, KeyError):  # annotations of a user's own that can't be read
        return None
    return f"unknown {key} '{value}'; {_guess(value, choices)}It takes {', '.join(choices)}" if choices else None


def _choices(hint: Any) -> list[str]:
    """The words among which a type lets one choose."""
    if get_origin(hint) is Literal:
        return [each for each in get_args(hint) if isinstance(each, str)]
    return [word for part in get_args(hint) for word in _choices(part)]


def describe_part(part: Part, role: str) -> str:
    """What ``--ROLE.help NAME`` prints: the signature and the documentation."""
    target = resolve(part, role)
    return f"{part.name}{inspect.signature(target)}\n\n{inspect.getdoc(target) or 'No documentation.'}\n"

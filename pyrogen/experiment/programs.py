"""Programs for fits: copies of a model that share no weights, and the guides for them."""

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pyrogen.inference import AmortizedGuide
from pyrogen.inference.programs import as_module

__all__ = ["amortized_guide", "independent_copy"]


def amortized_guide(model: Callable, encoder: nn.Module, family: Any, example: Sequence[Tensor]) -> AmortizedGuide:
    """The guide for a model, which gets to see an example of the data only where it can't do without.

    Args:
        model, encoder, family: As for :class:`~pyrogen.inference.AmortizedGuide`.
        example: A batch on which the model can run.
    """
    try:
        return AmortizedGuide(model, encoder, family)
    except ValueError:
        # A model that reads its data, or observes several sites; any other fault comes up again.
        return AmortizedGuide(model, encoder, family, example=tuple(example))


def independent_copy(program: Callable, example: Sequence[Tensor]) -> Callable:
    """A copy of a program with weights of its own, equal to the original's.

    A module is copied as a whole; a plain function with the modules that its globals and its closure name.

    Args:
        program: A Pyro callable.
        example: A batch on which it can run.

    Raises:
        ValueError: If a plain function reaches modules in a way that can't be copied.
    """
    if isinstance(program, nn.Module):
        return copy.deepcopy(program)
    owner = getattr(program, "__self__", None)
    if isinstance(owner, nn.Module):
        return getattr(copy.deepcopy(owner), program.__name__)
    copied = _copy_of_function(program) if inspect.isfunction(program) else copy.deepcopy(program)
    shared = _parameters(copied, example) & _parameters(program, example)
    if shared:
        raise ValueError(
            f"the model {getattr(program, '__name__', program)} uses modules through other functions or objects, so "
            "it can't be copied and its fits would train the same weights; write it as a PyroModule that owns them"
        )
    return copied


def _parameters(program: Callable, example: Sequence[Tensor]) -> set[int]:
    return {id(parameter) for parameter in as_module(program, *example).parameters()}


def _copy_of_function(function: Any) -> Callable:
    """The function again, over copies of the modules that it names."""
    memo: dict[int, Any] = {}

    def own(value: Any) -> Any:
        return copy.deepcopy(value, memo) if isinstance(value, nn.Module) else value

    names = {name: own(value) for name, value in inspect.getclosurevars(function).globals.items()}
    closure = function.__closure__ and tuple(types.CellType(own(cell.cell_contents)) for cell in function.__closure__)
    copied = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__, copied.__module__ = function.__kwdefaults__, function.__module__
    copied.__qualname__, copied.__doc__ = function.__qualname__, function.__doc__
    return copied

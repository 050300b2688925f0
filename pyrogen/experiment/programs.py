"""Programs for fits: copies of a model that share no weights, and the guides for them."""

import copy
import inspect
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from pyrogen.inference import AmortizedGuide
from pyrogen.inference.programs import Program, as_module

__all__ = ["FunctionModel", "amortized_guide", "independent_copy"]


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
    if isinstance(program, Program):
        raise ValueError("this model was made from a function by a fit; pass the function itself")
    if isinstance(program, nn.Module):
        return copy.deepcopy(program)
    owner = getattr(program, "__self__", None)
    if isinstance(owner, nn.Module):
        return getattr(copy.deepcopy(owner), program.__name__)
    copied = FunctionModel(program) if inspect.isfunction(program) else copy.deepcopy(program)
    if _parameters(copied, example) & _parameters(program, example):
        raise ValueError(
            f"the model {getattr(program, '__name__', program)} uses modules through other functions or objects, so "
            "it can't be copied and its fits would train the same weights; write it as a PyroModule that owns them"
        )
    return copied


def _parameters(program: Callable, example: Sequence[Tensor]) -> set[int]:
    return {id(parameter) for parameter in as_module(program, *example).parameters()}


class FunctionModel(nn.Module):
    """A plain function as a module, over copies of the modules that its globals and its closure name.

    Args:
        function: A program that uses ``pyro.module``.

    Example:
        >>> import pyro, torch
        >>> decoder = nn.Linear(2, 3)
        >>> def model(x):
        ...     return decoder(x)
        >>> own = FunctionModel(model)
        >>> own(torch.zeros(1, 2)).equal(model(torch.zeros(1, 2)))
        True
        >>> own.modules_of["decoder"] is decoder
        False
    """

    def __init__(self, function: FunctionType) -> None:
        super().__init__()
        self.function = function
        seen = inspect.getclosurevars(function)
        named = {**seen.globals, **seen.nonlocals}
        memo: dict[int, Any] = {}
        self.modules_of = nn.ModuleDict(
            {name: copy.deepcopy(value, memo) for name, value in named.items() if isinstance(value, nn.Module)}
        )
        self._copied = self._over_copies(memo)

    def _over_copies(self, memo: dict[int, Any]) -> Callable:
        """The function again, with the copies in the places of the originals."""
        function = self.function
        closure = function.__closure__ and tuple(
            CellType(memo.get(id(cell.cell_contents), cell.cell_contents)) for cell in function.__closure__
        )
        scope = {name: memo.get(id(value), value) for name, value in function.__globals__.items()}
        copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied

    def forward(self, *batch: Tensor) -> Any:
        return self._copied(*batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FunctionModel":
        made = FunctionModel(self.function)
        made.load_state_dict(self.state_dict())
        return made

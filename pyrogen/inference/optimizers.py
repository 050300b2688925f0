"""Optimizers of a fit: which parameters, which steps, which learning rates."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn

from pyrogen.inference.run import FitOptions

__all__ = ["adam", "learning_rate_factor", "optimizer_of", "trained_parameters"]


def learning_rate_factor(schedule: str | Callable[[float], float], share: float) -> float:
    """What the learning rate is multiplied by when a share of training is done."""
    if callable(schedule):
        return schedule(share)
    return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}[schedule]


def trained_parameters(module: nn.Module, critics: list[nn.Parameter]) -> list[nn.Parameter]:
    """The programs' parameters that are trained."""
    apart = {id(parameter) for parameter in critics}
    parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    if not parameters:
        raise ValueError("neither model nor guide has a parameter to train")
    return parameters


def optimizer_of(parameters: list[nn.Parameter], options: FitOptions, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the programs' parameters."""
    if options.optimizer is not None:
        optimizer = options.optimizer(parameters, lr=options.learning_rate)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer gives a {type(optimizer).__name__}; expected what gives a torch.optim.Optimizer when "
                "called as optimizer(parameters, lr=...), such as torch.optim.Adam"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} needs a closure, to compute the loss anew; choose one that "
                "steps on gradients alone, such as torch.optim.Adam"
            )
        return optimizer
    return adam(parameters, options.learning_rate, options, device)


def adam(
    parameters: list[nn.Parameter],
    learning_rate: float,
    options: FitOptions,
    device: torch.device,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Adam:
    """Adam, fused where it can be."""
    # With scaled gradients a fused step would unscale them after they were clipped.
    fused = device.type in ("cpu", "cuda") and options.precision != "16-mixed"
    return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=fused)

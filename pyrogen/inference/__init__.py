"""Guides, objectives and training."""

from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.loop import NonFiniteLoss
from pyrogen.inference.objectives import ELBO, IWAE, Objective, Renyi
from pyrogen.inference.run import FitOptions, OutputExistsError, Run, load, save
from pyrogen.inference.schedules import CyclicalSchedule, LinearSchedule
from pyrogen.inference.training import fit

__all__ = [
    "ELBO",
    "IWAE",
    "AmortizedGuide",
    "CyclicalSchedule",
    "FitOptions",
    "LinearSchedule",
    "NonFiniteLoss",
    "Objective",
    "OutputExistsError",
    "Renyi",
    "Run",
    "fit",
    "load",
    "save",
]

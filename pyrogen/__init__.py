"""pyrogen: generative models as Pyro programs."""

from pyrogen import data, distributions, evaluation, experiment, inference, models, networks
from pyrogen.evaluation import evaluate, sample, to_arviz
from pyrogen.experiment import compare
from pyrogen.inference import fit, load, save

__version__ = "0.1.0"

__all__ = [
    "compare",
    "data",
    "distributions",
    "evaluate",
    "evaluation",
    "experiment",
    "fit",
    "inference",
    "load",
    "models",
    "networks",
    "sample",
    "save",
    "to_arviz",
]

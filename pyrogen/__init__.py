"""pyrogen: generative models as Pyro programs."""

from pyrogen import data, distributions, inference, models, networks
from pyrogen.inference import fit, load, save

__version__ = "0.1.0"

__all__ = ["data", "distributions", "fit", "inference", "load", "models", "networks", "save"]

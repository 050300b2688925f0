"""Generative Pyro programs, one readable file each."""

from pyrogen.models.latent import LatentVariableModel
from pyrogen.models.ppca import ProbabilisticPCA

__all__ = ["LatentVariableModel", "ProbabilisticPCA"]

"""Families of conditional distributions: priors, posteriors and likelihoods."""

from pyrogen.distributions.families import Delta, MultivariateNormal, Normal, StandardNormal
from pyrogen.distributions.mixtures import Mixture, Vamp

__all__ = ["Delta", "Mixture", "MultivariateNormal", "Normal", "StandardNormal", "Vamp"]

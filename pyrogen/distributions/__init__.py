"""Families of conditional distributions: priors, posteriors and likelihoods."""

from pyrogen.distributions.families import Delta, MultivariateNormal, Normal, StandardNormal
from pyrogen.distributions.flow import Flow
from pyrogen.distributions.level_likelihoods import (
    CategoricalLikelihood,
    DiscretizedLogisticMixture,
    QuantizedNormal,
)
from pyrogen.distributions.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    LaplaceLikelihood,
    NormalLikelihood,
)
from pyrogen.distributions.mixtures import Mixture, Vamp

__all__ = [
    "Bernoulli",
    "CategoricalLikelihood",
    "ContinuousBernoulli",
    "Delta",
    "DiscretizedLogisticMixture",
    "Flow",
    "LaplaceLikelihood",
    "Mixture",
    "MultivariateNormal",
    "Normal",
    "NormalLikelihood",
    "QuantizedNormal",
    "StandardNormal",
    "Vamp",
]

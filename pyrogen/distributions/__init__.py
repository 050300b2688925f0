"""Families of conditional distributions: priors, posteriors and likelihoods."""

from pyrogen.distributions.families import Delta, MultivariateNormal, Normal, StandardNormal
from pyrogen.distributions.flow import Flow
from pyrogen.distributions.implicit import Implicit
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
from pyrogen.distributions.semi_implicit import SemiImplicit

__all__ = [
    "Bernoulli",
    "CategoricalLikelihood",
    "ContinuousBernoulli",
    "Delta",
    "DiscretizedLogisticMixture",
    "Flow",
    "Implicit",
    "LaplaceLikelihood",
    "Mixture",
    "MultivariateNormal",
    "Normal",
    "NormalLikelihood",
    "QuantizedNormal",
    "SemiImplicit",
    "StandardNormal",
    "Vamp",
]

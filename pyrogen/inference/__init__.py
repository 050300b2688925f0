"""Guides, objectives and training."""

from pyrogen.inference.adaptive import AdaptiveContrast
from pyrogen.inference.adversarial import ALI, GAN, VAEGAN
from pyrogen.inference.checkpoints import WriteError
from pyrogen.inference.compilation import Compiled
from pyrogen.inference.folders import OutputExistsError
from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.hybrids import AAE, AVB, VGH, AlphaGAN, Hybrid, VGHPlusPlus
from pyrogen.inference.kernels import (
    EnergyKernel,
    GaussianKernel,
    InverseMultiquadraticKernel,
    LaplacianKernel,
    maximum_mean_discrepancy,
)
from pyrogen.inference.matching import WAE, InfoVAE
from pyrogen.inference.objectives import ELBO, IWAE, Objective, Renyi
from pyrogen.inference.ratios import (
    NWJ,
    DonskerVaradhan,
    Hinge,
    JensenShannon,
    LeastSquares,
    Logistic,
    Ratio,
    Wasserstein,
)
from pyrogen.inference.refit import refit_prior
from pyrogen.inference.run import CriticOptions, FitOptions, Run, load, save
from pyrogen.inference.schedules import CyclicalSchedule, LinearSchedule
from pyrogen.inference.telescoping import Telescoping
from pyrogen.inference.total_correlation import BetaTCVAE, FactorVAE
from pyrogen.inference.training import fit
from pyrogen.inference.trouble import NonFiniteLoss
from pyrogen.inference.with_prior import TwoStageGuide, WithPrior

__all__ = [
    "AAE",
    "ALI",
    "AVB",
    "ELBO",
    "GAN",
    "IWAE",
    "NWJ",
    "VAEGAN",
    "VGH",
    "WAE",
    "AdaptiveContrast",
    "AlphaGAN",
    "AmortizedGuide",
    "BetaTCVAE",
    "Compiled",
    "CriticOptions",
    "CyclicalSchedule",
    "DonskerVaradhan",
    "EnergyKernel",
    "FactorVAE",
    "FitOptions",
    "GaussianKernel",
    "Hinge",
    "Hybrid",
    "InfoVAE",
    "InverseMultiquadraticKernel",
    "JensenShannon",
    "LaplacianKernel",
    "LeastSquares",
    "LinearSchedule",
    "Logistic",
    "NonFiniteLoss",
    "Objective",
    "OutputExistsError",
    "Ratio",
    "Renyi",
    "Run",
    "Telescoping",
    "TwoStageGuide",
    "VGHPlusPlus",
    "Wasserstein",
    "WithPrior",
    "WriteError",
    "fit",
    "load",
    "maximum_mean_discrepancy",
    "refit_prior",
    "save",
]

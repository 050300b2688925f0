"""Evaluation: how likely held-out data are, what the latents carry, samples, and posteriors for ArviZ."""

from pyrogen.evaluation.annealing import (
    AnnealedImportanceSampling,
    BidirectionalMonteCarlo,
    annealed_importance_sampling,
    annealing,
    bidirectional_monte_carlo,
)
from pyrogen.evaluation.calibration import RatioCalibration, calibrate_ratio, fit_ratio
from pyrogen.evaluation.critics import CriticEstimates, critic_estimates
from pyrogen.evaluation.explicit import explicit_guide
from pyrogen.evaluation.gaps import InferenceGap, inference_gap
from pyrogen.evaluation.held_out import HeldOutEstimate, held_out_marginal_kl_estimate, held_out_rate_estimate
from pyrogen.evaluation.inference_data import to_arviz
from pyrogen.evaluation.likelihood import (
    ImportanceSampling,
    bits_per_dimension,
    importance_sampling,
    log_likelihood,
)
from pyrogen.evaluation.marginals import MarginalKL, marginal_kl, mutual_information
from pyrogen.evaluation.rates import RateDistortion, rate_distortion
from pyrogen.evaluation.samples import posterior_samples, prior_samples, reconstruct, sample
from pyrogen.evaluation.summary import Evaluation, evaluate
from pyrogen.evaluation.units import ActiveUnits, active_units

__all__ = [
    "ActiveUnits",
    "AnnealedImportanceSampling",
    "BidirectionalMonteCarlo",
    "CriticEstimates",
    "Evaluation",
    "HeldOutEstimate",
    "ImportanceSampling",
    "InferenceGap",
    "MarginalKL",
    "RateDistortion",
    "RatioCalibration",
    "active_units",
    "annealed_importance_sampling",
    "annealing",
    "bidirectional_monte_carlo",
    "bits_per_dimension",
    "calibrate_ratio",
    "critic_estimates",
    "evaluate",
    "explicit_guide",
    "fit_ratio",
    "held_out_marginal_kl_estimate",
    "held_out_rate_estimate",
    "importance_sampling",
    "inference_gap",
    "log_likelihood",
    "marginal_kl",
    "mutual_information",
    "posterior_samples",
    "prior_samples",
    "rate_distortion",
    "reconstruct",
    "sample",
    "to_arviz",
]

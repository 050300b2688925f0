"""Evaluation: how far each distribution is from the one it should match, samples, and posteriors for ArviZ."""

from pyrogen.evaluation.annealing import (
    AnnealedImportanceSampling,
    BidirectionalMonteCarlo,
    annealed_importance_sampling,
    annealing,
    bidirectional_monte_carlo,
)
from pyrogen.evaluation.calibration import RatioCalibration, calibrate_ratio, fit_ratio
from pyrogen.evaluation.class_diversity import Diversity, diversity
from pyrogen.evaluation.critics import CriticEstimates, critic_estimates
from pyrogen.evaluation.diagnosis import Diagnosis, Finding, diagnose
from pyrogen.evaluation.dimensions import TotalCorrelation, total_correlation
from pyrogen.evaluation.explicit import explicit_guide
from pyrogen.evaluation.features import FeatureClassifier, feature_classifier
from pyrogen.evaluation.gaps import InferenceGap, inference_gap
from pyrogen.evaluation.held_out import HeldOutEstimate, held_out_marginal_kl_estimate, held_out_rate_estimate
from pyrogen.evaluation.held_out_dimensions import (
    HeldOutDimensions,
    held_out_dimension_kl_estimate,
    held_out_total_correlation_estimate,
)
from pyrogen.evaluation.inception_v3 import inception
from pyrogen.evaluation.inference_data import reference_posterior, to_arviz
from pyrogen.evaluation.likelihood import ImportanceSampling, bits_per_dimension, importance_sampling, log_likelihood
from pyrogen.evaluation.marginals import MarginalKL, marginal_kl, mutual_information
from pyrogen.evaluation.modes import ModeCoverage, mode_coverage
from pyrogen.evaluation.neighbours import (
    DataCopying,
    Neighbours,
    PrecisionRecall,
    data_copying,
    nearest_neighbours,
    precision_recall,
)
from pyrogen.evaluation.pareto import ParetoDiagnostic, pareto_diagnostic, pareto_k
from pyrogen.evaluation.prior_match import MeanDiscrepancy, PriorHoles, mmd, prior_holes
from pyrogen.evaluation.rates import RateDistortion, rate_distortion
from pyrogen.evaluation.reference import ReferencePosterior, nuts
from pyrogen.evaluation.samples import posterior_samples, prior_samples, reconstruct, sample
from pyrogen.evaluation.simulation_based import SimulationBasedCalibration, UnitRanks, simulation_based_calibration
from pyrogen.evaluation.summary import Evaluation, evaluate
from pyrogen.evaluation.tarp import TARP, tarp
from pyrogen.evaluation.two_samples import C2ST, c2st, sliced_wasserstein
from pyrogen.evaluation.uniform_ranks import ecdf_band
from pyrogen.evaluation.units import ActiveUnits, active_units
from pyrogen.evaluation.visible import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from pyrogen.evaluation.wasserstein import WassersteinCritic, wasserstein_critic

__all__ = [
    "C2ST",
    "TARP",
    "ActiveUnits",
    "AnnealedImportanceSampling",
    "BidirectionalMonteCarlo",
    "CriticEstimates",
    "DataCopying",
    "Diagnosis",
    "Diversity",
    "Evaluation",
    "FeatureClassifier",
    "Finding",
    "FrechetDistance",
    "HeldOutDimensions",
    "HeldOutEstimate",
    "ImportanceSampling",
    "InceptionScore",
    "InferenceGap",
    "KernelDistance",
    "MarginalKL",
    "MeanDiscrepancy",
    "ModeCoverage",
    "Neighbours",
    "ParetoDiagnostic",
    "PrecisionRecall",
    "PriorHoles",
    "RateDistortion",
    "RatioCalibration",
    "ReferencePosterior",
    "SimulationBasedCalibration",
    "TotalCorrelation",
    "UnitRanks",
    "WassersteinCritic",
    "active_units",
    "annealed_importance_sampling",
    "annealing",
    "bidirectional_monte_carlo",
    "bits_per_dimension",
    "c2st",
    "calibrate_ratio",
    "critic_estimates",
    "data_copying",
    "diagnose",
    "diversity",
    "ecdf_band",
    "evaluate",
    "explicit_guide",
    "feature_classifier",
    "fit_ratio",
    "frechet_distance",
    "held_out_dimension_kl_estimate",
    "held_out_marginal_kl_estimate",
    "held_out_rate_estimate",
    "held_out_total_correlation_estimate",
    "importance_sampling",
    "inception",
    "inception_score",
    "inference_gap",
    "kernel_distance",
    "log_likelihood",
    "marginal_kl",
    "mmd",
    "mode_coverage",
    "mutual_information",
    "nearest_neighbours",
    "nuts",
    "pareto_diagnostic",
    "pareto_k",
    "posterior_samples",
    "precision_recall",
    "prior_holes",
    "prior_samples",
    "rate_distortion",
    "reconstruct",
    "reference_posterior",
    "sample",
    "simulation_based_calibration",
    "sliced_wasserstein",
    "tarp",
    "to_arviz",
    "total_correlation",
    "wasserstein_critic",
]

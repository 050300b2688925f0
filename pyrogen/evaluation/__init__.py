"""Evaluation: how likely held-out data are, what the latents carry, samples, and posteriors for ArviZ."""

from pyrogen.evaluation.calibration import RatioCalibration, calibrate_ratio, fit_ratio
from pyrogen.evaluation.inference_data import to_arviz
from pyrogen.evaluation.likelihood import ImportanceSampling, importance_sampling, log_likelihood
from pyrogen.evaluation.rates import RateDistortion, rate_distortion
from pyrogen.evaluation.samples import posterior_samples, prior_samples, reconstruct, sample
from pyrogen.evaluation.summary import Evaluation, evaluate
from pyrogen.evaluation.units import ActiveUnits, active_units

__all__ = [
    "ActiveUnits",
    "Evaluation",
    "ImportanceSampling",
    "RateDistortion",
    "RatioCalibration",
    "active_units",
    "calibrate_ratio",
    "evaluate",
    "fit_ratio",
    "importance_sampling",
    "log_likelihood",
    "posterior_samples",
    "prior_samples",
    "rate_distortion",
    "reconstruct",
    "sample",
    "to_arviz",
]

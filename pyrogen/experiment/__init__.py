"""Experiments: fit several guides, compare them fairly, and leave everything in one folder."""

from pyrogen.experiment.artifacts import join_posteriors
from pyrogen.experiment.comparison import compare
from pyrogen.experiment.settings import CompareSettings, FitSettings, Settings
from pyrogen.experiment.table import Comparison

__all__ = ["CompareSettings", "Comparison", "FitSettings", "Settings", "compare", "join_posteriors"]

"""Real data sets as tensors, and toy problems with known answers."""

from pyrogen.data.dataset import Data, as_float
from pyrogen.data.loading import NAMES, load
from pyrogen.data.mixtures import GaussianMixture2d, grid, ring
from pyrogen.data.published import DataNotFoundError
from pyrogen.data.toys import EightSchools, EightSchoolsPosterior, FourPoints, LinearGaussian

__all__ = [
    "NAMES",
    "Data",
    "DataNotFoundError",
    "EightSchools",
    "EightSchoolsPosterior",
    "FourPoints",
    "GaussianMixture2d",
    "LinearGaussian",
    "as_float",
    "grid",
    "load",
    "ring",
]

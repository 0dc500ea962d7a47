"""The generalized Gaussian distribution: fits of weights, and everything else that a distribution gives."""

from . import divergence as divergence  # registers the divergence
from .checks import FitError
from .distribution import GeneralizedGaussian
from .fitting import fit, fit_many, fit_stream
from .moments import Moments
from .result import GGDFit
from .special import SHAPE_MAX, SHAPE_MIN, moment_ratio, shape_from_ratio


__all__ = [
    "SHAPE_MAX",
    "SHAPE_MIN",
    "FitError",
    "GGDFit",
    "GeneralizedGaussian",
    "Moments",
    "fit",
    "fit_many",
    "fit_stream",
    "moment_ratio",
    "shape_from_ratio",
]

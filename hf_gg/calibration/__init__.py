"""Calibrated rounding: codes chosen for the least error of a layer's outputs, torch only."""

from __future__ import annotations

from .moments import Metric, SecondMoments, metric_of
from .rounding import Rounded, round_weight


__all__ = ["Metric", "Rounded", "SecondMoments", "metric_of", "round_weight"]

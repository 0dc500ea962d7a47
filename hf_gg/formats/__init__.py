"""Number formats of weights: numbers in, numbers out, torch only.

A new format is one new instance (or file) and one line in `FORMATS`.
"""

from __future__ import annotations

from .base import WeightFormat
from .grid import GRID, Grid
from .rf8 import RF8, RF8_E5, RF8X, ROUNDINGS, ResidualFloat
from .scaling import SCALES
from .steps import StepRule


FORMATS: dict[str, WeightFormat] = {fmt.name: fmt for fmt in (RF8, RF8X, RF8_E5, GRID)}


def get_format(name: str | WeightFormat) -> WeightFormat:
    """Return a weight format by its name.

    Args:
        name: one of `"rf8"`, `"rf8x"`, `"rf8-e5"`, `"grid"`; an instance is returned as it is.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(name, WeightFormat):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"Unknown weight format {name!r}: use one of {', '.join(map(repr, FORMATS))}.")
    return FORMATS[name]


__all__ = ["FORMATS", "ROUNDINGS", "SCALES", "Grid", "ResidualFloat", "StepRule", "WeightFormat", "get_format"]

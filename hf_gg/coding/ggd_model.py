"""Frequencies of uniform levels from two parameters: a generalized Gaussian density, integrated over their cells.

Level ±m has the cell from m - 1/2 to m + 1/2, the density at t is proportional to 2^-(|t| / α)^β. Encoder and decoder
must get the same integers on every machine, so the frequencies come from additions, multiplications and divisions of
float64 alone, each rounded once, in an order that `docs/coded-checkpoints.md` fixes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from .models import check_frequencies, entropy_of_counts


PARAMETER_BYTES = 5
_POINTS = 8  # of the density in each cell
_SCALE_STEPS, _SHAPE_STEPS = 1024, 1024  # of log2 α in one octave, and of β
_LN2 = 0.6931471805599453
_MOST_MAGNITUDE = 127
# Of the search, in log2 of the mean and of the shape; and when it may give up, at how many times the margin.
_STEPS = (0.5, 0.25, 0.25, 0.1, 0.1, 0.05, 0.02)
_JUDGED, _HOPELESS = 1, 10.0


def applies(counts: np.ndarray) -> bool:
    """Whether counts, int64 [256], are of levels in sign-magnitude codes: no minus zero, and both signs occur."""
    return not counts[128] and bool(counts[1:128].any()) and bool(counts[129:].any())


def read_frequencies(parameters: bytes, bits: int) -> np.ndarray:
    """Frequencies, int64 [256], of stored parameters.

    Raises:
        ValueError: saying what is wrong; the caller names the tensor.
    """
    if len(parameters) != PARAMETER_BYTES:
        raise ValueError(f"{len(parameters)} bytes of GGD parameters, not {PARAMETER_BYTES}")
    magnitude = parameters[0]
    scale, shape = int.from_bytes(parameters[1:3], "little"), int.from_bytes(parameters[3:5], "little")
    if not 1 <= magnitude <= _MOST_MAGNITUDE or shape == 0:
        raise ValueError(f"GGD parameters out of range: largest level {magnitude}, shape {shape}")
    spread = shape / _SHAPE_STEPS * (_log2_points()[: _POINTS * magnitude + 4] - (scale - 32768) / _SCALE_STEPS)
    power = _exp2(np.clip(spread, -1000.0, 10.0))
    cells = _cells(np.where(power < 1000.0, _exp2(-np.minimum(power, 1000.0)), 0.0))
    total = cells[0]
    for cell in cells[1:].tolist():
        total = total + 2.0 * cell
    if not total > 0.0:
        raise ValueError(f"GGD parameters that give nothing to any level: scale {scale}, shape {shape}")
    room = (1 << bits) - (2 * magnitude + 1)
    shares = 1 + np.floor(cells / total * room).astype(np.int64)
    frequencies = np.zeros(256, np.int64)
    frequencies[: magnitude + 1] = shares
    frequencies[129 : 129 + magnitude] = shares[1:]
    frequencies[0] += (1 << bits) - int(frequencies.sum())
    check_frequencies(frequencies, bits)
    return frequencies


def fit(counts: np.ndarray, margin: float) -> bytes | None:
    """Parameters with nearly the shortest code for counted levels, int64 [256], to which the model applies.

    Args:
        counts: of the symbols.
        margin: bits a symbol over the entropy that would still be of use.

    Returns:
        The parameters, or None once it is clear that the margin cannot be met.
    """
    folded = counts[:128] + np.append(0, counts[129:])
    magnitude = int(np.flatnonzero(folded)[-1])
    folded = folded[: magnitude + 1] / folded.sum()
    points = (np.arange(_POINTS * magnitude + 4) + 0.5) / _POINTS

    def parameters(spread: float, peak: float) -> tuple[int, int]:
        """Scale and shape in their steps, of a density of mean 2^spread and shape 2^peak."""
        shape = 2.0**peak
        ratio = (math.lgamma(1 / shape) - math.lgamma(2 / shape) + math.log(_LN2) / shape) / _LN2
        steps = 32768 + round(_SCALE_STEPS * (spread + ratio)), round(_SHAPE_STEPS * shape)
        return max(0, min(65535, steps[0])), max(1, min(65535, steps[1]))

    def bits_of(spread: float, peak: float) -> float:
        """Bits a symbol."""
        scale, shape = parameters(spread, peak)
        with np.errstate(over="ignore", under="ignore"):
            power = (points / 2.0 ** ((scale - 32768) / _SCALE_STEPS)) ** (shape / _SHAPE_STEPS)
            cells = _cells(np.exp2(-power))
        total = float(cells[0] + 2 * cells[1:].sum())
        # nothing gets less than a share when it is rounded to frequencies
        return -float((folded * np.log2(np.maximum(cells / total, 2.0**-17))).sum()) if total > 0 else math.inf

    mean = float((folded * np.arange(magnitude + 1)).sum())
    # a smaller start would lie on a plateau, where nothing is left for any level but 0
    place, least = [math.log2(max(mean, 0.3)), 0.5], entropy_of_counts(counts)
    best = bits_of(*place)
    for trial, step in enumerate(_STEPS):
        for axis in (0, 1):
            best = _parabola(bits_of, place, axis, step, best)
        if trial == _JUDGED and best - least > _HOPELESS * (margin + 0.001):
            return None
    scale, shape = parameters(*place)
    return bytes((magnitude,)) + scale.to_bytes(2, "little") + shape.to_bytes(2, "little")


def _parabola(
    function: Callable[[float, float], float], place: list[float], axis: int, step: float, here: float
) -> float:
    """Move `place` along an axis to the least of three values and of the parabola through them; the value there."""

    def at(offset: float) -> float:
        moved = list(place)
        moved[axis] += offset
        return function(*moved)

    found = {0.0: here, -step: at(-step), step: at(step)}
    bend = found[-step] - 2 * here + found[step]
    if bend > 0 and math.isfinite(bend):
        vertex = max(-2.0, min(2.0, (found[-step] - found[step]) / (2 * bend))) * step
        found.setdefault(vertex, at(vertex))
    least = min(found, key=lambda offset: found[offset])
    place[axis] += least
    return found[least]


@functools.cache
def _log2_points() -> np.ndarray:
    """log2 of (i + 1/2) / 8, float64: by the odd series of the area hyperbolic tangent on [1/√2, √2)."""
    mantissa, exponent = np.frexp((np.arange(_POINTS * _MOST_MAGNITUDE + 4) + 0.5) / _POINTS)
    small = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(small, 2.0 * mantissa, mantissa), exponent - small
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square, series = z * z, np.zeros_like(z)
    for odd in range(25, 0, -2):
        series = series * square + 1.0 / odd
    return 2.0 * z * series / _LN2 + exponent


def _exp2(y: np.ndarray) -> np.ndarray:
    """2^y, float64, for |y| <= 1000: the series of the exponential function on [0, ln 2)."""
    whole = np.floor(y)
    f, series = (y - whole) * _LN2, np.ones_like(y)
    for k in range(14, 0, -1):
        series = series * f / k + 1.0
    return np.ldexp(series, whole.astype(np.int64))


def _cells(density: np.ndarray) -> np.ndarray:
    """Sums over the points of each magnitude's cell; that of 0 counts its points twice, for both signs."""
    first = density[0] + density[1] + density[2] + density[3]
    rest = density[4:].reshape(-1, _POINTS)
    sums = rest[:, 0]
    for point in range(1, _POINTS):
        sums = sums + rest[:, point]
    return np.concatenate([[2.0 * first], sums])

"""Frequencies of uniform levels from two parameters: a generalized Gaussian density, integrated over their cells.

Level ±m has the cell from m - 1/2 to m + 1/2, the density at t is proportional to 2^-(|t| / α)^β. Encoder and decoder
must get the same integers on every machine, so the frequencies come from additions, multiplications and divisions of
float64 alone, each rounded once, in an order that `docs/coded-checkpoints.md` fixes.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .models import check_frequencies, entropy_of_counts


PARAMETER_BYTES = 5
_POINTS = 8  # of the density in each cell
_SCALE_STEPS, _SHAPE_STEPS = 1024, 1024  # of log2 α in one octave, and of β
_LN2 = 0.6931471805599453
_MOST_MAGNITUDE = 127
# Of the search: nine places around the middle of a step, and the quadratic function of least squares through them.
_NINE = np.array([(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])
_POWERS = ((1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (0, 0))
_QUADRATIC = np.linalg.pinv(np.stack([_NINE[:, 0] ** i * _NINE[:, 1] ** j for i, j in _POWERS], 1))
_FINE = 8  # so many levels next to 0 get all points of the density, the others two
_ROUNDS, _JUDGED, _HOPELESS = 9, 2, 10.0  # when it ends; when it may give up, at how many times the margin


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
    occurs = np.flatnonzero(folded)
    points = _search_points(magnitude)

    def parameters(place: np.ndarray) -> tuple[int, int]:
        """Scale and shape in their steps, of a density of mean 2^place[0] and shape 2^place[1]."""
        shape = 2.0 ** float(place[1])
        ratio = (math.lgamma(1 / shape) - math.lgamma(2 / shape) + math.log(_LN2) / shape) / _LN2
        steps = 32768 + round(_SCALE_STEPS * (float(place[0]) + ratio)), round(_SHAPE_STEPS * shape)
        return max(0, min(65535, steps[0])), max(1, min(65535, steps[1]))

    def bits_of(places: np.ndarray) -> np.ndarray:
        """Bits a symbol at each place [n, 2]."""
        scale, shape = np.array([parameters(place) for place in places], np.float64).T[:, :, None]
        power = np.exp2(np.minimum(shape / _SHAPE_STEPS * (points - (scale - 32768) / _SCALE_STEPS), 10.0))
        cells = _search_cells(np.exp2(-power), magnitude)
        total = 2 * cells.sum(1, keepdims=True) - cells[:, :1]
        some = total > 0
        # nothing gets less than a share when it is rounded to frequencies
        share = np.maximum(cells[:, occurs] / np.where(some, total, 1.0), 2.0**-17)
        return np.where(some[:, 0], -(np.log2(share) @ folded[occurs]), math.inf)

    least, middle = entropy_of_counts(counts), _start(folded)
    step = 0.15 if magnitude > 1 else 0.5
    best, place = math.inf, middle
    for trial in range(_ROUNDS):
        places = middle + step * _NINE
        values = bits_of(places)
        if values.min() < best:
            best, place = float(values.min()), places[values.argmin()]
        if trial == _JUDGED and best - least > _HOPELESS * (margin + 0.001):
            return None
        move = _vertex(values)
        middle = place if move is None else middle + step * move
        if move is not None and np.abs(move).max() < 1.1:
            if step < 0.03:
                break
            step *= 0.3
    if bits_of(middle[None])[0] < best:
        place = middle
    scale, shape = parameters(place)
    return bytes((magnitude,)) + scale.to_bytes(2, "little") + shape.to_bytes(2, "little")


def _start(folded: np.ndarray) -> np.ndarray:
    """log2 of mean and shape of the density that has the moments of folded shares; at low rates their share of 0."""
    levels = np.arange(len(folded))
    mean = float(folded @ levels)
    if mean > 0.5:
        # rounding adds a twelfth to the second moment
        ratio = math.log2(max(float(folded @ levels**2) - 1 / 12, 1e-9) / mean**2)
        return np.array([math.log2(mean), np.interp(ratio, *_moment_ratios())])
    if folded[0] > 0:
        return np.array([math.log2(-0.5 / math.log(1 - folded[0])), 0.0])
    return np.zeros(2)


def _vertex(values: np.ndarray) -> np.ndarray | None:
    """The minimum, in steps and at most two away, of the quadratic function through the values at nine places."""
    if not np.isfinite(values).all():
        return None
    x, y, xx, xy, yy, _ = _QUADRATIC @ values
    bend = 4 * xx * yy - xy * xy
    if not (bend > 0 and xx > 0):
        return None
    vertex = np.array([xy * y - 2 * yy * x, xy * x - 2 * xx * y]) / bend
    return vertex / max(1.0, float(np.abs(vertex).max()) / 2)


@functools.cache
def _moment_ratios() -> tuple[np.ndarray, np.ndarray]:
    """log2 of E[x²] / E[|x|]², rising, and log2 of the shape that has it."""
    peaks = np.linspace(3.2, -2.5, 120)
    shapes = (2.0**peaks).tolist()
    ratios = [math.lgamma(1 / shape) + math.lgamma(3 / shape) - 2 * math.lgamma(2 / shape) for shape in shapes]
    return np.array(ratios) / _LN2, peaks


@functools.cache
def _search_points(magnitude: int) -> np.ndarray:
    """log2 of the places at which the search looks at the density; to the bit on no machine but this."""
    fine = min(magnitude, _FINE)
    places = (np.arange(_POINTS * fine + 4) + 0.5) / _POINTS
    return np.log2(np.append(places, fine + 0.5 + (np.arange(2 * (magnitude - fine)) + 0.5) / 2))


def _search_cells(density: np.ndarray, magnitude: int) -> np.ndarray:
    """Sums [n, magnitude + 1] over the cells of densities [n, points]; that of 0 counts twice."""
    fine = min(magnitude, _FINE)
    end = _POINTS * fine + 4
    return np.concatenate(
        [
            2 * density[:, :4].sum(1, keepdims=True),
            density[:, 4:end].reshape(len(density), fine, _POINTS).sum(2),
            density[:, end:].reshape(len(density), magnitude - fine, 2).sum(2) * (_POINTS / 2),
        ],
        axis=1,
    )


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

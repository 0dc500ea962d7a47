"""Figures of a sorted sample that need few of its values: distances, entropies, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np


# The first look at a sample, and how an interval is cut that may hold the largest distance.
_FIRST, _CUT = 2048, 8
# Levels of a grid that are counted at once.
_LEVELS = 1 << 16


def kolmogorov_smirnov(ordered: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest distance between a sample's distribution function and `cdf`: exact, ties included.

    Both functions rise. Between two values whose distances are known no distance exceeds one rise plus that of the
    ends, so only intervals that may still hold the largest are looked into: thousands of evaluations for millions of
    values.

    Args:
        ordered: the sample, ascending, [n].
        cdf: float64 to float64, non-decreasing.
    """
    n = len(ordered)

    def at(index: np.ndarray) -> np.ndarray:
        return cdf(ordered[index].astype(np.float64))

    index = np.unique(np.linspace(0, n - 1, min(n, _FIRST)).astype(np.int64))
    value = at(index)
    best = max(float(((index + 1) / n - value).max()), float((value - index / n).max()))
    left, right, low, high = index[:-1], index[1:], value[:-1], value[1:]
    while True:
        bound = np.maximum(right / n - low, high - (left + 1) / n)
        open_ = (bound > best) & (right - left > 1)
        if not open_.any():
            return best
        left, right, low, high = left[open_], right[open_], low[open_], high[open_]
        # whole numbers: equal ends make empty intervals, which the next round leaves out
        cuts = left[:, None] + (right - left)[:, None] * np.arange(_CUT + 1) // _CUT
        values = np.empty(cuts.shape)
        values[:, 0], values[:, -1] = low, high
        inner = cuts[:, 1:-1]
        values[:, 1:-1] = at(inner.ravel()).reshape(inner.shape)
        best = max(best, float(((cuts + 1) / n - values).max()), float((values - cuts / n).max()))
        left, right = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
        low, high = values[:, :-1].ravel(), values[:, 1:].ravel()


def grid_entropy(ordered: np.ndarray, step: float) -> float:
    """Order-0 entropy of `round(w / step)`, bits a value.

    Args:
        ordered: the sample, ascending, [n].
        step: of the grid, positive; zero is a level.
    """
    counts, start, n = [], 0, len(ordered)
    while start < n:
        # from the first value's level on; the values beyond these levels are left for another turn
        level = round(float(ordered[start]) / step)
        last = round(float(ordered[-1]) / step)
        edges = (level + 0.5 + np.arange(min(_LEVELS, last - level + 1))) * step
        ends = position(ordered, edges, "right")
        counts.append(np.diff(ends, prepend=start))
        # rounding an edge to the sample's precision must not stop the walk
        start = max(int(ends[-1]), start + 1)
    share = np.concatenate(counts)
    share = share[share > 0] / n
    return float(-(share * np.log2(share)).sum()) + 0.0


def count_outside(ordered: np.ndarray, low: float, high: float) -> int:
    """How many values are below `low` or above `high`."""
    return int(position(ordered, low, "left") + len(ordered) - position(ordered, high, "right"))


def position(ordered: np.ndarray, value, side: Literal["left", "right"] = "left") -> np.ndarray:
    """Where `value` (a number or an array) belongs in a sorted sample.

    NumPy would make a float64 copy of a float32 sample to compare it with float64 numbers.
    """
    return np.searchsorted(ordered, np.asarray(value, dtype=ordered.dtype), side=side)

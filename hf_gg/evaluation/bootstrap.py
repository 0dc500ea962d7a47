"""Confidence intervals of means over documents, by drawing documents again (Efron's percentile interval)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np


_DRAWS_AT_ONCE = 500


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None at the ends where one document cannot give any."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The fields by name."""
        return asdict(self)


def interval(
    sums: np.ndarray,
    counts: np.ndarray,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
) -> Estimate:
    """A mean over all tokens, and between which values it lies when other documents of the kind had been drawn.

    Args:
        sums: a figure summed over the tokens of each document, `[documents]`.
        counts: tokens of each document, `[documents]`.
        confidence: share of the draws between the ends.
        draws: times that as many documents are drawn with replacement.
        seed: of the draws; the same documents are drawn for every figure.
        transform: of the mean, such as `numpy.exp` for perplexity.

    Raises:
        ValueError: no document, shapes that differ, a figure that is not finite, or settings that make no sense.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if sums.shape != counts.shape or sums.ndim != 1 or not len(sums) or not (counts > 0).all():
        raise ValueError(f"sums and counts of at least one document are wanted, got {sums.shape} and {counts.shape}.")
    if not np.isfinite(sums).all():
        raise ValueError(f"The figure of document {int(np.flatnonzero(~np.isfinite(sums))[0])} is not finite.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    value = float(transform(sums.sum() / counts.sum()))
    if len(sums) == 1:
        return Estimate(value)
    random, means = np.random.default_rng(seed), []
    for begin in range(0, draws, _DRAWS_AT_ONCE):
        index = random.integers(len(sums), size=(min(_DRAWS_AT_ONCE, draws - begin), len(sums)))
        means.append(sums[index].sum(1) / counts[index].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(transform(np.concatenate(means)), (tail, 1 - tail))
    return Estimate(value, float(low), float(high))

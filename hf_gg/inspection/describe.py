"""The statistics of one tensor of weights: fits of three laws, how far off each is, and what coding it would cost."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from ..ggd import FitError, GGDFit, Moments, fit
from .distance import count_outside, grid_entropy, kolmogorov_smirnov, position


# Fewer values say nothing about a shape.
_FEWEST = 16
# The fourth power of a magnitude outside of these leaves float64.
_SMALL, _LARGE = 1e-75, 1e75
# Edges of the histogram, in standard deviations from the mean.
BINS = np.linspace(-12.0, 12.0, 241)
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Statistics:
    """Figures of one tensor. Lengths are in the unit of the weights, entropies in bits.

    Attributes:
        mean: of the weights.
        std: their standard deviation.
        median: their median, which is the fitted Laplace's location.
        deviation: mean distance to the median, which is the fitted Laplace's scale.
        kurtosis: E[(w - mean)⁴] / std⁴: 3 for a Gaussian, 6 for a Laplace.
        minimum: the smallest weight.
        maximum: the largest.
        zeros: share of exact zeros.
        shape: ν by maximum likelihood.
        shape_stderr: its standard error, if the law is right and the weights independent; None where ν is clamped.
        scale: α by maximum likelihood.
        loc: μ by maximum likelihood.
        shape_moments: ν by moments.
        scale_moments: α by moments.
        ks_ggd: Kolmogorov–Smirnov distance of the GGD fitted by maximum likelihood, exact.
        ks_ggd_moments: of the GGD fitted by moments.
        ks_gaussian: of the Gaussian of the same mean and standard deviation.
        ks_laplace: of the Laplace by maximum likelihood (median, mean distance to it).
        entropy: differential entropy of the GGD fitted by likelihood: log2(2αΓ(1/ν)/ν) + 1/(ν ln 2).
        step: Δ of the uniform grid whose error Δ²/12 is the wanted one: std · sqrt(12 · 10^(-snr/10)).
        bits: predicted bits a weight on that grid with an entropy coder: max(0, entropy - log2 Δ).
        bits_measured: order-0 entropy of round(w / Δ), counted.
        outliers: share of weights farther than `outlier_at` standard deviations from the mean.
        outliers_predicted: what the fitted GGD has there.
        histogram: counts between the edges `BINS` (in standard deviations from the mean).
        notes: what to know before believing the figures.
    """

    mean: float
    std: float
    median: float
    deviation: float
    kurtosis: float
    minimum: float
    maximum: float
    zeros: float
    shape: float
    shape_stderr: float | None
    scale: float
    loc: float
    shape_moments: float
    scale_moments: float
    ks_ggd: float
    ks_ggd_moments: float
    ks_gaussian: float
    ks_laplace: float
    entropy: float
    step: float
    bits: float
    bits_measured: float
    outliers: float
    outliers_predicted: float
    histogram: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def nearest(self) -> str:
        """The law with the smallest Kolmogorov–Smirnov distance: `"GGD"`, `"Gaussian"` or `"Laplace"`."""
        laws = {"GGD": self.ks_ggd, "Gaussian": self.ks_gaussian, "Laplace": self.ks_laplace}
        return min(laws, key=laws.__getitem__)


class NoFit(ValueError):
    """A tensor has no fit; the message is the reason."""


def describe(weights: torch.Tensor, snr: float = 30.0, outlier_at: float = 6.0) -> Statistics:
    """Fit a tensor and measure the fits.

    One sorted copy is made, in float32 (float64 for float64 weights); besides it and the tensor nothing of their size.

    Args:
        weights: floating point, any shape, on the CPU.
        snr: signal to quantization noise that `bits` are for, dB.
        outlier_at: standard deviations.

    Raises:
        NoFit: empty, constant, NaN or infinity in it, fewer than 16 values, or powers that float64 cannot hold.
        TypeError: not floating point.
    """
    if not weights.is_floating_point():
        raise TypeError(f"describe needs floating point weights, got {weights.dtype}.")
    flat = weights.detach().reshape(-1)
    ordered = _sorted(flat)
    reason = why_no_fit(ordered)
    if reason is not None:
        raise NoFit(reason)
    moments = Moments().update(flat)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            by_moments, by_likelihood = moments.fit(), fit(flat, method="mle")
        except FitError as error:
            raise NoFit(str(error)) from error
    notes = _notes(ordered, by_likelihood, by_moments)
    # of a clamped shape the notes say more
    notes += tuple(str(warning.message) for warning in caught if "clamped" not in str(warning.message))
    result = _measure(ordered, by_likelihood, by_moments, moments, snr, outlier_at, notes)
    wrong = [name for name, value in vars(result).items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        raise NoFit(f"values too large or too small for the {wrong[0]} in float64")
    return result


def why_no_fit(ordered: np.ndarray) -> str | None:
    """Why a sorted sample has no fit, None if it has one."""
    n = len(ordered)
    if n == 0:
        return "empty"
    first_nan = int(position(ordered, np.inf, "right"))
    nans = n - first_nan
    infinite = first_nan - int(position(ordered, np.inf)) + int(position(ordered, -np.inf, "right"))
    if nans or infinite:
        found = [f"{count:,} {what}" for count, what in ((nans, "NaN"), (infinite, "infinite")) if count]
        return f"{' and '.join(found)} of {n:,} values"
    if n == 1:
        return f"a single value, {ordered[0]:g}"
    if ordered[0] == ordered[-1]:
        return "all zero" if ordered[0] == 0 else f"constant, {ordered[0]:g}"
    if n < _FEWEST:
        return f"{n} values, too few for a fit"
    peak = max(-float(ordered[0]), float(ordered[-1]))
    if not _SMALL < peak < _LARGE:
        return f"values up to {peak:g}, whose fourth powers float64 cannot hold"
    return None


def _sorted(flat: torch.Tensor) -> np.ndarray:
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    ordered = np.empty(len(flat), dtype=np.float64 if dtype == torch.float64 else np.float32)
    for start in range(0, len(flat), _CHUNK):
        ordered[start : start + _CHUNK] = flat[start : start + _CHUNK].to(dtype).numpy()
    ordered.sort()
    return ordered


def _measure(
    ordered: np.ndarray,
    mle: GGDFit,
    by_moments: GGDFit,
    moments: Moments,
    snr: float,
    outlier_at: float,
    notes: tuple[str, ...],
) -> Statistics:
    n, law, mean, std = len(ordered), mle.distribution(), moments.mean, moments.std
    entropy = float(law.entropy()) / math.log(2)
    step = std * math.sqrt(12 * 10 ** (-snr / 10))
    median = float(ordered[(n - 1) // 2]) / 2 + float(ordered[n // 2]) / 2
    deviation = sum(_distance(ordered[i : i + _CHUNK], median) for i in range(0, n, _CHUNK)) / n
    low, high = mean - outlier_at * std, mean + outlier_at * std
    loc = float(mle.loc)
    beyond = law.cdf(torch.tensor([low, 2 * loc - high], dtype=torch.float64))  # the upper tail by symmetry
    zeros = position(ordered, 0, "right") - position(ordered, 0)
    edges = position(ordered, mean + std * BINS)
    return Statistics(
        mean=mean,
        std=std,
        median=median,
        deviation=deviation,
        kurtosis=moments.kurtosis,
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        zeros=int(zeros) / n,
        shape=float(mle.shape),
        shape_stderr=None if bool(mle.clamped) else float(mle.shape_stderr),
        scale=float(mle.scale),
        loc=loc,
        shape_moments=float(by_moments.shape),
        scale_moments=float(by_moments.scale),
        ks_ggd=kolmogorov_smirnov(ordered, _cdf(law)),
        ks_ggd_moments=kolmogorov_smirnov(ordered, _cdf(by_moments.distribution())),
        ks_gaussian=kolmogorov_smirnov(ordered, _cdf(torch.distributions.Normal(_number(mean), _number(std)))),
        ks_laplace=kolmogorov_smirnov(ordered, _cdf(torch.distributions.Laplace(_number(median), _number(deviation)))),
        entropy=entropy,
        step=step,
        bits=max(0.0, entropy - math.log2(step)),
        bits_measured=grid_entropy(ordered, step),
        outliers=count_outside(ordered, low, high) / n,
        outliers_predicted=float(beyond.sum()),
        histogram=tuple(int(count) for count in np.diff(edges)),
        notes=notes,
    )


def _notes(ordered: np.ndarray, mle: GGDFit, by_moments: GGDFit) -> tuple[str, ...]:
    """What to know of clamped shapes, the most important first."""
    notes = []
    if bool(mle.clamped):
        value, share = _most_frequent(ordered)
        why = "the law fits badly"
        if share > 0.01 and float(mle.shape) < 1:
            why = f"{share:.1%} of the weights are {value:g}, where the likelihood grows without bound; see ν mom"
        notes.append(f"ν is clamped to {float(mle.shape):g}: {why}")
    if bool(by_moments.clamped):
        notes.append(f"ν mom is clamped to {float(by_moments.shape):g}: the law fits badly")
    return tuple(notes)


def _most_frequent(ordered: np.ndarray) -> tuple[float, float]:
    """The value that most of some weights have, and its share: exact for shares above a thousandth."""
    candidates = np.unique(ordered[:: max(1, len(ordered) // 2048)])
    counts = position(ordered, candidates, "right") - position(ordered, candidates)
    best = int(np.argmax(counts))
    return float(candidates[best]), int(counts[best]) / len(ordered)


def _distance(part: np.ndarray, center: float) -> float:
    return float(np.abs(part.astype(np.float64) - center).sum())


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _cdf(law: torch.distributions.Distribution):
    return lambda x: law.cdf(torch.from_numpy(x)).numpy()

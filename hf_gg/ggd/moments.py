"""Streaming moments of weights, and the fit that needs nothing else."""

from __future__ import annotations

import math

import torch

from .checks import FitError, check_loc, check_tensor, no_fit_reason, range_reason
from .result import GGDFit
from .scan import SAMPLE, Sums, as_rows, choose_pivot, scan
from .solve import fit_sums, moved_absolute


class Moments:
    """Sums over a stream of values, each read once: count, mean, variance, kurtosis, extremes, and a moment fit.

        moments = Moments()
        for chunk in chunks:
            moments.update(chunk)
        moments.fit().shape

    Args:
        loc: the location of the distribution, or None to estimate it by the mean.
        higher: also sum third and fourth powers, which `skewness` and `kurtosis` need.

    The absolute moment is summed about `loc`, or about a pivot which the first 4096 values choose: 0 if their mean is
    below 0.05 standard deviations, otherwise that mean. `fit` brings it to the mean by the sum of signs; only the
    values between pivot and mean are counted by the fitted distribution, a term of second order in their distance.

    Raises:
        TypeError: `loc` is not a number. ValueError: `loc` is not finite.
    """

    def __init__(self, loc: float | None = None, higher: bool = True) -> None:
        check_loc(loc)
        self.loc = loc
        self.higher = higher
        self._sums: Sums | None = None
        self._pending: list[torch.Tensor] = []

    def update(self, chunk: torch.Tensor) -> Moments:
        """Add a floating point tensor of any shape, dtype and device. NaN and infinities are counted, not summed.

        Raises:
            TypeError: not a floating point tensor. ValueError: on the meta device.
        """
        check_tensor(chunk, "chunk")
        flat = as_rows(chunk.detach(), None)[0][0]
        if self._sums is None and self.loc is None and not self._pending and len(flat) >= SAMPLE:
            self._start(flat)
        if self._sums is not None or self.loc is not None:
            self._scan(flat)
        elif len(flat):
            self._pending.append(flat.clone())
            if sum(len(p) for p in self._pending) >= SAMPLE:
                self._flush()
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what another one has summed.

        Raises:
            TypeError: not a `Moments`. ValueError: another `loc`, or one of the two lacks the higher sums.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments, got {type(other).__name__}.")
        if other.loc != self.loc or other.higher != self.higher:
            raise ValueError(
                f"cannot merge Moments(loc={other.loc}, higher={other.higher}) into "
                f"Moments(loc={self.loc}, higher={self.higher}): make both alike."
            )
        if other._sums is None:
            for part in other._pending:
                self.update(part)
            return self
        self._flush()
        if self._sums is None:
            self._sums = Sums.empty(other._sums.pivot)
        self._sums.add(_moved(other._sums, self._sums.pivot))
        return self

    def fit(self) -> GGDFit:
        """The generalized Gaussian with these moments, 0-d tensors.

        Raises:
            FitError: no values, one value, all equal, NaN or infinities among them, or values that the pivot does not
                suit.
        """
        sums = self._all()
        reason = no_fit_reason(self.count, self.nonfinite, self.min, self.max, self.loc)
        reason = reason or range_reason(self.min, self.max)
        if reason:
            raise FitError(f"the moments have no fit: {reason}")
        if self.loc is None and abs(self.mean - float(sums.pivot)) > 0.5 * self.std:
            raise FitError(
                f"the first values (mean {float(sums.pivot):g}) are unlike all of them (mean {self.mean:g}, standard "
                f"deviation {self.std:g}), so that their absolute moment says little about the shape: give "
                f"Moments(loc={self.mean:g}), or use fit_stream."
            )
        return fit_sums(sums, (), self.loc)

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self._all().n)

    @property
    def nonfinite(self) -> int:
        """Number of NaN and infinities."""
        return int(self._all().nonfinite)

    @property
    def min(self) -> float:
        """Smallest finite value, NaN if there is none."""
        return float(self._all().low) if self.count else math.nan

    @property
    def max(self) -> float:
        """Largest finite value, NaN if there is none."""
        return float(self._all().high) if self.count else math.nan

    @property
    def absmax(self) -> float:
        """Largest magnitude of the finite values, NaN if there is none."""
        return max(abs(self.min), abs(self.max))

    @property
    def mean(self) -> float:
        """Mean of the finite values, NaN if there is none."""
        sums = self._all()
        return float(sums.pivot + sums.first / sums.n) if self.count else math.nan

    @property
    def var(self) -> float:
        """Variance about the mean, divided by the count; NaN if there is no value.

        Raises:
            ValueError: values whose powers float64 does not hold.
        """
        if self.count and (reason := range_reason(self.min, self.max)):
            raise ValueError(f"the moments cannot be told: {reason}")
        sums = self._all()
        return max(float(sums.second / sums.n - (sums.first / sums.n).square()), 0.0) if self.count else math.nan

    @property
    def std(self) -> float:
        """Standard deviation, the square root of `var`."""
        return math.sqrt(self.var)

    @property
    def skewness(self) -> float:
        """Third central moment over `std` cubed; NaN where `var` is 0.

        Raises:
            ValueError: made with `higher=False`.
        """
        return self._standardized(3)

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over `var` squared: 3 for a Gaussian, 6 for Laplace. NaN where `var` is 0.

        Raises:
            ValueError: made with `higher=False`.
        """
        return self._standardized(4)

    def _standardized(self, order: int) -> float:
        if not self.higher:
            raise ValueError("skewness and kurtosis need the third and fourth powers: use Moments(higher=True).")
        if not self.count or not self.var:
            return math.nan
        sums = self._all()
        m1, m2, m3, m4 = (float(s / sums.n) for s in (sums.first, sums.second, sums.third, sums.fourth))
        if order == 3:
            return (m3 - 3 * m1 * m2 + 2 * m1**3) / self.var**1.5
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / self.var**2

    def _all(self) -> Sums:
        self._flush()
        # nothing is summed yet: the pivot stays open
        return self._sums or Sums.empty(torch.tensor([float(self.loc or 0.0)]))

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        device = pending[0].device
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in pending) else torch.float32
        flat = torch.cat([p.to(device, dtype) for p in pending])
        self._start(flat)
        self._scan(flat)

    def _start(self, flat: torch.Tensor) -> None:
        self._sums = Sums.empty(choose_pivot(flat[None], snap=True))

    def _scan(self, flat: torch.Tensor) -> None:
        if self._sums is None:
            self._sums = Sums.empty(torch.tensor([self.loc], dtype=torch.float64))
        self._sums.add(scan(flat[None], self._sums.pivot, self.higher))


def _moved(sums: Sums, pivot: torch.Tensor) -> Sums:
    """The sums about another pivot: powers exactly, the absolute moment by the distribution that fits the sums."""
    shift = sums.pivot - pivot
    if not bool(shift.any()) or not bool(sums.n.any()):
        return sums if not bool(shift.any()) else Sums.empty(pivot)
    n, s1, s2, s3 = sums.n, sums.first, sums.second, sums.third
    absolute, signs = moved_absolute(sums, pivot)
    return Sums(
        n=n,
        nonfinite=sums.nonfinite,
        pivot=pivot,
        first=s1 + n * shift,
        signs=signs,
        absolute=absolute,
        second=s2 + 2 * shift * s1 + n * shift**2,
        third=s3 + 3 * shift * s2 + 3 * shift**2 * s1 + n * shift**3,
        fourth=sums.fourth + 4 * shift * s3 + 6 * shift**2 * s2 + 4 * shift**3 * s1 + n * shift**4,
        low=sums.low,
        high=sums.high,
    )

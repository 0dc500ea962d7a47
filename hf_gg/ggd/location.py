"""The location where the likelihood has cusps: shapes below about 1.1.

Below 1, Σ|w - μ|^ν has a cusp at every value, and its minimum is one of them. All values of an interval are tried.
They are searched by best-first branch and bound: in a cell, far values act by a polynomial in μ, near ones by no less
than their distance to the cell, so that a whole cell is passed over as soon as its bound exceeds the best cost found.
From 1 on the sum is convex and has one minimum, between two values next to each other.

Short rows are searched as a whole. In a long one the interval is what the median of a sample can err by, or that of
another place which a coarse look at the whole range likes better; it is widened until the likelihood is low at both of
its ends.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from . import kernels
from .scan import odd_step


# Values farther than this from the middle of a cell of half-width 1 enter its polynomial, of degree 8.
_FAR = 6.0
_ORDERS = 9
# Values in a cell that are tried one by one.
_FEW = 8
_CHILDREN = (-0.75, -0.25, 0.25, 0.75)
_MOST_CELLS = 20_000
# Log-likelihood that another shape may give to a location which is worse at this one: at first 100 / n, at most this.
_MOST_SLACK = 0.5
_COARSE = 1024
# Log-likelihood that is missing at the ends of an interval when nothing is looked for beyond.
_SURE = 5.0


@dataclass
class Profile:
    """What the likelihood says about the shape at about its best value.

    Attributes:
        n: number of values.
        nu: the shape ν.
        alpha: the scale α.
        error: standard error of ν.
    """

    n: float
    nu: float
    alpha: float
    error: float


def cusp_location(
    source: Callable[[], Iterator[torch.Tensor]], profile: Profile, sample: torch.Tensor, whole: bool = False
) -> tuple[float, float]:
    """The location μ of the greatest likelihood, for a shape below about 1.1.

    Below 1 it is the value of the data for which the likelihood is greatest after ν follows (to second order).

    Args:
        source: called for readings; yields flat blocks of the values, all finite. Its attribute `x`, if it has one, is
            the row itself.
        profile: of a good shape, to within its standard error.
        sample: values from everywhere, float64 on the CPU [m].
        whole: `sample` are all values; the best of all of them is found.

    Returns:
        The location, and the shape that should be the best one there.
    """
    values, m = sample.numpy(), len(sample)
    ends = float(values.min()), float(values.max())
    low, high = ends
    if whole:
        values = np.sort(values)
    else:
        # what the median of a sample errs by, and then the location of all values
        middle, reach = _coarse(values, profile.nu), int(max(1.5 * m**0.5, 2.5 * m / profile.n**0.5)) + 1
        places = max(middle - reach, 0), min(middle + reach, m - 1)
        low, high = (float(v) for v in np.partition(values, places)[list(places)])
    for _ in range(6):
        center, half = low / 2 + high / 2, high / 2 - low / 2
        if half == 0:  # a large share of the values is the same one
            return center, profile.nu
        shapes = (profile.nu, profile.nu + profile.error)
        if whole:
            near, far = (values - center) / half, np.zeros((2, _ORDERS))
        else:
            near, far = _read(source, center, half, shapes)
        search = _Search(near, far, shapes)
        best, nu = search.best(profile, half)
        if whole or half > ends[1] - ends[0] or search.ends_are_worse(best, profile):
            break
        low, high = center - 4 * half, center + 4 * half
    mu = center + half * best
    return mu if profile.nu >= 1 else _nearest(source, values if whole else None, mu), nu


def _nearest(source: Callable[[], Iterator[torch.Tensor]], values: np.ndarray | None, mu: float) -> float:
    """The value of the data that μ is but for rounding, which for small shapes costs likelihood."""
    if values is not None:
        return float(values[np.abs(values - mu).argmin()])
    found = mu, math.inf
    for block in source():
        distances = (block.double() - mu).abs_()
        i = int(distances.argmin())
        if float(distances[i]) < found[1]:
            found = float(block[i]), float(distances[i])
    return found[0]


def _coarse(values: np.ndarray, nu: float) -> int:
    """The rank at which a sample has its location: the middle, unless another place is clearly better.

    Clearly: outside of what the locations of 1,024 values scatter by.
    """
    m = len(values)
    few = np.sort(values[:: odd_step(m, _COARSE)])
    places = np.linspace(0, len(few) - 1, 65).astype(int)[1:-1]
    distances = np.abs(few - few[places, None])
    cost = np.exp(nu * np.log(np.maximum(distances, 1e-300))).sum(1)
    ties = places[cost <= cost.min() * (1 + 1e-9)]  # the middle of a value that many have, not its first place
    best = ties[len(ties) // 2] / (len(few) - 1)
    return m // 2 if abs(best - 0.5) < 4 * 0.5 / len(few) ** 0.5 else int(best * (m - 1))


def _read(
    source: Callable[[], Iterator[torch.Tensor]], center: float, half: float, shapes: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(w - center) / half of the near values, sorted, and the polynomials of the others for both shapes."""
    x = getattr(source, "x", None)
    if x is not None and kernels.suits(x[None]):
        near, sums = kernels.near(x, center, half, shapes)
        return near, sums * _binomials(shapes)
    found, far = [], np.zeros((2, _ORDERS))
    for block in source():
        z = (block if block.dtype == torch.float64 else block.float()).sub(center).div_(half)
        inside = z.abs() <= _FAR
        found.append(((block[inside].cpu().double() - center) / half).numpy())
        z = z[~inside]
        inverse = z.reciprocal()
        for which, nu in enumerate(shapes):
            power = z.abs().log_().mul_(nu).exp_()
            for k in range(_ORDERS):
                far[which, k] += float(power.sum())
                power = power * inverse
    return np.sort(np.concatenate(found)), far * _binomials(shapes)


def _binomials(shapes: tuple[float, float]) -> np.ndarray:
    """Coefficients of (1 - u)^ν, [2, 9]."""
    rows = np.ones((2, _ORDERS))
    for k in range(1, _ORDERS):
        rows[:, k] = rows[:, k - 1] * -(np.array(shapes) - k + 1) / k
    return rows


class _Search:
    """Branch and bound over sorted values in units of an interval -1 … 1.

    A cell is its center c, its half-width h and, for both shapes, the polynomials [2, 9] in t = (u - c) / h of the
    values that are not near, in the interval's units of cost.
    """

    def __init__(self, values: np.ndarray, far: np.ndarray, shapes: tuple[float, float]) -> None:
        self.values, self.far, self.shapes = values, far, shapes
        self.binomials = _binomials(shapes)

    def best(self, profile: Profile, half: float) -> tuple[float, float]:
        """The best location in the interval's units, and the shape that should be the best one there."""
        unit = (profile.alpha / half) ** profile.nu  # cost of one unit of log-likelihood
        n, error, nus = profile.n, profile.error, np.array(self.shapes)[:, None]
        gammas = np.array([[math.lgamma(1 / nu)] for nu in self.shapes])
        slack = 100 / n
        while True:
            places, costs = self.candidates(slack * unit)
            # the likelihood at both shapes, then at the best shape of each place; its curvature is the known one
            level = np.log(nus * costs / n) + nus * math.log(half)
            likelihood = n * (np.log(nus) - gammas - (1 + level) / nus)
            slope = (likelihood[1] - likelihood[0]) / error + 0.5 / error
            gain = (slope * error).clip(-2, 2) ** 2 / 2
            i = int(costs[0].argmin())
            if abs(slope[i] * error) > 1:  # too far for that: the best place for this shape, and then another shape
                return self._between(places[i]) if profile.nu >= 1 else float(places[i]), profile.nu
            if profile.nu >= 1:
                place = self._between(places[i])
                break
            # where another shape may make up for more than was allowed for, look farther
            if float((gain - gain[i]).max()) < slack / 2 or slack >= _MOST_SLACK:
                i = int((likelihood[0] + gain).argmax())
                place = float(places[i])
                break
            slack = min(8 * slack, _MOST_SLACK)
        change = float(slope[i]) * error**2
        return place, profile.nu + (change if abs(change) < 0.5 * error else 0.0)

    def ends_are_worse(self, best: float, profile: Profile) -> bool:
        """Whether the values at the ends of the interval are worse by so much that there can be nothing beyond."""
        first, last = np.searchsorted(self.values, np.array([-1.0, 1.0]))
        own = self.values[first:last]
        places = np.unique(np.r_[best, own[:3], own[-3:]])
        cost = _sums(self.values, places, self.shapes[0]) + np.polynomial.polynomial.polyval(places, self.far[0])
        least = cost[places == best][0]
        others = cost[places != best]
        drop = profile.n / profile.nu * np.log(others / least)
        return bool((drop > _SURE).all())

    def candidates(self, slack: float) -> tuple[np.ndarray, np.ndarray]:
        """The values whose cost for the first shape is within `slack` of the least, and their costs [2, k]."""
        least, found, costs = np.inf, [np.zeros(0)], [np.zeros((2, 0))]
        heap: list[tuple[float, int, float, float, np.ndarray]] = [(-np.inf, 0, 0.0, 1.0, self.far)]
        number = 0
        while heap and number < _MOST_CELLS:
            bound, _, c, h, far = heapq.heappop(heap)
            if bound > least + slack:
                break
            first = int(np.searchsorted(self.values, c - h))
            last = int(np.searchsorted(self.values, c + h, "right"))
            if last - first <= _FEW or self.values[first] == self.values[last - 1]:
                if last > first:
                    own = np.unique(self.values[first:last])
                    cost = self._cost(own, c, h, far)
                    least = min(least, float(cost[0].min()))
                    found.append(own)
                    costs.append(cost)
                continue
            for step in _CHILDREN:
                number += 1
                child = self._child(c, h, far, step)
                if child[0] <= least + slack:
                    heapq.heappush(heap, (child[0], number, *child[1:]))
        places, cost = np.concatenate(found), np.concatenate(costs, axis=1)
        keep = cost[0] <= least + slack
        return places[keep], cost[:, keep]

    def _slice(self, c: float, h: float) -> slice:
        """The values that are near a cell."""
        first, last = np.searchsorted(self.values, np.array([c - _FAR * h, c + _FAR * h]))
        return slice(int(first), int(last))

    def _cost(self, places: np.ndarray, c: float, h: float, far: np.ndarray) -> np.ndarray:
        """The cost of places in a cell for both shapes, [2, places]."""
        own = self._slice(c, h)
        logs = _logs(np.abs(self.values[own] - places[:, None]))
        rows = [np.exp(nu * logs).sum(1) for nu in self.shapes]
        return np.stack(rows) + far @ np.vander((places - c) / h, _ORDERS, increasing=True).T

    def _child(self, c: float, h: float, far: np.ndarray, step: float) -> tuple[float, float, float, np.ndarray]:
        """Least cost that is possible, center, half-width and polynomials of a quarter of a cell."""
        old = self._slice(c, h)
        center, width = c + step * h, h / len(_CHILDREN)
        moved = far @ _moves()[step]
        gaps, sums = _cell(self.values[old], center, width, self.shapes)
        scale = np.array([[width**nu] for nu in self.shapes])
        moved = moved + self.binomials * sums * scale
        least = gaps * float(scale[0, 0]) + float(moved[0, 0] - np.abs(moved[0, 1:]).sum())
        return least, center, width, moved

    def _between(self, value: float) -> float:
        """The minimum of the convex cost next to its best value, for a shape of 1 or more: where the slope is zero."""
        first = int(np.searchsorted(self.values, value))
        last = int(np.searchsorted(self.values, value, "right"))
        low, high = self.values[max(first - 1, 0)], self.values[min(last, len(self.values) - 1)]
        nu, (far, _) = self.shapes[0], self.far
        slope = np.polynomial.polynomial.polyder(far)
        c, h = (low + high) / 2, (high - low) / 2
        if h == 0:
            return float(value)
        outside = np.abs(self.values - c) > _FAR * h
        own = (self.binomials * _cell(self.values, c, h, self.shapes)[1])[0]
        close = self.values[~outside]
        local = np.polynomial.polynomial.polyder(own) * h ** (nu - 1)
        for _ in range(60):
            u = (low + high) / 2
            d = u - close
            pull = nu * (np.sign(d) * np.exp((nu - 1) * _logs(np.abs(d)))).sum()
            pull += np.polynomial.polynomial.polyval(u, slope)
            pull += np.polynomial.polynomial.polyval((u - c) / h, local)
            low, high = (u, high) if pull < 0 else (low, u)
        return float((low + high) / 2)


def _sums(values: np.ndarray, places: np.ndarray, nu: float) -> np.ndarray:
    """Σ|v - u|^ν for some places u."""
    if not kernels.available():
        return np.array([np.exp(nu * _logs(np.abs(values - u))).sum() for u in places])
    ones = torch.ones(len(places), dtype=torch.float64)
    row = torch.from_numpy(values)[None]
    return kernels.powers([row] * len(places), nu * ones, ones, torch.from_numpy(places), False)[:, 0]


def _cell(values: np.ndarray, center: float, half: float, shapes: tuple[float, float]) -> tuple[float, np.ndarray]:
    """See `kernels.cell`."""
    if kernels.available():
        return kernels.cell(values, center, half, shapes)
    z = (values - center) / half
    outside = np.abs(z) > _FAR
    gaps = np.exp(shapes[0] * _logs(np.maximum(np.abs(z[~outside]) - 1, 0))).sum()
    z = z[outside]
    inverse, logs = 1 / np.vander(z, _ORDERS, increasing=True), _logs(np.abs(z))
    return float(gaps), np.stack([np.exp(nu * logs) @ inverse for nu in shapes])


def _logs(distances: np.ndarray) -> np.ndarray:
    """Logarithms whose powers are zero at zero."""
    return np.log(np.maximum(distances, 1e-320))


@functools.cache
def _moves() -> dict[float, np.ndarray]:
    """Matrices that take a polynomial's coefficients in t to those in t' where t = step + t' / 4, a row each."""
    found = {}
    for step in _CHILDREN:
        rows = [np.polynomial.Polynomial([step, 1 / len(_CHILDREN)]) ** k for k in range(_ORDERS)]
        found[step] = np.stack([np.pad(p.coef, (0, _ORDERS - len(p.coef))) for p in rows])
    return found

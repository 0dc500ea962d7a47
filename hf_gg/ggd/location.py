"""The location where the likelihood has cusps: shapes below about 1.

There Σ|w - μ|^ν falls into a cusp at every value, and its minimum is one of them. Around the median of a sample,
within what the median can err, values far from that interval act on it by a short polynomial, so that only the near
ones need to be kept. The interval then closes in on the best of some candidates, and the near values become few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from .scan import BLOCK


# Values farther than this from the middle of an interval of half-width 1 enter its polynomial.
_FAR = 6.0
# Near values that are all tried.
_FEW = 512
# Candidates of an interval: evenly spread ones, and values of the data (a value that many share is likely among them).
_MANY = (5, 4)
_FINE = (9, 16)
_CLOSER = 4.0


def cusp_location(source: Callable[[], Iterator[torch.Tensor]], nu: float, sample: torch.Tensor) -> float:
    """The value μ of the data that makes Σ|w - μ|^ν least.

    Args:
        source: called for one reading; yields flat blocks of the values.
        nu: the shape ν, at most about 1.
        sample: values from everywhere, float64 on the CPU [m]; the interval is where the median may be.

    Returns:
        μ, a value of the data (or of the grid where no value is near).
    """
    m = len(sample)
    middle, reach = m // 2, 2 * int(m**0.5) + 1
    ordered = sample.sort().values
    center = float(ordered[middle])
    low, high = float(ordered[max(middle - reach, 0)]), float(ordered[min(middle + reach, m - 1)])
    half = max(center - low, high - center)
    if half == 0:  # a large share of the values is the same one
        return center
    near, far = [], np.zeros(5)
    for block in source():
        z = (block if block.dtype == torch.float64 else block.float()).sub(center).div_(half)
        inside = z.abs() <= _FAR
        near.append((block[inside].cpu().double() - center) / half)
        far += _far_polynomial(z[~inside], nu)
    return center + half * _search(torch.cat(near), far, nu)


def _search(near: torch.Tensor, far: np.ndarray, nu: float) -> float:
    """The best μ in the interval -1 … 1, in its units."""
    origin, width = 0.0, 1.0
    for _ in range(60):
        values, counts = torch.unique(near, return_counts=True) if len(near) <= 64 * _FEW else (near, None)
        if len(values) <= _FEW:
            break
        inside = near[near.abs() <= 1]
        grid, picks = _MANY if len(near) > 64 * _FEW else _FINE
        candidates = torch.cat([torch.linspace(-1, 1, grid).double(), inside[:: max(1, len(inside) // picks)]])
        best = float(candidates[int(_cost(candidates, near, None, far, nu).argmin())])
        origin += best * width
        width /= _CLOSER
        # the same in the new interval's units, z = best + z' / closer; costs are divided by closer^-ν
        near = (near - best) * _CLOSER
        far = _substitute(far, best, 1 / _CLOSER) * _CLOSER**nu
        outside = near.abs() > _FAR
        far = far + _far_polynomial(near[outside], nu)
        near = near[~outside]
    candidates = values[values.abs() <= 1]
    if len(candidates) == 0:
        return origin
    if len(candidates) > _FEW:
        candidates = candidates[:: len(candidates) // _FEW + 1]
    chosen = candidates[int(_cost(candidates, values, counts, far, nu).argmin())]
    return origin + width * float(chosen)


def _cost(
    candidates: torch.Tensor, near: torch.Tensor, counts: torch.Tensor | None, far: np.ndarray, nu: float
) -> torch.Tensor:
    """Σ|z - u|^ν up to a constant for each candidate u."""
    total = torch.from_numpy(np.polynomial.polynomial.polyval(candidates.numpy(), far))
    values = near.float() if len(near) > 64 * _FEW else near  # many: their interval is still wide
    for part, share in zip(values.split(BLOCK), (counts if counts is not None else values).split(BLOCK)):
        for i, u in enumerate(candidates.tolist()):
            powers = (part - u).abs_().log_().mul_(nu).exp_()
            total[i] += powers.sum() if counts is None else torch.dot(powers, share.double())
    return total


def _far_polynomial(z: torch.Tensor, nu: float) -> np.ndarray:
    """Σ|z - u|^ν of far z as a polynomial of degree 4 in u without its constant; float64 [5], rising powers."""
    power = z.abs().log_().mul_(nu).exp_()
    coefficients, factor = [0.0], 1.0
    for k in range(1, 5):
        power = power / z
        factor *= -(nu - k + 1) / k
        coefficients.append(factor * float(power.sum()))
    return np.array(coefficients)


def _substitute(polynomial: np.ndarray, shift: float, factor: float) -> np.ndarray:
    """The polynomial of v with u = shift + factor v."""
    p = np.polynomial.Polynomial
    result = p(polynomial)(p([shift, factor])).coef
    return np.pad(result, (0, 5 - len(result)))

"""The functions of the shape alone that fits need: the moment ratio with its inverse, and absolute moments.

Everything is float64 and element-wise. With a = 1/ν, a standard generalized Gaussian Z (scale 1) has
E|Z|^k = Γ((k + 1) a) / Γ(a), and ρ(ν) = E[Z²] / E[|Z|]² = Γ(a) Γ(3a) / Γ(2a)² falls from 216.8 at ν = 0.1 over
2 (Laplace) and π/2 (Gaussian) to 1.3586 at ν = 8.
"""

from __future__ import annotations

import functools
import math

import torch


SHAPE_MIN = 0.1
SHAPE_MAX = 8.0


def log_moment(shape: torch.Tensor, order: float) -> torch.Tensor:
    """Natural logarithm of E|Z|^order of a standard generalized Gaussian, float64 of `shape`'s shape."""
    a = shape.double().reciprocal()
    return torch.lgamma((order + 1) * a) - torch.lgamma(a)


def absolute_moments(shape: torch.Tensor, orders: int) -> torch.Tensor:
    """E|Z|^k of a standard generalized Gaussian for k = 1 … `orders`, [orders, *shape], by one call of lgamma."""
    counts = torch.arange(1, orders + 2, dtype=torch.float64, device=shape.device)
    logs = torch.lgamma(counts.view(-1, *[1] * shape.ndim) * shape.double().reciprocal())
    return (logs[1:] - logs[0]).exp_()


def moment_ratio(shape: torch.Tensor | float) -> torch.Tensor:
    """ρ(ν) = Γ(1/ν) Γ(3/ν) / Γ(2/ν)², which is E[w²] / E[|w|]² about the location, whatever the scale.

    Args:
        shape: ν > 0, any shape of tensor.

    Returns:
        float64 tensor of the same shape, falling in ν.

    Raises:
        ValueError: a shape that is not positive.
    """
    shape = torch.as_tensor(shape, dtype=torch.float64)
    if not bool((shape > 0).all()):
        raise ValueError(f"shape must be positive, got {shape[~(shape > 0)].flatten()[:3].tolist()}.")
    return _log_ratio(shape).exp()


def shape_from_ratio(rho: torch.Tensor | float) -> torch.Tensor:
    """The shape ν with `moment_ratio(ν) == rho`, by cubic interpolation between 4096 exact points.

    Args:
        rho: E[w²] / E[|w|]², any shape of tensor. Ratios outside of `moment_ratio` of 0.1 … 8 give the nearer end.

    Returns:
        float64 tensor of the same shape, accurate to 2e-13 relative.

    Raises:
        ValueError: NaN, or a ratio below 1, which no data has.
    """
    rho = torch.as_tensor(rho, dtype=torch.float64)
    # 1 minus rounding: a ratio of sums in float32 of two values ±c
    if not bool((rho >= 1 - 1e-6).all()):
        bad = rho[~(rho >= 1 - 1e-6)].flatten()[:3].tolist()
        raise ValueError(
            f"rho = E[w²] / E[|w|]² is at least 1 for any data, got {bad}: NaN where squares leave float64."
        )
    table = _ratio_table()
    rising, knots, slopes = table if rho.device.type == "cpu" else (t.to(rho.device) for t in table)
    target = -rho.log().clamp(-rising[-1], -rising[0])
    right = torch.searchsorted(rising, target).clamp_(1, len(knots) - 1)
    left = right - 1
    low = rising[left]
    width = rising[right] - low
    u = (target - low) / width
    v = 1 - u
    ends = knots[left] * (1 + 2 * u) * v.square() + knots[right] * (3 - 2 * u) * u.square()
    return ends + width * u * v * (slopes[left] * v - slopes[right] * u)


def log_ratio_slope(shape: torch.Tensor) -> torch.Tensor:
    """d ln ρ / dν, negative."""
    a = shape.reciprocal()
    one, two, three = torch.digamma(torch.stack([a, 2 * a, 3 * a]))
    return -a.square() * (one + 3 * three - 4 * two)


def absolute_moment_about(offset: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """E|W − c| of a generalized Gaussian W of mean c + `offset`, float64.

    It is |δ| P(a, t) + scale Γ(2a)/Γ(a) Q(2a, t) with t = (|δ| / scale)^ν and the incomplete gamma functions P and Q.
    """
    a = shape.reciprocal()
    delta = offset.abs()
    t = (delta / scale).pow(shape)
    tail = scale * log_moment(shape, 1).exp() * torch.special.gammaincc(2 * a, t)
    return delta * torch.special.gammainc(a, t) + tail


def _log_ratio(shape: torch.Tensor) -> torch.Tensor:
    a = shape.reciprocal()
    one, two, three = torch.lgamma(torch.stack([a, 2 * a, 3 * a]))
    return one + three - 2 * two


@functools.cache
def _ratio_table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-ln ρ (rising), ν and dν / d(-ln ρ) at points that are even in ln ν, [4096] each."""
    nu = torch.logspace(math.log10(SHAPE_MIN), math.log10(SHAPE_MAX), 4096, dtype=torch.float64)
    nu[0], nu[-1] = SHAPE_MIN, SHAPE_MAX
    return -_log_ratio(nu), nu, -log_ratio_slope(nu).reciprocal()

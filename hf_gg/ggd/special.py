"""The functions of the shape alone that fits need: the moment ratio with its inverse, and absolute moments.

Everything is float64 and element-wise. With a = 1/ν, a standard generalized Gaussian Z (scale 1) has
E|Z|^k = Γ((k + 1) a) / Γ(a), and ρ(ν) = E[Z²] / E[|Z|]² = Γ(a) Γ(3a) / Γ(2a)² falls from 216.8 at ν = 0.1 over
2 (Laplace) and π/2 (Gaussian) to 1.3586 at ν = 8.
"""

from __future__ import annotations

import functools

import torch


SHAPE_MIN = 0.1
SHAPE_MAX = 8.0


def log_moment(shape: torch.Tensor, order: float) -> torch.Tensor:
    """Natural logarithm of E|Z|^order of a standard generalized Gaussian, float64 of `shape`'s shape."""
    a = shape.double().reciprocal()
    return torch.lgamma((order + 1) * a) - torch.lgamma(a)


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
    """The shape ν with `moment_ratio(ν) == rho`, by bracketed Newton steps in ln ν.

    Args:
        rho: E[w²] / E[|w|]², any shape of tensor. Ratios outside of `moment_ratio` of 0.1 … 8 give the nearer end.

    Returns:
        float64 tensor of the same shape, accurate to about 1e-13 relative.

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
    knots, values = (t.to(rho.device) for t in _ratio_table())
    target = rho.log().clamp(values[-1], values[0])
    # values fall; searchsorted wants them rising
    index = torch.searchsorted(-values, -target).clamp(1, len(knots) - 1)
    low, high = knots[index - 1].clone(), knots[index].clone()
    weight = (values[index - 1] - target) / (values[index - 1] - values[index])
    s = low + weight * (high - low)
    for _ in range(2):
        nu = s.exp()
        excess = _log_ratio(nu) - target
        low, high = torch.where(excess > 0, s, low), torch.where(excess > 0, high, s)
        s = s - excess / (nu * log_ratio_slope(nu))
        s = torch.where((s >= low) & (s <= high), s, (low + high) / 2)
    return s.exp().clamp(SHAPE_MIN, SHAPE_MAX)


def log_ratio_slope(shape: torch.Tensor) -> torch.Tensor:
    """d ln ρ / dν, negative."""
    a = shape.reciprocal()
    return -a.square() * (torch.digamma(a) + 3 * torch.digamma(3 * a) - 4 * torch.digamma(2 * a))


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
    return torch.lgamma(a) + torch.lgamma(3 * a) - 2 * torch.lgamma(2 * a)


@functools.cache
def _ratio_table() -> tuple[torch.Tensor, torch.Tensor]:
    """ln ν and ln ρ on a grid, a bracket and a start for Newton's method. Shapes [256], the second one falling."""
    knots = torch.linspace(torch.tensor(SHAPE_MIN).log().item(), torch.tensor(SHAPE_MAX).log().item(), 256).double()
    return knots, _log_ratio(knots.exp())

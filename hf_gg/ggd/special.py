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
    return moment_curves(rho)[0]


def moment_curves(rho: torch.Tensor) -> torch.Tensor:
    """Functions of the shape ν with `moment_ratio(ν) == rho`, by cubic interpolation between 4096 exact points.

    They are ν itself, ln E|Z|, ln E[Z²] of a standard generalized Gaussian, and the logarithms of what
    `relative_moment_errors` gives. One look-up, because each call of torch costs as much as thousands of weights.

    Args:
        rho: at least 1, float64 of any shape.

    Returns:
        float64 [5, *rho.shape].
    """
    rising, coefficients = _curves()
    if rho.device.type != "cpu":
        rising, coefficients = rising.to(rho.device), coefficients.to(rho.device)
    target = -rho.log().clamp(-rising[-1], -rising[0])
    left = torch.searchsorted(rising, target, right=True).sub_(1).clamp_(0, len(rising) - 2)
    c = coefficients[:, :, left]
    u = target - rising[left]
    return ((c[3] * u + c[2]) * u + c[1]) * u + c[0]


def log_ratio_slope(shape: torch.Tensor) -> torch.Tensor:
    """d ln ρ / dν, negative."""
    a = shape.reciprocal()
    one, two, three = torch.digamma(torch.stack([a, 2 * a, 3 * a]))
    return -a.square() * (one + 3 * three - 4 * two)


def relative_moment_errors(nu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard errors of a moment fit to one value, by the delta method: scale (as its share), and shape.

    The sample moments m₁ of |w - μ| and m₂ of its square have the covariances of the fitted distribution. The
    estimated mean adds nothing of first order, because the distribution is symmetric.
    """
    e1, e2, e3, e4 = absolute_moments(nu, 4)
    # variances of m1 / E m1 and of m2 / E m2 and their covariance
    v1 = e2 / e1.square() - 1
    v2 = e4 / e2.square() - 1
    v12 = e3 / (e1 * e2) - 1
    a = nu.reciprocal()
    slope = log_ratio_slope(nu)
    shape_error = (v2 + 4 * v1 - 4 * v12).clamp_min(0).sqrt() / slope.abs()
    # ln α = ln m1 - ln e1(ν) with dν = (dm2 - 2 dm1) / slope
    e1_slope = -a.square() * (2 * torch.digamma(2 * a) - torch.digamma(a)) / slope
    c1, c2 = 1 + 2 * e1_slope, -e1_slope
    return (c1**2 * v1 + c2**2 * v2 + 2 * c1 * c2 * v12).clamp_min(0).sqrt(), shape_error


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
def _curves() -> tuple[torch.Tensor, torch.Tensor]:
    """-ln ρ at points that are even in ln ν [4096], and the cubics between them of the five functions [4, 5, 4095]."""
    nu = torch.logspace(math.log10(SHAPE_MIN), math.log10(SHAPE_MAX), 4096, dtype=torch.float64)
    nu[0], nu[-1] = SHAPE_MIN, SHAPE_MAX
    nu.requires_grad_()
    with torch.enable_grad():
        moments = absolute_moments(nu, 2).log()
        errors = torch.stack(relative_moment_errors(nu)).log()
        values = [nu, *moments, *errors]
        slopes = torch.stack([torch.autograd.grad(v.sum(), nu, retain_graph=True)[0] for v in values])
    rising = -_log_ratio(nu.detach())
    y, m = torch.stack(values).detach(), slopes / -log_ratio_slope(nu.detach())
    width = rising.diff()
    chord = y.diff() / width
    left, right = m[:, :-1], m[:, 1:]
    second, third = (3 * chord - 2 * left - right) / width, (left + right - 2 * chord) / width.square()
    return rising, torch.stack([y[:, :-1], left, second, third])

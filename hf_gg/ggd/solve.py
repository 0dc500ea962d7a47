"""From sums to parameters and standard errors; float64 on the CPU, all rows at once."""

from __future__ import annotations

import functools
import warnings

import torch

from .result import GGDFit
from .scan import Sums
from .special import (
    SHAPE_MAX,
    SHAPE_MIN,
    absolute_moment_about,
    moment_curves,
    moment_ratio,
)


def fit_sums(sums: Sums, shape: tuple[int, ...], loc: float | None) -> GGDFit:
    """The moment fit of each row, with the results in `shape`. Warns where the shape is clamped.

    Args:
        sums: of data that has a fit (see `checks.no_fit_reason`), about `loc` if that is given.
        shape: shape of the results.
        loc: the given location, or None.
    """
    curves, alpha, mean, ratio = solve_moments(sums, loc)
    nu, _, second, scale_error, shape_error = curves
    low, high = _ratio_range()
    outside = ~((ratio <= high) & (ratio >= low))
    warn_clamped(outside, nu, f"E[w²] / E[|w|]² = {ratio[outside][:3].tolist()}")
    root = sums.n.rsqrt()
    errors = (alpha * root * (second / 2).exp(), alpha * root * scale_error.exp(), root * shape_error.exp())
    return make_fit("moments", nu, alpha, mean, sums.n, outside, shape, loc, errors)


@functools.cache
def _ratio_range() -> tuple[float, float]:
    """The ratios of the largest and the smallest shape, and a little beyond."""
    return float(moment_ratio(SHAPE_MAX)) * (1 - 1e-9), float(moment_ratio(SHAPE_MIN)) * (1 + 1e-9)


def solve_moments(sums: Sums, loc: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moment_curves` of the shape [5, rows], scale, location and the ratio E[w²] / E[|w|]² about it, each [rows]."""
    shift = sums.first / sums.n
    absolute, second = sums.absolute / sums.n, sums.second / sums.n
    if loc is not None:
        mean, offset, variance = torch.full_like(shift, loc), torch.zeros_like(shift), second
    else:
        mean, offset, variance = sums.pivot + shift, shift, (second - shift.square()).clamp_min(0)
    # E|w - mean| is E|w - pivot|, less offset times the mean sign, more what lies between the two points
    straight = absolute - offset * sums.signs / sums.n
    spread = variance.sqrt()
    ratio = (variance / straight.square()).clamp_min(1.0)
    curves = moment_curves(ratio)
    alpha = spread * (curves[2] / -2).exp()
    if bool((offset.abs() > 1e-7 * spread).any()):
        corrected = straight
        for _ in range(6):
            better = torch.minimum(straight + between(offset, alpha, curves[0], curves[1]), spread)
            change, corrected = (better - corrected).abs() / better, better
            ratio = (variance / corrected.square()).clamp_min(1.0)
            curves = moment_curves(ratio)
            alpha = spread * (curves[2] / -2).exp()
            # of the next step a ten-thousandth of this one would be left, or less
            if bool((change <= 1e-4).all()):
                break
    return curves, alpha, mean, ratio


def between(offset: torch.Tensor, alpha: torch.Tensor, nu: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """2 E max(0, |δ| - |W - μ|) over one side, which E|W| P(2/ν, (|δ| / α)^ν) is; `first` is ln E|Z|."""
    t = (offset.abs() / alpha).pow(nu)
    return alpha * first.exp() * torch.special.gammainc(2 / nu, t)


def moved_absolute(sums: Sums, pivot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ|w - pivot| and Σ sign(w - pivot) of values whose sums are about another pivot.

    Exact where no value lies between the two pivots; those that do are counted by the distribution that fits the sums.
    """
    curves, alpha, mean, _ = solve_moments(sums, None)
    nu = curves[0]
    old, new = sums.pivot - mean, pivot - mean
    # absolute moments and mean signs of the fitted distribution about both points
    values = [(absolute_moment_about(x, alpha, nu), -_mean_sign(x, alpha, nu)) for x in (old, new)]
    move = pivot - sums.pivot
    inside = values[1][0] - values[0][0] + move * values[0][1]
    crossed = values[1][1] - values[0][1]
    empty = (pivot <= sums.low) & (sums.pivot <= sums.low) | (pivot >= sums.high) & (sums.pivot >= sums.high)
    absolute = sums.absolute - move * sums.signs + torch.where(empty, 0.0, sums.n * inside)
    signs = sums.signs + torch.where(empty, 0.0, sums.n * crossed)
    side = torch.where(pivot <= sums.low, 1.0, -1.0)
    outside = (pivot < sums.low) | (pivot > sums.high)  # then nothing needs a model
    absolute = torch.where(outside, sums.n * new.abs(), absolute)
    constant = sums.high <= sums.low
    signs = torch.where(outside, sums.n * side, torch.where(constant, sums.n * torch.sign(-new), signs))
    return torch.where(constant, sums.n * new.abs(), absolute), signs


def _mean_sign(x: torch.Tensor, alpha: torch.Tensor, nu: torch.Tensor) -> torch.Tensor:
    """P(W - μ < x) - P(W - μ > x)."""
    return torch.sign(x) * torch.special.gammainc(nu.reciprocal(), (x.abs() / alpha).pow(nu))


def make_fit(
    method: str,
    nu: torch.Tensor,
    alpha: torch.Tensor,
    mean: torch.Tensor,
    n: torch.Tensor,
    clamped: torch.Tensor,
    shape: tuple[int, ...],
    loc: float | None,
    errors: tuple[torch.Tensor, ...],
) -> GGDFit:
    """A `GGDFit` with its standard errors; every tensor [rows] is brought into `shape`.

    A clamped shape is no estimate and its errors say nothing, so that they are infinite there.
    """
    loc_error, scale_error, shape_error = (torch.where(clamped, torch.inf, error) for error in errors)
    if loc is not None:
        loc_error = torch.zeros_like(nu)
    result = GGDFit(mean, alpha, nu, loc_error, scale_error, shape_error, n.long(), method, clamped)
    return result if nu.shape == shape else result.map(lambda t: t.reshape(shape))


def warn_clamped(outside: torch.Tensor, nu: torch.Tensor, why: str) -> None:
    """Warn that shapes were clamped, if any was."""
    if not bool(outside.any()):
        return
    ends = sorted({f"{v:g}" for v in nu[outside].tolist()})
    warnings.warn(
        f"the shape of {int(outside.sum())} of {outside.numel()} fits is clamped to {' and '.join(ends)}: {why} lies "
        f"outside of what shapes {SHAPE_MIN} … {SHAPE_MAX} give; the data is no generalized Gaussian of such a shape.",
        stacklevel=4,
    )


def likelihood_errors(nu: torch.Tensor, alpha: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Standard errors of loc, scale and shape of a likelihood fit, from the Fisher information.

    The location's is α sqrt(Γ(1/ν) / Γ(2 - 1/ν)) / (ν sqrt(n)) for ν ≥ 1. Below, its information grows without bound
    (at ν = 1/2 it is infinite) and no longer describes finite samples; there the median's, α Γ(1/ν) / (ν sqrt(n)), is
    given, which equals the other at ν = 1 and was within a fifth of the spread in simulations down to ν = 1/2.
    """
    a = nu.reciprocal()
    psi, psi1 = torch.digamma(1 + a), torch.polygamma(1, 1 + a)
    scale_scale = nu / alpha.square()
    scale_shape = -(1 + psi) * a / alpha
    shape_shape = a**2 + torch.polygamma(1, a) * a**4 + 2 * torch.digamma(a) * a**3 + (psi1 + psi.square()) * a**3
    determinant = scale_scale * shape_shape - scale_shape.square()
    half = torch.where(nu >= 1, (torch.lgamma(a) - torch.lgamma(2 - a.clamp_max(1))) / 2, torch.lgamma(a))
    loc_error = alpha * a * half.exp() / n.sqrt()
    return loc_error, (shape_shape / determinant / n).sqrt(), (scale_scale / determinant / n).sqrt()

"""What every fit refuses, in one wording."""

from __future__ import annotations

import torch


METHODS = ("moments", "mle")
# Magnitudes whose fourth powers float64 holds.
SMALLEST, LARGEST = 1e-75, 1e75


class FitError(ValueError):
    """There is no fit of these values, and why."""


def check_method(method: str) -> None:
    """Raise a `ValueError` for an unknown method."""
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: use one of {', '.join(map(repr, METHODS))}.")


def check_tensor(x: torch.Tensor, name: str) -> None:
    """Raise a `TypeError` or `ValueError` unless `x` is a floating point tensor that has values."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: convert it with torch.as_tensor.")
    if not x.is_floating_point():
        remedy = "fit its real and imaginary parts" if x.is_complex() else "convert it with .float()"
        if x.dtype in (torch.uint8, torch.int8):
            remedy = "decode quantized codes, or convert them with .float()"
        raise TypeError(f"{name} must be floating point, got {x.dtype}: {remedy}.")
    if hasattr(x, "placements"):
        raise TypeError(f"{name} is split over processes: fit its .to_local() or .full_tensor().")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: give its .unbind() to fit_many.")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {x.layout}: convert it with .to_dense().")
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load the weights first.")


def check_loc(loc: float | None) -> None:
    """Raise a `TypeError` or `ValueError` unless `loc` is None or a finite number."""
    if loc is None:
        return
    if isinstance(loc, bool) or not isinstance(loc, (int, float)):
        raise TypeError(f"loc must be a number, or None to estimate it, got {type(loc).__name__}.")
    if not abs(loc) < float("inf"):
        raise ValueError(f"loc must be finite, got {loc}: give a number, or None to estimate it.")


def no_fit_reason(n: int, nonfinite: int, low: float, high: float, loc: float | None) -> str | None:
    """Why values with these extremes have no fit, or None.

    Args:
        n: count of finite values.
        nonfinite: count of NaN and infinities.
        low: smallest finite value.
        high: largest finite value.
        loc: the location if it is given.
    """
    if nonfinite:
        return f"{nonfinite} of {n + nonfinite} values are NaN or infinite: repair or leave them out, x[x.isfinite()]."
    if n == 0:
        return "it is empty: there is nothing to fit."
    if n == 1:
        return f"it holds a single value, {low:g}: a spread needs two."
    if low == high == 0:
        return f"all {n} values are zero: there is no scale or shape to fit."
    if low == high and (loc is None or loc == low):
        return f"all {n} values equal {low:g}: there is no scale or shape to fit."
    return None


def out_of_range(low: float, high: float) -> bool:
    """Whether powers of values with these extremes leave float64."""
    peak = max(abs(low), abs(high))
    return peak > LARGEST or 0 < peak < SMALLEST


def range_reason(low: float, high: float) -> str | None:
    """Why a stream of values with these extremes has no fit, or None."""
    if not out_of_range(low, high):
        return None
    return (
        f"its values reach {max(abs(low), abs(high)):g}, and float64 holds their powers from {SMALLEST:g} to "
        f"{LARGEST:g} alone: multiply them by a number."
    )

"""Fits of a generalized Gaussian to tensors: one, rows of one, many, or a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from .checks import FitError, check_loc, check_method, check_tensor, no_fit_reason, out_of_range, range_reason
from .likelihood import fit_likelihood, fit_likelihood_stream
from .moments import Moments
from .result import GGDFit
from .scan import Sums, as_rows, choose_pivot, scan, scan_many
from .solve import fit_sums


ERRORS = ("raise", "nan")


def fit(
    x: torch.Tensor,
    method: str = "moments",
    dim: int | tuple[int, ...] | None = None,
    *,
    loc: float | None = None,
    errors: str = "raise",
) -> GGDFit:
    """Fit a generalized Gaussian to the values of a tensor.

    Args:
        x: floating point, any shape, dtype and device; it is read in blocks and never copied as a whole (but for rows
            of float64 with values outside of 1e-75 … 1e75, which are scaled first).
        method: `"moments"` (E|w - μ| and the variance; one reading) or `"mle"` (maximum likelihood; a few readings).
        dim: dimensions whose values are fitted together, one fit for each index of the others; None fits all values.
        loc: the location if it is known, for instance 0; None estimates it, by the mean or by maximum likelihood.
        errors: what to do with an item that has no fit (all values equal, NaN, …): `"raise"`, or `"nan"` for NaN in
            its numbers and the reason in `problems`.

    Returns:
        The fit, float64 tensors on the CPU: 0-d, or of the dimensions of `x` that are not in `dim`.

    Raises:
        TypeError: `x` is not a dense floating point tensor, `loc` is not a number.
        FitError: a `ValueError`: the values have no fit, and why.
        ValueError: unknown method, `x` on the meta device. IndexError: no such dimension.
    """
    _check(method, loc, errors)
    check_tensor(x, "x")
    rows, shape = as_rows(x.detach(), dim)
    names = ["x"] if dim is None else [f"x{list(_index(i, shape))}" for i in range(len(rows))]
    pivot = choose_pivot(rows, snap=dim is None) if loc is None else torch.full((len(rows),), loc, dtype=torch.float64)
    return _finish([rows], scan(rows, pivot), names, shape, method, loc, errors)


def fit_many(
    tensors: Iterable[torch.Tensor] | Mapping[str, torch.Tensor],
    method: str = "moments",
    *,
    loc: float | None = None,
    errors: str = "raise",
) -> GGDFit:
    """Fit each of many tensors, of any shapes, dtypes and devices; faster than one `fit` after the other.

    Args:
        tensors: the tensors, or a mapping from names, which error messages then use.
        method: see `fit`.
        loc: see `fit`.
        errors: see `fit`; an item may also have no fit because it is not a dense floating point tensor.

    Returns:
        The fits, tensors of shape [number of tensors], in order; `result[i]` is one of them.

    Raises:
        TypeError, FitError, ValueError: see `fit`; the message names the tensor.
    """
    _check(method, loc, errors)
    named = tensors.items() if isinstance(tensors, Mapping) else ((f"tensor {i}", x) for i, x in enumerate(tensors))
    names: list[str] = []
    rows: list[torch.Tensor] = []
    pivots: list[torch.Tensor] = []
    problems: dict[int, str] = {}
    for name, x in named:
        try:
            check_tensor(x, name)
        except (TypeError, ValueError) as error:
            if errors == "raise":
                raise
            problems[len(names)] = str(error)
            x = torch.empty(0)
        names.append(name)
        rows.append(as_rows(x.detach(), None)[0])
        pivots.append(choose_pivot(rows[-1], snap=True) if loc is None else torch.tensor([loc], dtype=torch.float64))
    if not names:
        raise ValueError("tensors is empty: give at least one tensor to fit.")
    return _finish(rows, scan_many(rows, torch.cat(pivots)), names, (len(names),), method, loc, errors, problems)


def fit_stream(
    chunks: Callable[[], Iterable[torch.Tensor]], method: str = "moments", *, loc: float | None = None
) -> GGDFit:
    """Fit the values of a stream that can be read again, for data that memory cannot hold.

    Args:
        chunks: called for each reading; returns an iterable of floating point tensors of any shape, the same ones each
            time. The moment fit reads once, the likelihood fit a few times. Sums are kept, and for the likelihood a
            small part of the values.
        method: see `fit`.
        loc: see `fit`.

    Returns:
        The fit, 0-d tensors.

    Raises:
        TypeError, FitError, ValueError: see `fit`. ValueError: the second reading has another number of values.
    """
    _check(method, loc, "raise")
    if not callable(chunks):
        raise TypeError(f"chunks must be a function that returns an iterable, got {type(chunks).__name__}.")
    moments = Moments(loc, higher=False)
    for chunk in chunks():
        moments.update(chunk)
    if method == "moments":
        return moments.fit()
    reason = no_fit_reason(moments.count, moments.nonfinite, moments.min, moments.max, loc)
    reason = reason or range_reason(moments.min, moments.max)
    if reason:
        raise FitError(f"the stream has no fit: {reason}")
    return fit_likelihood_stream(chunks, moments.count, loc)


def _finish(
    rows: list[torch.Tensor],
    sums: Sums,
    names: list[str],
    shape: tuple[int, ...],
    method: str,
    loc: float | None,
    errors: str,
    problems: dict[int, str] | None = None,
) -> GGDFit:
    """Solve for the rows that have a fit; raise for the others, or give them NaN and a reason."""
    problems = dict(problems or {})
    extremes = zip(*(t.tolist() for t in (sums.n, sums.nonfinite, sums.low, sums.high)))
    for i, (n, nonfinite, low, high) in enumerate(extremes):
        reason = no_fit_reason(int(n), int(nonfinite), low, high, loc)
        if reason and i not in problems:
            problems[i] = f"{names[i]} has no fit: {reason}"
            if errors == "raise":
                raise FitError(problems[i])
    ends = list(zip(sums.low.tolist(), sums.high.tolist()))
    scaled = {i: ends[i] for i in range(len(names)) if i not in problems and out_of_range(*ends[i])}
    good = [i for i in range(len(names)) if i not in problems and i not in scaled]
    fine = sums if len(good) == len(names) else sums.take(torch.tensor(good, dtype=torch.long))
    if method == "moments" or not good:
        result = fit_sums(fine, (len(good),), loc)
    else:
        result = fit_likelihood(rows, good, fine, loc)
    if len(good) < len(names):
        keep = torch.tensor(good, dtype=torch.long)

        def spread(t: torch.Tensor) -> torch.Tensor:
            fill = torch.nan if t.is_floating_point() else 0
            return torch.full((len(names),), fill, dtype=t.dtype).index_copy_(0, keep, t)

        result = replace(result.map(spread), n=sums.n.long(), problems=problems)
        for i, (low, high) in scaled.items():
            _put(result, i, _fit_scaled(_row(rows, i), max(abs(low), abs(high)), method, loc))
    return result if result.shape.shape == shape else result.map(lambda t: t.reshape(shape))


def _row(rows: list[torch.Tensor], index: int) -> torch.Tensor:
    """A row, counted over all matrices."""
    for x in rows:
        if index < len(x):
            return x[index]
        index -= len(x)
    raise IndexError(index)


def _fit_scaled(x: torch.Tensor, peak: float, method: str, loc: float | None) -> GGDFit:
    """The fit of float64 values whose powers float64 does not hold, by that of values about 1."""
    # in two steps, because 2**1074 is no number
    exponent = -math.frexp(peak)[1]
    first, second = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    unit_loc = None if loc is None else loc * first * second
    if unit_loc is not None and not -1e6 < unit_loc < 1e6:
        raise FitError(f"loc {loc:g} is too far from values up to {peak:g}: float64 does not hold both.")
    result = fit(x.double() * first * second, method, loc=unit_loc)
    changed = {name: getattr(result, name) / first / second for name in ("loc", "scale", "loc_stderr", "scale_stderr")}
    return replace(result, **changed)


def _put(result: GGDFit, index: int, one: GGDFit) -> None:
    """Write one fit into its place among many."""
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            getattr(result, name)[index] = value


def _check(method: str, loc: float | None, errors: str) -> None:
    check_method(method)
    check_loc(loc)
    if errors not in ERRORS:
        raise ValueError(f"Unknown errors {errors!r}: use one of {', '.join(map(repr, ERRORS))}.")


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of a flat position in `shape`."""
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, flat % size)
        flat //= size
    return tuple(index)

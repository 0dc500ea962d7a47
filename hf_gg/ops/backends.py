"""Which implementation runs an operator.

`auto` takes the fastest that works for the device, and says so once where that is plain torch; a backend asked for by
name fails loudly when it cannot run. Which kernel of a backend runs depends on the shape: few rows or many. A new
backend is one module with `available()`, `why_not()` and its functions, and one line here.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..formats import ResidualFloat, WeightFormat
from . import cpu, reference
from . import triton as triton_backend


BACKENDS = ("auto", "torch", "cpu", "triton")


def check_backend(name: str) -> str:
    """Return `name`; raise a `ValueError` if there is no such backend."""
    if name not in BACKENDS:
        raise ValueError(f"Unknown backend {name!r}: use one of {', '.join(map(repr, BACKENDS))}.")
    return name


def resolve(name: str, device: torch.device, operator: str, dtype: torch.dtype) -> str:
    """The backend that runs an operator on a device: a name other than `auto`.

    Args:
        name: the backend asked for.
        device: of the codes.
        operator: its name, for errors.
        dtype: of the numbers that come in or out.

    Raises:
        ValueError: an unknown name, or a backend of another device.
        TypeError: the backend asked for has no kernel for the dtype.
        RuntimeError: the backend asked for cannot run here; the reason is given.
    """
    operator = f"hf_gg::{operator}"
    if name == "auto":
        # for the whole process, from outside
        name = check_backend(os.environ.get("HF_GG_BACKEND") or "auto")
    if name == "auto":
        wanted: Any = {"cpu": cpu, "cuda": triton_backend}.get(device.type)
        if wanted is None:
            return "torch"
        if dtype not in wanted.DTYPES:
            return "torch"
        if wanted.available():
            return "cpu" if wanted is cpu else "triton"
        _fall_back(device.type, str(wanted.why_not()))
        return "torch"
    check_backend(name)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"{operator}: backend 'cpu' got a tensor on {device}: use backend 'auto', 'triton' or 'torch' there."
        )
    asked: Any = {"cpu": cpu, "triton": triton_backend}.get(name)
    if asked is not None and not asked.available():
        raise RuntimeError(
            f"{operator}: backend {name!r} is not available: {asked.why_not()}. Use backend 'auto' or 'torch'."
        )
    if asked is not None and dtype not in asked.DTYPES:
        raise TypeError(
            f"{operator}: backend {name!r} takes {', '.join(str(d)[6:] for d in asked.DTYPES)}, got {dtype}: use "
            "backend 'auto' or 'torch'."
        )
    return name


@functools.cache
def _fall_back(device: str, reason: str) -> None:
    """Warn once that plain torch runs on a kind of device; not where the user turned the kernels off."""
    if reason != cpu.TURNED_OFF:
        warnings.warn(
            f"hf_gg: the fast kernels for {device} cannot run here ({reason}): plain torch takes their place, much "
            "slower. HF_GG_BACKEND=torch silences this.",
            RuntimeWarning,
            stacklevel=2,
        )


_failed: set[str] = set()  # operators whose Triton kernel could not be compiled or launched, under `auto`


def _on_triton(operator: str, asked: str, run: Callable, *arguments) -> torch.Tensor | None:
    """`run(*arguments)`, or None if its kernel fails and the backend was not asked for by name."""
    if operator in _failed:
        return None
    try:
        return run(*arguments)
    except triton_backend.KernelError as error:
        if "triton" in (asked, os.environ.get("HF_GG_BACKEND")):
            raise RuntimeError(f"hf_gg::{operator}: {error}") from error
        _failed.add(operator)
        _fall_back("this GPU", f"hf_gg::{operator}: {error}")
        return None


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    asked, backend = backend, resolve(backend, codes.device, "dequantize", dtype)
    if backend == "cpu":
        return cpu.dequantize(codes, scale, fmt, dtype)
    if backend == "triton":
        weight = _on_triton("dequantize", asked, triton_backend.dequantize, codes, scale, fmt, dtype)
        if weight is not None:
            return weight
    return reference.dequantize(codes, scale, fmt, dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    fmt: WeightFormat,
    backend: str,
) -> torch.Tensor:
    asked, backend = backend, resolve(backend, codes.device, "linear", x.dtype)
    rows, y = _matrix(x), None
    if backend == "cpu":
        y = cpu.linear(rows, codes, scale, bias, fmt)
    elif backend == "triton":
        row_scale = scale.expand(codes.shape[0], 1)
        y = _on_triton("linear", asked, triton_backend.linear, rows, codes, row_scale, bias, fmt)
    if y is None:
        weight = dequantize(codes, scale, fmt, x.dtype, asked)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    # no view, which autograd would not let anyone change in place (`y += ...`)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], codes.shape[0]))


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, its last dimension], also where that is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def linear_grad_input(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, backend: str
) -> torch.Tensor:
    asked, backend = backend, resolve(backend, codes.device, "linear_grad_input", grad.dtype)
    rows, out = _matrix(grad), None
    if backend == "triton":
        row_scale = scale.expand(codes.shape[0], 1)
        out = _on_triton("linear_grad_input", asked, triton_backend.linear_grad_input, rows, codes, row_scale, fmt)
    if out is None:
        out = rows @ dequantize(codes, scale, fmt, grad.dtype, asked)
    return torch.ops.aten._unsafe_view(out, (*grad.shape[:-1], codes.shape[1]))


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    fmt: WeightFormat,
    transposed: bool,
    backend: str,
) -> torch.Tensor:
    asked, backend = backend, resolve(backend, codes.device, "grouped_linear", x.dtype)
    per_row = scale.shape[-1] == 1
    if backend == "triton":
        arguments = (x, codes, scale, offsets, fmt, transposed)
        y = _on_triton("grouped_linear", asked, triton_backend.grouped_linear, *arguments)
        if y is not None:
            return y
    ends = offsets.tolist()
    if any(not 0 <= end <= x.shape[0] for end in ends):
        raise ValueError(
            f"hf_gg::grouped_linear: offsets must lie in 0 to {x.shape[0]}, the rows of the input, got {ends}."
        )
    if backend == "cpu" and per_row and not transposed:
        return cpu.grouped_linear(x, codes, scale, ends, fmt)
    # rows past the last offset belong to no expert here (expert parallelism): they stay zero
    out, start = x.new_zeros(x.shape[0], codes.shape[2 if transposed else 1]), 0
    for expert, end in enumerate(ends):
        if end > start:
            weight = dequantize(codes[expert], scale[expert], fmt, x.dtype, asked)
            out[start:end] = x[start:end] @ (weight if transposed else weight.T)
        start = max(start, end)
    return out


def quantize_with_outliers(
    weight: torch.Tensor, fmt: WeightFormat, scale: Any = "row", rounding: str = "nearest", reduce=None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Codes, scale and the list of outliers (`WeightFormat.take_outliers_`), None where the format has none."""
    codes, scales = quantize(weight, fmt, scale, rounding, reduce)
    return codes, scales, fmt.take_outliers_(codes, scales, weight)


def quantize(
    weight: torch.Tensor, fmt: WeightFormat, scale: Any = "row", rounding: str = "nearest", reduce=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fmt.quantize`, by the compiled kernels where they apply; the same codes and scales."""
    if not isinstance(fmt, ResidualFloat):
        return fmt.quantize(weight, scale=scale, rounding=rounding, reduce=reduce)
    compiled = (
        weight.device.type == "cpu"
        and reduce is None
        and rounding == "nearest"
        and scale in cpu.QUANTIZE_SCALES
        and weight.dtype in cpu.DTYPES
        and weight.ndim >= 2
        and resolve("auto", weight.device, "quantize", weight.dtype) == "cpu"
    )
    if compiled:
        return cpu.quantize(weight, fmt, scale)
    return fmt.quantize(weight, scale=scale, rounding=rounding, reduce=reduce)

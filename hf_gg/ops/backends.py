"""Which implementation runs an operator.

`auto` takes the fastest that works for the device; a backend asked for by name fails loudly when it cannot run. A new
backend is one module with `available()`, `why_not()` and its functions, and one line here.
"""

from __future__ import annotations

import os
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


def resolve(name: str, device: torch.device) -> str:
    """The backend that runs on a device: a name other than `auto`.

    Raises:
        ValueError: an unknown name, or a backend of another device.
        RuntimeError: the backend asked for cannot run here; the reason is given.
    """
    if name == "auto":
        # for the whole process, from outside
        name = check_backend(os.environ.get("HF_GG_BACKEND", "auto"))
    if name == "auto":
        if device.type == "cpu":
            return "cpu" if cpu.available() else "torch"
        return "triton" if device.type == "cuda" and triton_backend.available() else "torch"
    check_backend(name)
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"backend 'cpu' got a tensor on {device}: use backend 'auto', 'triton' or 'torch' there.")
        if not cpu.available():
            raise RuntimeError(f"backend 'cpu' is not available: {cpu.why_not()}. Use backend 'auto' or 'torch'.")
    if name == "triton" and not triton_backend.available():
        raise RuntimeError(
            f"backend 'triton' is not available: {triton_backend.why_not()}. Use backend 'auto' or 'torch'."
        )
    return name


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    backend = resolve(backend, codes.device)
    if backend == "cpu" and dtype in cpu.DTYPES:
        return cpu.dequantize(codes, scale, fmt, dtype)
    if backend == "triton" and dtype in triton_backend.DTYPES:
        return triton_backend.dequantize(codes, scale, fmt, dtype)
    return reference.dequantize(codes, scale, fmt, dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    fmt: WeightFormat,
    backend: str,
) -> torch.Tensor:
    backend = resolve(backend, codes.device)
    rows = x.reshape(-1, x.shape[-1])
    if backend == "cpu" and x.dtype in cpu.DTYPES:
        y = cpu.linear(rows, codes, scale, bias, fmt)
    elif backend == "triton" and x.dtype in triton_backend.DTYPES:
        y = triton_backend.linear(rows, codes, scale.expand(codes.shape[0], 1), bias, fmt)
    else:
        weight = dequantize(codes, scale, fmt, x.dtype, backend)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    # no view, which autograd would not let anyone change in place (`y += ...`)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], codes.shape[0]))


def linear_grad_input(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, backend: str
) -> torch.Tensor:
    backend = resolve(backend, codes.device)
    rows = grad.reshape(-1, grad.shape[-1])
    if backend == "triton" and grad.dtype in triton_backend.DTYPES:
        out = triton_backend.linear_grad_input(rows, codes, scale.expand(codes.shape[0], 1), fmt)
    else:
        out = rows @ dequantize(codes, scale, fmt, grad.dtype, backend)
    return torch.ops.aten._unsafe_view(out, (*grad.shape[:-1], codes.shape[1]))


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
        and resolve("auto", weight.device) == "cpu"
    )
    if compiled:
        return cpu.quantize(weight, fmt, scale)
    return fmt.quantize(weight, scale=scale, rounding=rounding, reduce=reduce)

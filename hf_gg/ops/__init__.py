"""Operators on quantized weights: in plain torch, in compiled C on a CPU, and in Triton."""

from __future__ import annotations

import torch

from . import few_rows, library  # noqa: F401  (library defines the operators)
from .backends import BACKENDS, check_backend, quantize, quantize_with_outliers
from .outliers import check_outliers, grouped_outlier_linear, outlier_linear, put_outlier_rows, put_outliers


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    format: str = "rf8",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """`decode(codes) * scale`.

    Args:
        codes: uint8 [..., rows, columns].
        scale: float32 [..., rows, 1], [..., 1, columns] or [..., 1, 1].
        format: name of the weight format.
        dtype: of the result; the product is formed in float32.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`.

    Returns:
        The weight, of the shape of `codes`.
    """
    return torch.ops.hf_gg.dequantize(codes, scale, format, dtype, backend)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    format: str = "rf8",
    backend: str = "auto",
) -> torch.Tensor:
    """`x @ (decode(codes) * scale).T + bias` without keeping the decoded weight, differentiable in `x` and `bias`.

    Args:
        x: floating point [..., columns].
        codes: uint8 [rows, columns].
        scale: float32 [rows, 1] or [1, 1].
        bias: [rows] or None.
        format: name of the weight format.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`.

    Returns:
        [..., rows] in the dtype of `x`.
    """
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = few_rows.linear(x, codes, scale, bias, format, backend)
        if y is not None:
            return y
    return torch.ops.hf_gg.linear(x, codes, scale, bias, format, backend)


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    format: str = "rf8",
    transposed: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """One linear layer a group of rows, as `torch.nn.functional.grouped_mm`; only groups that have rows are decoded.

    Args:
        x: [rows, in], sorted by group.
        codes: uint8 [groups, out, in], or [groups, in, out] if `transposed`.
        scale: float32 [groups, out, 1], or [groups, 1, out] if `transposed`.
        offsets: int32 [groups], the row at which each group ends. Rows past the last one give zeros.
        format: name of the weight format.
        transposed: orientation of the codes.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`.

    Returns:
        [rows, out] in the dtype of `x`.
    """
    return torch.ops.hf_gg.grouped_linear(x, codes, scale, offsets, format, transposed, backend)


__all__ = [
    "BACKENDS",
    "check_backend",
    "check_outliers",
    "dequantize",
    "grouped_linear",
    "grouped_outlier_linear",
    "linear",
    "outlier_linear",
    "put_outlier_rows",
    "put_outliers",
    "quantize",
    "quantize_with_outliers",
]

"""Linear layers on codes, and their decoding."""

from __future__ import annotations

import ctypes
import functools

import torch

from ...formats import WeightFormat, get_format
from .runtime import DTYPE_CODES, DTYPES, check_dtype, format_tables, isa_code, library, with_rows


# Rows of x up to which decoding in registers is faster than decoding a block and calling torch's product.
FEW_ROWS = 16
# Of a decoded block: it stays in the cache, and the allocator reuses its pages.
BLOCK_BYTES = 4 << 20


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    format: str | WeightFormat = "rf8",
    *,
    isa: str | None = None,
) -> torch.Tensor:
    """`x @ (decode(codes) * scale).T + bias`, summed in float32.

    Up to 16 rows of x are multiplied by weights decoded in registers. For more, blocks of the weight are decoded into
    the cache, rounded to the dtype in which torch multiplies fastest here (that of `x`, or float32), and multiplied.

    Args:
        x: float32, bfloat16 or float16 [..., in].
        codes: uint8 [out, in].
        scale: floating point [out, 1] or [1, 1].
        bias: floating point [out], or None.
        format: of the codes.
        isa: one of `isas()`; the best one, if None.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        TypeError: an argument of another dtype. ValueError: of another shape, or not on the CPU.
    """
    tables, isa_number = format_tables(get_format(format)), isa_code(isa)
    check_dtype("x", x, DTYPES)
    check_dtype("codes", codes, (torch.uint8,))
    _check_float("scale", scale)
    if codes.ndim != 2 or x.ndim < 1 or x.shape[-1] != codes.shape[1]:
        raise ValueError(f"linear needs x [..., in] and codes [out, in], got {[*x.shape]} and {[*codes.shape]}.")
    n, k = codes.shape
    if scale.shape not in ((n, 1), (1, 1)):
        raise ValueError(f"scale must have shape [{n}, 1] or [1, 1], got {[*scale.shape]}.")
    if bias is not None:
        _check_float("bias", bias)
        if bias.shape != (n,):
            raise ValueError(f"bias must have shape [{n}], got {[*bias.shape]}.")
        bias = (bias if bias.dtype in DTYPE_CODES else bias.float()).contiguous()
    m = x.shape[:-1].numel()
    rows = with_rows(x if x.ndim == 2 else x.reshape(m, k))
    codes, scale = with_rows(codes), scale.float()
    if m > FEW_ROWS and n and k:
        if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not _fast_bfloat16()):
            rows = rows.float()
        y = _linear_blocks(rows, codes, scale, bias, tables, isa_number).to(x.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], n)
    y = torch.empty(m, n, dtype=x.dtype)
    if m and n:
        failed = library().hf_gg_rf8_linear(
            tables,
            isa_number,
            torch.get_num_threads(),
            rows.data_ptr(),
            rows.stride(0),
            DTYPE_CODES[rows.dtype],
            codes.data_ptr(),
            codes.stride(0),
            scale.data_ptr(),
            scale.stride(0) if scale.shape[0] > 1 else 0,
            None if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            y.data_ptr(),
            n,
            m,
            n,
            k,
        )
        if failed:
            raise MemoryError(f"no memory for a copy of x, shape {[*x.shape]}.")
    return y if x.ndim == 2 else y.view(*x.shape[:-1], n)


def grouped_linear(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, ends: list[int], format: str | WeightFormat = "rf8"
) -> torch.Tensor:
    """`linear` of each group of rows with its own codes; groups of few rows in one call.

    Args:
        x: float32, bfloat16 or float16 [rows, in], sorted by group.
        codes: uint8 [groups, out, in].
        scale: float32 [groups, out, 1] or [groups, 1, 1].
        ends: the row at which each group ends. Rows past the last one give zeros.
        format: of the codes.

    Returns:
        [rows, out] in the dtype of `x`.

    Raises:
        TypeError: an argument of another dtype. ValueError: of another shape, or not on the CPU.
    """
    check_dtype("x", x, DTYPES)
    check_dtype("codes", codes, (torch.uint8,))
    check_dtype("scale", scale, (torch.float32,))
    n, k = codes.shape[-2:]
    if codes.ndim != 3 or x.ndim != 2 or x.shape[1] != k or len(ends) != codes.shape[0]:
        raise ValueError(
            f"grouped_linear needs x [rows, in], codes [groups, out, in] and an end for each group, got {[*x.shape]}, "
            f"{[*codes.shape]} and {len(ends)} ends."
        )
    if scale.shape not in ((codes.shape[0], n, 1), (codes.shape[0], 1, 1)):
        raise ValueError(f"scale must have shape {[codes.shape[0], n, 1]} or with one row, got {[*scale.shape]}.")
    if any(not 0 <= end <= x.shape[0] for end in ends):
        raise ValueError(f"ends must lie in 0 to {x.shape[0]}, the rows of x, got {ends}.")
    y, groups, start = x.new_zeros(x.shape[0], n), [], 0
    for group, end in enumerate(ends):
        if end > start:
            groups.append((group, start, end))
            start = end
    if not n or not k or not groups:
        return y
    if any(end - start > FEW_ROWS for _, start, end in groups) or codes.stride(2) != 1:
        for group, start, end in groups:
            y[start:end] = linear(x[start:end], codes[group], scale[group], None, format)
        return y
    rows = with_rows(x)
    failed = library().hf_gg_rf8_grouped(
        format_tables(get_format(format)),
        isa_code(None),
        torch.get_num_threads(),
        rows.data_ptr(),
        rows.stride(0),
        DTYPE_CODES[x.dtype],
        codes.data_ptr(),
        codes.stride(0),
        codes.stride(1),
        scale.data_ptr(),
        scale.stride(0),
        scale.stride(1) if scale.shape[1] > 1 else 0,
        None,
        0,
        y.data_ptr(),
        n,
        (ctypes.c_int64 * (3 * len(groups)))(*(number for group in groups for number in group)),
        len(groups),
        start,
        n,
        k,
    )
    if failed:
        raise MemoryError(f"no memory for a copy of x, shape {[*x.shape]}.")
    return y


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    format: str | WeightFormat = "rf8",
    dtype: torch.dtype = torch.float32,
    *,
    isa: str | None = None,
) -> torch.Tensor:
    """`decode(codes) * scale`, the product in float32, rounded to `dtype`.

    Args:
        codes: uint8 [..., rows, columns].
        scale: floating point, of a shape that broadcasts to that of the codes.
        format: of the codes.
        dtype: float32, bfloat16 or float16.
        isa: one of `isas()`; the best one, if None.

    Returns:
        A tensor of the shape of the codes.

    Raises:
        TypeError: an argument of another dtype. ValueError: of another shape, or not on the CPU.
    """
    tables, isa_number = format_tables(get_format(format)), isa_code(isa)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}.")
    check_dtype("codes", codes, (torch.uint8,))
    _check_float("scale", scale)
    try:
        fits = codes.ndim >= 2 and torch.broadcast_shapes(codes.shape, scale.shape) == codes.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            "dequantize needs codes [..., rows, columns] and a scale that broadcasts to them, got "
            f"{[*codes.shape]} and {[*scale.shape]}."
        )
    out = torch.empty(codes.shape, dtype=dtype)
    _decode(codes, scale.float(), out, tables, isa_number)
    return out


def _linear_blocks(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    tables: ctypes.Array,
    isa: int,
) -> torch.Tensor:
    """`linear` for many rows: decode the weights of some outputs, multiply, and so on."""
    n, k = codes.shape
    scale = scale.expand(n, 1)
    bias = None if bias is None else bias.to(x.dtype)
    height = min(n, max(64, BLOCK_BYTES // (k * x.itemsize)))
    block = torch.empty(height, k, dtype=x.dtype)
    if height == n:
        _decode(codes, scale, block, tables, isa)
        return torch.nn.functional.linear(x, block, bias)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        weight = block[: part.stop - start]
        _decode(codes[part], scale[part], weight, tables, isa)
        y[:, part] = torch.nn.functional.linear(x, weight, None if bias is None else bias[part])
    return y


@functools.cache
def _fast_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices faster than float32 ones here: not without AVX-512 or the like."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _decode(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, tables: ctypes.Array, isa: int) -> None:
    """`dequantize` of checked arguments into a contiguous tensor."""
    if out.numel() == 0:
        return
    lead, (rows, columns) = codes.shape[:-2], codes.shape[-2:]
    codes = with_rows(codes.reshape(-1, columns))
    scale = scale.reshape((1,) * (out.ndim - scale.ndim) + scale.shape)
    if 1 < scale.shape[:-2].numel() < lead.numel():
        scale = scale.expand(*lead, -1, -1)
    scale = scale.contiguous()
    scale_rows, scale_columns = scale.shape[-2:]
    library().hf_gg_rf8_dequantize(
        tables,
        isa,
        torch.get_num_threads(),
        codes.data_ptr(),
        codes.stride(0),
        scale.data_ptr(),
        scale_rows * scale_columns if scale.shape[:-2].numel() > 1 else 0,
        scale_columns if scale_rows > 1 else 0,
        1 if scale_columns > 1 else 0,
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        lead.numel(),
        rows,
        columns,
    )


def _check_float(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}.")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}.")

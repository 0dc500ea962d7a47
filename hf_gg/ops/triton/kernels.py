"""The Triton kernels. Importing this module imports Triton.

A code becomes a float by integer arithmetic in registers, never by a table look-up: its exponent field is rebased to
the float's, its residual state picks four mantissa bits out of a packed constant; the levels of a grid are converted.
Scales multiply float32 sums where they can, so that the operands of a product are exact.

Offsets into tensors are 64-bit. Shapes: x and y [M, K] and [M, N], codes [N, K], scale one number a row of codes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _decode(codes, DTYPE: tl.constexpr, FRACTIONS: tl.constexpr, RESIDUAL_BITS: tl.constexpr, BIAS: tl.constexpr):
    """The values of uint8 codes in DTYPE, exact; BIAS and FRACTIONS as `config.decoding` gives them."""
    word = codes.to(tl.int32)
    magnitude = word & 0x7F
    state = magnitude & ((1 << RESIDUAL_BITS) - 1)
    fraction = (FRACTIONS >> (state * 4)) & 15
    exponent = magnitude >> RESIDUAL_BITS
    if RESIDUAL_BITS == 0:
        values = tl.where(word == magnitude, magnitude, -magnitude).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        bits = ((word & 0x80) << 8) | ((exponent + (127 - BIAS)) << 7) | (fraction << 3)
        values = tl.where(magnitude == 0, 0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float16 and BIAS < 15:
        bits = ((word & 0x80) << 8) | ((exponent + (15 - BIAS)) << 10) | (fraction << 6)
        values = tl.where(magnitude == 0, 0, bits).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        # a float16 that needs subnormals comes from float32, too: the conversion is exact
        bits = ((word & 0x80) << 24) | ((exponent + (127 - BIAS)) << 23) | (fraction << 19)
        values = tl.where(magnitude == 0, 0, bits).to(tl.float32, bitcast=True).to(DTYPE)
    return values


@triton.jit
def _decode_packed(codes, PTX: tl.constexpr):
    """The values of uint8 codes in bfloat16 by the instructions that `packed.packed_decoding` gives."""
    return tl.inline_asm_elementwise(PTX, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _weights(
    codes,
    DTYPE: tl.constexpr,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Decoded codes as an operand of a product. UPCAST: in float32 (Triton's interpreter cannot multiply bfloat16)."""
    if PTX == "":  # noqa: SIM108  (Triton compiles one of the two)
        values = _decode(codes, DTYPE, FRACTIONS, RESIDUAL_BITS, BIAS)
    else:
        values = _decode_packed(codes, PTX)
    if UPCAST:
        values = values.to(tl.float32)
    return values


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    stride_codes_batch,
    stride_codes_n,
    stride_codes_k,
    stride_scale_batch,
    stride_scale,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE_PER_COLUMN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, n, k] = decode(codes[b, n, k]) * scale, a scale per n or per k; out is contiguous."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = ((tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    columns = ((tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask = (rows[:, None] < N) & (columns[None, :] < K)
    source = codes_ptr + batch * stride_codes_batch
    codes = tl.load(source + rows[:, None] * stride_codes_n + columns[None, :] * stride_codes_k, mask=mask, other=0)
    scale_ptr += batch * stride_scale_batch
    if SCALE_PER_COLUMN:
        scale = tl.load(scale_ptr + columns * stride_scale, mask=columns < K, other=0.0)[None, :]
    else:
        scale = tl.load(scale_ptr + rows * stride_scale, mask=rows < N, other=0.0)[:, None]
    values = _decode(codes, tl.float32, FRACTIONS, RESIDUAL_BITS, BIAS) * scale
    target = out_ptr + (batch * N + rows[:, None]) * K + columns[None, :]
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    x_rows,
    codes_rows,
    stride_x_k,
    stride_codes_k,
    first,
    last,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Float32 [BLOCK_N, BLOCK_M], the sum over columns [first, last) of decoded codes times x.

    The transposed product is formed: decoded codes are the left operand, which a matrix unit can take from registers.
    Pointers to rows are [rows, 1], all of them readable. EVEN: the number of columns is a multiple of BLOCK_K.
    """
    columns = tl.arange(0, BLOCK_K)[None, :]
    x_tile = x_rows + (first + columns).to(tl.int64) * stride_x_k
    codes_tile = codes_rows + (first + columns).to(tl.int64) * stride_codes_k
    step = tl.full((), BLOCK_K, tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN:
            x = tl.load(x_tile)
            codes = tl.load(codes_tile)
        else:
            x = tl.load(x_tile, mask=columns < last - start, other=0.0)
            codes = tl.load(codes_tile, mask=columns < last - start, other=0)
        weight = _weights(codes, x_rows.dtype.element_ty, FRACTIONS, RESIDUAL_BITS, BIAS, PTX, UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
        x_tile += step * stride_x_k
        codes_tile += step * stride_codes_k
    return total


@triton.jit
def linear_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x_m,
    stride_x_k,
    stride_codes_n,
    stride_codes_k,
    stride_scale,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    UNSHIFT: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x @ (decode(codes) * scale).T + bias, summed in float32; y is contiguous, bias_ptr may be None.

    With SPLIT > 1 the columns are split over as many programs, and y is their float32 sums [SPLIT, M, N], which
    `add_parts_kernel` adds, scales and rounds.
    """
    # programs that share rows of codes run next to each other
    tiles_m = tl.cdiv(M, BLOCK_M)
    rows_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    width = tl.cdiv(K, BLOCK_K * SPLIT) * BLOCK_K
    first = part * width
    # rows past the end read others, and are not stored
    total = _product(
        x_ptr + (rows_m % M).to(tl.int64)[:, None] * stride_x_m,
        codes_ptr + (rows_n % N).to(tl.int64)[:, None] * stride_codes_n,
        stride_x_k,
        stride_codes_k,
        first,
        tl.minimum(first + width, K),
        FRACTIONS,
        RESIDUAL_BITS,
        BIAS,
        PTX,
        UPCAST,
        EVEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    rows_m = rows_m.to(tl.int64)
    rows_n = rows_n.to(tl.int64)
    target = (part.to(tl.int64) * M + rows_m[None, :]) * N + rows_n[:, None]
    if SPLIT == 1:
        scale = tl.load(scale_ptr + rows_n * stride_scale, mask=rows_n < N, other=0.0)
        total = total * UNSHIFT * scale[:, None]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + target, total.to(y_ptr.dtype.element_ty), mask=(rows_m[None, :] < M) & (rows_n[:, None] < N))


@triton.jit
def add_parts_kernel(
    parts_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    stride_scale,
    UNSHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[m, n] = (parts[0, m, n] + ... ) * scale[n] + bias[n], always added in the same order."""
    row = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * M + row) * N + columns, mask=columns < N, other=0.0)
    total = total * UNSHIFT * tl.load(scale_ptr + columns * stride_scale, mask=columns < N, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + columns, total.to(y_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def _add_scaled_product(total, x, scale, weight, UPCAST: tl.constexpr):
    """total + (x * scale) @ weight: x [m, k] in its dtype, scale [k] float32, weight [k, n] in the dtype of x."""
    DTYPE: tl.constexpr = x.dtype
    if DTYPE == tl.float16:
        # Small scales would push float16 into its subnormals: take a power of two out of the tile's scales, above
        # them all, so that the scaled numbers do not overflow either.
        largest = tl.max(tl.abs(scale), axis=0)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0
        unit = tl.maximum(unit, 1.1754943508222875e-38)
        scaled = (x.to(tl.float32) * (scale / unit)[None, :]).to(tl.float16)
        total += tl.dot(scaled, weight, input_precision="ieee") * unit
    else:
        scaled = x.to(tl.float32) * scale[None, :]
        if not UPCAST:
            scaled = scaled.to(DTYPE)
        total = tl.dot(scaled, weight, total, input_precision="ieee")
    return total


@triton.jit
def grad_input_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_grad_m,
    stride_grad_n,
    stride_codes_n,
    stride_codes_k,
    stride_scale,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    UNSHIFT: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[M, K] = (grad * scale) @ decode(codes), summed in float32; out is contiguous. UPCAST as above."""
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    rows_m = ((tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = ((tl.program_id(0) // tiles_m) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    grad_rows = grad_ptr + rows_m[:, None] * stride_grad_m
    codes_columns = codes_ptr + columns[None, :] * stride_codes_k
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        grad = tl.load(
            grad_rows + n[None, :] * stride_grad_n, mask=(rows_m[:, None] < M) & (n[None, :] < N), other=0.0
        )
        codes = tl.load(
            codes_columns + n[:, None] * stride_codes_n, mask=(n[:, None] < N) & (columns[None, :] < K), other=0
        )
        scale = tl.load(scale_ptr + n * stride_scale, mask=n < N, other=0.0)
        weight = _weights(codes, DTYPE, FRACTIONS, RESIDUAL_BITS, BIAS, PTX, UPCAST)
        total = _add_scaled_product(total, grad, scale, weight, UPCAST)
    target = out_ptr + rows_m[:, None] * K + columns[None, :]
    mask = (rows_m[:, None] < M) & (columns[None, :] < K)
    tl.store(target, (total * UNSHIFT).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    ends_ptr,
    y_ptr,
    G,
    N,
    K,
    stride_x_m,
    stride_x_k,
    stride_codes_g,
    stride_codes_n,
    stride_codes_k,
    stride_scale_g,
    stride_scale,
    FRACTIONS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    UNSHIFT: tl.constexpr,
    PTX: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE_PER_K: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[r] = x[r] @ (decode(codes[g]) * scale[g]).T for the rows r of each group g; y is contiguous.

    Every program finds its group from the ends of all, so that the host need not know them. GROUPS is a power of two,
    at least G. The scale is one number an n, or with SCALE_PER_K one a k. Rows past the last end are not written.
    """
    groups = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + groups, mask=groups < G, other=0).to(tl.int32)
    ends = tl.associative_scan(ends, 0, _larger)  # an end before an earlier one makes an empty group
    starts = tl.where(groups == 0, 0, tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups < G), other=0))
    starts = tl.associative_scan(starts.to(tl.int32), 0, _larger)
    tiles = (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M
    tiles = tl.where(groups < G, tiles, 0)
    until = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    group = tl.sum((until <= tile).to(tl.int32), 0)
    if group >= G:
        return
    mine = groups == group
    begin = tl.sum(tl.where(mine, starts, 0), 0) + (tile - tl.sum(tl.where(mine, until - tiles, 0), 0)) * BLOCK_M
    end = tl.sum(tl.where(mine, ends, 0), 0)
    rows_m = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + tl.minimum(rows_m, end - 1)[:, None] * stride_x_m
    codes_rows = codes_ptr + group.to(tl.int64) * stride_codes_g + (rows_n % N).to(tl.int64)[:, None] * stride_codes_n
    rows_n = rows_n.to(tl.int64)
    scale_ptr += group.to(tl.int64) * stride_scale_g
    if SCALE_PER_K:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            x = tl.load(x_rows + k[None, :] * stride_x_k, mask=k[None, :] < K, other=0.0)
            codes = tl.load(codes_rows + k[None, :] * stride_codes_k, mask=k[None, :] < K, other=0)
            scale = tl.load(scale_ptr + k * stride_scale, mask=k < K, other=0.0)
            weight = _weights(codes, x.dtype, FRACTIONS, RESIDUAL_BITS, BIAS, PTX, UPCAST)
            total = _add_scaled_product(total, x, scale, tl.trans(weight), UPCAST)
        total = tl.trans(total) * UNSHIFT
    else:
        total = _product(
            x_rows,
            codes_rows,
            stride_x_k,
            stride_codes_k,
            0,
            K,
            FRACTIONS,
            RESIDUAL_BITS,
            BIAS,
            PTX,
            UPCAST,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        scale = tl.load(scale_ptr + rows_n * stride_scale, mask=rows_n < N, other=0.0)
        total = total * UNSHIFT * scale[:, None]
    target = rows_m[None, :] * N + rows_n[:, None]
    tl.store(y_ptr + target, total.to(y_ptr.dtype.element_ty), mask=(rows_m[None, :] < end) & (rows_n[:, None] < N))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


# Whether these kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported), on CPU tensors.
INTERPRETED = not isinstance(linear_kernel, JITFunction)

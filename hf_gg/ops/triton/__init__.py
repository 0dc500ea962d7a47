"""The operators as Triton kernels, for CUDA devices, and for CPU tensors under Triton's interpreter.

Importing this package does not import Triton; the first call does. The interpreter runs the kernels slowly on the CPU
and is chosen by TRITON_INTERPRET=1 in the environment before that first call.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from ...formats import WeightFormat, get_format
from .config import Tiles, decoding, dequantize_tiles, grad_tiles, linear_tiles


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def available() -> bool:
    """Whether the kernels can run in this process."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot run in this process, or None if they can."""
    try:
        from . import kernels
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton cannot be imported ({error})"
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device (on a CPU, TRITON_INTERPRET=1 runs the kernels slowly, for tests)"
    if not kernels.INTERPRETED and torch.version.hip is None:
        capability = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
        if capability < _OLDEST:
            found, oldest = (".".join(map(str, version)) for version in (capability, _OLDEST))
            return f"a CUDA device has compute capability {found}, and Triton uses the matrix units from {oldest} on"
    return None


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, format: str | WeightFormat, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`decode(codes) * scale`, the product in float32, rounded to `dtype`.

    Args:
        codes: uint8 [..., N, K], any strides.
        scale: float32 [..., N, 1], [..., 1, K] or [..., 1, 1]; leading dimensions as those of `codes`, or 1.
        format: a weight format or its name.
        dtype: float32, bfloat16 or float16.

    Returns:
        Contiguous tensor of the shape of `codes`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown format.
    """
    fmt = get_format(format)
    _check_codes(codes)
    _check_dtype("dtype", dtype)
    if codes.ndim < 2:
        raise ValueError(f"codes must have at least two dimensions, got shape {tuple(codes.shape)}.")
    _check_same_device(codes, scale=scale)
    *batch, rows, columns = codes.shape
    per_column = scale.ndim >= 2 and scale.shape[-1] == columns and scale.shape[-2] == 1 and columns != 1
    wanted = (*batch, 1, columns) if per_column else (*batch, rows, 1)
    scale = _expanded_scale(scale, wanted)
    kernels = _kernels(codes)
    out = torch.empty((*batch, rows, columns), dtype=_stored(kernels, dtype), device=codes.device)
    if codes.numel() == 0:
        return out.to(dtype)

    codes = codes.reshape(-1, rows, columns)
    scale = scale.reshape(-1, scale.shape[-2] * scale.shape[-1])
    tiles = dequantize_tiles()
    constants = decoding(fmt, torch.float32)
    del constants["UNSHIFT"]
    _launch(
        kernels.dequantize_kernel,
        codes.shape[0] * _blocks(rows, tiles.n) * _blocks(columns, tiles.k),
        tiles,
        (codes, scale, out, rows, columns, *codes.stride(), *scale.stride()),
        SCALE_PER_COLUMN=per_column,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **constants,
    )
    return out.to(dtype)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    format: str | WeightFormat,
) -> torch.Tensor:
    """`x @ (decode(codes) * scale).T + bias`, summed in float32; the weight is never rounded to the dtype of `x`.

    Args:
        x: float32, bfloat16 or float16 [M, K], any strides.
        codes: uint8 [N, K], any strides.
        scale: float32 [N, 1] or [1, 1].
        bias: floating point [N], or None.
        format: a weight format or its name.

    Returns:
        Contiguous [M, N] in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown format.
    """
    fmt = get_format(format)
    _check_matrices("x", x, codes, scale, features=1)
    (rows, inner), outer = x.shape, codes.shape[0]
    scale = _expanded_scale(scale, (outer, 1))
    if bias is not None:
        _check_same_device(codes, bias=bias)
        if tuple(bias.shape) != (outer,) or not bias.is_floating_point():
            raise ValueError(f"bias must be floating point [{outer}], got {bias.dtype} {tuple(bias.shape)}.")
        bias = bias.contiguous()
    kernels = _kernels(codes)
    y = torch.empty((rows, outer), dtype=_stored(kernels, x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)

    tiles = linear_tiles(rows, x.dtype)
    _launch(
        kernels.linear_kernel,
        _blocks(rows, tiles.m) * _blocks(outer, tiles.n),
        tiles,
        (x, codes, scale, bias, y, rows, outer, inner, *x.stride(), *codes.stride(), scale.stride(0)),
        UPCAST=_upcast(kernels, x.dtype),
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **decoding(fmt, x.dtype),
    )
    return y.to(x.dtype)


def linear_grad_input(
    grad: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, format: str | WeightFormat
) -> torch.Tensor:
    """`grad @ (decode(codes) * scale)`, summed in float32: the gradient of `linear` with respect to x.

    The product of gradient and scale is rounded to the dtype of `grad`.

    Args:
        grad: float32, bfloat16 or float16 [M, N], any strides.
        codes: uint8 [N, K], any strides.
        scale: float32 [N, 1] or [1, 1].
        format: a weight format or its name.

    Returns:
        Contiguous [M, K] in the dtype of `grad`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown format.
    """
    fmt = get_format(format)
    _check_matrices("grad", grad, codes, scale, features=0)
    (rows, inner), outer = grad.shape, codes.shape[1]
    scale = _expanded_scale(scale, (inner, 1))
    kernels = _kernels(codes)
    out = torch.empty((rows, outer), dtype=_stored(kernels, grad.dtype), device=grad.device)
    if out.numel() == 0:
        return out.to(grad.dtype)

    tiles = grad_tiles(rows, grad.dtype)
    _launch(
        kernels.grad_input_kernel,
        _blocks(rows, tiles.m) * _blocks(outer, tiles.k),
        tiles,
        (grad, codes, scale, out, rows, inner, outer, *grad.stride(), *codes.stride(), scale.stride(0)),
        UPCAST=_upcast(kernels, grad.dtype),
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **decoding(fmt, grad.dtype),
    )
    return out.to(grad.dtype)


def _check_codes(codes: torch.Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}.")


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"{name}: the Triton kernels take {', '.join(map(str, DTYPES))}, got {dtype}: convert it first."
        )


def _check_same_device(codes: torch.Tensor, **others: torch.Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != codes.device:
            raise ValueError(f"{name} is on {tensor.device} and codes on {codes.device}: move them to one device.")


def _check_matrices(name: str, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, features: int) -> None:
    """Check the operands of a product over dimension `features` of the codes; `name` is what the caller calls x."""
    _check_codes(codes)
    _check_dtype(name, x.dtype)
    _check_same_device(codes, **{name: x}, scale=scale)
    if codes.ndim != 2:
        raise ValueError(f"codes must be a matrix, got shape {tuple(codes.shape)}.")
    if x.ndim != 2 or x.shape[1] != codes.shape[features]:
        raise ValueError(
            f"{name} must have shape [rows, {codes.shape[features]}] for codes {tuple(codes.shape)}, "
            f"got {tuple(x.shape)}."
        )


def _expanded_scale(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A view of the scale with the wanted shape; a shared scale gets stride 0."""
    if scale.dtype != torch.float32:
        raise ValueError(f"scale must be float32, got {scale.dtype}.")
    if scale.ndim != len(shape) or any(size not in (1, want) for size, want in zip(scale.shape, shape, strict=True)):
        raise ValueError(f"scale must have shape {shape}, or 1 in place of a size, got {tuple(scale.shape)}.")
    return scale.expand(shape)


def _kernels(codes: torch.Tensor):
    """The module of the kernels, after a check that they can run on the codes' device."""
    reason = why_not()
    if reason is not None:
        raise ValueError(f"The Triton backend cannot run: {reason}. Use another backend.")
    from . import kernels

    if not kernels.INTERPRETED and codes.device.type != "cuda":
        raise ValueError(f"The Triton backend needs CUDA tensors, codes are on {codes.device}: use another backend.")
    return kernels


def _upcast(kernels, dtype: torch.dtype) -> bool:
    # The interpreter's product of bfloat16 tensors is wrong.
    return kernels.INTERPRETED and dtype == torch.bfloat16


def _stored(kernels, dtype: torch.dtype) -> torch.dtype:
    # The interpreter truncates float32 to bfloat16, so there the kernels store float32 and torch rounds.
    return torch.float32 if _upcast(kernels, dtype) else dtype


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _launch(kernel, programs: int, tiles: Tiles, arguments: tuple, **constants) -> None:
    device = arguments[0].device
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **tiles.options, **constants)

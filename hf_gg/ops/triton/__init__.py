"""The operators as Triton kernels, for CUDA devices, and for CPU tensors under Triton's interpreter.

Importing this package does not import Triton; the first call does. The interpreter runs the kernels slowly on the CPU
and is chosen by TRITON_INTERPRET=1 in the environment before that first call.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess

import torch

from ...formats import WeightFormat, get_format
from .config import Tiles, decoding, fitted, narrow, split, tiles_for


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
# Rows from which decoding once and the library's product are taken instead of a kernel that decodes in every tile.
DENSE_ROWS = 2048


class KernelError(RuntimeError):
    """A kernel cannot be compiled or launched on this device; the message names it and says what is supported."""


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
    tiles = tiles_for("dequantize", rows, dtype, _device_name(codes))
    constants = decoding(fmt, torch.float32)
    del constants["UNSHIFT"], constants["PTX"]
    _launch(
        kernels.dequantize_kernel,
        (codes.shape[0] * _blocks(rows, tiles.n) * _blocks(columns, tiles.k),),
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

    if rows >= DENSE_ROWS and not kernels.INTERPRETED and x.dtype != torch.float32:
        # so many rows pay for decoding once, and then nothing beats the library's product
        weight = dequantize(codes, scale, fmt, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    tiles, even = fitted(tiles_for("linear", rows, x.dtype, _device_name(codes)), inner)
    blocks = _blocks(rows, tiles.m) * _blocks(outer, tiles.n)
    parts = split(tiles, blocks, inner)
    target = y if parts == 1 else torch.empty((parts, rows, outer), dtype=torch.float32, device=x.device)
    constants = decoding(fmt, x.dtype, packed=_takes_ptx(kernels))
    _launch(
        kernels.linear_kernel,
        (blocks, parts),
        tiles,
        (x, codes, scale, bias, target, rows, outer, inner, *x.stride(), *codes.stride(), scale.stride(0)),
        UPCAST=_upcast(kernels, x.dtype),
        EVEN=even,
        SPLIT=parts,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **constants,
    )
    if parts > 1:
        _launch(
            kernels.add_parts_kernel,
            (_blocks(outer, 256), rows),
            Tiles(1, 256, 1, 4, 1),
            (target, scale, bias, y, rows, outer, scale.stride(0)),
            UNSHIFT=constants["UNSHIFT"],
            SPLIT=parts,
            BLOCK_N=256,
        )
    return y.to(x.dtype)


def grouped_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    format: str | WeightFormat,
    transposed: bool = False,
) -> torch.Tensor:
    """`linear` of each group of rows with its own codes, in one launch; nothing is read back by the host.

    Args:
        x: float32, bfloat16 or float16 [rows, in], sorted by group, any strides.
        codes: uint8 [groups, out, in], or [groups, in, out] if `transposed`.
        scale: float32 [groups, a, 1] or [groups, 1, b], a and b as in the codes or 1.
        offsets: int32 or int64 [groups], the row at which each group ends. Rows past the last one give zeros. They are
            not read back to be checked: an end past the rows is taken for the last row.
        format: a weight format or its name.
        transposed: orientation of the codes.

    Returns:
        Contiguous [rows, out] in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown format.
    """
    fmt = get_format(format)
    _check_codes(codes)
    _check_dtype("x", x.dtype)
    _check_same_device(codes, x=x, scale=scale, offsets=offsets)
    if codes.ndim != 3 or x.ndim != 2 or x.shape[1] != codes.shape[1 if transposed else 2]:
        raise ValueError(f"x must be [rows, in] and codes [groups, out, in], got {[*x.shape]} and {[*codes.shape]}.")
    if offsets.shape != codes.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 or int64 [{codes.shape[0]}], got {offsets.dtype} {[*offsets.shape]}.")
    if transposed:
        codes, scale = codes.transpose(1, 2), scale.transpose(1, 2)
    (groups, outer, inner), rows = codes.shape, x.shape[0]
    per_k = scale.shape[-1] != 1
    scale = _expanded_scale(scale, (groups, 1, inner) if per_k else (groups, outer, 1)).reshape(groups, -1)
    kernels = _kernels(codes)
    y = torch.zeros((rows, outer), dtype=_stored(kernels, x.dtype), device=x.device)
    if y.numel() == 0 or inner == 0:
        return y.to(x.dtype)

    kernel = "grouped_transposed" if per_k else "grouped"
    tiles, even = fitted(tiles_for(kernel, _blocks(rows, groups), x.dtype, _device_name(codes)), inner)
    _launch(
        kernels.grouped_kernel,
        (_blocks(rows, tiles.m) + groups, _blocks(outer, tiles.n)),
        tiles,
        (
            x,
            codes,
            scale,
            offsets.clamp(0, rows),
            y,
            groups,
            outer,
            inner,
            *x.stride(),
            *codes.stride(),
            *scale.stride(),
        ),
        UPCAST=_upcast(kernels, x.dtype),
        EVEN=even,
        SCALE_PER_K=per_k,
        GROUPS=1 << max(groups - 1, 1).bit_length(),
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **decoding(fmt, x.dtype, packed=_takes_ptx(kernels)),
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

    tiles = tiles_for("grad_input", rows, grad.dtype, _device_name(codes))
    tiles = narrow(tiles) if outer % 16 else tiles
    _launch(
        kernels.grad_input_kernel,
        (_blocks(rows, tiles.m) * _blocks(outer, tiles.k),),
        tiles,
        (grad, codes, scale, out, rows, inner, outer, *grad.stride(), *codes.stride(), scale.stride(0)),
        UPCAST=_upcast(kernels, grad.dtype),
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        **decoding(fmt, grad.dtype, packed=_takes_ptx(kernels)),
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


def _takes_ptx(kernels) -> bool:
    return not kernels.INTERPRETED and torch.version.hip is None


@functools.cache
def _name_of(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def _device_name(tensor: torch.Tensor) -> str:
    return _name_of(tensor.device.index) if tensor.device.type == "cuda" else ""


def _launch(kernel, programs: tuple[int, ...], tiles: Tiles, arguments: tuple, **constants) -> None:
    from triton.errors import TritonError

    device = arguments[0].device
    try:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[programs](*arguments, **tiles.options, **constants)
    # RuntimeError: no C compiler for the launcher, a failed pass, an error of the driver
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        raise KernelError(
            f"the Triton kernel {name} cannot be compiled or launched on {device} ({type(error).__name__}: "
            f"{str(error)[:200]}): the kernels are for NVIDIA GPUs of compute capability 8.0 and newer and for AMD's "
            "gfx942; take backend 'torch' elsewhere."
        ) from error

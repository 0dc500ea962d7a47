"""The loaded kernels, the instruction set that runs, formats as the kernels read them, and checks of arguments."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

import torch

from ...formats import ResidualFloat, WeightFormat
from ...native import Lazy
from .build import load


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# Each includes those before it.
_ISAS_ARM, _ISAS_X86 = ("portable", "neon"), ("portable", "avx2", "avx512", "avx512-bf16")
ISAS = _ISAS_ARM if platform.machine().lower() in ("aarch64", "arm64") else _ISAS_X86

_LAZY = Lazy(load, "the CPU kernels are")
available, why_not, library = _LAZY.available, _LAZY.why_not, _LAZY.get


def isas() -> tuple[str, ...]:
    """The instruction sets that the processor and the compiler have, the best one last."""
    return ISAS[: library().hf_gg_rf8_isa() + 1]


@functools.cache
def isa_code(name: str | None) -> int:
    """Number of an instruction set; of `$HF_GG_CPU_ISA`, or else the best one, for None."""
    supported = isas()
    name = name or os.environ.get("HF_GG_CPU_ISA") or supported[-1]
    if name not in supported:
        raise ValueError(f"Instruction set {name!r} is not supported here: use one of {', '.join(supported)}.")
    return ISAS.index(name)


@functools.cache
def format_tables(fmt: WeightFormat) -> ctypes.Array:
    """A format's tables as the kernels read them."""
    values = fmt.table(torch.float32)
    nearest = torch.zeros(8192, dtype=torch.uint8)
    if isinstance(fmt, ResidualFloat):  # the kernels round to no other format
        # one number of each of the intervals that share a nearest code
        nearest = fmt.encode(((torch.arange(8192, dtype=torch.int32) << 18) + 1).view(torch.float32))
    tables = ctypes.create_string_buffer(library().hf_gg_rf8_format_size())
    if library().hf_gg_rf8_format_init(tables, values.data_ptr(), nearest.data_ptr(), fmt.residual_bits):
        raise ValueError(f"the CPU kernels cannot serve the format {fmt.name}: its values are not exact in bfloat16.")
    return tables


def check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """`TypeError` for another dtype, `ValueError` for another device than the CPU."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {tensor.dtype}.")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, got {tensor.device}.")


def with_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied unless the elements of a row are neighbours in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()

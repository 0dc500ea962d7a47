"""Compiled C kernels for CPUs: linear layers, decoding, and quantization.

They are compiled at first use (`hf_gg.native`) and need no more than a C compiler; without one `available()` is False
and `why_not()` says why. `HF_GG_CPU_KERNELS=0` turns them off; `HF_GG_CPU_ISA` names one of `isas()` instead of the
best. Nothing here is differentiable: `hf_gg.ops.library` is.
"""

from __future__ import annotations

from ...native import TURNED_OFF
from .decode import dequantize, grouped_linear, linear
from .encode import QUANTIZE_SCALES, quantize
from .runtime import DTYPES, ISAS, available, isas, why_not


__all__ = [
    "DTYPES",
    "ISAS",
    "QUANTIZE_SCALES",
    "TURNED_OFF",
    "available",
    "dequantize",
    "grouped_linear",
    "isas",
    "linear",
    "quantize",
    "why_not",
]

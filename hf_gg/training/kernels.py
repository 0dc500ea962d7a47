"""The penalty's step in C, compiled at first use; `penalty.py` has the same in torch."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

from ..native import Lazy, Library


_LIBRARY = Library(
    name="shrink",
    folder=Path(__file__).parent,
    headers=(),
    sources=("shrink.c",),
    flags=("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-trapping-math"),
    # tried in turn: a compiler may lack OpenMP or clones of functions
    variants=(("-fopenmp",), (), ("-fopenmp", "-DHF_GG_PORTABLE"), ("-DHF_GG_PORTABLE",)),
    functions={"hf_gg_shrink": ("n", "pnpnn")},
)
_LAZY = Lazy(_LIBRARY.load, "the kernels are")
available, why_not = _LAZY.available, _LAZY.why_not


def applies(w: torch.Tensor, factor: float) -> bool:
    """Whether the kernel can make a step on dense blocks of a tensor: float32 on a CPU, `factor` large enough for a
    logarithm."""
    return w.dtype == torch.float32 and w.device.type == "cpu" and factor > 1e-30 and available()


def shrink_(w: torch.Tensor, step: float, shape: float, scale: float, eps: float, stop: bool = True) -> bool:
    """See `penalty.shrink_`; without `stop`, weights may cross zero, as in `penalty.plain_`.

    Returns:
        Whether all weights are finite afterwards.
    """
    numbers = (ctypes.c_float * 4)(1 / scale, eps, shape - 1, math.log2(step * shape))
    return _LAZY.get().hf_gg_shrink(w.data_ptr(), w.numel(), numbers, int(stop), torch.get_num_threads()) == 0

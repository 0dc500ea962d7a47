"""The penalty's step in C, compiled at first use; `penalty.py` has the same in torch."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch

from ..native import Library, try_load


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


def applies(w: torch.Tensor, factor: float) -> bool:
    """Whether the kernel can make a step on a flat block: float32 on a CPU, `factor` large enough for a logarithm."""
    return w.dtype == torch.float32 and w.device.type == "cpu" and w.is_contiguous() and factor > 1e-30 and available()


def available() -> bool:
    """Whether the compiled step can run here. The first call may compile it: about a second, once per machine."""
    return _loaded()[0] is not None


def why_not() -> str | None:
    """Why the compiled step cannot run here, or None."""
    return _loaded()[1]


def shrink_(w: torch.Tensor, step: float, shape: float, scale: float, eps: float, stop: bool = True) -> bool:
    """See `penalty.shrink_`; without `stop`, weights may cross zero, as in `penalty.plain_`.

    Returns:
        Whether all weights are finite afterwards.
    """
    library = _loaded()[0]
    assert library is not None
    numbers = (ctypes.c_float * 4)(1 / scale, eps, shape - 1, math.log2(step * shape))
    return library.hf_gg_shrink(w.data_ptr(), w.numel(), numbers, int(stop), torch.get_num_threads()) == 0


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    return try_load(_LIBRARY.load)

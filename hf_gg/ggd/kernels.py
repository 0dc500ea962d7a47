"""The sums over CPU tensors in C, compiled at first use: one call reads many tensors, in threads.

Every value is taken as float64 and added in chunks of a fixed size, so that the number of threads changes nothing.
Where there is no compiler, on other devices and for other dtypes, `scan.py` and `likelihood.py` do the same in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..native import Lazy, Library


_LIBRARY = Library(
    name="ggd",
    folder=Path(__file__).parent,
    headers=("kernels.h",),
    sources=("kernels.c",),
    flags=("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"),
    variants=(("-fopenmp",), (), ("-fopenmp", "-DHF_GG_PORTABLE"), ("-DHF_GG_PORTABLE",)),
    functions={
        "hf_gg_ggd_isa": ("n", ""),
        "hf_gg_ggd_moments": ("n", "nnnpp"),
        "hf_gg_ggd_powers": ("n", "nnnpp"),
        "hf_gg_ggd_near": ("n", "nnppnpp"),
    },
)
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# `job` in kernels.c
_JOB = np.dtype(
    [("x", "u8"), ("count", "i8"), ("dtype", "i8"), ("parameters", "f8", 4), ("near", "u8"), ("capacity", "i8"),
     ("found", "u8")]
)  # fmt: skip
_LAZY = Lazy(_LIBRARY.load, "the kernels are")
available, why_not = _LAZY.available, _LAZY.why_not


def reads(x: torch.Tensor) -> bool:
    """Whether the kernels read this tensor once its last dimension is dense: on the CPU, of a dtype that they know."""
    plain = type(x) is torch.Tensor  # others, such as DTensor, may have no memory of their own
    return plain and x.device.type == "cpu" and x.layout == torch.strided and x.dtype in _DTYPES and available()


def suits(x: torch.Tensor) -> bool:
    """Whether the kernels read this matrix as it is."""
    return (x.stride(-1) == 1 or x.shape[-1] < 2) and reads(x)


def moments(rows: Sequence[torch.Tensor], pivots: np.ndarray, higher: bool) -> np.ndarray:
    """The sums of each row of dense matrices [rows, values] about its pivot; float64 [all rows, 10].

    Columns: count, not finite, Σd, Σsign d, Σ|d|, Σd², Σd³, Σd⁴, smallest, largest.
    """
    jobs = _jobs(rows)
    jobs["parameters"][:, 0] = pivots
    jobs["parameters"][:, 1] = higher
    return _call("hf_gg_ggd_moments", jobs, 10)


def powers(
    rows: Sequence[torch.Tensor], nu: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, score: torch.Tensor | bool
) -> np.ndarray:
    """Σ z^ν lnᵏz, k = 0 … 4, z = |w - μ| / α; where `score`, Σ sign(w - μ) z^(ν-1) lnᵏz, k = 0, 1; [all rows, 7]."""
    jobs = _jobs(rows)
    for column, values in enumerate((nu, alpha, mu, score)):
        jobs["parameters"][:, column] = values
    return _call("hf_gg_ggd_powers", jobs, 7)


def near(x: torch.Tensor, center: float, half: float, shapes: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """With z = (w - center) / half of a dense row: all |z| ≤ 6, sorted, and Σ|z|^ν z^-k of the others, [2, 9].

    Of the second shape, which only says how much another one would change, the orders from 5 on are 0.
    """
    capacity = 1 << 16
    while True:
        values = np.empty(capacity)
        found, sums = _near(x.data_ptr(), len(x), _DTYPES[x.dtype], (center, half, *shapes), values)
        if found <= capacity:
            return np.sort(values[:found]), sums[:-1].reshape(2, 9)
        capacity = found


def cell(values: np.ndarray, center: float, half: float, shapes: tuple[float, float]) -> tuple[float, np.ndarray]:
    """With z = (w - center) / half: Σ max(|z| - 1, 0)^ν over |z| ≤ 6 for the first ν, Σ|z|^ν z^-k of the others.

    See `near`.
    """
    _, sums = _near(values.ctypes.data, len(values), 0, (center, half, *shapes), np.empty(0))
    return float(sums[-1]), sums[:-1].reshape(2, 9)


def _near(
    pointer: int, count: int, dtype: int, parameters: tuple[float, ...], values: np.ndarray
) -> tuple[int, np.ndarray]:
    job, found, sums = np.zeros(1, _JOB), np.zeros(1, np.int64), np.empty(19)
    job[0] = (pointer, count, dtype, parameters, 0, 0, 0)
    library, isa = _library()
    arguments = (job.ctypes.data, values.ctypes.data, len(values), found.ctypes.data, sums.ctypes.data)
    if library.hf_gg_ggd_near(isa, torch.get_num_threads(), *arguments):
        raise MemoryError("no memory for the sums of a fit")
    return int(found[0]), sums


def _jobs(rows: Sequence[torch.Tensor]) -> np.ndarray:
    jobs = np.zeros(sum(len(x) for x in rows), _JOB)
    start = 0
    for x in rows:
        own = jobs[start : start + len(x)]
        own["x"] = x.data_ptr() + np.arange(len(x), dtype=np.uint64) * np.uint64(x.stride(0) * x.element_size())
        own["count"], own["dtype"] = x.shape[1], _DTYPES[x.dtype]
        start += len(x)
    return jobs


def _call(name: str, jobs: np.ndarray, sums: int) -> np.ndarray:
    out = np.empty((len(jobs), sums))
    library, isa = _library()
    if getattr(library, name)(isa, torch.get_num_threads(), len(jobs), jobs.ctypes.data, out.ctypes.data):
        raise MemoryError("no memory for the sums of a fit")
    return out


def _library() -> tuple[ctypes.CDLL, int]:
    library = _LAZY.get()
    return library, library.hf_gg_ggd_isa()

"""Registers the C kernel for few rows with PyTorch's dispatcher, without a compiler of C++ and without headers.

PyTorch's library offers a C interface that stays the same from release to release (`torch/csrc/stable/c/shim.h`). Its
functions are looked up by name in the library that is loaded already and handed to `boxed.c`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from pathlib import Path

import torch

from ...formats import get_format
from .decode import FEW_ROWS
from .runtime import available, format_tables, isa_code, library


# What boxed.c calls, in the order of its `interface`.
FUNCTIONS = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_new_stable_ivalue",
    "torch_delete_stable_ivalue",
    "torch_get_num_threads",
)
_DTYPES = ("uint8", "float32", "bfloat16", "float16")
# The release whose interface boxed.c is written against: 2.13.
_VERSION = 2 << 56 | 13 << 48


_lock = threading.Lock()
_numbers: dict[str, int | None] = {}


def format_number(name: str) -> int | None:
    """The number by which `hf_gg::few_rows` knows a format; None where there is no such kernel."""
    if name in _numbers:
        return _numbers[name]
    with _lock:  # Python's own is not held in C, where two threads would count up at once
        if name not in _numbers:
            number = library().hf_gg_rf8_register_format(format_tables(get_format(name))) if _register() else -1
            _numbers[name] = None if number < 0 else number
    return _numbers[name]


@functools.cache
def _register() -> bool:
    if not available():
        return False
    found = _interface()
    if found is None:
        return False
    functions, dtypes = found
    return library().hf_gg_rf8_register(functions, dtypes, isa_code(None), FEW_ROWS, _VERSION) == 0


def _interface() -> tuple[ctypes.Array, ctypes.Array] | None:
    """PyTorch's C functions and its numbers of dtypes; None where this PyTorch lacks one."""
    suffix = {"darwin": "dylib"}.get(sys.platform, "so")
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        loaded = ctypes.CDLL(str(path))
        pointers = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in FUNCTIONS]
        dtypes = [getattr(loaded, f"aoti_torch_dtype_{name}")() for name in _DTYPES]
    except (OSError, AttributeError):
        return None
    return (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(dtypes))(*dtypes)

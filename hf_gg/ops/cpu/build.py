"""What the C kernels are made from, and their entry points."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ...native import BuildError, Library, cache_directory, find_compiler


__all__ = ["BuildError", "cache_directory", "find_compiler", "library_name", "load"]

HEADERS = ("rf8.h",)
SOURCES = ("rf8.c", "boxed.c", "portable.c", "avx2.c", "avx512.c", "neon.c")
# No contraction: quantization is bit for bit that of torch, which rounds every product.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
# Tried in turn: an old compiler may lack OpenMP or the newest instructions.
VARIANTS = (("-fopenmp",), (), ("-fopenmp", "-DHF_GG_PORTABLE"), ("-DHF_GG_PORTABLE",))

# Of the functions in rf8.c and boxed.c, as `hf_gg.native.Library` takes them.
_SIGNATURES = {
    "hf_gg_rf8_isa": ("n", ""),
    "hf_gg_rf8_format_size": ("n", ""),
    "hf_gg_rf8_format_init": ("n", "pppn"),
    "hf_gg_rf8_linear": ("n", "pnnpnnpnpnpnpnnnn"),
    "hf_gg_rf8_grouped": ("n", "pnnpnnpnnpnnpnpnpnnnn"),
    "hf_gg_rf8_register": ("n", "ppnnn"),
    "hf_gg_rf8_register_format": ("n", "p"),
    "hf_gg_rf8_dequantize": ("", "pnnpnpnnnpnnnn"),
    "hf_gg_rf8_quantize": ("n", "pnnnpnnnnpnpnpp"),
}


def load() -> ctypes.CDLL:
    """Return the library, compiled before if the cache does not hold it.

    Raises:
        BuildError: there is no compiler, it fails, its result does not load, or another user owns the cached file.
    """
    return _library().load()


def library_name(compiler: tuple[str, ...]) -> str:
    """File name of the library that `compiler` makes."""
    return _library().file_name(compiler)


def _library() -> Library:
    return Library("rf8", Path(__file__).parent, HEADERS, SOURCES, FLAGS, VARIANTS, _SIGNATURES)

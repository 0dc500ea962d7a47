"""What a launch needs besides tensors: how a format is decoded in a dtype, and the tile sizes. No Triton here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats import ResidualFloat, WeightFormat


# Largest exponent of a normal float16, and the least.
_HALF_MAX_EXPONENT = 15
_HALF_MIN_EXPONENT = -14


@dataclass(frozen=True)
class Tiles:
    """One launch configuration: rows of x, rows of codes and columns of codes a tile, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options, for a launch and for compiling ahead of time."""
        # fused multiply-add is said explicitly because Triton's default is changing, with a warning
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def decoding(fmt: WeightFormat, dtype: torch.dtype) -> dict[str, int | float]:
    """Compile-time constants of the kernels' `_decode` for values in `dtype`.

    float16 has too few exponents for the small values of a format, so they are decoded `2^shift` times too large, and
    the kernels multiply their float32 sum by `UNSHIFT`, a power of two: nothing is lost.

    Returns:
        `FRACTIONS` (four mantissa bits a residual state, packed into a signed 32-bit number), `RESIDUAL_BITS` (0: the
        magnitude is a whole number), `BIAS` (of the exponent, less the shift) and `UNSHIFT`.
    """
    if not isinstance(fmt, ResidualFloat):
        return {"FRACTIONS": 0, "RESIDUAL_BITS": 0, "BIAS": 0, "UNSHIFT": 1.0}
    # reserved states decode to a power of two: they are refused when a checkpoint is loaded
    packed = sum((max(sixteenths, 16) - 16) << (4 * state) for state, sixteenths in enumerate(fmt.mantissas))
    shift = 0
    if dtype == torch.float16:
        largest = (1 << fmt.exponent_bits) - 1 - fmt.exponent_bias
        shift = max(0, min(_HALF_MIN_EXPONENT + fmt.exponent_bias, _HALF_MAX_EXPONENT - largest))
    return {
        "FRACTIONS": packed - (1 << 32) if packed >= 1 << 31 else packed,
        "RESIDUAL_BITS": fmt.residual_bits,
        "BIAS": fmt.exponent_bias - shift,
        "UNSHIFT": 2.0**-shift,
    }


def dequantize_tiles() -> Tiles:
    """Tiles of the dequantize kernel (m is not used)."""
    return Tiles(m=1, n=32, k=128, warps=4, stages=1)


def linear_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the linear kernel for `rows` rows of x in `dtype`."""
    if dtype == torch.float32:  # exact products run on the ordinary units, with both operands in registers
        return Tiles(16, 64, 32, 4, 2) if rows <= 16 else Tiles(64, 64, 32, 8, 2)
    if rows <= 16:
        return Tiles(16, 64, 128, 4, 4)
    return Tiles(64, 64, 64, 4, 4) if rows <= 64 else Tiles(128, 128, 64, 8, 3)


def grad_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the input gradient's kernel; it sums over n."""
    if dtype == torch.float32:
        return Tiles(16, 32, 64, 4, 2) if rows <= 16 else Tiles(64, 32, 64, 8, 2)
    if rows <= 16:
        return Tiles(16, 64, 64, 4, 4)
    return Tiles(64, 64, 64, 4, 4) if rows <= 64 else Tiles(128, 64, 128, 8, 3)


def coder_tiles() -> Tiles:
    """Tiles of the entropy decoder: a warp for the 32 lanes of a chunk (m and n are not used)."""
    return Tiles(m=1, n=1, k=32, warps=1, stages=1)

"""What a launch needs besides tensors: how a format is decoded in a dtype, and the tile sizes. No Triton here.

Tile sizes are in `configs/`, a JSON file a GPU by its name (`NVIDIA_H200.json`), and `default.json` for those that
were not tuned. A file may hold some of the kernels only. For each kernel it lists launches; the first one whose `rows`
(null: any number) and `bits` of the dtype fit is taken. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...formats import ResidualFloat, WeightFormat
from .packed import packed_decoding


# Largest exponent of a normal float16, and the least.
_HALF_MAX_EXPONENT = 15
_HALF_MIN_EXPONENT = -14


@dataclass(frozen=True)
class Tiles:
    """One launch configuration.

    Attributes:
        m: rows of x in a tile.
        n: rows of codes.
        k: columns of codes.
        warps: that share a tile.
        stages: of the pipeline.
        programs: columns are split until there are about so many programs; 0: never.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's options, for a launch and for compiling ahead of time."""
        # fused multiply-add is said explicitly because Triton's default is changing, with a warning
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def decoding(fmt: WeightFormat, dtype: torch.dtype, packed: bool = False) -> dict[str, int | float | str]:
    """Compile-time constants of the kernels' `_decode` for values in `dtype`.

    float16 has too few exponents for the small values of a format, so they are decoded `2^shift` times too large, and
    the kernels multiply their float32 sum by `UNSHIFT`, a power of two: nothing is lost.

    Returns:
        `PTX` (instructions for four codes at once, empty unless `packed`: only NVIDIA's compiler takes them),
        `FRACTIONS` (four mantissa bits a residual state, packed into a signed 32-bit number), `RESIDUAL_BITS` (0: the
        magnitude is a whole number), `BIAS` (of the exponent, less the shift) and `UNSHIFT`.
    """
    ptx = packed_decoding(fmt, dtype) if packed else ""
    if not isinstance(fmt, ResidualFloat):
        return {"PTX": ptx, "FRACTIONS": 0, "RESIDUAL_BITS": 0, "BIAS": 0, "UNSHIFT": 1.0}
    # reserved states decode to a power of two: they are refused when a checkpoint is loaded
    fractions = sum((max(sixteenths, 16) - 16) << (4 * state) for state, sixteenths in enumerate(fmt.mantissas))
    shift = 0
    if dtype == torch.float16:
        largest = (1 << fmt.exponent_bits) - 1 - fmt.exponent_bias
        shift = max(0, min(_HALF_MIN_EXPONENT + fmt.exponent_bias, _HALF_MAX_EXPONENT - largest))
    return {
        "PTX": ptx,
        "FRACTIONS": fractions - (1 << 32) if fractions >= 1 << 31 else fractions,
        "RESIDUAL_BITS": fmt.residual_bits,
        "BIAS": fmt.exponent_bias - shift,
        "UNSHIFT": 2.0**-shift,
    }


def tiles_for(kernel: str, rows: int, dtype: torch.dtype, device: str = "") -> Tiles:
    """The launch configuration of a kernel.

    Args:
        kernel: `"linear"`, `"grad_input"`, `"grouped"`, `"grouped_transposed"` or `"dequantize"`.
        rows: of x (of a group, the mean).
        dtype: of x.
        device: name of the GPU.
    """
    for launch in _configs(device)[kernel]:
        if launch["bits"] == 8 * dtype.itemsize and (launch["rows"] is None or rows <= launch["rows"]):
            return Tiles(**{key: value for key, value in launch.items() if key not in ("rows", "bits")})
    raise ValueError(f"configs: no launch of {kernel!r} for {rows} rows of {dtype}.")


def fitted(tiles: Tiles, columns: int) -> tuple[Tiles, bool]:
    """Tiles whose `k` divides the columns if a half or a quarter of it does, and whether it does.

    Other widths are loaded byte by byte, so that wide tiles would not fit into the registers.
    """
    for k in (tiles.k, tiles.k // 2, tiles.k // 4):
        if k >= 32 and columns % k == 0:
            return replace(tiles, k=k), True
    return narrow(tiles), False


def narrow(tiles: Tiles) -> Tiles:
    """Tiles for codes whose rows do not begin at multiples of 16 bytes."""
    return replace(tiles, k=32)


def split(tiles: Tiles, blocks: int, columns: int) -> int:
    """Into how many parts the columns are split, a power of two; whole tiles each, at least two."""
    parts = 1
    while blocks * parts < tiles.programs and parts < 16 and columns % (2 * parts * tiles.k) == 0:
        if columns // (2 * parts * tiles.k) < 2:
            break
        parts *= 2
    return parts


@functools.cache
def _configs(device: str) -> dict[str, list[dict]]:
    folder = Path(__file__).parent / "configs"
    configs = json.loads((folder / "default.json").read_text())
    own = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', device)}.json"
    return {**configs, **json.loads(own.read_text())} if device and own.exists() else configs


def coder_tiles() -> Tiles:
    """Tiles of the entropy decoder: a warp for the 32 lanes of a chunk (m and n are not used)."""
    return Tiles(m=1, n=1, k=32, warps=1, stages=1)

"""Scales of quantized weights: which one, and how it is searched.

A residual float has the same relative grid in every octave, so its error repeats when a scale is doubled. A search
over one octave is therefore complete but for clipping, and starts at the smallest scale that clips nothing. Its
candidates put the row's largest weight on each value of the topmost octave in turn: then that weight is exact, and a
weight that lies on a grid already is found to, so that quantizing what was quantized changes nothing. On real weights
these candidates are better than as many spread evenly over the octave (MiniLM, RF8: 29.25 dB for 7 against 29.20 for
8; 16 give 29.35).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .base import NOT_FINITE, check_weight, chunk_size


if TYPE_CHECKING:
    from .rf8 import ResidualFloat

SCALES = ("row", "absmax", "pow2", "tensor", "tensor-pow2", "unit")

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 4

Reduce = Callable[[torch.Tensor, str], torch.Tensor]


def quantize(
    fmt: ResidualFloat,
    weight: torch.Tensor,
    scale: str = "row",
    rounding: str = "nearest",
    reduce: Reduce | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight matrix, or a stack of them, row by row.

    Args:
        fmt: the format.
        weight: floating point, shape [..., rows, columns]; a scale belongs to a row (an output feature).
        scale: `"row"` (one a row, of the candidates in an octave the one with the least squared error), `"absmax"`
            (the row's largest magnitude becomes the format's), `"pow2"` (the smallest power of two that clips
            nothing), `"tensor"` and `"tensor-pow2"` (the same, one a matrix) or `"unit"` (1; larger weights than the
            format's largest value saturate).
        rounding: see `ResidualFloat.encode`.
        reduce: for a weight whose rows are split over processes, `reduce(x, "max" | "sum")` must return the
            element-wise maximum or sum over them, so that every process finds the same scale.

    Returns:
        codes, uint8 of the weight's shape, and the scale, float32 of shape [..., rows, 1], or [..., 1, 1] for one a
        matrix. A row of zeros has scale 1 and codes 0.

    Raises:
        ValueError: NaN or infinity in the weight, an unknown scale or rounding, fewer than two dimensions.
        TypeError: the weight is not floating point.
    """
    from .rf8 import check_rounding

    check_scale(scale)
    check_rounding(rounding)
    check_weight(weight)
    if weight.numel() == 0 and reduce is None:
        rows = 1 if scale in ("tensor", "tensor-pow2", "unit") else weight.shape[-2]
        return weight.to(torch.uint8), torch.ones(*weight.shape[:-2], rows, 1, device=weight.device)

    peak = _absmax(weight, per_matrix=scale in ("tensor", "tensor-pow2", "unit"))
    if reduce is not None:
        peak = reduce(peak, "max")
    if not bool(torch.isfinite(peak).all()):
        raise ValueError(NOT_FINITE)
    if scale == "unit":
        chosen = torch.ones_like(peak)
    elif scale in ("pow2", "tensor-pow2"):
        mantissa, exponent = torch.frexp(peak / fmt.max)
        exponent = exponent - (mantissa == 0.5).int()  # an exact power of two needs no larger one
        chosen = torch.ldexp(torch.ones_like(peak), exponent)
    else:
        chosen = peak / fmt.max
        if scale != "absmax":
            errors = _search_errors(fmt, weight, chosen, rounding)
            if reduce is not None:
                errors = reduce(errors, "sum")
            chosen = chosen * search_factors(fmt).to(chosen.device)[errors.argmin(dim=-1)]
    chosen = torch.where(peak > 0, chosen.clamp(_TINY, _HUGE), 1.0)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for codes_block, weight_block, scale_block in _blocks(weight.device, codes, weight, chosen):
        codes_block.copy_(fmt.encode(weight_block.float() / scale_block, rounding))
    return codes, chosen


def check_scale(scale: str) -> None:
    """Raise a `ValueError` for an unknown scale mode."""
    if scale not in SCALES:
        raise ValueError(f"Unknown scale {scale!r}: use one of {', '.join(map(repr, SCALES))}.")


def search_factors(fmt: ResidualFloat) -> torch.Tensor:
    """What the smallest scale that clips nothing is multiplied by in a search, ascending from 1, float32."""
    mantissas = sorted({m for m in fmt.mantissas if m}, reverse=True)
    return torch.tensor([mantissas[0] / m for m in mantissas], dtype=torch.float32)


def _absmax(weight: torch.Tensor, per_matrix: bool) -> torch.Tensor:
    """Largest magnitudes, float32 [..., rows, 1] or [..., 1, 1]; NaN where there is one."""
    shape = (*weight.shape[:-2], 1 if per_matrix else weight.shape[-2], 1)
    if weight.numel() == 0:
        return torch.zeros(shape, device=weight.device)
    # the two extremes instead of abs(): no temporary of the weight's size
    dims = (-2, -1) if per_matrix else (-1,)
    return torch.maximum(weight.amax(dims), -weight.amin(dims)).float().view(shape)


def _search_errors(fmt: ResidualFloat, weight: torch.Tensor, base: torch.Tensor, rounding: str) -> torch.Tensor:
    """Squared errors of the candidates, float64 [*base.shape, candidates]."""
    from .rf8 import nearest_value

    factors = search_factors(fmt).to(weight.device)
    errors = torch.zeros(*weight.shape[:-1], len(factors), dtype=torch.float64, device=weight.device)
    for errors_block, weight_block, base_block in _blocks(weight.device, errors, weight, base):
        weight_block = weight_block.float()
        for step, factor in enumerate(factors):
            candidate = (base_block * factor).clamp(_TINY, _HUGE)
            scaled = weight_block / candidate
            value = nearest_value(fmt, scaled) if rounding == "nearest" else fmt.decode(fmt.encode(scaled, rounding))
            errors_block[:, step] = (value * candidate - weight_block).square_().sum(-1, dtype=torch.float64)
    if base.shape[-2] == 1 and weight.shape[-2] != 1:
        errors = errors.sum(-2, keepdim=True)
    return errors.unsqueeze(-2)


def _blocks(device: torch.device, out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Row blocks of two tensors and their scales, small enough for the cache; views, so the first can be written."""
    columns = max(weight.shape[-1], 1)
    scale = scale.expand(*weight.shape[:-1], 1).reshape(-1, 1)
    out, weight = out.view(-1, out.shape[-1]), weight.reshape(-1, weight.shape[-1])
    rows = max(1, chunk_size(device) // columns)
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield out[part], weight[part], scale[part]

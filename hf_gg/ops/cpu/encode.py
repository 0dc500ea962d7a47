"""Quantization of weights: what `hf_gg.formats.scaling` does, one row at a time while it is in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...formats import ResidualFloat, get_format
from ...formats.scaling import SCALES, check_scale, search_factors
from .runtime import DTYPE_CODES, DTYPES, check_dtype, format_tables, isa_code, library, with_rows


QUANTIZE_SCALES = SCALES

# Modes of hf_gg_rf8_quantize.
_PEAK, _ABSMAX, _POW2, _SEARCH, _GIVEN, _ERRORS = range(6)
_ROW_MODES = {"absmax": _ABSMAX, "pow2": _POW2, "row": _SEARCH}
# Candidates of a scale search, at most: RF8_MOST_STEPS in rf8.h.
_MOST_STEPS = 8


@functools.cache
def _factors(fmt: ResidualFloat) -> torch.Tensor:
    factors = search_factors(fmt)
    if len(factors) > _MOST_STEPS:
        raise ValueError(f"the CPU kernels search {_MOST_STEPS} scales at most, {fmt.name} has {len(factors)}.")
    return factors


def quantize(
    weight: torch.Tensor,
    format: str | ResidualFloat = "rf8",
    scale_mode: str | torch.Tensor = "row",
    *,
    reduce: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_format(format).quantize(weight, scale_mode)` with nearest rounding: the same codes and scales, faster.

    Args:
        weight: float32, bfloat16 or float16 [..., rows, columns].
        format: of the codes.
        scale_mode: one of `QUANTIZE_SCALES`, or the scale itself: float32, positive, [..., rows, 1] or [..., 1, 1].
        reduce: as in `hf_gg.formats.scaling.quantize`.
        isa: one of `isas()`; the best one, if None.

    Returns:
        codes, uint8 of the weight's shape, and the scale, float32 [..., rows, 1], or [..., 1, 1] for one a matrix.

    Raises:
        TypeError: a weight of another dtype.
        ValueError: NaN or infinity in the weight, an unknown mode, a shape that does not fit, another device.
    """
    check_dtype("weight", weight, DTYPES)
    if weight.ndim < 2:
        raise ValueError(f"quantize needs a matrix or a stack of them, got shape {[*weight.shape]}.")
    fmt = get_format(format)
    if not isinstance(fmt, ResidualFloat):
        raise ValueError(f"the CPU kernels do not quantize to the format {fmt.name!r}: use hf_gg.ops.quantize.")
    job = _Job(weight, fmt, isa_code(isa), reduce)
    if isinstance(scale_mode, torch.Tensor):
        job.check_given(scale_mode)
        return job.encode(scale_mode), scale_mode
    check_scale(scale_mode)
    if reduce is None and scale_mode in _ROW_MODES and weight.numel():
        return job.row_by_row(_ROW_MODES[scale_mode])
    scale = job.find_scale(scale_mode)
    return job.encode(scale), scale


class _Job:
    """One weight as rows, and the kernel's modes on them."""

    def __init__(self, weight: torch.Tensor, fmt: ResidualFloat, isa: int, reduce) -> None:
        self.fmt, self.isa, self.reduce = fmt, isa, reduce
        self.shape, self.lead, self.height, self.columns = weight.shape, weight.shape[:-2], *weight.shape[-2:]
        self.weight = with_rows(weight.detach().reshape(self.lead.numel() * self.height, self.columns))

    def row_by_row(self, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = torch.empty(self.shape, dtype=torch.uint8), self._new_rows()
        self._run(mode, scale, codes=codes)
        return codes, scale

    def find_scale(self, mode: str) -> torch.Tensor:
        """Step by step, for scales that depend on more than a row; as in `hf_gg.formats.scaling`."""
        per_matrix = mode in ("tensor", "tensor-pow2", "unit")
        peak = self._peaks(per_matrix)
        if self.reduce is not None:
            peak = self.reduce(peak, "max")
            if not bool(torch.isfinite(peak).all()):
                raise _not_finite()
        if mode == "unit":
            return torch.ones_like(peak)
        chosen = peak / self.fmt.max
        if mode in ("pow2", "tensor-pow2"):
            mantissa, exponent = torch.frexp(chosen)
            chosen = torch.ldexp(torch.ones_like(peak), exponent - (mantissa == 0.5).int())
        elif mode != "absmax":
            errors = self._errors(chosen)
            if per_matrix:
                errors = errors.sum(-2, keepdim=True)
            if self.reduce is not None:
                errors = self.reduce(errors.unsqueeze(-2), "sum").squeeze(-2)
            chosen = chosen * _factors(self.fmt)[errors.argmin(dim=-1, keepdim=True)]
        limits = torch.finfo(torch.float32)
        return torch.where(peak > 0, chosen.clamp(limits.tiny, limits.max / 4), 1.0)

    def encode(self, scale: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(self.shape, dtype=torch.uint8)
        self._run(_GIVEN, self._expanded(scale), codes=codes)
        return codes

    def check_given(self, scale: torch.Tensor) -> None:
        check_dtype("scale_mode", scale, (torch.float32,))
        shapes = ((*self.lead, self.height, 1), (*self.lead, 1, 1))
        if tuple(scale.shape) not in shapes:
            raise ValueError(f"a scale must have shape {[*shapes[0]]} or {[*shapes[1]]}, got {[*scale.shape]}.")
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise ValueError("a scale must be positive and finite.")

    def _peaks(self, per_matrix: bool) -> torch.Tensor:
        """Largest magnitudes, float32 [..., rows, 1] or [..., 1, 1]."""
        peak = self._new_rows().zero_()
        self._run(_PEAK, peak)
        if not per_matrix:
            return peak
        return peak.amax(-2, keepdim=True) if self.height else peak.new_zeros(*self.lead, 1, 1)

    def _errors(self, base: torch.Tensor) -> torch.Tensor:
        """Squared errors of the candidates, float64 [..., rows, candidates]."""
        errors = torch.zeros(*self.lead, self.height, len(_factors(self.fmt)), dtype=torch.float64)
        self._run(_ERRORS, self._expanded(base), errors=errors)
        return errors

    def _new_rows(self) -> torch.Tensor:
        return torch.empty(*self.lead, self.height, 1, dtype=torch.float32)

    def _expanded(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.expand(*self.lead, self.height, 1).contiguous()

    def _run(
        self,
        mode: int,
        scale: torch.Tensor,
        codes: torch.Tensor | None = None,
        errors: torch.Tensor | None = None,
    ) -> None:
        if self.weight.numel() == 0:
            return
        factors = _factors(self.fmt)
        result = library().hf_gg_rf8_quantize(
            format_tables(self.fmt),
            self.isa,
            torch.get_num_threads(),
            mode,
            self.weight.data_ptr(),
            self.weight.stride(0),
            DTYPE_CODES[self.weight.dtype],
            self.weight.shape[0],
            self.columns,
            factors.data_ptr(),
            len(factors),
            None if codes is None else codes.data_ptr(),
            self.columns,
            scale.data_ptr(),
            None if errors is None else errors.data_ptr(),
        )
        if result == -2:
            raise MemoryError(f"no memory for a row of {self.columns} weights.")
        # with `reduce`, the other processes must not wait for this one: they meet first, and fail together
        if result >= 0 and not (mode == _PEAK and self.reduce is not None):
            raise _not_finite(f" (first in row {result % self.height})")


def _not_finite(where: str = "") -> ValueError:
    return ValueError(
        f"the weight holds NaN or infinity{where}, which no code can represent: repair the checkpoint, or keep this "
        "tensor in full precision with `modules_to_not_convert`."
    )

"""RF8, the 8-bit residual float: a weight is the sum of two signed powers of two.

The authors' code (arXiv 2506.00486) only simulates the format: it replaces a weight by ±2^a ± 2^b, the second term at
most four octaves below the first, and keeps floats. Its rounding reaches seven magnitudes an octave, 16, 17, 18, 20,
24, 28 and 30 sixteenths, so a sign, four exponent bits and three residual bits hold 16 octaves of them exactly:

    s eeee ttt        value = (-1)^s · 2^(e-15) · m[t] / 16,  m = 16 17 18 20 24 28 30 –

The low seven bits all zero mean 0.0, and t = 7 is reserved. Variants: `rf8x` uses the spare state for three-term sums
(22 sixteenths), `rf8-e5` is 1+5+2 bits with the magnitudes 1 + 2^-(r+1), kept for comparison.

Every value has at most four mantissa bits, so it is exact in bfloat16 and in float32, and in float16 at scale 1 (the
smallest values of `rf8-e5` excepted). The midpoints between neighbours have at most five: this is why one look at the
sign, the exponent and five mantissa bits of `bits(x) - 1` decides the nearest code, ties to the smaller magnitude
included.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .base import WeightFormat, chunk_size
from .scaling import check_scale
from .scaling import quantize as _quantize


ROUNDINGS = ("nearest", "reference")

# float32 bits below the five mantissa bits that decide a nearest code
_SHIFT = 18
_SQRT2 = 2**0.5


@dataclass(frozen=True)
class ResidualFloat(WeightFormat):
    """An 8-bit float of one sign bit, `exponent_bits` and `residual_bits`, most significant first.

    Attributes:
        name: the name in configs and checkpoints.
        exponent_bits: width of the exponent field.
        residual_bits: width of the residual field.
        exponent_bias: the magnitude is `2^(exponent - exponent_bias) · mantissas[residual] / 16`.
        mantissas: sixteenths by residual state; 0 marks a reserved state.
    """

    name: str
    exponent_bits: int
    residual_bits: int
    exponent_bias: int
    mantissas: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits a code: 8."""
        return 1 + self.exponent_bits + self.residual_bits

    @property
    def max(self) -> float:
        """The largest value at scale 1."""
        return max(v for v in _magnitudes(self) if v is not None)

    @property
    def smallest(self) -> float:
        """The smallest positive value at scale 1."""
        return min(v for v in _magnitudes(self) if v)

    @property
    def reserved(self) -> tuple[int, ...]:
        """The codes that no encoder writes and no checkpoint may hold."""
        return _reserved(self)

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> torch.Tensor:
        """The 256 values by code, unscaled; reserved codes give NaN. Shape [256]."""
        return _value_table(self, dtype, torch.device(device or "cpu"))

    def encode(self, x: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
        """Round `x`, already divided by its scale, to codes.

        Args:
            x: floating point, any shape. Larger magnitudes than the format's saturate. NaN and infinity are not
                looked for here; `quantize` refuses them.
            rounding: `"nearest"` (a tie goes to the smaller magnitude, below half of the smallest to zero) or
                `"reference"` (the authors' two powers of two by `round(log2|·|)`; a state that the variant lacks goes
                to the nearest one).

        Returns:
            uint8 codes of the same shape. Zero is always 0x00.

        Raises:
            ValueError: unknown rounding. TypeError: `x` is not floating point.
        """
        check_rounding(rounding)
        if not x.is_floating_point():
            raise TypeError(f"encode needs a floating point tensor, got {x.dtype}: convert it first.")
        table = _code_table(self, x.device)
        flat = x.reshape(-1)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
        step = chunk_size(x.device)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step].float()
            if rounding == "reference":
                part = _reference_value(part)
            codes[start : start + step] = table.index_select(0, _table_index(part))
        return codes.view(x.shape)

    def check_options(self, scale: str, rounding: str) -> None:
        """Raise a `ValueError` for an unknown scale mode or rounding."""
        check_scale(scale)
        check_rounding(rounding)

    def quantize(
        self, weight: torch.Tensor, scale: str = "row", rounding: str = "nearest", reduce=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of a weight, `decode(codes) * scale ≈ weight`. See `hf_gg.formats.scaling.quantize`."""
        return _quantize(self, weight, scale=scale, rounding=rounding, reduce=reduce)

    def validate(self, codes: torch.Tensor, name: str = "codes") -> None:
        """Raise a `ValueError` naming `name` if `codes` holds a reserved state."""
        if 0 not in self.mantissas:
            return
        # All reserved codes share the residual field, all ones. Eight codes at once: one more in that field carries
        # into the bit above it, which is cleared before.
        mask = (1 << self.residual_bits) - 1
        every_byte = 0x0101010101010101
        flat = codes.reshape(-1).contiguous()
        step = chunk_size(codes.device) * 16
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            whole = part[: part.numel() // 8 * 8]
            words = whole.view(torch.int64) if whole.data_ptr() % 8 == 0 else whole.clone().view(torch.int64)
            carries = (words & mask * every_byte).add_(every_byte).bitwise_and_((mask + 1) * every_byte)
            if bool(carries.any()) or bool(((part[whole.numel() :] & mask) == mask).any()):
                first = start + int(((part & mask) == mask).int().argmax())
                raise ValueError(
                    f"{name}: code 0x{int(flat[first]):02x} at flat index {first} is a reserved state of {self.name}. "
                    "The checkpoint is damaged or was written for another format."
                )

    def value_of_index(self, device: torch.device) -> torch.Tensor:
        """Values by the 14-bit index of the nearest rounding, float32 [16384]: encode and decode in one step."""
        return _rounded_table(self, device)


RF8 = ResidualFloat("rf8", 4, 3, 15, (16, 17, 18, 20, 24, 28, 30, 0))
RF8X = ResidualFloat("rf8x", 4, 3, 15, (16, 17, 18, 20, 22, 24, 28, 30))
RF8_E5 = ResidualFloat("rf8-e5", 5, 2, 31, (24, 20, 18, 17))


def check_rounding(rounding: str) -> None:
    """Raise a `ValueError` for an unknown rounding."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"Unknown rounding {rounding!r}: use one of {', '.join(map(repr, ROUNDINGS))}.")


def nearest_value(fmt: ResidualFloat, x: torch.Tensor) -> torch.Tensor:
    """`decode(encode(x))` of a float32 tensor in one table look-up, same shape. For scale searches."""
    return fmt.value_of_index(x.device).index_select(0, _table_index(x.reshape(-1))).view(x.shape)


@functools.cache
def _reserved(fmt: ResidualFloat) -> tuple[int, ...]:
    half = 1 << (fmt.bits - 1)
    return tuple(c for c in range(2 * half) if _magnitudes(fmt)[c % half] is None)


def _table_index(x: torch.Tensor) -> torch.Tensor:
    """Sign, exponent and five mantissa bits of `bits(x) - 1`: 14 bits, int32. The float32 `x` is flat."""
    return (x.contiguous().view(torch.int32) - 1).bitwise_right_shift_(_SHIFT).bitwise_and_((1 << 14) - 1)


def _reference_value(x: torch.Tensor) -> torch.Tensor:
    """The authors' rounding of a float32 tensor: ±2^a ± 2^b, a = round(log2|x|), b = round(log2|x ∓ 2^a|) ≥ a - 4."""
    first, a = _nearest_power(x)
    second, b = _nearest_power(x - first)
    return first + torch.where(b >= a - 4, second, 0.0)


def _nearest_power(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """±2^round(log2|x|), 0 for 0, and its exponent. No mantissa equals sqrt(2), so the comparison is exact."""
    mantissa, exponent = torch.frexp(x)  # |mantissa| in [1/2, 1)
    exponent = exponent - (mantissa.abs() <= _SQRT2 / 2).int()
    return torch.ldexp(torch.sign(x), exponent), exponent


@functools.cache
def _magnitudes(fmt: ResidualFloat) -> tuple[float | None, ...]:
    """Magnitudes of the 128 codes without sign; None for a reserved one."""
    values: list[float | None] = []
    for exponent in range(1 << fmt.exponent_bits):
        for mantissa in fmt.mantissas:
            values.append(2.0 ** (exponent - fmt.exponent_bias) * mantissa / 16 if mantissa else None)
    values[0] = 0.0
    return tuple(values)


@functools.cache
def _value_table(fmt: ResidualFloat, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    magnitudes = torch.tensor([float("nan") if v is None else v for v in _magnitudes(fmt)], dtype=torch.float32)
    signed = torch.cat([magnitudes, -magnitudes])
    signed[len(magnitudes)] = 0.0  # 0x80 reads as plain zero
    return signed.to(dtype=dtype, device=device)


@functools.cache
def _code_table(fmt: ResidualFloat, device: torch.device) -> torch.Tensor:
    """Nearest codes by the 14-bit index, uint8 [16384]."""
    by_size = sorted((v, code) for code, v in enumerate(_magnitudes(fmt)) if v is not None)
    values = torch.tensor([v for v, _ in by_size], dtype=torch.float64)
    codes = torch.tensor([code for _, code in by_size], dtype=torch.uint8)
    midpoints = (values[1:] + values[:-1]) / 2
    # An index stands for the x in (lower, upper]; a midpoint is the upper end of one, and belongs to the smaller
    # value.
    upper = (torch.arange(1, (1 << 13) + 1, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    upper = upper.nan_to_num(nan=3e38)
    positive = codes[torch.searchsorted(midpoints, upper)]
    positive[-1] = 0  # the index of -0.0, otherwise only of NaN
    negative = torch.where(positive > 0, positive | 0x80, positive)
    negative[-1] = 0  # the index of +0.0
    return torch.cat([positive, negative]).to(device)


@functools.cache
def _rounded_table(fmt: ResidualFloat, device: torch.device) -> torch.Tensor:
    return fmt.table(torch.float32, device).index_select(0, _code_table(fmt, device).int())

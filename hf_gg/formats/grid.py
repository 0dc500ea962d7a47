"""The uniform grid: a weight is a whole number of steps, from -127 to 127, and each row has its step.

    s mmmmmmm        value = (-1)^s · m · step        m = 0 … 127

At equal squared error a uniform grid with an entropy coder needs fewer bits than a float, so this is the format for
the smallest file at a wanted error. A code is a sign and a magnitude, as in the residual floats, and every level is
exact in bfloat16: a grid is one more table of 256 values, served by the same operators, and its step is what they call
scale. Rounding is to the nearest level, a tie to the smaller magnitude. Zero is 0x00, and 0x80 is never written.

A weight beyond 127.5 steps is an outlier: its code is 0, and a list beside the codes holds it as it is. With the usual
steps, the root mean square of a row over 4 to 16, that is a weight in many millions, or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import steps as _steps
from .base import WeightFormat, check_weight, chunk_size
from .steps import LEVELS, StepRule


@dataclass(frozen=True)
class Grid(WeightFormat):
    """Whole numbers of steps as sign and magnitude. See the module's description.

    Attributes:
        name: the name in configs and checkpoints.
    """

    name: str

    residual_bits = 0

    @property
    def bits(self) -> int:
        """Bits a code in memory: 8."""
        return 8

    @property
    def max(self) -> float:
        """The largest level."""
        return float(LEVELS)

    @property
    def smallest(self) -> float:
        """The smallest positive level."""
        return 1.0

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> torch.Tensor:
        """The 256 levels by code; 0x80 reads as plain zero. Shape [256]."""
        return _table(dtype, torch.device(device or "cpu"))

    def encode(self, x: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
        """Round `x`, already divided by its step, to codes.

        Args:
            x: floating point, any shape. Larger magnitudes than 127 saturate. NaN and infinity are not looked for
                here; `quantize` refuses them.
            rounding: `"nearest"`, a tie to the smaller magnitude; the only one.

        Returns:
            uint8 codes of the same shape.

        Raises:
            ValueError: unknown rounding. TypeError: `x` is not floating point.
        """
        _check_rounding(rounding)
        if not x.is_floating_point():
            raise TypeError(f"encode needs a floating point tensor, got {x.dtype}: convert it first.")
        flat = x.reshape(-1)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
        size = chunk_size(x.device)
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size]
            _steps.round_to_codes(part.float(), out=codes[start : start + size])
        return codes.view(x.shape)

    def check_options(self, scale: Any, rounding: str) -> None:
        """Raise a `ValueError` for an unknown step rule or rounding."""
        StepRule.of(scale)
        _check_rounding(rounding)

    def quantize(
        self, weight: torch.Tensor, scale: Any = "row", rounding: str = "nearest", reduce=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and steps of a weight, `decode(codes) * steps ≈ weight`; what `take_outliers_` takes is saturated.

        Args:
            weight: floating point, shape [..., rows, columns].
            scale: a `StepRule`; `"row"` and `"tensor"` for its defaults; or the steps themselves, positive, float32,
                of a shape that broadcasts to [..., rows, 1].
            rounding: `"nearest"`.
            reduce: must be None; a weight that is split over processes has no steps that each could find alone.

        Returns:
            codes, uint8 of the weight's shape, and the steps, float32 [..., rows, 1].

        Raises:
            ValueError: NaN or infinity in the weight, an unknown rule or rounding, a target that cannot be reached,
                steps that are not positive numbers, fewer than two dimensions.
            TypeError: the weight is not floating point.
        """
        _check_rounding(rounding)
        check_weight(weight)
        if reduce is not None:
            raise ValueError(
                "a weight that is split over processes cannot be quantized to a grid: quantize and save the model in "
                "one process, and load that checkpoint."
            )
        if isinstance(scale, torch.Tensor):
            given = _steps.check_given(weight, scale)
            return _steps.encode_rows(weight, given), given
        return _steps.quantize(weight, StepRule.of(scale))

    def rule(self, scale: Any) -> StepRule:
        """The rule of a scale mode; the default one for given steps."""
        return StepRule() if isinstance(scale, (torch.Tensor, Mapping)) else StepRule.of(scale)

    def scale_again(self, mode: Any, scale: torch.Tensor, before: Callable[[], torch.Tensor], after: torch.Tensor):
        """The steps that the weight had, so that what did not change keeps its codes; see `steps.kept_steps`."""
        kept = _steps.kept_steps(scale, before(), after)
        return mode if kept is None else kept

    def take_outliers_(
        self, codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Put 0 in the place of weights beyond 127.5 steps, in place, and return them as a list.

        Args:
            codes: uint8 [..., rows, columns], contiguous, of `quantize`.
            scale: the steps [..., rows, 1] or [..., 1, 1].
            weight: what they were made from.

        Returns:
            Flat indices into the codes, ascending, int32 (int64 for 2^31 codes and more), and the weights, float32;
            None if there are no outliers.
        """
        flat = codes.view(-1)
        index = torch.nonzero((flat & 0x7F) == LEVELS).squeeze(1)
        if not index.numel():
            return None
        values = weight.reshape(-1)[index].float()
        steps = scale.expand(*codes.shape[:-1], 1).reshape(-1)[index // codes.shape[-1]]
        beyond = (values / steps).abs() > LEVELS + 0.5
        if not bool(beyond.any()):
            return None
        index, values = index[beyond], values[beyond]
        flat[index] = 0
        return index.to(torch.int32 if flat.numel() <= 2**31 else torch.int64), values

    @property
    def refused(self) -> tuple[int, ...]:
        """The codes that `validate` refuses."""
        return (0x80,)

    def validate(self, codes: torch.Tensor, name: str = "codes") -> None:
        """Raise a `ValueError` naming `name` if `codes` holds a negative zero, which no encoder writes."""
        flat = codes.reshape(-1)
        size = chunk_size(codes.device) * 16
        for start in range(0, flat.numel(), size):
            part = flat[start : start + size] == 0x80
            if bool(part.any()):
                raise ValueError(
                    f"{name}: code 0x80 at flat index {start + int(part.int().argmax())} is a negative zero, which a "
                    "grid does not have. The checkpoint is damaged or was written for another format."
                )


GRID = Grid("grid")


def _check_rounding(rounding: str) -> None:
    if rounding != "nearest":
        raise ValueError(f"Unknown rounding {rounding!r} for a grid: it rounds to the nearest level, 'nearest'.")


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    levels = torch.arange(LEVELS + 1, dtype=torch.float32)
    signed = torch.cat([levels, -levels])
    signed[LEVELS + 1] = 0.0
    return signed.to(dtype=dtype, device=device)

"""What every weight format of 8-bit codes offers: 256 values by code, and how weights become codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


# Elements handled at once, so that the temporaries (4 and 8 bytes each) stay in the cache of a CPU core.
_CHUNK = 1 << 16
_CHUNK_DEVICE = 1 << 26

NOT_FINITE = (
    "the weight holds NaN or infinity, which no code can represent: repair the checkpoint, or keep this "
    "tensor in full precision with `modules_to_not_convert`."
)


class WeightFormat:
    """A table of 256 values, each exact in bfloat16, the sign in bit 7; a weight is `value[code] * scale of its row`.

    Attributes:
        name: the name in configs and checkpoints.
        residual_bits: width of the field that repeats in every octave; 0 for a format that is no float.
    """

    name: str
    residual_bits: int

    @property
    def max(self) -> float:
        """The largest value at scale 1."""
        raise NotImplementedError

    @property
    def reserved(self) -> tuple[int, ...]:
        """The codes that have no value."""
        return ()

    @property
    def refused(self) -> tuple[int, ...]:
        """The codes that `validate` refuses."""
        return self.reserved

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> torch.Tensor:
        """The 256 values by code, unscaled; reserved codes give NaN. Shape [256]."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
        """Round `x`, already divided by its scale, to uint8 codes of the same shape; larger magnitudes saturate."""
        raise NotImplementedError

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of `codes` at scale 1, same shape; reserved codes give NaN.

        Raises:
            TypeError: `codes` is not uint8.
        """
        if codes.dtype != torch.uint8:
            raise TypeError(f"decode needs uint8 codes, got {codes.dtype}.")
        table = self.table(dtype, codes.device)
        flat = codes.reshape(-1)
        values = torch.empty(flat.shape, dtype=dtype, device=codes.device)
        step = chunk_size(codes.device)
        for start in range(0, flat.numel(), step):
            values[start : start + step] = table.index_select(0, flat[start : start + step].int())
        return values.view(codes.shape)

    def check_options(self, scale: Any, rounding: str) -> None:
        """Raise a `ValueError` for a scale mode or a rounding that the format does not know."""
        raise NotImplementedError

    def rule(self, scale: Any) -> Any:
        """A scale mode as modules keep it."""
        return scale

    def scale_again(self, mode: Any, scale: torch.Tensor, before: Callable[[], torch.Tensor], after: torch.Tensor):
        """The scale mode with which a changed weight is quantized again.

        Args:
            mode: with which it was quantized before.
            scale: of the codes.
            before: gives the decoded weight.
            after: the new weight.
        """
        return mode

    def quantize(
        self, weight: torch.Tensor, scale: Any = "row", rounding: str = "nearest", reduce=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of a weight [..., rows, columns], `decode(codes) * scale ≈ weight`.

        Raises:
            ValueError: NaN or infinity in the weight, an unknown scale or rounding, fewer than two dimensions.
            TypeError: the weight is not floating point.
        """
        raise NotImplementedError

    def take_outliers_(
        self, codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Move weights that lie beyond the format's range out of the codes, whose place becomes 0.

        Args:
            codes: uint8, changed in place.
            scale: their scale.
            weight: what they were made from.

        Returns:
            Flat indices, ascending, and float32 values; None if there are no such weights, or if the format's scales
            leave none.
        """
        return None

    def validate(self, codes: torch.Tensor, name: str = "codes") -> None:
        """Raise a `ValueError` naming `name` if `codes` holds what no encoder writes and no checkpoint may hold."""


def chunk_size(device: torch.device) -> int:
    """Elements to handle at once on a device."""
    return _CHUNK if device.type == "cpu" else _CHUNK_DEVICE


def check_weight(weight: torch.Tensor) -> None:
    """Raise an error for what is no floating point matrix or stack of them."""
    if not weight.is_floating_point():
        raise TypeError(f"quantize needs a floating point weight, got {weight.dtype}.")
    if weight.ndim < 2:
        raise ValueError(f"quantize needs a matrix or a stack of them, got shape {tuple(weight.shape)}.")

"""What the modules with a quantized `weight` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import get_format


class QuantizedWeight(nn.Module):
    """A `weight` of uint8 codes [rows, columns] and a frozen float32 `weight_scale` [rows, 1].

    The scale stays in float32 whatever the module is cast to.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    format: str
    backend: str
    scale_mode: Any
    rounding: str

    def _make_weight(self, rows: int, columns: int, device, format: str, backend: str, scale: Any, rounding: str):
        self.format = get_format(format).name
        self.backend = ops.check_backend(backend)
        self.scale_mode, self.rounding = scale, rounding
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(rows, 1, dtype=torch.float32, device=device), requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as numbers, [rows, columns]; float32 unless `dtype` says otherwise."""
        return decode(self.weight, self.weight_scale, self.format, dtype or torch.float32, self.backend)

    @torch.no_grad()
    def requantize_(self, weight: torch.Tensor):
        """Replace codes and scale by those of a float weight [rows, columns], in place.

        Raises:
            ValueError: another shape, NaN or infinity, codes that are split over processes; the module is then
                unchanged.
        """
        check_whole("weight", self.weight)
        if weight.shape != self.weight.shape:
            raise ValueError(f"the new weight must have shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}.")
        codes, scale = ops.quantize(weight, get_format(self.format), self.scale_mode, self.rounding)
        self.weight.data.copy_(codes)
        self.weight_scale.data.copy_(scale)
        return self

    def _apply(self, fn, recurse=True):
        kept = self._parameters["weight_scale"].detach()
        super()._apply(fn, recurse)
        keep_scale(self, "weight_scale", kept)
        return self


def decode(codes: Any, scale: Any, format: str, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """`ops.dequantize`; codes that are split over processes (a DTensor) give numbers that are split the same way."""
    if not hasattr(codes, "placements"):
        return ops.dequantize(codes, scale, format, dtype, backend)
    from torch.distributed.tensor import DTensor

    # a scale is split with its row of codes, or whole on every process
    local_scale = scale.to_local() if hasattr(scale, "placements") else scale
    part = ops.dequantize(codes.to_local(), local_scale, format, dtype, backend)
    mesh, placements = codes.device_mesh, codes.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=codes.shape, stride=codes.stride())


def check_whole(name: str, codes: torch.Tensor) -> None:
    """Raise a `ValueError` if codes are split over processes: a scale may need numbers that others hold."""
    if hasattr(codes, "placements"):
        raise ValueError(
            f"{name} is split over processes (tensor, expert or fully sharded parallelism), where it cannot be "
            "quantized again: do it on the model in one process."
        )


def keep_scale(module: nn.Module, name: str, before: torch.Tensor) -> None:
    """Undo a cast of a scale by `module.to(dtype)` and the like; a move to another device stays.

    Args:
        module: the module after the cast.
        name: of the scale.
        before: the scale's tensor before it (`Module.to` changes a parameter in place).
    """
    scale = module._parameters[name]
    if scale is not None and scale.dtype != torch.float32:
        source = scale.detach() if before.is_meta else before
        kept = source.to(device=scale.device, dtype=torch.float32)
        module._parameters[name] = nn.Parameter(kept, requires_grad=False)

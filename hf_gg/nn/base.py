"""What the modules with a quantized `weight` share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import get_format


# What the parameters of a list of outliers add to the name of the codes.
OUTLIERS = ("_outlier_index", "_outlier_value")
# Attribute of a module whose codes are tied: all modules that hold them.
SHARING = "_gg_sharing"


class QuantizedWeight(nn.Module):
    """A `weight` of uint8 codes [rows, columns] and a frozen float32 `weight_scale` [rows, 1].

    Weights that the format cannot hold are in `weight_outlier_index` and `weight_outlier_value` (see
    `hf_gg.ops.outliers`), which are None where there are none. Scales and values stay in float32 whatever the module
    is cast to.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_outlier_index: nn.Parameter | None
    weight_outlier_value: nn.Parameter | None
    format: str
    backend: str
    scale_mode: Any
    rounding: str

    def _make_weight(self, rows: int, columns: int, device, format: str, backend: str, scale: Any, rounding: str):
        self.format = get_format(format).name
        self.backend = ops.check_backend(backend)
        self.scale_mode, self.rounding = get_format(format).rule(scale), rounding
        codes = torch.zeros(rows, columns, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(rows, 1, dtype=torch.float32, device=device), requires_grad=False)
        set_outliers(self, "weight", None)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as numbers, [rows, columns]; float32 unless `dtype` says otherwise."""
        return decode_parameter(self, "weight", dtype or torch.float32)

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
        fmt = get_format(self.format)
        mode = fmt.scale_again(self.scale_mode, self.weight_scale, self.dequantize, weight)
        codes, scale, outliers = ops.quantize_with_outliers(weight, fmt, mode, self.rounding)
        self.weight.data.copy_(codes)
        self.weight_scale.data.copy_(scale)
        set_outliers(self, "weight", outliers)
        return self

    def _apply(self, fn, recurse=True):
        with keeping_float32(self, ("weight",)):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        make_room_for_outliers(self, ("weight",), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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


def decode_parameter(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a parameter of codes stands for, its outliers among them."""
    codes, outliers = module._parameters[name], outliers_of(module, name)
    if outliers is not None and hasattr(codes, "placements"):
        raise ValueError(f"{name} is split over processes and has outliers: decode it in one process.")
    weight = decode(codes, module._parameters[f"{name}_scale"], module.format, dtype, module.backend)  # type: ignore
    return weight if outliers is None else ops.put_outliers(weight, *outliers)


def outliers_of(module: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Flat indices and values of the outliers of a parameter of codes; None if there are none."""
    index, value = (module._parameters.get(f"{name}{suffix}") for suffix in OUTLIERS)
    return None if index is None or value is None else (index, value)


def set_outliers(module: nn.Module, name: str, outliers: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Give a parameter of codes its list of outliers; also in the modules that share the codes (see `share_`)."""
    for suffix, tensor in zip(OUTLIERS, outliers or (None, None)):
        if tensor is None and not isinstance(module, QuantizedWeight):
            module._parameters.pop(f"{name}{suffix}", None)  # whoever cuts experts does so with every parameter
            continue
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        module.register_parameter(f"{name}{suffix}", parameter)
    share_outliers(module, name)


def share_outliers(module: nn.Module, name: str) -> None:
    """Give the modules that share a module's codes its list of outliers; `SHARING` lists them."""
    for other in module.__dict__.get(SHARING, ()):
        if other._parameters.get(name) is module._parameters[name]:
            for suffix in OUTLIERS:
                other._parameters[f"{name}{suffix}"] = module._parameters[f"{name}{suffix}"]


def make_room_for_outliers(module: nn.Module, names: tuple[str, ...], state_dict: dict, prefix: str) -> None:
    """Before a state dict is loaded: lists of outliers as long as its, none where it has codes without."""
    for name in names:
        if f"{prefix}{name}" not in state_dict:
            continue
        device, tensors = module._parameters[name].device, []  # type: ignore[union-attr]  # codes are always there
        for suffix in OUTLIERS:
            found = state_dict.get(f"{prefix}{name}{suffix}")
            tensors.append(None if found is None else torch.empty_like(found, device=device))
        complete = all(tensor is not None for tensor in tensors)
        set_outliers(module, name, tuple(tensors) if complete else None)  # type: ignore[arg-type]


def check_whole(name: str, codes: torch.Tensor) -> None:
    """Raise a `ValueError` if codes are split over processes: a scale may need numbers that others hold."""
    if hasattr(codes, "placements"):
        raise ValueError(
            f"{name} is split over processes (tensor, expert or fully sharded parallelism), where it cannot be "
            "quantized again: do it on the model in one process."
        )


@contextlib.contextmanager
def keeping_float32(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Undo a cast of scales and outliers by `module.to(dtype)` and the like; a move to another device stays.

    Args:
        module: the module that is cast meanwhile.
        names: of its parameters of codes.
    """
    own = [f"{name}{suffix}" for name in names for suffix in ("_scale", OUTLIERS[1])]
    # `Module.to` changes a parameter in place
    kept = {name: p.detach() for name in own if (p := module._parameters.get(name)) is not None}
    yield
    for name, before in kept.items():
        after = module._parameters[name]
        if after is not None and after.dtype != torch.float32:
            source = after.detach() if before.is_meta else before
            same = source.to(device=after.device, dtype=torch.float32)
            module._parameters[name] = nn.Parameter(same, requires_grad=False)

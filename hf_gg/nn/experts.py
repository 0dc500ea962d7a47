"""Fused experts of mixture-of-experts models with RF8 codes.

Transformers keeps the experts of a layer as 3-D parameters (`gate_up_proj`, `down_proj`, …) of one module and
describes their layout by flags on it (`has_gate`, `has_bias`, `is_transposed`, …). That module is changed in place to
a subclass of its own class: its activation, its gating and its identity stay; the parameters become codes with a scale
beside each, and the forward pass runs over them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import WeightFormat, get_format
from .base import (
    OUTLIERS,
    check_whole,
    decode_parameter,
    keeping_float32,
    make_room_for_outliers,
    outliers_of,
    set_outliers,
)


# The flags by which a module describes its layout; one without them cannot be run from outside.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


class RF8Experts(nn.Module):
    """Mixed into the class of a model's experts. Make one with `RF8Experts.convert_`.

    Attributes:
        quantized_names: the parameters that hold codes, uint8 [experts, out, in] ([experts, in, out] in transposed
            models); `<name>_scale` is float32 [experts, out, 1] ([experts, 1, out]). `<name>_outlier_index` and
            `<name>_outlier_value` are as in QuantizedWeight, and absent where there are none.
        format: the weight format.
        backend: the operators' backend.
    """

    quantized_names: tuple[str, ...]
    format: str
    backend: str
    scale_mode: Any
    rounding: str

    @staticmethod
    def weight_names(module: nn.Module) -> tuple[str, ...]:
        """Names of the expert weights that a module holds, empty if its layout is not known."""
        if any(not hasattr(module, flag) for flag in _FLAGS):
            return ()
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        parameters = [module._parameters.get(name) for name in names]
        return names if all(p is not None and p.ndim == 3 for p in parameters) else ()

    @staticmethod
    def convert_(
        module: nn.Module,
        format: str = "rf8",
        scale: Any = "row",
        rounding: str = "nearest",
        backend: str = "auto",
        coded: Mapping[str, tuple] | None = None,
    ) -> nn.Module:
        """Turn a module of fused experts into RF8Experts in place; weights on the meta device become empty codes
        there.

        Args:
            module: the module.
            format: weight format.
            scale: scale mode; of a grid also the steps of each weight by its name, [experts, out, 1].
            rounding: rounding.
            backend: backend of the operators.
            coded: codes, scale and outliers by name, as `quantize_experts` gives them, of weights that are codes
                already.

        Raises:
            ValueError: NaN or infinity in a weight, a layout that is not known, unknown format, scale or backend.
        """
        if isinstance(module, RF8Experts):
            raise ValueError(f"{type(module).__name__} is quantized already (format {module.format!r}).")
        names, fmt = RF8Experts.weight_names(module), get_format(format)
        new: dict[str, tuple] = {}
        if not names:
            raise ValueError(f"{type(module).__name__} is not a module of fused experts whose layout is known.")
        ops.check_backend(backend)
        for name in names:
            weight = module._parameters[name].detach()
            if coded is not None:
                new[name] = coded[name]
                continue
            if weight.is_meta:
                shape = list(weight.shape)
                shape[1 if module.is_transposed else 2] = 1
                new[name] = weight.to(torch.uint8), torch.empty(shape, dtype=torch.float32, device="meta"), None
                continue
            try:
                own = scale[name] if isinstance(scale, Mapping) else scale
                new[name] = quantize_experts(weight, fmt, own, rounding, module.is_transposed)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        module.__class__ = _experts_class(type(module))  # type: ignore[arg-type]
        module.format, module.backend, module.quantized_names = fmt.name, backend, names
        module.scale_mode, module.rounding = fmt.rule(scale), rounding
        for name, (codes, codes_scale, outliers) in new.items():
            module._parameters[name] = nn.Parameter(codes, requires_grad=False)
            module.register_parameter(f"{name}_scale", nn.Parameter(codes_scale, requires_grad=False))
            set_outliers(module, name, outliers)
        return module

    def restore_(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Back to the model's own class with decoded weights, in place."""
        for name in self.quantized_names:
            self._parameters[name] = nn.Parameter(self.dequantize(name, dtype))
            for suffix in ("_scale", *OUTLIERS):
                self._parameters.pop(f"{name}{suffix}", None)
        for attribute in ("format", "backend", "quantized_names", "scale_mode", "rounding"):
            delattr(self, attribute)
        self.__class__ = _base_class(self)
        return self

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One weight as numbers, of the shape of its codes; float32 unless `dtype` says otherwise."""
        return decode_parameter(self, name, dtype or torch.float32)

    @torch.no_grad()
    def requantize_(self, name: str, weight: torch.Tensor):
        """Replace the codes and scales of one weight by those of a float one of the same shape, in place."""
        codes = self._parameters[name]
        check_whole(name, codes)
        if weight.shape != codes.shape:
            raise ValueError(f"{name} must have shape {tuple(codes.shape)}, got {tuple(weight.shape)}.")
        fmt, scale = get_format(self.format), self._parameters[f"{name}_scale"]
        turned = (lambda t: t.transpose(1, 2)) if self.is_transposed else (lambda t: t)
        mode = fmt.scale_again(self.scale_mode, turned(scale), lambda: turned(self.dequantize(name)), turned(weight))
        new, new_scale, outliers = quantize_experts(weight, fmt, mode, self.rounding, self.is_transposed)
        codes.data.copy_(new)
        scale.data.copy_(new_scale)
        set_outliers(self, name, outliers)
        return self

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, whichever `experts_implementation` the config names.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts' numbers; `num_experts` stands for an expert on another process.
            top_k_weights: [tokens, k].
        """
        tokens, k = top_k_index.shape
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(self.num_experts, device=expert.device, dtype=expert.dtype)
        offsets = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        known = (expert < self.num_experts).unsqueeze(-1)
        expert = expert.clamp(max=self.num_experts - 1)

        state = hidden_states[order // k].to(dtype)
        state = self.project("gate_up_proj" if self.has_gate else "up_proj", state, offsets, expert)
        state = self._apply_gate(state) if self.has_gate else self.act_fn(state)
        state = self.project("down_proj", state, offsets, expert)
        if getattr(self, "has_post_expert_norm", False):
            state = self.post_expert_norm(state)
        # rows of experts on another process hold whatever the gate made of zeros
        state = torch.where(known, state * top_k_weights.reshape(-1)[order].unsqueeze(-1), 0.0)
        state = state.index_select(0, torch.argsort(order))
        return state.view(tokens, k, state.shape[-1]).sum(1).to(hidden_states.dtype)

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """One of the experts' linear layers.

        Args:
            name: of the weight.
            x: [rows, in], sorted by expert.
            offsets: int32 [experts], the row at which each expert's rows end.
            expert: [rows], each row's expert, for the bias.
        """
        codes, scale = self._parameters[name], self._parameters[f"{name}_scale"]
        y = ops.grouped_linear(x, codes, scale, offsets, self.format, self.is_transposed, self.backend)
        outliers = outliers_of(self, name)
        if outliers is not None:
            rows, columns = codes.shape[1:]
            added = ops.grouped_outlier_linear(x, *outliers, offsets, rows, columns, self.is_transposed)
            y = (y + added).to(y.dtype)
        return y + self._parameters[f"{name}_bias"][expert].to(y.dtype) if self.has_bias else y

    def _apply(self, fn, recurse=True):
        with keeping_float32(self, self.quantized_names):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        make_room_for_outliers(self, self.quantized_names, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"format={self.format}")))

    def __reduce_ex__(self, protocol):
        # the class is made at run time: pickle by the model's own class
        return _rebuild, (_base_class(self),), self.__dict__


def quantize_experts(
    weight: torch.Tensor, fmt: WeightFormat, scale: Any, rounding: str, transposed: bool, reduce=None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Codes, scale and outliers of a stack [experts, out, in], or [experts, in, out] if `transposed`.

    There is one scale an output. A scale that is given is [experts, out, 1].
    """
    source = weight.transpose(1, 2) if transposed else weight
    codes, scales, outliers = ops.quantize_with_outliers(source, fmt, scale, rounding, reduce)
    return _stored(codes, scales.expand(*source.shape[:2], 1), outliers, transposed)


def stack_experts(parts: Sequence[tuple], transposed: bool) -> tuple:
    """Codes, scale and outliers of a stack, as `quantize_experts` gives them, from those of each expert.

    Args:
        parts: for each expert codes [out, in], scale [out, 1], and indices and values of outliers or None.
        transposed: the stack is to be [experts, in, out].
    """
    codes = torch.stack([part[0] for part in parts])
    lists = [(number, part[2]) for number, part in enumerate(parts) if part[2] is not None]
    outliers = None
    if lists:
        index = torch.cat([own[0].long() + number * codes[0].numel() for number, own in lists])
        narrow = torch.int32 if codes.numel() <= 2**31 else torch.int64
        outliers = index.to(narrow), torch.cat([own[1] for _, own in lists])
    return _stored(codes, torch.stack([part[1] for part in parts]), outliers, transposed)


def _stored(
    codes: torch.Tensor, scales: torch.Tensor, outliers: tuple[torch.Tensor, torch.Tensor] | None, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """A stack [experts, out, in] as its module keeps it."""
    if transposed:
        rows, columns = codes.shape[1:]
        codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
        outliers = None if outliers is None else _transposed_outliers(*outliers, rows, columns)
    return codes.contiguous(), scales.contiguous(), outliers


def _transposed_outliers(
    index: torch.Tensor, value: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outliers of a stack [experts, rows, columns] as those of the stack with its last two dimensions exchanged."""
    size = rows * columns
    expert, within = index.long() // size, index.long() % size
    moved, order = torch.sort(expert * size + within % columns * rows + within // columns)
    return moved.to(index.dtype), value[order]


@functools.cache
def _experts_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"RF8{base.__name__}", (RF8Experts, base), {"__module__": base.__module__})


def _base_class(module: RF8Experts) -> type[nn.Module]:
    return next(base for base in type(module).__bases__ if base is not RF8Experts)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _experts_class(base)  # type: ignore[arg-type]
    return nn.Module.__new__(cls)

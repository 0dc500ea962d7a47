"""A quantized module that shows its weight as numbers for a while.

PEFT's tuners take `base_layer.weight` for a float matrix: they read it, add to its `data`, or replace it. Inside
`float_weight` a quantized module answers such a read with the decoded weight, decoded when it is asked for and not
before; its own forward pass still runs over the codes. What a tuner did to the weight is forgotten at the end, unless
the caller commits it, which quantizes it again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...nn.base import OUTLIERS, QuantizedWeight


# scale modes in which a row does not depend on the others
_ROW_SCALES = ("row", "absmax", "pow2")
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FloatWeight:
    """The weight of one module while it is visible.

    Attributes:
        module: the quantized module.
        dtype: of the visible weight.
        writable: whether changes may be committed.
        kept: whether the decoded weight is kept, so that changes last; without it, every read decodes again.
    """

    def __init__(self, module: Any, dtype: torch.dtype, writable: bool, kept: bool):
        self.module, self.dtype, self.writable, self.kept = module, dtype, writable, kept
        self._weight: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """The decoded weight, [rows, columns].

        Raises:
            NotImplementedError: the codes are split over processes.
        """
        if self._weight is not None:
            return self._weight
        codes = self.module._parameters["weight"]
        if hasattr(codes, "placements"):
            raise NotImplementedError(
                "This needs the base weight as numbers, and its codes are split over processes: train LoRA without "
                "variants there, and merge or initialize from weights in one process."
            )
        if codes.is_meta:
            decoded = torch.empty(codes.shape, dtype=self.dtype, device="meta")
        else:
            with hidden(self.module), torch.no_grad():
                decoded = self.module.dequantize(self.dtype)
        weight = nn.Parameter(decoded, requires_grad=False)
        if self.kept:
            self._weight = weight
        return weight

    def set(self, weight: torch.Tensor) -> None:
        """Take another tensor for the weight."""
        self._weight = weight

    def reset(self) -> None:
        """Forget what was decoded and changed."""
        self._weight = None

    @torch.no_grad()
    def commit(self) -> bool:
        """Quantize the weight again if it was changed. Rows that were not changed keep their codes.

        Returns:
            Whether there was a change.

        Raises:
            ValueError: another shape, NaN or infinity; the module is then unchanged.
        """
        if self._weight is None or self._weight.is_meta:
            return False
        module, new = self.module, self._weight.detach()
        with hidden(module):
            before = module.dequantize(self.dtype)
            if new.shape != before.shape:
                raise ValueError(f"the new weight must have shape {tuple(before.shape)}, got {tuple(new.shape)}.")
            kept = new.to(self.dtype).eq(before).all(1)
            if bool(kept.all()):
                return False
            codes, scale = module.weight[kept], module.weight_scale[kept]
            module.requantize_(new)
            if module.scale_mode in _ROW_SCALES:
                module.weight.data[kept], module.weight_scale.data[kept] = codes, scale
        return True


# a module of another class at run time, which mypy cannot follow
_Module: Any = object


class _Visible(_Module):
    """Mixed into the class of a module whose weight is visible."""

    @property
    def weight(self):
        return self.__dict__["_float_weight"].get()

    def __setattr__(self, name, value):
        if name == "weight":
            self.__dict__["_float_weight"].set(value)
        else:
            super().__setattr__(name, value)

    # the module's own methods want its codes
    def __call__(self, *args, **kwargs):
        with hidden(self):
            return self(*args, **kwargs)

    def dequantize(self, *args, **kwargs):
        with hidden(self):
            return self.dequantize(*args, **kwargs)

    def requantize_(self, *args, **kwargs):
        with hidden(self):
            result = self.requantize_(*args, **kwargs)
        self.__dict__["_float_weight"].reset()
        return result


@functools.cache
def _visible_class(base: type) -> type:
    return type(base.__name__, (_Visible, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def current(module: nn.Module) -> FloatWeight | None:
    """The visible weight of a module, if it is visible at the moment."""
    return module.__dict__.get("_float_weight") if isinstance(module, _Visible) else None


@contextlib.contextmanager
def float_weight(
    module: Any, dtype: torch.dtype = torch.float32, writable: bool = False, kept: bool = True
) -> Iterator[FloatWeight]:
    """Let a quantized module show its weight as a float matrix.

    Args:
        module: the module; may be visible already, and is so again afterwards.
        dtype: of the visible weight.
        writable: whether the caller may commit.
        kept: whether the decoded weight is kept between reads.
    """
    outer = module.__dict__.get("_float_weight")
    cls: Any = type(module)
    visible = FloatWeight(module, dtype, writable, kept)
    module.__dict__["_float_weight"] = visible
    if not isinstance(module, _Visible):
        module.__class__ = _visible_class(cls)
    try:
        yield visible
    finally:
        module.__class__ = cls
        if outer is None:
            del module.__dict__["_float_weight"]
        else:
            module.__dict__["_float_weight"] = outer
            outer.reset()


@contextlib.contextmanager
def all_visible(model: nn.Module) -> Iterator[None]:
    """Let every quantized module of a model show its weight in the model's dtype, decoded anew at each read."""
    dtype = model_dtype(model)
    with contextlib.ExitStack() as stack:
        for module in list(model.modules()):
            if isinstance(module, QuantizedWeight):
                stack.enter_context(float_weight(module, dtype, kept=False))
        yield


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model's weights would have if none were quantized."""
    parameters = (
        (name, p.dtype) for name, p in model.named_parameters() if not name.endswith(("_scale", OUTLIERS[1]))
    )
    return next((dtype for _, dtype in parameters if dtype in _COMPUTE_DTYPES), torch.float32)


@contextlib.contextmanager
def as_plain_linear(module: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a quantized linear layer be an `nn.Linear`, for code that insists on that class and only looks at it."""
    cls, codes = type(module), module._parameters["weight"]
    weight = FloatWeight(module, dtype, writable=False, kept=False).get()
    module.__class__, module._parameters["weight"] = nn.Linear, weight
    try:
        yield
    finally:
        module.__class__, module._parameters["weight"] = cls, codes


@contextlib.contextmanager
def hidden(module: Any) -> Iterator[None]:
    """Let a module be itself inside `float_weight`."""
    cls = type(module)
    if isinstance(module, _Visible):
        module.__class__ = next(base for base in cls.__bases__ if base is not _Visible)
    try:
        yield
    finally:
        module.__class__ = cls

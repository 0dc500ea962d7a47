"""Tuner layers over quantized modules.

A tuner layer of PEFT that wraps a quantized module becomes, in place, a subclass of its own class: its forward pass
sees the base weight as numbers if it reads it at all, `merge` quantizes the sum again, and `unmerge` puts back the
codes from before the first merge. For LoRA and the other tuners that only add to the layer's output, nothing is
decoded beyond what the base layer does itself.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...nn.base import OUTLIERS, QuantizedWeight, share_outliers
from . import rules
from .view import current, float_weight


class MergeWarning(UserWarning):
    """A float weight was rounded to codes again, and lost something."""


class Backup:
    """Parameters as they were before any adapter was merged into them; shared by all tuner layers over one weight.

    Those are nested layers of several tuners, and layers around modules whose weights are tied.

    Attributes:
        layers: how many tuner layers are merged at the moment.
    """

    def __init__(self) -> None:
        self.layers = 0
        self._saved: list[tuple[nn.Module, str, torch.Tensor | None]] = []

    def take(self, module: nn.Module, names: tuple[str, ...]) -> None:
        """Copy parameters of a module."""
        for name in names:
            parameter = module._parameters.get(name)
            self._saved.append((module, name, None if parameter is None else parameter.detach().clone()))

    def adopt(self, other: Backup) -> None:
        """Count one more merged layer, and take over its copies of what is not saved yet."""
        known = [module._parameters.get(name) for module, name, _ in self._saved]
        for module, name, value in other._saved:
            parameter = module._parameters.get(name)
            if not any(parameter is one for one in known if one is not None):
                self._saved.append((module, name, value))
        self.layers += 1

    def restore(self) -> None:
        """Write the copies back, bit for bit, and drop them."""
        for module, name, value in self._saved:
            parameter = module._parameters.get(name)
            if value is None or parameter is None:
                module._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
            else:
                # the module may have been moved meanwhile
                parameter.data = value.to(parameter.device)
        for module in {id(module): module for module, _, _ in self._saved}.values():
            if isinstance(module, QuantizedWeight):
                share_outliers(module, "weight")
        self._saved = []


# a tuner layer of any class at run time, which mypy cannot follow
_TunerLayer: Any = object


class Adapted(_TunerLayer):
    """Base of what is mixed into the class of a tuner layer over a quantized module."""

    _gg_backup: Backup

    def __reduce_ex__(self, protocol):
        # the class is made at run time: pickle by PEFT's own class
        return _rebuild, type(self).__bases__, self.__dict__


class RF8TunerLayer(Adapted):
    """Mixed into the class of a tuner layer whose base layer is a QuantizedWeight."""

    def forward(self, *args: Any, **kwargs: Any):
        if not _reads_weight(self):
            return super().forward(*args, **kwargs)
        return _forward_with_weight(self, super().forward, args, kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        module = self.get_base_layer()
        if _being_written(module):  # some tuners merge again inside their merge
            super().merge(*args, **kwargs)
            return
        if "_gg_unmergeable" in self.__dict__:
            raise ValueError(f"The adapter cannot be merged into {module.format} weights: {self._gg_unmergeable}.")
        with (
            merging(self, module, ("weight", "weight_scale", *(f"weight{suffix}" for suffix in OUTLIERS), "bias")),
            float_weight(module, writable=True) as visible,
        ):
            try:
                super().merge(*args, **kwargs)
            except NotImplementedError as error:
                tuner = rules.package(type(self)).upper()
                raise NotImplementedError(f"PEFT cannot merge {tuner}: keep the adapter beside the model.") from error
            rounded = visible.commit()
        if rounded:
            warn_merge(module.format)

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        module = self.get_base_layer()
        if _being_written(module) or not self.merged_adapters:
            super().unmerge(*args, **kwargs)
            return
        with unmerging(self), float_weight(module, writable=True) as visible:
            super().unmerge(*args, **kwargs)
            if self.merged_adapters or self._gg_backup.layers > 1:  # another adapter stays merged
                visible.commit()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with initializing(self.get_base_layer()):
            super().update_layer(*args, **kwargs)

    def get_delta_weight(self, *args: Any, **kwargs: Any):
        module = self.get_base_layer()
        with contextlib.nullcontext() if current(module) else float_weight(module):
            return super().get_delta_weight(*args, **kwargs)


def adapt_(layer: nn.Module, mixin: type = RF8TunerLayer) -> None:
    """Turn a tuner layer over a quantized module into a subclass of `mixin` and its own class, in place; once."""
    if not isinstance(layer, mixin):
        layer.__dict__["_gg_backup"] = Backup()
        base: Any = type(layer)
        layer.__class__ = _adapted_class(mixin, base)


def share_backups(layers: Iterable[Any]) -> None:
    """Give layers over one weight the same backup."""
    backups: dict[int, Backup] = {}
    for layer in sorted(layers, key=lambda one: one._gg_backup.layers, reverse=True):
        weight = layer.get_base_layer()._parameters["weight"]
        layer._gg_backup = backups.setdefault(id(weight), layer._gg_backup)


@functools.cache
def _adapted_class(mixin: Any, base: Any) -> type[nn.Module]:
    # PEFT looks at names of classes in places
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def _rebuild(mixin: Any, base: Any) -> nn.Module:
    cls: Any = _adapted_class(mixin, base)
    return cls.__new__(cls)


@contextlib.contextmanager
def merging(layer: Any, module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Around a merge into a module: back its parameters up, and undo the merge if it fails."""
    before, backup = list(layer.merged_adapters), Backup()
    backup.take(module, names)
    bias = module._parameters.get("bias")
    dtype = None if bias is None else bias.dtype
    try:
        yield
    except Exception:
        layer.merged_adapters = before
        backup.restore()
        raise
    if bias is not None and bias.dtype != dtype:  # PEFT casts it to the dtype of the weight
        bias.data = bias.data.to(dtype)
    if layer.merged_adapters and not before:
        layer._gg_backup.adopt(backup)


@contextlib.contextmanager
def unmerging(layer: Any) -> Iterator[None]:
    """Around an unmerge: the last one of a weight brings back what the first merge backed up."""
    yield
    if not layer.merged_adapters:
        layer._gg_backup.layers -= 1
        if not layer._gg_backup.layers:
            layer._gg_backup.restore()


def warn_merge(format: str, what: str = "an adapter", undo: str = "`unmerge` restores the codes exactly. ") -> None:
    """Say that merged weights were rounded to codes, and what is lost."""
    warnings.warn(
        f"Merging {what} into {format} weights rounds their sum to {format} again: a change that is small against a "
        f"weight's rounding step is lost in it, and outputs differ from those before the merge. {undo}To keep all of "
        "the adapter, do not merge it, or merge it into `model.dequantize()`.",
        MergeWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def initializing(module: Any, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Show the weight while an adapter is created, and quantize what the adapter's initialization made of it.

    Args:
        module: the base layer; another kind than a quantized one is left alone.
        dtype: of the visible weight. PEFT gives it to what it creates.
    """
    if not isinstance(module, QuantizedWeight) or _being_written(module):
        yield
        return
    with float_weight(module, dtype, writable=True) as visible:
        yield
        changed = visible.commit()
    if changed:
        warnings.warn(
            f"The adapter's initialization changed base weights, which were rounded to {module.format} again: the "
            "model with the new adapter differs from the base model by that rounding.",
            MergeWarning,
            stacklevel=4,
        )


def _being_written(module: nn.Module) -> bool:
    visible = current(module)
    return visible is not None and visible.writable


def _reads_weight(layer: Any) -> bool:
    """Whether the forward pass of a tuner layer may read the base weight."""
    if layer.disable_adapters or layer.merged or getattr(layer, "additive", False):
        return False
    return rules.package(type(layer)) not in rules.ADDITIVE or bool(getattr(layer, "lora_variant", None))


@torch.compiler.disable
def _forward_with_weight(layer: Any, forward: Callable, args: tuple, kwargs: dict[str, Any]):
    module = layer.get_base_layer()
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), getattr(module, "compute_dtype", torch.float32))
    with float_weight(module, dtype):
        return forward(*args, **kwargs)

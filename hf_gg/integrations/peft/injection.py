"""Where PEFT is wrapped.

PEFT has no registry for kinds of quantized layers: the functions below are wrapped or extended because they are the ones
through which every tuner passes. Each does nothing but call the original on a model without quantized modules. A PEFT that
lacks one of them (another release) gets a warning that says what does not work, and is otherwise left alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ...nn import RF8Embedding, RF8Experts, RF8Linear
from ...nn.base import QuantizedWeight
from . import rules
from .experts import adapt_experts_
from .layers import adapt_, initializing, warn_rounded
from .view import all_visible, as_plain_linear, model_dtype


def install() -> None:
    """Wrap PEFT; a second call does nothing."""
    for what, hook in (
        ("adapters on quantized layers", _hook_creation),
        ("`trainable_token_indices`", _hook_trainable_tokens),
        ("`modules_to_save` on quantized layers", _hook_modules_to_save),
        ("`get_layer_status` of quantized layers", _hook_backend),
        ("`prepare_model_for_kbit_training`", _hook_kbit),
    ):
        try:
            hook()
        except (ImportError, AttributeError) as error:
            warnings.warn(
                f"hf_gg: {what} is not supported with the installed PEFT ({error}). Install peft>=0.21.", stacklevel=2
            )


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put `make(original)` in place of an attribute, once."""
    raw = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
    if getattr(raw, "_gg_wrapped", False):
        return
    wrapped = functools.wraps(raw)(make(raw))
    wrapped._gg_wrapped = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _rebind(old: Any, new: Any) -> None:
    """Exchange a function in every module of PEFT that has imported it by name.

    Modules imported later take it from the module that defines it, which is among these.
    """
    for name, module in list(sys.modules.items()):
        if module is None or not (name == "peft" or name.startswith("peft.")):
            continue
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)


# --- creating adapters ---


def _hook_creation() -> None:
    from peft.tuners.tuners_utils import BaseTuner

    def make(original: Callable) -> Callable:
        def __init__(self, *args, **kwargs):
            model = kwargs.get("model", args[0] if args else None)
            if isinstance(model, nn.Module) and _quantized_in(model):
                _wrap_tuner(type(self))
            original(self, *args, **kwargs)

        return __init__

    # names that must exist
    _ = BaseTuner.inject_adapter, BaseTuner._create_and_replace
    _wrap(BaseTuner, "__init__", make)


def _wrap_tuner(cls: type) -> None:
    """Let a tuner see weights as numbers while it makes its layers. Done when it first meets a quantized model."""
    for owner in cls.__mro__:
        for name in ("_pre_injection_hook", "inject_adapter", "_post_injection_hook", "_cast_adapter_dtype"):
            if name in vars(owner):
                _wrap(owner, name, _seeing_weights)
        if "_create_and_replace" in vars(owner):
            _wrap(owner, "_create_and_replace", _creating)


def _seeing_weights(original: Callable) -> Callable:
    def method(self, *args, **kwargs):
        # LoRA looks at one weight at a time, if at all
        with contextlib.nullcontext() if rules.package(type(self)) == "lora" else all_visible(self.model):
            result = original(self, *args, **kwargs)
        adapt_all(self.model)
        return result

    return method


def _creating(original: Callable) -> Callable:
    def _create_and_replace(self, config, adapter_name, target, target_name, parent, *args, **kwargs):
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, (QuantizedWeight, RF8Experts)):
            return original(self, config, adapter_name, target, target_name, parent, *args, **kwargs)
        rules.check(config, base, kwargs.get("parameter_name"))
        if isinstance(base, RF8Linear) and rules.tuner_name(config) in rules.PLAIN_LINEAR_ONLY:
            context = as_plain_linear(base, model_dtype(self.model))
        else:
            context = initializing(base if rules.reads_weight_at_creation(config) else None, model_dtype(self.model))
        with context:
            result = original(self, config, adapter_name, target, target_name, parent, *args, **kwargs)
        adapt_all(getattr(parent, target_name))
        return result

    return _create_and_replace


def adapt_all(model: nn.Module) -> None:
    """Give every tuner layer around a quantized module what it needs."""
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    # inner layers first: layers around one module share their backup
    for layer in reversed(list(model.modules())):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, RF8Experts):
            if isinstance(layer, ParamWrapper) and layer.parameter_name in base.quantized_names:
                adapt_experts_(layer)
        elif isinstance(base, QuantizedWeight):
            adapt_(layer)


def _hook_trainable_tokens() -> None:
    # reads rows of the embedding when it is made, outside `_create_and_replace` where LoRA makes it
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def make(original: Callable) -> Callable:
        def update_layer(self, *args, **kwargs):
            with initializing(self.get_base_layer()):
                return original(self, *args, **kwargs)

        return update_layer

    _wrap(TrainableTokensLayer, "update_layer", make)


# --- modules that are trained and saved whole ---


def _hook_modules_to_save() -> None:
    # PEFT copies the module and trains the copy, and codes cannot be trained
    from peft.utils.other import ModulesToSaveWrapper

    def make_update(original: Callable) -> Callable:
        def update(self, adapter_name, *args, **kwargs):
            tied = kwargs.get("tied_module", args[0] if args else None)
            if adapter_name not in self.modules_to_save and tied is None and _quantized_in(self.original_module):
                self.modules_to_save[adapter_name] = float_copy(self.original_module)
            return original(self, adapter_name, *args, **kwargs)

        return update

    def make_unload(original: Callable) -> Callable:
        def unload_and_optionally_merge_module(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if result is self.original_module or not _quantized_in(self.original_module):
                return result
            return requantized(self.original_module, result)

        return unload_and_optionally_merge_module

    _wrap(ModulesToSaveWrapper, "update", make_update)
    _wrap(ModulesToSaveWrapper, "unload_and_optionally_merge_module", make_unload)


def _quantized_in(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, (QuantizedWeight, RF8Experts))]


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that can be trained: quantized modules in it become plain ones with float32 weights.

    A Conv1D stays what it became, a linear layer.
    """
    new = copy.deepcopy(module)
    for name in _quantized_in(new):
        child = new.get_submodule(name)
        if isinstance(child, RF8Experts):
            child.restore_()
            continue
        plain = child.to_embedding() if isinstance(child, RF8Embedding) else child.to_linear()
        if not name:
            new = plain
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(new.get_submodule(parent), attribute, plain)
    return new


def requantized(original: nn.Module, trained: nn.Module) -> nn.Module:
    """Write trained weights back into the module that they were copied from: what was quantized there is again."""
    plain = dict(trained.named_modules())
    done: set[str] = set()
    for name in _quantized_in(original):
        child, source = original.get_submodule(name), plain[name]
        prefix = f"{name}." if name else ""
        if isinstance(child, RF8Experts):
            for weight in child.quantized_names:
                child.requantize_(weight, getattr(source, weight).detach())
                done.add(f"{prefix}{weight}")
        else:
            child.requantize_(source.weight.detach())
            done.add(f"{prefix}weight")
        warn_rounded(child.format, f"{type(child).__name__} in `modules_to_save`")
    values = dict(trained.named_parameters()) | dict(trained.named_buffers())
    for name, parameter in (*original.named_parameters(), *original.named_buffers()):
        if name in values and name not in done:
            parameter.data.copy_(values[name].data)
    return original


# --- the rest ---


def _hook_backend() -> None:
    from peft.utils import quantization_utils

    from .backend import make_backend

    original = quantization_utils.resolve_quantization_backend
    if getattr(original, "_gg_wrapped", False):
        return

    @functools.wraps(original)
    def resolve_quantization_backend(base_layer, **kwargs):
        if isinstance(base_layer, QuantizedWeight):
            return make_backend(base_layer)
        return original(base_layer, **kwargs)

    resolve_quantization_backend._gg_wrapped = True  # type: ignore[attr-defined]
    _rebind(original, resolve_quantization_backend)


def _hook_kbit() -> None:
    from peft.utils import other

    original = other.prepare_model_for_kbit_training
    if getattr(original, "_gg_wrapped", False):
        return

    @functools.wraps(original)
    def prepare_model_for_kbit_training(model, *args, **kwargs):
        if getattr(model, "quantization_method", None) != "gg" or getattr(model, "is_loaded_in_8bit", False):
            return original(model, *args, **kwargs)
        # the function knows the other methods by name; what it does for 8 bits is right for these 8 bits, but other
        # libraries must not take the model for one of bitsandbytes
        model.is_loaded_in_8bit = True
        try:
            return original(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_8bit

    prepare_model_for_kbit_training._gg_wrapped = True  # type: ignore[attr-defined]
    _rebind(original, prepare_model_for_kbit_training)


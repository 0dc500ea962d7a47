"""Creating adapters on quantized modules.

PEFT decides by the class of a module which layer to make for it, and RF8Linear is an `nn.Linear`. While the layer is
made, the weight is visible as numbers, for initializations that read it; afterwards the layer gets what `layers` and
`experts` say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import nn

from ...nn import RF8Experts, RF8Linear
from ...nn.base import QuantizedWeight
from . import rules
from .experts import RF8ParamWrapper
from .layers import adapt_, initializing, share_backups
from .patching import wrap
from .view import all_visible, as_plain_linear, model_dtype


def install() -> None:
    """Let tuners know quantized modules."""
    from peft.tuners.tuners_utils import BaseTuner

    # not changed here, but relied on in `_wrap_tuner`
    _ = BaseTuner.inject_adapter, BaseTuner._create_and_replace
    wrap(BaseTuner, "__init__", _constructor)


def install_trainable_tokens() -> None:
    """Let `trainable_token_indices` of LoRA read rows of a quantized embedding."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def make(original: Callable) -> Callable:
        def update_layer(self, *args, **kwargs):
            with initializing(self.get_base_layer()):
                return original(self, *args, **kwargs)

        return update_layer

    wrap(TrainableTokensLayer, "update_layer", make)


def quantized_in(module: nn.Module) -> list[str]:
    """Names of the quantized modules inside a module."""
    return [name for name, child in module.named_modules() if isinstance(child, (QuantizedWeight, RF8Experts))]


def adapt_all(model: nn.Module) -> None:
    """Give every tuner layer around a quantized module what it needs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = []
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, QuantizedWeight):
            adapt_(layer)
            adapted.append(layer)
        elif isinstance(base, RF8Experts) and getattr(layer, "parameter_name", None) in base.quantized_names:
            adapt_(layer, RF8ParamWrapper)
    share_backups(adapted)


def _constructor(original: Callable) -> Callable:
    def __init__(self, *args, **kwargs):
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module) and quantized_in(model):
            rules.check_model(kwargs.get("peft_config", args[1] if len(args) > 1 else None), model)
            _wrap_tuner(type(self))
        original(self, *args, **kwargs)

    return __init__


def _wrap_tuner(cls: type) -> None:
    """Change the methods of a tuner that make its layers. Done when it first meets a quantized model."""
    for owner in cls.__mro__:
        for name in ("_pre_injection_hook", "inject_adapter", "_post_injection_hook", "_cast_adapter_dtype"):
            if name in vars(owner):
                wrap(owner, name, _seeing_weights)
        if "_create_and_replace" in vars(owner):
            wrap(owner, "_create_and_replace", _creating)


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
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if isinstance(base, RF8Linear) and rules.tuner_name(config) in rules.PLAIN_LINEAR_ONLY:
            context = as_plain_linear(base, model_dtype(self.model))
        elif rules.reads_weight_at_creation(config):
            context = initializing(base, model_dtype(self.model))
        with context:
            result = original(self, config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        adapt_all(layer)
        if getattr(config, "layer_replication", None):
            layer.__dict__["_gg_unmergeable"] = "layer_replication shares one weight among several layers"
        return result

    return _create_and_replace

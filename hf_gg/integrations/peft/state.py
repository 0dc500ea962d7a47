"""Adapter files and quantized embeddings.

With an embedding among the targets, PEFT puts the embedding's own weights into the adapter file too, because a
vocabulary may have grown. As codes they would be garbage in a model that is not quantized, and the other way round.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ...nn.base import OUTLIERS, QuantizedWeight
from .methods import is_ours
from .patching import rebind


def install() -> None:
    """Keep codes out of adapter files, and floats out of codes."""
    from peft.utils import save_and_load

    rebind(save_and_load, "get_peft_model_state_dict", _get)
    rebind(save_and_load, "set_peft_model_state_dict", _set)


def _get(original: Callable) -> Callable:
    def get_peft_model_state_dict(model, *args, **kwargs):
        state = original(model, *args, **kwargs)
        bound = inspect.signature(original).bind(model, *args, **kwargs)
        bound.apply_defaults()
        adapter, embeddings = bound.arguments["adapter_name"], bound.arguments["save_embedding_layers"]
        if embeddings == "auto" and is_ours(model.peft_config[adapter].peft_type):
            # an embedding that is a target is not changed itself
            state = {key: value for key, value in state.items() if not key.endswith(".base_layer.weight")}
        codes = [
            key
            for key, value in state.items()
            if getattr(value, "dtype", None) == torch.uint8 and f"{key}_scale" in state
        ]
        for key in codes:
            for suffix in ("", "_scale", *OUTLIERS):
                state.pop(f"{key}{suffix}", None)
        if codes and embeddings is True:
            warnings.warn(
                f"save_embedding_layers=True: {codes[0]} is left out of the adapter, because it is quantized and "
                "belongs to the base model's checkpoint.",
                stacklevel=2,
            )
        return state

    return get_peft_model_state_dict


def _set(original: Callable) -> Callable:
    def set_peft_model_state_dict(model, peft_model_state_dict, *args, **kwargs):
        state = dict(peft_model_state_dict)
        for key in peft_model_state_dict:
            module = _module(model, key)
            if isinstance(module, QuantizedWeight) and state[key].is_floating_point():
                # an adapter that was saved from a model that is not quantized
                module.requantize_(state.pop(key).to(module.weight.device))
        return original(model, state, *args, **kwargs)

    return set_peft_model_state_dict


def _module(model: nn.Module, key: str) -> nn.Module | None:
    """The module whose own `weight` a key names, seen through the tuner layer that may be around it."""
    name, _, attribute = key.rpartition(".")
    if attribute != "weight":
        return None
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, QuantizedWeight) else None

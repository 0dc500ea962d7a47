"""Functions of PEFT beside the tuners that have to know quantized modules."""

from __future__ import annotations

import os
from collections.abc import Callable

from ...nn.base import QuantizedWeight
from .injection import quantized_in
from .patching import rebind, wrap
from .view import float_weight


def install_backend() -> None:
    """PEFT's own interface to quantized layers, which some of its tuners use; `get_layer_status` shows it."""
    from peft.utils import quantization_utils

    from .backend import RF8Backend

    def make(original: Callable) -> Callable:
        def resolve_quantization_backend(base_layer, **kwargs):
            if isinstance(base_layer, QuantizedWeight):
                return RF8Backend(base_layer)
            return original(base_layer, **kwargs)

        return resolve_quantization_backend

    rebind(quantization_utils, "resolve_quantization_backend", make)


def install_kbit() -> None:
    """`prepare_model_for_kbit_training` knows the quantization methods for which it enables checkpointing by name."""
    from peft.utils import other

    def make(original: Callable) -> Callable:
        def prepare_model_for_kbit_training(model, *args, **kwargs):
            if getattr(model, "quantization_method", None) != "gg" or getattr(model, "is_loaded_in_8bit", False):
                return original(model, *args, **kwargs)
            # right for any 8 bits; taken back, as other libraries would take the model for one of bitsandbytes
            model.is_loaded_in_8bit = True
            try:
                return original(model, *args, **kwargs)
            finally:
                del model.is_loaded_in_8bit

        return prepare_model_for_kbit_training

    rebind(other, "prepare_model_for_kbit_training", make)


def install_corda() -> None:
    """The preparation for LoRA's initialization CorDA, which runs on the bare model."""
    from peft.tuners.lora import corda

    def make(original: Callable) -> Callable:
        def collect_eigens_for_layer(linear, *args, **kwargs):
            if not isinstance(linear, QuantizedWeight):
                return original(linear, *args, **kwargs)
            with float_weight(linear):
                return original(linear, *args, **kwargs)

        return collect_eigens_for_layer

    wrap(corda, "collect_eigens_for_layer", make)


def install_loraga() -> None:
    """The preparation for LoRA's initialization LoRA-GA, which asks for gradients that codes do not have."""
    from peft.tuners.lora import loraga

    def make(original: Callable) -> Callable:
        def preprocess_loraga(model, lora_config, train_step, cache_file=None):
            if quantized_in(model) and not (cache_file is not None and os.path.exists(cache_file)):
                raise NotImplementedError(
                    "LoRA-GA needs gradients with respect to the base weights, and codes have none: prepare it on "
                    "the model in full precision with `cache_file` and give that file here, or use another "
                    "initialization."
                )
            return original(model, lora_config, train_step, cache_file)

        return preprocess_loraga

    rebind(loraga, "preprocess_loraga", make)

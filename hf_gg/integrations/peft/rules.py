"""What is not supported, and says so before it would go wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...nn import RF8Experts
from ...nn.base import OUTLIERS
from .support import TUNERS


# Initializations of LoRA that do not look at the base weight.
_BLIND_INITS = (True, False, "gaussian", "eva")


# Tuners whose layers never look at the base weight in their forward pass, by their package in peft.tuners: they run
# unwrapped, so that they can be compiled. LoRA's variants are told apart where this is used.
_SOMETIMES = {"FROD", "MISS"}
ADDITIVE = frozenset(name.lower() for name, support in TUNERS.items() if not support.reads and name not in _SOMETIMES)

# Tuners that take an nn.Linear and no subclass of it.
PLAIN_LINEAR_ONLY = frozenset({"GLORA"})


def check_model(config: Any, model: Any) -> None:
    """Refuse an adapter on a model as a whole.

    Raises:
        NotImplementedError: the tuner takes its dtype from codes.
    """
    configs = config.values() if isinstance(config, dict) else [config]
    first = next(model.parameters())
    if any(tuner_name(one) == "SHADOW" for one in configs) and not first.is_floating_point():
        raise NotImplementedError(
            "SHADOW takes its dtype from the first weight of the model, and that holds codes: quantize with "
            "quantize_embeddings=False."
        )


def check(config: Any, base: Any, parameter_name: str | None) -> None:
    """Refuse an adapter on a quantized module that would compute with codes.

    Args:
        config: of the adapter.
        base: the quantized module.
        parameter_name: the parameter that LoRA is to adapt, with `target_parameters`.

    Raises:
        NotImplementedError: the tuner cannot work on codes.
        ValueError: a target that must be named in another way, or an initialization for another format.
    """
    kind = type(base).__name__
    if getattr(config, "init_lora_weights", None) == "loftq":
        raise ValueError(
            f"init_lora_weights='loftq' makes up for the rounding of bitsandbytes' 4 or 8 bits, and {kind} is rounded "
            "otherwise: use 'pissa' or True."
        )
    if tuner_name(config) == "LN_TUNING":
        raise NotImplementedError(
            f"LN_TUNING trains a copy of its target, and the codes of {kind} cannot be trained: target normalization "
            "layers only, or leave the module out of the quantization with `modules_to_not_convert`."
        )
    if getattr(config, "runtime_offload_base_weight", False):
        raise NotImplementedError(
            f"{tuner_name(config)} with runtime_offload_base_weight=True moves base weights between devices at each "
            f"step, which {kind} does not support: leave it False."
        )
    if parameter_name is None or (isinstance(base, RF8Experts) and parameter_name in base.quantized_names):
        return
    if isinstance(base, RF8Experts):
        suffix = next((suffix for suffix in ("_scale", *OUTLIERS) if parameter_name.endswith(suffix)), None)
        if suffix is None:
            return
        remedy = f"target {parameter_name.removesuffix(suffix)!r}"
    else:
        remedy = "name the module itself in `target_modules`"
    raise ValueError(f"target_parameters: LoRA cannot adapt {parameter_name!r} of {kind}: {remedy}.")


def reads_weight_at_creation(config: Any) -> bool:
    """Whether an adapter looks at the base weight when it is made; for a plain LoRA it need not be decoded."""
    if tuner_name(config) != "LORA" or getattr(config, "init_lora_weights", None) not in _BLIND_INITS:
        return True
    return any(getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant"))


def tuner_name(config: Any) -> str:
    """PEFT's name of the tuner."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def package(cls: type) -> str:
    """The package in peft.tuners that a class is from, empty if it is from elsewhere."""
    return cls.__module__.partition("peft.tuners.")[2].partition(".")[0]

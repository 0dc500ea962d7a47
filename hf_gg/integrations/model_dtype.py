"""`model.dtype` of a model whose first floating-point parameter is a scale.

Transformers takes the dtype of the first one for the model's: it writes it into `config.json`, by which the model is
loaded again. Scales are float32 in any model, so one of 16 bits whose embeddings are quantized came back in 32.
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn import RF8Embedding
from ..nn.base import OUTLIERS
from .selection import quantized_modules, weight_names


def install() -> None:
    """Have Transformers pass over the scales and outliers of quantized modules; a second call does nothing."""
    from transformers import PreTrainedModel  # imports the quantizers, and so must not be imported with them

    getter = PreTrainedModel.dtype.fget  # type: ignore[attr-defined]  # a property
    if hasattr(getter, "_original"):
        return

    def dtype(self) -> torch.dtype:
        first = getter(self)
        return _of_the_rest(self, first) if first == torch.float32 else first

    dtype.__doc__, dtype._original = getter.__doc__, getter  # type: ignore[attr-defined]
    PreTrainedModel.dtype = property(dtype)  # type: ignore[assignment,method-assign]


def _of_the_rest(model: nn.Module, default: torch.dtype) -> torch.dtype:
    quantized = {module for _, module in quantized_modules(model)}
    if not quantized:
        return default
    for module in model.modules():
        if isinstance(module, RF8Embedding):
            return module.compute_dtype
        names = weight_names(module) if module in quantized else ()
        ours = {f"{name}{suffix}" for name in names for suffix in ("_scale", *OUTLIERS)}
        for name, parameter in module._parameters.items():
            if name not in ours and parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return default

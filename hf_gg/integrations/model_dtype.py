"""`model.dtype` of a model whose first floating-point parameter is a scale.

Transformers takes the dtype of the first one for the model's: it writes it into `config.json`, by which the model is
loaded again. Scales are float32 in any model, so one of 16 bits whose embeddings are quantized came back in 32.
"""

from __future__ import annotations

import torch
from torch import nn

from ..nn import RF8Embedding, RF8Experts
from ..nn.base import OUTLIERS, QuantizedWeight
from .selection import weight_names


def install() -> None:
    """Have Transformers pass over the scales and outliers of quantized modules; a second call does nothing."""
    from transformers import PreTrainedModel  # imports the quantizers, and so must not be imported with them

    getter = PreTrainedModel.dtype.fget  # type: ignore[attr-defined]  # a property
    if hasattr(getter, "_original"):
        return

    def dtype(self) -> torch.dtype:
        return _first_of_the_rest(self) or getter(self)

    dtype.__doc__, dtype._original = getter.__doc__, getter  # type: ignore[attr-defined]
    PreTrainedModel.dtype = property(dtype)  # type: ignore[assignment,method-assign]


def _first_of_the_rest(model: nn.Module) -> torch.dtype | None:
    """By a walk that ends at the first parameter that counts, as Transformers' own does."""
    for module in model.modules():
        ours: set[str] = set()
        if isinstance(module, RF8Embedding):
            return module.compute_dtype
        if isinstance(module, (QuantizedWeight, RF8Experts)):
            ours = {f"{name}{suffix}" for name in weight_names(module) for suffix in ("_scale", *OUTLIERS)}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and name not in ours:
                return parameter.dtype
    return None

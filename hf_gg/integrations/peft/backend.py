"""PEFT's own interface to quantized layers (`QuantizationBackend`), for the tuners that use it.

Those are OFT, BOFT, VeRA, MiSS and SHiRA in PEFT 0.21; it also names the format in `get_layer_status`.
"""

from __future__ import annotations

import torch
from peft.utils.quantization_utils import QuantizationBackend

from ...nn import RF8Embedding
from ...nn.base import QuantizedWeight
from .view import current


class RF8Backend(QuantizationBackend):
    """Decoded weights for a tuner, and codes for what it makes of them."""

    supports_merge = True

    def __init__(self, module: QuantizedWeight):
        self.backend_name = module.format
        self.layer_type = "embedding" if isinstance(module, RF8Embedding) else "linear"

    def get_base_weight(self, base_layer: QuantizedWeight) -> torch.Tensor:
        visible = current(base_layer)
        return base_layer.dequantize() if visible is None else visible.get().data

    def set_base_weight(self, peft_layer, weight_data: torch.Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        if current(base_layer) is None:
            base_layer.requantize_(weight_data)
        else:
            base_layer.weight.data = weight_data

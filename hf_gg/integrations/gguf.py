"""GGUF files as a source: each tensor is unpacked by Transformers' own reader, then quantized, one at a time."""

from __future__ import annotations

import functools
import sys

import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto

from .checkpoint import Quantize


class QuantizeTargets(Quantize):
    """`Quantize` at the end of a converter's operations, where results still go by the target patterns."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns=None, target_patterns=None, full_layer_name="", model=None, **kwargs):
        names = {key: key for key in input_dict}
        for key in input_dict:
            if key in full_layer_name:
                prefix, _, suffix = full_layer_name.partition(key)
                names = {k: prefix + k + suffix for k in input_dict}
                break
        return super().convert({names[k]: v for k, v in input_dict.items()}, model=model)


class GgufSource:
    """What Transformers' GGUF quantizer does when it unpacks a file, lent to ours.

    Args:
        path: the `.gguf` file.

    Raises:
        ImportError: this Transformers reads GGUF files in another way.
        ValueError: an architecture that only the older loader knows.
    """

    def __init__(self, path: str):
        try:
            from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
            from transformers.utils.quantization_config import GgufConfig
        except ImportError as error:
            raise ImportError(
                "Quantizing a GGUF file while loading it needs a newer Transformers (5.23 works): upgrade it, or load the "
                "file, save it, and quantize the saved model."
            ) from error
        self._reader = GgufHfQuantizer(GgufConfig(gguf_file=path, dequantize=True))
        self._reader.read_header(path)
        if not self._reader.supported:
            raise ValueError(
                "Transformers reads GGUF files of this architecture with its older loader, which holds the whole model in "
                "full precision: load and save it without quantization_config, then quantize the saved model."
            )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return self._reader.update_dtype(dtype)

    def prepare(self, model) -> None:
        self._reader._process_model_before_weight_loading(model)

    def state_dict(self, path: str, model) -> dict:
        return self._reader.get_state_dict(path, model)

    def conversions(self, model) -> list:
        """The file's conversions, each with our quantization as its last step."""
        conversions = self._reader.update_weight_conversions([], model)
        for conversion in conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [*conversion.operations, QuantizeTargets()]
        return conversions


def allow_gguf(config_class: type) -> None:
    """Let `from_pretrained(gguf_file=…, quantization_config=GGConfig())` reach our quantizer.

    Transformers refuses any quantization config but its own beside a GGUF file, at one place and without a hook. There,
    and for our config alone, the file is not mentioned; everything after it asks the quantizer.
    """
    original = auto.get_hf_quantizer

    @functools.wraps(original)
    def get_hf_quantizer(config, quantization_config, *args, **kwargs):
        if isinstance(quantization_config, config_class):
            kwargs.pop("gguf_file", None)
        return original(config, quantization_config, *args, **kwargs)

    auto.get_hf_quantizer = get_hf_quantizer
    modeling = sys.modules.get("transformers.modeling_utils")
    if getattr(modeling, "get_hf_quantizer", None) is original:
        modeling.get_hf_quantizer = get_hf_quantizer

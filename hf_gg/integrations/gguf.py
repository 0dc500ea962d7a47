"""GGUF files as a source: each tensor is unpacked by Transformers' own reader, then quantized, one at a time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto

from .checkpoint import Quantize


class QuantizeTargets(Quantize):
    """`Quantize` at the end of a converter's operations, where results still go by the target patterns."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, **kwargs):
        full_layer_name = kwargs["full_layer_name"]
        names = {key: key for key in input_dict}
        for key in input_dict:
            if key in full_layer_name:
                prefix, _, suffix = full_layer_name.partition(key)
                names = {k: prefix + k + suffix for k in input_dict}
                break
        return super().convert({names[k]: v for k, v in input_dict.items()}, model=model)


class LazyTensor:
    """A tensor of a GGUF file that is unpacked when it is indexed, as a safetensors slice is read then."""

    def __init__(self, unpack: Callable[[], torch.Tensor], shape: list[int]):
        self._unpack, self._shape = unpack, shape

    def __getitem__(self, index) -> torch.Tensor:
        return self._unpack()[index]

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"


class GgufSource:
    """What Transformers does to read a GGUF file in full precision, tensor by tensor.

    Transformers has two readers: one that keeps tensors in their blocks until its conversions run, for some
    architectures, and an older one for the rest, of which the unpacking is put off here until a tensor is asked for.
    (Architectures whose tensors the older reader merges come from it as a whole, in full precision.)

    Args:
        path: the `.gguf` file.

    Attributes:
        in_blocks: the file's tensors reach the conversions as blocks, and must not be cast before.

    Raises:
        ImportError: this Transformers reads GGUF files in another way.
    """

    def __init__(self, path: str):
        try:
            from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
            from transformers.utils.quantization_config import GgufConfig
        except ImportError as error:
            raise ImportError(
                "Quantizing a GGUF file while loading it needs a newer Transformers (5.23 works): upgrade it, or load "
                "the file, save it, and quantize the saved model."
            ) from error
        self._reader = GgufHfQuantizer(GgufConfig(gguf_file=path, dequantize=True))
        self._reader.read_header(path)
        self.in_blocks: bool = self._reader.supported

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return self._reader.update_dtype(dtype)

    def prepare(self, model) -> None:
        self._reader._process_model_before_weight_loading(model)

    def state_dict(self, path: str, model) -> dict:
        """The file's tensors by name, unpacked one at a time."""
        lazy = None if self.in_blocks else _lazy_state_dict(path, model)
        return self._reader.get_state_dict(path, model) if lazy is None else lazy

    def conversions(self, conversions: list, model) -> list:
        """The file's conversions, each with our quantization as its last step."""
        conversions = self._reader.update_weight_conversions(conversions, model)
        for conversion in conversions if self.in_blocks else ():
            if isinstance(conversion, WeightConverter):
                conversion.operations = [*conversion.operations, QuantizeTargets()]
        return conversions


def _lazy_state_dict(path: str, model) -> dict[str, LazyTensor] | None:
    """Tensors for the older reader's architectures; None for those whose tensors it merges."""
    from transformers import modeling_gguf_pytorch_utils as older

    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError("Loading a GGUF file needs the gguf package: `pip install gguf`.") from error
    parsed = older.load_gguf_checkpoint(path, return_tensors=False)
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    kind = older.TENSOR_PROCESSORS.get(architecture, older.TensorProcessor)
    if kind not in (older.TensorProcessor, older.LlamaTensorProcessor):
        return None
    processor = kind(config=parsed.get("config", {}))
    names = older.get_gguf_hf_weights_map(model, processor)

    def unpack(tensor, name: str) -> torch.Tensor:
        weights = dequantize(tensor.data, tensor.tensor_type)
        result = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        return torch.from_numpy(np.array(result.weights))

    return {
        names[tensor.name]: LazyTensor(
            functools.partial(unpack, tensor, tensor.name), [int(n) for n in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
        if tensor.name in names
    }


def allow_gguf(config_class: type) -> None:
    """Let `from_pretrained(gguf_file=…, quantization_config=GGConfig())` reach our quantizer.

    Transformers refuses any quantization config but its own beside a GGUF file, at one place and without a hook.
    There, and for our config alone, the file is not mentioned; everything after it asks the quantizer.
    """
    original = auto.get_hf_quantizer

    @functools.wraps(original)
    def get_hf_quantizer(config, quantization_config, *args, **kwargs):
        if isinstance(quantization_config, config_class):
            kwargs.pop("gguf_file", None)
        return original(config, quantization_config, *args, **kwargs)

    auto.get_hf_quantizer = get_hf_quantizer
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and getattr(modeling, "get_hf_quantizer", None) is original:
        setattr(modeling, "get_hf_quantizer", get_hf_quantizer)  # noqa: B010  (no attribute that a checker knows)

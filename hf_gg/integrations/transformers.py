"""The quantizer of Transformers' quantization method `gg`. Importing this module registers it with its config.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=GGConfig())

The quantizer follows Transformers' own: modules are exchanged while the model is on the meta device; every weight
becomes codes and a scale as soon as it is read; what is saved is what is in memory, so a checkpoint loads without a
conversion.
"""

from __future__ import annotations

import copy
import os
import re
import types
from typing import Any

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..nn import RF8Experts
from ..nn.base import OUTLIERS, QuantizedWeight
from . import allocation, checkpoint, coded, gguf, model_dtype, outliers, saving, selection
from .calibrating import Calibrated, calibrate_by_config
from .config import FORMAT_VERSION, METHOD, GGConfig
from .dequantizing import check_can_dequantize, dequantize
from .finishing import finish_loading, guard_initialization, note_absent
from .initialization import drawing
from .report import quantization_report


logger = logging.get_logger(__name__)


class GGHfQuantizer(HfQuantizer):
    """Loads models in RF8, from full precision or from codes.

    Attributes:
        skipped: modules with matrices that were left in full precision, with the reason.
    """

    requires_calibration = False
    quantization_config: GGConfig
    serialized_names = {"weight": ["weight", "weight_scale"]}  # noqa: RUF012  (as in Transformers)

    def __init__(self, quantization_config: GGConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        coded.decode_while_loading(lambda quantizer: isinstance(quantizer, GGHfQuantizer) and quantizer._from_codes)
        wanted = quantization_config.__dict__.pop("_format_wanted", None)
        targets = quantization_config.__dict__.pop("_targets_wanted", {})
        if quantization_config.weight_format == coded.FLOATS:
            coded.check_floats(self.pre_quantized, wanted)
            quantization_config.dequantize = True  # nothing of us remains in the model
        if self.pre_quantized and wanted not in (None, quantization_config.weight_format):
            raise ValueError(
                f"The checkpoint holds {quantization_config.weight_format} codes, and {wanted} was asked for: "
                "quantizing twice loses twice. Quantize the full-precision model, or leave weight_format out."
            )
        for key, value in targets.items():
            if self.pre_quantized and getattr(quantization_config, key) != value:
                raise ValueError(
                    f"The checkpoint holds codes whose {key} was {getattr(quantization_config, key)}, and {value} was "
                    f"asked for: quantizing twice loses twice. Quantize the full-precision model, or leave {key} out."
                )
        self.skipped: dict[str, str] = {}
        self._from_codes = self.pre_quantized
        self._dropped_conversions: list = []
        self._outliers: dict | None = {}
        self._gguf: gguf.GgufSource | None = None
        self._gguf_file: str | None = None
        # modules that calibration left to plain rounding, with the reason
        self.uncalibrated: dict[str, str] = {}

    @property
    def _holds_floats(self) -> bool:
        return self.quantization_config.weight_format == coded.FLOATS

    @property
    def _calibrates(self) -> bool:
        """Whether the model is quantized once all of it is in memory."""
        return not self._from_codes and self.quantization_config.calibration is not None

    # --- before loading ---

    def validate_environment(self, *args, device_map=None, **kwargs):
        if not self._from_codes and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "Weights cannot be quantized on their way to disk offload: quantize and save the model first, then "
                "load the RF8 checkpoint with this device_map."
            )

    def update_dtype(self, dtype):
        return self._gguf.update_dtype(dtype) if self._gguf else dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if getattr(getattr(model.config, "distributed_config", None), "pp_size", 1) > 1:
            raise ValueError(
                "pp_size > 1 does not work on quantized models: Transformers' pipeline hands activations on in the "
                "dtype of a stage's first parameter, which is codes. Use tp_size, ep_size or fsdp_size."
            )
        if self._gguf:
            self._gguf.prepare(model)
        else:
            codes = self.quantization_config.weight_format if self._from_codes else None
            self._outliers = checkpoint.check_shards(checkpoint_files, weight_format=codes)
        if self._holds_floats:
            return
        if not all(str(file).endswith(".safetensors") for file in checkpoint_files or ["state_dict"]):
            self._outliers = None  # nobody has looked
        if (
            self.quantization_config.weight_format == "grid"
            and not self._from_codes
            and outliers.is_distributed(model)
        ):
            raise ValueError(
                "weight_format='grid' does not quantize a model that is split over processes, none of which sees a "
                "whole weight: quantize and save it in one process, and load that checkpoint."
            )
        if self._from_codes and self.quantization_config.dequantize:
            check_can_dequantize(model)
        if self._calibrates:
            note_absent(model, self.skipped, self.quantization_config.init)
            return
        chosen = selection.select(model, self.quantization_config, from_checkpoint=self._from_codes)
        if not chosen and not self._from_codes:
            logger.warning(f"No module of {type(model).__name__} was quantized: {_summary(chosen.skipped)}.")
        self.skipped = chosen.skipped
        selection.convert_on_meta(model, chosen, self.quantization_config)
        guard_initialization(model, self.skipped, self.quantization_config.init)

    def update_weight_conversions(self, weight_conversions, model):
        if self._gguf:
            return self._gguf.conversions(weight_conversions, model)
        if not self._from_codes or self._holds_floats:
            return weight_conversions
        outliers.make_room(model, weight_conversions, self._outliers)
        if self.quantization_config.format_version == 1:
            return super().update_weight_conversions(weight_conversions, model) + checkpoint.unpack_conversions(model)
        kept, self._dropped_conversions = checkpoint.split_conversions(model, weight_conversions)
        return kept + checkpoint.unpack_conversions(model)

    def update_parallel_plan(self, model, plan):
        super().update_parallel_plan(model, plan)
        update_parallel_plan(model, plan)

    # --- loading ---

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self._from_codes:
            # a list of outliers is as long as it is
            return self._outliers is None and param_name.endswith(OUTLIERS)
        found = checkpoint.find_codes(model, param_name)
        return found is not None and not checkpoint.is_mismatched(*found)

    def get_quantize_ops(self):
        return checkpoint.Quantize()

    # Transformers reads a GGUF file through these two
    def read_header(self, gguf_file: str):
        self._gguf = gguf.GgufSource(gguf_file)
        self._gguf_file = os.path.basename(gguf_file)
        # blocks must reach the file's converters uncast, which the loader grants to what was quantized before
        self.pre_quantized = self._gguf.in_blocks

    def get_state_dict(self, checkpoint_file: str, model):
        return self._gguf.state_dict(checkpoint_file, model)  # type: ignore[union-attr]  # read_header came first

    def get_new_dtype(self, converter, param, dtype):
        return None if self._gguf and self._gguf.in_blocks else super().get_new_dtype(converter, param, dtype)

    # --- after loading ---

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self._holds_floats:
            checkpoint.raise_loading_errors(model)
            return model
        with drawing(self.quantization_config.init):
            self.skipped.update(finish_loading(model))
        if self._calibrates:
            if self._gguf:
                model._weight_conversions = None  # not those of the checkpoint to save
            return _quantize_in_memory(model, self.quantization_config, None, self)
        # a GGUF file's own conversions are not those of the checkpoint to save
        conversions = None if self._gguf and self._gguf.in_blocks else getattr(model, "_weight_conversions", None)
        _prepare_for_saving(model, self.quantization_config, self, conversions)
        if self._from_codes and self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model):
        return None, {
            "quant_method": METHOD,
            "format_version": str(FORMAT_VERSION),
            "weight_format": self.quantization_config.weight_format,
            "coding": self.quantization_config.coding,
        }

    def _dequantize(self, model, dtype=None):
        return dequantize(model, dtype, self._dropped_conversions)


def quantize_(model: nn.Module, config: GGConfig | None = None, tokenizer: Any = None) -> nn.Module:
    """Quantize a Transformers model that is in memory, in place; as if it had been loaded with `config`.

    Args:
        model: the model.
        config: how.
        tokenizer: of the model, for calibration; that of the place where the model was loaded from if None.

    Raises:
        ValueError: the model is quantized already, on the meta device, holds NaN or infinity, or cannot meet the
            target (the weight is named), or cannot be calibrated; the model is then unchanged.
        TypeError: not a Transformers model, or not a `GGConfig`.
    """
    config = GGConfig() if config is None else config
    if not isinstance(config, GGConfig):
        raise TypeError(f"config must be a GGConfig, got {type(config).__name__}.")
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(
            f"quantize_ takes a Transformers model, got {type(model).__name__}. Single layers: RF8Linear.from_linear."
        )
    if getattr(model, "is_quantized", False) or any(True for _ in selection.quantized_modules(model)):
        method = getattr(model, "quantization_method", METHOD)
        raise ValueError(
            f"The model is quantized already (method {getattr(method, 'value', method)!r}): quantizing twice loses "
            "twice. Call `model.dequantize()` first, or start from the full-precision model."
        )
    if config.weight_format == coded.FLOATS:
        coded.check_floats(False, None)
    return _quantize_in_memory(model, config, tokenizer, None)


def _quantize_in_memory(model, config: GGConfig, tokenizer: Any, quantizer: GGHfQuantizer | None) -> nn.Module:
    """`quantize_` of a model that is not quantized; by the quantizer that loaded it, if one did."""
    chosen = selection.select(model, config, from_checkpoint=False)
    if quantizer is not None:
        selection.leave_out(chosen, quantizer.skipped)
    for name in (*chosen.linears, *chosen.embeddings, *chosen.experts):
        module = model.get_submodule(name)
        for weight in RF8Experts.weight_names(module) or ("weight",):
            _check_quantizable(f"{name}.{weight}", module._parameters[weight])
    with torch.no_grad():
        scales: dict[str, Any] = {}
        found = Calibrated()
        if config.calibration is not None:
            config = copy.copy(config)  # the caller's may be used for another model
            gguf_file = None if quantizer is None else quantizer._gguf_file
            found, config.calibration = calibrate_by_config(model, chosen, config, tokenizer, gguf_file)
        elif config.weight_format == "grid":
            scales = allocation.steps_of_model(model, chosen, config)
        selection.convert(model, chosen, config, scales, found.coded)
    selection.mark_quantized(model)
    if chosen.embeddings:
        # by the mapping that `mark_quantized` has extended by the scales
        model.tie_weights(recompute_mapping=False)
    outliers.tie(model)

    if quantizer is None:
        quantizer = GGHfQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config
    quantizer.skipped, quantizer.uncalibrated = chosen.skipped, found.plain
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    _prepare_for_saving(model, config, quantizer, conversions)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "_init_weights"):
            module.config._is_quantized = True
    return model


def update_parallel_plan(model, plan: dict[str, str]) -> None:
    """Scales of weights that are split over their inputs belong whole to every process; mends a plan in place."""
    for name, module, _ in selection.code_parameters(model):
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = plan.get(generic) or plan.get(generic.rpartition(".")[0], "")
        # "rowwise" splits the last dimension and "colwise" the one before it, those of embeddings the other way round
        inputs_last = not getattr(module, "is_transposed", False)
        if ("rowwise" if inputs_last != style.startswith("embedding") else "colwise") in style:
            plan[f"{generic}_scale"] = "replicate"


def _prepare_for_saving(
    model: nn.Module, config: GGConfig, quantizer: GGHfQuantizer, conversions: list | None
) -> None:
    kept, dropped = checkpoint.split_conversions(model, conversions or [])
    model._weight_conversions = kept + checkpoint.unpack_conversions(model)
    quantizer._dropped_conversions = dropped or quantizer._dropped_conversions
    converted = [name for name, _ in selection.quantized_modules(model)]
    mentioned = ("linears", "experts", "embeddings")  # the others are never converted, as most embeddings
    skipped = [
        name
        for name, reason in quantizer.skipped.items()
        if reason != "embedding" and selection.kind_of(model.get_submodule(name)) in mentioned
    ]
    config.modules_to_not_convert = selection.with_skipped(config.modules_to_not_convert or [], skipped, converted)
    config.format_version = FORMAT_VERSION
    model_dtype.install()
    saving.install(model)
    checkpoint.mark_all_saved_codes()
    if any(isinstance(module, QuantizedWeight) for module in selection.embedding_modules(model)):
        model.resize_token_embeddings = types.MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
    """`PreTrainedModel.resize_token_embeddings` of a model whose embeddings are codes: it may only stay as it is.

    Raises:
        ValueError: another size than the present one.
    """
    current = self.get_input_embeddings().weight.shape[0]
    if new_num_tokens not in (None, current) or any(args) or kwargs.get("pad_to_multiple_of"):
        raise ValueError(
            f"The embeddings are quantized and keep their {current} tokens: resize the full-precision model, or load "
            "it without quantize_embeddings and quantize_lm_head."
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


def _check_quantizable(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the weights first.")
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise ValueError(f"{name} is {weight.dtype}: only weights of 16 bits or more can be quantized.")
    if weight.numel() and not bool(torch.isfinite(torch.stack([weight.amax(), weight.amin()])).all()):
        raise ValueError(
            f"{name} holds NaN or infinity, which no code can represent: repair the model, or list the module in "
            "modules_to_not_convert."
        )


def _summary(skipped: dict[str, str]) -> str:
    if not skipped:
        return "it has no linear layer"
    name, reason = next((item for item in skipped.items() if item[1] != "embedding"), next(iter(skipped.items())))
    return f"{name}: {reason}" + (f", and {len(skipped) - 1} more" if len(skipped) > 1 else "")


def register() -> None:
    """Make `gg` a quantization method of Transformers; a second call does nothing.

    Raises:
        ImportError: a Transformers whose loader casts weights to the type of the codes before they are quantized.
    """
    if tuple(map(int, transformers_version.split(".")[:2])) < (5, 23):
        raise ImportError(
            f"hf_gg needs transformers 5.23 or newer, found {transformers_version}: `pip install -U transformers`."
        )
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(GGConfig)
        auto.register_quantizer(METHOD)(GGHfQuantizer)
        # the tuple of configs that may change how a quantized checkpoint is loaded
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (  # type: ignore[assignment]
            *auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
            GGConfig,
        )
        gguf.allow_gguf(GGConfig)


register()

__all__ = ["GGConfig", "GGHfQuantizer", "quantization_report", "quantize_"]

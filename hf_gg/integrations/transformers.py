"""`GGConfig`, the quantization method `gg` of Transformers, and its quantizer. Importing this module registers both.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=GGConfig())

The quantizer follows Transformers' own: modules are exchanged while the model is on the meta device; every weight
becomes codes and a scale as soon as it is read; what is saved is what is in memory, so a checkpoint loads without a
conversion.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
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
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import ops
from ..formats import StepRule, get_format
from ..nn import RF8Embedding, RF8Experts, RF8Linear
from ..nn.base import OUTLIERS, QuantizedWeight
from ..training.initialization import GGInit
from . import allocation, checkpoint, coded, fsdp, gguf, outliers, saving, selection
from .initialization import drawing
from .report import quantization_report


logger = logging.get_logger(__name__)

METHOD = "gg"
# 1: codes [out, in]; 2: codes [out, in, 1], refused by a Transformers without this package
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
_TARGETS = ("target_bits", "target_snr", "target_error", "step")


class GGConfig(QuantizationConfigMixin):
    """How a model is quantized.

    Args:
        weight_format: `"rf8"` (default), `"rf8x"`, `"rf8-e5"` or `"grid"`. (`"none"` is that of a checkpoint
            of `hf-gg compress --lossless-grid`: coded in its files, a plain model once it is loaded.)
        scale: `"row"` (default), `"absmax"`, `"pow2"`, `"tensor"`, `"tensor-pow2"` or `"unit"`; of a grid, `"row"`
            (steps in proportion to the rows' root mean squares) or `"tensor"` (one step a tensor).
        rounding: `"nearest"` (default) or `"reference"` (the authors', not of a grid).
        target_bits: of a grid: wanted bits a weight after entropy coding, steps and outliers counted, at most 8.
        target_snr: of a grid: wanted signal-to-noise ratio, dB.
        target_error: of a grid: wanted share of the squared error in the squared weights, weighed by what it costs
            (see `sensitivity`).
        step: of a grid: the step itself, the same for every weight. Without any of these four a step is an eighth of
            the root mean square, about 5 bits and 29 dB.
        sensitivity: of a grid with `target_bits` or `target_error`: `"self"` (default: texts that the model writes
            itself tell where errors cost most, which takes some passes; where the model cannot run, as while it is
            loaded, the weights decide) or `"weights"`.
        modules_to_not_convert: names, beginnings or ends of names, or regular expressions of modules to leave as they
            are, added to the defaults: output embeddings, embeddings, what is tied to them, and what the model's own
            code needs in full precision.
        quantize_embeddings: quantize the input embeddings as well.
        quantize_lm_head: quantize the output embeddings as well; where they are tied, both must be asked for.
        experts: quantize fused experts of mixture-of-experts models.
        backend: `"auto"`, `"torch"`, `"cpu"` or `"triton"`. Not a property of the checkpoint: may be given at any
            load.
        dequantize: when loading a quantized checkpoint, give the plain model in full precision.
        init: a `GGInit`, or its keys as a dict: how weights are drawn that the checkpoint has not (a new
            classification head). Kept in `config.json`; may be given at any load. Without it the model's own
            initializer draws.
        coding: how codes are saved: `"none"` (default), one byte each, or entropy-coded by `"rans"` or `"eg0"`
            (exp-Golomb codes), and decoded while loading. A checkpoint keeps its coding when it is loaded and saved
            again, unless a config given at load, or `model.config.quantization_config.coding`, says otherwise.
        format_version: of the checkpoint; set by the library.

    Raises:
        ValueError: an unknown value or an unknown key.
    """

    def __init__(
        self,
        weight_format: str | None = None,
        scale: str = "row",
        rounding: str = "nearest",
        modules_to_not_convert: list[str] | None = None,
        quantize_embeddings: bool = False,
        quantize_lm_head: bool = False,
        experts: bool = True,
        backend: str = "auto",
        dequantize: bool = False,
        init: GGInit | dict[str, Any] | None = None,
        coding: str | None = None,
        target_bits: float | None = None,
        target_snr: float | None = None,
        step: float | None = None,
        target_error: float | None = None,
        sensitivity: str = "self",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        method = kwargs.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"GGConfig is the config of quant_method {METHOD!r}, got {method!r}.")
        if kwargs:
            known = [name for name in inspect.signature(GGConfig).parameters if name != "kwargs"]
            unknown = ", ".join(map(repr, sorted(kwargs)))
            raise ValueError(f"Unknown GGConfig key {unknown}: the keys are {', '.join(known)}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # the field's enum is closed, its use is a string's
        # asked for, or only the default: decides whether a checkpoint of another format is a contradiction
        self._format_given = weight_format is not None
        self.weight_format = coded.FLOATS if weight_format == coded.FLOATS else get_format(weight_format or "rf8").name
        targets = {"target_bits": target_bits, "target_snr": target_snr, "target_error": target_error, "step": step}
        _check_targets(targets, self.weight_format)
        self.target_bits, self.target_snr, self.target_error, self.step = target_bits, target_snr, target_error, step
        allocation.check_sensitivity(sensitivity)
        self.sensitivity = sensitivity
        if self.weight_format != coded.FLOATS:
            get_format(self.weight_format).check_options(scale, rounding)
        ops.check_backend(backend)
        self.scale, self.rounding, self.backend = scale, rounding, backend
        self._coding_given = coding is not None
        self.coding = coded.check_coding("none" if coding is None else coding)
        if modules_to_not_convert is not None:
            selection.check_patterns(modules_to_not_convert)
            modules_to_not_convert = list(modules_to_not_convert)
        self.modules_to_not_convert = modules_to_not_convert
        flags = {
            "quantize_embeddings": quantize_embeddings,
            "quantize_lm_head": quantize_lm_head,
            "experts": experts,
            "dequantize": dequantize,
        }
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be True or False, got {value!r}.")
        self.quantize_embeddings, self.quantize_lm_head = quantize_embeddings, quantize_lm_head
        self.experts, self.dequantize = experts, dequantize
        if isinstance(init, dict):
            init = GGInit.from_dict(init)
        if init is not None and not isinstance(init, GGInit):
            raise ValueError(f"init must be a GGInit or a dict of its keys, got {init!r}.")
        self.init = init
        if isinstance(format_version, bool) or format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"format_version {format_version!r} is not one that this hf_gg reads "
                f"({', '.join(map(str, READABLE_VERSIONS))}): the checkpoint was written by a later release; upgrade "
                "with `pip install -U hf-gg`."
            )
        self.format_version = format_version

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given at load may change about a quantized checkpoint."""
        attributes: dict[str, Any] = {"backend": self.backend, "dequantize": self.dequantize}
        if self._format_given:
            attributes["_format_wanted"] = self.weight_format
        if self.init is not None:
            attributes["init"] = self.init
        if self._coding_given:
            attributes["coding"] = self.coding
        targets = {key: getattr(self, key) for key in _TARGETS if getattr(self, key) is not None}
        if targets:
            attributes["_targets_wanted"] = targets
        return attributes

    def to_dict(self) -> dict[str, Any]:
        """What is written into `config.json`: the properties of the checkpoint."""
        values = {key: value for key, value in super().to_dict().items() if not key.startswith("_")}
        # what is not used stays away, so that earlier releases read the checkpoint
        unused = dict.fromkeys((*_TARGETS, "init")) | {"coding": "none"}
        if self.weight_format != "grid":
            del values["sensitivity"]
        if self.init is not None:
            values["init"] = dataclasses.asdict(self.init)
        return {key: value for key, value in values.items() if key not in unused or value != unused[key]}

    def scale_rule(self) -> str | StepRule:
        """The scale mode, or for a grid the rule of its steps."""
        if self.weight_format != "grid":
            return self.scale
        # alone, a weight's share of error is its signal to noise
        snr = self.target_snr if self.target_error is None else -10 * math.log10(self.target_error)
        return StepRule(self.scale, bits=self.target_bits, snr=snr, step=self.step)

    def module_options(self) -> dict[str, Any]:
        """Keyword arguments of the quantized modules."""
        return {
            "format": self.weight_format,
            "backend": self.backend,
            "scale": self.scale_rule(),
            "rounding": self.rounding,
        }


def _check_targets(targets: dict[str, float | None], weight_format: str) -> None:
    """Raise a `ValueError` for targets that make no sense, or that the format does not have."""
    given = {name: value for name, value in targets.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if name == "target_bits" and value > 8:
            raise ValueError(f"target_bits must be at most 8, which codes have in memory, got {value!r}.")
        if name == "target_error" and value >= 1:
            raise ValueError(f"target_error must be less than 1, the error of no weights at all, got {value!r}.")
    if given and weight_format != "grid":
        raise ValueError(
            f"{next(iter(given))} is of the grid, and weight_format is {weight_format!r}: use weight_format='grid'."
        )
    if len(given) > 1:
        raise ValueError(f"The steps of a grid follow from one target, got {' and '.join(given)}: leave one out.")


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

    @property
    def _holds_floats(self) -> bool:
        return self.quantization_config.weight_format == coded.FLOATS

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
            _check_can_dequantize(model)
        chosen = selection.select(model, self.quantization_config, from_checkpoint=self._from_codes)
        if not chosen and not self._from_codes:
            logger.warning(f"No module of {type(model).__name__} was quantized: {_summary(chosen.skipped)}.")
        self.skipped = chosen.skipped
        selection.convert_on_meta(model, chosen, self.quantization_config)
        _guard_initialization(model, self.skipped, self.quantization_config.init)

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
        offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if offloaded is not None:
            raise ValueError(f"{offloaded} is offloaded: load the model without offload to dequantize it.")
        if isinstance(dtype, str):  # what the config says after a save
            dtype = getattr(torch, dtype)
        _check_can_dequantize(model)
        names = []
        for name, module in list(selection.quantized_modules(model)):
            names.append(name)
            if isinstance(module, RF8Experts):
                module.restore_(dtype)
            else:
                selection.replace_module(model, name, _float_module(module, dtype))
        _distribute_again(model, names)
        kept = [c for c in getattr(model, "_weight_conversions", None) or [] if not checkpoint.is_unpack(c)]
        model._weight_conversions = self._dropped_conversions + kept
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for suffix in ("_scale", *OUTLIERS):
            for key in [key for key in tied if key.endswith(suffix) and key.removesuffix(suffix) in tied]:
                del tied[key]
        model.tie_weights()
        saving.remove(model)
        model.__dict__.pop("resize_token_embeddings", None)
        return model


def quantize_(model: nn.Module, config: GGConfig | None = None) -> nn.Module:
    """Quantize a Transformers model that is in memory, in place; as if it had been loaded with `config`.

    Raises:
        ValueError: the model is quantized already, on the meta device, holds NaN or infinity, or cannot meet the
            target (the weight is named); the model is then unchanged.
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
    chosen = selection.select(model, config, from_checkpoint=False)
    for name in (*chosen.linears, *chosen.embeddings, *chosen.experts):
        module = model.get_submodule(name)
        for weight in RF8Experts.weight_names(module) or ("weight",):
            _check_quantizable(f"{name}.{weight}", module._parameters[weight])
    options = config.module_options()
    with torch.no_grad():
        scales = allocation.steps_of_model(model, chosen, config) if config.weight_format == "grid" else {}
        for name in chosen.linears:
            own = {**options, "scale": scales.get(name, config.scale)}
            selection.replace_module(model, name, RF8Linear.from_linear(model.get_submodule(name), name=name, **own))
        for name in chosen.embeddings:
            own = {**options, "scale": scales.get(name, config.scale)}
            selection.replace_module(model, name, RF8Embedding.from_embedding(model.get_submodule(name), **own))
        for name in chosen.experts:
            RF8Experts.convert_(model.get_submodule(name), **{**options, "scale": scales.get(name, config.scale)})
        for _, module in selection.quantized_modules(model):
            module.scale_mode = options["scale"]
    selection.mark_quantized(model)
    if chosen.embeddings:
        # by the mapping that `mark_quantized` has extended by the scales
        model.tie_weights(recompute_mapping=False)
    outliers.tie(model)

    quantizer = GGHfQuantizer(config, pre_quantized=False)
    quantizer.skipped = chosen.skipped
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


@torch.no_grad()
def replace_absent(model: nn.Module) -> dict[str, str]:
    """Put plain modules, newly initialized, where the checkpoint had neither codes nor scales.

    Returns:
        Their names, with the reason.

    Raises:
        ValueError: only one of the two is missing, or experts are; the tensor is named.
    """
    fresh: dict[str, str] = {}
    for name, module, weight in list(selection.code_parameters(model)):
        codes, scale = module._parameters[weight], module._parameters[f"{weight}_scale"]
        if codes.is_meta or scale.is_meta:
            continue  # offloaded to disk
        loaded = [getattr(p, "_is_hf_initialized", False) for p in (codes, scale)]
        if not any(loaded):
            if isinstance(module, RF8Experts):
                raise ValueError(f"{name} is missing from the checkpoint, and experts cannot be made up.")
            owner = name.rpartition(".")[0]
            if hasattr(codes, "placements"):
                raise ValueError(
                    f"{name} is missing from the checkpoint, and codes that are split over processes cannot be made "
                    f"up: list {owner} in modules_to_not_convert."
                )
            _initialize_fresh(model, owner, module)
            fresh[owner] = "missing from the checkpoint: newly initialized in full precision"
            continue
        if not all(loaded):
            missing = name if loaded[1] else f"{name}_scale"
            raise ValueError(
                f"{missing} is missing from the checkpoint: codes and scales belong together. Download or save it "
                "again."
            )
    return fresh


def _guard_initialization(model: nn.Module, skipped: dict[str, str], init: GGInit | None) -> None:
    """Keep the model's initializers, which run before loading ends, away from codes; have them draw as `init` says.

    Some initialize the weights of their children by name, codes or not.
    """

    def initialize_weights(self):
        del self.initialize_weights
        with drawing(init):
            fresh = replace_absent(self)
            skipped.update(fresh)
            # the report lists what the checkpoint lacks of the model as it is now
            ignored = getattr(self, "_keys_to_ignore_on_load_missing", None) or ()
            gone = {rf"^{re.escape(owner)}\.\w+_scale$" for owner in fresh}
            self._keys_to_ignore_on_load_missing = {*ignored, *gone}
            for _, module, weight in selection.code_parameters(self):
                module._parameters[weight]._is_hf_initialized = True  # also what is offloaded to disk
            self.initialize_weights()

    model.initialize_weights = types.MethodType(initialize_weights, model)


@torch.no_grad()
def finish_loading(model: nn.Module) -> dict[str, str]:
    """Check what was loaded, freeze scales, and put plain modules where the checkpoint had no weight.

    Returns:
        The modules that were newly initialized in full precision, with the reason.

    Raises:
        ValueError: what the conversions found; codes without scales or the reverse, scales that are not positive
            numbers. The tensor is named.
    """
    model.__dict__.pop("initialize_weights", None)
    checkpoint.raise_loading_errors(model)
    fresh = replace_absent(model)
    damaged = outliers.finish(model)
    for name, module, weight in selection.code_parameters(model):
        scale = module._parameters[f"{weight}_scale"]
        scale.requires_grad_(False)
        if scale.is_meta:
            continue  # offloaded to disk
        local = scale.to_local() if hasattr(scale, "to_local") else scale
        if local.numel() and not bool(((local > 0) & torch.isfinite(local)).all()):
            damaged.append(f"{name}_scale holds a scale that is no positive number: the checkpoint is damaged.")
    checkpoint.raise_errors(model, damaged)
    outliers.tie(model)
    return fresh


def _initialize_fresh(model: nn.Module, name: str, module: QuantizedWeight) -> None:
    """Exchange a module without weights for a plain one, drawn by the model's own initializer."""
    dtype = getattr(model.config, "dtype", None)
    if isinstance(module, RF8Embedding):
        new: nn.Module = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
    elif module.fan_in_fan_out:
        new = _conv1d(module)
    else:
        new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    new = new.to(device=module.weight.device, dtype=dtype if isinstance(dtype, torch.dtype) else None)
    owner, best = model, -1
    for path, candidate in model.named_modules():
        if hasattr(candidate, "_init_weights") and (not path or name.startswith(f"{path}.")) and len(path) > best:
            owner, best = candidate, len(path)
    owner._init_weights(new)
    bias = getattr(module, "bias", None)
    if bias is not None and getattr(bias, "_is_hf_initialized", False):
        new.bias = bias
    selection.replace_module(model, name, new)


def _check_can_dequantize(model: nn.Module) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if getattr(distributed, "dp_size", 1) > 1 or any(map(fsdp.is_fully_sharded, model.modules())):
        raise ValueError(
            "A model that is sharded by FSDP cannot be dequantized: FSDP keeps the parameters that it was given. "
            "Dequantize and save the model in one process, and load that checkpoint."
        )


def _distribute_again(model: nn.Module, names: list[str]) -> None:
    """Give modules that were exchanged the forward passes of tensor and expert parallelism, if the model has them."""
    config = getattr(model.config, "distributed_config", None)
    if config is None or getattr(model, "_mesh_manager", None) is None:
        return
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    expert_plan = model._expand_parallel_plan(model.ep_plan) if config.ep_size > 1 else {}
    tensor_plan = model._expand_parallel_plan(model.tp_plan) if config.tp_size > 1 else {}
    expert_plan = {name: style for name, style in expert_plan.items() if name in names}
    tensor_plan = {name: style for name, style in tensor_plan.items() if name in names and name not in expert_plan}
    for name in expert_plan.keys() | tensor_plan.keys():
        model.get_submodule(name).__dict__.pop("forward", None)  # it ran the quantized module
    tensor_mesh, expert_mesh = model._mesh_manager.get_mesh("tp"), model._mesh_manager.get_mesh("ep")
    apply_tensor_parallelism(model, tensor_mesh, tensor_plan)
    apply_expert_parallelism(model, expert_mesh, tensor_mesh, expert_plan, config.ep_implementation)


def _conv1d(module: RF8Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(module.out_features, module.in_features)


def _float_module(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The plain module that a quantized one stands for, with decoded weights."""
    if isinstance(module, RF8Embedding):
        return module.to_embedding(dtype)
    linear = module.to_linear(dtype)
    if not module.fan_in_fan_out:
        return linear
    conv = _conv1d(module)
    conv.weight, conv.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return conv.train(module.training)


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

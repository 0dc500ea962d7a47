"""Codes on their way between files and modules, as Transformers' conversion operations.

In a file, codes are uint8 under the parameter's own name with one more, trailing dimension of size 1: `[out, in, 1]`.
Where this package is not installed, Transformers then finds a tensor of another shape than the model's and refuses the
checkpoint, instead of taking codes for weights. A trailing dimension leaves all others where they are, so that shards
of tensor and expert parallelism are cut from the file as ever, for any width. (Version 1 had plain `[out, in]`.)
Entropy-coded codes have one dimension and are decoded before they arrive here (`coded.py`).
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter

from .. import ops
from ..formats import get_format
from ..nn import RF8Experts
from ..nn.base import OUTLIERS, outliers_of, set_outliers
from ..nn.experts import quantize_experts
from . import coded
from .header import read_header
from .selection import code_parameters, quantized_modules, weight_names


def find_codes(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """(module, name in the module) if the parameter `name` holds codes in the model, else None."""
    path, _, weight = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    found = f"{weight}_scale" in module._parameters and weight in weight_names(module)
    return (module, weight) if found else None


class Quantize(ConversionOps):
    """Loading a model in full precision: each weight becomes codes and a scale as soon as it is read."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns=None, target_patterns=None, model=None, **kwargs):
        result = {}
        for name, value in input_dict.items():
            found, value = find_codes(model, name), _only(value)
            if found is None:
                result[name] = value
                continue
            module, weight = found
            fmt, parameter = get_format(module.format), module._parameters[weight]
            experts = isinstance(module, RF8Experts)
            transposed = module.is_transposed if experts else getattr(module, "fan_in_fan_out", False)
            if transposed and not experts and value.ndim == 2:
                value = value.T
            if value.shape != parameter.shape and not hasattr(parameter, "placements"):
                # Transformers' own report and error, or a new weight with `ignore_mismatched_sizes`
                _notes(module, "mismatched").append(weight)
                result[name] = value
                continue
            reduce = _reduction(parameter, transposed and experts, module.scale_mode)
            try:
                if not value.is_floating_point() or value.element_size() == 1:
                    raise ValueError(
                        f"stored as {value.dtype}, and only weights in float16, bfloat16, float32 or float64 can be "
                        "quantized. Start from the full-precision model."
                    )
                options = (fmt, module.scale_mode, module.rounding)
                if experts:
                    codes, scale, outliers = quantize_experts(value, *options, transposed, reduce)
                else:
                    codes, scale, outliers = ops.quantize_with_outliers(value, *options, reduce)
                    scale = scale.expand(codes.shape[0], 1).contiguous()
                # how many there are is known only now: the loader has no place for them
                set_outliers(module, weight, outliers)
                for parameter in outliers_of(module, weight) or ():
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as the loader would
            except ValueError as error:
                _notes(module, "errors").append(f"{name}: {error}")
                codes, scale = _placeholder(value, 1 if transposed and experts else -1)
            result[name], result[f"{name}_scale"] = codes, scale
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        return Pack()


class Unpack(ConversionOps):
    """Loading codes: check them and drop the trailing dimension. Every other tensor passes."""

    def convert(
        self, input_dict, source_patterns=None, target_patterns=None, full_layer_name=None, model=None, **kwargs
    ):
        value = _only(next(iter(input_dict.values())))
        found = find_codes(model, full_layer_name)
        if found is not None and not coded.is_checked(value, found[0].format):
            module, weight = found
            if value.ndim == module._parameters[weight].ndim + 1 and value.shape[-1] == 1:
                value = value.squeeze(-1)
            try:
                if value.dtype != torch.uint8:
                    raise ValueError(f"{full_layer_name} {_not_codes(value.dtype, module.format)}")
                get_format(module.format).validate(value, full_layer_name)
            except ValueError as error:
                _notes(module, "errors").append(str(error))
        return {full_layer_name: value}

    @property
    def reverse_op(self) -> ConversionOps:
        return Pack()


class Pack(ConversionOps):
    """Saving codes: add the trailing dimension, or have them coded if the model's config says so."""

    def convert(
        self, input_dict, source_patterns=None, target_patterns=None, full_layer_name=None, model=None, **kwargs
    ):
        value = _only(next(iter(input_dict.values())))
        found = find_codes(model, full_layer_name)
        if found is not None and value.ndim == found[0]._parameters[found[1]].ndim:
            coder = coded.coding_of(model)
            value = value.unsqueeze(-1) if coder == "none" else coded.Encoding(value, coder, full_layer_name)
        return {full_layer_name: value}

    @property
    def reverse_op(self) -> ConversionOps:
        return Unpack()


def _notes(module: nn.Module, kind: str) -> list[str]:
    """What is to be said about a module's weights when all are loaded.

    Transformers keeps what a conversion raises for its log, and then raises an error that names no tensor.
    """
    return module.__dict__.setdefault("_loading_notes", {}).setdefault(kind, [])


def is_mismatched(module: nn.Module, weight: str) -> bool:
    """Whether a weight in full precision was found in another shape than the model's."""
    return weight in module.__dict__.get("_loading_notes", {}).get("mismatched", ())


def raise_loading_errors(model: nn.Module) -> None:
    """Raise what the conversions of this load found.

    Raises:
        ValueError: each of the errors in a line; the tensors are named.
    """
    notes = [module.__dict__.pop("_loading_notes", {}) for _, module in quantized_modules(model)]
    errors = coded.take_errors(model)
    raise_errors(model, errors + [error for note in notes for error in note.get("errors", ())])


def raise_errors(model: nn.Module, errors: list[str]) -> None:
    """Raise a `ValueError` of all errors if there are any; in a distributed model on every process, or on none.

    A process sees only its part of a weight. If it alone raised, the others would wait for it for ever.
    """
    if getattr(model, "_mesh_manager", None) is not None:
        gathered: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, errors)
        errors = list(dict.fromkeys(error for part in gathered for error in part))
    if errors:
        raise ValueError("\n".join(errors))


def _placeholder(value: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of the shapes that the weight `value` would have got."""
    shape = list(value.shape)
    shape[dim] = 1
    return torch.zeros_like(value, dtype=torch.uint8), torch.ones(shape, dtype=torch.float32, device=value.device)


def _not_codes(dtype, weight_format: str) -> str:
    return (
        f"is stored as {dtype}, but by the config it holds {weight_format} codes (uint8). If it was left in full "
        "precision, list its module in modules_to_not_convert."
    )


def _only(value):
    return value[0] if isinstance(value, list) else value


def unpack_conversions(model: nn.Module) -> list[WeightConverter]:
    """The converters that read codes, and reversed write them: one for each name of a parameter of codes."""
    names = sorted({weight for _, _, weight in code_parameters(model)})
    return [WeightConverter([name], [name], [Unpack()]) for name in names]


def is_unpack(conversion) -> bool:
    """Whether a conversion is one of `unpack_conversions`."""
    return any(isinstance(op, Unpack) for op in getattr(conversion, "operations", ()))


def mark_all_saved_codes() -> None:
    """Have Transformers save codes in their form for files from any model that holds some, not only the quantized one.

    A part of a quantized model (`model.model.save_pretrained`), or a model that got a quantized part, has no
    conversions of its own: its codes would be stored in the shape of weights, which Transformers alone takes for
    weights.
    """
    from transformers import modeling_utils  # may be half imported when this module is

    original = modeling_utils.revert_weight_conversion
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def revert_weight_conversion(model, state_dict):
        conversions = getattr(model, "_weight_conversions", None)
        if any(True for _ in code_parameters(model)) and not any(map(is_unpack, conversions or [])):
            if conversions is None:
                conversions = get_model_conversion_mapping(model, add_legacy=False)
                conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
            model._weight_conversions = split_conversions(model, conversions)[0] + unpack_conversions(model)
        return coded.encode_all(original(model, state_dict))

    modeling_utils.revert_weight_conversion = revert_weight_conversion


def split_conversions(model: nn.Module, conversions: list) -> tuple[list, list]:
    """The model's own conversions: those that leave quantized parameters alone, and those that build one.

    A merge or split of weights cannot be undone on codes without their scales. So quantized parameters are stored
    under the model's own names, as they are, and the second kind is not used.
    """
    names = [name for name, _, _ in code_parameters(model)]
    kept: list = []
    dropped: list = []
    for conversion in conversions:
        if is_unpack(conversion):
            continue
        builds = isinstance(conversion, WeightConverter) and any(
            _targets(pattern, names) for pattern in conversion.target_patterns
        )
        (dropped if builds else kept).append(conversion)
    return kept, dropped


def _targets(pattern: str, names: list[str]) -> bool:
    regex = re.compile(pattern.replace(r"\1", ".*").replace("*.", r".*\.") + r"(?!\w)")
    return any(regex.search(name) for name in names)


def _reduction(parameter: Any, transposed: bool, scale_mode: Any):
    """How processes agree on a scale when what it covers is split over them; None where it is not.

    Args:
        parameter: the codes' placeholder, a DTensor under tensor parallelism.
        transposed: its last two dimensions are [in, out].
        scale_mode: says what a scale covers.
    """
    if not hasattr(parameter, "placements"):
        return None
    inputs, outputs = (-2, -1) if transposed else (-1, -2)
    covered = {inputs} if scale_mode in ("row", "absmax", "pow2") else {inputs, outputs}
    covered = {dim % parameter.ndim for dim in covered}
    groups = [
        parameter.device_mesh.get_group(mesh_dim)
        for mesh_dim, placement in enumerate(parameter.placements)
        if hasattr(placement, "dim") and placement.dim % parameter.ndim in covered
    ]
    if not groups:
        return None
    operations = {"max": torch.distributed.ReduceOp.MAX, "sum": torch.distributed.ReduceOp.SUM}

    def reduce(x: torch.Tensor, operation: str) -> torch.Tensor:
        x = x.contiguous()
        if operation == "max":
            x = x.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum over processes may lose a NaN
        for group in groups:
            torch.distributed.all_reduce(x, op=operations[operation], group=group)
        return x

    return reduce


# What a weight in full precision is not stored as: somebody quantized it before.
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_WEIGHTS = ("weight", "gate_up_proj", "up_proj", "down_proj")


def check_shards(files: list[str] | None, weight_format: str | None) -> dict[str, tuple[str, list[int]]]:
    """Look at the headers of safetensors files before anything is loaded.

    Args:
        files: the checkpoint's files; others than `.safetensors` are left to their own loader.
        weight_format: of the codes by the config; None for weights in full precision, to be quantized now.

    Returns:
        The lists of outliers in the files by name, with their type and shape.

    Raises:
        ValueError: a header that is not one, a file shorter than its header says; a weight to be quantized that is
            narrower than 16 bits or no float; codes or scales of another type, or codes of another format.
    """
    types: dict[str, str] = {}
    outliers: dict[str, tuple[str, list[int]]] = {}
    for path in files or []:
        if not str(path).endswith(".safetensors"):
            continue
        header, file = read_header(path), os.path.basename(path)
        metadata = header.pop("__metadata__", None) or {}
        if weight_format is not None and metadata.get("weight_format", weight_format) != weight_format:
            raise ValueError(
                f"{file} holds {metadata['weight_format']} codes, and the config says {weight_format}: they are not "
                "of one checkpoint. Download or save it again."
            )
        for name, entry in header.items():
            types[name] = entry["dtype"]
            if name.endswith(OUTLIERS):
                outliers[name] = entry["dtype"], list(entry["shape"])
            if weight_format is None and _is_narrow(name, entry):
                raise ValueError(
                    f"{name} in {file} is stored as {entry['dtype']}: the model is quantized already. Start from the "
                    "full-precision model."
                )
    for name, dtype in types.items():
        if weight_format is None or name.rpartition(".")[2] not in _WEIGHTS or f"{name}_scale" not in types:
            continue
        if dtype != "U8":
            raise ValueError(f"{name} {_not_codes(dtype, weight_format)}")
        if types[f"{name}_scale"] != "F32":
            raise ValueError(
                f"{name}_scale is stored as {types[f'{name}_scale']}, and scales are F32: a cast of the file changed "
                "them. Download or save it again."
            )
    return outliers if weight_format is not None else {}


def _is_narrow(name: str, entry: dict) -> bool:
    # a coded matrix has one dimension
    matrix = name.rpartition(".")[2] in _WEIGHTS and (len(entry["shape"]) >= 2 or entry["dtype"] == "U8")
    return entry["dtype"] in _NARROW or (matrix and entry["dtype"] in _INTEGERS)

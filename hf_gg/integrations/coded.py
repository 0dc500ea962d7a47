"""Entropy-coded tensors on their way between files and modules.

In a file a coded tensor is one 1-D uint8 tensor under the parameter's own name: a payload of `hf_gg.coding` that says
its own shape, so that reading needs no config. Transformers without this package finds another shape than the model's
and refuses it.

Loading: the loader's slices of such tensors are exchanged for `CodedSlice`, which decodes when the loader reads it. So
decoding runs in the loader's threads, one tensor at a time, before its shard for a process is cut from it; payloads
are mapped from the file, and only decoded tensors take memory. Saving: the conversion of codes to their form for files
leaves an `Encoding`, and all of these run in threads before Transformers divides the tensors into shards.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.accelerate import get_device
from transformers.utils import logging

from .. import coding
from ..coding import codec
from ..coding.levels import decode_levels, is_levels, read_levels_header
from ..formats import get_format
from ..ops.coded import decode_symbols
from .selection import code_parameters


CODINGS = ("none", "rans", "eg0")
# The weight format of a checkpoint whose floats lie on a grid, and are coded without loss.
FLOATS = "none"
# Tensors at once, as many as Transformers' loader takes; more would only need more memory.
WORKERS = min(4, os.cpu_count() or 4)


def check_coding(value: str) -> str:
    """`value` if it is a coding.

    Raises:
        ValueError: it is none.
    """
    if value not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(map(repr, CODINGS))}, got {value!r}.")
    return value


def check_floats(pre_quantized: bool, wanted: str | None) -> None:
    """Raise a `ValueError` where `weight_format="none"` is asked for, or another one of a checkpoint that has it."""
    if not pre_quantized:
        raise ValueError(
            'weight_format "none" is that of checkpoints which `hf-gg compress --lossless-grid` writes: it quantizes '
            "nothing. Leave the config out, or choose another format."
        )
    if wanted not in (None, FLOATS):
        raise ValueError(
            f"The checkpoint holds coded floats, and {wanted} was asked for: load it without a config, then quantize "
            "the model by `hf_gg.quantize_`."
        )


def coding_of(model: nn.Module) -> str:
    """How a model's codes are to be saved, by its config."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), "coding", "none")


def _threads_each() -> int:
    """Threads for each of several tensors that are coded at once."""
    return max(1, torch.get_num_threads() // WORKERS)


# --- loading ---


class CodedSlice:
    """A coded tensor in a file, with the interface of a safetensors slice; decoded when it is indexed.

    Args:
        source: the payload in the file: a safetensors slice, or a tensor.
        name: of the tensor, for errors.
        dtype: of the parameter: uint8 of codes, else the payload holds numbers on a grid.
        shape: of the parameter, where the tensor becomes it alone.
        limit: most numbers that the tensor can have: those of the model.
        threads: to decode with; None for as many as there are cores.
        errors: takes the message of each damaged tensor; zeros of the wanted shape stand in for it.
        ignore_shape: a tensor of another shape than the parameter's is not decoded: zeros of its shape stand in.
        weight_format: of codes, if it is known: then what it refuses is an error here.
        device: where the loader will want codes. On a CUDA device they are decoded there, from the payload.
    """

    def __init__(
        self,
        source,
        name,
        dtype,
        shape,
        limit,
        threads,
        errors: list[str],
        ignore_shape: bool,
        weight_format: str | None = None,
        device: torch.device | None = None,
    ):
        self.source, self.name, self.dtype = source, name, dtype
        self.shape, self.limit, self.threads = shape, limit, threads
        self.errors, self.ignore_shape, self.weight_format = errors, ignore_shape, weight_format
        self.device = device

    def get_shape(self) -> list[int]:
        if self.shape is not None:
            return list(self.shape)
        payload = self.source[...]
        if self.dtype == torch.uint8:
            return list(codec.read(payload, self.name).shape)
        return list(read_levels_header(payload, self.name)[1])

    def get_dtype(self) -> str:
        return "U8" if self.dtype == torch.uint8 else "F32"  # of floats, the loader asks only whether they are

    def __getitem__(self, index) -> torch.Tensor:
        try:
            decoded = self._decode()[index]
            if decoded.device.type == "cpu":
                decoded._hf_gg_checked = self.weight_format  # type: ignore[attr-defined]
            return decoded
        except ValueError as error:
            if self.shape is None:
                raise
            self.errors.append(str(error))
            return torch.zeros((), dtype=self.dtype).expand(self.shape)[index]

    def _decode(self) -> torch.Tensor:
        payload = self.source[...].cpu()
        if self.dtype == torch.uint8:
            header = codec.read(payload, self.name)
            dtype, shape = torch.uint8, header.shape
        else:
            dtype, shape = read_levels_header(payload, self.name)
        # before memory is taken: a damaged or a lying header may promise terabytes
        if math.prod(shape) > self.limit or (self.shape is not None and shape != self.shape):
            if self.ignore_shape and math.prod(shape) < 2**62:
                return torch.zeros((), dtype=dtype).expand(shape)
            wanted = f"{self.limit} numbers at most" if self.shape is None else f"shape {self.shape}"
            raise ValueError(
                f"{self.name} is coded with shape {shape}, and the model wants {wanted}: the checkpoint is damaged, "
                "or of another model."
            )
        if self.dtype == torch.uint8 and self.device is not None and self.device.type == "cuda":
            return decode_symbols(payload, self.name, self.device, self.threads, expected_shape=shape)
        if self.dtype == torch.uint8:
            refused = get_format(self.weight_format).refused if self.weight_format else ()
            return coding.decode(
                payload, self.name, self.threads, expected_shape=shape, reserved=refused, header=header
            )
        return decode_levels(payload, self.name, self.threads, expected_shape=shape)


def is_checked(tensor: torch.Tensor, weight_format: str) -> bool:
    """Whether a tensor is one that was decoded with a look for the codes that a format refuses."""
    return getattr(tensor, "_hf_gg_checked", None) == weight_format


def decode_while_loading(is_ours: Callable[[Any], bool]) -> None:
    """Have Transformers' loader decode coded tensors as it reads them, for which it has no hook.

    Args:
        is_ours: whether a quantizer is one that reads such checkpoints.
    """
    from transformers import modeling_utils  # imports the quantizers, and so must not be imported with them

    original = modeling_utils.convert_and_load_state_dict_in_model
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def convert_and_load_state_dict_in_model(model, state_dict, load_config, disk_offload_index=None):
        resaved: dict[str, str] = {}
        if is_ours(load_config.hf_quantizer):
            state_dict, resaved = with_coded_slices(model, state_dict, load_config, disk_offload_index)
        loading_info, index = original(model, state_dict, load_config, disk_offload_index)
        for tied, target in resaved.items():
            index[tied] = index[target]
        return loading_info, index

    modeling_utils.convert_and_load_state_dict_in_model = convert_and_load_state_dict_in_model


def with_coded_slices(model: nn.Module, state_dict: dict, load_config, disk_offload_index: dict | None):
    """A checkpoint's tensors with a `CodedSlice` for each that is coded.

    Returns:
        The tensors, and, of parameters offloaded to disk, those that are tied to a decoded one, with its name.
    """
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters: dict[str, torch.Tensor] = model.state_dict()  # type: ignore[assignment]
    total = sum(parameter.numel() for parameter in parameters.values())
    on_disk = "disk" in (load_config.device_map or {}).values()
    threads = None if on_disk else _threads_each()  # the loader has threads of its own, but for disk offload
    errors = model.__dict__.setdefault("_coding_errors", [])
    formats = {name: module.format for name, module, _ in code_parameters(model)}
    result, offloaded = dict(state_dict), disk_offload_index or {}
    resaved: dict[str, str] = {}
    for key, value in state_dict.items():
        if _dtype(value) != "U8" or len(_shape(value)) != 1:
            continue
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        parameter = parameters.get(name)
        if parameter is None or (parameter.ndim < 2 and not is_levels(value[:8])):
            continue
        # what is merged, split or turned on its way into a parameter of floats has a shape of its own
        shape = tuple(parameter.shape) if pattern is None or parameter.dtype == torch.uint8 else None
        ignore_shape = load_config.ignore_mismatched_sizes
        fmt = formats.get(name) if shape is not None else None
        device = _device(get_device(load_config.device_map or {"": "cpu"}, name, valid_torch_device=True))
        both = name if name == key else f"{name} ({key} in the file)"
        result[key] = CodedSlice(
            value, both, parameter.dtype, shape, total, threads, errors, ignore_shape, fmt, device
        )
        # the file cannot be read in its place
        for target in [target for target, entry in offloaded.items() if entry.get("weight_name") == key]:
            del offloaded[target]
            if target != name:
                resaved[target] = name
    return result, resaved


def take_errors(model: nn.Module) -> list[str]:
    """What was found wrong with coded tensors while the model was loaded."""
    return model.__dict__.pop("_coding_errors", [])


def _device(device: torch.device | str | int) -> torch.device:
    if isinstance(device, int):  # of whatever accelerator there is; payloads are decoded on CUDA devices alone
        return torch.device("cuda", device) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)


def _dtype(value) -> str:
    if isinstance(value, torch.Tensor):
        return "U8" if value.dtype == torch.uint8 else str(value.dtype)
    return value.get_dtype()


def _shape(value) -> list[int]:
    return list(value.shape) if isinstance(value, torch.Tensor) else value.get_shape()


# --- saving ---


@dataclass
class Encoding:
    """A tensor of codes that is to be coded for a file."""

    codes: torch.Tensor
    coder: str
    name: str

    def run(self) -> torch.Tensor:
        return coding.encode(self.codes.cpu(), self.coder, name=self.name, threads=_threads_each())


def encode_all(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Run each `Encoding` among the values of a state dict, in threads, and put its payload in its place."""
    waiting = {name: value for name, value in state_dict.items() if isinstance(value, Encoding)}
    if not waiting:
        return state_dict
    with ThreadPoolExecutor(WORKERS) as pool:
        payloads = pool.map(Encoding.run, waiting.values())
        coded = dict(zip(waiting, list(logging.tqdm(payloads, total=len(waiting), desc="Encoding weights"))))
    return {name: coded.get(name, value) for name, value in state_dict.items()}


def correct_index(folder: str) -> None:
    """Write the size of the tensors as they were stored into a checkpoint's index, if it has one.

    Transformers reckons before it converts where a model is offloaded.
    """
    for file in os.listdir(folder):
        if not file.endswith(".safetensors.index.json"):
            continue
        with open(os.path.join(folder, file)) as stream:
            index = json.load(stream)
        shards = {os.path.join(folder, shard) for shard in index["weight_map"].values()}
        index["metadata"]["total_size"] = sum(map(_tensor_bytes, shards))
        with open(os.path.join(folder, file), "w") as stream:
            stream.write(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tensor_bytes(path: str) -> int:
    with open(path, "rb") as file:
        return os.path.getsize(path) - 8 - int.from_bytes(file.read(8), "little")

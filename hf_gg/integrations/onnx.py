"""ONNX files of quantized models whose weights stay 8 bits, through Transformers' own exporter.

export_onnx(model, "smollm2-onnx")

exported = ExportedModel.from_pretrained("smollm2-onnx")  # transformers.exporters: runs in onnxruntime
exported(input_ids=…, attention_mask=…, …).logits
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging as std_logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, __version__
from transformers.utils import logging

from . import selection
from .folders import new_folder


MIN_OPSET = 18
# What a sample has: more than one of each, so that none is taken for a constant.
_BATCH, _LENGTH = 2, 8


def export_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike,
    inputs: Mapping[str, Any] | None = None,
    *,
    cache: bool | None = None,
    decode: str = "run",
    opset: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a quantized model as ONNX: `model.onnx`, its weights in `model.onnx.data`, `export.json`, `config.json`.

    Codes are uint8 in the file. Batch and lengths are dynamic.

    Args:
        model: with weights quantized by hf_gg, in memory, in float32 or float16.
        path: folder to write; it is there as a whole or not at all.
        inputs: a sample of what the model's `forward` takes, for models that take more than `input_ids` and
            `attention_mask`; each dimension that shall be dynamic must be greater than 1.
        cache: the graph takes and returns the keys and values of past tokens, which may be none (the prompt) or
            some (the next token or tokens). Default: True for decoders that write text, unless `inputs` are given.
        decode: `"run"`: onnxruntime keeps the codes in memory and decodes each weight when it is used; `"load"`: it
            decodes all weights once, so that they take 4 bytes in memory and run like those of a float32 model.
        opset: version of ONNX's operators, at least 18; the exporter's own choice for None.
        overwrite: replace the folder if it is there.

    Returns:
        The folder.

    Raises:
        TypeError: not a Transformers model. ImportError: onnx or onnxscript is missing.
        ValueError: a model that is not quantized by hf_gg, offloaded or split over processes, in bfloat16, or one
            that Transformers cannot export; an unknown `decode`, an opset below 18; the folder is not empty.
        OSError: the folder cannot be written.
    """
    check(model)
    with new_folder(Path(path), overwrite) as target:
        write(model, target, inputs, cache=cache, decode=decode, opset=opset)
    return Path(path)


def write(
    model: PreTrainedModel,
    target: Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    cache: bool | None = None,
    decode: str = "run",
    opset: int | None = None,
) -> None:
    """Write the files of `export_onnx` into a folder that is there. Same arguments, same errors."""
    check(model)
    from . import onnx_nodes

    if decode not in onnx_nodes.DECODE:
        raise ValueError(f"decode must be one of {', '.join(map(repr, onnx_nodes.DECODE))}, got {decode!r}.")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or opset < MIN_OPSET):
        raise ValueError(f"opset must be a number of {MIN_OPSET} or more, got {opset!r}: leave it out.")
    if cache and inputs is not None:
        raise ValueError("cache=True makes its own sample: leave inputs out, or give past_key_values among them.")
    if cache and not _writes_text(model):
        raise ValueError(f"cache=True is for decoders that write text, and {type(model).__name__} is none.")
    if cache is None:
        cache = inputs is None and _writes_text(model)
    sample = dict(inputs) if inputs is not None else _sample(model)
    _export(model, sample, cache, decode, opset).save_pretrained(target)


def check(model: Any) -> None:
    """Raise the error for a model that `export_onnx` does not take, or for packages that are missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install 'hf-gg[onnx]'.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_onnx takes a Transformers model, got {type(model).__name__}: of one with adapters, merge them "
            "(merge_and_unload)."
        )
    if not any(True for _ in selection.quantized_modules(model)):
        raise ValueError(
            f"{type(model).__name__} has no weights quantized by hf_gg: load it with quantization_config=GGConfig(), "
            "or export the float model with transformers.exporters."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded or was never loaded: load the whole model on one device.")
        if hasattr(parameter, "placements"):
            raise ValueError(f"{name} is split over processes: load the model in one process.")
        if parameter.dtype == torch.bfloat16:
            raise ValueError(
                f"{name} is in bfloat16, in which onnxruntime multiplies no matrices on a CPU: load the model with "
                "dtype=torch.float32, or float16."
            )


def _writes_text(model: PreTrainedModel) -> bool:
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return bool(model.can_generate()) and model.main_input_name == "input_ids" and not encoder_decoder


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}: give a sample, "
            f"inputs={{{model.main_input_name!r}: …}}."
        )
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_BATCH * _LENGTH, device=model.device).remainder(size).view(_BATCH, _LENGTH)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0  # a mask that masks nothing is left out while a model generates
    sample = {"input_ids": tokens, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = tokens[:, : _LENGTH // 2].clone()
    return sample


def _export(model: PreTrainedModel, inputs: dict[str, Any], cache: bool, decode: str, opset: int | None):
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_cache_pytrees_for_model
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    from . import onnx_nodes

    class Exporter(OnnxExporter):
        def export_program(self, model, sample_inputs, config):
            with onnx_nodes.stand_ins():
                program, metadata = super().export_program(model, sample_inputs, config)
            onnx_nodes.lower(program, decode)
            onnx_nodes.name_dimensions(program.graph)
            return program, metadata

    training = model.training
    model.eval()
    try:
        with _quiet():
            # several tokens after a past: the one graph that serves prompts and single tokens
            if cache:
                part, inputs = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
            else:
                part = model
            register_cache_pytrees_for_model(part)
            # flags such as use_cache are no inputs of the graph
            tensors = {name: value for name, value in inputs.items() if not isinstance(value, bool)}
            shapes = {name: _varying(shape) for name, shape in get_auto_dynamic_shapes(tensors).items()}
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
            return Exporter().export(part, inputs, config)
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # whatever tracing a model of somebody else's ends with
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Transformers {__version__} cannot export {type(model).__name__} to ONNX "
            f"({type(error).__name__}: {reason})."
        ) from error
    finally:
        model.train(training)


def _varying(shape: Any) -> Any:
    """Of a tree of dynamic shapes: keys and values [batch, heads, past, width] vary in two dimensions alone."""
    if isinstance(shape, (list, tuple)):
        return type(shape)(_varying(part) for part in shape)
    if isinstance(shape, dict) and len(shape) == 4 and set(shape) == set(range(4)):
        return {0: shape[0], 2: shape[2]}
    return shape


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print on the way; errors are raised as ever."""
    loggers = [std_logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels, verbosity = [logger.level for logger in loggers], logging.get_verbosity()
    logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(std_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

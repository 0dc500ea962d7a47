"""A model quantized and saved with entropy-coded codes, and what that costs and saves, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from .. import coding
from ..nn.base import OUTLIERS
from .calibration import tokenizer_of
from .folders import copy_others, weight_files
from .header import read_header
from .lossless import GridFiles, StoredTensor
from .reading.files import load_torch_file
from .report import quantization_report
from .selection import code_parameters
from .transformers import GGConfig, quantize_


def compress(
    source: Path,
    target: Path,
    config: GGConfig,
    max_shard_size: str = "5GB",
    uncalibrated: dict[str, str] | None = None,
) -> list[StoredTensor]:
    """Quantize a Transformers model and save it with coded codes; one that is quantized already is only coded.

    Args:
        source: a folder, or a GGUF file.
        target: an empty folder.
        config: how to quantize and code.
        max_shard_size: of the files.
        uncalibrated: is filled with what calibration left to plain rounding, and the reason.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: the model cannot be quantized or loaded; the reason is named.
    """
    given = quantization_of(source)
    if given is not None and given.get("quant_method") != "gg":
        raise ValueError(
            f"{source} is quantized by {given.get('quant_method')!r} already: start from the full-precision model."
        )
    if given is not None and config._format_given:
        raise ValueError(
            f"{source} holds {given.get('weight_format')} codes already, and quantizing twice loses twice: leave the "
            "format and the target out to code them, or start from the full-precision model."
        )
    if (source / "config.json").exists():  # load says it if not
        for file in weight_files(source):
            read_header(str(file)) if file.suffix == ".safetensors" else load_torch_file(file)  # errors name the file
    model = load(source, GGConfig(coding=config.coding) if given is not None else None)
    originals = {} if given is not None else dict(model.named_parameters(remove_duplicate=False))
    if given is None:
        calibrated = config.calibration is not None
        quantize_(model, config, tokenizer_of(model, gguf_file=_gguf_name(source)) if calibrated else None)
    if uncalibrated is not None:
        uncalibrated.update(model.hf_quantizer.uncalibrated)
    model.save_pretrained(target, max_shard_size=max_shard_size)
    rows = stored_tensors(model, target, originals)
    if source.is_file():
        _save_tokenizer(source, target)
    else:
        copy_others(source, target)
    return rows


def compress_on_grid(
    source: Path,
    target: Path,
    step: float,
    coder: str = "rans",
    round: bool = False,
    keep: Iterable[str] = (),
    progress: Callable[[int], Callable[[], object]] = lambda total: lambda: None,
) -> tuple[list[StoredTensor], dict[str, float]]:
    """Code the files of a float model, or bare files of tensors, whose matrices lie on a grid.

    Args:
        source: a folder, or a file.
        target: an empty folder.
        step: of the grid.
        coder: `"rans"` or `"eg0"`.
        round: matrices that are not on the grid are rounded to it.
        keep: regular expressions for names of matrices to leave as they are.
        progress: given the number of steps, returns what is called after each of them.

    Returns:
        What became of each tensor, and the largest change of each that was rounded.

    Raises:
        ValueError: as `GridFiles.check`.
    """
    given = quantization_of(source)
    if given is not None:
        raise ValueError(
            f"{source} is quantized by {given.get('quant_method')!r} already: start from the float model."
        )
    with GridFiles(weight_files(source), step, coder, round, keep) as files:
        advance = progress(2 * len(files))
        rounded = files.check(advance)
        rows = files.write(target, advance)
    if source.is_dir():
        copy_others(source, target)
        if (source / "config.json").exists():
            content = json.loads((source / "config.json").read_text(encoding="utf-8"))
            content["quantization_config"] = GGConfig(weight_format="none", coding=coder).to_dict()
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (target / "config.json").write_text(text, encoding="utf-8")
    return rows, rounded


def quantization_of(source: Path) -> dict | None:
    """The quantization config of a folder's model; None where there is none."""
    file = source / "config.json"
    if not source.is_dir() or not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no config of a model: it holds no table of keys.")
    return content.get("quantization_config")


def load(source: Path, quantization_config: GGConfig | None = None) -> nn.Module:
    """Load a model by the class that its config names, in the dtype of its files.

    Args:
        source: a folder, or a GGUF file.
        quantization_config: for a quantized checkpoint, what to change about it.
    """
    options: dict = {"dtype": "auto"}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if source.is_file():
        if source.suffix != ".gguf":
            raise ValueError(
                f"{source} is no model: give a folder with config.json or a GGUF file. Bare files of weights can only "
                "be coded by --lossless-grid."
            )
        options = {"gguf_file": source.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        return transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options)
    if not (source / "config.json").exists():
        raise ValueError(f"{source} has no config.json: only --lossless-grid takes files without a model's config.")
    names = AutoConfig.from_pretrained(source).architectures or ["AutoModel"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(f"{source}: Transformers has no class {names[0]}, which config.json names.")
    return cls.from_pretrained(source, **options)


def stored_tensors(model: nn.Module, folder: Path, originals: Mapping[str, torch.Tensor]) -> list[StoredTensor]:
    """What a saved model's tensors are in the files of `folder`.

    Args:
        model: the quantized model.
        folder: where it was saved.
        originals: parameters in full precision, by name; without one, bytes before are those of the codes and scales,
            and the noise is unknown (NaN).
    """
    sizes: dict[str, tuple[int, int]] = {}
    for file in weight_files(folder):
        for name, entry in read_header(str(file)).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[name] = (math.prod(entry["shape"]), end - start)
    noise = {row.name: row.snr for row in quantization_report(model, originals).rows} if originals else {}
    rows = []
    for name, module, weight in code_parameters(model):
        codes, scale = module._parameters[weight], module._parameters[f"{weight}_scale"]
        stored = _stored_name(model, name)
        if stored not in sizes:
            continue  # tied
        after = sum(sizes.pop(f"{stored}{suffix}", (0, 0))[1] for suffix in ("", "_scale", *OUTLIERS))
        original = originals.get(name)
        if original is None:
            before, signal, lost = codes.numel() + 4 * scale.numel(), math.nan, math.nan
        else:
            before = original.numel() * original.element_size()
            signal = float(original.detach().double().square().sum())
            lost = signal / 10 ** (noise[name] / 10)
        rows.append(StoredTensor(name, codes.numel(), before, after, coding.entropy(codes), signal, lost))
    rows += [StoredTensor(name, count, size, size) for name, (count, size) in sizes.items()]
    return rows


def _stored_name(model: nn.Module, name: str) -> str:
    return next(iter(revert_weight_conversion(model, {name: torch.empty(0, device="meta")})))


def _gguf_name(source: Path) -> str | None:
    return source.name if source.is_file() else None


def _save_tokenizer(gguf: Path, target: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        transformers.utils.logging.get_logger(__name__).warning(f"{gguf.name} gave no tokenizer ({error}).")

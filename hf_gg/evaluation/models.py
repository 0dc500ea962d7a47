"""Models and tokenizers by what a user calls them: a folder, a GGUF file, a name on the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..integrations.folders import find


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """Load a causal language model, ready to be measured.

    Args:
        name: a folder, a GGUF file (decoded), a name on the hub.
        dtype: of what is not codes, and of the arithmetic; `"auto"` for the checkpoint's.
        device: such as `"cpu"` or `"cuda:0"`.

    Raises:
        ValueError: no such model, no causal language model, weights that are missing, or an unknown dtype.
        OSError: the hub cannot be reached.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    folder, options = _where(name)
    options |= {"quantization_config": GgufConfig(dequantize=True)} if options else {}
    if not options and not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no model: it has no config.json.")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, output_loading_info=True, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{name} is no causal language model: perplexity, KL and tasks need one. For others see metric_path."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} has no {missing[0]} and {len(missing) - 1} more weights that a causal language model has: it is "
            "another kind of model, or damaged."
        )
    try:
        return model.to(device).eval()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"The model cannot be moved to the device {device!r}: {error}.") from error


def load_tokenizer(name: str):
    """A model's tokenizer; None if its folder has none.

    Raises:
        ValueError: no such model. OSError: the hub cannot be reached.
    """
    folder, options = _where(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # as many ways as classes to have no files
        return None
    return tokenizer if len(tokenizer) > 1 else None  # some classes start without a vocabulary


def same_tokens(one, other) -> bool:
    """Whether two tokenizers have the same vocabulary."""
    return one.get_vocab() == other.get_vocab()


def _where(name: str) -> tuple[Path, dict]:
    path = find(name)
    if path.is_dir():
        return path, {}
    if path.suffix != ".gguf":
        raise ValueError(f"{name} is no model: give a folder, a GGUF file, or a name on the hub.")
    return path.parent, {"gguf_file": path.name}

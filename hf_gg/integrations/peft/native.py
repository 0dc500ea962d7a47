"""Transformers' own `model.load_adapter`, which reads adapter files without PEFT's translation of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from .methods import is_ours


def install() -> None:
    """Have files of BACKSLASH and DEEPSHAPE translated before they are loaded."""
    from transformers import PreTrainedModel

    original = PreTrainedModel._load_pretrained_model
    if hasattr(original, "_hf_gg_wrapped"):
        return

    @functools.wraps(original)
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        newest = _newest(model)
        if newest is not None:
            state_dict = translated(model, newest, state_dict, checkpoint_files, load_config)
            checkpoint_files, load_config = [], dataclasses.replace(load_config, sharded_metadata={})
        return original(model, state_dict, checkpoint_files, load_config, expected_keys)

    _load_pretrained_model._hf_gg_wrapped = True  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(_load_pretrained_model)  # type: ignore[method-assign]


def translated(model: Any, adapter_name: str, state_dict: Any, files: Any, load_config: Any) -> dict[str, Any]:
    """The tensors of an adapter as Transformers expects them, without the adapter's name where it will put that in."""
    config = model.peft_config[adapter_name]
    if state_dict is None:
        from ..lossless import read_files

        state_dict = {name: value for file in files for name, value in read_files(Path(file)).items()}
    remap = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]._remap_adapter_state_dict_for_load
    result = remap(model=model, config=config, adapter_name=adapter_name, state_dict=state_dict)
    end = f".{adapter_name}" if load_config.weight_mapping else ""
    return {name.removesuffix(end): value for name, value in result.items()}


def _newest(model: Any) -> str | None:
    """The adapter that was added last, which is the one to load; None where there is none of ours."""
    config = getattr(model, "peft_config", None) or {}
    newest = next(reversed(config), None)
    return newest if newest is not None and is_ours(config[newest].peft_type) else None

"""The end of loading a quantized model: checks, and plain modules where the checkpoint has no weight."""

from __future__ import annotations

import re
import types

import torch
from torch import nn

from ..nn import RF8Embedding, RF8Experts
from ..nn.base import QuantizedWeight
from ..training.initialization import GGInit
from . import checkpoint, outliers, selection
from .dequantizing import new_conv1d
from .initialization import drawing


_FRESH = "missing from the checkpoint: newly initialized in full precision"


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
            fresh[owner] = _FRESH
            continue
        if not all(loaded):
            missing = name if loaded[1] else f"{name}_scale"
            raise ValueError(
                f"{missing} is missing from the checkpoint: codes and scales belong together. Download or save it "
                "again."
            )
    return fresh


def guard_initialization(model: nn.Module, skipped: dict[str, str], init: GGInit | None) -> None:
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


def note_absent(model: nn.Module, skipped: dict[str, str], init: GGInit | None) -> None:
    """Note the linear layers that the checkpoint lacks when the model's initializers run, and have them draw as `init`
    says. Of a model that is quantized once all of it is in memory."""

    def initialize_weights(self):
        del self.initialize_weights
        tied = getattr(self, "all_tied_weights_keys", None) or {}
        for name, module in self.named_modules():
            fresh = selection.kind_of(module) == "linears" and f"{name}.weight" not in tied
            if fresh and not getattr(module.weight, "_is_hf_initialized", False):
                skipped[name] = _FRESH
        with drawing(init):
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
        new = new_conv1d(module)
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

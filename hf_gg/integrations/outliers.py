"""Lists of outliers on their way from files to modules: places for them before a load, checks and ties after it."""

from __future__ import annotations

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .. import ops
from ..nn.base import OUTLIERS, SHARING, outliers_of, set_outliers, share_outliers
from .selection import code_parameters


_STORED = {"I32": torch.int32, "I64": torch.int64, "F32": torch.float32}


def make_room(model: nn.Module, conversions: list, outliers: dict[str, tuple[str, list[int]]] | None) -> None:
    """Give a model on the meta device parameters for the lists of outliers in a checkpoint.

    Args:
        model: with its quantized modules in place.
        conversions: by which names in the file become names in the model.
        outliers: from `check_shards`. None where the checkpoint could not be looked at, as for a state dict: then
            every module gets lists of length 0, which may be loaded in any length.

    Raises:
        ValueError: a list of another type, or of a weight that is split over processes; the tensor is named.
    """
    parameters = {name: (module, weight) for name, module, weight in code_parameters(model)}
    if outliers is None:
        for module, weight in parameters.values():
            if module.format == "grid":
                wide = module._parameters[weight].numel() > 2**31
                index = torch.empty(0, dtype=torch.int64 if wide else torch.int32, device="meta")
                set_outliers(module, weight, (index, torch.empty(0, dtype=torch.float32, device="meta")))
        # most of them will not be there
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        model._keys_to_ignore_on_load_missing = {*ignored, rf"({'|'.join(OUTLIERS)})$"}
        return
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    for key, (dtype, _) in outliers.items():
        suffix = OUTLIERS[key.endswith(OUTLIERS[1])]
        if dtype not in (("F32",) if suffix == OUTLIERS[1] else ("I32", "I64")):
            raise ValueError(f"{key} is stored as {dtype}, not as {'float32' if suffix == OUTLIERS[1] else 'int32'}.")
        codes = key.removesuffix(suffix)
        name, _ = rename_source_key(codes, renamings, [], model.base_model_prefix, parameters)
        module, weight = parameters.get(name if name in parameters else codes, (None, None))
        if module is None:
            continue  # of a part of the model that is not loaded
        if is_distributed(model):
            raise ValueError(
                f"{key}: a weight with outliers cannot be split over processes. Load the model in one process, or "
                "quantize it again with coarser steps, so that there are none."
            )
        tensors = [torch.empty(0, dtype=torch.int32, device="meta"), torch.empty(0, device="meta")]
        for position, own in enumerate(OUTLIERS):
            if f"{codes}{own}" in outliers:
                stored, shape = outliers[f"{codes}{own}"]
                tensors[position] = torch.empty(shape, dtype=_STORED.get(stored, torch.float32), device="meta")
        set_outliers(module, weight, (tensors[0], tensors[1]))


def is_distributed(model: nn.Module) -> bool:
    """Whether a model is to be split over processes by `distributed_config`."""
    config = getattr(model.config, "distributed_config", None)
    return any(getattr(config, name, 1) not in (None, 1) for name in ("tp_size", "ep_size", "fsdp_size", "dp_size"))


@torch.no_grad()
def finish(model: nn.Module) -> list[str]:
    """Check the lists of outliers that were loaded, and drop the places of those that were not.

    Returns:
        What is wrong with them.
    """
    errors: list[str] = []
    for name, module, weight in list(code_parameters(model)):
        found = outliers_of(module, weight)
        codes = module._parameters[weight]
        if found is None or codes.is_meta or any(p.is_meta for p in found):
            continue  # none, or offloaded to disk
        missing = [suffix for suffix, p in zip(OUTLIERS, found) if not getattr(p, "_is_hf_initialized", False)]
        if len(missing) == 2:
            set_outliers(module, weight, None)
        elif missing:
            errors.append(f"{name}{missing[0]} is missing from the checkpoint: a list of outliers has two tensors.")
        else:
            for parameter in found:
                parameter.requires_grad_(False)
            try:
                ops.check_outliers(name, codes, *found)
            except ValueError as error:
                errors.append(str(error))
    return errors


def tie(model: nn.Module) -> None:
    """Let modules that share their codes share the outliers, now and when the codes are made again."""
    groups: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module, weight in code_parameters(model):
        groups.setdefault(id(module._parameters[weight]), []).append((module, weight))
    for group in groups.values():
        if len(group) > 1:
            donor = next((member for member in group if outliers_of(*member) is not None), group[0])
            for module, _ in group:
                module.__dict__[SHARING] = [other for other, _ in group]
            share_outliers(*donor)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in list(tied.items()):
        for suffix in OUTLIERS if f"{target}_scale" in tied else ():
            if {f"{target}{suffix}", f"{source}{suffix}"} <= names:
                tied[f"{target}{suffix}"] = f"{source}{suffix}"
            else:
                tied.pop(f"{target}{suffix}", None)

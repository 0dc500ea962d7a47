"""A quantized model becomes the plain one."""

from __future__ import annotations

import torch
from torch import nn

from ..nn import RF8Embedding, RF8Experts, RF8Linear
from ..nn.base import OUTLIERS
from . import checkpoint, fsdp, saving, selection


def dequantize(model: nn.Module, dtype: torch.dtype | str | None, dropped_conversions: list) -> nn.Module:
    """Exchange the quantized modules for plain ones, in place.

    Args:
        model: in memory.
        dtype: of the weights.
        dropped_conversions: of Transformers, which codes did not need.

    Raises:
        ValueError: parts of the model are offloaded, or sharded by FSDP.
    """
    offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if offloaded is not None:
        raise ValueError(f"{offloaded} is offloaded: load the model without offload to dequantize it.")
    # a text is what the config says after a save
    wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    check_can_dequantize(model)
    names = []
    for name, module in list(selection.quantized_modules(model)):
        names.append(name)
        if isinstance(module, RF8Experts):
            module.restore_(wanted)
        else:
            selection.replace_module(model, name, _float_module(module, wanted))
    _distribute_again(model, names)
    kept = [c for c in getattr(model, "_weight_conversions", None) or [] if not checkpoint.is_unpack(c)]
    model._weight_conversions = dropped_conversions + kept
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for suffix in ("_scale", *OUTLIERS):
        for key in [key for key in tied if key.endswith(suffix) and key.removesuffix(suffix) in tied]:
            del tied[key]
    model.tie_weights()
    saving.remove(model)
    model.__dict__.pop("resize_token_embeddings", None)
    return model


def check_can_dequantize(model: nn.Module) -> None:
    """`ValueError` for a model that FSDP has sharded."""
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


def new_conv1d(module: RF8Linear) -> nn.Module:
    """A `Conv1D` of the module's size."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(module.out_features, module.in_features)


def _float_module(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The plain module that a quantized one stands for, with decoded weights."""
    if isinstance(module, RF8Embedding):
        return module.to_embedding(dtype)
    linear = module.to_linear(dtype)
    if not module.fan_in_fan_out:
        return linear
    conv = new_conv1d(module)
    conv.weight, conv.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return conv.train(module.training)

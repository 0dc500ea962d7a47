"""`modules_to_save` with quantized modules in it.

PEFT trains a copy of such a module beside the original. Codes cannot be trained, so the copy has float32 weights; it
is saved with the adapter, and fits a model that is not quantized as well. Merging rounds it back into the original's
codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from ...nn import RF8Embedding, RF8Experts
from .injection import quantized_in
from .layers import warn_merge
from .patching import wrap


def install() -> None:
    """Let `modules_to_save` name quantized modules."""
    from peft.utils.other import ModulesToSaveWrapper

    wrap(ModulesToSaveWrapper, "update", _update)
    wrap(ModulesToSaveWrapper, "unload_and_optionally_merge_module", _unload)


def _update(original: Callable) -> Callable:
    def update(self, adapter_name, *args, **kwargs):
        tied = kwargs.get("tied_module", args[0] if args else None)
        if adapter_name not in self.modules_to_save and tied is None and quantized_in(self.original_module):
            self.modules_to_save[adapter_name] = float_copy(self.original_module)
        return original(self, adapter_name, *args, **kwargs)

    return update


def _unload(original: Callable) -> Callable:
    def unload_and_optionally_merge_module(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if result is not self.original_module and quantized_in(self.original_module):
            return requantized(self.original_module, result)
        return result

    return unload_and_optionally_merge_module


def float_copy(module: nn.Module) -> nn.Module:
    """A copy of a module in which quantized modules are plain ones with float32 weights.

    What was a Conv1D before it was quantized is a linear layer in the copy, too.
    """
    new = copy.deepcopy(module)
    for name in quantized_in(new):
        child = new.get_submodule(name)
        if isinstance(child, RF8Experts):
            child.restore_(torch.float32)
            continue
        to_plain = child.to_embedding if isinstance(child, RF8Embedding) else child.to_linear
        plain = to_plain(torch.float32)
        if not name:
            return plain
        parent, _, attribute = name.rpartition(".")
        setattr(new.get_submodule(parent), attribute, plain)
    return new


@torch.no_grad()
def requantized(original: nn.Module, trained: nn.Module) -> nn.Module:
    """Write trained weights back into the module that they were copied from, rounded where it is quantized."""
    modules = dict(trained.named_modules())
    values = {**dict(trained.named_parameters()), **dict(trained.named_buffers())}
    for name in quantized_in(original):
        child, source = original.get_submodule(name), modules[name]
        weights = child.quantized_names if isinstance(child, RF8Experts) else ("weight",)
        for weight in weights:
            for parameter in (weight, f"{weight}_scale"):  # of its own: they may be tied to those of another module
                own = child._parameters[parameter].detach().clone()
                child._parameters[parameter] = nn.Parameter(own, requires_grad=False)
            value = values.pop(f"{name}.{weight}".removeprefix("."))
            if isinstance(child, RF8Experts):
                child.requantize_(weight, value)
            else:
                child.requantize_(value)
        warn_merge(child.format, f"a module of `modules_to_save` ({type(source).__name__})", undo="")
    for name, target in (*original.named_parameters(), *original.named_buffers()):
        if name in values:
            target.copy_(values[name])
    return original

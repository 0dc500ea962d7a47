"""The penalty in loops that nobody attached it in: a hook on all optimizers, which acts on those that step a ΔW."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..autoload import when_imported


_layers: weakref.WeakSet[Any] = weakref.WeakSet()
# optimizers that were looked at, with their number of parameters then
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
# those that were attached here
_own: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()
_handle: Any = None


def follow(layer: nn.Module) -> None:
    """Have the ΔW of a layer penalized, whatever trains it."""
    global _handle
    _layers.add(layer)
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)
        when_imported("transformers.trainer", "hf_gg.integrations.peft.penalty_trainer")


def trained(layers: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """The config and, by name, the parameters ΔW that are trained.

    Raises:
        ValueError: several adapters are trained at once under different penalties.
    """
    found: dict[str, nn.Parameter] = {}
    config, owner = None, ""
    for layer in layers:
        for adapter, delta in layer.backslash_delta.items():
            if not delta.requires_grad:
                continue
            own = layer.configs[adapter]
            if config is not None and (own.penalty(), own.schedule()) != (config.penalty(), config.schedule()):
                raise ValueError(
                    f"the adapters {owner!r} and {adapter!r} are trained together, with different penalties: give "
                    "their BackSlashConfig the same settings, or train one after the other."
                )
            config, owner = own, adapter
            name = f"{layer.name}.backslash_delta.{adapter}"
            # another model's layer may have the same name
            found[name if name not in found else f"{name}.{len(found)}"] = delta
    return config, found


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _known.get(optimizer) == count:
        return
    _known[optimizer] = count
    from ...training.backslash import BackSlash

    before = _own.pop(optimizer, None)
    if before is not None:
        before.detach()  # parameters were added
    if any(isinstance(getattr(hook, "__self__", None), BackSlash) for hook in _hooks(optimizer)):
        return  # a Trainer's callback, or the user, has attached one
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    mine = [layer for layer in _layers if any(id(p) in stepped for p in layer.backslash_delta.values())]
    config, deltas = trained(mine)
    deltas = {name: p for name, p in deltas.items() if id(p) in stepped}
    if deltas and config.lambda_ > 0:
        # what is registered now runs in this very step already
        penalty = _own[optimizer] = BackSlash(dict(sorted(deltas.items())), **config.penalty())
        penalty.steps = before.steps if before is not None else 0
        penalty.attach(optimizer)


def _hooks(optimizer: Any) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]

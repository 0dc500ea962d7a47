"""The optimizer whose steps the penalty follows."""

from __future__ import annotations

from typing import Any

import torch


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers, which is the one that sees the true step.

    Raises:
        TypeError: there is none, or it calls no hooks.
    """
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer or a wrapper of one, got {type(inner).__name__}.")
    if not getattr(type(inner).step, "hooked", False) or "DummyOptimizer" in type(inner).__name__:
        raise TypeError(
            f"{type(inner).__name__} calls no step hooks, so the penalty cannot follow its steps: use another "
            "optimizer, or call BackSlash.step(lr) yourself."
        )
    return inner

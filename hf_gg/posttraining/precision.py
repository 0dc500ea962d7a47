"""Routers of a model in half precision: trained in float32, rounded at every forward pass.

A step of 1e-5 is lost on a bfloat16 weight of 0.02. So the parameter becomes float32 and a parametrization rounds it:
the forward pass is what the model computes in the end, with rounded weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from .routers import Router


class Rounded(nn.Module):
    """A parametrization that gives a parameter in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


Changed = tuple[nn.Module, str, nn.Parameter]


def keep_in_float32(routers: Sequence[Router]) -> list[Changed]:
    """Make float32 parameters of those in half precision, as long as a training runs.

    Returns:
        Module, name and the parameter itself, for `round_back`.

    Raises:
        ValueError: one is sharded already.
    """
    changed = []
    for router in routers:
        for name, parameter in list(router.module.named_parameters(recurse=False)):
            if not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
                continue
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"{router.name}.{name} is sharded and {parameter.dtype}, in which small steps are lost: load the "
                    "model with dtype=torch.float32, and use bf16=True for mixed precision."
                )
            exact = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            parametrize.register_parametrization(router.module, name, Rounded(parameter.dtype), unsafe=True)
            router.module.parametrizations[name].original = exact  # type: ignore[union-attr, operator, index]
            changed.append((router.module, name, parameter))
    return changed


@torch.no_grad()
def round_back(changed: Sequence[Changed]) -> None:
    """Put the parameters that `keep_in_float32` changed back, with the rounded values."""
    for module, name, parameter in changed:
        parameter.copy_(getattr(module, name))
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, parameter)

"""Other packages' layers in a whole model, in place of the layers that ours would quantize."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..nn import RF8Linear
from .contenders import Layer, check, make


class PeerLayer(nn.Module):
    """A contender's product, and the layer's own bias."""

    def __init__(self, layer: Layer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def with_peer(name: str, plain: nn.Module, ours: nn.Module) -> tuple[nn.Module, int]:
    """A copy of a model with a contender's layers, each checked on one row, and the bytes of its weights.

    Args:
        name: of the contender.
        plain: the model in bfloat16.
        ours: the same, quantized: what it has in RF8Linear is replaced.

    Raises:
        CannotRun: the contender does not run here. WrongResult: a layer is wrong.
    """
    model = copy.deepcopy(plain)
    size = model.get_memory_footprint()  # type: ignore[operator]  # of Transformers' models
    for path, module in ours.named_modules():
        if not isinstance(module, RF8Linear):
            continue
        old = model.get_submodule(path)
        weight = old.weight.T if module.fan_in_fan_out else old.weight
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)  # type: ignore[union-attr]
        made = make(name, linear)
        x = torch.randn(1, module.in_features, device=linear.weight.device).to(linear.weight.dtype)
        check(name, made, linear, x)
        size += made.bytes - linear.weight.nbytes
        model.set_submodule(path, PeerLayer(made.layer, old.bias))  # type: ignore[arg-type]
    return model.eval(), size

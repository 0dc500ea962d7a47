"""A few numbers of the base model in an adapter's file, by which another model of the same shapes is known."""

from __future__ import annotations

from typing import Any

import torch

from .methods import other_model


KEY = "backslash_base"
_PLACES = 64  # of each matrix
_LEAST = (
    0.5  # mean cosine; a base in 4 bits has 0.99, one with other weights less than 0.5 at four standard deviations
)


@torch.no_grad()
def probe(layers: dict[str, Any]) -> torch.Tensor:
    """Numbers of each base matrix, bfloat16 [layers, 64]: at places that follow from its size. NaN where it is away.

    Args:
        layers: `BackSlashLayer` by name, in an order that is the same when the adapter is loaded.
    """
    rows = []
    for layer in layers.values():
        base = layer.get_base_layer()
        if any(parameter.is_meta for parameter in base.parameters()):
            rows.append(torch.full((_PLACES,), torch.nan))
            continue
        weight = base.dequantize() if hasattr(base, "weight_scale") else base.weight
        weight = weight.T if layer.transposed else weight
        places = torch.arange(1, _PLACES + 1, device=weight.device) * 2654435761 % weight.numel()
        place = places // layer.columns, places % layer.columns
        values = weight[place].float()
        for name in layer.merged_adapters:
            if name in layer.backslash_delta:
                values -= layer.backslash_delta[name].to(weight.device)[place].float()
        rows.append(values.cpu())
    return torch.stack(rows).bfloat16() if rows else torch.zeros(0, _PLACES, dtype=torch.bfloat16)


def check_probe(stored: torch.Tensor, layers: dict[str, Any]) -> None:
    """Compare with what an adapter's file holds.

    Raises:
        ValueError: the base model's weights are others, or the numbers are damaged.
    """
    found = probe(layers)
    if stored.shape != found.shape or not stored.is_floating_point():
        raise ValueError(
            f"{KEY} is damaged: it holds {stored.dtype} {[*stored.shape]}, not one row of {_PLACES} for each of "
            f"{len(layers)} matrices. Download or save the adapter again."
        )
    cosine = torch.cosine_similarity(stored.float().to(found.device), found.float(), dim=1)
    known = cosine.isfinite() & (stored.float().abs().sum(1).to(found.device) > 0) & (found.float().abs().sum(1) > 0)
    if bool(known.any()) and float(cosine[known].mean()) < _LEAST:
        raise other_model(
            f"the base model's weights are not those that the adapter was trained on (likeness "
            f"{float(cosine[known].mean()):.2f} of 1)"
        )

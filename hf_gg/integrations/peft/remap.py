"""A monotone map of a weight, and its gradients in the two factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...training.deepshape import magnitudes
from ...training.parts import blocks
from ...training.shapemap import ShapeMap, Table


# of the difference quotient in ln of the factor on the shape
_H = 1e-4


@dataclass(frozen=True)
class Function:
    """The table of a map for the magnitudes of one weight; None if all are zero."""

    table: Table | None

    def write(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Put the map of `weight` into `out`, of the same layout."""
        if self.table is None:
            out.zero_()
            return
        for source, target in zip(blocks(weight), blocks(out)):
            target.copy_(self.table(source))


def function_of(shape_map: ShapeMap, weight: torch.Tensor) -> Function:
    """The map for a weight."""
    low, high = magnitudes([weight])
    return Function(shape_map.table(low, high) if high > 0 else None)


class Remap(torch.autograd.Function):
    """T(W), given as `mapped`, with gradients in the logarithms of the factors.

    T grows in proportion to the one of the deviation; in that of the shape, the slope of ln |T| depends on |W| alone,
    and is the difference of two tables.
    """

    @staticmethod
    def forward(ctx, factors: torch.Tensor, weight: torch.Tensor, mapped: torch.Tensor, map_with: Callable):
        ctx.save_for_backward(factors, weight, mapped)
        ctx.map_with = map_with
        return mapped.detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> Any:
        factors, weight, mapped = ctx.saved_tensors
        slopes = _slope_table(ctx.map_with, float(factors[0].exp()), weight)
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        if slopes is not None:
            grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
            for g, w, t in zip(blocks(grad), blocks(weight), blocks(mapped)):
                product = g.double() * t.double()
                sums[0] += (product * slopes.log(w)).sum()
                sums[1] += product.sum()
        return sums.to(factors.dtype), None, None, None


def _slope_table(map_with: Callable[[float], ShapeMap], factor: float, weight: torch.Tensor) -> Table | None:
    """d ln |T| / d ln(factor on the shape), by ln |W|."""
    low, high = magnitudes([weight])
    if high == 0:
        return None
    above, below = (map_with(factor * math.exp(h)).table(low, high) for h in (_H, -_H))
    return Table(
        above.first,
        above.step,
        (above.values - below.values) / (2 * _H),
        (above.slopes - below.slopes) / (2 * _H),
    )

"""The steps of the penalty on flat blocks, in place: proximal, plain, with stochastic rounding; and masks of zeros."""

from __future__ import annotations

import math
import threading

import torch

from .parts import BLOCK


_thread = threading.local()


def scratch(block: torch.Tensor, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """`count` temporaries of a block's size. On a CPU they are this thread's own and kept: fresh pages cost more than
    the arithmetic."""
    size = block.numel()
    if block.device.type != "cpu":
        return [torch.empty(size, dtype=dtype, device=block.device) for _ in range(count)]
    kept = getattr(_thread, f"{dtype}", None)
    if kept is None or kept[0].numel() < size or len(kept) < count:
        kept = [torch.empty(max(size, BLOCK), dtype=dtype) for _ in range(max(count, 3))]
        setattr(_thread, f"{dtype}", kept)
    return [buffer[:size] for buffer in kept[:count]]


def shrink_(w: torch.Tensor, step: float, shape: float, scale: float, eps: float) -> None:
    """w moves towards zero by step · ν (|w|/scale + ε)^(ν−1), and stops there.

    Args:
        w: flat float32 or float64 block, changed in place.
        step: at least 0.
        shape: ν > 0.
        scale: the unit of |w|, > 0.
        eps: ε ≥ 0.
    """
    if shape == 1:
        torch.ops.aten.softshrink.out(w, step, out=w)
        return
    a, b = scratch(w, 2, w.dtype)
    _slope(w, shape, scale, eps, step, a)
    torch.neg(a, out=b)
    torch.clamp(w, b, a, out=b)
    w.sub_(b)


def plain_(w: torch.Tensor, step: float, shape: float, eps: float) -> None:
    """w -= step · ν · sign(w) (|w| + ε)^(ν−1): the reference form, which may carry a weight across zero."""
    a, b = scratch(w, 2, w.dtype)
    _slope(w, shape, 1.0, eps, step, a)
    torch.sign(w, out=b)
    w.addcmul_(a, b, value=-1)


def _slope(w: torch.Tensor, shape: float, scale: float, eps: float, step: float, out: torch.Tensor) -> None:
    """step · ν (|w|/scale + ε)^(ν−1). Two functions of one argument each: `pow` costs three times as much."""
    torch.abs(w, out=out)
    torch.mul(out, 1 / scale, out=out).add_(eps)
    factor = step * shape
    if shape == 2:
        out.mul_(factor)
    elif factor == 0:
        out.zero_()
    else:
        out.log2_().mul_(shape - 1).add_(math.log2(factor)).exp2_()


def penalty(w: torch.Tensor, shape: float, scale: float, eps: float) -> torch.Tensor:
    """Σ scale · (|w|/scale + ε)^ν of a flat block, float64, 0-d."""
    return (w.double().abs().div_(scale).add_(eps)).pow_(shape).sum().mul_(scale)


def widened(block: torch.Tensor) -> torch.Tensor:
    """A bfloat16 block in a float32 temporary; other blocks themselves."""
    if block.dtype != torch.bfloat16:
        return block
    return scratch(block, 3)[2].copy_(block)


def round_into_(block: torch.Tensor, value: torch.Tensor, generator: torch.Generator) -> None:
    """Store float32 values in a bfloat16 block, rounded up or down at random so that the mean is kept.

    A step below half a unit of the last place would otherwise vanish. Zeros stay zeros; `value` is changed.
    """
    (noise,) = scratch(block, 1, torch.int32)
    noise.random_(0, 1 << 16, generator=generator)
    value.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    block.copy_(value)


def pack_zeros(w: torch.Tensor) -> torch.Tensor:
    """Where a flat block is zero, one bit a value: bit k of byte i is value k · n/8 + i. uint8 [ceil(n / 8)]."""
    zero = w == 0
    eighth = -(-len(w) // 8)
    packed = torch.zeros(eighth, dtype=torch.uint8, device=w.device)
    for bit, part in enumerate(zero.view(torch.uint8).split(eighth)):
        packed[: len(part)].bitwise_or_(part << bit)
    return packed


def fill_zeros_(w: torch.Tensor, packed: torch.Tensor) -> None:
    """Set to zero what `pack_zeros` found."""
    for bit, part in enumerate(w.split(len(packed))):
        part.masked_fill_((packed[: len(part)] & (1 << bit)).view(torch.uint8) != 0, 0)


def moments(block: torch.Tensor) -> torch.Tensor:
    """Σ|w| and Σw² of a flat block, float64 [2] on the block's device."""
    w = widened(block)
    (a,) = scratch(w, 1, w.dtype)
    first, second = torch.abs(w, out=a).sum(), torch.dot(w, w)
    if not 1e-25 < float(second) < math.inf:  # squares that leave the range of float32
        w = w.double()
        first, second = w.abs().sum(), torch.dot(w, w)
    return torch.stack([first.double(), second.double()])

"""How many bits weights cost on a uniform grid, as `hf_gg.coding` codes them, and how many of them are zero."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..coding.levels import size_of_levels
from .parts import Part, blocks


MAX_LEVELS = 1 << 24


@dataclass(frozen=True)
class Rate:
    """What weights cost on a grid.

    Attributes:
        numel: number of weights.
        bits: bits a weight: size of the levels as `hf_gg.coding.levels` codes each tensor, within 1 % from some
            16,000 weights on; smaller tensors are coded in up to a tenth less (at 1,000 weights).
        codebook_bits: what that is above their order-0 entropy: tables of frequencies, headers, states of the coder.
        sparsity: share of weights on level zero.
        zeros: share of weights that are exactly zero.
    """

    numel: int
    bits: float
    codebook_bits: float
    sparsity: float
    zeros: float

    @classmethod
    def of(cls, rates: Iterable[Rate]) -> Rate:
        """Several tensors together."""
        rates = list(rates)
        total = sum(rate.numel for rate in rates)
        mean = {
            name: sum(getattr(rate, name) * rate.numel for rate in rates) / max(total, 1)
            for name in ("bits", "codebook_bits", "sparsity", "zeros")
        }
        return cls(total, **mean)


@dataclass
class Levels:
    """How often each level of a grid occurs: `counts[i]` times level `i - offset`; and exact zeros."""

    counts: torch.Tensor
    offset: int
    zeros: int

    def merge(self, other: Levels) -> Levels:
        """Both together."""
        offset = max(self.offset, other.offset)
        end = max(len(x.counts) - x.offset for x in (self, other))
        counts = torch.zeros(offset + end, dtype=torch.int64)
        for x in (self, other):
            counts[offset - x.offset : offset - x.offset + len(x.counts)] += x.counts
        return Levels(counts, offset, self.zeros + other.zeros)

    def rate(self) -> Rate:
        """What they cost."""
        present = self.counts[self.counts > 0].double()
        n = max(int(self.counts.sum()), 1)
        entropy = float((present * (n / present).log2()).sum()) / n
        bits = 8 * size_of_levels(self.counts, self.offset) / n if len(present) else 0.0
        return Rate(n, bits, bits - entropy, float(self.counts[self.offset]) / n, self.zeros / n)


def levels_of(part: Part, grid: float) -> Levels:
    """The levels round(w / grid) of what this process holds.

    Raises:
        ValueError: a weight is not finite, or the grid is far too fine.
    """
    total = Levels(torch.zeros(1, dtype=torch.int64), 0, 0)
    local = part.local()
    for block in blocks(local) if local is not None else ():
        scaled = torch.round(block.float() / grid)
        low, high = (float(x) for x in torch.aminmax(scaled))
        if not high - low < MAX_LEVELS:
            raise ValueError(
                f"{part.name} has weights of up to {float(block.abs().max()):g}: a grid of {grid:g} has too many "
                "levels for them. Choose a coarser grid; weights that are not finite mean that training has failed."
            )
        counts = torch.bincount(scaled.sub_(low).long().flatten()).cpu()
        if low > 0 or low + len(counts) <= 0:  # level zero is always there
            counts = torch.nn.functional.pad(counts, (max(int(low), 0), max(-int(low) - len(counts) + 1, 0)))
            low = min(low, 0.0)
        total = total.merge(Levels(counts, -int(low), int((block == 0).sum())))
    return total


def measure(parts: Iterable[Part], grid: float) -> dict[str, Rate]:
    """The rate of each part, summed over the processes that share it; every process must call it."""
    parts = list(parts)
    found = [levels_of(part, grid) for part in parts]
    shared: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        for group in part.groups:
            shared.setdefault(group, []).append(index)
    for group, indices in shared.items():
        gathered: list[Any] = [None] * dist.get_world_size(group)
        mine = [(found[i].counts.tolist(), found[i].offset, found[i].zeros) for i in indices]
        dist.all_gather_object(gathered, mine, group=group)
        for place, index in enumerate(indices):
            every = [Levels(torch.tensor(g[place][0]), *g[place][1:]) for g in gathered]
            found[index] = functools.reduce(Levels.merge, every)
    return {part.name: levels.rate() for part, levels in zip(parts, found)}

"""The part of each parameter that this process holds, in flat blocks, and sums over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard


# Values handled at once on a CPU: a block and its two temporaries stay in the cache of a core.
BLOCK = 1 << 16
BLOCK_DEVICE = 1 << 24


@dataclass(eq=False)
class Part:
    """What this process holds of one parameter.

    Attributes:
        name: of the parameter.
        tensor: the parameter (a `DTensor` too), or a view into a flat partition; None if this process has none of it.
        numel: number of values of the whole parameter.
        owner: the tensor that the optimizer steps: the parameter itself, or the flat partition around it.
        groups: process groups over which the parameter is split.
    """

    name: str
    tensor: torch.Tensor | None
    numel: int
    owner: torch.Tensor
    groups: tuple[Any, ...] = ()

    def local(self) -> torch.Tensor | None:
        """The values of this process as a plain tensor that shares their memory."""
        tensor = self.tensor
        if tensor is None:
            return None
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def part_of(name: str, parameter: torch.Tensor) -> Part:
    """The part of a parameter, whole or a `DTensor`.

    Raises:
        TypeError: not a tensor, or not of a dtype that can be trained. ValueError: on the meta device, or a `DTensor`
            of partial sums.
    """
    if not isinstance(parameter, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}: pass (name, parameter) pairs.")
    if not parameter.is_floating_point():
        raise TypeError(
            f"{name} is {parameter.dtype}: quantized codes cannot be trained. Leave it out, or load the model without "
            "quantization (or call model.dequantize()) to train it."
        )
    if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"{name} is {parameter.dtype}: train in float32, or in bfloat16.")
    if parameter.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load the weights first.")
    return share_of(name, parameter)


def share_of(name: str, parameter: torch.Tensor) -> Part:
    """The part of a parameter of any dtype, to look at only.

    Raises:
        ValueError: a `DTensor` of partial sums.
    """
    groups = []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                groups.append(mesh.get_group(dim))
            elif not isinstance(placement, Replicate):
                raise ValueError(f"{name} is placed as {placement}: only shards and replicas can be trained.")
    return Part(name, parameter, parameter.numel(), parameter, tuple(groups))


def blocks(tensor: torch.Tensor, size: int | None = None) -> Iterator[torch.Tensor]:
    """Cut a tensor into flat views of at most `size` values that share its memory."""
    if tensor.numel() == 0:
        return
    strides = tensor.stride()
    tensor = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    if tensor.is_contiguous() or tensor.ndim == 1:
        flat = tensor.view(-1) if tensor.ndim != 1 else tensor
        yield from flat.split(size or (BLOCK if tensor.device.type == "cpu" else BLOCK_DEVICE))
    else:
        for row in tensor:
            yield from blocks(row, size)


def sum_over_processes(table: torch.Tensor, parts: Iterable[Part]) -> torch.Tensor:
    """Add the rows of `table` [parts, values] over the processes that share each part.

    Every process must call it with the same parts. The table is returned; it is changed in place.
    """
    rows: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        for group in part.groups:
            rows.setdefault(group, []).append(index)
    for group, indices in rows.items():
        # NCCL takes no tensor of the CPU
        backend = dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else table.device
        total = table[indices].to(device)
        dist.all_reduce(total, group=group)
        table[indices] = total.to(table.device)
    return table

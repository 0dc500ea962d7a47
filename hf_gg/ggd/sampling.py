"""Draws from the generalized Gaussian distribution, into a tensor that is there already.

A generalized Gaussian of shape ν and scale α is a uniform distribution of random width: with G from
Gamma(1 + 1/ν) and V uniform on [-1, 1), X = α · G^(1/ν) · V. The usual |X| = α · Gamma(1/ν)^(1/ν) needs gamma variates
of a small shape, which underflow for large ν; here the gamma's shape is never below 1, and the sign comes with V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


MIN_SHAPE, MAX_SHAPE = 0.1, 8.0

# Elements that are drawn at a time. The values depend on it.
_CHUNK = 1 << 20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(shape: float) -> float:
    """The shape as a float.

    Raises:
        ValueError: it is no number from 0.1 to 8.
    """
    number = isinstance(shape, (int, float)) and not isinstance(shape, bool)
    if not number or not MIN_SHAPE <= shape <= MAX_SHAPE:
        raise ValueError(
            f"shape must be a number from {MIN_SHAPE} to {MAX_SHAPE:g} (2 is Gaussian, 1 Laplace), got {shape!r}."
        )
    return float(shape)


@torch.no_grad()
def gg_(tensor: torch.Tensor, std: float, shape: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Fill a tensor with independent draws from a generalized Gaussian of mean 0, in place.

    The draws come from torch's own generator, a million at a time, in row-major order whatever the strides. In
    float16 and bfloat16 they are drawn in float32 and rounded. Draws of shape 2 in float32 are those of
    `torch.nn.init.normal_` on a CPU. Nothing becomes infinite: a draw beyond the dtype's largest number becomes that.

    Every process of a DTensor draws the whole of it and keeps its part. So the values are those of one process,
    replicas are equal, and torch's generators stay in step; for a moment a process holds the whole tensor. The
    processes of the mesh must call this together. Where their generators differ, that of the mesh's first process is
    used, and the others are left as they were.

    Args:
        tensor: float16, bfloat16, float32 or float64, of any shape. On the meta device nothing happens.
        std: standard deviation of the draws, positive.
        shape: 0.1 to 8; 2 is Gaussian, 1 Laplace.
        generator: instead of the device's default one.

    Returns:
        The tensor.

    Raises:
        ValueError: std or shape out of range, or a DTensor that is a pending sum.
        TypeError: another dtype.
    """
    shape = check_shape(shape)
    if not isinstance(std, (int, float)) or isinstance(std, bool) or not 0 < std < math.inf:
        raise ValueError(f"std must be a positive, finite number, got {std!r}.")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"gg_ fills float16, bfloat16, float32 or float64 tensors, got {tensor.dtype}.")
    if std > torch.finfo(tensor.dtype).max:
        raise ValueError(f"std={std!r} is beyond the largest number of {tensor.dtype}.")
    if tensor.is_meta or not tensor.numel():
        return tensor
    if hasattr(tensor, "placements"):
        _fill_shards(tensor, std, shape, generator)
    elif tensor.is_contiguous():
        _fill(tensor.view(-1), std, shape, generator)
    else:
        whole = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        _fill(whole.view(-1), std, shape, generator)
        tensor.copy_(whole)
    return tensor


def _fill(flat: torch.Tensor, std: float, shape: float, generator: torch.Generator | None) -> None:
    """Fill a contiguous one-dimensional tensor."""
    limit = torch.finfo(flat.dtype).max
    for start, stop in _chunks(flat.numel()):
        part = flat[start:stop]
        wide = part if part.element_size() >= 4 else torch.empty_like(part, dtype=torch.float32)
        _draw(wide, std, shape, generator)
        wide.clamp_(-limit, limit)
        if wide is not part:
            part.copy_(wide)


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    """Where chunks start and stop. The last is never tiny: torch draws less than 16 normal numbers in another way."""
    start = 0
    while start < total:
        stop = total if total - start < _CHUNK + 16 else start + _CHUNK
        yield start, stop
        start = stop


def _draw(out: torch.Tensor, std: float, shape: float, generator: torch.Generator | None) -> None:
    if shape == 2:
        out.normal_(0, std, generator=generator)
        return
    # α of unit variance; the exponents are moderate, the gamma functions at shape 0.1 are not: Γ(30) = 9e30
    alpha = std * math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    width = torch._standard_gamma(torch.full_like(out, 1 + 1 / shape), generator=generator).pow_(1 / shape)
    out.uniform_(-1, 1, generator=generator).mul_(width).mul_(alpha)


def _fill_shards(tensor, std: float, shape: float, generator: torch.Generator | None) -> None:
    from torch.distributed.tensor import distribute_tensor

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"A DTensor with placements {tensor.placements} is a pending sum: it holds no values to draw."
        )
    local = tensor.to_local()
    if tensor.device_mesh.get_coordinate() is None:
        return  # this process is none of the mesh
    whole = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
    with _common_generator(tensor.device_mesh, local.device, generator):
        _fill(whole.view(-1), std, shape, generator)
    local.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local())


@contextmanager
def _common_generator(mesh, device: torch.device, generator: torch.Generator | None) -> Iterator[None]:
    """Give all processes of a mesh the random state of its first one, and afterwards those back that had another."""
    import torch.distributed as dist

    if generator is None:
        generator = _default_generator(device)
    own = generator.get_state()
    shared = own.clone().to(_communication_device(mesh))
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(shared, dist.get_global_rank(group, 0), group=group)
    shared = shared.cpu()
    generator.set_state(shared)
    try:
        yield
    finally:
        if not torch.equal(own, shared):
            generator.set_state(own)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


def _communication_device(mesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())

"""Payloads of `hf_gg.coding` decoded on a CUDA device: what crosses the bus is the payload."""

from __future__ import annotations

import numpy as np
import torch

from ...coding import codec
from ...coding import kernels as cpu_kernels
from ...coding.container import RANS, Header
from . import _kernels, _launch
from .config import coder_tiles


MOST_LANES = 32


def decode(payload: torch.Tensor, header: Header, name: str) -> torch.Tensor:
    """Decode the data of a rANS payload.

    Args:
        payload: uint8 [n] on the device (or on the CPU, under Triton's interpreter).
        header: of this payload, read and checked.
        name: of the tensor, for errors.

    Returns:
        uint8 tensor of the encoded shape on the payload's device.

    Raises:
        ValueError: naming the tensor: the data are damaged, or the kernel cannot run on that device.
    """
    if header.coder != RANS:
        raise ValueError(f"{name}: the Triton decoder reads rANS payloads only: decode it on the CPU.")
    _kernels(payload)
    from . import coder_kernels

    try:
        frequencies = codec.frequencies_of(header)
    except ValueError as error:
        raise ValueError(f"{name}: damaged: {error}.") from None
    chunks, device = len(header.lengths), payload.device
    payload = payload.contiguous()
    if payload.data_ptr() % 4 or payload.storage_offset() % 4:  # a view into a file: states are numbers of four bytes
        payload = payload.clone()
    middle = header.size + 4 * header.lanes * chunks
    slots = torch.from_numpy(np.repeat(np.arange(256, dtype=np.uint8), frequencies))
    table = torch.from_numpy(cpu_kernels.packed_table(frequencies).view(np.int32))
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(header.lengths)]))
    out = torch.empty(header.shape, dtype=torch.uint8, device=device)
    found = torch.empty((chunks, MOST_LANES + 1), dtype=torch.int32, device=device)
    arguments = (
        payload[header.size : middle].view(torch.int32),
        payload[middle:].view(torch.int16),
        ends.to(device),
        slots.to(device),
        table.to(device),
        out,
        found,
        header.count,
        header.chunk,
        header.lanes,
    )
    _launch(
        coder_kernels.rans_decode_kernel, (chunks,), coder_tiles(), arguments, BITS=header.bits, MOST_LANES=MOST_LANES
    )
    result = found.cpu().numpy()
    if not result[:, MOST_LANES].all():
        first = int(result[:, MOST_LANES].argmin())
        raise ValueError(f"{name}: damaged: the stream of chunk {first} is damaged.")
    codec.check_hashes(header, result[:, : header.lanes].view(np.uint32), name)
    return out

"""Coded tensors decoded onto any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import coding
from ..coding import codec
from ..coding.container import FIXED, RANS, header_size, read_header
from . import triton as triton_backend


def decode_symbols(
    payload: torch.Tensor,
    name: str = "payload",
    device: torch.device | str | None = None,
    threads: int | None = None,
    expected_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Decode a payload onto a device: on a CUDA device in Triton where it can run, otherwise on the CPU, then moved.

    Args:
        payload: 1-D uint8, on the CPU (better, as its header is read there) or on the device.
        name: of the tensor, for errors.
        device: of the result; that of the payload for None.
        threads: of a decoder on the CPU, at most; torch's number for None.
        expected_shape: the shape that the result must have.

    Returns:
        uint8 tensor of the encoded shape.

    Raises:
        ValueError: naming the tensor, for whatever is wrong with the payload or does not fit the arguments.
    """
    device = payload.device if device is None else torch.device(device)
    if device.type != "cuda" or not triton_backend.available() or payload.dtype != torch.uint8 or payload.ndim != 1:
        return coding.decode(payload.cpu(), name, threads, expected_shape).to(device)
    start = payload[:FIXED].cpu()
    header = payload[: header_size(bytes(start.tolist()))].cpu() if payload.is_cuda else payload
    read = read_header(header.contiguous().numpy(), payload.numel(), name)
    if read.coder != RANS:
        return coding.decode(payload.cpu(), name, threads, expected_shape).to(device)
    codec.check_shape(read, expected_shape, name)
    from .triton import coder

    return coder.decode(payload.to(device), read, name)

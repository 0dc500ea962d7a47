"""Floating-point tensors whose numbers are multiples of one step, coded without loss.

A number is ±magnitude × step. Sign and magnitude become planes of bytes, each coded as the codes of a weight are:

    plane 0: bit 7 the sign, bits 0-6 the lowest seven bits of the magnitude
    plane k: the next eight bits

Only as many planes are there as the largest magnitude needs. Weights of a trained model are small on their grid, so
the first plane holds nearly all, and a rare large one costs next to nothing in the second. Planes know nothing of each
other, which costs 0.03 bits a number at most (a normal distribution whose deviation is about 100 steps). The sign has
a bit of its own because a zero has one too: what comes back is the same to the last bit. That bit is not free: a zero
whose sign is random takes one bit more.

Layout, little-endian: magic `GGLEVEL1`, dtype (1 byte: 0 float32, 1 float16, 2 bfloat16, 3 float64), number of planes
n (1 byte, 1-4), 2 zero bytes, step (float64), n lengths (uint64), CRC-32 of all bytes before it (uint32), and n
payloads of `hf_gg.coding.encode`, which hold the shape.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from . import decode, encode, info
from .codec import size_of_counts


MAGIC = b"GGLEVEL1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIXED = struct.Struct("<8sBBHd")
_MAX_MAGNITUDE = 2**31 - 1
_CHUNK = 2**20
# Numbers whose first plane takes no bytes, at most, if the reader does not know the shape.
_MAX_CONSTANT = 2**29


def is_levels(payload: torch.Tensor) -> bool:
    """Whether a tensor is one that `encode_levels` made, by its first bytes."""
    start = payload[:8] if payload.dtype == torch.uint8 and payload.ndim == 1 else payload.new_empty(0)
    return bytes(start.tolist()) == MAGIC


def nearest_levels(values: torch.Tensor, step: float, name: str = "tensor") -> tuple[torch.Tensor, float]:
    """Round numbers to multiples of a step; zeros lose their sign.

    Args:
        values: floating point, any shape.
        step: positive.
        name: of the tensor, for errors.

    Returns:
        The rounded numbers in the same dtype, and the largest distance to the original ones.

    Raises:
        ValueError: NaN, infinity, or a number of more than 2^31 steps.
    """
    result, largest = torch.empty_like(values, memory_format=torch.contiguous_format), 0.0
    for part, out in zip(_chunks(values), _chunks(result)):
        numbers = part.double()
        levels = _levels(numbers, step, name)
        out.copy_(levels * step + 0.0)  # which takes the sign from a zero
        largest = max(largest, float((out.double() - numbers).abs().max()))
    return result, largest


def encode_levels(values: torch.Tensor, step: float, coder: str = "rans", name: str = "tensor") -> torch.Tensor:
    """Code a tensor of multiples of `step`; `decode_levels` gives the same bits.

    Args:
        values: float16, bfloat16, float32 or float64, any shape.
        step: of the grid, positive.
        coder: `"rans"` or `"eg0"`.
        name: of the tensor, for errors.

    Returns:
        uint8 [bytes].

    Raises:
        ValueError: a number that is no multiple of the step, NaN, infinity, more than 2^31 steps.
        TypeError: another dtype.
    """
    if values.dtype not in _DTYPES:
        raise TypeError(f"{name}: numbers on a grid are floating point of 16 bits or more, got {values.dtype}.")
    values = values.detach().cpu().contiguous()
    planes = [torch.zeros(values.shape, dtype=torch.uint8)]
    bits, off = _SAME_SIZE[values.element_size()], 0.0
    for index, part in enumerate(_chunks(values)):
        levels = _levels(part.double(), step, name)
        back = (levels * step).to(part.dtype)
        if not torch.equal(back.view(bits), part.view(bits)):
            off = max(off, float((back.double() - part.double()).abs().max()))
            continue
        magnitude = levels.abs().long()
        place = slice(index * _CHUNK, index * _CHUNK + part.numel())
        planes[0].view(-1)[place] = (magnitude & 127) | (torch.signbit(part).long() << 7)
        magnitude >>= 7
        k = 1
        while int(magnitude.max()):
            if k == len(planes):
                planes.append(torch.zeros_like(planes[0]))
            planes[k].view(-1)[place] = magnitude & 255
            magnitude >>= 8
            k += 1
    if off:
        raise ValueError(f"{name} is not on the grid of {step:g}: a number lies {off:.3g} beside it.")
    payloads = [encode(plane, coder, name=name) for plane in planes]
    head = _FIXED.pack(MAGIC, _DTYPES.index(values.dtype), len(planes), 0, step)
    head += struct.pack(f"<{len(planes)}Q", *(payload.numel() for payload in payloads))
    head += struct.pack("<I", zlib.crc32(head))
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *payloads])


def size_of_levels(counts: torch.Tensor, offset: int) -> float:
    """Bytes that `encode_levels` needs for levels that were only counted, within 1 %.

    Args:
        counts: how often each level occurs, int64: `counts[i]` times level `i - offset`.
        offset: index of level zero.
    """
    occurs = counts.nonzero()[:, 0]
    numbers, levels = counts[occurs].numpy(), (occurs - offset).numpy()
    magnitude, total = np.abs(levels), int(numbers.sum())
    planes = [magnitude & 127 | (levels < 0) << 7]
    magnitude = magnitude >> 7
    while magnitude.any():
        planes.append(magnitude & 255)
        magnitude = magnitude >> 8
    sizes = [size_of_counts(np.bincount(plane, numbers, 256).astype(np.int64), (total,)) for plane in planes]
    return _FIXED.size + 8 * len(planes) + 4 + sum(sizes)


def read_levels_header(payload: torch.Tensor, name: str = "tensor") -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of the tensor in a payload, as `decode_levels` would give it.

    Raises:
        ValueError: a damaged header, or another length than it says.
    """
    dtype, _, payloads = _parse(payload, name)
    return dtype, info(payloads[0], name).shape


def decode_levels(
    payload: torch.Tensor,
    name: str = "tensor",
    threads: int | None = None,
    expected_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """The tensor that `encode_levels` coded.

    Args:
        payload: uint8 [bytes].
        name: of the tensor, for errors.
        threads: at most so many; torch's number for None.
        expected_shape: the shape that the result must have.

    Raises:
        ValueError: the payload is damaged, of another shape, or claims more than 2^29 numbers that are all the same,
            which only an expected shape can justify.
    """
    dtype, step, payloads = _parse(payload, name)
    said = info(payloads[0], name)
    shape = said.shape
    if expected_shape is not None and shape != tuple(expected_shape):
        raise ValueError(f"{name} is coded with shape {[*shape]}, expected {[*expected_shape]}.")
    if expected_shape is None and said.coder == "constant" and math.prod(shape) > _MAX_CONSTANT:
        raise ValueError(f"{name} claims {math.prod(shape)} numbers without any data: give expected_shape.")
    planes = [decode(part, name, threads, expected_shape=shape).view(-1) for part in payloads]
    result = torch.empty(shape, dtype=dtype)
    for index, out in enumerate(_chunks(result)):
        place = slice(index * _CHUNK, index * _CHUNK + out.numel())
        magnitude = (planes[0][place] & 127).long()
        for k, plane in enumerate(planes[1:]):
            magnitude |= plane[place].long() << (7 + 8 * k)
        numbers = magnitude.double() * step
        out.copy_(torch.where(planes[0][place] > 127, -numbers, numbers))
        if not bool(torch.isfinite(out).all()):
            raise ValueError(f"{name} is damaged: levels of {step:g} go beyond {dtype}. Download or save it again.")
    return result


def _parse(payload: torch.Tensor, name: str) -> tuple[torch.dtype, float, list[torch.Tensor]]:
    damaged = f"{name} is damaged"
    if not is_levels(payload):
        raise ValueError(f"{damaged}: no coded numbers start with its first bytes. Download or save it again.")
    head = bytes(payload[: _FIXED.size].tolist())
    if len(head) < _FIXED.size:
        raise ValueError(f"{damaged}: {payload.numel()} bytes, shorter than a header. Download or save it again.")
    _, dtype, count, zero, step = _FIXED.unpack(head)
    end = _FIXED.size + 8 * count + 4
    head = bytes(payload[:end].tolist())
    if not 1 <= count <= 4 or dtype >= len(_DTYPES) or zero or not 0 < step < float("inf") or len(head) < end:
        raise ValueError(f"{damaged}: its header holds impossible numbers. Download or save it again.")
    if zlib.crc32(head[:-4]) != struct.unpack("<I", head[-4:])[0]:
        raise ValueError(f"{damaged}: its header does not fit its checksum. Download or save it again.")
    lengths = struct.unpack(f"<{count}Q", head[_FIXED.size : -4])
    if end + sum(lengths) != payload.numel():
        raise ValueError(
            f"{damaged}: it should have {end + sum(lengths)} bytes, and has {payload.numel()}. Download or save it "
            "again."
        )
    return _DTYPES[dtype], step, list(payload[end:].split(list(lengths)))


def _levels(numbers: torch.Tensor, step: float, name: str) -> torch.Tensor:
    """Levels of float64 numbers, as float64 (a level of zero keeps its sign)."""
    levels = (numbers / step).round()
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{name} holds NaN or infinity, which no grid holds: repair the model.")
    if float(levels.abs().max()) > _MAX_MAGNITUDE:
        raise ValueError(f"{name} holds numbers of more than 2^31 steps of {step:g}: take a larger step.")
    return levels


def _chunks(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of at most a million numbers in the order of memory; none of an empty tensor."""
    return values.reshape(-1).split(_CHUNK) if values.numel() else ()

"""Tensors to payloads and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import models, rans
from .container import CONSTANT, GGD, GOLOMB, NO_MODEL, RANS, TABLE, Header, read_header, write_header
from .hashing import checksum, lane_hashes


CODERS = ("rans", "eg0")
CHUNK = 1 << 16  # symbols, about
MAX_LANES = 32
# Symbols a lane, at least: each costs 16 bits.
LANE = 2048
# A tensor of one symbol takes no bits at any size. Above this size the reader must say that it expects the shape.
MAX_CONSTANT = 1 << 32


@dataclass(frozen=True)
class Info:
    """What a payload says about itself: names of coder and model, shape, size in bytes, bits a symbol."""

    coder: str
    model: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_symbol: float


def encode(symbols: torch.Tensor, coder: str = "rans", name: str = "symbols") -> torch.Tensor:
    """Encode uint8 symbols of any shape.

    Args:
        symbols: uint8 codes.
        coder: `"rans"`, or `"eg0"` (exp-Golomb on frequency ranks).
        name: of the tensor, for errors.

    Returns:
        The payload, 1-D uint8 on the CPU.

    Raises:
        TypeError: the symbols are not uint8. ValueError: an unknown coder.
    """
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}, got {coder!r}.")
    if symbols.dtype != torch.uint8:
        raise TypeError(f"{name}: symbols must be uint8, got {symbols.dtype}.")
    shape = tuple(symbols.shape)
    flat = symbols.detach().cpu().contiguous().view(-1)
    counts = models.count_symbols(flat)
    if (counts > 0).sum() < 2:
        header = Header(CONSTANT, NO_MODEL, shape, symbol=int(counts.argmax()))
        return torch.frombuffer(bytearray(write_header(header)), dtype=torch.uint8)
    return _encode_rans(flat.numpy(), counts, shape)


def decode(
    payload: torch.Tensor,
    name: str = "payload",
    threads: int | None = None,
    expected_shape: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode a payload; nothing in it is trusted.

    Args:
        payload: 1-D uint8.
        name: of the tensor, for errors.
        threads: at most so many; torch's number for None.
        expected_shape: the shape that the result must have.
        out: contiguous uint8 tensor of the payload's shape on the CPU that is filled and returned.

    Returns:
        uint8 tensor of the encoded shape. If an error is raised, `out` holds anything.

    Raises:
        ValueError: naming the tensor, for whatever is wrong with the payload or does not fit the arguments.
    """
    data = _bytes_of(payload, name)
    header = read_header(data, name)
    if expected_shape is not None and header.shape != tuple(expected_shape):
        raise ValueError(f"{name}: the payload has the shape {[*header.shape]}, expected {[*expected_shape]}.")
    if out is not None:
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"{name}: out must be a contiguous uint8 tensor on the CPU.")
        if tuple(out.shape) != header.shape:
            raise ValueError(f"{name}: the payload has the shape {[*header.shape]}, out {[*out.shape]}.")
    elif header.coder == CONSTANT and expected_shape is None and header.count > MAX_CONSTANT:
        raise ValueError(f"{name}: {header.count} equal symbols without an expected shape: give expected_shape.")
    frequencies = _frequencies(header, name)
    result = torch.empty(header.shape, dtype=torch.uint8) if out is None else out
    if header.coder == CONSTANT:
        return result.fill_(header.symbol)
    flat = result.detach().view(-1).numpy()
    hashes = _decode_rans(data, header, frequencies, flat)
    if hashes is None:
        raise ValueError(f"{name}: damaged: the stream of a chunk does not end where it should.")
    if checksum(hashes) != header.checksum:
        raise ValueError(f"{name}: damaged: the checksum of the decoded symbols does not fit.")
    return result


def info(payload: torch.Tensor, name: str = "payload") -> Info:
    """What the header of a payload says; the data behind it are not looked at.

    Raises:
        ValueError: the header is damaged.
    """
    header = read_header(_bytes_of(payload, name), name)
    coder = {CONSTANT: "constant", RANS: "rans", GOLOMB: "eg0"}[header.coder]
    model = {NO_MODEL: "none", TABLE: "table", GGD: "ggd"}[header.model]
    bits = 8 * payload.numel() / header.count if header.count else math.nan
    return Info(coder, model, header.shape, payload.numel(), bits)


def _bytes_of(payload: torch.Tensor, name: str) -> np.ndarray:
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise ValueError(f"{name}: a payload is 1-D uint8, got {payload.dtype} {[*payload.shape]}.")
    return payload.detach().cpu().contiguous().numpy()


def _layout(count: int) -> tuple[int, int]:
    """Symbols a chunk and log2 of the lanes."""
    log2_lanes = max(0, min(MAX_LANES, count // LANE).bit_length() - 1)
    lanes, chunks = 1 << log2_lanes, max(1, round(count / CHUNK))
    return -(-count // (chunks * lanes)) * lanes, log2_lanes


def _encode_rans(symbols: np.ndarray, counts: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    chunk, log2_lanes = _layout(len(symbols))
    bits = 14
    frequencies = models.normalize(counts, bits)
    parameters = models.write_table(frequencies, bits)
    states, words = rans.encode(symbols, chunk, 1 << log2_lanes, frequencies, bits)
    header = Header(
        RANS,
        TABLE,
        shape,
        checksum=checksum(lane_hashes(symbols, chunk, 1 << log2_lanes)),
        bits=bits,
        log2_lanes=log2_lanes,
        chunk=chunk,
        parameters=parameters,
        lengths=np.array([len(part) for part in words], np.int64),
    )
    parts = [write_header(header), states.astype("<u4").tobytes(), *(part.astype("<u2").tobytes() for part in words)]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _frequencies(header: Header, name: str) -> np.ndarray | None:
    if header.coder == CONSTANT:
        return None
    if header.coder == RANS and not models.MIN_BITS <= header.bits <= models.MAX_BITS:
        raise ValueError(f"{name}: damaged: frequencies of {header.bits} bits.")
    try:
        return models.read_table(header.parameters, header.bits)
    except ValueError as error:
        raise ValueError(f"{name}: damaged: {error}.") from None


def _decode_rans(data: np.ndarray, header: Header, frequencies: np.ndarray, out: np.ndarray) -> np.ndarray | None:
    end = header.size + 4 * header.lanes * len(header.lengths)
    states = np.frombuffer(data[header.size : end].tobytes(), "<u4").reshape(-1, header.lanes)
    words = np.frombuffer(data[end:].tobytes(), "<u2")
    return rans.decode(states, words, header.lengths, out, header.chunk, frequencies, header.bits)

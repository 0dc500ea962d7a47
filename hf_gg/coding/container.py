"""The header of a payload: written, and read without trust. `docs/coded-checkpoints.md` has the layout."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from .models import MAX_BITS, MIN_BITS
from .reference import MAX_ORDER


MAGIC = b"\x89GGC"
VERSION = 1
CONSTANT, RANS, GOLOMB = 0, 1, 2
NO_MODEL, TABLE, GGD = 0, 1, 2
MAX_DIMENSIONS = 16
MAX_COUNT = 1 << 48
MAX_LOG2_LANES = 5
# Symbols of one lane in one chunk, at most: bounds what a payload of a size can decode to.
MAX_ROWS = 4096
FIXED = 16  # bytes: magic, version, coder, model, dimensions, checksum of the header, length of the header


@dataclass
class Header:
    """What a payload says before its data.

    Attributes:
        coder: CONSTANT, RANS or GOLOMB.
        model: NO_MODEL, TABLE or GGD.
        shape: of the decoded tensor.
        checksum: of the decoded symbols (`hashing.py`).
        symbol: of a CONSTANT payload.
        bits: precision of the frequencies (RANS), or the order of the code (GOLOMB).
        log2_lanes: of the number of interleaved lanes.
        chunk: symbols a chunk, a multiple of the lanes; the last chunk may be shorter.
        parameters: of the model.
        lengths: of the chunks' streams, in 16-bit words, int64 [chunks].
        size: bytes of the header, where the data begins.
    """

    coder: int
    model: int
    shape: tuple[int, ...]
    checksum: int = 0
    symbol: int = 0
    bits: int = 0
    log2_lanes: int = 0
    chunk: int = 0
    parameters: bytes = b""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    size: int = 0

    @property
    def count(self) -> int:
        """Symbols of the tensor."""
        return math.prod(self.shape)

    @property
    def lanes(self) -> int:
        """Interleaved lanes of a chunk."""
        return 1 << self.log2_lanes

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header: the lanes' states (RANS), then the chunks' streams."""
        states = 4 * self.lanes * len(self.lengths) if self.coder == RANS else 0
        return states + 2 * int(self.lengths.sum())


def is_coded(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like a payload: 1-D, uint8, with the magic bytes. Only `decode` checks the rest."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() < FIXED or tensor.is_meta:
        return False
    return bytes(tensor[:4].tolist()) == MAGIC


def write_header(header: Header) -> bytes:
    """The bytes of a header, a multiple of four."""
    body = bytearray()
    for size in header.shape:
        body += _varint(size)
    body += _varint(header.count)
    body += header.checksum.to_bytes(4, "little")
    if header.coder == CONSTANT:
        body.append(header.symbol)
    else:
        body += bytes((header.bits, header.log2_lanes))
        body += _varint(header.chunk)
        body += _varint(len(header.parameters)) + header.parameters
        for length in header.lengths.tolist():
            body += _varint(length)
    body += bytes(-len(body) % 4)
    fixed = MAGIC + bytes((VERSION, header.coder, header.model, len(header.shape)))
    rest = (FIXED + len(body)).to_bytes(4, "little") + bytes(body)
    return fixed + _crc(fixed, rest) + rest


def header_size(start: bytes) -> int:
    """Length of the header that begins so, as far as 16 bytes can tell."""
    return int.from_bytes(start[12:FIXED], "little")


def read_header(data: np.ndarray, total: int, name: str) -> Header:
    """Read and check the header of a payload.

    Args:
        data: uint8 [n], the payload, or as much of it as the header takes.
        total: bytes of the payload.
        name: of the tensor, for errors.

    Raises:
        ValueError: naming the tensor and what is wrong. No memory beyond the header's own size is taken.
    """
    start = data[:FIXED].tobytes()
    if len(start) < FIXED or start[:4] != MAGIC:
        raise ValueError(f"{name}: not a coded tensor (its first bytes are {start[:4].hex(' ') or 'missing'}).")
    version, coder, model, dimensions = start[4:8]
    if version != VERSION:
        raise ValueError(f"{name}: coded in version {version}, this program reads version {VERSION}: update hf_gg.")
    size = header_size(start)
    if not FIXED < size <= min(total, len(data)):
        raise ValueError(f"{name}: damaged: a header of {size} bytes in a payload of {total}.")
    rest = data[12:size].tobytes()
    if _crc(start[:8], rest) != start[8:12]:
        raise ValueError(f"{name}: damaged: the checksum of the header does not fit.")
    # What follows was written so, by mistake or on purpose: chance damage does not come past the checksum.
    if coder not in (CONSTANT, RANS, GOLOMB):
        raise ValueError(f"{name}: unknown coder {coder}: update hf_gg.")
    if model not in ((NO_MODEL,), (TABLE, GGD), (NO_MODEL,))[coder]:
        raise ValueError(f"{name}: unknown model {model} of coder {coder}: update hf_gg.")
    header = _read_body(_Reader(rest[4:], name), coder, model, dimensions, name)
    header.size = size
    if size + header.data_bytes != total:
        raise ValueError(
            f"{name}: damaged: {total} bytes, and the header says {size + header.data_bytes}"
            " (the file was cut or something was appended)."
        )
    return header


def _read_body(reader: _Reader, coder: int, model: int, dimensions: int, name: str) -> Header:
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"{name}: damaged: {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed.")
    header = Header(coder, model, tuple(reader.varint() for _ in range(dimensions)))
    count = reader.varint()
    if count != header.count or math.prod(max(size, 1) for size in header.shape) > MAX_COUNT:
        raise ValueError(f"{name}: damaged: {count} symbols do not fit the shape {[*header.shape]}.")
    header.checksum = int.from_bytes(reader.take(4), "little")
    if coder == CONSTANT:
        header.symbol = reader.take(1)[0]
        if header.checksum or (header.symbol and not count):
            raise ValueError(f"{name}: damaged: a constant tensor of {count} symbols holds what it does not need.")
    else:
        header.bits, header.log2_lanes = reader.take(2)
        header.chunk = reader.varint()
        if header.log2_lanes > MAX_LOG2_LANES:
            raise ValueError(f"{name}: damaged: 2^{header.log2_lanes} lanes, at most 2^{MAX_LOG2_LANES} are allowed.")
        if header.chunk % header.lanes or not 0 < header.chunk <= MAX_ROWS * header.lanes:
            raise ValueError(f"{name}: damaged: chunks of {header.chunk} symbols on {header.lanes} lanes.")
        header.parameters = reader.take(reader.varint())
        chunks = -(-count // header.chunk)
        if not 0 < chunks <= reader.left:
            raise ValueError(f"{name}: damaged: the index of {chunks} chunks is cut short.")
        lengths = [reader.varint() for _ in range(chunks)]
        if max(lengths) > 2 * header.chunk:
            raise ValueError(f"{name}: damaged: a chunk of {max(lengths)} words for {header.chunk} symbols.")
        header.lengths = np.array(lengths, np.int64)
        low, high = (MIN_BITS, MAX_BITS) if coder == RANS else (0, MAX_ORDER)
        if not low <= header.bits <= high:
            raise ValueError(f"{name}: damaged: a precision or order of {header.bits}, allowed are {low} to {high}.")
        # a code has at least order + 1 bits: no count without its bytes
        if coder == GOLOMB and 16 * header.lengths.sum() < count * (header.bits + 1):
            raise ValueError(f"{name}: damaged: {count} symbols in {header.lengths.sum()} words.")
    if reader.left > 3 or any(reader.take(reader.left)):
        raise ValueError(f"{name}: damaged: the header ends with something else than its padding.")
    return header


def checksum(hashes: np.ndarray) -> int:
    """Of decoded symbols: CRC-32 of their hashes, uint32 [chunks, lanes], as little-endian numbers."""
    return zlib.crc32(hashes.astype("<u4", copy=False).tobytes())


class _Reader:
    """Bytes that are read one after the other, with a `ValueError` at the end of them."""

    def __init__(self, data: bytes, name: str):
        self._data, self._at, self._name = data, 0, name

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{self._name}: damaged: the header is cut short.")
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError(f"{self._name}: damaged: a number in the header is longer than nine bytes.")


def _varint(value: int) -> bytes:
    """Seven bits a byte, the low ones first, the top bit set in all but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc(*parts: bytes) -> bytes:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc.to_bytes(4, "little")

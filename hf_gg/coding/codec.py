"""Tensors to payloads and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from . import ggd_model, golomb, kernels, models, reference
from .container import (
    CONSTANT,
    GGD,
    GOLOMB,
    MAX_DIMENSIONS,
    NO_MODEL,
    RANS,
    TABLE,
    Header,
    checksum,
    read_header,
    write_header,
)


CODERS = ("rans", "eg0")
CHUNK = 1 << 16  # symbols, about
MAX_LANES = 32
# Of frequencies, in bits; and by how much the size must be smaller: the table of 16 bits is read more slowly.
PRECISIONS = {14: 1.0, 16: 1.003}
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


def encode(
    symbols: torch.Tensor, coder: str = "rans", name: str = "symbols", threads: int | None = None
) -> torch.Tensor:
    """Encode uint8 symbols of any shape.

    Args:
        symbols: uint8 codes.
        coder: `"rans"`, or `"eg0"` (exp-Golomb codes of frequency ranks, in the order that is shortest).
        name: of the tensor, for errors.
        threads: at most so many; torch's number for None.

    Returns:
        The payload, 1-D uint8 on the CPU. It does not depend on the threads or on the compiled coder.

    Raises:
        TypeError: the symbols are not uint8. ValueError: an unknown coder, more than 16 dimensions.
    """
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}, got {coder!r}.")
    if symbols.dtype != torch.uint8:
        raise TypeError(f"{name}: symbols must be uint8, got {symbols.dtype}.")
    shape = tuple(symbols.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name}: at most {MAX_DIMENSIONS} dimensions can be coded, got {len(shape)}.")
    flat = symbols.detach().cpu().contiguous().view(-1).numpy()
    counts = _backend().count_symbols(flat)
    if (counts > 0).sum() < 2:
        data = write_header(Header(CONSTANT, NO_MODEL, shape, symbol=int(counts.argmax())))
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)
    chunk, log2_lanes = _layout(len(flat))
    header = Header(RANS, TABLE, shape, log2_lanes=log2_lanes, chunk=chunk)
    threads = threads or torch.get_num_threads()
    parts = (_encode_rans if coder == "rans" else _encode_golomb)(flat, counts, header, threads)
    header.checksum = checksum(_backend().lane_hashes(flat, chunk, header.lanes, threads))
    written = [np.frombuffer(write_header(header), np.uint8), *parts]
    return torch.from_numpy(np.concatenate(written))


def size_of_counts(counts: np.ndarray, shape: Sequence[int]) -> float:
    """Bytes of the payload of symbols that were only counted, with a table of frequencies; within 1 % of `encode`'s,
    which takes two parameters instead of a table where that is shorter.

    Args:
        counts: of the 256 symbols, int64 [256].
        shape: of the tensor.
    """
    total = int(counts.sum())
    if (counts > 0).sum() < 2:
        return float(len(write_header(Header(CONSTANT, NO_MODEL, tuple(shape)))))
    chunk, log2_lanes = _layout(total)
    bits = min(PRECISIONS)
    frequencies = models.normalize(counts, bits)
    header = Header(RANS, TABLE, tuple(shape), bits=bits, log2_lanes=log2_lanes, chunk=chunk)
    header.parameters = models.write_table(frequencies, bits)
    words = models.cost(counts, frequencies, bits) / 16
    chunks = -(-total // chunk)
    header.lengths = np.full(chunks, round(words / chunks), np.int64)
    return len(write_header(header)) + 4 * header.lanes * chunks + 2 * words


def decode(
    payload: torch.Tensor,
    name: str = "payload",
    threads: int | None = None,
    expected_shape: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
    reserved: Collection[int] = (),
    header: Header | None = None,
) -> torch.Tensor:
    """Decode a payload; nothing in it is trusted.

    Args:
        payload: 1-D uint8.
        name: of the tensor, for errors.
        threads: at most so many; torch's number for None.
        expected_shape: the shape that the result must have.
        out: contiguous uint8 tensor of the payload's shape on the CPU that is filled and returned.
        reserved: symbols that must not occur. That takes no time where the payload's model has none of them.
        header: what `read` found in this very payload, which spares reading it again.

    Returns:
        uint8 tensor of the encoded shape, on the payload's device. If an error is raised, `out` holds anything.

    Raises:
        ValueError: naming the tensor, for whatever is wrong with the payload or does not fit the arguments.
    """
    data = _bytes_of(payload, name)
    header = header or read_header(data, len(data), name)
    if out is not None:
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"{name}: out must be a contiguous uint8 tensor on the CPU.")
        if tuple(out.shape) != header.shape:
            raise ValueError(f"{name}: the payload has the shape {[*header.shape]}, out {[*out.shape]}.")
    check_shape(header, header.shape if expected_shape is None and out is not None else expected_shape, name)
    try:
        model = None if header.coder == CONSTANT else _read_model(header)
        result = torch.empty(header.shape, dtype=torch.uint8) if out is None else out
        if model is None:
            result.fill_(header.symbol)
        else:
            flat = result.view(-1).numpy()
            hashes = _decode(data, header, model, flat, threads or torch.get_num_threads())
    except ValueError as error:
        raise ValueError(f"{name}: damaged: {error}.") from None
    if model is not None:
        check_hashes(header, hashes, name)
    if reserved:
        _check_reserved(header, model, result, reserved, name)
    return result if out is not None else result.to(payload.device)


def entropy(symbols: torch.Tensor) -> float:
    """Order-0 entropy in bits a symbol: no coder that sees the symbols one by one comes below it.

    Raises:
        TypeError: the symbols are not uint8.
    """
    if symbols.dtype != torch.uint8:
        raise TypeError(f"symbols must be uint8, got {symbols.dtype}.")
    flat = symbols.detach().cpu().contiguous().view(-1).numpy()
    return models.entropy_of_counts(_backend().count_symbols(flat))


def read(payload: torch.Tensor, name: str = "payload") -> Header:
    """The header of a payload.

    Raises:
        ValueError: naming the tensor, the header is damaged.
    """
    data = _bytes_of(payload, name)
    return read_header(data, len(data), name)


def info(payload: torch.Tensor, name: str = "payload") -> Info:
    """What the header of a payload says; the data behind it are not looked at.

    Raises:
        ValueError: the header is damaged.
    """
    header = read(payload, name)
    coder = {CONSTANT: "constant", RANS: "rans", GOLOMB: "eg0"}[header.coder]
    model = {NO_MODEL: "none", TABLE: "table", GGD: "ggd"}[header.model]
    bits = 8 * payload.numel() / header.count if header.count else math.nan
    return Info(coder, model, header.shape, payload.numel(), bits)


def check_shape(header: Header, expected_shape: Sequence[int] | None, name: str) -> None:
    """`ValueError` for another shape than the expected one, or one that only an expected shape could justify."""
    if expected_shape is None:
        if header.coder == CONSTANT and header.count > MAX_CONSTANT:
            raise ValueError(f"{name}: {header.count} equal symbols without an expected shape: give expected_shape.")
    elif header.shape != tuple(expected_shape):
        raise ValueError(f"{name}: the payload has the shape {[*header.shape]}, expected {[*expected_shape]}.")


def check_hashes(header: Header, hashes: np.ndarray, name: str) -> None:
    """`ValueError` unless these are the hashes, uint32 [chunks, lanes], of the symbols that were encoded."""
    if checksum(hashes) != header.checksum:
        raise ValueError(f"{name}: damaged: the checksum of the decoded symbols does not fit.")


def _check_reserved(
    header: Header, model: np.ndarray | None, symbols: torch.Tensor, reserved: Collection[int], name: str
) -> None:
    if model is None:
        possible = {header.symbol} if header.count else set()
    else:
        possible = set((np.flatnonzero(model) if header.coder == RANS else model[model < 256]).tolist())
    for symbol in sorted(possible.intersection(reserved)):
        found = (symbols.view(-1) == symbol).nonzero()
        if len(found):
            raise ValueError(
                f"{name}: code 0x{symbol:02x} at flat index {int(found[0])} is a reserved state of the weight format. "
                "The checkpoint is damaged or was written for another format."
            )


def frequencies_of(header: Header) -> np.ndarray:
    """The frequencies of a RANS payload, int64 [256]; `ValueError` says what is wrong."""
    read = _backend().read_table if header.model == TABLE else ggd_model.read_frequencies
    return read(header.parameters, header.bits)


def _bytes_of(payload: torch.Tensor, name: str) -> np.ndarray:
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise ValueError(f"{name}: a payload is 1-D uint8, got {payload.dtype} {[*payload.shape]}.")
    return payload.detach().cpu().contiguous().numpy()


def _layout(count: int) -> tuple[int, int]:
    """Symbols a chunk and log2 of the lanes."""
    log2_lanes = max(0, min(MAX_LANES, count // LANE).bit_length() - 1)
    lanes, chunks = 1 << log2_lanes, max(1, round(count / CHUNK))
    return -(-count // (chunks * lanes)) * lanes, log2_lanes


def _encode_rans(symbols: np.ndarray, counts: np.ndarray, header: Header, threads: int) -> list[np.ndarray]:
    header.model, header.bits, header.parameters, frequencies = _choose_model(counts)
    states, header.lengths, words = _backend().rans_encode(
        symbols, header.chunk, header.lanes, frequencies, header.bits, threads
    )
    return [states.view(np.uint8).reshape(-1), words]


def _choose_model(counts: np.ndarray) -> tuple[int, int, bytes, np.ndarray]:
    """Model, precision, parameters and frequencies of the smallest total; the quicker ones where that costs little."""
    total, entropy = int(counts.sum()), models.entropy_of_counts(counts)
    found: list[tuple[float, int, int, bytes, np.ndarray]] = []

    def add(model: int, bits: int, parameters: bytes, frequencies: np.ndarray) -> float:
        size = models.cost(counts, frequencies, bits) + 8 * len(parameters)
        found.append((size * PRECISIONS[bits], model, bits, parameters, frequencies))
        return size

    def best() -> tuple[float, int, int, bytes, np.ndarray]:
        return min(found, key=lambda choice: choice[:3])

    fitted = None
    for bits, handicap in PRECISIONS.items():
        if found and best()[0] <= handicap * entropy * total:
            break  # not even a perfect model would make up for it
        stored = models.normalize(counts, bits)
        size = add(TABLE, bits, models.write_table(stored, bits), stored)
        if not found[1:] and ggd_model.applies(counts):
            fitted = ggd_model.fit(counts, size / total - entropy)
        if fitted is not None:
            add(GGD, bits, fitted, ggd_model.read_frequencies(fitted, bits))
    return best()[1:]


def _encode_golomb(symbols: np.ndarray, counts: np.ndarray, header: Header, threads: int) -> list[np.ndarray]:
    header.coder, header.model, header.bits = GOLOMB, NO_MODEL, golomb.best_order(counts)
    ranked = golomb.rank(counts)
    header.parameters = ranked.tobytes()
    header.lengths, words = _backend().golomb_encode(symbols, header.chunk, golomb.codes(ranked, header.bits), threads)
    return [words]


def _read_model(header: Header) -> np.ndarray:
    """The frequencies, or the code book; `ValueError` says what is wrong."""
    return golomb.read_book(header.parameters) if header.coder == GOLOMB else frequencies_of(header)


def _decode(data: np.ndarray, header: Header, model: np.ndarray, out: np.ndarray, threads: int) -> np.ndarray:
    """The hashes of what is decoded into `out`; `ValueError` says what is wrong."""
    if header.coder == GOLOMB:
        return _backend().golomb_decode(
            data[header.size :], header.lengths, out, header.chunk, header.lanes, model, header.bits, threads
        )
    begin = header.size + 4 * header.lanes * len(header.lengths)
    return _backend().rans_decode(
        data[header.size : begin],
        data[begin:],
        header.lengths,
        out,
        header.chunk,
        header.lanes,
        model,
        header.bits,
        threads,
    )


def _backend() -> ModuleType:
    return kernels if kernels.available() else reference

"""Interleaved range coding (rANS) in numpy: the reference, and what runs where no C compiler is.

A state is a number in [2^16, 2^32); words of 16 bits. All lanes of all chunks are stepped at once.
"""

from __future__ import annotations

import numpy as np

from .hashing import OFFSET, PRIME


LOWEST = 1 << 16


def starts(frequencies: np.ndarray) -> np.ndarray:
    """Where each symbol's slots begin, int64 [256]: the sum of the frequencies of all smaller symbols."""
    return np.cumsum(frequencies) - frequencies


def encode(
    symbols: np.ndarray, chunk: int, lanes: int, frequencies: np.ndarray, bits: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Encode symbols that all have a frequency.

    Args:
        symbols: uint8 [n], n > 0.
        chunk: symbols a chunk, a multiple of `lanes`.
        lanes: interleaved lanes.
        frequencies: int64 [256] of the sum 2^bits, none equal to it.
        bits: precision.

    Returns:
        The states that decoding starts with, uint32 [chunks, lanes], and each chunk's words, uint16.
    """
    chunks, rows, grid = _rows(symbols, chunk, lanes)
    frequency, start = frequencies.astype(np.uint64), starts(frequencies).astype(np.uint64)
    shift = np.uint64(bits)
    states = np.full((chunks, lanes), LOWEST, np.uint64)
    words = np.zeros((rows, chunks, lanes), np.uint16)
    written = np.zeros((rows, chunks, lanes), bool)
    for row in range(rows - 1, -1, -1):
        active, width = _active(row, len(symbols), chunk, lanes)
        symbol = grid[:active, row]
        f, c, x = frequency[symbol], start[symbol], states[:active]
        full = x >= f << np.uint64(32 - bits)
        if width < lanes:
            full[-1, width:] = False
        words[row, :active] = x & np.uint64(0xFFFF)
        written[row, :active] = full
        low = np.where(full, x >> np.uint64(16), x)
        if width < lanes:
            f[-1, width:] = 1
        new = (low // f << shift) + low % f + c
        if width < lanes:
            new[-1, width:] = x[-1, width:]
        states[:active] = new
    return states.astype(np.uint32), [words[:, i][written[:, i]] for i in range(chunks)]


def decode(
    states: np.ndarray,
    words: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
    chunk: int,
    frequencies: np.ndarray,
    bits: int,
) -> np.ndarray | None:
    """Decode into `out`.

    Args:
        states: uint32 [chunks, lanes].
        words: uint16 [sum of lengths].
        lengths: words a chunk, int64 [chunks].
        out: uint8 [n], is overwritten.
        chunk: symbols a chunk.
        frequencies: int64 [256] of the sum 2^bits.
        bits: precision.

    Returns:
        The hashes of the symbols, uint32 [chunks, lanes], or None if a chunk is damaged.
    """
    lanes = states.shape[1]
    if (states < LOWEST).any():
        return None
    symbol_of = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
    frequency, start = frequencies.astype(np.uint64), starts(frequencies).astype(np.uint64)
    ends = np.cumsum(lengths)
    at = ends - lengths
    padded = np.append(words, np.uint16(0))
    x, hashes = states.astype(np.uint64), np.full(states.shape, OFFSET)
    chunks, rows, grid = _rows(out, chunk, lanes)
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits)
    for row in range(rows):
        active, width = _active(row, len(out), chunk, lanes)
        old = x[:active]
        slot = old & mask
        symbol = symbol_of[slot]
        new = frequency[symbol] * (old >> shift) + slot - start[symbol]
        if width < lanes:
            new[-1, width:] = old[-1, width:]
        low = new < LOWEST
        position = at[:active, None] + np.cumsum(low, axis=1) - low
        at[:active] += low.sum(axis=1)
        if (at > ends).any():
            return None
        x[:active] = np.where(low, new << np.uint64(16) | padded[np.minimum(position, len(words))], new)
        fresh = (hashes[:active] ^ symbol) * PRIME
        if width < lanes:
            fresh[-1, width:] = hashes[active - 1, width:]
        hashes[:active] = fresh
        grid[:active, row] = symbol
    out[:] = grid.reshape(-1)[: len(out)]
    return hashes if (at == ends).all() and (x == LOWEST).all() else None


def _rows(symbols: np.ndarray, chunk: int, lanes: int) -> tuple[int, int, np.ndarray]:
    """Chunks, rows a chunk, and the symbols as [chunks, rows, lanes], zeros behind the last."""
    chunks = -(-len(symbols) // chunk)
    chunk = min(chunk, -(-len(symbols) // lanes) * lanes)
    padded = np.zeros(chunks * chunk, np.uint8)
    padded[: len(symbols)] = symbols
    return chunks, chunk // lanes, padded.reshape(chunks, chunk // lanes, lanes)


def _active(row: int, count: int, chunk: int, lanes: int) -> tuple[int, int]:
    """How many chunks have a symbol in this row, and how many lanes the last one of them has there."""
    chunks = -(-count // chunk)
    left = count - (chunks - 1) * chunk - row * lanes
    return (chunks, min(left, lanes)) if left > 0 else (chunks - 1, lanes)

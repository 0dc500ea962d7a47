"""The coders in numpy: what runs where no C compiler is, bit for bit as `kernels.py`.

rANS: a state is a number in [2^16, 2^32), its words have 16 bits. All lanes of all chunks are stepped at once.
"""

from __future__ import annotations

import numpy as np

from .models import read_table as read_table


LOWEST = 1 << 16
FNV_OFFSET = np.uint32(2166136261)
FNV_PRIME = np.uint32(16777619)
MAX_ORDER = 8
_LONGEST = 17  # bits of an exp-Golomb code of a rank below 256
_BLOCK = 1 << 20


def count_symbols(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol occurs, uint8 [n] to int64 [256]."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(symbols), _BLOCK):  # bincount makes 8 bytes of each symbol
        counts += np.bincount(symbols[start : start + _BLOCK], minlength=256)
    return counts


def lane_hashes(symbols: np.ndarray, chunk: int, lanes: int, threads: int = 1) -> np.ndarray:
    """FNV-1a (32 bits) of each lane of each chunk: symbol i of a chunk belongs to lane i mod lanes.

    Args:
        symbols: uint8 [n], n > 0.
        chunk: symbols a chunk, a multiple of `lanes`.
        lanes: lanes of a chunk.
        threads: not used.

    Returns:
        uint32 [chunks, lanes].
    """
    chunks, rows, grid = _rows(symbols, chunk, lanes)
    hashes = np.full((chunks, lanes), FNV_OFFSET)
    for row in range(rows):
        active, width = _active(row, len(symbols), chunk, lanes)
        fresh = (hashes[:active] ^ grid[:active, row]) * FNV_PRIME
        if width < lanes:
            fresh[-1, width:] = hashes[active - 1, width:]
        hashes[:active] = fresh
    return hashes


def rans_encode(
    symbols: np.ndarray, chunk: int, lanes: int, frequencies: np.ndarray, bits: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode symbols that all have a frequency.

    Args:
        symbols: uint8 [n], n > 0.
        chunk: symbols a chunk, a multiple of `lanes`.
        lanes: interleaved lanes, at most 32.
        frequencies: int64 [256] of the sum 2^bits, none equal to it.
        bits: precision.
        threads: not used.

    Returns:
        The states that decoding starts with, uint32 [chunks, lanes]; words of each chunk, int64 [chunks]; the words
        of all chunks, little-endian, as uint8 [n].
    """
    chunks, rows, grid = _rows(symbols, chunk, lanes)
    frequency, start = frequencies.astype(np.uint64), _starts(frequencies).astype(np.uint64)
    shift = np.uint64(bits)
    states = np.full((chunks, lanes), LOWEST, np.uint64)
    words = np.zeros((chunks, rows, lanes), "<u2")
    written = np.zeros((chunks, rows, lanes), bool)
    for row in range(rows - 1, -1, -1):
        active, width = _active(row, len(symbols), chunk, lanes)
        symbol, x = grid[:active, row], states[:active]
        f = frequency[symbol]
        full = x >= f << np.uint64(32 - bits)
        if width < lanes:
            full[-1, width:] = False
            f[-1, width:] = 1
        words[:active, row] = x & np.uint64(0xFFFF)
        written[:active, row] = full
        low = np.where(full, x >> np.uint64(16), x)
        new = (low // f << shift) + low % f + start[symbol]
        if width < lanes:
            new[-1, width:] = x[-1, width:]
        states[:active] = new
    return states.astype("<u4"), written.sum(axis=(1, 2), dtype=np.int64), words[written].view(np.uint8)


def rans_decode(
    states: np.ndarray,
    words: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
    chunk: int,
    lanes: int,
    frequencies: np.ndarray,
    bits: int,
    threads: int = 1,
) -> np.ndarray:
    """Decode into `out`.

    Args:
        states: uint8 [4 * chunks * lanes], little-endian numbers.
        words: uint8 [2 * sum of lengths].
        lengths: words a chunk, int64 [chunks].
        out: uint8 [n], is overwritten.
        chunk: symbols a chunk.
        lanes: interleaved lanes.
        frequencies: int64 [256] of the sum 2^bits, none equal to it.
        bits: precision.
        threads: not used.

    Returns:
        The hashes of the symbols, uint32 [chunks, lanes].

    Raises:
        ValueError: the stream of a chunk is damaged.
    """
    x = np.frombuffer(states.tobytes(), "<u4").reshape(-1, lanes).astype(np.uint64)
    _check_ends("state", np.all(x >= LOWEST, axis=1))
    symbol_of = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
    frequency, start = frequencies.astype(np.uint64), _starts(frequencies).astype(np.uint64)
    ends = np.cumsum(lengths)
    at = ends - lengths
    padded = np.append(np.frombuffer(words.tobytes(), "<u2"), np.uint16(0))
    hashes = np.full(x.shape, FNV_OFFSET)
    _, rows, grid = _rows(out, chunk, lanes)
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits)
    for row in range(rows):
        active, width = _active(row, len(out), chunk, lanes)
        old = x[:active]
        slot = old & mask
        symbol = symbol_of[slot]
        new = frequency[symbol] * (old >> shift) + slot - start[symbol]
        fresh = (hashes[:active] ^ symbol) * FNV_PRIME
        if width < lanes:
            new[-1, width:] = old[-1, width:]
            fresh[-1, width:] = hashes[active - 1, width:]
        low = new < LOWEST
        position = at[:active, None] + np.cumsum(low, axis=1) - low
        at[:active] += low.sum(axis=1)
        _check_ends("stream", at <= ends)
        x[:active] = np.where(low, new << np.uint64(16) | padded[np.minimum(position, len(padded) - 1)], new)
        hashes[:active] = fresh
        grid[:active, row] = symbol
    _check_ends("stream", (at == ends) & np.all(x == LOWEST, axis=1))
    out[:] = grid.reshape(-1)[: len(out)]
    return hashes


def golomb_encode(
    symbols: np.ndarray, chunk: int, codes: np.ndarray, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Write the code of each symbol, a stream for each chunk.

    Args:
        symbols: uint8 [n], n > 0.
        chunk: symbols a chunk.
        codes: of each symbol, code | length << 16, uint32 [256].
        threads: not used.

    Returns:
        16-bit words of each chunk, int64 [chunks]; the streams, uint8 [2 * sum of the words].
    """
    streams = []
    for start in range(0, len(symbols), chunk):
        code = codes[symbols[start : start + chunk]]
        length, code = (code >> 16).astype(np.int64), code & 0xFFFF
        ends = np.cumsum(length)
        bits = np.zeros(-(-int(ends[-1]) // 16) * 16, np.uint8)
        for place in range(_LONGEST):
            has = length > place
            bits[ends[has] - 1 - place] = code[has] >> place & 1
        streams.append(np.packbits(bits))
    return np.array([len(stream) // 2 for stream in streams], np.int64), np.concatenate(streams)


def golomb_decode(
    words: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
    chunk: int,
    lanes: int,
    book: np.ndarray,
    order: int,
    threads: int = 1,
) -> np.ndarray:
    """Decode exp-Golomb codes into `out`.

    Args:
        words: uint8 [2 * sum of lengths].
        lengths: 16-bit words a chunk, int64 [chunks].
        out: uint8 [n], is overwritten.
        chunk: symbols a chunk.
        lanes: of the hashes.
        book: the symbol of each rank, 256 where there is none, uint16 [512].
        order: of the code, at most 8.
        threads: not used.

    Returns:
        The hashes of the symbols, uint32 [chunks, lanes].

    Raises:
        ValueError: the stream of a chunk is damaged.
    """
    windows = np.arange(1 << _LONGEST)
    zeros = _LONGEST - np.frexp(windows)[1].astype(np.int64)
    sound = zeros <= MAX_ORDER - order
    zeros[~sound] = 0
    symbol_of = book[(windows >> (_LONGEST - 1 - 2 * zeros - order)) - (1 << order) & 511]
    sound &= symbol_of < 256
    length_of = np.where(sound, 2 * zeros + order + 1, 0)
    ends = np.cumsum(lengths) * 2
    for index, end in enumerate(ends.tolist()):
        target = out[index * chunk : (index + 1) * chunk]
        stream = words[end - 2 * int(lengths[index]) : end]
        padded = np.append(stream, np.zeros(4, np.uint8)).astype(np.int64)
        window = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
        # the code that begins at each bit, whether or not one does
        seen = (window[:, None] >> np.arange(7, -1, -1) & 0x1FFFF).reshape(-1)
        steps, total = length_of[seen].tolist(), 8 * len(stream)
        positions, position = [], 0
        for _ in range(len(target)):
            positions.append(position)
            position += steps[position]
            if position == positions[-1] or position > total:
                raise ValueError(f"the stream of chunk {index} is damaged")
        if total - position >= 16 or np.unpackbits(stream)[position:].any():
            raise ValueError(f"the stream of chunk {index} is damaged")
        target[:] = symbol_of[seen[positions]]
    return lane_hashes(out, chunk, lanes)


def _starts(frequencies: np.ndarray) -> np.ndarray:
    """Where each symbol's slots begin: the sum of the frequencies of all smaller symbols."""
    return np.cumsum(frequencies) - frequencies


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


def _check_ends(what: str, sound: np.ndarray) -> None:
    if not sound.all():
        raise ValueError(f"the {what} of chunk {int(sound.argmin())} is damaged")

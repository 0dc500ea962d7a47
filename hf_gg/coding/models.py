"""Frequencies of symbols: counted, brought to a sum of a power of two, and stored in few bytes."""

from __future__ import annotations

import heapq

import numpy as np

from .bits import BitWriter, bits_of


MIN_BITS, MAX_BITS = 8, 16
# Symbols by magnitude, a positive one before the negative one: 0, 0x80, 1, 0x81, ...
ORDER = np.array([position >> 1 | (position & 1) << 7 for position in range(256)], np.uint8)

CUT_SHORT = "the table of frequencies is cut short"
TOO_LONG = "the table of frequencies is longer than its symbols"
WRONG_FREQUENCY = "a frequency of {} bits in a table of {}"


def entropy_of_counts(counts: np.ndarray) -> float:
    """Order-0 entropy in bits a symbol of int64 [256] counts; 0 for none."""
    present = counts[counts > 0].astype(np.float64)
    total = present.sum()
    return float((present * np.log2(total / present)).sum() / total) if len(present) > 1 else 0.0


def cost(counts: np.ndarray, frequencies: np.ndarray, bits: int) -> float:
    """Bits that an ideal coder needs for the counted symbols with frequencies of the sum 2^bits."""
    present = counts > 0
    return float((counts[present] * (bits - np.log2(frequencies[present]))).sum())


def normalize(counts: np.ndarray, bits: int) -> np.ndarray:
    """Frequencies, int64 [256], of the sum 2^bits, at least 1 where a symbol occurs: nearly the cheapest ones.

    At least two symbols must occur, and no more than 2^bits.
    """
    total = 1 << bits
    share = counts / counts.sum() * total
    result = np.where(counts > 0, np.maximum(np.rint(share), 1), 0).astype(np.int64)
    missing = total - int(result.sum())
    step = 1 if missing > 0 else -1
    values, weights = result.tolist(), counts.tolist()

    def change(symbol: int) -> tuple[float, int]:
        old = values[symbol]
        if old + step < 1:
            return float("inf"), symbol
        return -weights[symbol] * float(np.log2((old + step) / old)), symbol

    heap = [change(symbol) for symbol in range(256) if weights[symbol]]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        symbol = heap[0][1]
        values[symbol] += step
        heapq.heapreplace(heap, change(symbol))
    return np.array(values, np.int64)


def write_table(frequencies: np.ndarray, bits: int) -> bytes:
    """The stored table: see `docs/coded-checkpoints.md`."""
    ordered = frequencies[ORDER].tolist()
    used = max(position for position, frequency in enumerate(ordered) if frequency) + 1
    out = BitWriter()
    out.write(used - 1, 8)
    before = bits - 2
    for frequency in ordered[:used]:
        out.write(int(frequency > 0), 1)
        if frequency:
            size = frequency.bit_length() - 1
            step = size - before
            out.unary(2 * step if step >= 0 else -2 * step - 1)
            out.write(frequency - (1 << size), size)
            before = size
    return out.getvalue()


def read_table(data: bytes, bits: int) -> np.ndarray:
    """Frequencies, int64 [256], of a stored table.

    Raises:
        ValueError: saying what is wrong; the caller names the tensor.
    """
    text = bits_of(data) + "0"
    values, at, before = [0] * 256, 8, bits - 2
    try:  # a plain loop, as quick as Python can be: there is a table for every tensor of a checkpoint
        for position in range(int(text[:8], 2) + 1):
            if text[at] == "0":
                at += 1
                continue
            end = text.index("0", at + 1)  # there is the one that was added
            step = end - at - 1
            before += -(step + 1 >> 1) if step & 1 else step >> 1
            if not 0 <= before < bits:
                raise ValueError(WRONG_FREQUENCY.format(before + 1, bits))
            at = end + 1 + before
            values[position] = int("1" + text[end + 1 : at], 2)
        if at >= len(text):
            raise IndexError
    except IndexError:
        raise ValueError(CUT_SHORT) from None
    if len(text) - at > 8 or "1" in text[at:]:
        raise ValueError(TOO_LONG)
    frequencies = np.zeros(256, np.int64)
    frequencies[ORDER] = values
    check_frequencies(frequencies, bits)
    return frequencies


def check_frequencies(frequencies: np.ndarray, bits: int) -> None:
    """`ValueError` unless the frequencies have the sum 2^bits and more than one symbol shares it."""
    if int(frequencies.sum()) != 1 << bits or (frequencies > 0).sum() < 2:
        raise ValueError(f"the frequencies have the sum {int(frequencies.sum())}, not {1 << bits}")

"""The coders in C, compiled at first use and run on ranges of chunks in threads; functions as in `reference.py`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..native import Lazy, Library
from . import models


# Chunks of a thread's next piece of work: few, to even out the threads' speeds.
_PIECE = 2
_LIBRARY = Library(
    name="coder",
    folder=Path(__file__).parent,
    headers=(),
    sources=("coder.c",),
    flags=("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    variants=((), ("-DHF_GG_PORTABLE",)),
    functions={
        "hf_gg_coder_isa": ("n", ""),
        "hf_gg_coder_count": ("", "pnp"),
        "hf_gg_coder_hash": ("", "npnnnnnp"),
        "hf_gg_rans_read_table": ("n", "pnnp"),
        "hf_gg_rans_tables": ("", "ppp"),
        "hf_gg_rans_decode": ("n", "nppnpppnnnnnpp"),
        "hf_gg_rans_encode": ("", "pnpnnnnnppp"),
        "hf_gg_golomb_decode": ("n", "npnppnnnnnpp"),
        "hf_gg_golomb_encode": ("", "ppnnnnpp"),
        "hf_gg_golomb_measure": ("", "ppnnnnp"),
    },
)
_LAZY = Lazy(_LIBRARY.load, "the compiled coder is")
available, why_not, _library = _LAZY.available, _LAZY.why_not, _LAZY.get


def isa() -> int:
    """The best instruction set of this processor: 1 for AVX2, 0 for portable C."""
    return _library().hf_gg_coder_isa()


def count_symbols(symbols: np.ndarray) -> np.ndarray:
    """See `reference.count_symbols`."""
    counts = np.zeros(256, np.int64)
    _library().hf_gg_coder_count(symbols.ctypes.data, len(symbols), counts.ctypes.data)
    return counts


def lane_hashes(symbols: np.ndarray, chunk: int, lanes: int, threads: int = 1) -> np.ndarray:
    """See `reference.lane_hashes`."""
    chunks, best = -(-len(symbols) // chunk), isa()
    hashes = np.empty((chunks, lanes), np.uint32)

    def work(begin: int, end: int) -> None:
        _library().hf_gg_coder_hash(
            best, symbols.ctypes.data, len(symbols), chunk, lanes, begin, end, hashes.ctypes.data
        )

    _run(chunks, threads, work)
    return hashes


def rans_encode(
    symbols: np.ndarray, chunk: int, lanes: int, frequencies: np.ndarray, bits: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `reference.rans_encode`."""
    chunks = -(-len(symbols) // chunk)
    table = packed_table(frequencies)
    states, lengths = np.empty((chunks, lanes), np.uint32), np.empty(chunks, np.int64)
    words = np.empty(chunks * chunk, np.uint16)  # only what is written takes memory

    def work(begin: int, end: int) -> None:
        _library().hf_gg_rans_encode(
            table.ctypes.data,
            bits,
            symbols.ctypes.data,
            len(symbols),
            chunk,
            lanes,
            begin,
            end,
            states.ctypes.data,
            words.ctypes.data,
            lengths.ctypes.data,
        )

    _run(chunks, threads, work)
    parts = [words[(i + 1) * chunk - length : (i + 1) * chunk] for i, length in enumerate(lengths.tolist())]
    return states.astype("<u4", copy=False), lengths, np.concatenate(parts).astype("<u2", copy=False).view(np.uint8)


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
    isa_code: int | None = None,
) -> np.ndarray:
    """See `reference.rans_decode`; `isa_code` chooses an instruction set, the best one for None."""
    best = isa() if isa_code is None else isa_code
    slots, table = np.zeros((1 << bits) + 3, np.uint8), np.empty(256, np.uint32)
    frequencies = np.ascontiguousarray(frequencies, np.int64)
    models.check_frequencies(frequencies, bits)
    _library().hf_gg_rans_tables(frequencies.ctypes.data, slots.ctypes.data, table.ctypes.data)
    ends = np.cumsum(lengths) * 2
    hashes = np.empty((len(lengths), lanes), np.uint32)

    def work(begin: int, end: int) -> int:
        return _library().hf_gg_rans_decode(
            best,
            slots.ctypes.data,
            table.ctypes.data,
            bits,
            states.ctypes.data,
            words.ctypes.data,
            ends.ctypes.data,
            len(out),
            chunk,
            lanes,
            begin,
            end,
            out.ctypes.data,
            hashes.ctypes.data,
        )

    _check(_run(len(lengths), threads, work))
    return hashes


def golomb_encode(
    symbols: np.ndarray, chunk: int, codes: np.ndarray, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """See `reference.golomb_encode`."""
    chunks = -(-len(symbols) // chunk)
    lengths = np.empty(chunks, np.int64)

    def measure(begin: int, end: int) -> None:
        _library().hf_gg_golomb_measure(
            codes.ctypes.data, symbols.ctypes.data, len(symbols), chunk, begin, end, lengths.ctypes.data
        )

    _run(chunks, threads, measure)
    lengths = -(-lengths // 16)
    starts = (np.cumsum(lengths) - lengths) * 2
    out = np.zeros(2 * int(lengths.sum()), np.uint8)

    def work(begin: int, end: int) -> None:
        _library().hf_gg_golomb_encode(
            codes.ctypes.data,
            symbols.ctypes.data,
            len(symbols),
            chunk,
            begin,
            end,
            starts.ctypes.data,
            out.ctypes.data,
        )

    _run(chunks, threads, work)
    return lengths, out


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
    """See `reference.golomb_decode`."""
    best, ends = isa(), np.cumsum(lengths) * 2
    hashes = np.empty((len(lengths), lanes), np.uint32)

    def work(begin: int, end: int) -> int:
        return _library().hf_gg_golomb_decode(
            best,
            book.ctypes.data,
            order,
            words.ctypes.data,
            ends.ctypes.data,
            len(out),
            chunk,
            lanes,
            begin,
            end,
            out.ctypes.data,
            hashes.ctypes.data,
        )

    _check(_run(len(lengths), threads, work))
    return hashes


def read_table(data: bytes, bits: int) -> np.ndarray:
    """See `models.read_table`."""
    content, frequencies = np.frombuffer(data, np.uint8), np.empty(256, np.int64)
    wrong = _library().hf_gg_rans_read_table(content.ctypes.data, len(content), bits, frequencies.ctypes.data)
    if wrong == 1:
        raise ValueError(models.CUT_SHORT)
    if wrong == 2:
        raise ValueError(models.TOO_LONG)
    if wrong:
        raise ValueError(models.WRONG_FREQUENCY.format(wrong - (1 << 40), bits))
    models.check_frequencies(frequencies, bits)
    return frequencies


def packed_table(frequencies: np.ndarray) -> np.ndarray:
    """Of each symbol, frequency | start << 16, uint32 [256]; 0 for a symbol that has no frequency."""
    packed = frequencies | np.cumsum(frequencies) - frequencies << 16
    return np.where(frequencies > 0, packed, 0).astype(np.uint32)


def _check(damaged: int) -> None:
    if damaged >= 0:
        raise ValueError(f"the stream of chunk {damaged} is damaged")


def _run(chunks: int, threads: int, work: Callable[[int, int], int | None]) -> int:
    """Call `work(begin, end)` on ranges that cover all chunks, in threads. Returns a result that is >= 0, or -1."""
    ranges = deque((begin, min(begin + _PIECE, chunks)) for begin in range(0, chunks, _PIECE))
    if threads <= 1 or len(ranges) <= 1:
        ranges = deque([(0, chunks)])
    damaged: list[int] = []

    def loop() -> None:
        while not damaged:
            try:
                begin, end = ranges.popleft()
            except IndexError:
                return
            result = work(begin, end)
            if result is not None and result >= 0:
                damaged.append(result)

    helpers = [threading.Thread(target=loop) for _ in range(min(threads, len(ranges)) - 1)]
    for helper in helpers:
        helper.start()
    loop()
    for helper in helpers:
        helper.join()
    return damaged[0] if damaged else -1

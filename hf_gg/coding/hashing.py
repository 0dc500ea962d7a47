"""The checksum of the decoded symbols: as many FNV-1a hashes as there are lanes, so that vectors compute it."""

from __future__ import annotations

import zlib

import numpy as np


OFFSET = np.uint32(2166136261)
PRIME = np.uint32(16777619)


def lane_hashes(symbols: np.ndarray, chunk: int, lanes: int) -> np.ndarray:
    """FNV-1a (32 bits) of each lane of each chunk: symbol i of a chunk belongs to lane i mod lanes.

    Args:
        symbols: uint8 [n].
        chunk: symbols a chunk, a multiple of `lanes`.
        lanes: lanes of a chunk.

    Returns:
        uint32 [chunks, lanes].
    """
    chunks = -(-len(symbols) // chunk)
    hashes = np.full((chunks, lanes), OFFSET)
    whole = len(symbols) // chunk
    full, rest = symbols[: whole * chunk].reshape(whole, chunk), symbols[whole * chunk :]
    for start in range(0, chunk, lanes) if whole else ():
        hashes[:whole] = (hashes[:whole] ^ full[:, start : start + lanes]) * PRIME
    for start in range(0, len(rest), lanes):
        row = rest[start : start + lanes]
        hashes[-1, : len(row)] = (hashes[-1, : len(row)] ^ row) * PRIME
    return hashes


def checksum(hashes: np.ndarray) -> int:
    """CRC-32 of the hashes as little-endian numbers, chunk after chunk."""
    return zlib.crc32(hashes.astype("<u4", copy=False).tobytes())

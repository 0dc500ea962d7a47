"""Writes `tests/data/coded/vectors.json`. The file is fixed for version 1: run this only for another version.

python tests/coding/make_vectors.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from hf_gg.coding import ggd_model, golomb, models, reference
from hf_gg.coding.container import CONSTANT, GGD, GOLOMB, NO_MODEL, RANS, TABLE, Header, checksum, write_header


PATH = Path(__file__).parents[1] / "data" / "coded" / "vectors.json"


def levels(count: int, spread: float, shape: float) -> np.ndarray:
    """Sign-magnitude codes of integers with a generalized Gaussian distribution."""
    generator = np.random.Generator(np.random.PCG64(count))
    magnitude = spread * generator.gamma(1 / shape, size=count) ** (1 / shape)
    value = np.rint(magnitude * generator.choice([-1, 1], count)).clip(-127, 127).astype(np.int64)
    return np.where(value < 0, 128 - value, value).astype(np.uint8)


# What was fitted when the vectors were made: another fit is not another format.
GAUSSIANS = {1500: "1b15892506", 1100: "7f6b8e6b03", 3000: "01ad735104"}


def payload(symbols: np.ndarray, shape: tuple[int, ...], coder: int, model: int, bits: int, lanes: int, chunk: int):
    """A payload with any choice that the format allows, not only those of `encode`."""
    counts = reference.count_symbols(symbols)
    header = Header(coder, model, shape, bits=bits, log2_lanes=lanes.bit_length() - 1, chunk=chunk)
    header.checksum = checksum(reference.lane_hashes(symbols, chunk, lanes))
    if coder == GOLOMB:
        ranked = golomb.rank(counts)
        header.parameters = ranked.tobytes()
        header.lengths, words = reference.golomb_encode(symbols, chunk, golomb.codes(ranked, bits))
        return write_header(header) + words.tobytes()
    if model == GGD:
        fixed = GAUSSIANS.get(len(symbols))
        header.parameters = bytes.fromhex(fixed) if fixed else ggd_model.fit(counts, math.inf)
        frequencies = ggd_model.read_frequencies(header.parameters, bits)
    else:
        frequencies = models.normalize(counts, bits)
        header.parameters = models.write_table(frequencies, bits)
    states, header.lengths, words = reference.rans_encode(symbols, chunk, lanes, frequencies, bits)
    return write_header(header) + states.tobytes() + words.tobytes()


def vectors() -> list[dict]:
    """Each with a name, the payload, the shape and the symbols that it decodes to."""
    found = []

    def add(name: str, data: bytes, shape: tuple[int, ...], symbols: bytes) -> None:
        found.append({"name": name, "payload": data.hex(), "shape": list(shape), "symbols": symbols.hex()})

    add("empty", write_header(Header(CONSTANT, NO_MODEL, (3, 0))), (3, 0), b"")
    add("constant", write_header(Header(CONSTANT, NO_MODEL, (2, 3, 5), symbol=0x83)), (2, 3, 5), b"\x83" * 30)
    add("scalar", write_header(Header(CONSTANT, NO_MODEL, (), symbol=7)), (), b"\x07")
    every = np.arange(256, dtype=np.uint8)[::-1].copy()
    for name, symbols, shape, *choice in [
        ("rans, two symbols", np.array([0, 5, 0, 0, 5], np.uint8), (5,), RANS, TABLE, 8, 1, 8),
        ("rans, every symbol", every, (16, 16), RANS, TABLE, 8, 2, 64),
        ("rans, 14 bits, one lane", levels(999, 8, 2.0), (27, 37), RANS, TABLE, 14, 1, 1000),
        ("rans, 12 bits, 32 lanes, chunks", levels(1201, 3, 1.0), (1201,), RANS, TABLE, 12, 32, 320),
        ("rans, 16 bits, low rate", levels(2048, 0.2, 1.0), (2, 1024), RANS, TABLE, 16, 8, 1024),
        ("rans, GGD, 14 bits", levels(1500, 6, 1.5), (30, 50, 1), RANS, GGD, 14, 4, 512),
        ("rans, GGD, 16 bits, wide", levels(1100, 20, 0.9), (1100,), RANS, GGD, 16, 16, 1104),
        ("rans, GGD, low rate", levels(3000, 0.2, 1.2), (3000,), RANS, GGD, 15, 1, 3000),
        ("exp-Golomb, order 0", levels(1000, 1, 1.0), (10, 100), GOLOMB, NO_MODEL, 0, 1, 300),
        ("exp-Golomb, order 3", levels(1003, 10, 2.0), (1003,), GOLOMB, NO_MODEL, 3, 32, 512),
        ("exp-Golomb, order 8, every symbol", every, (256,), GOLOMB, NO_MODEL, 8, 1, 100),
        ("exp-Golomb, order 0, every symbol", every, (256,), GOLOMB, NO_MODEL, 0, 4, 256),
    ]:
        add(name, payload(symbols, shape, *choice), shape, symbols.tobytes())
    return found


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(vector) for vector in vectors())
    PATH.write_text(f'{{"version": 1, "vectors": [\n{lines}\n]}}\n')

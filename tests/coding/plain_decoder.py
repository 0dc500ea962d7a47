"""A second decoder of payloads, written from `docs/coded-checkpoints.md` in plain Python; slow."""

from __future__ import annotations

import math
import struct
import zlib


LN2 = 0.6931471805599453


def decode(payload: bytes) -> tuple[tuple[int, ...], bytes]:
    """Shape and symbols; AssertionError or IndexError where the payload breaks a rule."""
    assert payload[:5] == b"\x89GGC\x01"
    coder, model, dimensions = payload[5:8]
    crc, header = struct.unpack("<II", payload[8:16])
    assert zlib.crc32(payload[:8] + payload[12:header]) == crc and header % 4 == 0
    at = 16

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            at, byte = at + 1, payload[at]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    shape = tuple(varint() for _ in range(dimensions))
    count = varint()
    assert count == math.prod(shape)
    checksum = struct.unpack("<I", payload[at : at + 4])[0]
    at += 4
    if coder == 0:
        assert len(payload) == header and not any(payload[at + 1 :])
        return shape, payload[at : at + 1] * count
    precision, lanes, at = payload[at], 1 << payload[at + 1], at + 2
    size = varint()
    parameters = varint()
    parameters, at = payload[at : at + parameters], at + parameters
    chunks = -(-count // size)
    words = [varint() for _ in range(chunks)]
    assert not any(payload[at:header])
    at = header
    states = struct.unpack(f"<{chunks * lanes}I", payload[at : at + 4 * chunks * lanes]) if coder == 1 else ()
    at += 4 * len(states)
    symbols, hashes = bytearray(), b""
    for chunk in range(chunks):
        stream, at = payload[at : at + 2 * words[chunk]], at + 2 * words[chunk]
        length = min(size, count - chunk * size)
        if coder == 1:
            frequencies = (stored_table if model == 1 else gaussian)(parameters, precision)
            part = rans(list(states[chunk * lanes : (chunk + 1) * lanes]), stream, length, frequencies, precision)
        else:
            part = golomb(stream, length, parameters, precision)
        symbols += part
        for lane in range(lanes):
            h = 2166136261
            for symbol in part[lane::lanes]:
                h = (h ^ symbol) * 16777619 % 2**32
            hashes += struct.pack("<I", h)
    assert at == len(payload) and zlib.crc32(hashes) == checksum
    return shape, bytes(symbols)


def rans(states: list[int], stream: bytes, count: int, frequencies: list[int], bits: int) -> bytes:
    slots = [symbol for symbol, frequency in enumerate(frequencies) for _ in range(frequency)]
    assert len(slots) == 1 << bits
    at, out = 0, bytearray()
    for j in range(count):
        x = states[j % len(states)]
        y = x % (1 << bits)
        symbol = slots[y]
        x = frequencies[symbol] * (x >> bits) + y - sum(frequencies[:symbol])
        if x < 1 << 16:
            x, at = (x << 16) + struct.unpack("<H", stream[at : at + 2])[0], at + 2
        states[j % len(states)] = x
        out.append(symbol)
    assert at == len(stream) and set(states) == {1 << 16}
    return bytes(out)


def golomb(stream: bytes, count: int, book: bytes, order: int) -> bytes:
    bits = "".join(f"{byte:08b}" for byte in stream)
    at, out = 0, bytearray()
    for _ in range(count):
        zeros = bits.index("1", at) - at
        at += zeros
        digits = zeros + order + 1
        out.append(book[int(bits[at : at + digits], 2) - (1 << order)])
        at += digits
    assert len(bits) - at < 16 and "1" not in bits[at:]
    return bytes(out)


def stored_table(parameters: bytes, bits: int) -> list[int]:
    text = "".join(f"{byte:08b}" for byte in parameters)
    frequencies, at, before = [0] * 256, 8, bits - 2
    for position in range(int(text[:8], 2) + 1):
        at += 1
        if text[at - 1] == "0":
            continue
        u = text.index("0", at) - at
        before += u // 2 if u % 2 == 0 else -(u + 1) // 2
        at += u + 1
        frequencies[position // 2 + position % 2 * 128] = int("1" + text[at : at + before], 2)
        at += before
    assert "1" not in text[at:] and len(text) - at < 8
    return frequencies


def exp2(v: float) -> float:
    n = math.floor(v)
    r, e = (v - n) * LN2, 1.0
    for k in range(14, 0, -1):
        e = e * r / k + 1
    return math.ldexp(e, n)


def log2(t: float) -> float:
    m, n = math.frexp(t)
    if m < 0.7071067811865476:
        m, n = 2 * m, n - 1
    z = (m - 1) / (m + 1)
    q, e = z * z, 0.0
    for k in range(25, 0, -2):
        e = e * q + 1 / k
    return 2 * z * e / LN2 + n


def gaussian(parameters: bytes, bits: int) -> list[int]:
    largest, a, b = struct.unpack("<BHH", parameters)
    density = []
    for i in range(8 * largest + 4):
        v = b / 1024 * (log2((i + 0.5) / 8) - (a - 32768) / 1024)
        w = exp2(min(max(v, -1000.0), 10.0))
        density.append(exp2(-w) if w < 1000 else 0.0)
    cells = [2 * (density[0] + density[1] + density[2] + density[3])]
    for m in range(1, largest + 1):
        cell = density[8 * m - 4]
        for i in range(8 * m - 3, 8 * m + 4):
            cell = cell + density[i]
        cells.append(cell)
    total = cells[0]
    for cell in cells[1:]:
        total = total + 2 * cell
    frequencies = [0] * 256
    for m, cell in enumerate(cells):
        frequencies[m] = frequencies[m + 128 if m else 0] = 1 + math.floor(
            cell / total * ((1 << bits) - 2 * largest - 1)
        )
    frequencies[0] += (1 << bits) - sum(frequencies)
    return frequencies

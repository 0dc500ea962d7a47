"""Streams of bits, the first one in the top bit of the first byte; for small tables."""

from __future__ import annotations


class BitWriter:
    """Collects numbers of some bits each."""

    def __init__(self) -> None:
        self._value, self._bits = 0, 0

    def write(self, value: int, bits: int) -> None:
        """Append the low `bits` bits of a number, the top one first."""
        self._value = self._value << bits | value
        self._bits += bits

    def unary(self, value: int) -> None:
        """Append `value` ones and a zero."""
        self.write((1 << value + 1) - 2, value + 1)

    def getvalue(self) -> bytes:
        """All bits, padded with zeros to whole bytes."""
        pad = -self._bits % 8
        return (self._value << pad).to_bytes((self._bits + pad) // 8, "big")


def bits_of(data: bytes) -> str:
    """Bytes as a text of 0 and 1."""
    return f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""

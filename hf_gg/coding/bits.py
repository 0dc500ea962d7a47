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


class BitReader:
    """Reads what `BitWriter` wrote; `EOFError` at the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, bits: int) -> int:
        """The next number of `bits` bits."""
        if bits > self._left:
            raise EOFError("the bits end too early")
        self._left -= bits
        return self._value >> self._left & ((1 << bits) - 1)

    def unary(self) -> int:
        """The number of ones before the next zero."""
        value = 0
        while self.read(1):
            value += 1
        return value

    def at_end(self) -> bool:
        """Whether only the padding is left: fewer than eight zeros."""
        return self._left < 8 and self._value & ((1 << self._left) - 1) == 0

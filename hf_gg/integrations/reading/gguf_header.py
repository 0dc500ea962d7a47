"""The list of tensors of a GGUF file.

The gguf package's own reader keeps a NumPy array for every token of the vocabulary: seconds and hundreds of MB before
the first weight. Here the metadata is walked over. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
        name: in the file.
        shape: in torch's order.
        type: number of the GGML type.
        offset: of the first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def read_gguf_header(path: Path) -> list[GgufTensor]:
    """The tensors of a GGUF file of version 2 or 3, in the file's order.

    Raises:
        ValueError: not such a file, or its header is damaged or truncated.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).tensors()
    except (ValueError, struct.error, UnicodeDecodeError, OSError) as error:
        raise ValueError(
            f"{path.name} is not a readable GGUF file ({error}). It is damaged or truncated: download it again."
        ) from error


class _Walk:
    """Reads numbers one after the other; `struct.error` beyond the end."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def _number(self, format: str) -> int:
        value = struct.unpack_from(f"<{format}", self._data, self._at)[0]
        self._at += struct.calcsize(f"<{format}")
        return value

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError(f"{size} bytes at byte {self._at} are beyond its end")
        self._at += size

    def _text(self) -> str:
        size, start = self._number("Q"), self._at
        self._skip(size)
        return self._data[start : self._at].decode("utf-8")

    def _count(self, smallest: int) -> int:
        """A count of items of at least `smallest` bytes, no more than can follow."""
        count = self._number("Q")
        if count * smallest > len(self._data) - self._at:
            raise ValueError(f"{count} items at byte {self._at} are more than it can hold")
        return count

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < 4:
            inner = self._number("I")
            count = self._count(_SIZES.get(inner, 8))
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind} at byte {self._at}")

    def tensors(self) -> list[GgufTensor]:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, known are 2 and 3, little-endian")
        count, fields = self._count(0), self._number("Q")
        alignment = 32
        for _ in range(fields):
            key, kind = self._text(), self._number("I")
            if key == "general.alignment" and kind == _UINT32:
                alignment = self._number("I")
            else:
                self._value(kind)
        if alignment == 0 or alignment % 8:
            raise ValueError(f"an alignment of {alignment}")
        infos = []
        for _ in range(count):
            name, dims = self._text(), self._number("I")
            if dims > 8:
                raise ValueError(f"{name} has {dims} dimensions")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            infos.append((name, shape, self._number("I"), self._number("Q")))
        start = math.ceil(self._at / alignment) * alignment
        return [GgufTensor(name, shape, type, start + offset) for name, shape, type, offset in infos]

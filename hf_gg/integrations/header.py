"""The header of a safetensors file, read without trust."""

from __future__ import annotations

import json
import os
import struct

from safetensors import SafetensorError, safe_open


# The largest header that safetensors reads.
_MAX_HEADER = 100_000_000


class TruncatedError(ValueError):
    """A safetensors file that ends before some of its tensors do; the header is whole.

    Attributes:
        header: of the file.
        start: the byte at which tensors begin.
        tensor: one that is cut off.
    """

    def __init__(self, message: str, header: dict[str, dict], start: int, tensor: str):
        super().__init__(message)
        self.header, self.start, self.tensor = header, start, tensor


def read_header(path: str | os.PathLike) -> dict[str, dict]:
    """The header of a safetensors file, which safetensors itself accepts.

    Args:
        path: the file.

    Returns:
        For each tensor its `dtype`, `shape` and `data_offsets`; the file's own notes as `__metadata__`.

    Raises:
        TruncatedError: a `ValueError`: a file shorter than its header says; it and the first tensor beyond its end are
            named.
        ValueError: a header that is not one.
    """
    name, size = os.path.basename(path), os.path.getsize(path)
    damaged = f"{name} is not a readable safetensors file"
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{damaged}: {size} bytes, shorter than a header. Download or save it again.")
        length = struct.unpack("<Q", start)[0]
        if length > _MAX_HEADER:
            raise ValueError(f"{damaged}: {_what_else(path)}. Download or save it again.")
        if length > size - 8:
            raise ValueError(
                f"{damaged}: its header should have {length} bytes, the file has {size}. It is truncated."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{damaged}: the header is no JSON ({error}). Download or save it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{damaged}: the header is no table of tensors.")
    ends = {tensor: _end(entry, tensor, damaged) for tensor, entry in header.items() if tensor != "__metadata__"}
    for tensor, end in ends.items():
        if 8 + length + end > size:
            message = f"{name} is truncated: {tensor} ends at byte {8 + length + end}, the file has {size}."
            raise TruncatedError(message, header, 8 + length, tensor)
    try:
        with safe_open(path, framework="pt"):
            return header
    except SafetensorError as error:
        raise ValueError(f"{damaged}: {error}. Download or save it again.") from error


def _end(entry, tensor: str, damaged: str) -> int:
    """Where a tensor ends. All entries are looked at: of a truncated file, safetensors has seen none."""
    try:
        start, end = entry["data_offsets"]
        if type(start) is int and type(end) is int:
            return end
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{damaged}: the header's entry of {tensor} has no data_offsets.")


def _what_else(path: str | os.PathLike) -> str:
    """What a file is whose first bytes are no length of a header."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and the weights are elsewhere: `git lfs pull` fetches them"
    if start.startswith(b"PK"):
        return "it is a zip archive, such as torch.save writes: name it .bin"
    if start.isascii() and all(letter.isprintable() or letter.isspace() for letter in start.decode("ascii")):
        return f"it is a text, which begins {start[:24].decode('utf-8', 'replace')!r}"
    return f"it begins with the bytes {start[:8].hex(' ')}, which are no length of a header"

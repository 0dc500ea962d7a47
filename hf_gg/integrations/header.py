"""The header of a safetensors file, read without trust."""

from __future__ import annotations

import json
import os
import struct

from safetensors import SafetensorError, safe_open


# The largest header that safetensors reads.
_MAX_HEADER = 100_000_000


def read_header(path: str | os.PathLike) -> dict[str, dict]:
    """The header of a safetensors file, which safetensors itself accepts.

    Args:
        path: the file.

    Returns:
        For each tensor its `dtype`, `shape` and `data_offsets`; the file's own notes as `__metadata__`.

    Raises:
        ValueError: a header that is not one, or a file shorter than its header says; the file and the first tensor
            beyond its end are named.
    """
    name, size = os.path.basename(path), os.path.getsize(path)
    damaged = f"{name} is not a readable safetensors file"
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{damaged}: {size} bytes, shorter than a header. Download or save it again.")
        length = struct.unpack("<Q", start)[0]
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{damaged}: its header should have {length} bytes, the file has {size}. It is truncated."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{damaged}: the header is no JSON ({error}). Download or save it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{damaged}: the header is no table of tensors.")
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        try:
            end = int(entry["data_offsets"][1])
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(f"{damaged}: the header's entry of {tensor} has no data_offsets.") from error
        if 8 + length + end > size:
            raise ValueError(f"{name} is truncated: {tensor} ends at byte {8 + length + end}, the file has {size}.")
    try:
        with safe_open(path, framework="pt"):
            return header
    except SafetensorError as error:
        raise ValueError(f"{damaged}: {error}. Download or save it again.") from error

"""Three kinds of files, one interface: `entries` without reading weights, then one tensor at a time."""

from __future__ import annotations

import functools
import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..header import TruncatedError, read_header
from .entry import Entry, Problem, why_no_weights
from .gguf_header import GgufTensor, read_gguf_header


# A mapped file is let go of after this many bytes, so that pages that were read do not add up to the whole file.
_MAPPED = 1 << 24

_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
}

# What a reader of Python's or another's format raises on bytes that make no sense.
_NONSENSE = (
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    EOFError,
    OSError,
    ImportError,
    struct.error,
    pickle.UnpicklingError,
)


class TensorFile(Protocol):
    """An open file of tensors.

    Attributes:
        metadata: the file's own notes, text by name.
        problem: why some of its tensors cannot be read, which their entries say; None if all can.
    """

    metadata: dict[str, str]
    problem: Problem | None

    def entries(self) -> Iterator[Entry]:
        """What the file holds, in its order."""

    def release(self) -> None:
        """Let go of the file until the next read."""


class SafetensorsFile:
    """A safetensors file. Of one that is cut short the tensors before its end can be read.

    Args:
        path: the file.

    Raises:
        ValueError: the header is damaged; see `read_header`.
    """

    def __init__(self, path: Path):
        self._path, self._size = path, path.stat().st_size
        self.problem: Problem | None = None
        self._start = 0
        try:
            self._header = read_header(path)
        except TruncatedError as error:
            self._header, self._start = error.header, error.start
            self.problem = Problem(path.name, error.tensor, f"{error} Download it again.")
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {}) or {}
        self._open: Any = None
        self._mapped = 0

    def entries(self) -> Iterator[Entry]:
        for name, entry in sorted(self._header.items(), key=lambda item: item[1]["data_offsets"][1]):
            if self.problem and not self._is_whole(entry):
                yield Entry(
                    name, (), "?", self._path.name, 0, "damaged: the file is truncated and ends before it does"
                )
                continue
            stored = _type_name(entry["dtype"])
            start, end = entry["data_offsets"]
            yield Entry(
                name,
                tuple(entry["shape"]),
                stored,
                self._path.name,
                end - start,
                why_no_weights(stored),
                functools.partial(self.read, name),
            )

    def _is_whole(self, entry: dict) -> bool:
        """Whether the rest of a truncated file holds a tensor. safetensors itself has not looked at the header."""
        try:
            (start, end), shape = entry["data_offsets"], entry["shape"]
            dtype = _torch_type(entry["dtype"])
            size = math.prod(shape) * dtype.itemsize
            return (
                0 <= start and size == end - start and self._start + end <= self._size and min(shape, default=1) >= 0
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return False

    def release(self) -> None:
        self._open, self._mapped = None, 0

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, mapped from the file."""
        start, end = self._header[name]["data_offsets"]
        if self._open is None or self._mapped + end - start > _MAPPED:
            self.release()
        try:
            if self.problem:
                return self._read_piece(self._header[name])
            if self._open is None:
                self._open = safe_open(self._path, framework="pt")
            self._mapped += end - start
            return self._open.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} in {self._path.name} cannot be read: {error}. Download it again.") from error

    def _read_piece(self, entry: dict) -> torch.Tensor:
        """A tensor of a truncated file, which safetensors opens no more."""
        start, end = entry["data_offsets"]
        raw = np.fromfile(self._path, dtype=np.uint8, count=end - start, offset=self._start + start)
        return torch.from_numpy(raw).view(_torch_type(entry["dtype"])).view(entry["shape"])


def _type_name(dtype: str) -> str:
    """torch's name of a type of safetensors."""
    return _SAFETENSORS_TYPES.get(dtype) or dtype.lower().replace("i", "int").replace("u", "uint")


def _torch_type(dtype: str) -> torch.dtype:
    return getattr(torch, _type_name(dtype))


def load_torch_file(path: Path) -> tuple[Any, bool]:
    """What `torch.save` wrote, read as data only, and whether it is mapped: files from before PyTorch 1.6 cannot be.

    Raises:
        ValueError: damaged, or it holds something else than tensors and plain data.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True), False
    except _NONSENSE as error:
        message = " ".join(str(error).split()).partition(" In PyTorch 2.6")[0][:200]
        raise ValueError(
            f"{path.name} is not a readable PyTorch file of tensors alone ({message}). It is damaged, or "
            "holds other objects, which are not loaded: save the state dict alone, best as safetensors."
        ) from error


class TorchFile:
    """A file of `torch.save`, read without running what is in it (`weights_only=True`).

    Args:
        path: the file. One of the format before PyTorch 1.6 cannot be mapped, and is read as a whole.

    Raises:
        ValueError: damaged, or it holds something else than tensors in mappings.
    """

    def __init__(self, path: Path):
        self._path = path
        self.problem: Problem | None = None
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._touched = 0
        self._map()

    def _map(self) -> None:
        self.release()
        content, self._can_map = load_torch_file(self._path)
        self._tensors = dict(_flatten(content))

    def release(self) -> None:
        self._tensors, self._touched = {}, 0

    def entries(self) -> Iterator[Entry]:
        # as a list: a generator would keep the first mapping, and with it all that was read from it
        return iter(self._entries())

    def _entries(self) -> list[Entry]:
        seen: dict[tuple, str] = {}
        entries = []
        for name, tensor in self._tensors.items():
            key = self._key(tensor)
            stored = str(tensor.dtype).removeprefix("torch.")
            reason = why_no_weights(stored)
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                reason = "not stored as a plain tensor"
            elif key is not None and key in seen:
                reason = f"the same values as {seen[key]} (tied)"
            elif key is not None:
                seen[key] = name
            entries.append(
                Entry(
                    name,
                    tuple(tensor.shape),
                    stored,
                    self._path.name,
                    tensor.numel() * tensor.element_size(),
                    reason,
                    functools.partial(self.read, name),
                )
            )
        return entries

    @staticmethod
    def _key(tensor: torch.Tensor) -> tuple | None:
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
            return None
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, mapped from the file."""
        if not self._tensors:
            self._map()
        nbytes = self._tensors[name].numel() * self._tensors[name].element_size()
        if self._can_map and self._touched and self._touched + nbytes > _MAPPED:
            self._map()
        self._touched += nbytes
        return self._tensors[name].detach()


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


class GgufFile:
    """A GGUF file, one of several parts included. Blocks are unpacked to float32.

    Args:
        path: the file.

    Raises:
        ImportError: the gguf package is missing. ValueError: the header is damaged.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise ImportError("Reading a GGUF file needs the gguf package: `pip install gguf`.") from error
        self._gguf, self._path, self._size = gguf, path, path.stat().st_size
        self._tensors = read_gguf_header(path)
        self.problem: Problem | None = None
        self.metadata: dict[str, str] = {}

    def entries(self) -> Iterator[Entry]:
        for tensor in self._tensors:
            reason: str | None = None
            try:
                stored = self._gguf.GGMLQuantizationType(tensor.type).name
                block, block_bytes = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(tensor.type)]
            except (ValueError, KeyError):
                reason = f"of the GGML type {tensor.type}, which the gguf package does not know: upgrade it"
                yield Entry(tensor.name, tensor.shape, f"type {tensor.type}", self._path.name, 0, reason)
                continue
            reason = f"integers ({stored})" if stored in ("I8", "I16", "I32", "I64") else None
            size = math.prod(tensor.shape) // block * block_bytes
            read = functools.partial(self.read, tensor, size, block)
            yield Entry(tensor.name, tensor.shape, stored, self._path.name, size, reason, read)

    def release(self) -> None:
        pass

    def read(self, tensor: GgufTensor, size: int, block: int) -> torch.Tensor:
        """A tensor unpacked to float32."""
        name = f"{tensor.name} in {self._path.name}"
        if tensor.offset + size > self._size:
            raise ValueError(
                f"{name} ends at byte {tensor.offset + size}, the file has {self._size}. It is truncated: download it "
                "again."
            )
        if not tensor.shape or tensor.shape[-1] % block:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, no multiple of {block}. It is damaged.")
        raw = np.fromfile(self._path, dtype=np.uint8, count=size, offset=tensor.offset)
        try:
            rows = raw.reshape(*tensor.shape[:-1], -1) if size else raw
            values = self._gguf.dequantize(rows, self._gguf.GGMLQuantizationType(tensor.type))
        except NotImplementedError as error:
            raise NotImplementedError(
                f"the gguf package cannot unpack this type: {error or 'not implemented'}"
            ) from error
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be unpacked ({error}): download it again.") from error
        values = np.ascontiguousarray(values)
        return torch.from_numpy(values).view(tensor.shape)


def open_file(path: Path) -> TensorFile:
    """Open a file by its suffix, or by its first bytes where that says nothing.

    Raises:
        ValueError: damaged, missing, or none of the three kinds.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{path.name} cannot be read ({why}): download or save it again.") from error
    if path.suffix == ".gguf" or start[:4] == b"GGUF":
        return GgufFile(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return SafetensorsFile(path)
    return TorchFile(path)

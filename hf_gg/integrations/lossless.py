"""Files of floats that lie on a grid, coded without loss: training checkpoints, weights from BackSlash.

Every matrix is coded as levels of the grid (`hf_gg.coding.levels`) and decoded again for comparison before it is
written. Norms, biases and other tensors of fewer than two dimensions stay as they are. `from_pretrained` gives the
float model back, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..coding.levels import decode_levels, encode_levels, is_levels, nearest_levels
from .coded import FLOATS
from .header import read_header
from .reading.files import load_torch_file


@dataclass(frozen=True)
class StoredTensor:
    """What became of one tensor.

    Attributes:
        name: of the tensor.
        count: its numbers.
        before: bytes in the source.
        after: bytes in the result.
        entropy: order-0 entropy of the levels or codes, bits a number; NaN of a tensor that was not coded.
        signal: sum of the squares of its numbers.
        noise: sum of the squares of what was changed.
    """

    name: str
    count: int
    before: int
    after: int
    entropy: float = math.nan
    signal: float = 0.0
    noise: float = 0.0


class GridFiles:
    """Coding the tensors of files on a grid.

    Args:
        files: safetensors files, or PyTorch's own, which are read as data only.
        step: of the grid.
        coder: `"rans"` or `"eg0"`.
        round: matrices that are not on the grid are rounded to it, instead of an error, and zeros lose their signs.
        keep: regular expressions for names of matrices to leave as they are.

    Raises:
        ValueError: a file that cannot be read, a tensor in two files, a pattern that is no regular expression.
    """

    def __init__(self, files: list[Path], step: float, coder: str, round: bool = False, keep: Iterable[str] = ()):
        self.step, self.coder, self.round, self.keep = step, coder, round, [_compiled(pattern) for pattern in keep]
        self._open = ExitStack()
        self.shards = {file: _tensors(file, self._open) for file in files}
        self._check_names()

    def __enter__(self) -> GridFiles:
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def __len__(self) -> int:
        return sum(map(len, self.shards.values()))

    def check(self, progress: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Look at all tensors before anything is written.

        Returns:
            The largest distance to the grid for each matrix that will be rounded.

        Raises:
            ValueError: matrices are not on the grid (the one farthest from it is named), NaN, infinity, coded or
                quantized tensors.
        """
        distances: dict[str, float] = {}
        for tensors in self.shards.values():
            for name, read in tensors.items():
                value = read()
                if is_levels(value) or (value.dtype == torch.uint8 and f"{name}_scale" in tensors):
                    raise ValueError(f"{name} is coded or quantized already: start from the float model.")
                if self._is_coded(name, value):
                    rounded, distance = nearest_levels(value, self.step, name)
                    if not torch.equal(rounded, value):
                        distances[name] = distance
                progress()
        if distances and not self.round:
            name = max(distances, key=lambda key: distances[key])
            others = f" ({len(distances) - 1} others are not either)" if len(distances) > 1 else ""
            raise ValueError(
                f"{name} is not on the grid of {self.step:g}: a number lies {distances[name]:.3g} beside it{others}. "
                "Take the step that the model was trained with, --round to round, or --keep to leave matrices as "
                "they are."
            )
        return distances

    def write(self, folder: Path, progress: Callable[[], object] = lambda: None) -> list[StoredTensor]:
        """Write the coded files, one for each of the source, and their index if there are several.

        Returns:
            What became of each tensor.
        """
        rows, places = [], {}
        for file, tensors in self.shards.items():
            target = _safetensors_name(file.name, alone=len(self.shards) == 1)
            content = {}
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                for row, value in pool.map(lambda item: self._code(*item), tensors.items()):
                    rows.append(row)
                    content[row.name] = value
                    places[row.name] = target
                    progress()
            metadata = {"format": "pt", "weight_format": FLOATS, "coding": self.coder, "step": repr(self.step)}
            save_file(content, folder / target, metadata=metadata)
        if len(self.shards) > 1:
            sizes = {"total_parameters": sum(r.count for r in rows), "total_size": sum(r.after for r in rows)}
            index = {"metadata": sizes, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return rows

    def _check_names(self) -> None:
        """Raise a `ValueError` if two files hold a tensor of the same name: only one can be meant."""
        seen: dict[str, Path] = {}
        for file, tensors in self.shards.items():
            for name in tensors:
                if name in seen:
                    self._open.close()
                    raise ValueError(
                        f"{name} is in {seen[name].name} and in {file.name}: remove the file that is not meant."
                    )
                seen[name] = file

    def _is_coded(self, name: str, value: torch.Tensor) -> bool:
        matrix = value.is_floating_point() and value.element_size() > 1 and value.ndim >= 2 and value.numel() > 0
        return matrix and not any(pattern.search(name) for pattern in self.keep)

    def _code(self, name: str, read: Callable[[], torch.Tensor]) -> tuple[StoredTensor, torch.Tensor]:
        original = read().contiguous()
        size = original.numel() * original.element_size()
        if not self._is_coded(name, original):
            return StoredTensor(name, original.numel(), size, size), original
        value = nearest_levels(original, self.step, name)[0] if self.round else original
        payload = encode_levels(value, self.step, self.coder, name)
        if not _same_bits(decode_levels(payload, name), value):
            raise RuntimeError(f"{name} does not come back as it was: nothing was written. Please report this.")
        wide = original.double()
        noise = float((value.double() - wide).square().sum()) if self.round else 0.0
        row = StoredTensor(
            name,
            original.numel(),
            size,
            min(payload.numel(), size),
            _entropy(value, self.step),
            float(wide.square().sum()),
            noise,
        )
        return row, payload if payload.numel() < size else value


def read_files(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of the files in a folder; what is coded as levels is decoded."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    result = {}
    with ExitStack() as stack:
        for file in files:
            for name, read in _tensors(file, stack).items():
                value = read()
                result[name] = decode_levels(value, name) if is_levels(value) else value
    return result


def _tensors(file: Path, stack: ExitStack) -> dict[str, Callable[[], torch.Tensor]]:
    """A function for each tensor of a file that reads it."""
    if file.suffix == ".safetensors":
        read_header(str(file))  # its errors say what is wrong
        handle = stack.enter_context(safe_open(file, framework="pt"))
        return {name: _reader(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
    content, _ = load_torch_file(file)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file.name} holds something else than tensors by name: give a file of a model's weights.")
    # some may share memory, which safetensors refuses
    return {name: _reader(lambda name: content[name].clone(), name) for name in content}


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"keep: {pattern!r} is no regular expression ({error}).") from None


def _reader(read: Callable[[str], torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: read(name)


def _safetensors_name(name: str, alone: bool) -> str:
    if name.endswith(".safetensors") and not alone:
        return name
    return "model.safetensors" if alone else name.replace("pytorch_model", "model").rpartition(".")[0] + ".safetensors"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _entropy(value: torch.Tensor, step: float) -> float:
    flat = value.reshape(-1)
    # the sign of a zero is coded too
    levels = 2 * (flat.double() / step).round().long() + torch.signbit(flat)
    counts = torch.unique(levels, return_counts=True)[1].double()
    return float(-(counts * (counts / levels.numel()).log2()).sum() / levels.numel())

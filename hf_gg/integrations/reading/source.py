"""A checkpoint of any number of files as one stream of tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .codes import decode_entry
from .entry import Entry, Problem
from .files import GgufFile, SafetensorsFile, TensorFile, open_file
from .locate import locate, read_index


class TensorSource:
    """The tensors of a checkpoint, file after file. Weights are read by `Entry.load` only, one at a time.

    A damaged or missing file among several leaves a `Problem`, and entries that say so for the tensors that the index
    puts there; the others can be read. So does an entry of the index that names no file, and a truncated safetensors
    file, whose first tensors can be read.

    Args:
        folder: of the files.
        names: of the files, or of one index.

    Attributes:
        entries: what there is to read, codes of this package as what they decode to.
        files: names of the files.
        format: `"safetensors"`, `"PyTorch"` or `"GGUF"`.
        weight_format: of codes, by the files' metadata or `config.json`; None if they name none.
        problems: what is damaged.

    Raises:
        ValueError: the only file is damaged and none of its tensors can be read, or the index is none.
        ImportError: a GGUF file, and the gguf package is missing.
    """

    def __init__(self, folder: Path, names: list[str]):
        self.problems: list[Problem] = []
        index, bad = read_index(folder / names[0]) if names[0].endswith(".index.json") else ({}, {})
        self.files = list(dict.fromkeys(index.values())) if index else names
        if not self.files:
            raise ValueError(f"{names[0]} lists no tensors: download or save it again.")
        self.problems += [Problem(names[0], tensor, f"{tensor}: {why}.") for tensor, why in bad.items()]
        self._open: dict[str, TensorFile] = {}
        for name in self.files:
            try:
                file = self._open[name] = open_file(folder / name)
                if file.problem is not None:
                    self.problems.append(file.problem)
            except ValueError as error:
                if len(self.files) == 1:
                    raise
                first = next((tensor for tensor, shard in index.items() if shard == name), None)
                listed = f" It should hold {first} and {self._count(index, name) - 1} more." if first else ""
                self.problems.append(Problem(Path(name).name, first, f"{error}{listed}"))
        kinds = {"GGUF" if isinstance(f, GgufFile) else _kind(f) for f in self._open.values()}
        self.format = " and ".join(sorted(kinds)) or "unreadable"
        self.weight_format = self._find_weight_format(folder)
        self.entries = self._list(index)
        self.entries += [Entry(tensor, (), "?", names[0], 0, why) for tensor, why in bad.items()]

    @staticmethod
    def _count(index: dict[str, str], file: str) -> int:
        return sum(shard == file for shard in index.values())

    def _find_weight_format(self, folder: Path) -> str | None:
        for file in self._open.values():
            if "weight_format" in file.metadata:
                return file.metadata["weight_format"]
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            quantization = config.get("quantization_config") or {}
            return quantization.get("weight_format") if quantization.get("quant_method") == "gg" else None
        except (OSError, ValueError, AttributeError):
            return None

    def _list(self, index: dict[str, str]) -> list[Entry]:
        found: dict[str, Entry] = {}
        for file in self._open.values():
            for entry in file.entries():
                if entry.name in found:
                    other = found[entry.name].file
                    message = f"{entry.name} is in {other} and in {entry.file}: only the first is read."
                    self.problems.append(Problem(entry.file, entry.name, message))
                    continue
                found[entry.name] = entry
            file.release()
        for tensor, shard in index.items():
            if tensor in found:
                continue
            reason = "not read: its file is damaged or missing"
            if shard in self._open:
                reason = "not in the file that the index names"
                message = f"{tensor} should be in {shard} by the index, and is not: download or save it again."
                self.problems.append(Problem(shard, tensor, message))
            found[tensor] = Entry(tensor, (), "?", shard, 0, reason)
        entries = []
        for entry in found.values():
            try:
                entries.append(decode_entry(entry, found, self.weight_format))
            except ValueError as error:
                self.problems.append(Problem(entry.file, entry.name, str(error)))
                entries.append(Entry(entry.name, (), "?", entry.file, 0, "damaged, see the errors"))
        self.release()  # of coded tensors the headers were read
        return entries

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(entry.nbytes for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        """The entries, file after file; a file is let go of when the next one begins."""
        previous = None
        for entry in self.entries:
            if previous is not None and entry.file != previous:
                self.release()
            previous = entry.file
            yield entry

    def release(self) -> None:
        """Let go of all files until the next read."""
        for file in self._open.values():
            file.release()

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *error) -> None:
        self.release()


def _kind(file: TensorFile) -> str:
    return "safetensors" if isinstance(file, SafetensorsFile) else "PyTorch"


def open_checkpoint(model: str, revision: str | None = None, file: str | None = None) -> TensorSource:
    """Open a checkpoint by what a user calls it. See `locate` for the arguments and errors."""
    folder, names = locate(str(model), revision, file)
    return TensorSource(folder, names)

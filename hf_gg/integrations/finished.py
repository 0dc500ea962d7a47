"""Modules that a long quantization has done, in a folder, from which another process goes on if this one is killed.

Each module is one safetensors file that appears when it is complete. `run.json` says what the files belong to; with
another model, text or options they are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..nn.base import OUTLIERS


# Of the algorithm: codes of another one are not continued.
_VERSION = 1
_RUN, _STEPS = "run.json", "steps"

Coded = tuple[torch.Tensor, torch.Tensor, "tuple[torch.Tensor, torch.Tensor] | None"]


class Finished:
    """A folder of modules that are done.

    Args:
        folder: made if it is not there.
        fingerprint: of the model, the text and the options.

    Raises:
        ValueError: the folder is that of another run, or holds something else. OSError: it cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder
        run = {"version": _VERSION, "fingerprint": fingerprint}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = [file for file in folder.iterdir() if not file.name.startswith(".")]
        except OSError as error:
            raise OSError(f"no work can be kept in {folder} ({error.strerror}): give another folder.") from error
        if there:
            try:
                known = json.loads((folder / _RUN).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{folder} is not empty and no folder of a calibration: give another one.") from error
            if known != run:
                raise ValueError(
                    f"{folder} holds modules of another calibration (of another model, text or options): give another "
                    "folder, or delete it."
                )
        else:
            self._write(_RUN, json.dumps(run).encode())

    def steps(self, make: Callable[[], dict]) -> dict:
        """Steps of a grid by module name, of experts by the weight's name in it: those of before, or newly made."""
        found = self._read(_STEPS)
        if found is None:
            made = make()
            flat = {}
            for name, own in made.items():
                flat.update({f"{name}/{w}": s for w, s in own.items()} if isinstance(own, Mapping) else {name: own})
            self._write(f"{_STEPS}.safetensors", save(flat))
            return made
        steps: dict = {}
        for key, tensor in found[0].items():
            name, _, weight = key.partition("/")
            if weight:
                steps.setdefault(name, {})[weight] = tensor
            else:
                steps[name] = tensor
        return steps

    def put(self, name: str, coded: Mapping[str, Coded], notes: dict) -> None:
        """Keep a module.

        Args:
            name: of the module.
            coded: codes, scale and outliers by the weight's name in it.
            notes: what JSON can hold.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {}
        for weight, (codes, scale, outliers) in coded.items():
            tensors.update({weight: codes.contiguous(), f"{weight}_scale": scale.contiguous()})
            tensors.update({f"{weight}{suffix}": t for suffix, t in zip(OUTLIERS, outliers or ())})
        self._write(_file(name), save(tensors, {"notes": json.dumps(notes), "name": name}))

    def get(self, name: str, weights: tuple[str, ...]) -> tuple[dict[str, Coded], dict] | None:
        """A module and its notes; None if it is not there, or damaged."""
        found = self._read(_file(name).removesuffix(".safetensors"))
        if found is None or any(weight not in found[0] or f"{weight}_scale" not in found[0] for weight in weights):
            return None
        tensors, metadata = found
        coded = {}
        for weight in weights:
            outliers = tuple(tensors[f"{weight}{suffix}"] for suffix in OUTLIERS if f"{weight}{suffix}" in tensors)
            coded[weight] = tensors[weight], tensors[f"{weight}_scale"], outliers or None
        return coded, json.loads(metadata.get("notes", "{}"))  # type: ignore[return-value]  # two outlier tensors, or none

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None  # cut short by whatever killed the process: done again

    def _write(self, name: str, content: bytes) -> None:
        handle, path = -1, ""
        try:
            handle, path = tempfile.mkstemp(prefix=".new-", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path, self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise OSError(
                f"{self.folder / name} was not written ({error.strerror}); the modules before it are kept, and the "
                "same command goes on from there."
            ) from error


def fingerprint(parts: Iterable[tuple[str, bytes | memoryview]]) -> str:
    """A hash of named contents, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in parts:
        digest.update(f"{len(name)}:{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def contents(model: nn.Module) -> Iterator[tuple[str, bytes | memoryview]]:
    """A model's parameters and buffers by name, as bytes."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}", memoryview(flat.view(torch.uint8).numpy())


def _file(name: str) -> str:
    # a name may be longer than a file's may
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"{name[-150:]}-{digest}.safetensors"

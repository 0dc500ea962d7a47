"""What is known of a checkpoint: from its files, and from a measurement that belongs to these files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..folders import weight_files
from ..size import StoredSize, stored_size
from .marker import Marker, read_marker


_LICENSE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Facts:
    """Everything that a card says.

    Attributes:
        config: the checkpoint's `config.json`.
        quantization: its `quantization_config`.
        size: of its tensors.
        file_bytes: of its weight files.
        marker: base, licence and commands.
        evaluation: what `hf-gg eval` wrote of these weights; None if nothing was measured.
    """

    config: dict[str, Any]
    quantization: dict[str, Any]
    size: StoredSize
    file_bytes: int
    marker: Marker
    evaluation: dict[str, Any] | None = None


def collect(folder: Path, marker: Marker | None = None, evaluation: dict[str, Any] | None = None) -> Facts:
    """Read what a checkpoint's files say.

    Args:
        folder: of the checkpoint.
        marker: what the files do not say; None for what the folder's own card remembers.
        evaluation: of `read_evaluation`.

    Raises:
        ValueError: no checkpoint, a damaged one, or one that is not quantized by this package; the file is named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that save_pretrained or `hf-gg compress` has written.")
    config = _read_json(folder / "config.json", f"{folder} is no checkpoint: it has no config.json.")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "gg":
        raise ValueError(
            f"{folder} is not quantized by hf_gg: make a checkpoint with `hf-gg compress MODEL OUT` or "
            "GGConfig, and give its folder."
        )
    files = weight_files(folder)
    size = stored_size(str(folder))
    if not size.weights:
        raise ValueError(f"{folder} holds no weights.")
    if marker is None:
        marker = marker_of(folder) or Marker()
    return Facts(config, quantization, size, sum(file.stat().st_size for file in files), marker, evaluation)


def marker_of(folder: Path) -> Marker | None:
    """What the card in a folder remembers, if it is one of ours."""
    try:
        return read_marker((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def base_of(name: str | None) -> str | None:
    """A base model's name for the hub's metadata: None for a folder here, or for what cannot be a name there."""
    if not name or name.count("/") > 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def read_license(base: str) -> dict[str, str]:
    """The licence that a base model's card states, by the hub's keys; empty if there is none or it cannot be read.

    Args:
        base: a folder, or a name on the hub.
    """
    path = Path(base)
    file = path / "README.md" if path.exists() else None
    if file is not None and not file.is_file():
        return {}
    try:
        values = ModelCard.load(file if file is not None else base, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, no network, no permission, no YAML: each has errors of its own
        return {}
    return {key: values[key] for key in _LICENSE if isinstance(values.get(key), str)}


def fingerprint(path: Path) -> str:
    """A digest of a checkpoint's weight files, by which a measurement is known to be of them."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with open(file, "rb") as stream:
            digest.update(
                hashlib.file_digest(stream, "sha256").digest() if hasattr(hashlib, "file_digest") else _slow(stream)
            )
    return digest.hexdigest()


def _slow(stream) -> bytes:
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.digest()


def read_evaluation(path: Path, folder: Path) -> dict[str, Any]:
    """Read what `hf-gg eval --output` wrote.

    Args:
        path: the JSON file.
        folder: of the checkpoint that it must be of.

    Raises:
        ValueError: no such file, not such a file, or of other weights.
    """
    found = _read_json(path, f"There is no file {path}: `hf-gg eval MODEL --output FILE` writes one.")
    remedy = f"write it anew with `hf-gg eval {folder} --output {path}`"
    if not isinstance(found.get("evaluated_with"), str) or not ("texts" in found or "tasks" in found):
        raise ValueError(f"{path} is no evaluation by `hf-gg eval`: {remedy}.")
    if found.get("weights") != fingerprint(folder):
        raise ValueError(f"{path} is an evaluation of other weights than those of {folder}: {remedy}.")
    return found


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(missing)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): it is damaged.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no table of keys: it is damaged.")
    return found

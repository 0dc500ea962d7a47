"""Where a model's files are, and a new folder that is there as a whole or not at all."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .saving import lock_folder


_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot")
# What belongs to weights or to a training run, and not to the model that is written anew.
_LEFT_OUT = (*_OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", "*.gguf")

# In the folder that a new one is made in: what was in its place before.
_OLD = "old"


def find(model: str) -> Path:
    """The path of a model: a folder, a file, or a name on the hub, which is downloaded.

    Raises:
        ValueError: there is no such thing, or a name that none can have. OSError: the hub does not give it.
    """
    path = Path(model)
    if path.exists():
        return path
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors", ".bin"):
        raise ValueError(f"{model} does not exist: give a folder, a file, or the name of a model on the hub.")
    try:
        folder = Path(snapshot_download(model, ignore_patterns=[*_OTHER_WEIGHTS, "*.gguf"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", "*.py", "pytorch_model*"])
            )
    except HFValidationError as error:
        raise ValueError(f"{model!r} is no folder or file here, and no name on the hub ({error})") from error
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{model} is no folder here and cannot be had from the hub ({reason.rstrip('.')}): check the name and the "
            "network, or download it and give the folder."
        ) from error
    return folder


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of a model, those that Transformers would load: safetensors, or else PyTorch's own.

    Variants and leftovers of other saves may lie beside them. Of a folder without a model, all files of a kind.

    Raises:
        ValueError: there are none, or an index does not fit them.
    """
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            return _files_of_index(path / f"{name}.index.json")
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(file for file in path.glob(pattern) if not _is_training_state(file.name))
        if found:
            return found
    raise ValueError(f"{path} holds no weights (*.safetensors, pytorch_model*.bin).")


def _files_of_index(index: Path) -> list[Path]:
    content = json.loads(index.read_text(encoding="utf-8"))  # its errors are ValueErrors
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = places.values() if isinstance(places, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index} is no index of weights: it maps no tensors to files beside it.")
    missing = sorted(name for name in set(names) if not (index.parent / name).is_file())
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is not there: download or save the model again.")
    return sorted({index.parent / name for name in names})


def copy_others(source: Path, target: Path) -> list[str]:
    """Copy all files of a folder but weights, what a training run keeps, `config.json` and hidden ones.

    Returns:
        Their names.
    """
    copied = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or any(part.startswith(".") for part in name.parts) or str(name) == "config.json":
            continue
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in _LEFT_OUT) or (target / name).exists():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
        copied.append(str(name))
    return copied


def check_new(out: Path, overwrite: bool) -> None:
    """Raise a `ValueError` if a folder cannot be written: something is there, and `overwrite` is not given."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give the name of a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists and is not empty: give another folder, or --overwrite to replace it.")


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place if the block ends well, and is removed if it does not.

    What processes left there that were killed is removed; a folder that one had moved away comes back.

    Raises:
        ValueError: as `check_new`. OSError: its parent cannot be written to.
    """
    out = out.absolute()
    _clean_up(out)
    check_new(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    except OSError as error:
        raise OSError(f"no folder can be made in {out.parent} ({error.strerror}): give another place.") from error
    lock = lock_folder(str(work))
    staging, old = work / "new", work / _OLD
    try:
        staging.mkdir()
        yield staging
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(staging, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clean_up(out: Path) -> None:
    """Remove what processes left beside `out` that died, and put back what one had moved away."""
    for work in out.parent.glob(f".{glob.escape(out.name)}.new-*"):
        dead = lock_folder(str(work)) if work.is_dir() else None
        if dead is None:
            continue
        if (work / _OLD).exists() and not out.exists():
            os.replace(work / _OLD, out)
        shutil.rmtree(work, ignore_errors=True)
        os.close(dead)


def _is_training_state(name: str) -> bool:
    return name.startswith(("optimizer", "scheduler", "rng_state", "scaler", "training_args", "adapter_"))

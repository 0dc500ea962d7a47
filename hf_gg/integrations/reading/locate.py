"""From what a user names, a hub name, a folder or a file, to files on this disk."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from pathlib import Path


_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# Files beside a model that end like weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*|zero_to_fp32\w*)\.\w+")
_NAMES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def locate(model: str, revision: str | None = None, file: str | None = None) -> tuple[Path, list[str]]:
    """Find the files of a checkpoint; those of a hub name are downloaded, or taken from the cache.

    Args:
        model: a file, a folder, or a name on the hub.
        revision: a branch, tag or commit on the hub.
        file: the file to take, or a pattern (`*Q4_K_M.gguf`, `unet/*.safetensors`), where there are several.

    Returns:
        The folder, and the files' names in it.

    Raises:
        ValueError: nothing there, nothing that holds weights, or several checkpoints and no `file`.
        OSError: the hub does not answer and the cache does not have it.
    """
    if not model.strip():
        raise ValueError("The name of the model is empty: give a folder, a file, or a name on the hub.")
    path = Path(model).expanduser()
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        if model.startswith((".", "/", "~")) or model.endswith(_SUFFIXES) or model.count("/") > 1 or "\\" in model:
            raise ValueError(f"There is no file or folder {model}.")
        return _from_hub(model, revision, file)
    names = sorted(p.relative_to(path).as_posix() for p in path.glob("**/*" if file else "*") if p.is_file())
    return path, choose(names, file, model)


def choose(names: list[str], file: str | None, where: str) -> list[str]:
    """The files that make up one checkpoint.

    Args:
        names: of all files, relative to their folder.
        file: a name or pattern; None for the folder's own checkpoint: an index and its shards, else the usual single
            file, else all safetensors files, one GGUF file (all of its parts), or all `.bin` files.
        where: the folder or repository, for the messages.

    Raises:
        ValueError: none, or several GGUF files and no `file`.
    """
    if file is not None:
        found = [name for name in names if fnmatch.fnmatch(name, file) and name.endswith(_SUFFIXES)]
        if not found:
            raise ValueError(f"{where} has no weights in a file {file!r}: it has {_some(names)}.")
        return found
    files = [name for name in names if "/" not in name and not _NO_WEIGHTS.fullmatch(name)]
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        single = name.removesuffix(".index.json")
        if name in files and single not in files:
            return [name]
    for name in _NAMES:
        if name in files:
            return [name]
    for index in (name for name in files if name.endswith(".safetensors.index.json")):
        return [index]
    for suffix in (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"):
        found = [name for name in files if name.endswith(suffix)]
        checkpoints = {_whole(name) for name in found}
        if len(checkpoints) > 1 and suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{where} has several checkpoints, {_some(found)}: choose one with --file.")
        if found:
            return found
    raise ValueError(
        f"{where} has no weights: looked for .safetensors, .bin, .pt and .gguf files, and found {_some(names)}. Name "
        "a folder or file that has, or one in a folder below with --file."
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The shard of each tensor from a `….index.json`, and, of tensors whose shard is no name of a file, what it is.

    Raises:
        ValueError: the file is no such index, or none of its shards is a file of its folder.
    """
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not an index of shards ({error!r}): download or save it again.") from error
    good: dict[str, str] = {}
    bad: dict[str, str] = {}
    for tensor, shard in shards:
        # a path that leads out of the folder is not followed
        named = (
            isinstance(shard, str) and shard and Path(shard).name == shard and "\\" not in shard and "\0" not in shard
        )
        if named:
            good[tensor] = shard
        else:
            bad[tensor] = f"{path.name} says that it is in {shard!r}, which is no file of its folder"
    if bad and not good:
        tensor, message = next(iter(bad.items()))
        raise ValueError(f"{tensor}: {message}. Download or save it again.")
    return good, bad


def _whole(name: str) -> str:
    part = _PART.fullmatch(name)
    return name if part is None else f"{part[1]}-{part[2]}{part[3]}"


def _some(names: list[str]) -> str:
    names = [name for name in names if not name.startswith(".git")]
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _from_hub(model: str, revision: str | None, file: str | None) -> tuple[Path, list[str]]:
    """What is needed of a model on the hub is downloaded; where the hub cannot be asked, the cache is looked at."""
    from huggingface_hub import HfApi, errors, snapshot_download, utils

    where = f"{model} on the hub" + (f" at {revision}" if revision else "")
    utils.validate_repo_id(model)
    try:
        info = HfApi().model_info(model, revision=revision)
    except errors.GatedRepoError as error:
        raise ValueError(f"{where} is gated: ask for access on its page, then `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{model} on the hub has no revision {revision!r}: check --revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no file or folder {model}, and no model of that name on the hub that you may see: check the "
            "name, or `hf auth login` if it is private."
        ) from error
    except (OSError, errors.HTTPError):  # offline, by choice or not
        return _from_cache(model, revision, file, where)
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    chosen = wanted = choose(names, file, where)
    if chosen[0].endswith(".index.json"):
        base, _, suffix = chosen[0].removesuffix(".index.json").rpartition(".")
        wanted = [*chosen, *(name for name in names if fnmatch.fnmatch(name, f"{base}-*-of-*.{suffix}"))]

    class Bar(utils.tqdm):
        """A progress bar where standard error is a terminal."""

        def __init__(self, *args, **kwargs):
            kwargs["disable"] = kwargs.get("disable") or not sys.stderr.isatty()
            super().__init__(*args, **kwargs)

    folder = snapshot_download(model, revision=revision, allow_patterns=["config.json", *wanted], tqdm_class=Bar)
    return Path(folder), chosen


def _from_cache(model: str, revision: str | None, file: str | None, where: str) -> tuple[Path, list[str]]:
    # not by `snapshot_download`, which refuses a snapshot of which only some files were wanted
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
    reference = cached / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    path = cached / "snapshots" / (commit or "main")
    if not path.is_dir():
        raise ValueError(
            f"There is no file or folder {model}. As a name on the hub: the hub is not asked (HF_HUB_OFFLINE) or does "
            "not answer, and the cache does not have it. Go online, check HF_ENDPOINT, or give a folder or file."
        )
    names = sorted(p.relative_to(path).as_posix() for p in path.glob("**/*") if p.is_file())
    return path, choose(names, file, f"{where} (as far as it is in the cache)")

"""Saving so that a checkpoint is either the old one or the new one.

Transformers writes into the wanted folder itself, file after file; a save that dies there leaves neither checkpoint,
and one into the folder that the model was mapped from overwrites the very weights it reads. Here the whole save goes
into a folder inside the wanted one, on the same disk, and its files are moved over once all of them are complete.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
import types

from torch import nn

from . import coded, outliers


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_STAGING, _KEPT, _OTHER, _INDEX = ".saving-", ".previous-", "new-", ".safetensors.index.json"
# without a variant: `model.fp16.safetensors` may well stand beside it
_WEIGHT_FILES = re.compile(r"(new-)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def install(model: nn.Module) -> None:
    """Give a model the safe `save_pretrained`, and pushes with a card of ours."""
    model.save_pretrained = types.MethodType(save_pretrained, model)
    model._upload_modified_files = types.MethodType(_upload_modified_files, model)


def remove(model: nn.Module) -> None:
    """Give a model back its class's `save_pretrained` and pushes."""
    model.__dict__.pop("save_pretrained", None)
    model.__dict__.pop("_upload_modified_files", None)


def save_pretrained(self, save_directory, *args, **kwargs):
    """`PreTrainedModel.save_pretrained`, all or nothing. Same arguments.

    In a distributed model every process must call it; one gathers and writes, and all return when the files are there.

    Raises:
        ValueError: `save_original_format=False` or `distributed_checkpoint=True`; an unknown coding.
    """
    coder = coded.check_coding(coded.coding_of(self))
    outliers.tie(self)  # merged adapters may have made some
    save = functools.partial(type(self).save_pretrained, self)
    if kwargs.get("save_original_format") is False:
        raise ValueError(
            "save_original_format=False would store codes without the mark that keeps other loaders from taking them "
            "for weights: leave it out."
        )
    if kwargs.get("distributed_checkpoint"):
        raise ValueError(
            "distributed_checkpoint=True is not supported: Transformers loads no quantized model from such a "
            "checkpoint. Leave it out: the first process then gathers the weights and writes an ordinary checkpoint."
        )
    directory = os.fspath(save_directory)
    is_main_process = kwargs.get("is_main_process", args[0] if args else True)
    if os.path.isfile(directory):
        return save(directory, *args, **kwargs)
    if not _writes(self, is_main_process):
        result = save(directory, *args, **kwargs)
        _wait(self)
        return result
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(directory)))
    staging, lock = _make_staging(directory)
    try:
        result = save(staging, *args, **kwargs)
        if coder != "none":
            coded.correct_index(staging)
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    _wait(self)
    return result


def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
    """`PushToHubMixin._upload_modified_files`, of corrected files and with a card of measured facts."""
    from .cards import card_of_model  # which reads checkpoints, and is wanted here alone

    if coded.coding_of(self) != "none":
        coded.correct_index(working_dir)  # within a save that pushes, its own correction is yet to come
    card_of_model(self, working_dir, repo_id)
    return type(self)._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)


def _make_staging(directory: str) -> tuple[str, int | None]:
    """A new folder inside `directory`, locked while this process lives; those of saves that died are removed.

    Returns:
        Its path and the lock, None where a folder cannot be locked: there, nothing is taken for dead.
    """
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.startswith(_STAGING) and os.path.isdir(path):
            dead = lock_folder(path)
            if dead is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(dead)
    staging = tempfile.mkdtemp(prefix=_STAGING, dir=directory)
    return staging, lock_folder(staging)


def lock_folder(folder: str) -> int | None:
    """Lock a folder for this process; None if another one holds it, or if this system cannot."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _writes(model: nn.Module, is_main_process: bool) -> bool:
    """Whether this process writes files; in a distributed model the others only take part in the gathering."""
    if hasattr(model, "should_save_on_this_rank"):
        return bool(model.should_save_on_this_rank(is_main_process))
    return bool(is_main_process)


def _wait(model: nn.Module) -> None:
    """Let the processes of a distributed model wait for the one that moves the files into place."""
    if hasattr(model, "barrier_after_gathered_checkpoint_save"):
        model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))


def _publish(staging: str, directory: str) -> None:
    """Move complete files over. At every moment the folder holds one whole set of weights, the old one or the new.

    Weights and config are two files and two renames. So the old checkpoint keeps second names in a folder of its own,
    from which it loads, until both are there.
    """
    _keep_old(directory)
    files = sorted(os.listdir(staging))
    weights = [file for file in files if _WEIGHT_FILES.fullmatch(file)]
    shards = [file for file in weights if not file.endswith(_INDEX)]
    for file in files:
        if file not in weights and file != "config.json":
            _move(staging, directory, file)
    if shards != weights and any(os.path.exists(os.path.join(directory, shard)) for shard in shards):
        _point_index_elsewhere(staging, directory, shards)
    # the index last: until then nothing refers to these shards
    for file in [*shards, *(file for file in weights if file not in shards)]:
        _move(staging, directory, file)
    if weights:
        for file in os.listdir(directory):
            if _WEIGHT_FILES.fullmatch(file) and file not in weights:
                os.remove(os.path.join(directory, file))
    if "config.json" in files:
        _move(staging, directory, "config.json")
    for file in os.listdir(directory):
        if file.startswith(_KEPT):
            shutil.rmtree(os.path.join(directory, file), ignore_errors=True)


def _keep_old(directory: str) -> None:
    """Link the checkpoint of a folder into a new folder inside; nothing where there is none, or no links."""
    old = [file for file in os.listdir(directory) if _WEIGHT_FILES.fullmatch(file) or file == "config.json"]
    if "config.json" not in old or len(old) < 2:
        return
    kept = tempfile.mkdtemp(prefix=_KEPT, dir=directory)
    try:
        for file in old:
            os.link(os.path.join(directory, file), os.path.join(kept, file))
    except OSError:  # a file system without links
        shutil.rmtree(kept, ignore_errors=True)


def _move(staging: str, directory: str, file: str) -> None:
    source, target = os.path.join(staging, file), os.path.join(directory, file)
    if os.path.isdir(source):
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        os.replace(source, target)


def _point_index_elsewhere(staging: str, directory: str, shards: list[str]) -> None:
    """Switch to new shards of the names that the old index refers to: under other names, by one rename of the index.

    After that, nothing refers to the usual names and the shards can take them. The other names go with old weights.
    """
    for shard in shards:
        other = os.path.join(directory, _OTHER + shard)
        os.replace(os.path.join(staging, shard), other)
        try:
            os.link(other, os.path.join(staging, shard))
        except OSError:  # a file system without links
            shutil.copyfile(other, os.path.join(staging, shard))
    [name] = [file for file in os.listdir(staging) if file.endswith(_INDEX)]
    with open(os.path.join(staging, name)) as file:
        index = json.load(file)
    index["weight_map"] = {key: _OTHER + shard for key, shard in index["weight_map"].items()}
    interim = os.path.join(staging, _OTHER + name)
    with open(interim, "w") as file:
        json.dump(index, file)
    os.replace(interim, os.path.join(directory, name))

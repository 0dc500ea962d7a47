"""Saving so that a checkpoint is either the old one or the new one.

Transformers writes into the wanted folder itself, file after file; a save that dies there leaves neither checkpoint, and
one into the folder that the model was mapped from overwrites the very weights it reads. Here the whole save goes into a
folder inside the wanted one, on the same disk, and its files are moved over once all of them are complete.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import types

from torch import nn


# without a variant: `model.fp16.safetensors` may well stand beside it
_WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def install(model: nn.Module) -> None:
    """Give a model the safe `save_pretrained`."""
    model.save_pretrained = types.MethodType(save_pretrained, model)


def remove(model: nn.Module) -> None:
    """Give a model back its class's `save_pretrained`."""
    model.__dict__.pop("save_pretrained", None)


def save_pretrained(self, save_directory, *args, **kwargs):
    """`PreTrainedModel.save_pretrained`, all or nothing. Same arguments.

    Raises:
        ValueError: `save_original_format=False`.
    """
    save = functools.partial(type(self).save_pretrained, self)
    if kwargs.get("save_original_format") is False:
        raise ValueError(
            "save_original_format=False would store codes without the mark that keeps other loaders from taking them for "
            "weights: leave it out."
        )
    directory = os.fspath(save_directory)
    is_main_process = kwargs.get("is_main_process", args[0] if args else True)
    if os.path.isfile(directory) or not _writes(self, is_main_process):
        return save(directory, *args, **kwargs)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(directory)))
    staging = os.path.join(directory, f".saving-{os.getpid()}")
    os.makedirs(staging, exist_ok=True)
    try:
        result = save(staging, *args, **kwargs)
        _publish(staging, directory)
        return result
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _writes(model: nn.Module, is_main_process: bool) -> bool:
    """Whether this process writes files; in a distributed model the others only take part in the gathering."""
    if hasattr(model, "should_save_on_this_rank"):
        return bool(model.should_save_on_this_rank(is_main_process))
    return bool(is_main_process)


def _publish(staging: str, directory: str) -> None:
    """Move complete files over, the config last, then drop weights that are no longer meant."""
    files = sorted(os.listdir(staging), key=lambda file: (file == "config.json", file.endswith(".index.json"), file))
    weights = {file for file in files if _WEIGHT_FILES.fullmatch(file)}
    for file in files:
        source, target = os.path.join(staging, file), os.path.join(directory, file)
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            os.replace(source, target)
    if weights:
        for file in os.listdir(directory):
            if _WEIGHT_FILES.fullmatch(file) and file not in weights:
                os.remove(os.path.join(directory, file))

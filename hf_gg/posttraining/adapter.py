"""Router weights as a small adapter: a file of tensors and a file that says where they belong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .routers import Router, find_routers


WEIGHTS, CONFIG = "router_adapter.safetensors", "router_adapter.json"
_FORMAT = 1
_OF_FILES = ("format", "parameters", "sha256")
_PROBE, _PLACES = "base_probe", 64
_LEAST = 0.5  # cosine of probes; fine-tuned and rounded bases have 0.9 and more, other models about 0


class RouterAdapter:
    """Weights of some routers, to be put in the place of a base model's.

        adapter = RouterAdapter.from_pretrained("folder or name on the hub")
        adapter.load_onto(model)     # and adapter.unload(model) gives the base's own back, bit for bit
        adapter.merge(model)         # for good: model.save_pretrained then saves them with the model

    A model with the adapter has the base's modules and computes as the base does, with other router weights.

    Args:
        weights: by the name of the parameter in the base model.
        settings: what else `router_adapter.json` says, such as the settings of the training. `base_probe`, some
            numbers of the base's embeddings, is compared with the model that the weights are put into.
    """

    def __init__(self, weights: dict[str, torch.Tensor], settings: dict[str, Any] | None = None) -> None:
        self.weights, self.settings = weights, settings or {}
        self._base: dict[str, torch.Tensor] | None = None
        self._model: Any = None

    @classmethod
    def from_model(
        cls, model: nn.Module, routers: Sequence[Router], settings: dict[str, Any] | None = None
    ) -> RouterAdapter:
        """The weights of a model's routers as they are now. Of a sharded model, each process must call it."""
        weights = {name: _whole(p).clone() for name, p in router_parameters(routers).items()}
        about = {"base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or None}
        if _PROBE not in (settings or {}):
            about[_PROBE] = probe(model)
        return cls(weights, {**about, **(settings or {})})

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **hub: Any) -> RouterAdapter:
        """Read an adapter from a folder or the hub.

        Args:
            source: a folder, or a repository's name.
            **hub: for `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

        Raises:
            ValueError: the files are damaged, or of another format.
            FileNotFoundError: a folder without them.
        """
        folder = Path(source)
        if folder.is_dir():
            files = [folder / CONFIG, folder / WEIGHTS]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{folder} holds no router adapter: {file.name} is missing.")
        else:
            try:
                files = [Path(hf_hub_download(str(source), name, **hub)) for name in (CONFIG, WEIGHTS)]
            except HFValidationError as error:
                raise FileNotFoundError(f"{source} is no folder, and no name of a repository on the hub.") from error
        try:
            settings = json.loads(files[0].read_text(encoding="utf-8"))
            weights = load_file(files[1])
            digest = hashlib.sha256(files[1].read_bytes()).hexdigest()
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError, OSError) as error:
            raise ValueError(f"the router adapter in {source} is damaged: {error}. Save it again.") from error
        if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
            found = settings.get("format") if isinstance(settings, dict) else settings
            raise ValueError(f"{files[0]}: format must be {_FORMAT}, got {found!r}; a later release may read it.")
        if settings.get("parameters") != sorted(weights) or settings.get("sha256") != digest:
            raise ValueError(
                f"{source}: {CONFIG} and {WEIGHTS} do not belong together, or one is damaged. Save the adapter again."
            )
        for name, value in weights.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ValueError(f"{files[1]}: {name} is not floating point, or holds NaN or infinity. Save it again.")
        return cls(weights, {key: value for key, value in settings.items() if key not in _OF_FILES})

    def save_pretrained(self, folder: str | os.PathLike[str], push_to_hub: bool = False, **hub: Any) -> None:
        """Write both files into a folder, each whole or not at all.

        Args:
            folder: made if there is none.
            push_to_hub: upload them too, to `repo_id` or a repository of the folder's name.
            **hub: see `push_to_hub`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
            save_file({name: w.contiguous() for name, w in self.weights.items()}, Path(aside, WEIGHTS))
            digest = hashlib.sha256(Path(aside, WEIGHTS).read_bytes()).hexdigest()
            own = dict(zip(_OF_FILES, (_FORMAT, sorted(self.weights), digest), strict=True))
            about = {**self.settings, **own}
            Path(aside, CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(aside, name), folder / name)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **commit: Any) -> str:
        """Upload the adapter to a repository of models, which is made if there is none; returns its name."""
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit.setdefault("commit_message", "Upload router adapter")
            api.upload_folder(repo_id=repo, folder_path=folder, **commit)
        return repo

    def load_onto(self, model: nn.Module) -> None:
        """Put the weights in the place of the model's own, which are kept for `unload`.

        Raises:
            ValueError: the model has no such router, one of another shape, or is another than the adapter's base.
        """
        if self._base is not None:
            raise ValueError("the adapter is on a model already: unload it there first.")
        self._base, self._model = self._exchange(model, self.weights), weakref.ref(model)

    def unload(self, model: nn.Module) -> None:
        """Give the model its own weights back.

        Raises:
            ValueError: the adapter is not on this model.
        """
        if self._base is None:
            raise ValueError("the adapter is not on a model, or was merged.")
        self._must_be_on(model)
        self._exchange(model, self._base)
        self._base = None

    def merge(self, model: nn.Module) -> None:
        """Put the weights into the model for good.

        Raises:
            ValueError: as `load_onto`; the adapter is on another model.
        """
        if self._base is None:
            self._exchange(model, self.weights)
        else:
            self._must_be_on(model)
        self._base = None

    def check_base(self, model: nn.Module) -> None:
        """Compare a model with the one that the adapter was made of; an adapter without a probe fits any.

        Raises:
            ValueError: the model's embeddings are others.
        """
        stored, found = self.settings.get(_PROBE), probe(model)
        if stored is None or found is None:
            return
        try:
            wanted = torch.tensor(stored, dtype=torch.float32).reshape(_PLACES)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{_PROBE} of the adapter must be {_PLACES} numbers. Save the adapter again.") from error
        likeness = float(torch.cosine_similarity(wanted, torch.tensor(found), dim=0))
        if not likeness >= _LEAST:
            raise ValueError(
                f"the adapter is of another base model ({self.settings.get('base_model')}): the embeddings' likeness "
                f"is {likeness:.2f} of 1. Load it onto the model that it was trained on."
            )

    def _must_be_on(self, model: nn.Module) -> None:
        if self._model() is not model:
            raise ValueError("the adapter is on another model: unload it there, or read the adapter anew.")

    def _exchange(self, model: nn.Module, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parameters = router_parameters(find_routers(model))
        for name, value in new.items():
            if name not in parameters:
                raise ValueError(f"the model has no router parameter {name}: the adapter is of another base model.")
            shape = tuple(parameters[name].shape)
            if shape != tuple(value.shape):
                raise ValueError(
                    f"{name} has the shape {list(value.shape)} in the adapter and {list(shape)} in the model: it "
                    "belongs to another base model."
                )
        if new is self.weights:
            self.check_base(model)
        old = {name: _whole(parameters[name]).clone() for name in new}
        for name, value in new.items():
            write(parameters[name], value)
        return old


def router_parameters(routers: Sequence[Router]) -> dict[str, nn.Parameter]:
    """Weights and biases of routers, by their names in the base model.

    Raises:
        ValueError: one is quantized, so it cannot be trained.
    """
    found = {}
    for router in routers:
        for name, parameter in router.module.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{router.name}.{name} is quantized ({parameter.dtype}): list it in modules_to_not_convert "
                    "when the model is loaded."
                )
            # a parametrization keeps the weight below itself
            parts = name.split(".")
            if parts[0] == "parametrizations":
                name = parts[1]
            # below PEFT's model, names are those of the base
            found[f"{router.name.removeprefix('base_model.model.')}.{name}"] = parameter
    return found


def probe(model: nn.Module) -> list[float] | None:
    """Some numbers of a model's embeddings, by which another model of the same sizes is known.

    None where they are quantized or away. Of a sharded model, each process must call it.
    """
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    values = _whole(weight).flatten()
    places = torch.arange(1, _PLACES + 1) * 2654435761 % len(values)
    found = [float(f"{x:.4g}") for x in values[places].tolist()]
    return found if any(found) and all(map(math.isfinite, found)) else None


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU, gathered from all processes if it is sharded."""
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


@torch.no_grad()
def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter, also a sharded one, to a whole value."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        placements: Any = getattr(parameter, "placements", None)
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, mesh, placements))
    else:
        parameter.copy_(value)

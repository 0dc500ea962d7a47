"""Methods of PEFT that this package adds: how one is registered, and what those that change full matrices share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn
from torch.nn import functional

from ...nn import RF8Embedding, RF8Linear
from ...nn.linear import is_conv1d


def install() -> None:
    """Register the methods; a second call does nothing."""
    from .backslash import BackSlashConfig, BackSlashModel
    from .deepshape import DeepShapeConfig, DeepShapeModel

    register("backslash", BackSlashConfig, BackSlashModel)
    register("deepshape", DeepShapeConfig, DeepShapeModel)


def register(name: str, config: type, model: type) -> None:
    """Make a method known to PEFT, whose list of methods is an enumeration that nobody can add to.

    Raises:
        AttributeError: the enumeration of this Python is made otherwise.
    """
    kind = add_type(name.upper())
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model)


def add_type(name: str) -> Any:
    """The member of `PeftType` of that name, made if there is none."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


@dataclass
class MatrixConfig(PeftConfig):
    """Which modules a method acts on.

    Args:
        target_modules: names of modules, or a regular expression, as in PEFT's other methods; None for all linear
            layers but the output layer.
        exclude_modules: names of modules to leave out, or a regular expression.
        modules_to_save: modules to train whole, beside it.
        layers_to_transform: numbers of layers, if not all.
        layers_pattern: name of the list of layers, for `layers_to_transform`.
    """

    target_modules: set[str] | list[str] | str | None = field(default=None)
    exclude_modules: set[str] | list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names.")


def is_ours(peft_type: Any) -> bool:
    """Whether a PEFT method is one of this package."""
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    return isinstance(kind, type) and issubclass(kind, MatrixTuner)


class MatrixLayer(nn.Module, BaseTunerLayer):
    """A tuner layer around a linear layer or an embedding.

    Attributes:
        name: of the base layer in the model.
        rows, columns: of the matrix as [outputs, inputs], or [rows, width] of an embedding, whatever the layout.
        transposed: the base layer stores it [inputs, outputs], as GPT-2's `Conv1D` does.
    """

    def __init__(self, base_layer: nn.Module, name: str, method: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []
        self.name = name
        base: Any = self.get_base_layer()
        self.transposed = is_conv1d(base) and not isinstance(base, RF8Linear)
        if isinstance(base, (nn.Embedding, RF8Embedding)):
            self.rows, self.columns = base.num_embeddings, base.embedding_dim
        elif self.transposed:
            self.columns, self.rows = base.weight.shape
        elif isinstance(base, nn.Linear):
            self.rows, self.columns = base.out_features, base.in_features
        else:
            raise TypeError(
                f"{method} acts on linear layers, Conv1D and embeddings, and {name} is a {type(base).__name__}: name "
                "other modules in target_modules."
            )

    def _float_weight(self, what: str) -> torch.Tensor:
        """The base layer's weight.

        Raises:
            TypeError: it is no floating point tensor.
        """
        weight: Any = self.get_base_layer().weight
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                f"{what} {self.name}, whose weight is {weight.dtype}: load the base model without quantization, or "
                "dequantize it first."
            )
        return weight

    def _look_up(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of a matrix for tokens, with the scale that some models' embeddings have."""
        rows = functional.embedding(x, matrix, self.get_base_layer().padding_idx)
        scale = self._get_embed_scale()
        return rows if scale is None else rows * scale

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own casts to the dtype of the base layer, which would round what was saved
        device = device or next(self.get_base_layer().parameters()).device
        for layer_name in self.adapter_layer_names:
            layers = getattr(self, layer_name)
            if adapter_name in layers and layers[adapter_name].device.type != "meta":
                layers[adapter_name].data = layers[adapter_name].data.to(device)


class MatrixTuner(BaseTuner):
    """What tuners with one `MatrixLayer` for each chosen module share."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    linear: type[Any]
    embedding: type[Any]

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See PEFT, which takes no notice of a name that matches nothing where others do.

        Raises:
            ValueError: a name in `target_modules` matches no module.
        """
        targets = getattr(self.peft_config[adapter_name], "target_modules", None)
        names = [f".{name}" for name, _ in model.named_modules()]
        for target in sorted(targets) if isinstance(targets, (set, list)) else ():
            if not any(name.endswith(f".{target}") for name in names):
                example = next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), "")
                raise ValueError(
                    f"target_modules: {target!r} is not found in the base model, a {type(model).__name__}. Give names "
                    f"of modules or their ends, such as {example.rpartition('.')[2]!r}."
                )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            layer: Any = target
            layer.update_layer(adapter_name, config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = self.embedding if isinstance(base, (nn.Embedding, RF8Embedding)) else self.linear
        layer = kind(target, adapter_name, config, bare(current_key))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def layers_of(model: nn.Module, kind: type, adapter_name: str) -> dict[str, Any]:
    """The layers of a kind that have an adapter, by their names in the model."""
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return {
        name: module
        for name, module in modules.items()
        if adapter_name in getattr(module, module.adapter_layer_names[0])
    }


def bare(name: str) -> str:
    """A name in the base model, without what PEFT's wrappers put before it."""
    return name.removeprefix("base_model.model.")


def other_model(what: str) -> ValueError:
    """The error for an adapter that does not fit the model."""
    return ValueError(
        f"{what}: the adapter was made for another base model. Load it on the model that its adapter_config.json "
        "names as base_model_name_or_path."
    )

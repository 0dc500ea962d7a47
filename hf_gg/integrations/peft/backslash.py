"""The PEFT method BACKSLASH: a full-rank change ΔW of chosen matrices, trained under the rate penalty.

ΔW starts at zero, and most of it stays there or returns; the file holds it on a uniform grid, entropy-coded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional

from ..coded import check_coding
from .adapter_files import check_finite, decoded, encoded
from .base_probe import KEY, check_probe, probe
from .methods import MatrixConfig, MatrixLayer, MatrixTuner, add_type, bare, layers_of, other_model
from .penalty_hook import follow


@dataclass
class BackSlashConfig(MatrixConfig):
    """An adapter that adds a sparse, full-rank ΔW to each chosen matrix.

        model = get_peft_model(model, BackSlashConfig(task_type="CAUSAL_LM"))

    A `Trainer` applies the penalty with the schedule below, without a callback. In a loop of one's own it follows each
    step of the optimizer that trains ΔW, with a constant λ.

    Args:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's other
            methods; without target_modules, all linear layers but the output layer.
        lambda_, form, shape, eps, every, seed: of the penalty, see `hf_gg.BackSlash`.
        warmup, cooldown, hold_support: its schedule, see `hf_gg.BackSlashCallback`.
        grid: step of the grid on which ΔW is saved, in the weights' unit; None saves it as it is.
        coding: of the file, `"rans"`, `"eg0"` or `"none"` for plain numbers.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    lambda_: float = field(default=0.1)
    form: str = field(default="decoupled")
    shape: float | str | None = field(default=None)
    eps: float | None = field(default=None)
    every: int = field(default=20)
    seed: int = field(default=0)
    warmup: float = field(default=0.1)
    cooldown: float = field(default=0.3)
    hold_support: bool = field(default=True)
    grid: float | None = field(default=2**-13)
    coding: str = field(default="rans")

    def __post_init__(self) -> None:
        super().__post_init__()
        from ...training.backslash import check_settings
        from ...training.selection import check_number

        self.peft_type = add_type("BACKSLASH")
        check_settings(self.lambda_, self.form, self.shape, self.eps, self.every)
        check_number("warmup", self.warmup)
        check_number("cooldown", self.cooldown)
        if self.grid is not None and not check_number("grid", self.grid) > 0:
            raise ValueError(f"grid must be positive, or None to save ΔW as it is, got {self.grid}.")
        check_coding(self.coding)

    def penalty(self) -> dict[str, Any]:
        """The arguments of `BackSlash`."""
        return {name: getattr(self, name) for name in ("lambda_", "form", "shape", "eps", "every", "seed")}

    def schedule(self) -> dict[str, Any]:
        """The further arguments of `BackSlashCallback`."""
        grid = self.grid or 2**-13
        return {"warmup": self.warmup, "cooldown": self.cooldown, "hold_support": self.hold_support, "grid": grid}


class BackSlashLayer(MatrixLayer):
    """W + Σ ΔW of the active adapters; each ΔW is [rows, columns], in float32 (float64 beside float64 weights)."""

    adapter_layer_names = ("backslash_delta",)
    other_param_names = ("configs",)
    # its parameters are trained under the penalty, other adapters' are not
    penalized_names = ("backslash_delta",)
    # the base weight is not read in the forward pass
    additive = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BackSlashConfig, name: str) -> None:
        super().__init__(base_layer, name, "BackSlash")
        self.backslash_delta = nn.ParameterDict()
        self.configs: dict[str, BackSlashConfig] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BackSlashConfig) -> None:
        """Add a ΔW of zeros."""
        parameter = next(self.get_base_layer().parameters())
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{self.name} is split over processes, and a whole ΔW beside it would be trained in each by itself: "
                "add the adapter before the model is split, or train with DDP."
            )
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(self.rows, self.columns, dtype=dtype, device=parameter.device)
        self.backslash_delta[adapter_name] = nn.Parameter(zeros)
        self.configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        follow(self)  # a copy

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW in the layout of the base layer's weight."""
        delta = self.backslash_delta[adapter]
        return delta.T if self.transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the weight; see PEFT's `merge_adapter`."""
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            if name in self.backslash_delta:
                self._add(name, 1, safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was added."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.backslash_delta:
                self._add(name, -1)

    def _add(self, name: str, sign: int, safe: bool = False) -> None:
        weight = self._float_weight("BackSlash cannot be merged into")
        delta = self.get_delta_weight(name).to(weight.device)
        new = (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + sign * delta).to(weight.dtype)
        if safe and not bool(new.isfinite().all()):
            raise ValueError(
                f"The merged weight of {self.name} would hold NaN or infinity: adapter {name!r} is broken."
            )
        self.get_base_layer().weight.data = new

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for name in self.active_adapters:
                if name in self.backslash_delta:
                    result = result + self._change(x, self.backslash_delta[name]).to(result.dtype)
        return result

    def _change(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """What ΔW adds to the output, by the kind of layer."""
        raise NotImplementedError


class BackSlashLinear(BackSlashLayer):
    """Around `nn.Linear`, `RF8Linear` and `Conv1D`."""

    def _change(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.to(delta.dtype), delta)


class BackSlashEmbedding(BackSlashLayer):
    """Around `nn.Embedding` and `RF8Embedding`."""

    def _change(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return self._look_up(x, delta)


class BackSlashModel(MatrixTuner):
    """PEFT's side of the method."""

    prefix = "backslash_"
    tuner_layer_cls = BackSlashLayer
    linear = BackSlashLinear
    embedding = BackSlashEmbedding

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = layers_of(model, BackSlashLayer, adapter_name)
        names = {f"{name}.backslash_delta.{adapter_name}" for name in layers}
        if layers:
            found = {**found, KEY: probe(layers)}
        if getattr(config, "saves_exactly", False) or config.grid is None:
            check_finite(found, names)
            return found
        return encoded(found, names, config.grid, config.coding)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        layers = layers_of(model, BackSlashLayer, adapter_name)
        wanted = {f"{bare(name)}.backslash_delta": layer for name, layer in layers.items()}
        given = {bare(key): key for key in state_dict if key.endswith(".backslash_delta")}
        for name in [*given, *wanted]:
            if name not in given or name not in wanted:
                where = "the adapter's file, but not in the model" if name in given else "the model only"
                raise other_model(f"{name.removesuffix('.backslash_delta')} is a target in {where}")
        result = dict(state_dict)
        stored = [result.pop(key) for key in state_dict if bare(key) == KEY]
        for name, key in given.items():
            layer = wanted[name]
            result[key] = decoded(state_dict[key], name, (layer.rows, layer.columns))
        for numbers in stored:
            check_probe(numbers, layers)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, result)

"""The PEFT method DEEPSHAPE: matrices are mapped, in their order, to a generalized Gaussian of another shape.

The adapter of a matrix is four numbers: scale and shape of the fit, and the logarithms of the factors on shape and
standard deviation. The two factors can be trained.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from ...ggd import SHAPE_MAX, SHAPE_MIN
from ...nn.base import QuantizedWeight
from ...training.shapemap import ShapeMap, scale_of, std_of
from .methods import MatrixConfig, MatrixLayer, MatrixTuner, add_type, bare, layers_of, other_model
from .remap import Remap, function_of


MODES = ("tensor", "global")
MAPS, MODULES = "deepshape_maps", "deepshape_modules"
# by which factor the fit of the base weights may differ from the one that an adapter was made with
TOLERANCE = 1.2


@dataclass
class DeepShapeConfig(MatrixConfig):
    """An adapter that maps each chosen matrix to a generalized Gaussian of another shape and deviation.

        model = get_peft_model(model, DeepShapeConfig(shape_scale=0.8))

    Args:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's other
            methods; without target_modules, all linear layers but the output layer.
        shape_scale: factor on the shape of each matrix; below 1, a sharper peak and longer tails.
        std_scale: factor on the standard deviation about zero.
        mode: `"tensor"`: a fit of each matrix; `"global"`: one of all together.
        method: of the fit, `"moments"` or `"mle"`.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    shape_scale: float = field(default=0.8)
    std_scale: float = field(default=1.0)
    mode: str = field(default="tensor")
    method: str = field(default="moments")

    def __post_init__(self) -> None:
        super().__post_init__()
        from ...ggd.checks import check_method
        from ...training.deepshape import check_factor

        self.peft_type = add_type("DEEPSHAPE")
        check_factor("shape_scale", self.shape_scale)
        check_factor("std_scale", self.std_scale)
        check_method(self.method)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}.")


class DeepShapeLayer(MatrixLayer):
    """T(W) in place of W, where T is the map of the active adapter.

    Attributes:
        deepshape_factors: of each adapter, ln of the factors on shape and deviation, [2]; trained.
        deepshape_fits: of each adapter, scale α and shape ν of the base weight, as float32 holds them.
    """

    adapter_layer_names = ("deepshape_factors",)
    other_param_names = ("deepshape_fits",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DeepShapeConfig, name: str) -> None:
        if isinstance(base_layer, BaseTunerLayer):
            raise ValueError(
                f"{name} has a {type(base_layer).__name__} already, which a map of the weight would leave out: merge "
                "it first, or put DeepShape there before it."
            )
        super().__init__(base_layer, name, "DeepShape")
        self._float_weight("DeepShape cannot map")
        self.deepshape_factors = nn.ParameterDict()
        self.deepshape_fits: dict[str, tuple[float, float]] = {}
        self._cache: tuple[Any, ...] | None = None
        self._merged_map: ShapeMap | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DeepShapeConfig) -> None:
        """Add a map; its fit is set when all layers are there."""
        if self.merged:
            raise ValueError(
                f"{self.name} has a merged adapter, and the fit needs the base weights: unmerge it first."
            )
        factors = torch.tensor([math.log(config.shape_scale), math.log(config.std_scale)])
        device = next(self.get_base_layer().parameters()).device
        self.deepshape_factors[adapter_name] = nn.Parameter(factors.to(device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def map_of(self, adapter: str, shape_factor: float | None = None) -> ShapeMap:
        """The map of an adapter as it is, or with another factor on the shape."""
        scale, shape = self.deepshape_fits[adapter]
        log_shape, log_std = self.deepshape_factors[adapter].detach().double().tolist()
        factor = math.exp(log_shape) if shape_factor is None else shape_factor
        new = min(max(shape * factor, SHAPE_MIN), SHAPE_MAX)
        return ShapeMap(scale, shape, scale_of(std_of(scale, shape) * math.exp(log_std), new), new)

    def active_map(self) -> str | None:
        """The adapter whose map is to be applied.

        Raises:
            ValueError: several are active.
        """
        names = [name for name in self.active_adapters if name in self.deepshape_factors]
        if len(names) > 1:
            raise ValueError(
                f"{', '.join(names)} are active together, and a map is fitted to the base weights, not to those that "
                "another one has made: choose one with set_adapter."
            )
        return names[0] if names else None

    @torch.compiler.disable
    def mapped_weight(self, adapter: str) -> torch.Tensor:
        """T(W) in the base layer's layout and dtype, with gradients in the factors. It is kept until W or they change,
        unless W is decoded from codes."""
        weight, factors = self._float_weight("DeepShape cannot map"), self.deepshape_factors[adapter]
        version = 0 if weight.is_inference() else weight._version
        key = (weight, version, weight.data_ptr(), factors.detach().tolist(), self.deepshape_fits[adapter])
        if self._cache is None or not _same(self._cache[0], key):
            function = function_of(self.map_of(adapter), weight)
            mapped = torch.empty_like(weight)
            with torch.no_grad():
                function.write(weight.detach(), mapped)
            if isinstance(self.get_base_layer(), QuantizedWeight):
                self._cache = None
            else:
                self._cache = (key, mapped)
        else:
            mapped = self._cache[1]
        if not (torch.is_grad_enabled() and factors.requires_grad):
            return mapped
        return Remap.apply(factors, weight.detach(), mapped, lambda factor: self.map_of(adapter, factor))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write T(W) into the base layer; see PEFT's `merge_adapter`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.deepshape_factors]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"{self.name}: one map can be merged at a time, because each is fitted to the base weights: give one "
                "of adapter_names, and unmerge before another."
            )
        new = self.mapped_weight(names[0]).detach()
        if not bool(new.isfinite().all()):
            raise ValueError(
                f"The merged weight of {self.name} would hold NaN or infinity: adapter {names[0]!r} is broken, or "
                f"{new.dtype} cannot hold its largest weights."
            )
        # of the cache
        self.get_base_layer().weight.data = new
        self._merged_map, self._cache = self.map_of(names[0]), None
        self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Apply the inverse map: the base weights to the rounding of their dtype."""
        if self._merged_map is None or not self.merged_adapters:
            return
        weight = self._float_weight("DeepShape cannot map")
        back = torch.empty_like(weight)
        function_of(self._merged_map.inverse(), weight).write(weight.detach(), back)
        self.get_base_layer().weight.data = back
        self.merged_adapters.clear()
        self._merged_map = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter = None if self.disable_adapters or self.merged else self.active_map()
        if adapter is None:
            return self.base_layer(x, *args, **kwargs)
        return self._with(x, self.mapped_weight(adapter))

    def _with(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The output with another weight, by the kind of layer."""
        raise NotImplementedError


class DeepShapeLinear(DeepShapeLayer):
    """Around `nn.Linear`, `RF8Linear` and `Conv1D`."""

    def _with(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight.T if self.transposed else weight, self.get_base_layer().bias)


class DeepShapeEmbedding(DeepShapeLayer):
    """Around `nn.Embedding` and `RF8Embedding`."""

    def _with(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._look_up(x, weight)


class DeepShapeModel(MatrixTuner):
    """PEFT's side of the method."""

    prefix = "deepshape_"
    tuner_layer_cls = DeepShapeLayer
    linear = DeepShapeLinear
    embedding = DeepShapeEmbedding

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._fit(adapter_name)

    @torch.no_grad()
    def _fit(self, adapter_name: str) -> None:
        """Fit the base weights."""
        from ...training.deepshape import check_weights, fitted, target_of, warn_clamped

        config: Any = self.peft_config[adapter_name]
        layers = list(layers_of(self.model, DeepShapeLayer, adapter_name).values())
        fits = {}
        groups = [layers] if config.mode == "global" else [[layer] for layer in layers]
        for group in groups:
            weights = {layer.name: layer._float_weight("DeepShape cannot map") for layer in group}
            what = group[0].name if len(group) == 1 else "the model"
            if any(weight.is_meta for weight in weights.values()):
                continue
            for name, weight in weights.items():
                check_weights(name, weight)
            fit = fitted(weights, config.method, what)
            target_of(fit, config.shape_scale, config.std_scale, what)
            for layer in group:
                layer.deepshape_fits[adapter_name] = tuple(torch.tensor([fit.scale, fit.shape]).tolist())
                fits[layer.name] = fit
        if not config.inference_mode:
            warn_clamped(fits)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        prefix, maps, modules = "", [], []
        for name, layer in layers_of(model, DeepShapeLayer, adapter_name).items():
            factors = found.pop(f"{name}.deepshape_factors.{adapter_name}").detach().float().cpu()
            prefix = name.removesuffix(bare(name))
            maps.append(torch.cat([torch.tensor(layer.deepshape_fits[adapter_name]), factors]))
            modules.append([layer.rows, layer.columns, _checksum(name) ^ _checksum_of(maps[-1])])
        return {
            **found,
            f"{prefix}{MAPS}.{adapter_name}": torch.stack(maps),
            f"{prefix}{MODULES}.{adapter_name}": torch.tensor(modules, dtype=torch.int32),
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        result = dict(state_dict)
        maps = _take(result, MAPS, 4, torch.float32)
        modules = _take(result, MODULES, 3, torch.int32)
        layers = layers_of(model, DeepShapeLayer, adapter_name)
        rows = _check(maps, modules, layers, adapter_name)
        for name, layer in layers.items():
            row = maps[rows[_checksum(name)]]
            layer.deepshape_fits[adapter_name] = tuple(row[:2].tolist())
            result[f"{name}.deepshape_factors.{adapter_name}"] = row[2:].clone()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, result)


def _take(state: dict[str, torch.Tensor], name: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    keys = [key for key in state if bare(key) == name]
    value = state.pop(keys[0]).cpu() if keys else None
    if value is None or value.ndim != 2 or value.shape[1] != width or value.dtype != dtype:
        found = "is missing" if value is None else f"is {value.dtype} of the shape {list(value.shape)}"
        raise ValueError(f"{name} {found}: this is no file of a DeepShape adapter, or it is damaged.")
    return value


def _check(maps: torch.Tensor, modules: torch.Tensor, layers: dict[str, Any], adapter_name: str) -> dict[int, int]:
    """The row of each module in a file, by the checksum of its name.

    Raises:
        ValueError: the numbers make no sense, or are not of this model.
    """
    good = maps.isfinite().all() and (maps[:, 0] > 0).all()
    if len(maps) != len(modules) or not good or not ((maps[:, 1] >= 0.1 - 1e-6) & (maps[:, 1] <= 8)).all():
        raise ValueError(f"{MAPS} is damaged: it holds impossible numbers. Download or save the adapter again.")
    # what is left of the checksum of name and numbers without that of the numbers
    rest = [row[2] ^ _checksum_of(numbers) for row, numbers in zip(modules.tolist(), maps)]
    given = {name: (*row[:2], index) for index, (name, row) in enumerate(zip(rest, modules.tolist()))}
    for name, layer in layers.items():
        if _checksum(name) not in given:
            what = "no map for it, or a damaged one"
            raise other_model(f"{bare(name)} is a target in the model, and the adapter's file has {what}")
        rows, columns, _ = given[_checksum(name)]
        if (rows, columns) != (layer.rows, layer.columns):
            raise other_model(
                f"{bare(name)} had the shape {[rows, columns]}, and has {[layer.rows, layer.columns]} in the model"
            )
    if len(given) > len(layers):
        raise other_model(f"the adapter's file has maps for {len(given)} modules, and the model {len(layers)}")
    for name, layer in layers.items():
        fit, saved = layer.deepshape_fits.get(adapter_name), maps[given[_checksum(name)][2]].tolist()
        if fit is None:  # weights that are still to come
            continue
        for what, own, before in (("scale", fit[0], saved[0]), ("shape", fit[1], saved[1])):
            if not 1 / TOLERANCE < own / before < TOLERANCE:
                raise other_model(
                    f"the weights of {bare(name)} have the {what} {own:.4g}, and the adapter's were {before:.4g}"
                )
    return {key: index for key, (_, _, index) in given.items()}


def _checksum(name: str) -> int:
    """CRC-32 of a module's name in the base model, as int32."""
    return _signed(zlib.crc32(bare(name).encode()))


def _checksum_of(numbers: torch.Tensor) -> int:
    """CRC-32 of the four numbers of a map, as int32."""
    return _signed(zlib.crc32(numbers.numpy().astype("<f4").tobytes()))


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _same(a: tuple, b: tuple) -> bool:
    return a[0] is b[0] and a[1:] == b[1:]

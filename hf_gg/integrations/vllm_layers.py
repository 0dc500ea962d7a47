"""How vLLM's layers hold and multiply by codes: its quantization config, and the methods of linear layers and experts.

vLLM's own loaders cut each tensor for its tensor-parallel process and put it into its place in a merged weight (QKV,
gate and up). They find codes in the shape of the weight and scales as columns, so what they do to rows of a weight is
right for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..formats import get_format
from ..ops.coded import decode_symbols
from .selection import matches
from .vllm import METHOD


_VERSIONS = (1, 2)
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}


class GGVllmConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint of hf_gg, as vLLM keeps it.

    Args:
        weight_format: `"rf8"`, `"rf8x"`, `"rf8-e5"` or `"grid"`.
        modules_to_not_convert: what was left in full precision, in the checkpoint's names.

    Raises:
        ValueError: an unknown format.
    """

    def __init__(self, weight_format: str, modules_to_not_convert: list[str]):
        super().__init__()
        self.weight_format = get_format(weight_format).name
        self.modules_to_not_convert = list(modules_to_not_convert)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # for which the Triton kernels are compiled in the tests

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GGVllmConfig:
        """Read the `quantization_config` of a `config.json`.

        Raises:
            ValueError: a checkpoint that vLLM's layers cannot hold, with what to do.
        """
        version, weight_format = config.get("format_version", 1), config.get("weight_format", "rf8")
        if version not in _VERSIONS:
            raise ValueError(f"format_version {version!r} is of a later hf_gg: pip install -U hf-gg.")
        if weight_format == "none":
            raise ValueError(
                "The checkpoint's floats are entropy-coded, which vLLM does not read: open it with Transformers and "
                "save the model, which writes plain floats."
            )
        for key in ("quantize_embeddings", "quantize_lm_head"):
            if config.get(key):
                raise ValueError(f"{key}=True: vLLM's embeddings take no codes. Quantize the model without it.")
        return cls(weight_format, config.get("modules_to_not_convert") or [])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add the names that vLLM's model has for modules; those of merged layers stay apart."""
        alone = replace(hf_to_vllm_mapper, orig_to_new_stacked={})
        self.modules_to_not_convert = sorted(
            {*self.modules_to_not_convert, *alone.apply_list(self.modules_to_not_convert)}
        )

    def get_quant_method(self, layer: nn.Module, prefix: str):
        """The method of a layer; None leaves it to vLLM.

        Raises:
            ValueError: a merged layer of which only a part is quantized.
        """
        if isinstance(layer, LinearBase):
            if self._is_skipped(prefix):
                return UnquantizedLinearMethod()
            return GGLinearMethod(self.weight_format, prefix)
        if isinstance(layer, RoutedExperts) and not self._is_skipped(prefix):
            return GGExpertsMethod(self.weight_format, prefix, layer.moe_config)
        return None

    def _is_skipped(self, prefix: str) -> bool:
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        names = [f"{parent}.{part}" if parent else part for part in parts]
        skipped = {part: matches(part, self.modules_to_not_convert, "model") for part in names}
        if len(set(skipped.values())) > 1:
            plain = next(part for part, is_skipped in skipped.items() if is_skipped)
            raise ValueError(
                f"{plain} is not quantized, but vLLM merges it with {len(parts) - 1} more into {prefix}: quantize all "
                "of them, or none."
            )
        return skipped[names[0]]


class GGLinearMethod(LinearMethodBase):
    """A linear layer of codes.

    Args:
        weight_format: of the codes.
        prefix: name of the layer.
    """

    def __init__(self, weight_format: str, prefix: str):
        self.weight_format, self.prefix = weight_format, prefix
        self._wanted: set = set()
        self._loaded: set = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **attributes: Any,
    ) -> None:
        """Give a layer empty `weight` [out, in] of this process and `weight_scale` [out, 1]."""
        rows, name = sum(output_partition_sizes), f"{self.prefix}.weight"
        # vLLM names the parts of a merged weight by numbers or letters; one that is merged in the file has no name
        self._wanted = set(range(len(output_partition_sizes)))
        load = _unpacking(weight_loader, name, self._loaded)
        weight, scale = _codes(rows, input_size_per_partition), _scale(rows)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": load, **attributes})
        set_weight_attrs(scale, {"output_dim": 0, "weight_loader": weight_loader, **attributes})
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)
        _refuse_outliers(layer, "weight", self.weight_format, name)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded.

        Raises:
            ValueError: codes or scales are missing or damaged.
        """
        complete = None in self._loaded or len(self._loaded) == len(self._wanted)
        _finish(layer, "weight", self.weight_format, f"{self.prefix}.weight", complete)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear(x, layer.weight, layer.weight_scale, bias, self.weight_format)  # type: ignore[arg-type]


class GGExpertsMethod(FusedMoEMethodBase):
    """Fused experts of codes: gate and up as `w13_weight` [experts, 2 · width, hidden], down as `w2_weight`.

    Args:
        weight_format: of the codes.
        prefix: name of the layer.
        moe: vLLM's description of the layer.
    """

    def __init__(self, weight_format: str, prefix: str, moe: Any):
        super().__init__(moe)
        self.weight_format, self.prefix = weight_format, prefix
        self._loaded: set[str] = set()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # of vLLM's kernels, which are not used

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **attributes: Any,
    ) -> None:
        """Give a layer empty codes and scales of the experts of this process.

        Raises:
            ValueError: experts whose layout or activation is not known.
        """
        layer_: Any = layer
        activation = getattr(layer_.activation, "value", layer_.activation)
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"{self.prefix}: experts with the activation {activation!r} are not known ({known} are).")
        if (
            getattr(layer_, "is_fused_checkpoint_transposed", False)
            or getattr(layer_, "swiglu_limit", None) is not None
        ):
            raise ValueError(f"{self.prefix}: experts of this layout are not known: quantize with experts=False.")
        sizes = {
            "w13_weight": (2 * intermediate_size_per_partition, hidden_size),
            "w2_weight": (hidden_size, intermediate_size_per_partition),
        }
        for name, (rows, columns) in sizes.items():
            weight, scale = _codes(num_experts, rows, columns), _scale(num_experts, rows)
            load = _splitting(weight_loader, f"{self.prefix}.{name}", self._loaded)
            set_weight_attrs(weight, {**attributes, "weight_loader": load})
            set_weight_attrs(scale, {**attributes, "weight_loader": weight_loader, "quant_method": "channel"})
            layer.register_parameter(name, weight)
            layer.register_parameter(f"{name}_scale", scale)
            _refuse_outliers(layer, name, self.weight_format, f"{self.prefix}.{name}")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded.

        Raises:
            ValueError: codes or scales are missing or damaged.
        """
        for name, parts in (("w13_weight", {"w1", "w3"}), ("w2_weight", {"w2"})):
            _finish(layer, name, self.weight_format, f"{self.prefix}.{name}", parts <= self._loaded)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts that this process has.

        Args:
            layer: the layer.
            x: [tokens, hidden].
            topk_weights: [tokens, k].
            topk_ids: the experts' numbers [tokens, k], over all processes.
            shared_experts: run by vLLM.
            shared_experts_input: likewise.
        """
        count, k = layer.w13_weight.shape[0], topk_ids.shape[1]
        local = topk_ids.long() if layer.expert_map is None else layer.expert_map[topk_ids.long()].long()
        # experts on other processes come last
        expert, order = torch.sort(torch.where(local < 0, count, local).reshape(-1), stable=True)
        ends = torch.searchsorted(expert, torch.arange(count, device=x.device), right=True, out_int32=True)
        share = topk_weights.reshape(-1)[order].unsqueeze(-1)
        state = x[order // k]
        if layer.apply_router_weight_on_input:
            state = (state * share).to(x.dtype)
        state = ops.grouped_linear(state, layer.w13_weight, layer.w13_weight_scale, ends, self.weight_format)
        gate, up = state.chunk(2, dim=-1)
        state = _ACTIVATIONS[getattr(layer.activation, "value", layer.activation)](gate) * up
        state = ops.grouped_linear(state, layer.w2_weight, layer.w2_weight_scale, ends, self.weight_format)
        if not layer.apply_router_weight_on_input:
            state = state * share
        state = torch.where((expert < count).unsqueeze(-1), state, 0.0)
        return torch.zeros_like(state).index_copy_(0, order, state).view(-1, k, state.shape[-1]).sum(1).to(x.dtype)


def _codes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)


def _scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full((*shape, 1), torch.nan, dtype=torch.float32), requires_grad=False)


def _unpack(tensor: torch.Tensor, name: str, ndim: int) -> torch.Tensor:
    """Codes of a file, [out, in, 1] or entropy-coded, in the shape of the weight."""
    if tensor.dtype != torch.uint8:
        raise ValueError(
            f"{name} is stored as {tensor.dtype}, but by the config it holds codes (uint8). If it was left in full "
            "precision, list its module in modules_to_not_convert."
        )
    if tensor.ndim == 1:
        return decode_symbols(tensor, name)
    return tensor.squeeze(-1) if tensor.ndim == ndim + 1 and tensor.shape[-1] == 1 else tensor


def _unpacking(load: Callable, name: str, loaded: set) -> Callable:
    """A loader of vLLM that is given codes in the shape of the weight; it notes the parts of a merged one."""

    @functools.wraps(load)
    def loader(param, loaded_weight, loaded_shard_id=None):
        part = () if loaded_shard_id is None else (loaded_shard_id,)
        load(param, _unpack(loaded_weight, name, 2), *part)
        loaded.update(loaded_shard_id if isinstance(loaded_shard_id, tuple) else (loaded_shard_id,))

    return loader


def _splitting(load: Callable, name: str, loaded: set[str]) -> Callable:
    """vLLM's loader of one expert, given the codes of one, or of all with four dimensions or entropy-coded.

    vLLM tells a stack of experts by its three dimensions. Others reach the loader whole, once for gate, once for up.
    """

    @functools.wraps(load)
    def loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        loaded.add(shard_id)
        one = functools.partial(load, weight_name=weight_name, shard_id=shard_id, return_success=return_success)
        if loaded_weight.ndim == 2:
            return one(param=param, loaded_weight=loaded_weight, expert_id=expert_id)
        codes = _unpack(loaded_weight, name, 3 if loaded_weight.ndim != 3 else 2)
        if codes.ndim == 2:
            return one(param=param, loaded_weight=codes, expert_id=expert_id)
        if shard_id in ("w1", "w3"):
            codes = codes.chunk(2, dim=1)[shard_id == "w3"]
        results = [
            one(param=param, loaded_weight=part, expert_id=number) for number, part in enumerate(codes.unbind())
        ]
        return any(results) if return_success else None

    return loader


def _refuse_outliers(layer: nn.Module, weight: str, weight_format: str, name: str) -> None:
    """Have a list of outliers of a grid, for which the layers have no place, end the load with an error."""
    if weight_format != "grid":
        return

    def refuse(*args, **kwargs):
        raise ValueError(
            f"{name} has weights beyond the range of its grid, which vLLM's layers have no place for: quantize with "
            "weight_format='rf8', or with fewer target_bits."
        )

    for suffix, dtype in (("_outlier_index", torch.int32), ("_outlier_value", torch.float32)):
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": refuse})
        layer.register_parameter(f"{weight}{suffix}", parameter)


def _finish(layer: nn.Module, weight: str, weight_format: str, name: str, complete: bool) -> None:
    for suffix in ("_outlier_index", "_outlier_value"):
        layer._parameters.pop(f"{weight}{suffix}", None)
    codes, scale = getattr(layer, weight), getattr(layer, f"{weight}_scale")
    if not complete:
        raise ValueError(f"{name} is missing in the checkpoint, in whole or in part: download or save it again.")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{name}_scale is missing in the checkpoint, in whole or in part, or holds numbers that are no scales."
        )
    get_format(weight_format).validate(codes, name)

"""A stand-in for the part of vLLM that the plugin meets, which is not installed here; no test is in here.

Written after vLLM 0.33.0: class and argument names, the order of the calls, what a loader does to a tensor before it
copies it, and the checks that it makes. `install` puts it under vLLM's names. Processes of tensor and expert
parallelism are objects, one after the other, with a rank of their own.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn
from torch.nn import Parameter


QUANTIZATION_METHODS = ["awq", "fp8"]
CONFIGS: dict[str, type] = {}


@dataclass
class Rank:
    """A process: its number, and how many there are."""

    rank: int = 0
    size: int = 1


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


def register_quantization_config(name: str):
    def register(cls):
        if name not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(name)
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        CONFIGS[name] = cls
        return cls

    return register


def set_weight_attrs(weight: torch.Tensor, attributes: dict | None) -> None:
    for key, value in (attributes or {}).items():
        assert not hasattr(weight, key), f"Overwriting existing tensor attribute: {key}"
        setattr(weight, key, value)


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **attributes):
        weight = Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype))
        loader = attributes.pop("weight_loader")
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": loader})
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, quant_config, prefix, process):
        super().__init__()
        self.input_size, self.output_size, self.prefix = input_size, output_size, prefix
        self.tp_rank, self.tp_size = process.rank, process.size
        self.params_dtype = torch.get_default_dtype()
        method = UnquantizedLinearMethod() if quant_config is None else quant_config.get_quant_method(self, prefix)
        if method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method = method

    def _create(self, input_size_per_partition: int, output_partition_sizes: list[int]) -> None:
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )

    def forward(self, x):
        return self.quant_method.apply(self, x, None), None


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, quant_config=None, prefix="", process=None):
        process = process or Rank()
        super().__init__(input_size, output_size, quant_config, prefix, process)
        self._create(input_size // process.size, [output_size])

    def weight_loader(self, param, loaded_weight):
        input_dim = getattr(param, "input_dim", None)
        if input_dim is not None:
            size = param.data.shape[input_dim]
            loaded_weight = loaded_weight.narrow(input_dim, self.tp_rank * size, size)
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)


class MergedColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_sizes, quant_config=None, prefix="", process=None):
        process, self.output_sizes = process or Rank(), output_sizes
        super().__init__(input_size, sum(output_sizes), quant_config, prefix, process)
        self.output_sizes = output_sizes
        self._create(input_size, [size // process.size for size in output_sizes])

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        param_data, output_dim = param.data, getattr(param, "output_dim", None)
        if loaded_shard_id is None:  # merged in the file
            assert output_dim is not None
            offset = 0
            for shard, size in enumerate(self.output_sizes):
                self.weight_loader(param, loaded_weight.narrow(output_dim, offset, size), shard)
                offset += size
            return
        if output_dim is not None:
            offset = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size
            size = self.output_sizes[loaded_shard_id] // self.tp_size
            param_data = param_data.narrow(output_dim, offset, size)
            loaded_weight = loaded_weight.narrow(output_dim, self.tp_rank * size, size)
        assert param_data.shape == loaded_weight.shape
        param_data.copy_(loaded_weight)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        for name, loaded_weight in weights:
            param = getattr(self, name, self)
            param.weight_loader(param, loaded_weight, getattr(loaded_weight, "shard_id", None))
            yield name


class QKVParallelLinear(MergedColumnParallelLinear):
    def __init__(self, hidden_size, head_size, heads, kv_heads, quant_config=None, prefix="", process=None):
        process = process or Rank()
        self.copies = max(1, process.size // kv_heads)  # of each head of keys and values
        sizes = [heads * head_size, kv_heads * self.copies * head_size, kv_heads * self.copies * head_size]
        copies = self.copies
        super().__init__(hidden_size, sizes, quant_config, prefix, process)
        self.copies = copies

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        assert loaded_shard_id in ("q", "k", "v")
        number = "qkv".index(loaded_shard_id)
        size = self.output_sizes[number] // self.tp_size
        offset = sum(self.output_sizes[:number]) // self.tp_size
        param_data = param.data.narrow(param.output_dim, offset, size)
        rank = self.tp_rank if loaded_shard_id == "q" else self.tp_rank // self.copies
        loaded_weight = loaded_weight.narrow(param.output_dim, rank * size, size)
        assert param_data.shape == loaded_weight.shape
        param_data.copy_(loaded_weight)


class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe):
        super().__init__()
        self.moe, self.moe_quant_config, self.moe_kernel = moe, None, None

    @abstractmethod
    def get_fused_moe_quant_config(self, layer): ...


class MoEActivation(Enum):
    SILU = "silu"
    SWIGLUOAI = "swigluoai"


@dataclass
class MoEConfig:
    is_act_and_mul: bool = True
    tp: Rank = field(default_factory=Rank)


class RoutedExperts(nn.Module):
    """Experts `first` to `first + local` of this process."""

    def __init__(
        self, layer_name, experts, hidden, width, quant_config, tp=None, ep=None, activation=MoEActivation.SILU
    ):
        super().__init__()
        tp, ep = tp or Rank(), ep or Rank()
        self.layer_name, self.activation, self.quant_config = layer_name, activation, quant_config
        self.is_fused_checkpoint_transposed, self.swiglu_limit = False, None
        self.apply_router_weight_on_input = False
        self.moe_config = MoEConfig(tp=tp)
        local = experts // ep.size
        self.expert_map = None
        if ep.size > 1:
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            self.expert_map[ep.rank * local : (ep.rank + 1) * local] = torch.arange(local, dtype=torch.int32)
        self.quant_method = quant_config.get_quant_method(self, layer_name)
        assert isinstance(self.quant_method, FusedMoEMethodBase)
        hidden, width = self.quant_method.maybe_roundup_sizes(hidden, width // tp.size, torch.float32, None)
        self.quant_method.create_weights(
            layer=self,
            num_experts=local,
            hidden_size=hidden,
            unpadded_hidden_size=hidden,
            intermediate_size_per_partition=width,
            params_dtype=torch.float32,
            weight_loader=self.weight_loader,
            global_num_experts=experts,
        )

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        if self.expert_map is not None:
            expert_id = int(self.expert_map[expert_id])
            if expert_id == -1:
                return False if return_success else None
        assert shard_id in ("w1", "w2", "w3")
        dim = {"w1": 0, "w2": 1, "w3": 0}[shard_id]
        assert loaded_weight.ndim == 2  # three are a whole stack, in the place of one
        data = param.data[expert_id]
        per_channel = "scale" in weight_name
        if per_channel and getattr(param, "quant_method", None) != "channel":
            raise ValueError("quant method must be one of ['tensor', 'channel', 'group', 'block']")
        if shard_id == "w2":
            if not per_channel:
                loaded_weight = self._part(loaded_weight, dim)
        else:
            half = data.shape[dim] // 2
            data = data.narrow(dim, 0 if shard_id == "w1" else half, half)
            loaded_weight = self._part(loaded_weight, dim)
        assert data.shape == loaded_weight.shape
        data.copy_(loaded_weight)
        return True if return_success else None

    def _part(self, weight, dim):
        size = weight.shape[dim] // self.moe_config.tp.size
        return weight.narrow(dim, self.moe_config.tp.rank * size, size)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]):
        mapping = [
            ("experts.w13_weight", "experts.gate_up_proj", 0, "w1"),
            ("experts.w13_weight", "experts.gate_up_proj", 1, "w3"),
            ("experts.w2_weight", "experts.down_proj", 0, "w2"),
        ]
        for name, loaded_weight in weights:
            qual_name = f"{self.layer_name}.{name}"
            is_fused = loaded_weight.dim() == 3
            for param_name, weight_name, expert_id, shard_id in mapping:
                if weight_name not in qual_name:
                    continue
                weight_name = qual_name.replace(weight_name, param_name)
                param_name = weight_name.removeprefix(f"{self.layer_name}.")
                param = getattr(self, param_name, None)
                if param is None:
                    raise AttributeError(f"Layer {self.layer_name} has no parameter {param_name!r}")
                if is_fused:
                    shard = loaded_weight.chunk(2, dim=1)[expert_id] if shard_id in ("w1", "w3") else loaded_weight
                    start = 0
                else:
                    shard, start = loaded_weight.unsqueeze(0), expert_id
                for number, one in enumerate(shard.unbind(), start=start):
                    success = param.weight_loader(
                        param=param,
                        loaded_weight=one,
                        weight_name=weight_name,
                        shard_id=shard_id,
                        expert_id=number,
                        return_success=True,
                    )
                    if success:
                        yield param_name


@dataclass
class WeightsMapper:
    orig_to_new_stacked: dict = field(default_factory=dict)
    orig_to_new_prefix: dict = field(default_factory=dict)

    def apply_list(self, names: list[str]) -> list[str]:
        result = []
        for name in names:
            for old, (new, _) in self.orig_to_new_stacked.items():
                name = name.replace(old, new, 1)
            for old, new in self.orig_to_new_prefix.items():
                name = new + name.removeprefix(old) if name.startswith(old) else name
            result.append(name)
        return result


def install(patch) -> None:
    """Put the stand-in under vLLM's names, for as long as a monkeypatch lasts."""
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.fused_moe": {
            "FusedMoEMethodBase": FusedMoEMethodBase,
            "RoutedExperts": RoutedExperts,
        },
        "vllm.model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": QUANTIZATION_METHODS,
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)

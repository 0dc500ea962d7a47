"""The vLLM plugin within a stand-in of vLLM: what its loaders do to our checkpoints, and the same logits."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import vllm_stand_in as vllm
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_gg import GGConfig, quantize_
from hf_gg.integrations.selection import replace_module


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEAD = 16
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def plugin():
    """vLLM with the plugin registered, as its entry point does it; the class of its config."""
    with pytest.MonkeyPatch.context() as patch:
        vllm.install(patch)
        (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "hf_gg"]
        for _ in range(2):  # vLLM may call it again
            entry.load()()
        yield vllm.CONFIGS["gg"]
    sys.modules.pop("hf_gg.integrations.vllm_layers", None)
    vllm.QUANTIZATION_METHODS.remove("gg")
    vllm.CONFIGS.clear()


def save(folder: Path, moe: bool = False, **options) -> Path:
    torch.manual_seed(0)
    if moe:
        experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": HEAD}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    quantize_(model, GGConfig(**options)).save_pretrained(folder)
    return folder


def vllm_config(plugin, folder: Path):
    config = plugin.from_config(AutoConfig.from_pretrained(folder).quantization_config)
    config.packed_modules_mapping = PACKED
    return config


class Merged(nn.Module):
    """A part of a merged layer's output, of all processes; what the model calls in the place of a layer."""

    def __init__(self, layers: list, number: int):
        super().__init__()
        self.layers, self.number = [layers], number  # no submodules: several share them

    def forward(self, x):
        parts = []
        for layer in self.layers[0]:
            sizes = [size // layer.tp_size for size in layer.output_sizes]
            parts.append(layer(x)[0].split(sizes, dim=-1)[self.number])
        return torch.cat(parts[:: getattr(layer, "copies", 1) if self.number else 1], dim=-1)


class Summed(nn.Module):
    """Layers of processes that each have a part of the inputs."""

    def __init__(self, layers: list):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        parts = x.chunk(len(self.layers), dim=-1)
        return sum(layer(part)[0] for layer, part in zip(self.layers, parts))


class Experts(nn.Module):
    def __init__(self, layers: list):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        arguments = (hidden_states, top_k_weights, top_k_index.int(), None, None)
        return sum(layer.quant_method.apply(layer, *arguments) for layer in self.layers)


def served(plugin, folder: Path, tp: int = 1, ep: int = 1) -> nn.Module:
    """The model as vLLM's layers hold it, within Transformers' attention."""
    config = AutoConfig.from_pretrained(folder)
    quantization = vllm_config(plugin, folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    made: dict[str, list] = {}

    def layers(name, cls, *args):
        made[name] = [
            cls(*args, quant_config=quantization, prefix=name, process=vllm.Rank(rank, tp)) for rank in range(tp)
        ]
        return made[name]

    hidden, width, heads, kv = 64, 96, 4, config.num_key_value_heads
    for number in range(config.num_hidden_layers):
        base = f"model.layers.{number}"
        qkv = layers(f"{base}.self_attn.qkv_proj", vllm.QKVParallelLinear, hidden, HEAD, heads, kv)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            replace_module(model, f"{base}.self_attn.{name}", Merged(qkv, part))
        out = layers(f"{base}.self_attn.o_proj", vllm.RowParallelLinear, heads * HEAD, hidden)
        replace_module(model, f"{base}.self_attn.o_proj", Summed(out))
        if hasattr(model.model.layers[number].mlp, "experts"):
            name = f"{base}.mlp.experts"
            ranks = [(vllm.Rank(rank, tp), vllm.Rank(part, ep)) for rank in range(tp) for part in range(ep)]
            made[name] = [vllm.RoutedExperts(name, 8, hidden, 32, quantization, a, b) for a, b in ranks]
            replace_module(model, name, Experts(made[name]))
            continue
        merged = layers(f"{base}.mlp.gate_up_proj", vllm.MergedColumnParallelLinear, hidden, [width, width])
        for part, name in enumerate(("gate_proj", "up_proj")):
            replace_module(model, f"{base}.mlp.{name}", Merged(merged, part))
        down = layers(f"{base}.mlp.down_proj", vllm.RowParallelLinear, width, hidden)
        replace_module(model, f"{base}.mlp.down_proj", Summed(down))
    load(model, made, tensors)
    return model


def load(model: nn.Module, made: dict[str, list], tensors: dict[str, torch.Tensor]) -> None:
    """The stream of a checkpoint's tensors into layers, as vLLM maps names; then its call at the end."""
    shards = {
        part: (merged, "qkv"[n] if merged == "qkv_proj" else n)
        for merged in PACKED
        for n, part in enumerate(PACKED[merged])
    }
    plain = dict(model.named_parameters())
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        merged, shard = shards.get(last, (last, None))
        for layer in made.get(f"{parent}.{merged}", ()):
            if shard is not None:
                tensor.shard_id = shard
                list(layer.load_weights([(parameter, tensor)]))
            elif isinstance(layer, vllm.RoutedExperts):
                list(layer.load_weights([(parameter, tensor)]))
            else:
                param = layer._parameters[parameter]
                param.weight_loader(param, tensor)
        if f"{parent}.{merged}" not in made:
            plain[name].data.copy_(tensor)
    for layers in made.values():
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("options", "tp"),
    [
        ({}, 1),
        ({}, 2),
        ({}, 4),  # more processes than heads of keys: each head is on two
        ({"weight_format": "rf8x", "coding": "rans"}, 2),
        ({"weight_format": "rf8-e5", "scale": "tensor"}, 2),
        ({"weight_format": "grid", "scale": "row"}, 1),
        ({"modules_to_not_convert": ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp"]}, 2),
    ],
)
def test_logits_are_those_of_transformers(plugin, tmp_path, options, tp):
    save(tmp_path, **options)
    own = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(logits(served(plugin, tmp_path, tp)), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("options", "tp", "ep"), [({}, 1, 1), ({}, 2, 1), ({"coding": "rans"}, 1, 4)])
def test_experts(plugin, tmp_path, options, tp, ep):
    save(tmp_path, moe=True, **options)
    own = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(logits(served(plugin, tmp_path, tp, ep)), own, rtol=1e-5, atol=1e-5)


def test_router_weight_on_the_input(plugin, tmp_path):
    save(tmp_path, moe=True)
    model = served(plugin, tmp_path)
    layer = model.model.layers[0].mlp.experts.layers[0]
    x, ids, shares = torch.randn(5, 64), torch.tensor([[1, 7]] * 5), torch.full((5, 2), 0.5)
    layer.apply_router_weight_on_input = True
    one = layer.quant_method.apply(layer, x, shares, ids)
    layer.apply_router_weight_on_input = False
    torch.testing.assert_close(one, 2 * layer.quant_method.apply(layer, 0.5 * x, shares, ids))


def test_the_config_says_what_vllm_asks(plugin, tmp_path):
    config = vllm_config(plugin, save(tmp_path))
    assert config.get_name() == "gg" and config.get_config_filenames() == [] and config.get_min_capability() == 80
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    assert config.get_quant_method(nn.Embedding(4, 4), "model.embed_tokens") is None


def test_names_of_a_model_within_another_one(plugin):
    config = plugin("rf8", ["model.layers.#.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
    stacked = {".q_proj": (".qkv_proj", "q")}
    config.apply_vllm_mapper(vllm.WeightsMapper(stacked, {"model.": "language_model.model."}))
    config.packed_modules_mapping = PACKED
    assert config._is_skipped("language_model.model.layers.3.mlp.down_proj")
    assert not config._is_skipped("language_model.model.layers.1.self_attn.qkv_proj")
    with pytest.raises(ValueError, match=r"q_proj is not quantized, but vLLM merges it with 2 more into .*qkv_proj"):
        config._is_skipped("language_model.model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize_lm_head": True}, "quantize_lm_head=True: vLLM's embeddings take no codes"),
        ({"weight_format": "none"}, "entropy-coded, which vLLM does not read"),
        ({"weight_format": "rf9"}, "rf9"),
        ({"format_version": 3}, "of a later hf_gg"),
    ],
)
def test_configs_it_refuses(plugin, change, message):
    with pytest.raises(ValueError, match=message):
        plugin.from_config({"quant_method": "gg", "weight_format": "rf8", "format_version": 2, **change})


def change_file(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_damage_is_named(plugin, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    save(tmp_path / "scale")
    change_file(tmp_path / "scale", lambda tensors: tensors.pop(f"{name}_scale"))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.qkv_proj.weight_scale is missing .* in part"):
        served(plugin, tmp_path / "scale")
    save(tmp_path / "codes", weight_format="rf8x")
    change_file(tmp_path / "codes", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.qkv_proj.weight is missing .* in part"):
        served(plugin, tmp_path / "codes")
    save(tmp_path / "reserved")
    change_file(tmp_path / "reserved", lambda tensors: tensors[name].fill_(7))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.qkv_proj.weight: code 0x07"):
        served(plugin, tmp_path / "reserved")
    save(tmp_path / "experts", moe=True)
    change_file(tmp_path / "experts", lambda tensors: tensors.pop("model.layers.0.mlp.experts.down_proj"))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.w2_weight is missing"):
        served(plugin, tmp_path / "experts")
    save(tmp_path / "floats")
    change_file(tmp_path / "floats", lambda tensors: tensors.update({name: torch.randn(32, 64)}))
    with pytest.raises(ValueError, match=r"stored as torch.float32, but by the config it holds codes"):
        served(plugin, tmp_path / "floats")


def test_outliers_of_a_grid_are_refused(plugin, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = 40.0
    quantize_(model, GGConfig(weight_format="grid", step=0.001)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj.weight has weights beyond the range of its grid"):
        served(plugin, tmp_path)


def test_experts_of_an_unknown_activation_are_refused(plugin):
    with pytest.raises(ValueError, match=r"experts with the activation 'swigluoai' are not known"):
        vllm.RoutedExperts("experts", 4, 16, 16, plugin("rf8", []), activation=vllm.MoEActivation.SWIGLUOAI)

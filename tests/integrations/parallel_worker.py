"""What each process of `test_parallel.py` runs: checks that a model over several processes equals the model in one.

    parallel_worker.py RANK WORLD FOLDER CHECK…

Every process writes `results-RANK.json` into the folder, check by check: what it measured, or the error. After an
error it ends, because the others may wait for it in the middle of something.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_gg import GGConfig, RF8Experts, RF8Linear, gg_init, gg_init_, quantization_report
from hf_gg.ggd.sampling import gg_
from hf_gg.integrations.selection import code_parameters


# Odd widths wherever Transformers can split them. Heads and experts must divide evenly.
_TEXT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 30,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_QWEN3_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
_ARIA = {"head_dim": 12, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**_TEXT, attention_bias=True, mlp_bias=True),
    "tied": lambda: tf.LlamaConfig(**_TEXT, tie_word_embeddings=True),
    "mixtral": lambda: tf.MixtralConfig(**{**_TEXT, "intermediate_size": 98}, **_EXPERTS),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_TEXT, **_QWEN3_MOE, moe_intermediate_size=30),
    # widths that the model in full precision can run too: its grouped product needs multiples of 16 bytes
    "qwen3_moe_even": lambda: tf.Qwen3MoeConfig(**_TEXT, **_QWEN3_MOE, moe_intermediate_size=32),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**{**_TEXT, **_DEEPSEEK}),
    "gpt_oss": lambda: tf.GptOssConfig(
        **{**_TEXT, "intermediate_size": 44}, **_EXPERTS, head_dim=16, sliding_window=16
    ),
    # transposed experts that have a plan for tensor parallelism, which GPT-OSS has not
    "aria": lambda: tf.AriaTextConfig(**{**_TEXT, "intermediate_size": 44}, **_ARIA),
    "aria_even": lambda: tf.AriaTextConfig(**{**_TEXT, "intermediate_size": 48}, **_ARIA),
}
DENSE, MOE = ("llama", "tied"), ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TP, FSDP = {"tp_size": 2}, {"fsdp_size": 2}
EP_REDUCE = {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}
EP_EXCHANGE = {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}
EP_FSDP = {"fsdp_size": 2, "ep_size": 2}
TOLERANCE = 1e-6  # of logits around 1, in float32

FOLDER = Path()
TOKENS = torch.randint(0, 101, (4, 11), generator=torch.Generator().manual_seed(3))


# --- models and checkpoints ---


def load(path: Path, parallel: dict | None = None, **kwargs):
    family = path.relative_to(FOLDER).parts[0]
    auto = tf.AriaTextForCausalLM if family.startswith("aria") else tf.AutoModelForCausalLM
    kwargs.setdefault("dtype", torch.float32)
    return auto.from_pretrained(path, distributed_config=parallel and DistributedConfig(**parallel), **kwargs)


@functools.cache
def full_precision(family: str) -> Path:
    """A checkpoint in full precision, written by the first process."""
    path = FOLDER / family / "full"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = FAMILIES[family]()
        auto = tf.AriaTextForCausalLM if family.startswith("aria") else tf.AutoModelForCausalLM.from_config
        model = auto(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases are zero and norms are one otherwise
                parameter.data += torch.randn_like(parameter) / 10
        model.save_pretrained(path)
    dist.barrier()
    return path


@functools.cache
def quantized(family: str, **config) -> Path:
    """A checkpoint in RF8, quantized in one process."""
    path = FOLDER / family / "-".join(["rf8", *(f"{key}-{value}" for key, value in config.items())])
    model = load(full_precision(family), quantization_config=GGConfig(**config))
    model.save_pretrained(path)  # by the first process
    dist.barrier()
    return path


def logits(model: nn.Module, grad: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return model(TOKENS).logits.detach()


@functools.cache
def expected(path: Path) -> torch.Tensor:
    """Logits of a checkpoint in one process."""
    return logits(load(path))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_files(a: Path, b: Path) -> None:
    """Two checkpoints hold the same, bit for bit, but that tied weights may be stored twice in the first."""
    first, second = tensors(a), tensors(b)
    assert second.keys() <= first.keys(), sorted(second.keys() - first.keys())
    tied = {"lm_head.weight", "lm_head.weight_scale"} if "tied" in str(a) else set()
    assert first.keys() - second.keys() <= tied, sorted(first.keys() - second.keys())
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype, name
        assert torch.equal(first[name], tensor), name


def assert_split(model: nn.Module) -> None:
    """Some codes are split over the processes, and no process holds more of them than its part."""
    split = 0
    for name, module, weight in code_parameters(model):
        codes, scale = module._parameters[weight], module._parameters[f"{weight}_scale"]
        assert codes.dtype == torch.uint8 and scale.dtype == torch.float32, name
        assert not codes.requires_grad and not scale.requires_grad, name
        if isinstance(codes, DTensor):
            split += 1
            assert 0 < codes.to_local().numel() <= 0.6 * codes.numel(), name
    assert split, "nothing is split"


def saved(model: nn.Module, path: Path) -> Path:
    """Save from every process; the files must be there for each of them, and nothing else."""
    model.save_pretrained(path, max_shard_size="50KB")
    files = {file.name for file in path.iterdir()}
    assert {"config.json", "model.safetensors.index.json"} <= files, files
    assert not [name for name in files if name.startswith(".")], files
    return path


def round_trip(family: str, parallel: dict, **config) -> dict[str, float]:
    """Codes, and full precision quantized on the way, over processes: same logits, same saved bits, same reloaded."""
    source, measured = quantized(family, **config), {}
    name = " ".join(f"{key}={value}" for key, value in (parallel | config).items())
    for kind in ("codes", "float"):
        if kind == "codes":
            model = load(source, parallel)
        else:
            model = load(full_precision(family), parallel, quantization_config=GGConfig(**config))
        if family != "gpt_oss" or "tp_size" not in parallel or "ep_size" in parallel:
            assert_split(model)  # GPT-OSS has no plan for tensor parallelism but of its head
        measured |= same_as(source, model, family, f"{name} {kind}")
    return measured


def same_as(source: Path, model: nn.Module, family: str, name: str) -> dict[str, float]:
    """A model over processes has a checkpoint's logits, saves its bits, and reloads as it."""
    apart = difference(logits(model), expected(source))
    path = saved(model, FOLDER / family / f"saved {name}")
    assert_same_files(path, source)
    assert torch.equal(logits(load(path)), expected(source)), "reloaded in one process"
    dist.barrier()
    assert apart <= TOLERANCE, (family, name, apart)
    return {f"{family} {name}": apart}


# --- losses and gradients ---


def loss_of(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    scores, tokens = model(TOKENS[rows]).logits.float(), TOKENS[rows]
    return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, put together where they are split, and freed."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).float()
            parameter.grad = None
    return found


def compare_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference, as a part of the largest gradient of all."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:6]
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert largest > 1e-4
    return max(difference(found[name], wanted[name]) for name in wanted) / largest


def my_rows() -> slice:
    size = len(TOKENS) // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def step_over_all_rows(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in one process, summed as the processes together would."""
    world, losses, total = dist.get_world_size(), [], {}
    size = len(TOKENS) // world
    for rank in range(world):
        loss = loss_of(model, slice(rank * size, (rank + 1) * size))
        loss.backward()
        losses.append(loss.item())
        for name, grad in gradients(model).items():
            total[name] = total.get(name, 0) + grad / world
    return sum(losses) / world, total


def step_on_my_rows(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The same in many processes, the mean loss of all."""
    loss = loss_of(model, my_rows())
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size(), gradients(model)


def with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=ATTENTION))


def train(model: nn.Module, step) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        loss, grads = step(model)
        losses.append(loss)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = grads[name.removeprefix("module.")].to(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def loss_and_gradients(family: str, parallel: dict) -> float:
    """A step on a model that is split itself: every process has the whole batch."""
    reference, model = load(quantized(family)).train(), load(quantized(family), parallel).train()
    loss, other = loss_of(reference), loss_of(model)
    loss.backward()
    other.backward()
    assert abs(loss.item() - other.item()) <= TOLERANCE
    found = compare_gradients(gradients(model), gradients(reference))
    assert found <= 1e-5, found
    return found


def fully_sharded(family: str, how: str, bfloat16: bool) -> dict[str, float]:
    """LoRA over FSDP2: `"model"` shards an adapted model, `"config"` adapts a model that was loaded sharded."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    reference = with_lora(load(quantized(family))).train()
    if bfloat16:
        for name, parameter in reference.named_parameters():
            if parameter.is_floating_point() and not name.endswith("_scale"):
                parameter.data = parameter.data.bfloat16()
    if how == "model":
        model = with_lora(load(quantized(family))).train()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    else:
        model = with_lora(load(quantized(family), {**FSDP, "fsdp_mixed_precision": bfloat16})).train()
        for name, module in model.named_modules():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                fully_shard(module, mp_policy=policy)
    for _ in range(2):  # the second step gathers what the first one freed
        wanted_loss, wanted = step_over_all_rows(reference)
        found_loss, found = step_on_my_rows(model)
        measured = {"loss": abs(found_loss - wanted_loss), "gradients": compare_gradients(found, wanted)}
        assert max(measured.values()) <= TOLERANCE, measured
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    return {f"{family} {how}{' bfloat16' if bfloat16 else ''} {key}": value for key, value in measured.items()}


# --- the checks ---

FAST, SLOW, SLOW_4 = {}, {}, {}  # SLOW_4: of four processes


def check(table: dict):
    def register(function):
        table[function.__name__] = function
        return function

    return register


def same_draws(path: Path, auto, parallel: dict) -> None:
    """Weights that a checkpoint has not: over processes the draws of one, and loaded weights as they are."""
    found = []
    for distributed in (None, DistributedConfig(**parallel)):
        torch.manual_seed(9)
        with gg_init(shape=0.5):
            model = auto.from_pretrained(path, num_labels=5, dtype=torch.float32, distributed_config=distributed)
        found.append({name: whole(value) for name, value in model.state_dict().items()})
    stored = tensors(path)
    assert any(name not in stored for name in found[0])
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
        assert name not in stored or torch.equal(stored[name], value), name


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@check(FAST)
def initialization():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    # shards, also uneven ones, hold their part of what one process draws, and generators stay in step
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape in (0.5, 2.0):
        for placement in (Shard(0), Shard(1), Replicate(), _StridedShard(1, split_factor=2)):
            torch.manual_seed(4)
            wanted, after = gg_(torch.empty(7, 12), 1.0, shape), torch.rand(3)
            tensor = distribute_tensor(torch.zeros(7, 12), mesh, [placement])
            torch.manual_seed(4)
            assert torch.equal(gg_(tensor, 1.0, shape).full_tensor(), wanted), placement
            assert torch.equal(torch.rand(3), after)
            # where they are not, the first process has its way, and the others keep theirs
            torch.manual_seed(4 + dist.get_rank())
            own = torch.rand(3) if dist.get_rank() else after
            torch.manual_seed(4 + dist.get_rank())
            assert torch.equal(gg_(tensor, 1.0, shape).full_tensor(), wanted), placement
            assert torch.equal(torch.rand(3), own)
    embedding = nn.Embedding(7, 4, padding_idx=5)
    fully_shard(embedding, mesh=mesh)
    weight = whole(gg_init_(embedding, shape=1.0).weight)
    assert not weight[5].any() and weight.count_nonzero() == 24

    # models that are sharded by hand, from memory and from the meta device
    for family in ("tied", "qwen3_moe_even"):
        reference = tf.AutoModelForCausalLM.from_config(FAMILIES[family]())
        torch.manual_seed(6)
        wanted = gg_init_(reference, shape=0.5).state_dict()
        for start in ("cpu", "meta"):
            with torch.device(start):
                model = tf.AutoModelForCausalLM.from_config(FAMILIES[family]())
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            model.to_empty(device="cpu")
            torch.manual_seed(6)
            gg_init_(model, shape=0.5)
            found = model.state_dict()
            assert all(torch.equal(whole(found[name]), wanted[name]) for name in wanted), (family, start)
            assert any(isinstance(value, DTensor) for value in found.values())
            assert difference(logits(model), logits(reference)) <= TOLERANCE

    # weights that a checkpoint has not
    same_draws(full_precision("llama"), tf.AutoModelForSequenceClassification, FSDP)
    part = FOLDER / "llama" / "part"
    if dist.get_rank() == 0:
        shutil.copytree(full_precision("llama"), part)
        kept = {name: value for name, value in tensors(part).items() if "layers.1.mlp" not in name}
        for file in part.glob("*.safetensors*"):
            file.unlink()
        save_file(kept, part / "model.safetensors", {"format": "pt"})
    dist.barrier()
    for parallel in (FSDP, TP):
        same_draws(part, tf.AutoModelForCausalLM, parallel)


@check(FAST)
def tensor_parallel():
    return round_trip("llama", TP) | round_trip("qwen3_moe", TP) | round_trip("aria", TP)


@check(FAST)
def expert_parallel():
    return round_trip("qwen3_moe", EP_REDUCE) | round_trip("gpt_oss", EP_EXCHANGE)


@check(FAST)
def fully_sharded_loading():
    return round_trip("tied", FSDP) | round_trip("gpt_oss", EP_FSDP)


@check(FAST)
def coded():
    """Decoded whole by every process, then cut; saved by one."""
    measured = round_trip("llama", TP, coding="rans") | round_trip("mixtral", EP_EXCHANGE, coding="eg0")
    return measured | round_trip("llama", FSDP, coding="rans")


@check(FAST)
def scale_modes():
    measured = {}
    for scale in ("absmax", "pow2", "tensor", "tensor-pow2", "unit"):
        measured |= round_trip("llama", TP, scale=scale)
    return measured


@check(FAST)
def scale_of_split_rows():
    """Wide rows, ties, zeros, and parts of rows that are zero, in each dtype: the same bits as from whole rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from hf_gg import get_format, ops
    from hf_gg.integrations.checkpoint import _reduction

    mesh, rank, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), dist.get_world_size()
    weight = torch.randn(96, 4097, generator=torch.Generator().manual_seed(0)) / 30
    weight[0], weight[1, :2000], weight[2, 2100:] = 0.0, 0.0, 0.0
    weight[3], weight[4] = weight[3].sign(), torch.exp2(torch.arange(4097) % 20 - 12.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = weight.to(dtype)
        parts = distribute_tensor(torch.empty_like(whole, device="meta"), mesh, [Shard(1)], src_data_rank=None)
        part = whole.chunk(world, dim=1)[rank]
        for name in ("rf8", "rf8x", "rf8-e5"):
            for scale in ("row", "absmax", "pow2", "tensor", "tensor-pow2", "unit"):
                codes, scales = ops.quantize(whole, get_format(name), scale)
                reduce = _reduction(parts, False, scale)
                mine, my_scales = ops.quantize(part, get_format(name), scale, reduce=reduce)
                assert torch.equal(my_scales, scales), (dtype, name, scale)
                assert torch.equal(mine, codes.chunk(world, dim=1)[rank]), (dtype, name, scale)


@check(FAST)
def embeddings():
    both = {"quantize_embeddings": True, "quantize_lm_head": True}
    return round_trip("llama", TP, quantize_embeddings=True) | round_trip("tied", TP, **both)


def dequantized(family: str, parallel: dict, at_load: bool) -> dict[str, float]:
    source, name = quantized(family), "-".join(map(str, parallel.values()))
    plain = load(source, quantization_config=GGConfig(dequantize=True))
    if at_load:
        model = load(source, parallel, quantization_config=GGConfig(dequantize=True))
    else:
        model = load(source, parallel)
        model.dequantize()
    assert not any(isinstance(module, (RF8Linear, RF8Experts)) for module in model.modules())
    assert any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    measured = {
        f"{family} {name} {'gradients on' if grad else 'inference'}": difference(logits(model, grad), expected(source))
        for grad in (False, True)
    }
    assert max(measured.values()) <= TOLERANCE, measured
    path, other = (FOLDER / family / f"plain-{name}-{at_load}-{kind}" for kind in ("many", "one"))
    model.save_pretrained(path)
    plain.save_pretrained(other)
    dist.barrier()
    assert_same_files(path, other)
    assert not hasattr(load(path).config, "quantization_config")
    return measured


@check(FAST)
def dequantize():
    return dequantized("llama", TP, at_load=True) | dequantized("qwen3_moe_even", EP_EXCHANGE, at_load=False)


@check(FAST)
def gradients_of_a_split_model():
    return {
        "llama tensor": loss_and_gradients("llama", TP),
        "mixtral all_reduce": loss_and_gradients("mixtral", EP_REDUCE),
        "qwen3_moe all_to_all": loss_and_gradients("qwen3_moe", EP_EXCHANGE),
        "gpt_oss all_to_all": loss_and_gradients("gpt_oss", EP_EXCHANGE),
    }


@check(FAST)
def data_parallel_lora():
    measured = {}
    for family in ("llama", "qwen3_moe"):
        reference = with_lora(load(quantized(family))).train()
        model = nn.parallel.DistributedDataParallel(with_lora(load(quantized(family))).train())
        wanted_loss, wanted = step_over_all_rows(reference)
        loss, found = step_on_my_rows(model)
        measured[f"{family} loss"] = abs(loss - wanted_loss)
        measured[f"{family} gradients"] = compare_gradients(found, wanted)
        pairs = zip(train(model, step_on_my_rows), train(reference, step_over_all_rows))
        measured[f"{family} losses of 3 steps"] = max(abs(a - b) for a, b in pairs)
    assert max(measured.values()) <= TOLERANCE, measured
    return measured


@check(FAST)
def fully_sharded_lora():
    return (
        fully_sharded("llama", "model", bfloat16=False)
        | fully_sharded("qwen3_moe", "model", bfloat16=True)
        | fully_sharded("llama", "config", bfloat16=True)
    )


def refused(message: str, function) -> None:
    """Every process gets a ValueError that holds `message`."""
    try:
        function()
    except ValueError as error:
        text = str(error)
    else:
        text = "no error"
    assert message in text, (message, text)
    dist.barrier()


@check(FAST)
def refusals():
    source = quantized("llama")
    model = load(source, TP)
    refused("distributed_checkpoint", lambda: model.save_pretrained(FOLDER / "llama/no", distributed_checkpoint=True))
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert difference(layer.dequantize().full_tensor(), load(source).model.layers[0].mlp.down_proj.dequantize()) == 0
    refused("split over processes", lambda: layer.requantize_(layer.dequantize()))
    refused("pp_size", lambda: load(source, {"pp_size": 2}))
    config = GGConfig(dequantize=True)
    refused("sharded by FSDP", lambda: load(source, FSDP, quantization_config=config))
    refused("sharded by FSDP", lambda: load(source, FSDP).dequantize())


@check(FAST)
def damaged_parts():
    """What one process sees alone is an error on all."""

    def damaged(path: Path, tensor: str, index: tuple, value: float) -> Path:
        target = path.with_name(f"{path.name}-damaged-{tensor}")
        if dist.get_rank() == 0:
            shutil.copytree(path, target)
            content = load_file(path / "model.safetensors")
            content[tensor][index] = value
            save_file(content, target / "model.safetensors", metadata={"format": "pt"})
        dist.barrier()
        return target

    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    full, codes = full_precision("llama"), quantized("llama")
    for path in (damaged(full, down, (3, 96), torch.nan), damaged(full, up, (96, 3), torch.inf)):
        name = path.name.partition("-damaged-")[2]
        for parallel in (TP, FSDP):
            refused(name, lambda path=path, parallel=parallel: load(path, parallel, quantization_config=GGConfig()))
    for path in (damaged(codes, up, (96, 3), 0x7F), damaged(codes, f"{up}_scale", (96,), -1.0)):
        refused(path.name.partition("-damaged-")[2], lambda path=path: load(path, TP))


def loaded_in_parts(family: str, parallel: dict, **config) -> dict[str, float]:
    """A checkpoint that one process wrote, over processes: same logits, same saved bits, same reloaded."""
    source = quantized(family, **config)
    model = load(source, parallel)
    assert_split(model)
    name = " ".join(f"{key}={value}" for key, value in (parallel | config).items())
    return same_as(source, model, family, name)


@check(FAST)
def grid():
    measured = {}
    for coding in ("none", "rans"):
        config = {"weight_format": "grid", "target_bits": 6.0, "coding": coding}
        measured |= loaded_in_parts("llama", TP, **config) | loaded_in_parts("qwen3_moe", FSDP, **config)
    config = GGConfig(weight_format="grid", target_bits=6.0)
    refused("one process", lambda: load(full_precision("llama"), TP, quantization_config=config))
    return measured


@check(FAST)
def report():
    source, full = quantized("qwen3_moe"), load(full_precision("qwen3_moe"))
    one = load(source)
    wanted = [str(quantization_report(one, reference)) for reference in (None, full)]
    for parallel in (TP, FSDP):
        model = load(source, parallel)
        assert [str(quantization_report(model, reference)) for reference in (None, full)] == wanted


@check(SLOW)
def tensor_parallel_families():
    measured = {}
    for family in (*DENSE, *MOE, "aria"):
        measured |= round_trip(family, TP)
    return measured


@check(SLOW)
def expert_parallel_families():
    measured = {}
    for family in MOE:
        for parallel in (EP_REDUCE, EP_EXCHANGE, EP_FSDP):
            measured |= round_trip(family, parallel)
    return measured


@check(SLOW)
def fully_sharded_families():
    measured = {}
    for family in (*DENSE, *MOE, "aria"):
        measured |= round_trip(family, FSDP)
    return measured


@check(SLOW)
def scale_modes_of_experts():
    measured = {}
    for scale in ("absmax", "pow2", "tensor", "tensor-pow2", "unit"):
        for family in ("qwen3_moe", "aria"):
            measured |= round_trip(family, TP, scale=scale)
        measured |= round_trip("gpt_oss", EP_FSDP, scale=scale)
    for weight_format in ("rf8x", "rf8-e5"):
        measured |= round_trip("qwen3_moe", TP, weight_format=weight_format)
    return measured | round_trip("llama", TP, rounding="reference")


@check(SLOW)
def all_embeddings():
    measured = {}
    for family in DENSE:
        for config in ({"quantize_embeddings": True}, {"quantize_lm_head": True}):
            measured |= round_trip(family, TP, **config) | round_trip(family, FSDP, **config)
        both = {"quantize_embeddings": True, "quantize_lm_head": True}
        measured |= round_trip(family, TP, **both) | round_trip(family, FSDP, **both)
    return measured


@check(SLOW)
def grid_families():
    measured = {}
    for family in (*DENSE, *MOE, "aria"):
        for parallel in (TP, FSDP):
            if family != "gpt_oss" or "fsdp_size" in parallel:
                measured |= loaded_in_parts(family, parallel, weight_format="grid", target_bits=5.0, coding="rans")
    for family in ("qwen3_moe", "deepseek_v3"):
        measured |= loaded_in_parts(family, EP_REDUCE, weight_format="grid", target_bits=5.0, coding="eg0")
    return measured


@check(SLOW)
def dequantize_families():
    measured = {}
    for at_load in (True, False):
        for family in (*DENSE, "qwen3_moe_even", "aria_even"):
            measured |= dequantized(family, TP, at_load)
        for family in ("qwen3_moe_even", "gpt_oss"):
            measured |= dequantized(family, EP_REDUCE, at_load) | dequantized(family, EP_EXCHANGE, at_load)
    return measured


@check(SLOW)
def gradients_of_split_families():
    measured = {f"{family} tensor": loss_and_gradients(family, TP) for family in (*DENSE, *MOE, "aria")}
    for family in MOE:
        for parallel in (EP_REDUCE, EP_EXCHANGE):
            measured[f"{family} {parallel['ep_implementation']}"] = loss_and_gradients(family, parallel)
    return measured


@check(SLOW)
def fully_sharded_lora_families():
    measured = {}
    for family in ("llama", "qwen3_moe", "gpt_oss"):
        for how in ("model", "config"):
            for bfloat16 in (False, True):
                measured |= fully_sharded(family, how, bfloat16)
    return measured


@check(SLOW)
def trainer():
    """The stock Trainer: a model loaded in parts learns what one under DDP learns, and the adapter is saved whole."""
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # looked at, not used
    adapters, losses = {}, {}
    for how in ("ddp", "config"):
        model = with_lora(load(quantized("llama"), FSDP if how == "config" else None))
        for name, module in model.named_modules() if how == "config" else ():
            if name.endswith((".lora_A.default", ".lora_B.default")):
                fully_shard(module)
        arguments = tf.TrainingArguments(
            str(FOLDER / how),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(3, 1)]
        run = tf.Trainer(model, arguments, train_dataset=data)
        losses[how] = run.train().training_loss
        run.save_model(str(FOLDER / f"adapter-{how}"))
        dist.barrier()
        adapters[how] = load_file(FOLDER / f"adapter-{how}" / "adapter_model.safetensors")
    assert adapters["ddp"].keys() == adapters["config"].keys()
    apart = max(difference(adapters["ddp"][name], adapters["config"][name]) for name in adapters["ddp"])
    measured = {"loss": abs(losses["ddp"] - losses["config"]), "adapter": apart}
    assert max(measured.values()) <= 1e-5, measured
    return measured


@check(SLOW)
def generation():
    wanted = load(quantized("llama")).generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for parallel in (TP, FSDP):
        model = load(quantized("llama"), parallel)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=0), wanted)


@check(SLOW)
def half_precision():
    measured = {}
    for family in ("llama", "mixtral"):
        for parallel in (TP, FSDP):
            model = load(quantized(family), parallel, dtype=torch.bfloat16)
            assert_split(model)
            reference = logits(load(quantized(family), dtype=torch.bfloat16))
            measured[f"{family} {parallel}"] = difference(logits(model).float(), reference.float())
    assert max(measured.values()) <= 0.02, measured
    return measured


@check(SLOW_4)
def two_dimensions():
    measured = {}
    both = {"quantize_embeddings": True, "quantize_lm_head": True}
    for family in ("llama", "qwen3_moe", "gpt_oss"):
        measured |= round_trip(family, {"tp_size": 2, "fsdp_size": 2})
        measured |= round_trip(family, {"dp_replicate_size": 2, "fsdp_size": 2})
    for family in ("qwen3_moe", "gpt_oss"):
        measured |= round_trip(family, {"tp_size": 2, "fsdp_size": 2, "ep_size": 2})
        measured |= round_trip(family, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4})
    return measured | round_trip("tied", {"tp_size": 2, "fsdp_size": 2}, **both)


def main() -> int:
    global FOLDER
    rank, world, FOLDER, names = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    # by a file and not by a port, which another process may take
    meeting = f"file://{FOLDER / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results, checks = {}, FAST | SLOW | SLOW_4
    for name in names:
        try:
            results[name] = {"measured": checks[name]() or {}}
            dist.barrier()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        (FOLDER / f"results-{rank}.json").write_text(json.dumps(results))
        if "error" in results[name]:
            return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group that lost a member would wait for it

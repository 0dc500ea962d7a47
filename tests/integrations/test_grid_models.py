"""The grid in whole models: quantized at load and in place, saved, loaded again, damaged, adapted; with outliers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import adapters
import pytest
import torch
from families import FAMILIES, quiet, same_tensors, stored, weight_files
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GptOssConfig, GptOssForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM

from hf_gg import GGConfig, RF8Experts, quantization_report, quantize_
from hf_gg.formats import get_format
from hf_gg.formats.steps import StepRule, steps_of
from hf_gg.integrations import outliers as module
from hf_gg.integrations.peft import MergeWarning
from hf_gg.integrations.selection import code_parameters
from hf_gg.nn.base import OUTLIERS, outliers_of


LLAMA = FAMILIES["llama"]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
# A weight beyond 127.5 of these is an outlier: about 0.5.
STEP = 2.0**-8

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def grid(**kwargs) -> GGConfig:
    return GGConfig(weight_format="grid", **kwargs)


@torch.no_grad()
def spiky(family, **changes):
    """A model some of whose weights lie far out: two in one of the first matrices, one in each of three others."""
    model = family.model(**changes)
    names = [name for name, _, _ in code_parameters(quantize_(copy.deepcopy(model)))]
    parameters = dict(model.named_parameters())
    for number, name in enumerate((names[0], names[1], names[-2], names[-1])):
        parameters[name].view(-1)[number * 7 + 3] = 2.0 + number
    parameters[names[0]].view(-1)[-1] = -1.5
    return model


def with_outliers(model) -> dict[str, int]:
    found = {name: outliers_of(owner, weight) for name, owner, weight in code_parameters(model)}
    return {name: len(pair[0]) for name, pair in found.items() if pair is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_families(name, tmp_path):
    family = FAMILIES[name]
    original = spiky(family)
    plain, saved, again = tmp_path / "plain", tmp_path / "saved", tmp_path / "again"
    original.save_pretrained(plain)
    model = family.auto.from_pretrained(plain, quantization_config=grid(step=STEP))
    logits = family.logits(model)
    exact = dict(original.named_parameters())
    beyond = {key: int((exact[key].abs() > 127.5 * STEP).sum()) for key, _, _ in code_parameters(model)}
    assert with_outliers(model) == {key: count for key, count in beyond.items() if count}
    assert len(with_outliers(model)) >= 4
    for key, owner, weight in code_parameters(model):
        value = owner.dequantize(weight) if isinstance(owner, RF8Experts) else owner.dequantize()
        value = value.T if getattr(owner, "fan_in_fan_out", False) else value
        assert float((value - exact[key].detach()).abs().max()) <= STEP / 2 * 1.001, key
        beyond = exact[key].abs() > 127.5 * STEP
        assert torch.equal(value[beyond], exact[key][beyond]), key

    model.save_pretrained(saved, max_shard_size="60KB")
    assert len(weight_files(saved)) > 1
    assert sum(key.endswith(OUTLIERS[0]) for key in stored(saved)) == len(with_outliers(model))
    reloaded, info = family.auto.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(family.logits(reloaded), logits)
    reloaded.save_pretrained(again)
    assert same_tensors(stored(again), stored(saved))
    assert (again / "config.json").read_text() == (saved / "config.json").read_text()

    in_place = quantize_(original, grid(step=STEP))
    assert torch.equal(family.logits(in_place), logits)
    in_place.save_pretrained(again)
    assert same_tensors(stored(again), stored(saved))

    reloaded.dequantize()
    assert not any(key.endswith(OUTLIERS) for key in reloaded.state_dict())
    torch.testing.assert_close(family.logits(reloaded), logits, rtol=1e-4, atol=1e-4)
    reloaded.save_pretrained(again)
    assert stored(again).keys() == stored(plain).keys()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("parts", [{}, {"quantize_embeddings": True, "quantize_lm_head": True}])
def test_embeddings_heads_and_ties(name, parts, tmp_path):
    family = FAMILIES[name]
    original = family.model()
    with torch.no_grad():
        original.model.embed_tokens.weight[7, 9] = 6.0
    original.save_pretrained(tmp_path / "plain")
    model = family.auto.from_pretrained(tmp_path / "plain", quantization_config=grid(step=STEP, **parts))
    logits = family.logits(model)
    found = with_outliers(model)
    assert ("model.embed_tokens.weight" in found) == bool(parts)
    if parts and name == "llama-tied":
        assert model.lm_head.weight_outlier_index is model.model.embed_tokens.weight_outlier_index
    expected = family.logits(original)
    assert (logits - expected).norm() / expected.norm() < 0.15
    model.save_pretrained(tmp_path / "saved")
    tensors = stored(tmp_path / "saved")
    assert ("lm_head.weight_outlier_index" in tensors) is False
    reloaded = family.auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(family.logits(reloaded), logits)
    assert torch.equal(family.logits(quantize_(original, grid(step=STEP, **parts))), logits)
    if parts and name == "llama-tied":
        # a merge of an adapter into one of them changes both
        weight = reloaded.lm_head.dequantize()
        weight[3, 3] = -4.0
        reloaded.lm_head.requantize_(weight)
        assert reloaded.model.embed_tokens.weight_outlier_value.tolist() == [-4.0, 6.0]
        reloaded.save_pretrained(tmp_path / "again")
        again = family.auto.from_pretrained(tmp_path / "again")
        assert torch.equal(family.logits(again), family.logits(reloaded))
    reloaded.dequantize()
    reloaded.save_pretrained(tmp_path / "floats")


def test_a_new_process_without_the_import(tmp_path):
    model = quantize_(spiky(LLAMA), grid(target_snr=35.0))
    model.save_pretrained(tmp_path)
    torch.save(LLAMA.logits(model), tmp_path / "logits.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "inputs = torch.load(sys.argv[1] + '/inputs.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    logits = model(**inputs).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[1] + '/logits.pt', weights_only=True))\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, model.config.quantization_config.target_snr)\n"
    )
    torch.save(LLAMA.inputs(), tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["RF8Linear", "35.0"]


@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize(("key", "value"), [("target_bits", 4.5), ("target_snr", 31.0)])
def test_targets_while_loading(key, value, scale, tmp_path):
    original = LLAMA.model()
    original.save_pretrained(tmp_path)
    model = LLAMA.auto.from_pretrained(tmp_path, quantization_config=grid(scale=scale, **{key: value}))
    report = quantization_report(model, original)
    for row in report.rows:
        beside = 32 * row.shape[0] / (row.shape[0] * row.shape[1])
        got = row.entropy + beside if key == "target_bits" else row.snr
        assert abs(got - value) < (0.03 if key == "target_bits" else 0.1), row
        assert row.bits == 8 + beside and row.format == "grid"
    assert "entropy" in str(report)
    estimated = {row.name: row.snr for row in quantization_report(model).rows}
    assert all(abs(estimated[row.name] - row.snr) < 0.3 for row in report.rows)


def test_the_report_counts_outliers():
    original = spiky(LLAMA)
    model = quantize_(copy.deepcopy(original), grid(step=STEP))
    report = quantization_report(model, original)
    [row] = [row for row in report.rows if row.name == WEIGHT]
    assert row.bits == 8 + (32 * 64 + 2 * 64) / 64**2
    total = sum(p.numel() for p in original.parameters())
    assert report.quantized_parameters + report.other_parameters == total
    assert abs(row.snr - next(r for r in quantization_report(model).rows if r.name == WEIGHT).snr) < 0.5


def test_the_config_is_kept_and_holds_no_key_of_others(tmp_path):
    model = quantize_(LLAMA.model(), grid(target_bits=5.0, scale="tensor"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["weight_format"] == "grid" and config["target_bits"] == 5.0 and config["scale"] == "tensor"
    assert not {"target_snr", "step"} & set(config)
    assert not {"target_bits", "target_snr", "step"} & set(GGConfig().to_dict())
    loaded = LLAMA.auto.from_pretrained(tmp_path).config.quantization_config
    assert (loaded.target_bits, loaded.target_snr, loaded.step) == (5.0, None, None)
    assert loaded.scale_rule() == StepRule("tensor", bits=5.0)
    LLAMA.auto.from_pretrained(tmp_path, quantization_config=grid(target_bits=5.0))
    with pytest.raises(ValueError, match="target_bits was 5.0, and 4.0 was asked for: quantizing twice"):
        LLAMA.auto.from_pretrained(tmp_path, quantization_config=grid(target_bits=4.0))
    with pytest.raises(ValueError, match="grid codes, and rf8 was asked for"):
        LLAMA.auto.from_pretrained(tmp_path, quantization_config=GGConfig(weight_format="rf8"))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target_bits": 0}, "target_bits must be a positive number, got 0"),
        ({"target_bits": 8.01}, "target_bits must be at most 8"),
        ({"target_bits": "5"}, "target_bits must be a positive number, got '5'"),
        ({"target_snr": -3.0}, "target_snr must be a positive number"),
        ({"target_snr": float("nan")}, "target_snr must be a positive number"),
        ({"step": True}, "step must be a positive number"),
        ({"target_bits": 5.0, "target_snr": 30.0}, "one target, got target_bits and target_snr"),
        ({"scale": "absmax"}, "Unknown scale 'absmax' for a grid"),
        ({"rounding": "reference"}, "Unknown rounding 'reference' for a grid"),
    ],
)
def test_a_config_that_makes_no_sense(kwargs, match):
    with pytest.raises(ValueError, match=match):
        grid(**kwargs)


def test_targets_of_another_format():
    for weight_format in (None, "rf8", "rf8x"):
        with pytest.raises(ValueError, match="target_bits is of the grid, and weight_format is 'rf8"):
            GGConfig(weight_format=weight_format, target_bits=5.0)


def test_bad_weights_are_named_and_leave_the_model(tmp_path):
    model = LLAMA.model()
    with torch.no_grad():
        dict(model.named_parameters())[WEIGHT][3, 4] = float("inf")
    model.save_pretrained(tmp_path)
    for config in (grid(), grid(target_bits=5.0), grid(step=STEP)):
        with pytest.raises(ValueError, match=f"{WEIGHT}: .*NaN or infinity"):
            LLAMA.auto.from_pretrained(tmp_path, quantization_config=config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{WEIGHT} holds NaN or infinity"):
        quantize_(model, grid(target_bits=5.0))
    assert same_tensors(model.state_dict(), before)
    LLAMA.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj\.weight: 0.3 bits a weight cannot be reached.*take 0.5 bits alone"):
        LLAMA.auto.from_pretrained(tmp_path, quantization_config=grid(target_bits=0.3))
    model = LLAMA.model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bits"):
        quantize_(model, grid(target_bits=0.3))
    assert same_tensors(model.state_dict(), before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    with quiet():
        quantize_(spiky(LLAMA), grid(step=STEP)).save_pretrained(folder)
    return folder


INDEX, VALUE = (f"{WEIGHT}{suffix}" for suffix in OUTLIERS)
DAMAGE = {
    "out of range": ({INDEX: lambda x: x + 5000}, "there are 4096 codes"),
    "negative": ({INDEX: lambda x: x - 100}, "there are 4096 codes"),
    "not in order": ({INDEX: lambda x: x.flip(0)}, "ascending"),
    "twice": ({INDEX: lambda x: x[[0, 0]]}, "ascending"),
    "NaN": ({VALUE: lambda x: x * float("nan")}, "NaN or infinity"),
    "infinite": ({VALUE: lambda x: x / 0}, "NaN or infinity"),
    "too few values": ({VALUE: lambda x: x[:1]}, "differ in length"),
    "too many": ({VALUE: lambda x: x.repeat(2)}, "differ in length"),
    "another place": ({INDEX: lambda x: x + torch.tensor([1, 0], dtype=torch.int32)}, "a code other than 0"),
    "other type of indices": ({INDEX: lambda x: x.float()}, "stored as F32"),
    "other type of values": ({VALUE: lambda x: x.bfloat16()}, "stored as BF16"),
    "no values": ({VALUE: None}, "is missing from the checkpoint"),
    "no indices": ({INDEX: None}, "is missing from the checkpoint"),
    "negative zero": ({WEIGHT: lambda x: x.clone().fill_(0x80)}, "0x80 at flat index 0 is a negative zero"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(name, checkpoint, tmp_path):
    changes, match = DAMAGE[name]
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    for key, change in changes.items():
        value = tensors.pop(key)
        if change is not None:
            tensors[key] = change(value).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{WEIGHT}.*{match}"):
        LLAMA.auto.from_pretrained(tmp_path)


def test_the_model_without_its_head_and_a_state_dict(checkpoint, tmp_path):
    model = LLAMA.auto.from_pretrained(checkpoint)
    logits = LLAMA.logits(model)
    inputs = LLAMA.inputs()
    base = LlamaModel.from_pretrained(checkpoint)
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    base.save_pretrained(tmp_path)
    assert torch.equal(
        LLAMA.auto.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight_scale.cpu(),
        (model.model.layers[0].mlp.up_proj.weight_scale),
    )
    state = load_file(checkpoint / "model.safetensors")
    config = AutoConfig.from_pretrained(checkpoint)
    other, info = type(model).from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(LLAMA.logits(other), logits)
    assert with_outliers(other) == with_outliers(model)


def test_offload_to_disk(checkpoint, tmp_path):
    logits = LLAMA.logits(LLAMA.auto.from_pretrained(checkpoint))
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.1", "lm_head"), "cpu"
    )
    model = LLAMA.auto.from_pretrained(
        checkpoint, device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path
    )
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(LLAMA.logits(model), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, checkpoint):
    model = LLAMA.auto.from_pretrained(checkpoint, dtype=dtype)
    assert outliers_of(model.model.layers[0].self_attn.q_proj, "weight")[1].dtype == torch.float32
    expected = LLAMA.logits(LLAMA.auto.from_pretrained(checkpoint))
    torch.testing.assert_close(LLAMA.logits(model).float(), expected, atol=0.05, rtol=0.05)


def test_several_processes(checkpoint, tmp_path, monkeypatch):
    LLAMA.model().save_pretrained(tmp_path)
    monkeypatch.setattr(module, "is_distributed", lambda model: True)
    with pytest.raises(ValueError, match="does not quantize a model that is split over processes"):
        LLAMA.auto.from_pretrained(tmp_path, quantization_config=grid())
    with pytest.raises(ValueError, match=r"outlier_\w+: a weight with outliers cannot be split over processes"):
        LLAMA.auto.from_pretrained(checkpoint)
    quantize_(LLAMA.model(), grid()).save_pretrained(tmp_path)
    LLAMA.auto.from_pretrained(tmp_path)


def test_generates_and_trains_nothing_of_the_codes(checkpoint):
    model = LLAMA.auto.from_pretrained(checkpoint)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith((WEIGHT, *OUTLIERS)))
    tokens = LLAMA.inputs()["input_ids"]
    output = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert output.shape == (2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()


# --- adapters ---


def base(tied=False, **parts):
    torch.manual_seed(0)
    model = adapters.llama(tied=tied, weight_format="grid", step=2.0**-9, **parts)
    assert with_outliers(model)  # weights of a standard deviation of 0.1, and steps of 1/512
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("default::hf_gg.integrations.peft.MergeWarning")
@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ({}, {}),
        ({}, {"use_dora": True}),
        ({"quantize_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
        ({"quantize_embeddings": True, "quantize_lm_head": True}, {"target_modules": ["embed_tokens", "lm_head"]}),
        ({"quantize_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
        ({"quantize_embeddings": True, "quantize_lm_head": True}, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_lora(parts, options, tmp_path):
    tied = "quantize_lm_head" in parts
    model = adapters.attach(base(tied, **parts), adapters.lora(**options))
    expected, before = adapters.logits(model), adapters.base_state(model)
    model.save_pretrained(tmp_path)
    assert not any("outlier" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(
        adapters.logits(adapters.load(adapters.plain(base(tied, **parts)), tmp_path)), expected, atol=1e-4, rtol=1e-4
    )
    assert torch.equal(adapters.logits(adapters.load(base(tied, **parts), tmp_path)), expected)
    with pytest.warns(MergeWarning):
        model.merge_adapter()
    merged = adapters.logits(model)
    if "lm_head" in options.get("target_modules", ()):  # tied: each gets the sum of both adapters
        bare = model.base_model.model
        assert torch.equal(bare.lm_head.base_layer.dequantize(), bare.model.embed_tokens.base_layer.dequantize())
    else:
        assert (merged - expected).abs().max() < 0.3
    model.unmerge_adapter()
    assert adapters.same(adapters.base_state(model), before)
    assert torch.equal(adapters.logits(model), expected)
    with pytest.warns(MergeWarning):
        whole = model.merge_and_unload()
    torch.testing.assert_close(adapters.logits(whole), merged, atol=1e-5, rtol=1e-5)
    whole.save_pretrained(tmp_path / "merged")
    again = type(whole).from_pretrained(tmp_path / "merged")
    assert torch.equal(adapters.logits(again), adapters.logits(whole))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_lora_on_experts(kind):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": adapters.VOCABULARY}
    torch.manual_seed(0)
    if kind == "mixtral":
        original = MixtralForCausalLM(MixtralConfig(**size, initializer_range=0.1))
    else:
        original = GptOssForCausalLM(GptOssConfig(**size, head_dim=8, initializer_range=0.1))
    quantized = quantize_(original.eval(), grid(step=2.0**-9))
    assert any("experts" in name for name in with_outliers(quantized))
    config = adapters.lora(
        target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], lora_dropout=0.0
    )
    model = adapters.attach(quantized, config)
    expected, before = adapters.logits(model), adapters.base_state(model)
    model.merge_adapter()
    assert (adapters.logits(model) - expected).abs().max() < 0.3
    model.unmerge_adapter()
    assert adapters.same(adapters.base_state(model), before)
    assert torch.equal(adapters.logits(model), expected)


def test_the_c_kernels_and_plain_torch_agree(checkpoint):
    if "cpu" not in os.environ.get("HF_GG_BACKEND", "cpu"):
        pytest.skip("another backend is asked for")
    found = [
        LLAMA.logits(LLAMA.auto.from_pretrained(checkpoint, quantization_config=GGConfig(backend=backend)))
        for backend in ("auto", "torch")
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_steps_of_the_format_are_those_of_the_model(tmp_path):
    original = LLAMA.model()
    weight = dict(original.named_parameters())[WEIGHT].detach().clone()
    model = quantize_(original, grid(target_snr=33.0))
    module_ = model.model.layers[0].self_attn.q_proj
    steps = steps_of(weight, StepRule(snr=33.0))
    assert torch.equal(module_.weight_scale, steps)
    assert torch.equal(module_.weight, get_format("grid").quantize(weight, steps)[0])

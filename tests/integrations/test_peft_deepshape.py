"""The PEFT method DEEPSHAPE: the map in the forward pass, its gradients, merging and its inverse, files, errors."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import textwrap

import adapters
import peft
import pytest
import torch
import transformers as tf
from hub_server import Hub
from safetensors.torch import load_file, save_file
from test_backslash_trainer import TOKENS, arguments, tiny_llama, trained
from test_peft_backslash import ENVIRONMENT, LOAD, PUSH, logits
from torch import nn

import hf_gg
from hf_gg import DeepShapeConfig
from hf_gg.data import mgm_gpt2, minilm
from hf_gg.integrations.peft import MergeWarning
from hf_gg.integrations.peft.deepshape import DeepShapeLinear


pytestmark = [pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]


def wrapped(model=None, **changes) -> peft.PeftModel:
    settings = {"task_type": "CAUSAL_LM", "shape_scale": 0.7, "std_scale": 0.9, **changes}
    return peft.get_peft_model(tiny_llama() if model is None else model, DeepShapeConfig(**settings)).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The matrices that DeepShape takes, by their names in the bare model."""
    names = (name.replace("base_model.model.", "").replace(".base_layer", "") for name, _ in model.named_parameters())
    pairs = zip(names, model.parameters())
    return {n: p.detach() for n, p in pairs if p.ndim == 2 and "embed" not in n and "lm_head" not in n}


# --- the map ---


def test_is_deepshape_with_the_parametric_map():
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base))
    mapped = copy.deepcopy(base)
    report = hf_gg.deepshape_(mapped, 0.7, 0.9, map="parametric")
    assert len(report) == 14
    torch.testing.assert_close(logits(model), logits(mapped), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert all(torch.equal(w, weights(base)[n]) for n, w in weights(model).items())  # the base is kept
    merged = model.merge_and_unload()
    assert type(merged) is tf.LlamaForCausalLM
    for name, weight in weights(merged).items():
        torch.testing.assert_close(weight, weights(mapped)[name], atol=1e-8, rtol=1e-5)


def test_global_mode():
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base), mode="global", target_modules=["q_proj", "up_proj"])
    mapped = copy.deepcopy(base)
    hf_gg.deepshape_(mapped, 0.7, 0.9, map="parametric", mode="global", modules=["q_proj", "up_proj"])
    torch.testing.assert_close(logits(model), logits(mapped), atol=1e-5, rtol=1e-5)


def test_identity():
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base), shape_scale=1.0, std_scale=1.0)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=1e-5)


def test_conv1d_and_embeddings():
    torch.manual_seed(0)
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": False}
    base = tf.GPT2LMHeadModel(tf.GPT2Config(**size)).eval()
    model = wrapped(copy.deepcopy(base), target_modules=["c_attn", "c_fc", "wte"])
    mapped = copy.deepcopy(base)
    hf_gg.deepshape_(mapped, 0.7, 0.9, map="parametric", modules=["c_attn", "c_fc", "wte"], embeddings=True)
    torch.testing.assert_close(logits(model), logits(mapped), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(mapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    base = tiny_llama().to(dtype).eval()
    model = wrapped(copy.deepcopy(base))
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), before)
    assert not any(torch.equal(w, weights(base)[n]) for n, w in weights(model).items())
    model.unmerge_adapter()
    # to the rounding of the dtype
    for name, weight in weights(model).items():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            weight, weights(base)[name], atol=0, rtol=(4 if dtype == torch.float32 else 2) * eps
        )
    model.merge_adapter()
    with model.disable_adapter():  # PEFT's convention: it is unmerged
        torch.testing.assert_close(logits(model), logits(base), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    model.unload()


def test_zeros_stay_zeros():
    base = tiny_llama().eval()
    for weight in weights(base).values():
        weight[:, ::2] = 0
    merged = wrapped(copy.deepcopy(base)).merge_and_unload()
    for name, weight in weights(merged).items():
        assert torch.equal(weight.sign(), weights(base)[name].sign())


# --- training of the factors ---


@pytest.mark.parametrize("shape_scale", [0.5, 0.9, 1.4])
def test_gradients_against_differences(shape_scale):
    """In float64, central differences in the logarithms of both factors."""
    base = nn.Sequential(nn.Linear(30, 40)).double()
    nn.init.normal_(base[0].weight)
    base[0].weight.data[3] = 0
    settings = {"target_modules": ["0"], "shape_scale": shape_scale, "std_scale": 0.8}
    model = peft.get_peft_model(base, DeepShapeConfig(**settings))
    (factors,) = (p for p in model.parameters() if p.requires_grad)
    assert factors.shape == (2,)
    factors.data = factors.data.double()
    x, g = torch.randn(7, 30).double(), torch.randn(7, 40).double()

    def loss():
        return (model(x).tanh() * g).sum()

    loss().backward()
    for place in (0, 1):
        values = []
        for h in (1e-5, -1e-5):
            factors.data[place] += h
            values.append(float(loss().detach()))
            factors.data[place] -= h
        assert float(factors.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stock_trainer_trains_the_factors(tmp_path, checkpointing):
    base = tiny_llama()
    model = wrapped(copy.deepcopy(base))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    changes = {"gradient_checkpointing": checkpointing, "save_strategy": "steps", "save_steps": 5}
    trained(tmp_path, model=model, **changes)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(torch.equal(w, weights(base)[n]) for n, w in weights(model).items())
    again = wrapped(copy.deepcopy(base))
    trained(tmp_path / "b", model=again, resume=str(tmp_path / "checkpoint-5"), **changes)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_the_map_follows_its_numbers():
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base))
    first = logits(model)
    assert torch.equal(logits(model), first)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.tensor([math.log(0.8), math.log(1.1)]))
    other = wrapped(copy.deepcopy(base), shape_scale=0.8, std_scale=1.1)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), first)
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(2)
    assert not torch.equal(logits(model), logits(other))


# --- several adapters, files ---


def test_several_adapters(tmp_path):
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base))
    first = logits(model)
    model.add_adapter("second", DeepShapeConfig(task_type="CAUSAL_LM", shape_scale=1.1, target_modules=["q_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    again.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    assert torch.equal(logits(again), second)
    again.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="default, second are active together"):
        logits(again)
    with pytest.raises(ValueError, match="one map can be merged at a time"):
        again.merge_adapter()
    again.set_adapter("default")
    again.merge_adapter()
    with pytest.raises(ValueError, match="has a merged adapter, and .* needs the base weights"):
        again.add_adapter("third", DeepShapeConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    again.unmerge_adapter()
    again.delete_adapter("default")
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), second, atol=1e-5, rtol=1e-5)


def test_file(tmp_path):
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    content = load_file(tmp_path / "adapter_model.safetensors")
    assert content["base_model.model.deepshape_maps"].shape == (14, 4)
    assert content["base_model.model.deepshape_modules"].shape == (14, 3)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 14 * 28 + 300
    for lazy in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=lazy)
        assert torch.equal(logits(loaded), logits(model))
        assert not any(p.requires_grad for p in loaded.parameters())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "DEEPSHAPE" and saved["shape_scale"] == 0.7


def test_adapters_of_transformers(tmp_path):
    base = tiny_llama().eval()
    model = copy.deepcopy(base)
    model.add_adapter(DeepShapeConfig(shape_scale=0.7))
    trained(tmp_path / "a", model=model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "b")
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path / "b"))
    assert torch.equal(logits(again), expected) and not torch.equal(expected, logits(base))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "b"))), expected)


def test_real_model(tmp_path):
    base = tf.AutoModelForCausalLM.from_pretrained(mgm_gpt2())
    model = wrapped(copy.deepcopy(base))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000  # 8.9 million weights
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    restored = loaded.unload().state_dict()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(restored[name], value, atol=0, rtol=1e-6)


@pytest.mark.slow
def test_a_classifier_from_minilm(tmp_path):
    """The head is trained beside the factors, and saved."""
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm())
    rows = [
        {**{k: v[0] for k, v in tokenizer(t, return_tensors="pt", padding="max_length", max_length=8).items()}}
        | {"labels": torch.tensor(int("fine" in t))}
        for t in ["a fine day", "a bad day", "what a fine film", "what a bad film"] * 4
    ]

    def base():
        torch.manual_seed(0)
        return tf.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)

    model = peft.get_peft_model(base(), DeepShapeConfig(task_type="SEQ_CLS"))
    tf.Trainer(model, arguments(tmp_path, max_steps=10, learning_rate=1e-2), train_dataset=rows).train()
    model.eval().save_pretrained(tmp_path / "x")
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "x")).eval()
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0] if k != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# --- quantized bases ---


def test_on_an_rf8_model(tmp_path):
    base = adapters.llama()
    model = adapters.attach(copy.deepcopy(base), DeepShapeConfig(task_type="CAUSAL_LM", shape_scale=0.7))
    on_floats = adapters.attach(adapters.plain(base), DeepShapeConfig(task_type="CAUSAL_LM", shape_scale=0.7))
    before = adapters.logits(model)
    torch.testing.assert_close(before, adapters.logits(on_floats), atol=1e-4, rtol=1e-4)
    assert adapters.untouched(model, base)
    assert adapters.train(model, steps=3)[2] is not None and adapters.untouched(model, base)
    model.save_pretrained(tmp_path)
    assert torch.equal(adapters.logits(adapters.load(copy.deepcopy(base), tmp_path)), adapters.logits(model))
    with pytest.warns(MergeWarning):
        model.merge_adapter()
    assert not adapters.untouched(model, base)
    model.unmerge_adapter()
    assert adapters.untouched(model, base)


# --- errors ---


def test_another_base_model(tmp_path):
    wrapped().save_pretrained(tmp_path)
    small = tiny_llama().config.to_dict()
    for changes, message in (
        ({"intermediate_size": 40}, r"had the shape \[\d+, \d+\], and has"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.[a-z_.]+' is not found in the base model"),
        ({"initializer_range": 0.05}, "have the scale .*, and the adapter's were .* made for another base model"),
    ):
        torch.manual_seed(0)
        other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**small, **changes}))
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(other, str(tmp_path))


def test_damaged_files(tmp_path):
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = load_file(file)
    maps, modules = (f"base_model.model.deepshape_{name}" for name in ("maps", "modules"))

    def changed(key, place, value):
        new = content[key].clone()
        new[place] = value
        return {**content, key: new}

    for bad, message in (
        (changed(maps, (3, 0), math.nan), "deepshape_maps is damaged"),
        (changed(maps, (3, 0), -1.0), "deepshape_maps is damaged"),
        (changed(maps, (3, 1), 90.0), "deepshape_maps is damaged"),
        (changed(maps, (3, 2), math.inf), "deepshape_maps is damaged"),
        (changed(modules, (3, 2), 7), "has no map for it"),
        ({maps: content[maps]}, "deepshape_modules is missing"),
        ({**content, maps: content[maps][:3]}, "deepshape_maps is damaged"),
        ({**content, maps: content[maps].flatten()}, r"deepshape_maps is torch\.float32 of the shape \[56\]"),
        ({**content, maps: content[maps].double()}, r"deepshape_maps is torch\.float64"),
        *((changed(maps, (3, place), content[maps][3, place] * 1.0001 + 1e-6), "a damaged one") for place in range(4)),
        ({"x": torch.zeros(1)}, "deepshape_maps is missing"),
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape_scale": 0.0}, "shape_scale must be positive"),
        ({"shape_scale": math.nan}, "shape_scale"),
        ({"std_scale": -1.0}, "std_scale"),
        ({"mode": "layer"}, "mode must be one of"),
        ({"method": "x"}, "Unknown method"),
        ({"shape_scale": 30.0}, "shapes are 0.1 to 8"),
        ({"target_modules": ["qkv"]}, "not found in the base model"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        wrapped(**changes)


def test_bad_bases():
    with pytest.raises(TypeError, match="DeepShape acts on linear layers.*input_layernorm is a LlamaRMSNorm"):
        wrapped(target_modules=["input_layernorm"])
    for value, message in ((math.nan, "up_proj has weights that are NaN"), (0.0, "up_proj is constant, 0")):
        base = tiny_llama()
        base.model.layers[0].mlp.up_proj.weight.data.fill_(value)
        with pytest.raises(ValueError, match=message):
            wrapped(base)


# --- other processes ---


def test_a_script_that_never_imports_the_package(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = wrapped(tf.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(TOKENS[:4], tmp_path / "tokens")
    torch.save(logits(model), tmp_path / "logits")
    code = LOAD.format(names="PeftModel", load="PeftModel.from_pretrained(base, sys.argv[2]).eval()")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    run = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "DeepShapeModel"


def test_push_and_load_by_name(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    code = textwrap.dedent(PUSH).replace("BackSlash", "DeepShape").replace("tiny-backslash", "tiny-deepshape")
    code = code.replace("p.data.copy_((torch.randn_like(p) * 30).round() * 2**-13)", "p.data.sub_(0.1)")
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "base")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(hub.files["user/tiny-deepshape"]["adapter_config.json"])["peft_type"] == "DEEPSHAPE"


def test_a_layer_that_has_another_adapter():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj has a Linear already.*merge it first"):
        DeepShapeLinear(model.base_model.model.model.layers[0].self_attn.q_proj, "a", DeepShapeConfig(), "q_proj")

"""The PEFT method BACKSLASH: the penalty in stock trainers and plain loops, files, merging, RF8 bases, errors."""

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
from test_backslash_trainer import TOKENS, ByHand, arguments, tiny_llama, trained
from torch import nn
from transformers import TrainerCallback

from hf_gg import BackSlash, BackSlashCallback, BackSlashConfig
from hf_gg.coding.levels import is_levels
from hf_gg.data import minilm
from hf_gg.integrations.peft import MergeWarning


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def config(**changes) -> BackSlashConfig:
    return BackSlashConfig(**{"task_type": "CAUSAL_LM", "warmup": 0, "cooldown": 0, "every": 4, **changes})


def wrapped(model=None, adapter_config=None, **changes) -> peft.PeftModel:
    model = tiny_llama() if model is None else model
    return peft.get_peft_model(model, adapter_config or config(**changes))


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith(f".backslash_delta.{adapter}")}


def filled(model: nn.Module, adapter: str = "default", grid: float = 2**-13, seed: int = 0) -> nn.Module:
    """A sparse ΔW on the grid, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas(model, adapter).values():
        levels = torch.randn(delta.shape, generator=generator) * 60
        delta.copy_((levels * (torch.rand(delta.shape, generator=generator) < 0.3)).round() * grid)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[:4]).logits


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(x, b[name]) for name, x in a.items())


def share_of_zeros(model: nn.Module) -> float:
    return float(torch.cat([d.flatten() for d in deltas(model).values()]).eq(0).float().mean())


# --- the layers ---


def test_starts_as_the_base_model_and_adds_the_change():
    base = tiny_llama().eval()
    model = wrapped(copy.deepcopy(base)).eval()
    assert len(deltas(model)) == 14 and not any(d.any() for d in deltas(model).values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(deltas(model))
    assert torch.equal(logits(model), logits(base))
    filled(model)
    summed = copy.deepcopy(base)
    for name, delta in deltas(model).items():
        name = name.removeprefix("base_model.model.").removesuffix(".backslash_delta.default")
        summed.get_submodule(name).weight.data += delta
    torch.testing.assert_close(logits(model), logits(summed), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_gradients_are_those_of_the_weights():
    base = tiny_llama()
    model = wrapped(copy.deepcopy(base))
    for one in (base, model):
        one(input_ids=TOKENS[:4], labels=TOKENS[:4]).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".backslash_delta.default")
            torch.testing.assert_close(p.grad, base.get_submodule(name).weight.grad, atol=1e-6, rtol=1e-4)


def test_conv1d_and_embeddings(tmp_path):
    torch.manual_seed(0)
    base = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=False)
    ).eval()
    model = filled(wrapped(copy.deepcopy(base), target_modules=["c_attn", "c_fc", "c_proj", "wte"]))
    attention = deltas(model)["base_model.model.transformer.h.0.attn.c_attn.backslash_delta.default"]
    assert attention.shape == (96, 32)  # [outputs, inputs], though the layer stores it the other way
    before = logits(model)
    assert (before - logits(base)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))), before)
    merged = model.merge_and_unload()
    assert type(merged) is tf.GPT2LMHeadModel
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
    expected = base.transformer.h[0].attn.c_attn.weight + attention.T
    assert torch.equal(merged.transformer.h[0].attn.c_attn.weight, expected)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_an_embedding_is_saved_as_its_change_alone(tmp_path):
    base = tiny_llama().eval()
    model = filled(wrapped(copy.deepcopy(base), target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path)
    assert all(name.endswith("backslash_delta") for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))), logits(model))


def test_merge_and_unmerge():
    base = tiny_llama().eval()
    model = filled(wrapped(copy.deepcopy(base)))
    before = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    weight = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer").weight
    assert not torch.equal(weight, base.model.layers[0].mlp.up_proj.weight)
    model.unmerge_adapter()
    torch.testing.assert_close(weight, base.model.layers[0].mlp.up_proj.weight, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    next(iter(deltas(model).values()))[0, 0] = math.nan
    with pytest.raises(ValueError, match="would hold NaN or infinity: adapter 'default' is broken"):
        model.merge_adapter(safe_merge=True)


def test_several_adapters(tmp_path):
    base = tiny_llama().eval()
    model = filled(wrapped(copy.deepcopy(base)))
    first = logits(model)
    model.add_adapter("second", config(target_modules=["q_proj"]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("second"))
    filled(model, "second", seed=1)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    again.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits(again), first)
    again.set_adapter("second")
    assert torch.equal(logits(again), second)
    again.delete_adapter("default")
    assert torch.equal(logits(again), second)


# --- training ---


class DeltaByHand(ByHand):
    """The penalty on ΔW after each step of the optimizer, from the outside."""

    def chosen(self, model):
        return {n: p for n, p in model.named_parameters() if "backslash_delta" in n}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_stock_trainer_without_a_callback_equals_the_penalty_by_hand(tmp_path, accumulate):
    changes = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.1}
    first = trained(tmp_path, model=wrapped(lambda_=0.6, grid=None), **changes)
    plain = wrapped(lambda_=0.0, grid=None)
    second = trained(tmp_path, [DeltaByHand(0.6)], model=plain, **changes)
    assert same(deltas(first.model), deltas(second.model))
    assert 0.1 < share_of_zeros(first.model) < 1
    third = trained(tmp_path, model=wrapped(lambda_=0.0, grid=None), **changes)
    assert share_of_zeros(third.model) < 0.05
    logged = first.state.log_history[0]
    assert logged["backslash/sparsity"] > 0 and "backslash/shape/q_proj" in logged


def test_schedule_of_the_config(tmp_path):
    """Warm-up, then constant, then zero with held zeros, as `BackSlashCallback` makes it."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(share_of_zeros(model))

    trained(tmp_path, [Watch()], model=wrapped(lambda_=0.7, warmup=2, cooldown=0.5))
    assert 0.1 < seen[4] < 1 and all(x >= seen[4] for x in seen[5:])


def test_a_callback_of_the_users_decides(tmp_path):
    callback = BackSlashCallback(0.6, every=4, warmup=0, cooldown=0)
    first = trained(tmp_path, [callback], model=wrapped(lambda_=0.0, grid=None))
    second = trained(tmp_path, model=wrapped(lambda_=0.6, grid=None))
    assert same(deltas(first.model), deltas(second.model))


@pytest.mark.parametrize("at", [3, 8])
def test_resume_is_bit_identical(tmp_path, at):
    def model():
        return wrapped(lambda_=0.7, cooldown=0.4)

    changes = {"save_strategy": "steps", "save_steps": at}
    whole = trained(tmp_path / "a", model=model(), **changes).model
    checkpoint = tmp_path / "a" / f"checkpoint-{at}"
    # exact there, so no coded levels
    assert all(v.is_floating_point() for v in load_file(checkpoint / "adapter_model.safetensors").values())
    again = trained(tmp_path / "b", model=model(), resume=str(checkpoint), **changes).model
    assert same(deltas(whole), deltas(again)) and share_of_zeros(whole) > 0.05
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(checkpoint))
    assert len(deltas(loaded)) == 14


def test_after_training_the_model_is_what_its_file_holds(tmp_path):
    trainer = trained(tmp_path / "a", model=wrapped(lambda_=0.5, grid=2**-11))
    for name, delta in deltas(trainer.model).items():
        assert torch.equal((delta / 2**-11).round() * 2**-11, delta), name
    trainer.save_model(str(tmp_path / "b"))
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(is_levels(value) for value in stored.values()) and len(stored) == 14
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"))
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))
    # and can be trained on
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"), is_trainable=True)
    before = deltas(model)
    before = {n: d.clone() for n, d in before.items()}
    trained(tmp_path / "c", model=model)
    assert not same(before, deltas(model))


def test_a_training_that_fails_leaves_the_model_as_it_was_found(tmp_path):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(p for n, p in model.named_parameters() if "up_proj" in n and p.requires_grad).grad.fill_(math.nan)

    model = wrapped()
    with pytest.raises(ValueError, match=r"up_proj\.backslash_delta\.default has weights that are NaN"):
        trained(tmp_path, [Poison()], model=model, save_strategy="steps", save_steps=2, max_grad_norm=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert not model.peft_config["default"].saves_exactly
    with pytest.raises(ValueError, match=r"up_proj\.backslash_delta\.default holds NaN"):
        model.save_pretrained(tmp_path / "x")


def loop(model: nn.Module, steps: int = 8, optimizer=None) -> nn.Module:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for step in range(steps):
        model(input_ids=TOKENS[4 * step : 4 * step + 4], labels=TOKENS[4 * step : 4 * step + 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_plain_loop_is_followed_too():
    first = loop(wrapped(lambda_=0.6))
    second = wrapped(lambda_=0.0)
    chosen = {n: p for n, p in second.named_parameters() if p.requires_grad}
    names = sorted(chosen, key=lambda name: name.removeprefix("base_model.model."))
    penalty = BackSlash({name: chosen[name] for name in names}, 0.6, every=4)
    optimizer = torch.optim.AdamW(chosen.values(), lr=5e-3)
    penalty.attach(optimizer)
    loop(second, optimizer=optimizer)
    assert same(deltas(first), deltas(second)) and share_of_zeros(first) > 0.1
    # a copy is followed as well, and one by hand is not doubled
    third = loop(copy.deepcopy(wrapped(lambda_=0.6)))
    assert same(deltas(first), deltas(third))
    fourth = wrapped(lambda_=0.6)
    optimizer = torch.optim.AdamW([p for p in fourth.parameters() if p.requires_grad], lr=5e-3)
    BackSlash(fourth, 0.6, every=4).attach(optimizer)
    assert same(deltas(first), deltas(loop(fourth, optimizer=optimizer)))


def test_other_models_and_optimizers_are_left_alone():
    loop(wrapped(lambda_=0.6))
    torch.manual_seed(1)
    layer = nn.Linear(8, 8)
    expected = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.bias.grad = torch.zeros_like(layer.bias)
    optimizer.step()
    assert torch.equal(layer.weight, expected - 0.1)
    assert not optimizer._optimizer_step_post_hooks
    # two models at once, under different penalties
    a, b = wrapped(lambda_=0.6), wrapped(lambda_=0.0)
    loop(a), loop(b)
    assert share_of_zeros(a) > 0.1 > share_of_zeros(b)


def test_a_skipped_step_is_skipped():
    model = wrapped(lambda_=0.6)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loop(model, 2, optimizer)
    before = {n: d.clone() for n, d in deltas(model).items()}
    scaler.scale(model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss).backward()
    next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = math.inf
    scaler.step(optimizer)
    assert same(before, deltas(model))


def test_different_penalties_at_once_are_refused():
    model = wrapped(lambda_=0.6)
    model.add_adapter("second", config(lambda_=0.1))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="are trained together, with different penalties"):
        loop(model, 1)


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = tf.AutoTokenizer.from_pretrained(minilm())
    tokenizer.eos_token = tokenizer.sep_token
    trainer = trl.SFTTrainer(
        tiny_llama(),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=6,
            learning_rate=5e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            bf16=False,
            per_device_train_batch_size=4,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": TOKENS.tolist()}),
        processing_class=tokenizer,
        peft_config=config(lambda_=0.7),
    )
    trainer.train()
    assert share_of_zeros(trainer.model) > 0.02


@pytest.mark.slow
def test_a_classifier_from_minilm(tmp_path):
    """Real weights, a task with labels, the head saved beside ΔW."""
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm())
    texts = ["a fine day", "a bad day", "what a fine film", "what a bad film"] * 4
    rows = [
        {**{k: v[0] for k, v in tokenizer(t, return_tensors="pt", padding="max_length", max_length=8).items()}}
        | {"labels": torch.tensor(int("fine" in t))}
        for t in texts
    ]

    def base():
        torch.manual_seed(0)
        return tf.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)

    model = peft.get_peft_model(base(), BackSlashConfig(task_type="SEQ_CLS", lambda_=0.5))
    trainer = tf.Trainer(model, arguments(tmp_path, max_steps=12, learning_rate=1e-3), train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        labels = batch.pop("labels")
        answers = model.eval()(**batch).logits
    assert (answers.argmax(-1) == labels).float().mean() > 0.9
    assert share_of_zeros(model) > 0.3
    model.save_pretrained(tmp_path / "x")
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "x")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, answers)
    plain = sum(d.numel() for d in deltas(model).values()) * 4
    assert (tmp_path / "x" / "adapter_model.safetensors").stat().st_size < plain / 4


# --- quantized bases ---


def test_on_an_rf8_model(tmp_path):
    base = adapters.llama()
    model = adapters.attach(copy.deepcopy(base), config(lambda_=0.6))
    assert not any(type(m).__name__ == "Linear" for m in model.modules() if hasattr(m, "backslash_delta"))
    trainer = tf.Trainer(
        model,
        arguments(tmp_path / "a"),
        train_dataset=[{"input_ids": r % adapters.VOCABULARY, "labels": r % adapters.VOCABULARY} for r in TOKENS],
    )
    trainer.train()
    assert adapters.untouched(trainer.model, base) and share_of_zeros(trainer.model) > 0.05
    model = trainer.model.eval()
    model.save_pretrained(tmp_path / "b")
    before = adapters.logits(model)
    assert torch.equal(adapters.logits(adapters.load(copy.deepcopy(base), tmp_path / "b")), before)
    # the file fits the float model as well
    float_model = adapters.load(adapters.plain(base), tmp_path / "b")
    torch.testing.assert_close(adapters.logits(float_model), before, atol=1e-4, rtol=1e-4)
    with pytest.warns(MergeWarning):
        model.merge_adapter()
    model.unmerge_adapter()
    assert adapters.untouched(model, base) and torch.equal(adapters.logits(model), before)


def test_an_rf8_model_is_not_decoded(monkeypatch):
    model = adapters.attach(adapters.llama(), config())
    filled(model)
    expected = adapters.logits(model)
    from hf_gg.nn.base import QuantizedWeight

    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda *a, **k: pytest.fail("decoded"))
    assert torch.equal(adapters.logits(model), expected)


def test_conv1d_that_was_quantized(tmp_path):
    base = adapters.gpt2()
    model = filled(adapters.attach(copy.deepcopy(base), config(target_modules=["c_attn", "c_fc"])))
    model.save_pretrained(tmp_path)
    other = adapters.load(adapters.plain(base), tmp_path)
    torch.testing.assert_close(adapters.logits(other), adapters.logits(model), atol=1e-4, rtol=1e-4)


# --- files ---


@pytest.mark.parametrize("coding", ["rans", "eg0", "none"])
def test_codings(tmp_path, coding):
    base = tiny_llama().eval()
    model = filled(wrapped(copy.deepcopy(base), coding=coding))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 14 and all(is_levels(v) == (coding != "none") for v in stored.values())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert same(deltas(model), deltas(loaded))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "BACKSLASH" and saved["grid"] == 2**-13 and saved["coding"] == coding
    lazy = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=True)
    assert same(deltas(model), deltas(lazy))


def test_off_the_grid_is_rounded_once(tmp_path):
    model = wrapped(grid=2**-9)
    for delta in deltas(model).values():
        delta.normal_(std=0.01)
    model.save_pretrained(tmp_path)
    loaded = deltas(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)))
    for name, delta in deltas(model).items():
        assert torch.equal(loaded[name], (delta / 2**-9).round() * 2**-9 + 0.0)
    exact = wrapped(grid=None)
    for delta in deltas(exact).values():
        delta.normal_(std=0.01)
    exact.save_pretrained(tmp_path / "exact")
    assert same(deltas(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "exact"))), deltas(exact))


def test_bfloat16_base(tmp_path):
    base = tiny_llama().bfloat16().eval()
    model = filled(wrapped(copy.deepcopy(base)))
    assert {d.dtype for d in deltas(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    for lazy in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=lazy)
        assert same(deltas(loaded), deltas(model)) and torch.equal(logits(loaded), logits(model))
    assert model(TOKENS[:1]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [2**-13, None])
def test_an_adapter_with_nan_is_not_saved(tmp_path, grid):
    model = wrapped(grid=grid)
    model.base_model.model.model.layers[1].mlp.up_proj.backslash_delta["default"].data[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.backslash_delta\.default holds NaN or infinity"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_damaged_files(tmp_path):
    filled(wrapped()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.backslash_delta"
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        payload = content[name].clone()
        place = int(torch.randint(0, len(payload), (), generator=generator))
        payload[place] ^= int(torch.randint(1, 256, (), generator=generator))
        save_file({**content, name: payload}, file)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.backslash_delta"):
            peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    for bad in (content[name][:40], torch.full((48, 32), math.nan), torch.ones(48, 32, dtype=torch.int64)):
        save_file({**content, name: bad.contiguous()}, file)
        with pytest.raises(ValueError, match=r"up_proj\.backslash_delta is damaged"):
            peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_another_base_model(tmp_path):
    filled(wrapped()).save_pretrained(tmp_path)
    small = tiny_llama().config
    for changes, message in (
        ({"intermediate_size": 40}, r"down_proj.* the shape \[32, 48\], and the model wants \[32, 40\]"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.[a-z_.]+' is not found in the base model"),
    ):
        other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**small.to_dict(), **changes}))
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(other, str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    content = load_file(file)
    content.pop("base_model.model.model.layers.0.mlp.up_proj.backslash_delta")
    save_file(content, file)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj is a target in the model only"):
        peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_": -1.0}, "lambda_"),
        ({"lambda_": math.nan}, "lambda_"),
        ({"form": "x"}, "form"),
        ({"grid": 0.0}, "grid must be positive"),
        ({"grid": math.nan}, "grid"),
        ({"coding": "zip"}, "coding must be one of"),
        ({"warmup": -1}, "warmup"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_targets():
    for targets in (["qkv"], ["q_proj", "qkv"]):
        with pytest.raises(ValueError, match="'qkv' is not found in the base model, a LlamaForCausalLM"):
            wrapped(target_modules=targets)
    with pytest.raises(ValueError, match="not found in the base model"):
        wrapped(target_modules=".*qkv")
    with pytest.raises(TypeError, match="BackSlash acts on linear layers.*input_layernorm is a LlamaRMSNorm"):
        wrapped(target_modules=["input_layernorm"])


@pytest.mark.parametrize("coding", ["rans", "none"])
def test_adapters_of_transformers(tmp_path, coding):
    """`model.add_adapter`, a training, `save_pretrained` and `load_adapter`, without a PeftModel."""
    base = tiny_llama().eval()
    model = copy.deepcopy(base)
    model.add_adapter(config(lambda_=0.6, coding=coding))
    trained(tmp_path / "a", model=model)
    assert share_of_zeros(model) > 0.05
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "b")
    again = copy.deepcopy(base)
    again.load_adapter(str(tmp_path / "b"))
    assert torch.equal(logits(again), expected) and not torch.equal(expected, logits(base))
    again.load_adapter(str(tmp_path / "b"), "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(base))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "b"))), expected)


# --- other processes ---

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

LOAD = """
import sys, torch
from transformers import LlamaForCausalLM
from peft import {names}
base = LlamaForCausalLM.from_pretrained(sys.argv[1])
model = {load}
assert "hf_gg" not in globals()
tokens, expected = (torch.load(path, weights_only=True) for path in sys.argv[3:])
with torch.no_grad():
    assert torch.equal(model(tokens).logits, expected)
print(type(model.base_model).__name__)
"""


@pytest.mark.parametrize(
    ("names", "load"),
    [
        ("PeftModel", "PeftModel.from_pretrained(base, sys.argv[2]).eval()"),
        ("AutoPeftModelForCausalLM", "AutoPeftModelForCausalLM.from_pretrained(sys.argv[2]).eval()"),
    ],
)
def test_a_script_that_never_imports_the_package(tmp_path, names, load):
    base = tiny_llama().eval()
    base.save_pretrained(tmp_path / "base")
    model = filled(wrapped(tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(TOKENS[:4], tmp_path / "tokens")
    torch.save(logits(model), tmp_path / "logits")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "tokens", "logits")]
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(names=names, load=load), *paths],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "BackSlashModel"


PUSH = """
import sys, torch, peft
from transformers import LlamaForCausalLM
from hf_gg import BackSlashConfig
base = LlamaForCausalLM.from_pretrained(sys.argv[1])
model = peft.get_peft_model(base, BackSlashConfig(task_type="CAUSAL_LM")).eval()
for n, p in model.named_parameters():
    if p.requires_grad:
        p.data.copy_((torch.randn_like(p) * 30).round() * 2**-13)
tokens = torch.arange(12)[None]
with torch.no_grad():
    expected = model(tokens).logits
model.push_to_hub("tiny-backslash")
again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1]), "user/tiny-backslash").eval()
with torch.no_grad():
    assert torch.equal(again(tokens).logits, expected)
"""


def test_push_and_load_by_name(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PUSH), str(tmp_path / "base")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    files = hub.files["user/tiny-backslash"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert json.loads(files["adapter_config.json"])["peft_type"] == "BACKSLASH"


def test_adapter_names_by_position_and_a_larger_vocabulary():
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    assert peft.get_peft_model_state_dict(lora, None, "mine")
    base = tiny_llama()
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = peft.get_peft_model(base, BackSlashConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with_lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    wanted = {k for k in peft.get_peft_model_state_dict(with_lora, save_embedding_layers=True) if "embed" in k}
    assert wanted <= set(peft.get_peft_model_state_dict(model, save_embedding_layers=True))


def test_two_models_in_one_optimizer_and_parameters_that_come_later():
    models = [wrapped(lambda_=0.6, grid=None) for _ in range(2)]
    deltas = [[p for n, p in model.named_parameters() if "backslash_delta" in n] for model in models]
    for p in (p for some in deltas for p in some):
        p.grad = torch.zeros_like(p)
        p.data.fill_(0.5)
    optimizer = torch.optim.SGD(deltas[0], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": deltas[1]})
    for p in deltas[1]:
        assert bool((p == 0.5).all())
    optimizer.step()
    for p in (p for some in deltas for p in some):
        assert bool((p < 0.5).all())


def test_a_callback_of_the_users_keeps_its_names(tmp_path):
    trainer = trained(tmp_path, [BackSlashCallback(0.3, modules="backslash_delta")], model=wrapped(), logging_steps=2)
    names = {name.split("/")[0] for entry in trainer.state.log_history for name in entry if "/" in name}
    assert "backslash" in names and "backslash_2" not in names

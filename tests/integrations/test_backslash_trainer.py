"""`BackSlashCallback` in the stock `Trainer` and TRL's: steps, schedule, log, resume, optimizers, adapters, errors."""

import json
import math

import pytest
import torch
import transformers as tf
from transformers import TrainerCallback

from hf_gg import BackSlash, BackSlashCallback
from hf_gg.data import minilm
from hf_gg.training.selection import select_matrices


TOKENS = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


def tiny_llama(seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return tf.LlamaForCausalLM(config)


def arguments(path, **changes) -> tf.TrainingArguments:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 5,
        "seed": 1,
    }
    return tf.TrainingArguments(str(path), **{**settings, **changes})


def trained(path, callbacks=(), model=None, resume=None, **changes) -> tf.Trainer:
    trainer = tf.Trainer(
        model or tiny_llama(), arguments(path, **changes), train_dataset=ROWS, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def zeros(model: torch.nn.Module) -> float:
    matrices = select_matrices(model).values()
    return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)


class ByHand(TrainerCallback):
    """The penalty after each step of the optimizer, from the outside: what the hook must equal."""

    def __init__(self, lambda_: float) -> None:
        self.lambda_, self.penalty = lambda_, None

    def chosen(self, model):
        return model

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.penalty is None:
            self.penalty = BackSlash(self.chosen(model), self.lambda_, every=10**9)
            self.penalty.estimate()
            self.penalty.steps = 1
        if state.global_step % 4 == 0:
            self.penalty.estimate()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.penalty.step(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_line_equals_the_penalty_after_each_step(tmp_path, accumulate):
    changes = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.1}
    callback = BackSlashCallback(0.5, every=4, warmup=0, cooldown=0)
    first = trained(tmp_path, [callback], **changes).model
    assert same(first, trained(tmp_path, [ByHand(0.5)], **changes).model)
    assert not same(first, trained(tmp_path, **changes).model)
    assert callback.saved["steps"] == 10


def test_the_optimizer_is_left_alone_afterwards(tmp_path):
    trainer = trained(tmp_path, [BackSlashCallback(0.5)])
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    trainer.train()  # a second time
    assert not optimizer._optimizer_step_post_hooks


def test_schedule():
    callback = BackSlashCallback(warmup=0.2, cooldown=0.3)
    assert [callback.strength_at(step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    callback = BackSlashCallback(warmup=4, cooldown=2)
    assert [callback.strength_at(step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 0, 0]
    assert [BackSlashCallback(warmup=0, cooldown=0).strength_at(step, 3) for step in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("hold", [True, False])
def test_support_is_held_in_the_last_part(tmp_path, hold):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(zeros(model))

    trained(tmp_path, [BackSlashCallback(1.2, cooldown=0.5, hold_support=hold), Watch()])
    assert 0.2 < seen[4] < 0.98
    if hold:
        assert all(x >= seen[4] for x in seen[5:]) and seen[9] <= seen[4] + 0.01
    else:
        assert seen[9] < 0.5 * seen[4]


def test_log_reaches_every_tracker(tmp_path):
    """The built-in trackers come before a user's callbacks, and get the numbers all the same."""
    got = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            got.append(dict(logs))

    trainer = tf.Trainer(tiny_llama(), arguments(tmp_path), train_dataset=ROWS, callbacks=[BackSlashCallback(0.5)])
    trainer.callback_handler.callbacks.insert(0, Tracker())
    trainer.train()
    names = {
        "bits",
        "sparsity",
        "zeros",
        "step",
        "R",
        *(f"shape/{k}" for k in ("q_proj", "k_proj", "v_proj", "o_proj")),
    }
    names |= {f"shape/{k}" for k in ("gate_proj", "up_proj", "down_proj")}
    for logs in (got[0], got[1], trainer.state.log_history[0]):
        assert {key.removeprefix("backslash/") for key in logs if key.startswith("backslash/")} == names
    assert not any(key.startswith("backslash/") for key in got[2])  # the summary of the training
    assert 0 < got[0]["backslash/bits"] < 16 and 0.5 < got[0]["backslash/shape/q_proj"] <= 2
    # c = η λ ν, with the learning rate of that step
    lr = got[0]["learning_rate"]
    assert got[0]["backslash/step"] == pytest.approx(lr * 0.5 * 2, rel=0.2)


def test_reference_form_reports_its_step(tmp_path):
    model = tiny_llama()
    count = sum(p.numel() for p in model.parameters())
    history = trained(tmp_path, [BackSlashCallback(1.0, form="reference", cooldown=0)], model).state.log_history
    c, shape = history[0]["backslash/step"], history[0]["backslash/shape/q_proj"]
    assert c == pytest.approx(shape / count, rel=1e-6)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("at", [3, 8])
def test_resume_is_bit_identical(tmp_path, at, restore):
    """At 3 between two estimates, at 8 in the last part with held zeros."""

    def callback():
        return BackSlashCallback(1.0, every=4, cooldown=0.4)

    changes = {"save_strategy": "steps", "save_steps": at, "restore_callback_states_from_checkpoint": restore}
    whole = trained(tmp_path / "a", [callback()], **changes).model
    checkpoint = tmp_path / "a" / f"checkpoint-{at}"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["BackSlashCallback"]["attributes"]["saved"]["steps"] == at
    again = trained(tmp_path / "b", [callback()], tiny_llama(seed=5), str(checkpoint), **changes)
    assert same(whole, again.model)
    assert zeros(whole) > 0.05
    # a checkpoint without the callback's state can be gone on from, and saved again
    del saved["stateful_callbacks"]["BackSlashCallback"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
    other = trained(tmp_path / "c", [callback()], tiny_llama(seed=5), str(checkpoint), **changes)
    assert same(whole, other.model) == (at == 8)


def test_two_on_different_modules(tmp_path):
    """Each keeps its own state and has names of its own in the log."""

    def callbacks():
        first = BackSlashCallback(0.4, modules="mlp", every=4)
        return [first, BackSlashCallback(1.2, modules=["self_attn"], every=4, cooldown=0)]

    changes = {"save_strategy": "steps", "save_steps": 6}
    whole = trained(tmp_path / "a", callbacks(), **changes)
    logs = whole.state.log_history[0]
    assert "backslash/shape/up_proj" in logs and "backslash_2/shape/q_proj" in logs
    assert "backslash/shape/q_proj" not in logs and logs["backslash_2/zeros"] != logs["backslash/zeros"]
    again = trained(tmp_path / "b", callbacks(), tiny_llama(5), str(tmp_path / "a/checkpoint-6"), **changes)
    assert same(whole.model, again.model)


@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", "adamw_torch_fused", "adafactor", "adamw_torch_8bit", "adamw_bnb_8bit", "sgd", "lion_8bit"],
)
def test_optimizers(tmp_path, optim):
    changes = {"optim": optim, "learning_rate": 0.1 if optim == "sgd" else 5e-3}
    try:
        plain = trained(tmp_path, **changes).model
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"{optim} does not run on this machine: {error}")
    first = trained(tmp_path, [BackSlashCallback(1.0, warmup=0, cooldown=0, every=4)], **changes).model
    assert zeros(plain) == 0 and zeros(first) > 0.05
    second = trained(tmp_path, [ByHand(1.0)], **changes).model
    assert same(first, second)


def test_bfloat16_autocast(tmp_path):
    first = trained(tmp_path, [BackSlashCallback(1.0, warmup=0, cooldown=0, every=4)], bf16=True).model
    assert same(first, trained(tmp_path, [ByHand(1.0)], bf16=True).model)
    assert zeros(first) > 0.05 and first.dtype == torch.float32


def test_bfloat16_parameters(tmp_path):
    model = trained(tmp_path, [BackSlashCallback(1.0, cooldown=0)], tiny_llama().bfloat16()).model
    assert model.dtype == torch.bfloat16 and zeros(model) > 0.05


@pytest.mark.slow
def test_compiled(tmp_path):
    callback = BackSlashCallback(1.0, warmup=0, cooldown=0)
    compiled = trained(tmp_path, [callback], torch_compile=True, max_steps=4).model
    eager = trained(tmp_path, [BackSlashCallback(1.0, warmup=0, cooldown=0)], max_steps=4).model
    for (name, x), y in zip(select_matrices(compiled).items(), select_matrices(eager).values()):
        assert torch.allclose(x, y, atol=1e-5), name
    assert zeros(compiled) > 0.05


def test_adapters_beside_it(tmp_path):
    """LoRA on the attention, the MLP trained whole under the penalty: adapters are left alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def build():
        model = peft.get_peft_model(tiny_llama(), config)
        for name, p in model.named_parameters():
            if ".mlp." in name:
                p.requires_grad_(True)
        return model

    model = build()
    chosen = select_matrices(model)
    assert chosen and all(".mlp." in name for name in chosen)
    model = trained(tmp_path, [BackSlashCallback(1.0, cooldown=0)], model).model
    assert zeros(model) > 0.05
    lora = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert lora and all((p != 0).all() for p in lora)
    only = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="no matrix of PeftModelForCausalLM is selected"):
        trained(tmp_path, [BackSlashCallback()], only)
    whole = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM")
    names = list(select_matrices(peft.get_peft_model(tiny_llama(), whole)))
    assert names and all("modules_to_save" in name for name in names)


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm())
    tokenizer.eos_token = tokenizer.sep_token
    from datasets import Dataset

    settings = {
        "max_steps": 6,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "bf16": False,
    }
    trainer = trl.SFTTrainer(
        tiny_llama(),
        args=trl.SFTConfig(
            str(tmp_path), logging_steps=2, per_device_train_batch_size=4, disable_tqdm=True, **settings
        ),
        train_dataset=Dataset.from_dict({"input_ids": TOKENS.tolist()}),
        processing_class=tokenizer,
        callbacks=[BackSlashCallback(1.0, warmup=0, cooldown=0)],
    )
    trainer.train()
    assert zeros(trainer.model) > 0.02
    assert "backslash/bits" in trainer.state.log_history[0]


def test_modules(tmp_path):
    model = trained(tmp_path, [BackSlashCallback(2.0, modules=["up_proj", ".*q_proj"], cooldown=0)]).model
    for name, p in select_matrices(model).items():
        assert (p == 0).any() == ("up_proj" in name or "q_proj" in name), name


def test_training_that_fails_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                model.model.layers[1].mlp.up_proj.weight.grad.fill_(math.nan)

    message = r"model\.layers\.1\.mlp\.up_proj\.weight has weights that are NaN"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, [BackSlashCallback(1.0), Poison()], save_strategy="steps", save_steps=2, max_grad_norm=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(p.isfinite().all() for p in model.parameters())

    class Break(TrainerCallback):  # where no step of the penalty would see it
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.layers[0].mlp.up_proj.weight.data.fill_(math.nan)

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        trained(tmp_path / "b", [Break(), BackSlashCallback(1.0)], save_strategy="steps", save_steps=2)
    assert not list((tmp_path / "b").glob("checkpoint-*"))

    class PoisonNorm(TrainerCallback):  # what the penalty does not act on
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.model.norm.weight.grad[0] = math.nan

    for changes in ({"save_strategy": "steps", "save_steps": 2}, {"max_steps": 4}):
        with pytest.raises(ValueError, match=r"model\.norm\.weight has weights that are NaN"):
            trained(tmp_path / "c", [PoisonNorm(), BackSlashCallback(1.0)], max_grad_norm=0, **changes)
    assert [path.name for path in (tmp_path / "c").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_": -1.0}, "lambda_"),
        ({"lambda_": math.nan}, "lambda_"),
        ({"warmup": -0.1}, "warmup"),
        ({"cooldown": math.nan}, "cooldown"),
        ({"grid": 0.0}, "grid must be positive"),
        ({"form": "x"}, "form"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BackSlashCallback(**settings)


def test_a_cooldown_of_the_whole_training(tmp_path):
    with pytest.raises(ValueError, match="cooldown=50 leaves out the penalty in all of the 8 steps"):
        trained(tmp_path, [BackSlashCallback(cooldown=50)], max_steps=8)


def test_without_a_penalty_the_weights_are_measured(tmp_path):
    log = trained(tmp_path, [BackSlashCallback(0)], max_steps=4, logging_steps=2).state.log_history[0]
    plain = trained(tmp_path, [], max_steps=4, logging_steps=2)
    assert log["backslash/bits"] > 1 and log["backslash/step"] == 0
    assert log["loss"] == plain.state.log_history[0]["loss"]


def test_bad_modules(tmp_path):
    with pytest.raises(ValueError, match="'qkv' matches no module of LlamaForCausalLM"):
        trained(tmp_path, [BackSlashCallback(modules="qkv")])
    with pytest.raises(ValueError, match="'embed_tokens' matches 'model.embed_tokens'"):
        trained(tmp_path, [BackSlashCallback(modules="embed_tokens")])
    model = trained(tmp_path, [BackSlashCallback(2.0, modules="embed_tokens", embeddings=True, cooldown=0)]).model
    assert (model.get_input_embeddings().weight == 0).any()


def test_adafactor_without_a_learning_rate(tmp_path):
    model = tiny_llama()
    optimizer = tf.Adafactor(model.parameters(), lr=None, relative_step=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    trainer = tf.Trainer(
        model,
        arguments(tmp_path),
        train_dataset=ROWS,
        optimizers=(optimizer, scheduler),
        callbacks=[BackSlashCallback()],
    )
    with pytest.raises(ValueError, match="no learning rate of its own"):
        trainer.train()

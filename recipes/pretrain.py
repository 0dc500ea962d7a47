"""Pretraining from scratch: weights drawn from a generalized Gaussian, and if wanted a rate penalty (BackSlash).

    python recipes/pretrain.py                                     # what pretrain.yaml says
    python recipes/pretrain.py --shape 1 --backslash 0.1
    python recipes/pretrain.py --architecture NAME --texts my.jsonl

The architecture is a model's on the hub or a folder's (its config and tokenizer; no weights are read), or else a small
Llama with a byte-level BPE that is trained on the texts. The result is a checkpoint that any `from_pretrained` opens.
Prints the loss on held-out texts, and the bits a weight of its matrices on a grid of 2^-8, entropy-coded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import settings
import torch
import transformers as tf
from tokenizers import ByteLevelBPETokenizer

from hf_gg import BackSlash, BackSlashCallback, gg_init
from hf_gg.training.rate import Rate


END = "<|endoftext|>"
GRID = 2**-8


@dataclass
class PretrainArguments:
    architecture: str = field(default="", metadata={"help": "name or folder of config and tokenizer; else a Llama"})
    shape: float | None = field(default=None, metadata={"help": "ν of the initial weights; the model's own if empty"})
    backslash: float = field(default=0.0, metadata={"help": "λ of the rate penalty; none if 0"})
    texts: str = field(default="", metadata={"help": "file or data set; State of the Union addresses if empty"})
    text_column: str = "text"
    since: int = field(default=1790, metadata={"help": "year of the first address"})
    eval_share: float = field(default=0.05, metadata={"help": "share of the texts that is held out, the last ones"})
    eval_windows: int = field(default=32, metadata={"help": "held-out examples at most"})
    window: int = field(default=128, metadata={"help": "tokens of an example"})
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048


def main(arguments: Sequence[str] | None = None) -> dict:
    """Train; returns what is printed."""
    options, args = settings.read(__file__, [PretrainArguments, tf.TrainingArguments], arguments)
    rows = settings.texts(options.texts, options.text_column, options.since)
    train, test = settings.held_out(rows, options.eval_share)
    words = tokenizer(options, list(train[options.text_column]))
    parts = ((train, None), (test, options.eval_windows))
    examples = [settings.windows(part, options.text_column, words, options.window, most) for part, most in parts]
    tf.set_seed(args.seed)
    with nullcontext() if options.shape is None else gg_init(shape=options.shape):
        model = tf.AutoModelForCausalLM.from_config(config(options, words))
    callbacks = [BackSlashCallback(options.backslash)] if options.backslash else []
    trainer = tf.Trainer(
        model, args, train_dataset=examples[0], eval_dataset=examples[1], processing_class=words, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=settings.checkpoint(args))
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    result = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_weight": bits(model),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "model": args.output_dir,
    }
    Path(args.output_dir, "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


def tokenizer(options: PretrainArguments, texts: list[str]) -> tf.PreTrainedTokenizerBase:
    """The architecture's tokenizer, or a new one."""
    if options.architecture:
        return settings.tokenizer(options.architecture)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=options.vocabulary, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def config(options: PretrainArguments, words: tf.PreTrainedTokenizerBase) -> tf.PreTrainedConfig:
    """The architecture's config, or a small Llama's."""
    if options.architecture:
        return tf.AutoConfig.from_pretrained(options.architecture)
    return tf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.hidden_size * 8 // 3 // 8 * 8,
        max_position_embeddings=max(options.window, 128),
        tie_word_embeddings=True,
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def bits(model: torch.nn.Module) -> float:
    """Bits a weight of the penalized matrices, rounded to multiples of `GRID` and entropy-coded."""
    return Rate.of(BackSlash(model).measure(GRID).values()).bits


if __name__ == "__main__":
    main()

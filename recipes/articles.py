"""The classifier that recipes fine-tune: the first layers of all-MiniLM-L6-v2 with a new head, on BBC news.

Five subjects, 1,500 articles to train on and 725 held out, cut off after a few words. Embeddings are frozen.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf
from rate_study import StudyArguments

from hf_gg import data


@dataclass
class ArticleArguments(StudyArguments):
    layers: int = field(default=6, metadata={"help": "layers of the encoder that are kept, at most 6"})
    tokens: int = field(default=32, metadata={"help": "tokens of an article that are read"})
    held_out: int = field(default=725, metadata={"help": "articles for the accuracy"})

    def check(self) -> None:
        """See `StudyArguments`."""
        super().check()
        for name, most in (("layers", 6), ("held_out", 725), ("tokens", 512)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {getattr(self, name)}.")


def classifier(
    study: ArticleArguments, wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None
) -> tuple[Callable, Callable[[torch.nn.Module], float]]:
    """`train` and `evaluate` of `rate_study.run`; the metric is the accuracy on held-out articles.

    Args:
        wrap: puts an adapter on the model.
    """
    train_rows, test_rows, labels = articles(study)
    collate = tf.DataCollatorWithPadding(tf.AutoTokenizer.from_pretrained(data.minilm()))

    def train(seed: int, args: tf.TrainingArguments, callbacks: list) -> torch.nn.Module:
        tf.set_seed(seed)
        model = tf.AutoModelForSequenceClassification.from_pretrained(
            data.minilm(), num_labels=len(labels), num_hidden_layers=study.layers
        )
        model.get_input_embeddings().requires_grad_(False)
        model = wrap(model) if wrap else model
        trainer = tf.Trainer(model, args, collate, train_dataset=train_rows, callbacks=callbacks)
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
        return model

    batches = [collate(test_rows[i : i + 64]) for i in range(0, len(test_rows), 64)]
    truth = torch.tensor([row["labels"] for row in test_rows])

    def accuracy(model: torch.nn.Module) -> float:
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(**batch.to(model.device)).logits.cpu() for batch in batches])
        return float((logits.argmax(-1) == truth).double().mean())

    return train, accuracy


def articles(study: ArticleArguments) -> tuple[list[dict], list[dict], list[str]]:
    """Training and held-out rows, the same for all seeds, and the labels."""
    rows = data.bbc_news()
    random.Random(0).shuffle(rows)
    labels = sorted({label for _, label in rows})
    tokenizer = tf.AutoTokenizer.from_pretrained(data.minilm())
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=study.tokens)
    items = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels.index(label)}
        for ids, mask, (_, label) in zip(encoded["input_ids"], encoded["attention_mask"], rows)
    ]
    return items[725:], items[: study.held_out], labels

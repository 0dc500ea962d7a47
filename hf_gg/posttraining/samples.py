"""Samples with a prompt and an answer: as tokens, as batches, and which of them a model answers right."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


INDEX, LAST, PROMPT = "roma_index", "roma_last", "roma_prompt"


class Samples(Dataset):
    """Rows with `prompt` and `answer` (both text, the answer with the blank that stands before it), as token ids.

    Other keys of a row are looked at by `judge` (`choices`) and by `RoMATrainer` (`success`). Text becomes tokens when
    a row is asked for, so nothing is kept.

    Args:
        rows: a list of dictionaries or a `datasets.Dataset`.
        tokenizer: of the model.
        max_length: tokens of prompt and answer together; a longer prompt loses its beginning. None for any.

    Raises:
        ValueError: a row without prompt or answer, or no row; the row is named.
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None = None, name: str = "train_dataset") -> None:
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise ValueError(f"{name} must have a length and rows by number; collect a stream into a list.")
        if not len(rows):
            raise ValueError(f"{name} is empty.")
        self.rows, self.tokenizer, self.max_length, self.name = rows, tokenizer, max_length, name
        if isinstance(rows, Mapping):
            raise ValueError(f"{name} is a dictionary: give a list of rows, or datasets.Dataset.from_dict of it.")
        for i in range(len(rows)):
            if not isinstance(rows[i], Mapping):
                raise ValueError(f"{name}[{i}] must be a dictionary with prompt and answer, got {rows[i]!r:.80}.")
            for key in ("prompt", "answer"):
                value = rows[i].get(key)
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{name}[{i}] has no {key}: {key!r} must be text, got {value!r}.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        prompt = self.tokenizer(row["prompt"])["input_ids"]
        answer = self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        for key, tokens in (("prompt", prompt), ("answer", answer)):
            if not tokens:
                raise ValueError(f"{self.name}[{i}]: the tokenizer makes no token of the {key} {row[key]!r:.80}.")
        if self.max_length is not None:
            room = self.max_length - len(answer)
            if room < 1:
                raise ValueError(
                    f"{self.name}[{i}] has an answer of {len(answer)} tokens, which leaves no room for the prompt in "
                    f"max_length={self.max_length}: make it larger."
                )
            prompt = prompt[-room:]
        return {"prompt": prompt, "answer": answer, "index": i}

    def column(self, key: str) -> list[Any]:
        """A key of all rows; None where a row has it not."""
        return [self.rows[i].get(key) for i in range(len(self.rows))]


class Collator:
    """Makes batches of `Samples`, padded on the tokenizer's side, with labels for the answer alone.

    Besides what the model takes, a batch has the rows' numbers, the place of the last prompt token and, for routing
    that is averaged, a mask of the prompt. Padded on the left, all answers are at the end: then the model need not
    give logits for the prompt, and labels are as long as the logits.

    Args:
        tokenizer: of the model.
        model: whose forward is asked whether it knows `logits_to_keep`, and how long a text it takes; None for logits
            of all tokens and any length.

    Raises:
        ValueError: a sample is longer than the model's context.
    """

    def __init__(self, tokenizer: Any, model: Any = None) -> None:
        # as Trainer looks for it
        self.tokenizer = tokenizer
        self.keeps = model is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
        self.context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad = 0 if pad is None else int(pad)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        if self.context is not None and length > self.context:
            at = max(rows, key=lambda row: len(row["prompt"]) + len(row["answer"]))["index"]
            raise ValueError(
                f"sample {at} has {length} tokens, more than the model's context of {self.context}: set "
                f"max_length to {self.context} at most, so that the prompt loses its beginning."
            )
        shape = (len(rows), length)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
            PROMPT: torch.zeros(shape, dtype=torch.bool),
        }
        last = []
        for i, row in enumerate(rows):
            prompt, answer = len(row["prompt"]), len(row["answer"])
            start = length - prompt - answer if self.tokenizer.padding_side == "left" else 0
            whole = slice(start, start + prompt + answer)
            batch["input_ids"][i, whole] = torch.tensor([*row["prompt"], *row["answer"]])
            batch["attention_mask"][i, whole] = 1
            batch["position_ids"][i, whole] = torch.arange(prompt + answer)
            batch["labels"][i, start + prompt : whole.stop] = torch.tensor(row["answer"])
            batch[PROMPT][i, start : start + prompt] = True
            last.append(start + prompt - 1)
        if self.keeps and self.tokenizer.padding_side == "left":
            # the logits before the first token of an answer are those that foretell it
            batch["logits_to_keep"] = 1 + max(len(row["answer"]) for row in rows)
            batch["labels"] = batch["labels"][:, -batch["logits_to_keep"] :]
        return {**batch, LAST: torch.tensor(last), INDEX: torch.tensor([row["index"] for row in rows])}


def batches(
    samples: Samples, rows: Sequence[int], size: int, rank: int = 0, world: int = 1, model: Any = None
) -> Iterator[tuple[dict[str, Any], bool]]:
    """One process's share of some rows. All processes get as many batches, so that they can work together.

    Yields:
        A batch, and whether it counts: what fills up the last round does not.
    """
    collate, count = Collator(samples.tokenizer, model), -(-len(rows) // size)
    for i in range(0, count, world):
        place = min(i + rank, count - 1)
        yield collate([samples[j] for j in rows[place * size : (place + 1) * size]]), i + rank < count


def candidates(samples: Samples) -> list[list[int] | None]:
    """First tokens of each row's `choices`, the right one first; None for rows without.

    Raises:
        ValueError: choices that are no texts, without the answer or anything else among them, or two that begin with
            the same token.
    """
    found: list[list[int] | None] = []
    tokens: dict[str, int] = {}
    for i, choices in enumerate(samples.column("choices")):
        if choices is None:
            found.append(None)
            continue
        answer = samples.rows[i]["answer"]
        if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) and c.strip() for c in choices):
            raise ValueError(f"{samples.name}[{i}]: choices must be a list of texts, got {choices!r:.80}.")
        if answer not in choices:
            raise ValueError(f"{samples.name}[{i}]: choices {list(choices)!r} do not hold the answer {answer!r}.")
        for choice in choices:
            if choice not in tokens:
                tokens[choice] = samples.tokenizer(choice, add_special_tokens=False)["input_ids"][0]
        firsts = [tokens[answer], *(tokens[choice] for choice in choices if choice != answer)]
        if len(firsts) < 2:
            raise ValueError(f"{samples.name}[{i}]: choices hold nothing but the answer, which would always be right.")
        if len(set(firsts)) < len(firsts):
            raise ValueError(
                f"{samples.name}[{i}]: two of the choices {list(choices)!r} begin with the same token, so that the "
                "next one does not tell them apart: use letters, or leave choices out for greedy decoding."
            )
        found.append(firsts)
    return found


def judge(logits: torch.Tensor, labels: torch.Tensor, choices: Sequence[list[int] | None]) -> torch.Tensor:
    """Which rows of a batch a model answers right.

    With choices, the right one must be likelier than the others after the prompt. Without, greedy decoding must begin
    with the answer's tokens: it does so exactly if each of them is the likeliest after those before it, which one
    forward pass of prompt and answer shows.

    Args:
        logits: of prompt and answer, or of the last tokens alone, [batch, length, vocabulary].
        labels: of the same length, [batch, length].
        choices: from `candidates`, for the rows of the batch.

    Returns:
        bool, [batch], on the CPU.
    """
    said, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    last = (labels != -100).int().argmax(1) - 1  # before the first token of the answer
    right = ((said == wanted) | (wanted == -100)).all(1).cpu()
    for i, firsts in enumerate(choices):
        if firsts is not None:
            scores = logits[i, int(last[i])][torch.tensor(firsts, device=logits.device)]
            right[i] = bool(scores[0] > scores[1:].max())
    return right

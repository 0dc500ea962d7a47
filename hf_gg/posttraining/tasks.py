"""Tasks: data to learn from and to be judged on, and rewards that know whose data they judge."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rewards import Reward, text_of


@dataclass
class Task:
    """A task: data to learn from and to be judged on.

    Attributes:
        name: short; its folder is called so.
        train: `datasets.Dataset` with columns `prompt` and `answer`; SFT takes `completion`, or else the answer.
        test: the same, for evaluation.
        reward: for being right, as `hf_gg.posttraining.rewards` has them.
        format: a second reward for GRPO, for the format.
        threshold: an answer is right if its reward is at least that.
    """

    name: str
    train: Any
    test: Any
    reward: Reward
    format: Reward | None = None
    threshold: float = 0.5


def mixed(tasks: list[Task], seed: int) -> Any:
    """The training data of tasks, shuffled if they are several, with the number of its task in each row."""
    from datasets import concatenate_datasets

    shared = set.intersection(*({*task.train.column_names} for task in tasks))
    parts = [
        task.train.select_columns([name for name in task.train.column_names if name in shared]).add_column(
            "task", [number] * len(task.train)
        )
        for number, task in enumerate(tasks)
    ]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=seed)


def by_task(tasks: list[Task], kind: str) -> Reward:
    """The reward of each row's own task; 0 where it has none of the kind."""

    def reward(completions: Sequence[Any], task: Sequence[int], **columns: Any) -> list[float | None]:
        found: list[float | None] = [0.0] * len(completions)
        for number in {*task}:
            own = getattr(tasks[number], kind)
            places = [place for place, other in enumerate(task) if other == number]
            if own is None:
                continue
            chosen = {name: _at(values, places, len(task)) for name, values in columns.items()}
            for place, value in zip(places, own(completions=[completions[place] for place in places], **chosen)):
                found[place] = value
        return found

    reward.__name__ = kind if len(tasks) > 1 else getattr(getattr(tasks[0], kind), "__name__", kind)
    return reward


def _at(values: Any, places: list[int], count: int) -> Any:
    """A column's values at some places; what TRL gives besides columns as it is."""
    return [values[place] for place in places] if isinstance(values, list) and len(values) == count else values


def right(tasks: list[Task]) -> Reward:
    """1 where the reward of a row's task reaches its threshold."""
    graded = by_task(tasks, "reward")

    def right(completions: Sequence[Any], task: Sequence[int], **columns: Any) -> list[float | None]:
        values = graded(completions=completions, task=task, **columns)
        return [
            value if value is None or math.isnan(value) else float(value >= tasks[number].threshold)
            for value, number in zip(values, task)
        ]

    return right


def with_completion(row: dict[str, Any]) -> dict[str, Any]:
    """A row of TRL's prompt-completion data."""
    chat = not isinstance(row["prompt"], str)
    text = row.get("completion")
    text = str(row["answer"]) if text is None else text_of(text)
    if chat:
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}
    apart = text[:1].isspace() or row["prompt"][-1:].isspace()
    return {"prompt": row["prompt"], "completion": text if apart else f" {text}"}


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a trainer that was written to its end; None without."""
    found = []
    for place in folder.glob("checkpoint-*"):
        try:
            json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            found.append((int(place.name.rpartition("-")[2]), str(place)))
        except (OSError, ValueError):
            shutil.rmtree(place, ignore_errors=True)
    return max(found)[1] if found else None


def digest_of(data: Any) -> str:
    """Of a data set's contents."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return value.tobytes().hex() if hasattr(value, "tobytes") else str(value)

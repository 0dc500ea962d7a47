"""Tasks of arithmetic and word problems, generated; and GSM8K from a file of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from hf_gg.posttraining.continual import Task
from hf_gg.posttraining.rewards import format_match, number_in, number_match


_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo")
_THINGS = ("apples", "books", "coins", "pens", "stamps", "shells")


def _sum(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"What is {a} + {b}?", a + b


def _difference(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(10, 30), rng.randint(2, 9)
    return f"What is {a} - {b}?", a - b


def _product(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"What is {a} times {b}?", a * b


def _words(rng: random.Random) -> tuple[str, int]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b = rng.randint(5, 15), rng.randint(2, 5)
    if rng.random() < 0.5:
        return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", a + b
    return f"{name} has {a} {thing} and gives {b} away. How many {thing} does {name} have left?", a - b


TASKS: dict[str, Callable[[random.Random], tuple[str, int]]] = {
    "sums": _sum,
    "differences": _difference,
    "products": _product,
    "words": _words,
}


def arithmetic(name: str, train: int, test: int) -> Task:
    """A generated task. The questions of training and test are different, and the same in every run."""
    rng, rows, seen = random.Random(name), [], set()
    for _ in range(100 * (train + test)):
        question, answer = TASKS[name](rng)
        if question not in seen and len(rows) < train + test:
            seen.add(question)
            rows.append(_row(question, str(answer)))
    if len(rows) <= test:
        raise ValueError(f"{name} has only {len(rows)} different questions: ask for less than {test} to test on.")
    return Task(name, Dataset.from_list(rows[test:]), Dataset.from_list(rows[:test]), number_match, format_match)


def gsm8k(file: str | Path, train: int, test: int) -> Task:
    """GSM8K from its jsonl file (`question`, and `answer` that ends in `#### 72`); the last rows are the test.

    Raises:
        ValueError: a line that is no such row (it is named), or too few of them.
    """
    rows = []
    # not by splitlines: a JSON text may hold other line ends
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            question, solution = found["question"], found["answer"]
            text, mark, answer = solution.rpartition("####")
            question.strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: no question and answer of GSM8K ({error!r}).") from None
        if not mark or number_in(answer) is None:
            raise ValueError(f"{file}, line {number}: the answer does not end in '#### ' and a number.")
        rows.append(_row(question, answer.strip()) | {"completion": f"{text.strip()}\n#### {answer.strip()}"})
    if len(rows) <= test:
        raise ValueError(f"{file} has {len(rows)} rows: more than the {test} to test on are needed.")
    learned = rows[: -test or None][:train]
    return Task("gsm8k", Dataset.from_list(learned), Dataset.from_list(rows[-test:]), number_match, format_match)


def _row(question: str, answer: str) -> dict:
    ask = f"{question} End with #### and the number."
    return {"prompt": [{"role": "user", "content": ask}], "answer": answer, "completion": f"#### {answer}"}

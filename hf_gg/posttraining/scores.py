"""Scores of tasks that are learned one after the other: their mean, what is forgotten, and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class ContinualResult:
    """What a run gave.

    Attributes:
        tasks: names.
        start: accuracy on each task before any training.
        scores: P, accuracy [T, T]: of row t after training on task t, on each task. One row for joint training.
        general: the general benchmark before and after, None without one.
        filters: the report of each filter, None where there was none.
        seconds: of training, by task, as far as this process trained.
    """

    tasks: list[str]
    start: list[float]
    scores: list[list[float]]
    general: tuple[float, float] | None = None
    filters: list[dict | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        square = len(self.scores) == len(self.tasks)
        return {
            **dataclasses.asdict(self),
            "average_accuracy": average_accuracy(self.scores if square else [self.scores[-1]]),
            "forgetting": forgetting(self.scores) if square and len(self.tasks) > 1 else None,
        }


def average_accuracy(scores: Sequence[Sequence[float]] | np.ndarray | torch.Tensor) -> float:
    """AvgAcc, the mean over all tasks after the last one: mean_j P[T-1, j].

    Args:
        scores: P, [rows, T]: row t holds the scores on all tasks after task t.

    Raises:
        ValueError: no table, or numbers missing in its last row.
    """
    table = _table(scores)
    if not np.isfinite(table[-1]).all():
        raise ValueError(f"the last row of scores has numbers that are missing: {table[-1].tolist()}.")
    return float(table[-1].mean())


def forgetting(scores: Sequence[Sequence[float]] | np.ndarray | torch.Tensor) -> float:
    """FM, the mean over all tasks but the last one of P[T-1, j] - max over t < T-1 of P[t, j]: forgotten if negative.

    Args:
        scores: P, [T, T]: row t holds the scores on all tasks after task t. Of tasks that were not yet learned they
            count too, as far as they are there (NaN where not).

    Raises:
        ValueError: a table that is not square, of fewer than two tasks, or with numbers missing that are needed.
    """
    table = _table(scores)
    if table.shape[0] != table.shape[1] or len(table) < 2:
        raise ValueError(f"forgetting needs scores of two tasks or more, [T, T], got {[*table.shape]}.")
    last, before = table[-1, :-1], table[:-1, :-1]
    needed = np.tril(np.ones_like(before, bool))
    if not np.isfinite(last).all() or not np.isfinite(before[needed]).all() or np.isinf(before).any():
        raise ValueError("scores are missing: of every task those after it was learned are needed.")
    return float((last - np.nanmax(before, axis=0)).mean())


def plot_scores(result: ContinualResult, file: str | Path) -> None:
    """A heat map of P, with the scores before training on top; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [result.start, *result.scores]
    learned = result.tasks if len(result.scores) == len(result.tasks) else ["all tasks"]
    figure = Figure(figsize=(1.5 + 1.1 * len(result.tasks), 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(np.array(rows), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            axes.text(x, y, f"{score:.2f}", ha="center", va="center", color="black" if score > 0.6 else "white")
    axes.set_xticks(range(len(result.tasks)), result.tasks)
    axes.set_yticks(range(len(rows)), ["before", *(f"after {name}" for name in learned)])
    axes.set_xlabel("evaluated on")
    figure.colorbar(picture, label="accuracy")
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(temporary, dpi=120, format=file.suffix[1:] or "png")
    temporary.replace(file)


def _table(scores: Any) -> np.ndarray:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores must be a table [rows, tasks], got the shape {[*table.shape]}.")
    return table

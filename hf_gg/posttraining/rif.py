"""Rollout-based instance filtering (arXiv 2507.05386): before GRPO, instances that the policy never gets right go.

Each instance is rolled out n times by the current policy. One that is right at least `min_correct` times is kept: a
group of rollouts that are all wrong has no advantage, only its cost. The rule is a choice of efficiency; it does not
make GRPO better on everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .judging import RolloutReport, roll_out
from .rewards import REWARDS, Reward, choice_match, combine, exact_match, format_match, matches, number_match
from .rollouts import Sampling


__all__ = [
    "REWARDS",
    "AllDropped",
    "Reward",
    "RolloutReport",
    "Sampling",
    "choice_match",
    "combine",
    "exact_match",
    "filter_by_rollouts",
    "format_match",
    "keep_mask",
    "matches",
    "number_match",
    "roll_out",
]

COUNT_COLUMN = "rollouts_correct"


class AllDropped(ValueError):
    """No instance is left; `report` tells of the rollouts."""

    def __init__(self, message: str, report: RolloutReport) -> None:
        super().__init__(message)
        self.report = report


def keep_mask(
    counts: Sequence[int] | np.ndarray | torch.Tensor, n: int, min_correct: int = 1, max_correct: int | None = None
) -> np.ndarray:
    """Which instances are kept: those right at least `min_correct` and at most `max_correct` times of n.

    Args:
        counts: of right rollouts, [instances].
        n: rollouts an instance.
        min_correct: 0 to n.
        max_correct: `min_correct` to n; n for None, which keeps instances that are always right.

    Returns:
        bool [instances].

    Raises:
        ValueError: a bound or a count out of its range. TypeError: counts that are not whole numbers.
    """
    found = np.asarray(counts)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"counts must be whole numbers, got {found.dtype}.")
    check_bounds(n, min_correct, max_correct)
    if found.size and not (0 <= found.min() and found.max() <= n):
        raise ValueError(f"counts must lie between 0 and n={n}, got {found.min()} to {found.max()}.")
    return (found >= min_correct) & (found <= (n if max_correct is None else max_correct))


def check_bounds(n: int, min_correct: int, max_correct: int | None) -> None:
    """`ValueError` for bounds that no count can be between."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if not 0 <= min_correct <= n:
        raise ValueError(f"min_correct must lie between 0 and n={n}, got {min_correct}.")
    if max_correct is not None and not min_correct <= max_correct <= n:
        raise ValueError(f"max_correct must lie between min_correct={min_correct} and n={n}, got {max_correct}.")


def filter_by_rollouts(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    reward: Reward,
    n: int = 8,
    min_correct: int = 1,
    max_correct: int | None = None,
    *,
    threshold: float = 0.5,
    on_error: str = "fail",
    cache: str | Path | None = None,
    show_progress: bool = True,
    **sampling: Any,
) -> tuple[Any, RolloutReport]:
    """Keep the instances of a data set that the policy gets right sometimes.

    Args:
        model: the policy: anything with `generate` (a Transformers or PEFT model, RF8 or not), or a `vllm.LLM`.
        tokenizer: its tokenizer.
        dataset: `datasets.Dataset` with a column `prompt` (texts or chats) and those that the reward takes, such as
            `answer`.
        reward: as TRL's, see `hf_gg.posttraining.rewards`.
        n: rollouts an instance.
        min_correct: right rollouts that an instance must have.
        max_correct: right rollouts that it may have; None for any.
        threshold: a rollout is right if its reward is at least that. With `combine`, 0.5 asks for the right answer
            and 1 for the format too.
        on_error: where the reward raises, or returns no finite number: `"fail"`, or `"wrong"`, which counts the
            rollout as wrong and lists it in the report.
        cache: a file, JSON lines, that holds the counts of each batch as soon as it is done; a later call with the
            same policy, data and options goes on from there; rewards are told apart by their names. None keeps
            nothing.
        show_progress: whether to show a bar.
        **sampling: of `Sampling`: `max_new_tokens`, `temperature`, `top_p`, `seed`, `batch_tokens`, `stop_strings`.

    Returns:
        The instances that are kept, in their order, with their counts in a column `rollouts_correct`, and a report.

    Raises:
        AllDropped: none is kept. ValueError: no instances, a column that is missing or there already, bounds or
            options out of range, prompts that do not fit in the model's context, a cache of another run; a reward of
            NaN, or of what is no number.
        TypeError: data that are no `datasets.Dataset`, prompts that are neither texts nor chats.
        RuntimeError: the reward raised; the instance is named.
    """
    check_bounds(n, min_correct, max_correct)
    if COUNT_COLUMN in getattr(dataset, "column_names", ()):
        raise ValueError(f"the data set has a column {COUNT_COLUMN!r} already: remove or rename it.")
    report = roll_out(
        model,
        tokenizer,
        dataset,
        reward,
        Sampling(n=n, **sampling),
        threshold=threshold,
        on_error=on_error,
        cache=cache,
        show_progress=show_progress,
    )
    report.kept = np.flatnonzero(keep_mask(report.counts, n, min_correct, max_correct)).tolist()
    if not report.kept:
        advice = (
            "Give easier instances or a better policy (some supervised fine-tuning first), more rollouts, more "
            "max_new_tokens, or look whether the reward finds the answers"
            if not any(report.counts)
            else "Widen min_correct and max_correct"
        )
        raise AllDropped(
            f"all {len(report.counts)} instances are dropped: of {n} rollouts each, {report.accuracy:.1%} are right, "
            f"and none has {min_correct} to {n if max_correct is None else max_correct} right ones. {advice}.",
            report,
        )
    kept = dataset.select(report.kept)
    return kept.add_column(COUNT_COLUMN, [report.counts[place] for place in report.kept]), report

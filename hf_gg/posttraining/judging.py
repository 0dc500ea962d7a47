"""Rollouts of a data set, judged by a reward and counted; the counts are kept batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .rewards import Reward, described
from .rollout_cache import RolloutCache, fingerprint
from .rollouts import Prompts, Sampling, check_lengths, context_of, generate, generate_by_vllm, plan


_UNSEEN = ("completion", "completion_ids")  # columns that TRL does not give to rewards
_MOST_TOLD = 200  # characters of what a reward did


@dataclass
class RolloutReport:
    """What the rollouts of a data set gave.

    Attributes:
        n: rollouts an instance.
        counts: how many of them were right, by instance, in the order of the data set.
        kept: indices of the instances that are kept.
        failures: (instance, rollout, what happened) where the reward failed and this was counted as wrong.
        tokens: generated, without padding; of this run and of those it goes on from.
        seconds: that generating them took.
    """

    n: int
    counts: list[int]
    kept: list[int] = field(default_factory=list)
    failures: list[tuple[int, int, str]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def dropped(self) -> list[int]:
        """Indices of the instances that are not kept."""
        kept = {*self.kept}
        return [place for place in range(len(self.counts)) if place not in kept]

    @property
    def histogram(self) -> list[int]:
        """How many instances were right 0, 1, …, n times."""
        return np.bincount(self.counts, minlength=self.n + 1).tolist()

    @property
    def accuracy(self) -> float:
        """Share of all rollouts that were right."""
        return float(np.mean(self.counts)) / self.n if self.counts else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "instances": len(self.counts),
            "kept": len(self.kept),
            "dropped": len(self.counts) - len(self.kept),
            "histogram": self.histogram,
            "accuracy": self.accuracy,
            "failures": [[*failure] for failure in self.failures],
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        total = max(len(self.counts), 1)
        most = max(self.histogram) or 1
        lines = [
            f"{len(self.kept)} of {len(self.counts)} instances kept ({len(self.kept) / total:.0%}), "
            f"{self.accuracy:.1%} of {self.n} rollouts each right, {self.tokens:,} tokens in {self.seconds:.1f} s"
        ]
        for right, count in enumerate(self.histogram):
            lines.append(f"  {right:3} right {count:7}  {'#' * round(40 * count / most)}")
        if self.failures:
            lines.append(f"  the reward failed on {len(self.failures)} rollouts, which count as wrong")
        return "\n".join(lines)


def roll_out(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    reward: Reward,
    sampling: Sampling,
    *,
    threshold: float = 0.5,
    on_error: str = "fail",
    cache: str | Path | None = None,
    show_progress: bool = True,
) -> RolloutReport:
    """Roll out every instance of a data set and count the right ones; as `filter_by_rollouts`, which keeps some.

    The reward gets the columns that TRL gives, but neither `completion_ids` nor what is of a trainer.

    With `Sampling(n=1, temperature=0)` this evaluates: `report.accuracy` is that of greedy decoding.
    """
    if on_error not in ("fail", "wrong"):
        raise ValueError(f"on_error must be 'fail' or 'wrong', got {on_error!r}.")
    if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold!r}.")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there is nothing to roll out.")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"the data set has no column 'prompt', only {', '.join(dataset.column_names) or 'none'}.")
    for name in ("prompts", "completions"):
        if name in dataset.column_names:
            raise ValueError(f"the data set has a column {name!r}, which the reward gets from rollouts: rename it.")
    chats_or_texts = [*dataset["prompt"]]
    columns = {name: [*dataset[name]] for name in dataset.column_names if name != "prompt"}
    if (place := missing_answer(columns.get("answer", ()))) is not None:
        raise ValueError(f"instance {place} has no answer: drop it or fill it in.")
    images = columns.get("images")
    if images is None and "image" in columns:
        images = [[] if image is None else [image] for image in columns["image"]]
    prompts = Prompts(tokenizer, chats_or_texts, images)
    from_vllm = type(model).__module__.partition(".")[0] == "vllm"
    if from_vllm and images is not None:
        raise ValueError("rollouts by vLLM are of texts only: give a Transformers model for prompts with images.")
    limit = model.llm_engine.model_config.max_model_len if from_vllm else context_of(model)
    check_lengths(prompts.ids, sampling, limit)
    batches = plan([len(ids) for ids in prompts.ids], sampling)
    given = [prompts.ids, columns, described(reward), threshold, on_error, sampling]
    if from_vllm:
        given.append(str(model.llm_engine.model_config.model))
    key = "" if cache is None else fingerprint(model, *given)
    done = RolloutCache(cache, key, [len(batch.prompts) for batch in batches], sampling.n)
    report = RolloutReport(sampling.n, [0] * len(prompts.ids))
    waiting = [batch for batch in batches if batch.number not in done.batches]
    for number, record in done.batches.items():
        _add(report, batches[number].prompts, record)
    made = (generate_by_vllm if from_vllm else generate)(model, prompts, waiting, sampling)
    judge = _Judge(reward, chats_or_texts, columns, threshold, on_error)
    finished = sum(len(batches[number].prompts) for number in done.batches)
    # closed: an exception that is kept would keep the model in evaluation too
    with closing(made), _bar(len(prompts.ids), finished, show_progress) as bar:
        start = time.perf_counter()
        for batch, texts, tokens in made:
            seconds = time.perf_counter() - start
            counts, failures = judge(batch.prompts, texts)
            record = {"counts": counts, "failures": failures, "tokens": tokens, "seconds": seconds}
            done.add(batch.number, record)
            _add(report, batch.prompts, record)
            bar.update(len(batch.prompts))
            start = time.perf_counter()
    report.failures.sort()
    return report


def missing_answer(answers: Iterable[Any]) -> int | None:
    """The place of the first answer that is None, NaN or blank; None if there is none."""
    for place, answer in enumerate(answers):
        if answer is None or answer != answer or (isinstance(answer, str) and not answer.strip()):
            return place
    return None


class _Failure(str):
    """What a reward did in place of a judgement."""


class _Judge:
    """Counts right completions by a reward."""

    def __init__(
        self, reward: Reward, prompts: list, columns: dict[str, list], threshold: float, on_error: str
    ) -> None:
        self.reward, self.prompts, self.columns = reward, prompts, columns
        self.threshold, self.lenient = threshold, on_error == "wrong"

    def __call__(self, places: Sequence[int], texts: list[list[str]]) -> tuple[list[int], list[list]]:
        counts, failures = [], []
        for place, completions in zip(places, texts):
            right = 0
            for rollout, outcome in enumerate(self._rewards(place, completions)):
                if isinstance(outcome, _Failure):
                    failures.append([place, rollout, str(outcome)])
                else:
                    right += outcome >= self.threshold
            counts.append(int(right))
        return counts, failures

    def _rewards(self, place: int, completions: list[str]) -> list[float | _Failure]:
        """The reward of each completion, or what went wrong with it."""
        chat = not isinstance(self.prompts[place], str)
        given = [[{"role": "assistant", "content": text}] if chat else text for text in completions]
        try:
            found = self._call(place, given)
        except Exception as error:
            if not self.lenient:
                raise RuntimeError(
                    f"the reward {_name(self.reward)} failed on instance {place}: {type(error).__name__}: {error}. "
                    "What was rolled out before is in the cache, if one was given; on_error='wrong' counts such "
                    "rollouts as wrong."
                ) from error
            # one by one, to spare the others
            found = []
            for completion in given:
                try:
                    found += self._call(place, [completion])
                except Exception as single:
                    found.append(_Failure(f"{type(single).__name__}: {single}"[:_MOST_TOLD]))
        outcomes: list[float | _Failure] = []
        for value in found:
            number = _number(value)
            if number is None and not isinstance(value, _Failure):
                if not self.lenient:
                    raise ValueError(
                        f"the reward {_name(self.reward)} is {value!r:.{_MOST_TOLD}} for a rollout of instance "
                        f"{place}, and no finite number; on_error='wrong' counts such rollouts as wrong."
                    )
                value = _Failure(f"{value!r:.{_MOST_TOLD}}")
            outcomes.append(value if number is None else number)
        return outcomes

    def _call(self, place: int, completions: list) -> list:
        count = len(completions)
        columns = {name: [values[place]] * count for name, values in self.columns.items() if name not in _UNSEEN}
        found = [*self.reward(prompts=[self.prompts[place]] * count, completions=completions, **columns)]
        if len(found) != count:
            raise ValueError(f"it returned {len(found)} rewards for {count} completions")
        return found


def _number(reward: Any) -> float | None:
    """A reward as a number; None where it is none, or not finite."""
    try:
        number = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _add(report: RolloutReport, places: Sequence[int], record: dict[str, Any]) -> None:
    for place, count in zip(places, record["counts"]):
        report.counts[place] = count
    report.failures += [(place, rollout, text) for place, rollout, text in record["failures"]]
    report.tokens += record["tokens"]
    report.seconds += record["seconds"]


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _bar(total: int, done: int, show: bool):
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="Rollouts", unit="instance", disable=None if show else True)

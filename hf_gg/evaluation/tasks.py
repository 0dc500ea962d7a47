"""Tasks of lm-evaluation-harness, by its own API on a model in memory."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn


def evaluate_tasks(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    seed: int | None = None,
    progress: bool = True,
    manager: Any = None,
) -> dict[str, Any]:
    """Run tasks as `lm_eval --model hf` does.

    Args:
        model: a causal language model of Transformers; quantized ones need nothing special.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags.
        include_path: a folder of YAML files with tasks of your own; if it has all `tasks`, lm_eval's are not read.
        limit: questions of each task; None for all.
        num_fewshot: examples before each question; None for what the task says.
        batch_size: questions at a time.
        seed: of whatever lm_eval draws; None for its own, so that its command draws the same.
        progress: show lm_eval's progress bars.
        manager: of `task_manager`, where it is there already.

    Returns:
        `results`: task → metric → `value`, `stderr` (None where lm_eval gives none), `higher_is_better`; `samples`:
        task → questions asked; `versions`: task → version; `lm_eval`: its version.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: no such task (near names are given), no such folder.
        OSError: a task's data cannot be had.
    """
    if manager is None:
        manager = task_manager(tasks, include_path, limit)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with contextlib.redirect_stdout(sys.stderr):  # what is printed here is no result
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            if not progress:  # there is no setting for it
                setattr(harness, request, functools.partial(getattr(harness, request), disable_tqdm=True))
        try:
            found = simple_evaluate(
                model=harness,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
                **({} if seed is None else dict.fromkeys(seeds, seed)),
            )
        except OSError as error:
            raise _no_data(tasks, error) from error
    assert found is not None  # None in other processes than the first only
    return {
        "results": {task: _metrics(task, values, found) for task, values in found["results"].items()},
        "samples": {task: count["effective"] for task, count in (found.get("n-samples") or {}).items()},
        "versions": {task: version for task, version in found["versions"].items() if version is not None},
        "lm_eval": metadata.version("lm_eval"),
    }


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None, limit: int | None = None) -> Any:
    """lm_eval's `TaskManager` for tasks that are there, with data that can be had.

    Args:
        tasks, include_path, limit: as in `evaluate_tasks`.

    Raises:
        ImportError, ValueError, OSError: as there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question, got {limit}.")
    try:
        manager = _manager(list(tasks), include_path)
    except ImportError as error:
        raise ImportError("Tasks need lm-evaluation-harness: pip install 'hf-gg[eval]'.") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            manager.load(list(tasks))
    except OSError as error:
        raise _no_data(tasks, error) from error
    return manager


def _no_data(tasks: Sequence[str], error: OSError) -> OSError:
    return OSError(
        f"The data of {', '.join(tasks)} cannot be had ({_first_line(error)}): check the network and the paths in the "
        "task's file, or run it once with a network, which fills the cache."
    )


def _manager(tasks: list[str], include_path: str | Path | None):
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"{include_path} is no folder: --include-path takes a folder of YAML files with tasks.")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own  # without reading the thousands that lm_eval brings
    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3))
            raise ValueError(
                f"{task!r} is no task of lm_eval{'; near it: ' + near if near else ''}. `lm_eval ls tasks` "
                "lists all; your own need --include-path."
            )
    return manager


def _metrics(task: str, values: dict[str, Any], found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm_eval's `acc,none` and `acc_stderr,none` as one entry `acc`."""
    better = (found.get("higher_is_better") or {}).get(task) or {}
    result = {}
    for key, value in values.items():
        metric, _, pipeline = key.partition(",")
        if not pipeline or metric.endswith("_stderr") or isinstance(value, str):
            continue
        name = metric if pipeline == "none" else f"{metric} ({pipeline})"
        stderr = values.get(f"{metric}_stderr,{pipeline}")
        result[name] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "higher_is_better": better.get(metric),
        }
    return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

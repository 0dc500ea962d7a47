"""What the benchmarks share: timing in turns, a description of the machine, CSV files."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"


def in_turns(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each function, A B A B …, so that the machine's moods hit all of them alike."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of the rounds, a / b."""
    return statistics.median(x / y for x, y in zip(a, b))


def machine() -> dict[str, str]:
    """The processor and the versions that a figure belongs to."""
    import transformers

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_csv(name: str, rows: list[dict]) -> Path:
    """Write rows, each with the machine, to `benchmarks/results/<name>.csv`."""
    RESULTS.mkdir(exist_ok=True)
    path, about = RESULTS / f"{name}.csv", machine()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*keys, *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    return path

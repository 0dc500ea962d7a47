"""Timing in turns, a description of the machine, CSV files."""

from __future__ import annotations

import csv
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def in_turns(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    before: Callable[[str], object] | None = None,
    most_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each function, A B A B …, so that the machine's moods hit all of them alike.

    On a GPU a function must wait for its result (see `waiting`). `before` is called with the name ahead of every timed
    call. A function whose calls took `most_seconds` together, three at least, is left out of the rounds that follow.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > most_seconds:
                continue
            if before is not None:
                before(name)
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def evictor(device: torch.device) -> Callable[[], object]:
    """A function that reads so much memory that the caches hold nothing else."""
    buffer = torch.ones((256 if device.type == "cuda" else 128) << 18, device=device)
    return waiting(buffer.sum, device)


def waiting(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function, waiting for the device."""
    if device.type != "cuda":
        return function

    def run() -> object:
        result = function()
        torch.cuda.synchronize(device)
        return result

    return run


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of the rounds that both have, a / b."""
    return statistics.median(x / y for x, y in zip(a, b))


def copy_rate(device: torch.device, megabytes: int = 256, rounds: int = 7) -> float:
    """Bytes a second of a large copy, read and written ones counted: what memory gives, for shares of it."""
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    copy = waiting(lambda: target.copy_(source), device)
    return 2 * source.nbytes / min(in_turns({"copy": copy}, rounds)["copy"])


def peak_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, rounds: int = 7) -> float:
    """Operations a second of a square matrix product, two a multiplication with its addition."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(in_turns({"product": waiting(lambda: a @ b, device)}, rounds)["product"])


def machine(device: torch.device | None = None) -> dict[str, str]:
    """The processor and the versions that a figure belongs to."""
    import transformers

    about = {
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device is not None and device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or platform.machine())


def write_rows(path: Path, rows: list[dict], about: dict[str, str]) -> Path:
    """Write rows, each with the machine, as CSV; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*keys, *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    part.replace(path)
    return path

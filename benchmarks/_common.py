"""What the benchmarks share beyond `hf_gg.bench`: where their results go."""

from __future__ import annotations

from pathlib import Path

from hf_gg.bench.timing import in_turns, machine, median_ratio, write_rows


__all__ = ["RESULTS", "in_turns", "machine", "median_ratio", "write_csv"]

RESULTS = Path(__file__).parent / "results"


def write_csv(name: str, rows: list[dict]) -> Path:
    """Write rows, each with the machine, to `benchmarks/results/<name>.csv`."""
    return write_rows(RESULTS / f"{name}.csv", rows, machine())

"""Modules for the `evaluate` library. It copies such a file before it runs it, so each stands alone in its folder."""

from __future__ import annotations

from pathlib import Path


METRICS = ("bits_per_weight", "flip_rate", "kl_to_reference")


def metric_path(name: str) -> str:
    """The folder that `evaluate.load` opens: `evaluate.load(metric_path("flip_rate"))`.

    Raises:
        ValueError: no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric of hf_gg: the metrics are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)

"""The report as strict JSON. `docs/inspect.md` has the schema; a change that breaks readers raises `SCHEMA`."""

from __future__ import annotations

import json
from dataclasses import asdict

from ... import __version__
from ...inspection import BINS, KindSummary, Row
from . import Report


SCHEMA = 1


def render(report: Report) -> str:
    """The JSON text; no NaN, no infinity."""
    document = {
        "schema": SCHEMA,
        "hf_gg": __version__,
        "model": report.model,
        "format": report.format,
        "files": report.files,
        "weight_format": report.weight_format,
        "snr_db": report.snr,
        "outlier_at": report.outlier_at,
        "histogram": {"unit": "std", "first": float(BINS[0]), "last": float(BINS[-1]), "bins": len(BINS) - 1},
        "kinds": [_kind(kind) for kind in report.kinds],
        "tensors": [_tensor(row) for row in report.rows],
        "problems": [asdict(problem) for problem in report.problems],
    }
    return json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1)


def _kind(kind: KindSummary) -> dict:
    low, middle, high = kind.shape
    names = {"GGD": "ggd", "Gaussian": "gaussian", "Laplace": "laplace"}
    return {
        **asdict(kind),
        "shape": {"min": low, "median": middle, "max": high},
        "ks": {names[law]: value for law, value in kind.ks.items()},
        "nearest": {names[law]: count for law, count in kind.nearest.items()},
    }


def _tensor(row: Row) -> dict:
    return {
        "name": row.name,
        "dims": list(row.shape) if row.stored != "?" else None,
        "stored": row.stored,
        "file": row.file,
        "kind": row.where.kind,
        "layer": row.where.layer,
        "stack": row.where.stack,
        "fit": None
        if row.statistics is None
        else {**asdict(row.statistics), "nearest": row.statistics.nearest.lower()},
        "reason": row.reason,
    }

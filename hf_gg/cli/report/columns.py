"""The columns of the tables, the same on a terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...inspection import KindSummary, Row, Statistics
from . import Report
from .numbers import dims, per_million, printable, significant, size


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: short.
        help: one sentence.
        text: the cell as text.
        value: what it sorts by; None for text.
    """

    title: str
    help: str
    text: Callable
    value: Callable | None = None


def _number(title: str, help: str, pick: Callable, form: Callable) -> Column:
    return Column(title, help, lambda item: form(pick(item)), pick)


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def label_columns() -> list[Column]:
    """What a tensor is."""
    return [
        Column("tensor", "Its name in the checkpoint.", lambda row: printable(row.name)),
        Column("kind", "Kind of layer, by name and shape.", lambda row: row.where.kind),
        Column("dims", "Dimensions of the weights.", lambda row: "?" if row.stored == "?" else dims(row.shape)),
        Column("stored", "Type in the file, or the codes that were decoded.", lambda row: row.stored),
    ]


def tensor_columns(report: Report) -> list[Column]:
    """The figures of one tensor, taken from its `Statistics`."""

    def pick(function: Callable[[Statistics], float]) -> Callable[[Row], float]:
        return lambda row: math.nan if row.statistics is None else function(row.statistics)

    return [
        _number(
            "ν",
            "Shape of the fitted GGD by maximum likelihood: 2 is Gaussian, 1 Laplace.",
            pick(lambda s: s.shape),
            _fixed(3),
        ),
        _number("ν mom", "Shape by moments, from E[w²]/E[|w|]².", pick(lambda s: s.shape_moments), _fixed(3)),
        _number("α", "Scale of the fitted GGD by likelihood.", pick(lambda s: s.scale), significant),
        _number("std", "Standard deviation.", pick(lambda s: s.std), significant),
        _number("kurt", "Kurtosis: 3 for a Gaussian, 6 for a Laplace.", pick(lambda s: s.kurtosis), significant),
        *_distances(pick(lambda s: s.ks_ggd), pick(lambda s: s.ks_gaussian), pick(lambda s: s.ks_laplace)),
        *_bits(report, pick(lambda s: s.entropy), pick(lambda s: s.bits), pick(lambda s: s.bits_measured)),
        *_outliers(report, pick(lambda s: s.outliers), pick(lambda s: s.outliers_predicted)),
    ]


def kind_columns(report: Report) -> list[Column]:
    """The figures of one kind of layer."""
    return [
        Column("kind", "Kind of layer, by name and shape.", lambda kind: kind.kind),
        _number("tensors", "Tensors with a fit.", lambda kind: kind.tensors, str),
        _number("weights", "Their weights.", lambda kind: kind.weights, size),
        _number("ν min", "Smallest shape by likelihood.", lambda kind: kind.shape[0], _fixed(3)),
        _number("ν", "Median shape by likelihood.", lambda kind: kind.shape[1], _fixed(3)),
        _number("ν max", "Largest shape by likelihood.", lambda kind: kind.shape[2], _fixed(3)),
        _number("ν mom", "Median shape by moments.", lambda kind: kind.shape_moments, _fixed(3)),
        _number("α", "Median scale.", lambda kind: kind.scale, significant),
        _number("kurt", "Median kurtosis: 3 for a Gaussian, 6 for a Laplace.", lambda k: k.kurtosis, significant),
        *_distances(lambda k: k.ks["GGD"], lambda k: k.ks["Gaussian"], lambda k: k.ks["Laplace"]),
        Column("nearest", "In how many tensors GGD, Gaussian, Laplace has the smallest distance.", _nearest),
        *_bits(report, lambda k: k.entropy, lambda k: k.bits, lambda k: k.bits_measured),
        *_outliers(report, lambda k: k.outliers, lambda k: k.outliers_predicted),
    ]


def _nearest(kind: KindSummary) -> str:
    return "/".join(str(kind.nearest[law]) for law in ("GGD", "Gaussian", "Laplace"))


def _distances(ggd: Callable, gaussian: Callable, laplace: Callable) -> list[Column]:
    start = "Kolmogorov–Smirnov distance of the fitted"
    return [
        _number("KS GGD", f"{start} GGD (likelihood).", ggd, _fixed(4)),
        _number("KS Gauss", f"{start} Gaussian.", gaussian, _fixed(4)),
        _number("KS Lapl", f"{start} Laplace.", laplace, _fixed(4)),
    ]


def _bits(report: Report, entropy: Callable, bits: Callable, measured: Callable) -> list[Column]:
    at = f"{report.snr:g} dB"
    return [
        _number("h", "Differential entropy of the fitted GGD, bits; depends on the unit.", entropy, _fixed(2)),
        _number(
            f"bits {at}",
            f"Predicted bits a weight at {at}: uniform grid and entropy coder, h − log2 Δ.",
            bits,
            _fixed(3),
        ),
        _number("counted", "Order-0 entropy of the weights on that grid, counted, bits.", measured, _fixed(3)),
    ]


def _outliers(report: Report, found: Callable, predicted: Callable) -> list[Column]:
    at = f"{report.outlier_at:g}σ"
    return [
        _number(f">{at} ppm", f"Weights farther than {at} from the mean, parts per million.", found, per_million),
        _number("by law", "The same as the fitted GGD predicts it.", predicted, per_million),
    ]

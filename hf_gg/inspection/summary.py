"""Tensors of one kind of layer taken together."""

from __future__ import annotations

import re
import statistics as stdlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .describe import Statistics
from .kinds import Kind


@dataclass(frozen=True)
class Row:
    """One tensor of the report.

    Attributes:
        name: in the checkpoint.
        shape: of the weights.
        stored: the type in the file.
        file: that holds it.
        where: its kind of layer and its depth.
        statistics: None if there is no fit.
        reason: why not, None if there is one.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    file: str
    where: Kind
    statistics: Statistics | None = None
    reason: str | None = None

    @property
    def count(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return 0 if self.stored == "?" else count

    @property
    def order(self) -> tuple:
        """Sorts names as a reader counts: layer 2 before layer 10."""
        return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", self.name))


@dataclass(frozen=True)
class KindSummary:
    """The fitted tensors of one kind.

    Attributes:
        kind: of layer, or `"all"`.
        tensors: how many have a fit.
        weights: how many weights these hold.
        shape: ν by likelihood: smallest, median, largest of the tensors.
        shape_moments: median ν by moments.
        scale: median α.
        kurtosis: median.
        ks: mean Kolmogorov–Smirnov distance of GGD, Gaussian and Laplace, each tensor counted by its weights.
        nearest: in how many tensors each law is the nearest.
        entropy: differential entropy, bits, mean over the weights.
        bits: predicted bits a weight, mean over the weights.
        bits_measured: counted bits a weight, mean over the weights.
        outliers: share of all the weights.
        outliers_predicted: share that the tensors' fitted laws predict.
    """

    kind: str
    tensors: int
    weights: int
    shape: tuple[float, float, float]
    shape_moments: float
    scale: float
    kurtosis: float
    ks: dict[str, float]
    nearest: dict[str, int]
    entropy: float
    bits: float
    bits_measured: float
    outliers: float
    outliers_predicted: float


def summarize(rows: Sequence[Row]) -> list[KindSummary]:
    """A summary for each kind, and a last one of all; empty if nothing has a fit."""
    groups = by_kind(rows)
    if groups:
        groups["all"] = [row for group in groups.values() for row in group]
    return [_summary(kind, group) for kind, group in groups.items()]


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that have a fit by their kind of layer, in the order of a model: embeddings first, the head last."""
    kinds = sorted({row.where.kind for row in rows if row.statistics is not None}, key=_place)
    return {kind: [row for row in rows if row.where.kind == kind and row.statistics is not None] for kind in kinds}


_PLACES = "embedding position q k v kv qkv o router gate up gate+up down conv fc head".split()


def _place(kind: str) -> tuple[int, str]:
    plain = kind.removeprefix("expert ")
    return (_PLACES.index(plain) if plain in _PLACES else len(_PLACES), kind)


def _summary(kind: str, rows: Sequence[Row]) -> KindSummary:
    found = [(row.count, row.statistics) for row in rows if row.statistics is not None]
    weights = sum(count for count, _ in found)

    def mean(pick: Callable[[Statistics], float]) -> float:
        return sum(count * pick(statistics) for count, statistics in found) / weights

    def median(pick: Callable[[Statistics], float]) -> float:
        return stdlib.median(pick(statistics) for _, statistics in found)

    shapes = [statistics.shape for _, statistics in found]
    nearest = [statistics.nearest for _, statistics in found]
    return KindSummary(
        kind=kind,
        tensors=len(found),
        weights=weights,
        shape=(min(shapes), stdlib.median(shapes), max(shapes)),
        shape_moments=median(lambda s: s.shape_moments),
        scale=median(lambda s: s.scale),
        kurtosis=median(lambda s: s.kurtosis),
        ks={
            "GGD": mean(lambda s: s.ks_ggd),
            "Gaussian": mean(lambda s: s.ks_gaussian),
            "Laplace": mean(lambda s: s.ks_laplace),
        },
        nearest={law: nearest.count(law) for law in ("GGD", "Gaussian", "Laplace")},
        entropy=mean(lambda s: s.entropy),
        bits=mean(lambda s: s.bits),
        bits_measured=mean(lambda s: s.bits_measured),
        outliers=mean(lambda s: s.outliers),
        outliers_predicted=mean(lambda s: s.outliers_predicted),
    )

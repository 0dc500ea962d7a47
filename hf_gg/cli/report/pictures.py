"""What the pictures show, without drawing it: histograms with fitted densities, and ν against depth."""

from __future__ import annotations

import math
import statistics as stdlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...inspection import BINS, Row, Statistics, by_kind


# More kinds than this would not be told apart.
MOST_PANELS = 12
MOST_SERIES = 8
# Of the histogram's bins, 0.1 standard deviations wide: values in one, and how many are put together at most.
_FEWEST, _WIDEST = 8, 10
LAWS = ("GGD", "Gaussian", "Laplace")


@dataclass(frozen=True)
class Panel:
    """One tensor's histogram and the densities of its fits, over standard deviations from the mean.

    Attributes:
        kind: of layer that the tensor stands for.
        name: of the tensor.
        shape: ν.
        edges: of the bins, [n + 1].
        density: log10 of the density in each bin, NaN in an empty one, [n].
        x: where the curves are given.
        curves: log10 of the density by law, at `x`.
        reach: standard deviations to show on either side.
        low: lowest log10 to show.
        high: highest.
    """

    kind: str
    name: str
    shape: float
    edges: np.ndarray
    density: np.ndarray
    x: np.ndarray
    curves: dict[str, np.ndarray]
    reach: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """ν by depth of one kind of layer; the median where a layer has several such tensors (experts).

    Attributes:
        label: the kind, with its stack where there are several.
        layers: numbers of the layers, ascending.
        likelihood: ν by likelihood.
        moments: ν by moments.
    """

    label: str
    layers: list[int]
    likelihood: list[float]
    moments: list[float]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """One for each kind of layer with a fit, its tensor of the middle ν; the kinds with the most weights."""
    groups = by_kind(rows)
    largest = sorted(groups, key=lambda kind: -sum(row.count for row in groups[kind]))[:MOST_PANELS]
    return [_panel(kind, _middle(group)) for kind, group in groups.items() if kind in largest]


def series(rows: Sequence[Row]) -> list[Series]:
    """For each kind of layer that is in more than one numbered layer; those in the most layers."""
    found: dict[tuple[str, str], dict[int, list[Statistics]]] = {}
    for row in (row for group in by_kind(rows).values() for row in group):
        if row.statistics is not None and row.where.layer is not None and row.where.matrix:
            layers = found.setdefault((row.where.stack, row.where.kind), {})
            layers.setdefault(row.where.layer, []).append(row.statistics)
    several = len({stack for stack, _ in found}) > 1
    result = []
    for (stack, kind), layers in found.items():
        if len(layers) > 1:
            order = sorted(layers)
            likelihood = [stdlib.median(s.shape for s in layers[layer]) for layer in order]
            moments = [stdlib.median(s.shape_moments for s in layers[layer]) for layer in order]
            result.append(Series(f"{kind} ({stack})" if several else kind, order, likelihood, moments))
    kept = sorted(result, key=lambda line: -len(line.layers))[:MOST_SERIES]
    return [line for line in result if line in kept]


def _middle(group: list[Row]) -> Row:
    ordered = sorted(group, key=lambda row: row.statistics.shape if row.statistics is not None else 0.0)
    return ordered[len(ordered) // 2]


def _panel(kind: str, row: Row) -> Panel:
    statistics = row.statistics
    assert statistics is not None
    edges, counts = _merged(np.array(statistics.histogram))
    with np.errstate(divide="ignore"):
        density = np.log10(counts / (row.count * np.diff(edges)))
    density[counts == 0] = np.nan
    filled = np.flatnonzero(counts)
    furthest = max(abs(float(edges[filled[0]])), abs(float(edges[filled[-1] + 1]))) if len(filled) else 0.0
    reach = min(float(BINS[-1]), max(4.0, furthest) + 0.5)
    x = np.unique(np.concatenate([np.linspace(-reach, reach, 241), [0.0]]))
    curves = {law: _log_density(law, statistics, x) for law in LAWS}
    low = math.floor(float(np.nanmin(density))) if len(filled) else -6.0
    high = max(float(np.nanmax(density)) if len(filled) else 0.0, float(min(curves["GGD"].max(), 1.5))) + 0.3
    return Panel(kind, row.name, statistics.shape, edges, density, x, curves, reach, low - 0.3, high)


def _merged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins put together from the middle outwards until each has some values, so that tails are no comb of ones."""
    middle = len(counts) // 2
    sides = []
    for side in (counts[:middle][::-1], counts[middle:]):
        ends, start = [0], 0
        for end in range(1, len(side) + 1):
            if side[start:end].sum() >= _FEWEST or end - start == _WIDEST or end == len(side):
                ends.append(end)
                start = end
        sides.append(np.array(ends))
    cuts = np.concatenate([middle - sides[0][::-1], middle + sides[1][1:]])
    return BINS[cuts], np.add.reduceat(counts, cuts[:-1]).astype(np.float64)


def _log_density(law: str, statistics: Statistics, deviations: np.ndarray) -> np.ndarray:
    """log10 of a law's density of the weight in units of its standard deviation."""
    loc, scale, shape = {
        "GGD": (statistics.loc, statistics.scale, statistics.shape),
        "Gaussian": (statistics.mean, statistics.std * math.sqrt(2), 2.0),
        "Laplace": (statistics.median, statistics.deviation, 1.0),
    }[law]
    x = statistics.mean + statistics.std * deviations
    constant = math.log(shape / (2 * scale)) - math.lgamma(1 / shape) + math.log(statistics.std)
    return (constant - (np.abs(x - loc) / scale) ** shape) / math.log(10)

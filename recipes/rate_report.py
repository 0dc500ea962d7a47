"""The table and the plot of a rate–accuracy study, from the rows of its CSV file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rate_study import StudyArguments


PLAIN_COLORS = {"plain": "#444444", "prune": "#999999"}


@dataclass(frozen=True)
class Point:
    """The seeds of one method, strength and grid: means, and the lowest and highest metric."""

    method: str
    value: float
    grid: float
    bits: float
    metric: float
    low: float
    high: float
    zeros: float


def points(rows: list[dict[str, str]], share: str = "0") -> list[Point]:
    """Rows at one pruned share, the seeds together."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["pruned"] == share:
            groups.setdefault((row["method"], row["value"], row["grid"]), []).append(row)
    found = []
    for (method, value, grid), group in groups.items():
        metrics = [float(row["metric"]) for row in group]
        bits, zeros = ([float(row[name]) for row in group] for name in ("bits", "zeros"))
        mean = [sum(x) / len(x) for x in (bits, metrics, zeros)]
        found.append(Point(method, float(value), float(grid), mean[0], mean[1], min(metrics), max(metrics), mean[2]))
    return found


def frontier(found: list[Point], better: str) -> list[Point]:
    """Points that no other one beats in both bits and metric, by bits."""
    sign, best, result = 1 if better == "higher" else -1, float("-inf"), []
    for point in sorted(found, key=lambda p: (p.bits, -sign * p.metric)):
        if sign * point.metric > best:
            best = sign * point.metric
            result.append(point)
    return result


def limit_of(rows: list[dict[str, str]], study: StudyArguments, better: str) -> tuple[float, float]:
    """The plain model's metric, and the worst one that the tolerance allows."""
    plain = next(p.metric for p in points(rows) if p.method == "plain" and p.grid == 0)
    return plain, plain - study.tolerance if better == "higher" else plain * (1 + study.tolerance)


def table(rows: list[dict[str, str]], study: StudyArguments, better: str) -> str:
    """Fewest bits of each method within the tolerance, and what pruning does to each model."""
    colors = PLAIN_COLORS | study.colors
    plain, limit = limit_of(rows, study, better)
    found, sign = points(rows), 1 if better == "higher" else -1
    lines = [f"plain training: {plain:.4f}; allowed: {limit:.4f}", ""]
    lines += ["| method | strength | grid | bits | metric | seeds | zeros |", "|---|---|---|---|---|---|---|"]
    for method in colors:
        good = [p for p in found if p.method == method and p.grid and sign * (p.metric - limit) >= 0]
        if good:
            p = min(good, key=lambda p: p.bits)
            span = f"{p.low:.4f}–{p.high:.4f}"
            cells = (method, f"{p.value:g}", f"{p.grid:g}", f"{p.bits:.2f}", f"{p.metric:.4f}", span, f"{p.zeros:.0%}")
            lines.append(f"| {' | '.join(cells)} |")
        elif any(p.method == method for p in found):
            lines.append(f"| {method} | – | – | – | – | – | – |")
    head = "".join(f" −{share:.0%} |" for share in study.prunes)
    lines += ["", f"| method | strength | zeros | as trained |{head}"]
    lines.append("|---|---|---|---|" + "---|" * len(study.prunes))
    for p in sorted(found, key=lambda p: (list(colors).index(p.method), p.value)):
        if p.grid == 0 and p.method != "prune":
            cells = []
            for share in study.prunes:
                same = (q for q in points(rows, f"{share:g}") if (q.method, q.value) == (p.method, p.value))
                cells.append(next((f" {q.metric:.4f} |" for q in same), " – |"))
            lines.append(f"| {p.method} | {p.value:g} | {p.zeros:.0%} | {p.metric:.4f} |" + "".join(cells))
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], study: StudyArguments, better: str) -> None:
    """Metric against bits, and against the share that is pruned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = PLAIN_COLORS | study.colors
    plain, limit = limit_of(rows, study, better)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110)
    found = points(rows)
    for method, color in colors.items():
        mine = [p for p in found if p.method == method and p.grid]
        if not mine:
            continue
        left.plot([p.bits for p in mine], [p.metric for p in mine], ".", color=color, alpha=0.25, ms=4)
        best = frontier(mine, better)
        errors = [[p.metric - p.low for p in best], [p.high - p.metric for p in best]]
        xs, ys = [p.bits for p in best], [p.metric for p in best]
        left.errorbar(xs, ys, errors, color=color, marker="o", ms=4, lw=1.4, capsize=2, label=method)
    left.axhline(plain, color="#444444", lw=0.8, ls=":")
    left.axhline(limit, color="#444444", lw=0.8, ls="--")
    span, metrics = abs(plain - limit), [p.metric for p in found]
    if better == "higher":
        left.set_ylim(plain - 12 * span, max(metrics) + span)
    else:
        left.set_ylim(min(metrics) - span, plain + 10 * span)
    left.set_xlim(0, 1.05 * max(p.bits for p in found if p.grid))
    left.set_xlabel("bits a weight, code book counted")
    left.set_ylabel("metric on held-out data")
    left.legend(fontsize=8)
    left.set_title("each method's best points; bars: all seeds", fontsize=9)
    for p in sorted((p for p in found if p.grid == 0 and p.method in ("plain", study.main)), key=lambda p: p.value):
        curve = [(0.0, p)]
        for share in study.prunes:
            curve += [(share, q) for q in points(rows, f"{share:g}") if (q.method, q.value) == (p.method, p.value)]
        style = {"color": "#444444"} if p.method == "plain" else {}
        label = p.method if p.method == "plain" else f"{p.method} {p.value:g}"
        right.plot([x for x, _ in curve], [q.metric for _, q in curve], marker="o", ms=4, label=label, **style)
    if better == "lower":
        right.set_yscale("log")
    right.set_xlabel("share of the weights pruned, smallest first")
    right.legend(fontsize=8)
    right.set_title("pruning without training on", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3, lw=0.5)
    figure.tight_layout()
    Path(study.image).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(study.image)
    plt.close(figure)

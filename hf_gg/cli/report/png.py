"""The report as one picture, by matplotlib."""

from __future__ import annotations

import io
import math

import numpy as np

from . import Report
from .pictures import LAWS, Panel, Series, panels, series


try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise ImportError("--plot needs matplotlib: `pip install matplotlib`.") from error


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fb5", "#5f5f5f")
MARKERS = "osD^vPX*"
_LAW_STYLES = {"GGD": ("#d62728", "-"), "Gaussian": ("#1f77b4", "--"), "Laplace": ("#2ca02c", ":")}
_COLUMNS = (4, 3, 5)  # the first that leaves the fewest places empty


def render(report: Report) -> bytes:
    """A PNG: a histogram with the fitted densities for each kind of layer, and below ν against depth.

    Raises:
        ValueError: nothing has a fit.
    """
    found, lines = panels(report.rows), series(report.rows)
    if not found:
        raise ValueError(f"{report.model} has no tensor with a fit: there is nothing to plot.")
    columns = min(_COLUMNS, key=lambda n: -len(found) % n) if len(found) > 3 else len(found)
    rows = math.ceil(len(found) / columns)
    depth = 4.2 if lines else 0.0
    height = 2.6 * rows + depth + 0.9
    figure = Figure(figsize=(max(9.0, min(13.0, 3.5 * columns)), height), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_short(f"Weights of {report.title}", 48), x=0.01, ha="left", fontsize=12, fontweight="bold")
    grid = figure.add_gridspec(rows + bool(lines), columns, height_ratios=[2.6] * rows + ([depth] if lines else []))
    for number, panel in enumerate(found):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        _histogram(axes, panel, number // columns == rows - 1 or number + columns >= len(found))
        if number % columns == 0:
            axes.set_ylabel("density, log scale", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    if lines:
        axes = figure.add_subplot(grid[rows, :])
        _depth(axes, lines)
        marks = axes.get_legend_handles_labels()
        figure.legend(*marks, loc="outside lower center", ncols=len(marks[0]), fontsize=9, frameon=False)
    canvas.draw()
    out = io.BytesIO()
    # 128 colors: a third of the bytes, and nothing that an eye would see
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return out.getvalue()


def _histogram(axes, panel: Panel, bottom: bool) -> None:
    axes.stairs(10**panel.density, panel.edges, baseline=10**panel.low, fill=True, color="#c4c9d1", label="weights")
    for law in LAWS:
        color, style = _LAW_STYLES[law]
        axes.plot(panel.x, 10 ** panel.curves[law], style, color=color, linewidth=1.4, label=f"{law} fit")
    axes.set_yscale("log")
    axes.set_ylim(10**panel.low, 10**panel.high)
    axes.set_xlim(-panel.reach, panel.reach)
    axes.set_title(f"{panel.kind}: ν = {panel.shape:.2f}\n{_short(panel.name, 40)}", fontsize=8.5)
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25)
    if bottom:
        axes.set_xlabel("standard deviations from the mean", fontsize=8)


def _depth(axes, lines: list[Series]) -> None:
    for line, color, marker in zip(lines, COLORS, MARKERS):
        axes.plot(line.layers, line.likelihood, "-", color=color, marker=marker, markersize=4.5, label=line.label)
        axes.plot(line.layers, line.moments, ":", color=color, linewidth=1.1)
    axes.plot([], [], "-", color="#555555", label="by likelihood")
    axes.plot([], [], ":", color="#555555", label="by moments")
    for value, name in ((2.0, "Gaussian"), (1.0, "Laplace")):
        low, high = axes.get_ylim()
        if low - 0.1 <= value <= high + 0.1:
            axes.axhline(value, color="#888888", linewidth=0.8)
            axes.annotate(
                name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-4, 2), textcoords="offset points",
                ha="right", fontsize=7.5, color="#666666",
            )  # fmt: skip
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("shape ν", fontsize=9)
    axes.set_title("Shape against depth, by kind of layer", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _short(name: str, most: int) -> str:
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"

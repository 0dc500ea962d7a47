"""The pictures of the page as inline SVG: no library, colors of the page's style sheet, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

import numpy as np

from .pictures import LAWS, Panel, Series


_WIDTH, _HEIGHT = 300, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 34


def histogram(panel: Panel) -> str:
    """A histogram on a log scale with the three fitted densities."""
    plot = _Plot(_WIDTH, _HEIGHT, (-panel.reach, panel.reach), (panel.low, panel.high))
    for power in range(math.ceil(panel.low), math.floor(panel.high) + 1):
        if (power - math.ceil(panel.low)) % _every(panel.high - panel.low) == 0:
            plot.horizontal(power, f'10<tspan dy="-4" font-size="8">{_minus(power)}</tspan>')
    step = 1 if panel.reach < 4 else 2 if panel.reach < 8 else 5
    top = int(panel.reach // step) * step
    for value in range(-top, top + 1, step):
        plot.vertical(value, _minus(value))
    plot.area(panel.edges, panel.density)
    for law in LAWS:
        plot.line(zip(panel.x, panel.curves[law]), f"law-{law.lower()}")
    plot.label("standard deviations from the mean")
    return plot.svg(
        f"Histogram of {panel.name}, density on a log scale, with the fitted GGD (ν = {panel.shape:.2f}), "
        "Gaussian and Laplace densities"
    )


def depth(lines: list[Series]) -> str:
    """ν by layer, one line a kind: solid by likelihood, dotted by moments."""
    values = [value for line in lines for value in (*line.likelihood, *line.moments)]
    layers = [layer for line in lines for layer in line.layers]
    margin = max(0.05, 0.06 * (max(values) - min(values)))
    low, high = min(values) - margin, max(values) + margin
    plot = _Plot(920, 340, (min(layers) - 0.3, max(layers) + 0.3), (low, high))
    step = _nice((high - low) / 6)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        plot.horizontal(number * step, f"{number * step:.{max(1, -math.floor(math.log10(step)))}f}")
    every = max(1, math.ceil((max(layers) - min(layers) + 1) / 20))
    for layer in range(min(layers), max(layers) + 1, every):
        plot.vertical(layer, str(layer))
    for number, line in enumerate(lines):
        plot.line(zip(line.layers, line.moments), f"series s{number} moments")
        plot.line(zip(line.layers, line.likelihood), f"series s{number}")
        for layer, value, other in zip(line.layers, line.likelihood, line.moments):
            title = f"{line.label}, layer {layer}: ν {value:.3f} by likelihood, {other:.3f} by moments"
            plot.dot(layer, value, f"s{number}", title)
    plot.label("layer")
    return plot.svg(
        "Shape ν against the number of the layer, one line for each kind of layer; the table of tensors has "
        "the numbers"
    )


def legend(lines: list[Series]) -> str:
    """HTML: the kinds with their colors."""
    items = [
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="series s{number}" '
        f'd="M1 5H25"/><circle class="s{number}" cx="13" cy="5" r="3.5"/></svg>{escape(line.label)}</li>'
        for number, line in enumerate(lines)
    ]
    for style, name in (("", "by likelihood"), (" moments", "by moments")):
        items.append(
            f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="series plain{style}" '
            f'd="M1 5H25"/></svg>{name}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def law_legend() -> str:
    """HTML: the laws with their lines."""
    items = [
        '<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><rect class="area" width="26" height="10"/></svg>'
        "weights</li>"
    ]
    items += [
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="law-{law.lower()}" d="M1 5H25"/>'
        f"</svg>{law} fit</li>"
        for law in LAWS
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Plot:
    """Axes from data to pixels, and what is drawn on them."""

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]):
        self._size, self._x, self._y = (width, height), x, y
        self._back: list[str] = []
        self._front: list[str] = []

    def _px(self, x: float) -> float:
        low, high = self._x
        return round(_LEFT + (x - low) / (high - low) * (self._size[0] - _LEFT - _RIGHT), 1)

    def _py(self, y: float) -> float:
        low, high = self._y
        return round(self._size[1] - _BOTTOM - (y - low) / (high - low) * (self._size[1] - _TOP - _BOTTOM), 1)

    def horizontal(self, y: float, label: str) -> None:
        """A grid line with a label of SVG text."""
        at = self._py(y)
        self._back.append(f'<path class="grid" d="M{_LEFT} {at}H{self._size[0] - _RIGHT}"/>')
        self._back.append(f'<text x="{_LEFT - 5}" y="{at + 3.5}" text-anchor="end">{label}</text>')

    def vertical(self, x: float, label: str) -> None:
        at, bottom = self._px(x), self._size[1] - _BOTTOM
        self._back.append(f'<path class="grid" d="M{at} {_TOP}V{bottom}"/>')
        self._back.append(f'<text x="{at}" y="{bottom + 13}" text-anchor="middle">{label}</text>')

    def label(self, text: str) -> None:
        """Below the axis."""
        middle = (_LEFT + self._size[0] - _RIGHT) / 2
        self._back.append(f'<text x="{middle}" y="{self._size[1] - 5}" text-anchor="middle">{escape(text)}</text>')

    def area(self, edges: np.ndarray, heights: np.ndarray) -> None:
        """Filled steps; NaN is no bar."""
        floor, parts = self._py(self._y[0]), []
        for left, right, height in zip(edges, edges[1:], heights):
            left, right = max(left, self._x[0]), min(right, self._x[1])
            if right > left and math.isfinite(height):
                parts.append(
                    f"M{self._px(left)} {floor}V{self._py(min(height, self._y[1]))}H{self._px(right)}V{floor}"
                )
        self._front.append(f'<path class="area" d="{"".join(parts)}"/>')

    def line(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through points; what is outside the axes is left out."""
        path, down = [], False
        for x, y in points:
            inside = self._y[0] <= y <= self._y[1]
            if inside:
                path.append(f"{'L' if down else 'M'}{self._px(x)} {self._py(y)}")
            down = inside
        self._front.append(f'<path class="{style}" d="{"".join(path)}"/>')

    def dot(self, x: float, y: float, style: str, title: str) -> None:
        """A point that tells its numbers."""
        at = f'cx="{self._px(x)}" cy="{self._py(y)}"'
        self._front.append(f'<circle class="{style}" {at} r="3.5"><title>{escape(title)}</title></circle>')

    def svg(self, description: str) -> str:
        width, height = self._size
        frame = (
            f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{width - _LEFT - _RIGHT}" '
            f'height="{height - _TOP - _BOTTOM}"/>'
        )
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description, quote=True)}">'
            f"{''.join(self._back)}{''.join(self._front)}{frame}</svg>"
        )


def _minus(value: int) -> str:
    return f"−{-value}" if value < 0 else str(value)


def _every(span: float) -> int:
    return max(1, round(span / 6))


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)

"""The report as text: a line a tensor, a line a kind of layer, a summary."""

from __future__ import annotations

from collections.abc import Sequence

from . import Report
from .columns import Column, kind_columns, label_columns, tensor_columns
from .numbers import printable, size


_SHORTEST_NAME = 24


def render(report: Report, width: int | None = None) -> str:
    """The whole report.

    Args:
        report: what was found.
        width: of the terminal; long names are shortened in the middle to fit it. None: nothing is shortened.
    """
    parts = [_tensors(report, width)]
    if report.kinds:
        cells = [[column.text(kind) for column in kind_columns(report)] for kind in report.kinds]
        parts.append(_grid(kind_columns(report), cells))
    parts.append(summary(report))
    return "\n\n".join(parts)


def summary(report: Report) -> str:
    """What the report says in some lines."""
    fitted = [row for row in report.rows if row.statistics is not None]
    files = f"{len(report.files)} files" if len(report.files) > 1 else report.files[0]
    total = sum(row.count for row in report.rows)
    codes = f", codes decoded from {report.weight_format}" if report.weight_format else ""
    lines = [
        f"{report.model}: {report.format}, {files}{codes}.",
        f"{len(report.rows)} tensors, {size(total)} numbers; {len(fitted)} tensors fitted.",
    ]
    if report.kinds:
        everything = report.kinds[-1]
        nearest = everything.nearest
        low, middle, high = everything.shape
        lines += [
            f"Shape ν by likelihood {low:.3f} … {high:.3f}, median {middle:.3f}; by moments, median "
            f"{everything.shape_moments:.3f}.",
            f"Nearest law by Kolmogorov–Smirnov: GGD {nearest['GGD']}, Gaussian {nearest['Gaussian']}, Laplace "
            f"{nearest['Laplace']} of {everything.tensors} tensors.",
            f"At {report.snr:g} dB on a uniform grid: {everything.bits:.3f} bits a weight predicted, "
            f"{everything.bits_measured:.3f} counted.",
        ]
    notes = [f"{printable(row.name)}: {note}" for row in fitted if row.statistics for note in row.statistics.notes]
    lines += [f"Note: {note}" for note in notes[:5]]
    if len(notes) > 5:
        lines.append(f"Note: and {len(notes) - 5} more such notes (see --json).")
    if report.problems:
        lines.append(f"DAMAGED: {len(report.problems)} problem{'s' * (len(report.problems) > 1)}, see the errors.")
    return "\n".join(lines)


def _tensors(report: Report, width: int | None) -> str:
    labels, figures = label_columns(), tensor_columns(report)
    cells, reasons = [], {}
    for number, row in enumerate(report.rows):
        left = [column.text(row) for column in labels]
        if row.statistics is None:
            reasons[number] = f"no fit: {printable(row.reason or '')}"
        elif row.statistics.notes:
            reasons[number] = f"! {'; '.join(row.statistics.notes)}"
        cells.append(left + ([column.text(row) for column in figures] if row.statistics is not None else []))
    return _grid([*labels, *figures], cells, reasons, width)


def _grid(
    columns: Sequence[Column],
    cells: list[list[str]],
    reasons: dict[int, str] | None = None,
    width: int | None = None,
) -> str:
    table = [[column.title for column in columns], *cells]
    widths = [max((len(line[i]) for line in table if i < len(line)), default=0) for i in range(len(columns))]
    if width is not None:
        widths[0] = max(min(widths[0], _SHORTEST_NAME), min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for number, line in enumerate(table):
        parts = [_shorten(line[0], widths[0]).ljust(widths[0])]
        for column, cell, cell_width in zip(columns[1:], line[1:], widths[1:]):
            parts.append(cell.ljust(cell_width) if column.value is None else cell.rjust(cell_width))
        reason = (reasons or {}).get(number - 1)
        lines.append("  ".join(parts + ([reason] if reason is not None else [])).rstrip())
    lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[len(text) - half :]}"

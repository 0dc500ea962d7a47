"""The report as one HTML file: nothing is fetched, and the script only sorts and filters the tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from ... import __version__
from . import Report, svg
from .columns import Column, kind_columns, label_columns, tensor_columns
from .numbers import size
from .pictures import panels, series
from .table import summary


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(report: Report) -> str:
    """The page."""
    title = f"Weights of {report.title}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_asset("page.css")}
</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{escape(report.format)} · {_files(report)} · hf-gg {__version__}</p>
</header>
<main>
{_summary(report)}
{_problems(report)}
{_kinds(report)}
{_pictures(report)}
{_tensors(report)}
{_columns(report)}
</main>
<script>
{_asset("page.js")}
</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _files(report: Report) -> str:
    return escape(report.files[0]) if len(report.files) == 1 else f"{len(report.files)} files"


def _summary(report: Report) -> str:
    total = sum(row.count for row in report.rows)
    fitted = sum(row.statistics is not None for row in report.rows)
    cards = [("numbers", size(total), f"in {len(report.rows)} tensors, {fitted} fitted")]
    if report.kinds:
        everything = report.kinds[-1]
        low, middle, high = everything.shape
        nearest = everything.nearest
        cards += [
            (
                "shape ν",
                f"{middle:.3f}",
                f"median by likelihood, {low:.2f} … {high:.2f}; {everything.shape_moments:.3f} by moments",
            ),
            (
                "nearest law",
                f"GGD {nearest['GGD']}/{everything.tensors}",
                f"tensors; Gaussian {nearest['Gaussian']}, Laplace {nearest['Laplace']}",
            ),
            (
                f"bits a weight at {report.snr:g} dB",
                f"{everything.bits:.2f}",
                f"predicted; {everything.bits_measured:.2f} counted on the same grid",
            ),
        ]
    boxes = "".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong> {escape(text)}</dd></div>'
        for name, value, text in cards
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(report).splitlines())
    return f"""<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<dl class="cards">{boxes}</dl>
<ul>{lines}</ul>
</section>"""


def _problems(report: Report) -> str:
    if not report.problems:
        return ""
    items = "".join(f"<li>{escape(problem.message)}</li>" for problem in report.problems)
    return (
        f'<section class="problems" aria-labelledby="damaged"><h2 id="damaged">Damaged</h2><ul>{items}</ul></section>'
    )


def _kinds(report: Report) -> str:
    if not report.kinds:
        return ""
    columns = kind_columns(report)
    rows = "".join(_cells(columns, kind, 'class="total"' if kind is report.kinds[-1] else "") for kind in report.kinds)
    return f"""<section aria-labelledby="kinds">
<h2 id="kinds">Kinds of layers</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="kinds">
<table id="kind-table">{_head(columns)}<tbody>{rows}</tbody></table>
</div>
</section>"""


def _pictures(report: Report) -> str:
    found, lines = panels(report.rows), series(report.rows)
    if not found:
        return ""
    figures = "".join(
        f"<figure><figcaption><strong>{escape(panel.kind)}</strong>, ν = {panel.shape:.2f}<br>"
        f"<code>{escape(panel.name)}</code></figcaption>{svg.histogram(panel)}</figure>"
        for panel in found
    )
    by_depth = ""
    if lines:
        by_depth = f"""<section aria-labelledby="depth">
<h2 id="depth">Shape against depth</h2>
{svg.legend(lines)}
<figure class="wide">{svg.depth(lines)}</figure>
</section>"""
    return f"""<section aria-labelledby="histograms">
<h2 id="histograms">Histograms</h2>
<p>For each kind of layer its tensor of the middle ν; density on a log scale.</p>
{svg.law_legend()}
<div class="grid">{figures}</div>
</section>
{by_depth}"""


def _tensors(report: Report) -> str:
    labels, figures = label_columns(), tensor_columns(report)
    columns, rows = [*labels, *figures], []
    for row in report.rows:
        if row.statistics is not None:
            notes = "; ".join(row.statistics.notes)
            mark = f'<div class="note">{escape(notes)}</div>' if notes else ""
            rows.append(_cells(columns, row, name=mark))
        else:
            reason = f'<td class="reason" colspan="{len(figures)}">no fit: {escape(row.reason or "")}</td>'
            rows.append(_cells(labels, row, 'class="unfitted"', reason))
    return f"""<section aria-labelledby="tensors">
<h2 id="tensors">Tensors</h2>
<p class="tools" hidden><label>Filter <input type="search" id="filter" placeholder="name or kind"></label>
<label><input type="checkbox" id="fitted"> only with a fit</label> <span id="shown" role="status"></span></p>
<div class="scroll tall" tabindex="0" role="region" aria-labelledby="tensors">
<table id="tensor-table">{_head(columns)}<tbody>{"".join(rows)}</tbody></table>
</div>
</section>"""


def _columns(report: Report) -> str:
    found = {
        # of a column that both tables have, what it is of a tensor
        column.title: column.help
        for column in [*label_columns(), *kind_columns(report), *tensor_columns(report)]
    }
    items = "".join(f"<dt>{escape(title)}</dt><dd>{escape(help)}</dd>" for title, help in found.items())
    return f"""<section aria-labelledby="columns">
<h2 id="columns">Columns</h2>
<dl class="columns">{items}</dl>
</section>"""


def _head(columns: Sequence[Column]) -> str:
    cells = "".join(
        f'<th scope="col"{"" if column.value is None else " class=number"} title="{escape(column.help, quote=True)}">'
        f"{escape(column.title)}</th>"
        for column in columns
    )
    return f"<thead><tr>{cells}</tr></thead>"


def _cells(columns: Sequence[Column], item: object, attributes: str = "", more: str = "", name: str = "") -> str:
    cells = []
    for number, column in enumerate(columns):
        text = escape(column.text(item))
        if number == 0:
            cells.append(f'<th scope="row">{text}{name}</th>')
        elif column.value is None:
            cells.append(f"<td>{text}</td>")
        else:
            cells.append(f'<td class="number" data-value="{column.value(item)!r}">{text}</td>')
    return f"<tr {attributes}>{''.join(cells)}{more}</tr>"

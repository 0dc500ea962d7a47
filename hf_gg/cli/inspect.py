"""Statistics of a checkpoint's weights: how they are distributed, and what coding them would cost.

MODEL is a folder, a file (safetensors, PyTorch, GGUF) or a name on the hub. Tensors are read one at a time. Matrices
are fitted; norms, biases and other vectors are listed (--all fits them too). Exit code 1 if a part of the checkpoint
is damaged; what can be read is shown all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..inspection import Row, classify, describe, summarize
from ..inspection.describe import NoFit
from ..integrations.reading import Problem, TensorSource, open_checkpoint
from .files import check_writable, write_whole
from .report import Report, document, table
from .report.numbers import printable


_NO_MATRIX = "no matrix (--all fits it)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a file, or a name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--file", help="the file to take where there are several, or a pattern such as '*Q4_K_M.gguf'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", metavar="OUT.png", type=_png, help="write a picture (needs matplotlib)")
    parser.add_argument("--html", metavar="OUT.html", type=_page, help="write a page, one file")
    parser.add_argument(
        "--snr", type=_decibel, default=30.0, help="error of the predicted bits, dB (default 30, at most 150)"
    )
    parser.add_argument(
        "--outliers", type=_positive, default=6.0, metavar="K", help="outliers are beyond K standard deviations (6)"
    )
    parser.add_argument("--all", action="store_true", help="fit norms, biases and other vectors too")


def run(args: argparse.Namespace) -> int:
    """Inspect, print, write. Returns 1 if a part of the checkpoint is damaged."""
    for path in (args.plot, args.html):
        if path is not None:
            check_writable(path)
    if args.plot is not None:
        from .report import png  # says what is missing before anything is read
    with open_checkpoint(args.model, args.revision, args.file) as source:
        report = inspect(source, args.model, args.snr, args.outliers, args.all)
    if args.plot is not None:
        write_whole(args.plot, png.render(report))
    if args.html is not None:
        from .report import page

        write_whole(args.html, page.render(report).encode())
    if args.json:
        print(document.render(report))
    else:
        print(table.render(report, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for problem in report.problems:
        print(f"hf-gg inspect: error: {printable(problem.message)}", file=sys.stderr)
    return 1 if report.problems else 0


def inspect(
    source: TensorSource, model: str, snr: float = 30.0, outlier_at: float = 6.0, everything: bool = False
) -> Report:
    """Describe every tensor of a checkpoint, with a progress bar where standard error is a terminal.

    Args:
        source: the checkpoint.
        model: what the user calls it.
        snr: signal to noise that bits are predicted for, dB.
        outlier_at: standard deviations beyond which a weight is an outlier.
        everything: fit what is no matrix, too.
    """
    rows: list[Row] = []
    problems = list(source.problems)
    bar = tqdm(total=source.nbytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)
    with bar, _one_thread():
        for entry in source:
            bar.set_postfix_str(entry.name, refresh=False)
            statistics, reason = None, entry.reason
            where = classify(entry.name, entry.shape)
            if reason is None and entry.shape and 0 in entry.shape:
                reason = "empty"
            if reason is None and not where.matrix and not everything:
                reason = _NO_MATRIX
            if reason is None:
                try:
                    statistics = describe(entry.load(), snr, outlier_at)
                except (NoFit, NotImplementedError) as error:
                    reason = str(error)
                except ValueError as error:
                    problems.append(Problem(entry.file, entry.name, str(error)))
                    reason = "damaged, see the errors"
            rows.append(Row(entry.name, entry.shape, entry.stored, entry.file, where, statistics, reason))
            bar.update(entry.nbytes)
    rows.sort(key=lambda row: row.order)
    decoded = {row.stored for row in rows if row.statistics is not None} & {source.weight_format}
    return Report(
        model=model,
        files=source.files,
        format=source.format,
        weight_format=next(iter(decoded), None),
        snr=snr,
        outlier_at=outlier_at,
        rows=rows,
        kinds=summarize(rows),
        problems=problems,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The work on a tensor is many short steps: more threads gain little, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _png(text: str) -> Path:
    return _ending(text, (".png",))


def _page(text: str) -> Path:
    return _ending(text, (".html", ".htm"))


def _ending(text: str, endings: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in endings:
        raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(endings)}, which is what is written")
    return path


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _decibel(text: str) -> float:
    value = _positive(text)
    if value > 150:  # levels to count without end
        raise argparse.ArgumentTypeError(f"{text} is more than 150 dB, which float32 does not hold")
    return value

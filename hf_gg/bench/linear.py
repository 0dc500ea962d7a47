"""One linear layer in the shapes of real models: every contender checked, then timed in turns."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .contenders import CONTENDERS, OURS, CannotRun, Layer, Made, WrongResult, check, make
from .timing import evictor, in_turns, median_ratio, waiting


# Name: (outputs, inputs).
SHAPES = {
    "4096x4096": (4096, 4096),
    "11008x4096": (11008, 4096),
    "llama3-8b.q": (4096, 4096),
    "llama3-8b.k": (1024, 4096),
    "llama3-8b.up": (14336, 4096),
    "llama3-8b.down": (4096, 14336),
    "smollm2.q": (576, 576),
    "smollm2.k": (192, 576),
    "smollm2.up": (1536, 576),
    "smollm2.down": (576, 1536),
}
ROWS = (1, 4, 16, 128, 512, 4096)
BASE = next(iter(CONTENDERS))


def measure(
    shapes: list[str],
    rows: list[int],
    names: list[str],
    device: torch.device,
    rounds: int,
    most_seconds: float,
    rate: float,
    say: Callable[[str], None] = print,
) -> Iterator[dict]:
    """Rows of the table.

    Ahead of every timed call the caches are emptied and another layer of the contender's kind is run: what is timed
    finds its weight in memory and its code, its x and the threads ready, as in a model whose layers take turns.

    Args:
        shapes: keys of `SHAPES`.
        rows: of x.
        names: of contenders; bfloat16 is always among them.
        device: where.
        rounds: turns, at most.
        most_seconds: for all turns of one contender, shape and number of rows; a contender that takes longer has fewer
            turns, at least three, and one whose one call takes longer is only listed.
        rate: bytes a second of a large copy.
        say: told of every row.

    Yields:
        `shape`, `out`, `in`, `rows`, `contender`, and either `ms` (median), `ratio_to_bfloat16` (median of the turns'
        ratios), `gb_s` (bytes that must move, by the time), `roofline_share` (of a large copy), `gflop_s`, `error`
        (relative, of the check), `turns`; or `reason`, why it was not timed.
    """
    for shape in shapes:
        out_features, in_features = SHAPES[shape]
        linear, other = (_layer(out_features, in_features, device) for _ in range(2))
        ready: dict[str, Made] = {}
        others: dict[str, Layer] = {}
        reasons: dict[str, str] = {}
        for name in dict.fromkeys([BASE, *names]):
            try:
                ready[name], others[name] = make(name, linear), make(name, other).layer
            except CannotRun as error:
                reasons[name] = str(error)
        for count in rows:
            about = {"shape": shape, "out": out_features, "in": in_features, "rows": count}
            x = torch.randn(count, in_features, device=device).bfloat16()
            for row in _one(about, x, linear, ready, others, reasons, device, rounds, most_seconds, rate):
                say(describe(row))
                yield row


def _layer(out_features: int, in_features: int, device: torch.device) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    return layer


def _one(about, x, linear, ready, others, reasons, device, rounds, most_seconds, rate) -> Iterator[dict]:
    functions, errors, reasons = {}, {}, dict(reasons)
    evict = evictor(device)

    def before(name: str) -> None:
        evict()
        waiting(functools.partial(others[name], x), device)()

    for name, made in ready.items():
        try:
            errors[name] = check(name, made, linear, x)
        except CannotRun as error:
            reasons[name] = str(error)
            continue
        except WrongResult as error:
            if name in (BASE, *OURS):
                raise
            reasons[name] = str(error)
            continue
        function = waiting(functools.partial(made.layer, x), device)
        start = time.perf_counter()
        with torch.no_grad():
            function()
        took = time.perf_counter() - start
        if took > most_seconds:
            reasons[name] = f"one call takes {took:.1f} s, over the {most_seconds} s given to all of its turns"
            continue
        functions[name] = function
    with torch.no_grad():
        seconds = in_turns(functions, rounds, 0, before, most_seconds)
    for name in [*ready, *(n for n in reasons if n not in ready)]:
        if name not in seconds:
            yield {**about, "contender": name, "reason": reasons[name]}
            continue
        middle = statistics.median(seconds[name])
        moved = ready[name].bytes + x.nbytes + 2 * x.shape[0] * about["out"]
        base = seconds.get(BASE)
        yield {
            **about,
            "contender": name,
            "ms": _digits(middle * 1e3),
            "ratio_to_bfloat16": "" if base is None else _digits(median_ratio(seconds[name], base)),
            "gb_s": _digits(moved / middle / 1e9),
            "roofline_share": _digits(moved / middle / rate),
            "gflop_s": _digits(2e-9 * x.numel() * about["out"] / middle),
            "error": round(errors[name], 5),
            "turns": len(seconds[name]),
        }


def _digits(number: float) -> float:
    return float(f"{number:.4g}")  # never 0, which a plot could not draw


def describe(row: dict) -> str:
    """A row for people."""
    start = f"{row['shape']:>14} {row['rows']:5d} rows  {row['contender']:<18}"
    if "reason" in row:
        return f"{start} not timed: {row['reason']}"
    return (
        f"{start} {row['ms']:10.3f} ms  {row['ratio_to_bfloat16']:>7} × bfloat16  {row['gb_s']:8.2f} GB/s "
        f"({100 * row['roofline_share']:.0f} % of a copy)"
    )

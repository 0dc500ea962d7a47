"""What calibrated rounding gains: KL divergence, flipped tokens and perplexity of each format, plain and calibrated,
beside 8-bit and 4-bit peers.

Model, texts and figures as in rate_quality.py, whose functions measure here; more windows. No judged text is
calibrated on: `kin` is of the judged kinds (speeches before 1945, descriptions of other packages) and news, `news` is
news alone, a kind that is not judged.

Each method and text is one row of results/calibration.csv, written when it is measured; a later run goes on from
there. `--table` only prints the file.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from _common import RESULTS
from rate_quality import (
    PACKAGES,
    PEERS,
    TEXTS,
    Method,
    Table,
    Weights,
    entropy_bits,
    grid,
    measure,
    per_tensor,
    read,
    residual_float,
    self_sensitivity,
)
from torch import nn


KINDS = ("kin", "news")
SHOWN_PEERS = ("quanto qint8", "bitsandbytes int8", "quanto qfloat8", "bitsandbytes nf4", "HQQ 4")


def calibration_texts(kind: str) -> list[str]:
    """Texts to calibrate on; none is judged."""
    from hf_gg.data import bbc_news, sotu_texts

    news = [text for text, _ in bbc_news()]
    if kind == "news":
        return news
    old = sotu_texts(1790)[: -len(sotu_texts(1945))]
    others = []
    for distribution in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        if distribution.metadata["Name"].replace("-", "_") not in {name.replace("-", "_") for name in PACKAGES}:
            body = str(distribution.metadata.get_payload() or distribution.metadata.get("Description") or "")
            others.append(body[:12_000])
    # pieces of one size, so that each kind has its share
    pieces = []
    for texts in (news, old, others):
        joined = "\n\n".join(texts)
        step = len(joined) // 40
        pieces += [joined[start : start + 12_000] for start in range(0, len(joined) - 12_000, max(step, 12_000))][:40]
    return pieces


@functools.cache
def batches(model: nn.Module, kind: str, tokens: int, sequences: int) -> list[dict]:
    from transformers import AutoTokenizer

    from hf_gg import Calibration
    from hf_gg.data import smollm2_gguf
    from hf_gg.integrations.calibration import batches, windows

    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    found = windows(Calibration(calibration_texts(kind), tokens=tokens, sequences=sequences), tokenizer)
    return batches(model, found)


def calibrated(weight_format: str, kind: str, tokens: int, sequences: int, bits: float | None = None) -> Method:
    """A format with calibrated rounding. Codes of RF8 count 8 bits, those of a grid their entropy."""

    def run(model: nn.Module, weights: Weights) -> tuple[Weights, float]:
        from hf_gg import Calibration, GGConfig
        from hf_gg.formats import get_format
        from hf_gg.formats.allocation import allocate
        from hf_gg.integrations.calibrating import calibrate
        from hf_gg.integrations.selection import select
        from hf_gg.ops import put_outliers

        options = {} if bits is None else {"target_bits": bits}
        config = GGConfig(weight_format=weight_format, **options)
        chosen = select(model, config, from_checkpoint=False)
        scales = {}
        if bits is not None:
            scales = allocate(weights, target_bits=bits, sensitivity=self_sensitivity(model)).steps
        start = time.perf_counter()
        damping = Calibration([" x"]).damping
        found = calibrate(model, chosen, config, batches(model, kind, tokens, sequences), damping, scales)
        ratio = [error / plain for error, plain in found.errors.values()]
        print(f"calibration: {time.perf_counter() - start:.0f} s, error of outputs × {sum(ratio) / len(ratio):.3f}")
        changed, total = {}, 0.0
        for name, coded in found.coded.items():
            codes, scale, outliers = coded["weight"]
            changed[name] = get_format(weight_format).decode(codes) * scale
            total += 8 * codes.numel() if bits is None else entropy_bits(codes)
            total += 32 * scale.numel()
            if outliers is not None:
                put_outliers(changed[name], *outliers)
                total += 64 * outliers[0].numel()
        return changed, total / sum(weight.numel() for weight in weights.values())

    return run


def methods(tokens: int, sequences: int) -> Table:
    """The table's rows."""
    found: Table = {}
    for name in SHOWN_PEERS:
        found[name] = (name, lambda name=name: per_tensor(PEERS[name]()))
    for name in ("rf8", "rf8x"):
        found[f"{name}, plain"] = (name, lambda name=name: residual_float(name, False))
        for kind in KINDS:
            found[f"{name}, calibrated ({kind})"] = (
                name,
                lambda name=name, kind=kind: calibrated(name, kind, tokens, sequences),
            )
    for bits in (4, 5):
        found[f"grid {bits}, plain"] = ("grid", lambda bits=bits: grid(bits, "self"))
        for kind in KINDS:
            found[f"grid {bits}, calibrated ({kind})"] = (
                "grid",
                lambda bits=bits, kind=kind: calibrated("grid", kind, tokens, sequences, bits),
            )
    return found


def table(path: Path) -> str:
    """The file as a Markdown table."""
    by_method: dict[str, dict[str, dict[str, str]]] = {}
    for row in read(path):
        by_method.setdefault(row["method"], {})[row["text"]] = row
    head = " | ".join(f"KL, {text} (90%) | flips | perplexity" for text in TEXTS)
    lines = [f"| weights | bits | {head} |", "|---|--:|" + "--:|" * 3 * len(TEXTS)]
    for name, texts in by_method.items():
        cells = [name, f"{float(next(iter(texts.values()))['bits']):.2f}"]
        for text in TEXTS:
            row = texts[text]
            cells.append(f"{float(row['kl']):.4f} ({float(row['kl_low']):.4f}–{float(row['kl_high']):.4f})")
            cells += [f"{100 * float(row['flips']):.1f}%", f"{100 * float(row['perplexity_ratio']) - 100:+.2f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[], help="names of rows (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a window of the calibration")
    parser.add_argument("--sequences", type=int, default=16, help="windows of the calibration")
    parser.add_argument("--windows", type=int, default=8, help="windows of each judged text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a judged window")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.csv")
    parser.add_argument("--table", action="store_true", help="only print the file as a table")
    args = parser.parse_args()
    if not args.table:
        torch.manual_seed(0)
        measure(args.out, args.methods, args.windows, args.length, methods(args.tokens, args.sequences))
    print(table(args.out), file=sys.stdout)


if __name__ == "__main__":
    main()

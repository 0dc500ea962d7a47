"""Rate against quality: bits a weight beside KL divergence, flipped tokens and perplexity, for grids from 2 to 8 bits,
RF8, and other packages' formats.

SmolLM2-135M in float32 (from its GGUF file); every linear layer but the head is replaced by what a format makes of it
and computes in float32. Two texts: State of the Union addresses, and the descriptions of Python packages, which are
harder for this model. All bits are counted: codes of grids and RF8 at the order-0 entropy of each tensor, scales,
steps, zero points, outliers; other packages as they store them (see `_peers.py`).

Each method and text is one row of results/rate_quality.csv, written when it is measured; a later run goes on from
there. `--plot` draws docs/images/rate_quality.png from the file.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from _common import RESULTS, machine
from _peers import PEERS
from torch import nn

from hf_gg.evaluation import interval, token_figures


TEXTS = ("packages", "speeches")
# Packages that this project depends on or compares with: installed wherever the benchmark runs.
PACKAGES = (
    "accelerate datasets lm_eval peft transformers torch trl torchao bitsandbytes optimum-quanto huggingface_hub "
    "safetensors numpy scipy ruff pytest hypothesis matplotlib tqdm"
).split()
GRID_BITS = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
PLOT = Path(__file__).parents[1] / "docs" / "images" / "rate_quality.png"
# Labels in the plot: text, offset in points, side. Methods that lie on one another share one.
LABELS = {
    "HQQ 3": ("HQQ 3", 8, 0, "left"),
    "HQQ 4": ("HQQ 4", 8, -3, "left"),
    "HQQ 8": ("HQQ 8", 8, 0, "left"),
    "bitsandbytes nf4": ("nf4", 8, 3, "left"),
    "torchao int4": ("int4, qint4", 0, 12, "left"),
    "quanto qfloat8": ("qfloat8", 9, -2, "left"),
    "bitsandbytes int8": ("int8, qint8", 9, 0, "left"),
    "rf8, entropy-coded": ("rf8, coded", 0, 15, "center"),
    "rf8, 8-bit codes": ("rf8, 8 bits", 0, 15, "center"),
}
BLOCK = 64  # positions that are resampled together for the intervals
FIELDS = (
    "text method family bits kl kl_low kl_high flips flips_low flips_high perplexity_ratio snr_db windows positions "
    "seconds cpu threads torch transformers date"
).split()

Weights = dict[str, torch.Tensor]
# The model and its weights in; the weights to compute with and the mean of bits a weight out.
Method = Callable[[nn.Module, Weights], tuple[Weights, float]]
# Name to (family, maker).
Table = dict[str, tuple[str, Callable[[], Method]]]


def text_of(name: str) -> str:
    """One of the two texts."""
    if name == "packages":
        parts = [metadata.metadata(package) for package in PACKAGES]
        return "\n\n".join(str(part.get_payload() or part.get("Description") or "")[:12_000] for part in parts)
    from hf_gg.data import sotu_texts

    return "\n\n".join(sotu_texts(1945))


def windows_of(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` windows of `length` tokens, evenly spread. [count, length]."""
    step = (tokens.numel() - length) // max(count - 1, 1)
    return torch.stack([tokens[i * step : i * step + length] for i in range(count)])


class Judge:
    """Compares a model with what it was at first, on windows of text.

    Only the last hidden states of the float model are kept; its logits are computed again when they are needed, at
    every second position.
    """

    def __init__(self, model: nn.Module, windows: torch.Tensor):
        self.model, self.windows = model, windows
        self.references = [self._hidden(window) for window in windows]

    @torch.no_grad()
    def _hidden(self, window: torch.Tensor) -> torch.Tensor:
        return self.model.model(window[None]).last_hidden_state[0, :-1:2].clone()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """KL (nats), flips (share), their 90% intervals by bootstrap over blocks, ratio of perplexities."""
        kls, flips, gains = [], [], []
        head = self.model.get_output_embeddings()
        for window, reference in zip(self.windows, self.references):
            hidden, labels = self._hidden(window), window[1::2]
            for ours, theirs, label in zip(hidden.split(128), reference.split(128), labels.split(128)):
                found = token_figures(head(ours), label, head(theirs))
                kls.append(found.kl)
                flips.append(found.flipped)
                gains.append(found.loss - found.reference_loss)
        kl, flip, gain = torch.cat(kls), torch.cat(flips), torch.cat(gains)
        result = {"kl": kl.mean().item(), "flips": flip.mean().item(), "perplexity_ratio": gain.mean().exp().item()}
        for name, values in (("kl", kl), ("flips", flip)):
            blocks = torch.stack([block.sum() for block in values.split(BLOCK) if len(block) == BLOCK]).numpy()
            found = interval(blocks, np.full(len(blocks), BLOCK), confidence=0.9, draws=2000)
            result[f"{name}_low"], result[f"{name}_high"] = found.low, found.high
        return result | {"positions": kl.numel()}


def per_tensor(function: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Method:
    """A method from a function of one weight to (weight, bits of the whole tensor)."""

    def run(model: nn.Module, weights: Weights) -> tuple[Weights, float]:
        found = {name: function(weight) for name, weight in weights.items()}
        count = sum(weight.numel() for weight in weights.values())
        return {name: w for name, (w, _) in found.items()}, sum(bits for _, bits in found.values()) / count

    return run


def entropy_bits(codes: torch.Tensor) -> float:
    """Order-0 entropy of uint8 codes, bits for all of them."""
    counts = torch.bincount(codes.reshape(-1).int(), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum()) * codes.numel()


def residual_float(name: str, coded: bool) -> Method:
    """RF8 or a variant, its codes at their entropy, or at 8 bits as they are in memory."""
    from hf_gg.formats import get_format

    fmt = get_format(name)

    def run(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        codes, scale = fmt.quantize(weight)
        bits = entropy_bits(codes) if coded else 8.0 * codes.numel()
        return fmt.decode(codes) * scale, bits + 32 * scale.numel()

    return per_tensor(run)


@functools.cache
def self_sensitivity(model: nn.Module) -> Weights:
    """What an error in each row of the model costs, by the name of its layer."""
    from hf_gg.integrations.sensitivity import row_sensitivity

    start = time.perf_counter()
    parameters = {name: model.get_submodule(name).weight for name in linear_weights(model)}
    found = row_sensitivity(model, parameters)
    if found is None:
        raise RuntimeError("the model could not be run for its sensitivity")
    print(f"sensitivity: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def grid(bits: float, sensitivity: str) -> Method:
    """A grid whose steps are allocated over the whole model."""
    from hf_gg.formats.allocation import allocate
    from hf_gg.formats.grid import GRID

    def run(model: nn.Module, weights: Weights) -> tuple[Weights, float]:
        start = time.perf_counter()
        costs = self_sensitivity(model) if sensitivity == "self" else None
        found = allocate(weights, target_bits=bits, sensitivity=costs)
        print(f"allocation: {time.perf_counter() - start:.0f} s, expected error {found.error:.4g}", flush=True)
        changed = {}
        for name, weight in weights.items():
            codes, steps = GRID.quantize(weight, scale=found.steps[name])
            outliers = GRID.take_outliers_(codes, steps, weight)
            changed[name] = GRID.decode(codes) * steps
            if outliers is not None:
                changed[name].view(-1)[outliers[0].long()] = outliers[1]
        return changed, found.bits

    return run


def methods() -> Table:
    """Name to (family, maker)."""
    found: dict[str, tuple[str, Callable[[], Method]]] = {}
    for name, make in PEERS.items():
        found[name] = (name.rsplit(" ", 1)[0], lambda make=make: per_tensor(make()))
    for name in ("rf8", "rf8x"):
        found[f"{name}, entropy-coded"] = (name, lambda name=name: residual_float(name, True))
        found[f"{name}, 8-bit codes"] = (name, lambda name=name: residual_float(name, False))
    for sensitivity in ("self", "weights"):
        for bits in GRID_BITS:
            name = f"grid ({sensitivity}) {bits:g}"
            found[name] = (f"grid ({sensitivity})", lambda s=sensitivity, bits=bits: grid(bits, s))
    return found


def linear_weights(model: nn.Module) -> Weights:
    """The weights that formats convert: of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return {name: module.weight.detach() for name, module in layers}


def snr_db(weights: Weights, changed: Weights) -> float:
    """Signal to noise over all weights together."""
    signal = sum(weight.square().sum().item() for weight in weights.values())
    noise = sum((changed[name] - weight).square().sum().item() for name, weight in weights.items())
    return 10 * math.log10(signal / noise) if noise else math.inf


def read(path: Path) -> list[dict[str, str]]:
    """Rows that were measured already."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(path: Path, names: list[str], windows: int, length: int, table: Table | None = None) -> None:
    """Measures what the file lacks, and appends a row for each method (of `methods()` by default) and text."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from hf_gg.data import smollm2_gguf

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    done = {(row["text"], row["method"]) for row in read(path)}
    table = methods() if table is None else table
    wanted = [name for name in names or table if any((text, name) not in done for text in TEXTS)]
    if not wanted:
        return
    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = sys.maxsize
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    weights = linear_weights(model)
    judges = {}
    for text in TEXTS:
        tokens = tokenizer(text_of(text), return_tensors="pt", add_special_tokens=False).input_ids[0]
        judges[text] = Judge(model, windows_of(tokens, windows, length))
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS)
        if fresh:
            writer.writeheader()
        for name in wanted:
            start = time.perf_counter()
            family, make = table[name]
            try:
                changed, bits = make()(model, weights)
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
            about = {"method": name, "family": family, "bits": round(bits, 4), "snr_db": snr_db(weights, changed)}
            for module, weight in changed.items():
                model.get_submodule(module).weight.data = weight
            for text in TEXTS:
                if (text, name) in done:
                    continue
                row = about | judges[text].figures() | {"text": text, "windows": windows} | machine()
                row["seconds"] = round(time.perf_counter() - start, 1)
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
                print(f"{name:28} {text:9} {bits:6.3f} bits  KL {row['kl']:.5f}  {row['seconds']:.0f} s", flush=True)
            for module, weight in weights.items():
                model.get_submodule(module).weight.data = weight


STYLES = {  # colour, marker; the categories that belong together share a colour
    "grid (self)": ("#0b6e4f", "o"),
    "grid (weights)": ("#6cb98f", "o"),
    "rf8": ("#c0392b", "D"),
    "rf8x": ("#e67e22", "D"),
    "bitsandbytes": ("#2d5fa6", "s"),
    "torchao": ("#7d4ea3", "^"),
    "quanto": ("#555555", "v"),
    "HQQ": ("#1f9bbf", "P"),
}


def plot(source: Path, target: Path) -> None:
    """Draws the file: KL on both texts, flips and the loss of perplexity on the harder one, against bits a weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(source)
    panels = (
        ("packages", "kl", "KL divergence from float32, nats", "package descriptions"),
        ("speeches", "kl", "KL divergence from float32, nats", "State of the Union"),
        ("packages", "flips", "flipped top-1 tokens, %", "package descriptions"),
        ("speeches", "perplexity", "change of perplexity, %", "State of the Union"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), sharex=True)
    for axis, (text, what, label, title) in zip(axes.flat, panels):
        for family, (colour, marker) in STYLES.items():
            found = [r for r in rows if r["text"] == text and r["family"] == family]
            found.sort(key=lambda r: float(r["bits"]))
            bits = [float(r["bits"]) for r in found]
            if what == "perplexity":
                values = [max(100 * (float(r["perplexity_ratio"]) - 1), 0.03) for r in found]
                errors = None
            else:
                factor = 100 if what == "flips" else 1
                values = [factor * float(r[what]) for r in found]
                errors = [
                    [v - factor * float(r[f"{what}_low"]) for v, r in zip(values, found)],
                    [factor * float(r[f"{what}_high"]) - v for v, r in zip(values, found)],
                ]
            axis.errorbar(
                bits,
                values,
                yerr=errors,
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.6,
                linestyle="-" if family.startswith("grid") else "none",
                elinewidth=0.9,
                capsize=2,
                label=family,
            )
            for r, x, y in zip(found, bits, values):
                if what == "kl" and r["method"] in LABELS:
                    words, right, up, side = LABELS[r["method"]]
                    axis.annotate(
                        words,
                        (x, y),
                        textcoords="offset points",
                        xytext=(right, up),
                        ha=side,
                        va="center",
                        fontsize=8,
                        color=colour,
                    )
        axis.set_yscale("log")
        axis.set_title(f"{label} ({title})", fontsize=10.5, loc="left")
        axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(1.8, 9.5)
    for axis in axes[1]:
        axis.set_xlabel("bits a weight, everything counted")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=8, frameon=False, fontsize=9, columnspacing=1.2)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def table(source: Path) -> str:
    """The file as a Markdown table, both texts side by side."""
    rows = read(source)
    by_method: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["text"]] = row
    lines = [
        "| weights | bits | SNR, dB | KL, packages (90%) | flips | perplexity | KL, speeches | flips | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, texts in sorted(by_method.items(), key=lambda item: float(item[1][TEXTS[0]]["bits"])):
        hard, easy = (texts[text] for text in TEXTS)
        cells = [name, f"{float(hard['bits']):.2f}", f"{float(hard['snr_db']):.1f}"]
        for row in (hard, easy):
            kl = f"{float(row['kl']):.4f}"
            if row is hard:
                kl += f" ({float(row['kl_low']):.4f}–{float(row['kl_high']):.4f})"
            cells += [kl, f"{100 * float(row['flips']):.1f}%", f"{100 * float(row['perplexity_ratio']) - 100:+.2f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[], help="names of rows (default: all)")
    parser.add_argument("--windows", type=int, default=4, help="windows of each text")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--out", type=Path, default=RESULTS / "rate_quality.csv")
    parser.add_argument("--plot", action="store_true", help="only draw the plot, and print the table")
    args = parser.parse_args()
    if args.plot:
        plot(args.out, PLOT)
        print(table(args.out))
        return
    measure(args.out, args.methods, args.windows, args.length)


if __name__ == "__main__":
    main()

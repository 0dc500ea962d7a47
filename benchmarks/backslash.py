"""BackSlash: what its step adds to a training step of SmolLM2-135M, in time and in memory.

One training step is forward, backward and AdamW on one sequence, in float32; the penalty follows it or not, in turns.
Times of `penalty` are of `BackSlash.step` alone, in the same run.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from _common import median_ratio, write_csv

from hf_gg import BackSlash, data


def smollm2() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, GgufConfig

    path = data.smollm2_gguf()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


def peak_mib() -> float:
    """Largest memory of this process since `reset_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def reset_peak() -> bool:
    """Start `peak_mib` anew, where the kernel allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--every", type=int, nargs="*", default=[20], help="steps between two estimates of ν")
    arguments = parser.parse_args()

    model = smollm2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens = torch.randint(
        0, model.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(0)
    )

    def train() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    train()
    rows = []
    settings = {
        "decoupled": {"lambda_": 0.3},
        "reference": {"form": "reference", "lambda_": 1.0},
        "l1": {"lambda_": 0.3, "shape": 1.0},
    }
    for name, setting in settings.items():
        penalty = BackSlash(model, **setting)
        penalty.estimate()
        largest = max(part.numel for part in penalty.parts)
        penalty.step(1e-9)
        plain, followed, alone, estimates = [], [], [], []
        for _ in range(arguments.rounds):
            plain.append(train())
            penalty.attach(optimizer)
            penalty.steps = 1  # between two estimates, whose time is shared out below
            followed.append(train())
            penalty.detach()
            penalty.steps = 1
            start = time.perf_counter()
            penalty.step(1e-9)
            alone.append(time.perf_counter() - start)
            start = time.perf_counter()
            penalty.estimate()
            estimates.append(time.perf_counter() - start)
        before = peak_mib() if reset_peak() else float("nan")
        before = max(before, resident_mib())
        penalty.steps = 0
        penalty.step(1e-9)
        extra = peak_mib() - before
        for every in arguments.every:
            step = statistics.median(plain)
            cost = statistics.median(alone) + statistics.median(estimates) / every
            rows.append(
                {
                    "form": name,
                    "weights": sum(part.numel for part in penalty.parts),
                    "tokens": arguments.tokens,
                    "every": every,
                    "train_s": round(step, 4),
                    "train_with_penalty_s": round(statistics.median(followed), 4),
                    "ratio": round(median_ratio(followed, plain), 4),
                    "penalty_ms": round(1e3 * statistics.median(alone), 2),
                    "estimate_ms": round(1e3 * statistics.median(estimates), 2),
                    "share": round(cost / step, 4),
                    "extra_mib": round(extra, 2),
                    "largest_tensor_mib": round(largest * 4 / 2**20, 2),
                }
            )
            print(rows[-1])
    print(f"written: {write_csv('backslash', rows)}")


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()

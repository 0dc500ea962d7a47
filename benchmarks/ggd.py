"""Fits of the generalized Gaussian: their time against one sum of squares, and against scipy's fit.

Tensors: all matrices of all-MiniLM-L6-v2 and of SmolLM2-135M (dequantized), float32 and bfloat16, and a million draws
for scipy.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _common import in_turns, median_ratio, write_csv

from hf_gg import data
from hf_gg.ggd import GeneralizedGaussian, fit, fit_many


def minilm() -> list[torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(data.minilm() / "model.safetensors")
    return [t for t in tensors.values() if t.ndim == 2 and t.is_floating_point()]


def smollm2() -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM, GgufConfig

    path = data.smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return [p.detach() for p in model.parameters() if p.ndim == 2]


def against_sum(name: str, tensors: list[torch.Tensor], rounds: int) -> list[dict]:
    rows = []
    functions = {
        "square().sum()": lambda: [float(t.float().square().sum()) for t in tensors],
        "moments": lambda: fit_many(tensors),
        "moments, one by one": lambda: [fit(t) for t in tensors],
        "mle": lambda: fit_many(tensors, "mle"),
        "mle, loc=0": lambda: fit_many(tensors, "mle", loc=0.0),
    }
    seconds = in_turns(functions, rounds, warmup=1)
    for what, taken in seconds.items():
        ratio = median_ratio(taken, seconds["square().sum()"])
        rows.append(
            {
                "what": what,
                "tensors": name,
                "values": sum(t.numel() for t in tensors),
                "seconds": round(statistics.median(taken), 4),
                "ratio_to_sum": round(ratio, 2),
            }
        )
        print(f"{name:14} {what:20} {statistics.median(taken):8.3f} s  {ratio:7.2f} times the sum")
    return rows


def against_scipy(count: int) -> list[dict]:
    from scipy.stats import gennorm

    rows = []
    for shape in (0.8, 1.5, 2.0):
        torch.manual_seed(0)
        values = GeneralizedGaussian(0.001, 0.02, shape).sample((count,)).float()
        array = values.double().numpy()
        start = time.perf_counter()
        theirs = gennorm.fit(array)
        scipy_seconds = time.perf_counter() - start
        for method in ("moments", "mle"):
            taken = in_turns({method: lambda: fit(values, method)}, 5, warmup=1)[method]
            ours = fit(values, method)
            own = statistics.median(taken)
            gain = ours.distribution().log_prob(values.double()).sum() - gennorm.logpdf(array, *theirs).sum()
            rows.append(
                {
                    "what": f"{method} against scipy.stats.gennorm.fit",
                    "tensors": f"draws of shape {shape}",
                    "values": count,
                    "seconds": round(own, 4),
                    "scipy_seconds": round(scipy_seconds, 2),
                    "times_faster": round(scipy_seconds / own, 1),
                    "shape": round(float(ours.shape), 6),
                    "scipy_shape": round(float(theirs[0]), 6),
                    "log_likelihood_gain": round(float(gain), 4),
                }
            )
            print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1_000_000, help="draws for the comparison with scipy")
    arguments = parser.parse_args()
    rows = []
    for name, tensors in (("MiniLM", minilm()), ("SmolLM2", smollm2())):
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            rows += against_sum(f"{name} {kind}", [t.to(dtype) for t in tensors], arguments.rounds)
    rows += against_scipy(arguments.count)
    print(f"written: {write_csv('ggd', rows)}")


if __name__ == "__main__":
    main()

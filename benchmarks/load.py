"""What quantizing at load costs, of SmolLM2 and of a model with 0.5 B parameters; see `hf_gg.bench.loading`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _common import write_csv

from hf_gg.bench import loading, models


SIZES = {
    "llama-0.5b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 9,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
}


def make(model: str):
    """A model in bfloat16."""
    if model == "smollm2":
        return models.open_model(None, torch.device("cpu"))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES[model])).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-0.5b"], choices=["smollm2", *SIZES])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            loading.save(make(model), Path(folder))
            for row in loading.measure(Path(folder), args.rounds):
                rows.append({"model": model, **row})
                print(rows[-1], flush=True)
    print(f"written: {write_csv('load', rows)}")


if __name__ == "__main__":
    main()

"""Tokens a second of a tiny model, with its logits checked first, and its loads."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gg import ops
from hf_gg.bench import loading, models


CPU = torch.device("cpu")


@pytest.fixture
def tiny():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


def test_prefill_and_decoding_of_every_format(tiny):
    rows = list(models.measure(tiny, CPU, prompt=24, tokens=4, rounds=2, say=lambda text: None))
    assert [(row["what"], row["model"]) for row in rows] == [
        (what, name) for what in ("prefill", "decode") for name in ("bfloat16", *models.CONFIGS)
    ]
    assert all(row["tokens_s"] > 0 and row["speedup"] > 0 and 0 < row["error"] < 0.05 for row in rows)
    assert rows[0]["speedup"] == 1.0


def test_a_wrong_model_is_not_timed(tiny, monkeypatch):
    real = ops.linear
    # what runs is 10 % off what its own decoded weights give
    monkeypatch.setattr(ops, "linear", lambda *arguments: real(*arguments) * 1.1)
    with pytest.raises(RuntimeError, match="the model in rf8 is wrong: relative error of its logits"):
        list(models.measure(tiny, CPU, ("rf8",), 24, 4, 1, lambda text: None))


@pytest.mark.slow
def test_loads(tiny, tmp_path):
    loading.save(tiny, tmp_path)
    rows = loading.measure(tmp_path, 1)
    assert [row["load"] for row in rows] == list(loading.MODES)
    assert all(row["seconds"] > 0 and row["peak_mib"] >= 0 for row in rows) and rows[0]["ratio_to_plain"] == 1.0

"""Tokens a second of a tiny model, with its logits checked first, and its loads."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gg import ops
from hf_gg.bench import contenders, loading, models


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


def test_peers_in_a_whole_model(tiny, monkeypatch):
    def breaks(layer):
        raise ImportError("No module named 'nothing'")

    def twice(layer):
        return contenders.Made(lambda x: 2 * x @ layer.weight.T, None, 1)

    def slow(layer):
        def run(x):
            time.sleep(0.1)
            return x @ layer.weight.T

        return contenders.Made(run, None, 1)

    for name, make in (("breaks", breaks), ("twice", twice), ("slow", slow)):
        monkeypatch.setitem(contenders.CONTENDERS, name, make)
    tiny.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.randn(64).bfloat16())
    peers = ("float32", "torch int8pack", "breaks", "twice", "slow")
    rows = list(models.measure(tiny, CPU, ("rf8",), 24, 4, 2, lambda text: None, peers, most_seconds=1.2))
    found = {(row["what"], row["model"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 7
    sizes = {name: found["decode", name]["mib"] for name in ("bfloat16", "rf8", "float32", "torch int8pack")}
    assert sizes["float32"] >= sizes["bfloat16"] >= sizes["torch int8pack"]
    for what in ("prefill", "decode"):
        assert found[what, "breaks"]["reason"] == "ImportError: No module named 'nothing'"
        assert "twice is wrong for x [1, 64]" in found[what, "twice"]["reason"]
        assert "it takes" in found[what, "slow"]["reason"]
        for name in ("float32", "torch int8pack"):
            assert found[what, name]["tokens_s"] > 0 and found[what, name]["error"] < 0.05


@pytest.mark.slow
def test_loads(tiny, tmp_path):
    loading.save(tiny, tmp_path)
    rows = loading.measure(tmp_path, 1, (*loading.FROM_PLAIN, *loading.OURS))
    assert [row["load"] for row in rows] == [*loading.FROM_PLAIN, *loading.OURS]
    assert all(row["seconds"] > 0 and row["peak_mib"] >= 0 for row in rows) and rows[0]["ratio_to_plain"] == 1.0


@pytest.mark.slow
def test_loads_of_other_packages(tiny, tmp_path):
    loading.save(tiny, tmp_path)
    rows = {row["load"]: row for row in loading.measure(tmp_path, 1, ("plain", *loading.PEERS))}
    assert len(rows) == 1 + len(loading.PEERS)
    for name in loading.PEERS:
        assert rows[name].get("reason") or rows[name]["seconds"] > 0


def test_a_peer_that_does_not_load_is_listed(monkeypatch, tmp_path):
    def run(command, **options):
        failed = command[3] == "HQQ 8"
        found = '{"seconds": 1.0, "peak": 1, "after": 1, "footprint": 1, "largest": 1}'
        return SimpleNamespace(
            returncode=failed, stdout="" if failed else found, stderr="Traceback\nImportError: no hqq"
        )

    monkeypatch.setattr(loading.subprocess, "run", run)
    rows = loading.measure(tmp_path, 2, ("plain", "HQQ 8", "rf8"))
    assert [row["load"] for row in rows] == ["plain", "HQQ 8", "rf8"]
    assert rows[1] == {"load": "HQQ 8", "reason": "ImportError: no hqq"} and rows[2]["ratio_to_plain"] == 1.0

"""The demo's figures, on a tiny random model and against plain formulas."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def demo():
    path = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def windows(demo):
    return demo.windows_of(torch.arange(400) % 97, 3, 20)


def test_windows_are_spread_and_do_not_overlap(demo):
    windows = demo.windows_of(torch.arange(100), 4, 25)
    assert windows.tolist() == torch.arange(100).view(4, 25).tolist()
    windows = demo.windows_of(torch.arange(100), 3, 10)
    assert windows[:, 0].tolist() == [0, 45, 90]
    assert demo.windows_of(torch.arange(10), 1, 10).shape == (1, 10)


@pytest.mark.parametrize(("count", "length"), [(0, 10), (1, 1), (4, 26)])
def test_windows_that_cannot_be_cut(demo, count, length):
    with pytest.raises(ValueError, match=r"windows|count"):
        demo.windows_of(torch.arange(100), count, length)


def test_perplexity_is_that_of_the_model_loss(demo, model, windows):
    row, reference = demo.Row("full"), []
    demo.measure_quality(model, windows, reference, row)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.double() for w in windows]
    assert row.perplexity == pytest.approx(math.exp(torch.stack(losses).mean().item()), rel=1e-5)
    assert (row.kl, row.flips) == (0, 0)
    assert [tuple(p.shape) for p in reference] == [(19, 97)] * 3


def test_kl_and_flips_against_torch(demo, model, windows):
    reference, row = [], demo.Row("changed")
    demo.measure_quality(model, windows, reference, demo.Row("full"))
    with torch.no_grad():
        before = model(windows).logits[:, :-1].double()
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        after = model(windows).logits[:, :-1].double()
    demo.measure_quality(model, windows, reference, row)
    wanted = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert row.kl == pytest.approx(wanted.item(), rel=1e-4)
    assert 0 < row.flips == (before.argmax(-1) != after.argmax(-1)).double().mean().item()


def test_sizes_count_every_storage_once(demo, model):
    linears = demo.linear_shapes(model)
    assert len(linears) == 2 * 7
    assert "lm_head" not in linears
    row = demo.Row("full")
    demo.measure_size(model, linears, row)
    assert row.bits == 32
    assert row.linear_mb == 4 * sum(linears.values()) / 1e6
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert row.model_mb == pytest.approx((4 * model.num_parameters() + buffers) / 1e6)


def test_sizes_of_a_quantized_model_count_codes_and_scales(demo, model):
    import hf_gg

    linears = demo.linear_shapes(model)
    outputs = sum(model.get_submodule(name).out_features for name in linears)
    hf_gg.quantize_(model, hf_gg.GGConfig())
    row = demo.Row("rf8")
    demo.measure_size(model, linears, row)
    assert row.bits == 8 + 32 * outputs / sum(linears.values())


def test_table_shows_gaps_and_reasons(demo):
    rows = [demo.Row("full", 1.0, 2.0, 3.0, 4.0, 32.0, 21.5, 0.0, 0.0), demo.Row("peer", error="ValueError: no")]
    lines = demo.markdown(rows).splitlines()
    assert lines[2] == "| full | 1.0 | 2.0 | 3.0 | 4.0 | 32.000 | 21.500 | 0.00000 | 0.00 % |"
    assert lines[3] == "| peer | – | – | – | – | – | – | – | – |"
    assert lines[-1] == "peer: ValueError: no"


def test_whole_demo_on_a_tiny_model(demo, model, tmp_path, monkeypatch, capsys):
    from transformers import AutoTokenizer

    from hf_gg import data

    tokenizer = AutoTokenizer.from_pretrained(data.minilm())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(demo, "peers", lambda: {"absent": lambda: (_ for _ in ()).throw(ImportError("none"))})
    options = f"--windows 2 --length 16 --since 2020 --model-dir {tmp_path}/tiny --work {tmp_path}/work"
    rows = demo.main(options.split())
    printed = capsys.readouterr().out
    assert [row.name for row in rows] == ["full precision (float32)", "rf8", "rf8x"]
    assert "RF8Linear; logits equal bit for bit" in printed
    assert "absent: not installed" in printed
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert results["rows"][1]["perplexity"] == rows[1].perplexity
    assert 0 < rows[1].kl < 0.1
    assert rows[1].disk_mb < rows[0].disk_mb

"""`hf-gg export`: from a checkpoint to a folder that onnxruntime runs, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_gg import GGConfig, quantize_
from hf_gg.cli import main


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "rf8"
    torch.manual_seed(0)
    model = quantize_(LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16), GGConfig(coding="rans"))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_a_coded_checkpoint_becomes_a_folder_that_runs(source, tmp_path, capsys):
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    assert main(["export", str(source), "-o", str(out), "--no-cache", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == {str(f.relative_to(out)): f.stat().st_size for f in out.rglob("*") if f.is_file()}
    copied = {"generation_config.json", "tokenizer.json"}
    assert {"model.onnx", "model.onnx.data", "config.json", "export.json", *copied} == files.keys()
    model = AutoModelForCausalLM.from_pretrained(source).to(torch.float32).eval()
    tokens = torch.randint(3, 128, (2, 9))
    session = ort.InferenceSession(str(out / "model.onnx"))
    feed = {"input_ids": tokens.numpy(), "attention_mask": np.ones((2, 9), np.int64)}
    result = session.run(["logits"], {name: feed[name] for name in (spec.name for spec in session.get_inputs())})[0]
    with torch.no_grad():
        np.testing.assert_allclose(result, model(tokens).logits.numpy(), rtol=1e-5, atol=1e-6)
    # again, over what is there
    assert main(["export", str(source), "-o", str(out), "--no-cache", "--decode", "load"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["export", str(source), "-o", str(out), "--no-cache", "--decode", "load", "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "model.onnx.data" in text and "MB" in text
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_errors_are_one_line(source, tmp_path, capsys):
    pytest.importorskip("onnxscript")

    def error(*arguments: str) -> str:
        assert main(["export", *arguments]) == 1
        text = capsys.readouterr().err
        assert text.startswith("hf-gg export: error: ") and text.count("\n") == 1
        return text

    out = str(tmp_path / "onnx")
    assert "does not exist" in error(str(tmp_path / "none" / "there"), "-o", out)
    plain = tmp_path / "plain"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(plain)
    assert "has no weights quantized by hf_gg" in error(str(plain), "-o", out)
    assert "opset must be a number of 18 or more, got 9" in error(str(source), "-o", out, "--opset", "9")
    (tmp_path / "file").write_text("")
    assert "no folder can be made" in error(str(source), "-o", str(tmp_path / "file" / "onnx"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "plain", "rf8"]


def test_usage(capsys):
    assert main(["export"]) == 2
    assert main(["export", "model", "-o", "out", "--format", "gguf"]) == 2
    assert main(["export", "--help"]) == 0
    assert "--decode" in capsys.readouterr().out

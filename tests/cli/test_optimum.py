"""`optimum-cli gg`: optimum finds our commands, and they are those of `hf-gg`."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def run(monkeypatch, *arguments: str) -> int:
    """optimum's own `main` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    # the commands that optimum-quanto has are not ours to load
    monkeypatch.setattr(optimum_cli, "load_subpackages", lambda: None)
    try:
        optimum_cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_compress_writes_a_checkpoint(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "gg", "compress"]
    done = subprocess.run(
        [*command, str(tmp_path / "model"), str(tmp_path / "out"), "--format", "rf8x"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "MB became" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.weight_format == "rf8x"
    assert run(monkeypatch, "gg", "compress", str(tmp_path / "model"), str(tmp_path / "out")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("optimum-cli gg compress: error: ") and "exists and is not empty" in error


def test_help_is_that_of_the_command(monkeypatch, capsys):
    assert run(monkeypatch, "gg", "compress", "--help") == 0
    text = capsys.readouterr().out
    assert "--lossless-grid" in text and "Writes a model as a checkpoint" in text
    assert run(monkeypatch, "gg") == 0
    text = capsys.readouterr().out
    assert "quantize" in text and "compress" in text


def test_quantize_forwards_by_name(monkeypatch, capsys):
    got = {}

    def run_module(args):
        got.update(vars(args))
        if args.fail:
            raise ValueError("two\nlines")
        return args.code

    module = types.ModuleType("hf_gg.cli.quantize", "What it does.")
    module.add_arguments = lambda parser: [
        parser.add_argument("model"),
        parser.add_argument("--code", type=int),
        parser.add_argument("--fail", action="store_true"),
    ]
    module.run = run_module
    monkeypatch.setitem(sys.modules, "hf_gg.cli.quantize", module)
    assert run(monkeypatch, "gg", "quantize", "a-model") == 0
    assert got["model"] == "a-model"
    assert run(monkeypatch, "gg", "quantize", "a-model", "--code", "3") == 3
    assert run(monkeypatch, "gg", "quantize", "a-model", "--fail") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "optimum-cli gg quantize: error: two lines"


def test_quantize_writes_a_checkpoint(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    given = [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--weight-format", "rf8x"]
    assert run(monkeypatch, "gg", "quantize", *given) == 0
    assert "MB became" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.weight_format == "rf8x"
    assert "gg quantize" in (tmp_path / "out" / "README.md").read_text()

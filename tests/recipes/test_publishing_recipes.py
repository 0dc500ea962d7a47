"""Quantize, evaluate and push by recipes, in tiny."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_gg import data


FOLDER = Path(__file__).parents[2] / "recipes"
TEXT = "The State of the Union is what the people of the United States make of it. "


@pytest.fixture(scope="module")
def recipes():
    for package in ("trl", "datasets"):
        pytest.importorskip(package)
    sys.path.insert(0, str(FOLDER))
    try:
        import calibrate
        import compare
        import publish

        yield {"calibrate": calibrate, "compare": compare, "publish": publish}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def places(tmp_path):
    """A tiny model, and a file of texts."""
    words = tf.AutoTokenizer.from_pretrained(**data.smollm2())
    words.save_pretrained(tmp_path / "tiny")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(vocab_size=len(words), **size, tie_word_embeddings=True)
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT * (n + 30)}) + "\n" for n in range(4)))
    return str(tmp_path / "tiny"), str(texts), tmp_path


def test_publish_without_a_repository(recipes, places, capsys):
    model, texts, folder = places
    given = ["--model", model, "--out", str(folder / "out"), "--text", texts, "--tokens", "64", "--window", "32"]
    found = recipes["publish"].main(given)
    assert found["texts"]["metrics"]["kl"]["value"] > 0
    shown = capsys.readouterr().out
    assert f"hf-gg quantize {model} --out" in shown and "hf-gg eval" in shown and "hf-gg push" not in shown
    assert tf.AutoModelForCausalLM.from_pretrained(folder / "out").config.quantization_config.coding == "rans"
    # what is there is not done again
    assert recipes["publish"].main(given) == found
    assert capsys.readouterr().out == ""


def test_a_command_that_fails_ends_the_recipe(recipes, places, capsys):
    model, _, folder = places
    with pytest.raises(SystemExit) as end:
        recipes["publish"].main(["--model", model, "--out", str(folder / "out"), "--weight_format", "rf9"])
    assert end.value.code == 1 and not (folder / "out").exists()
    assert "rf9" in capsys.readouterr().err


def test_table(recipes, places, capsys):
    model, texts, folder = places
    given = [
        "--model",
        model,
        "--formats",
        "rf8",
        "grid:5",
        "--text",
        texts,
        "--tokens",
        "64",
        "--window",
        "32",
        "--documents",
        "2",
    ]
    with recipes["compare"].main([*given, "--out", str(folder / "table")]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["format"] for row in rows] == ["rf8", "grid-5"]
    assert all(float(row["kl"]) > 0 and float(row["MB"]) > 0 and "–" in row["kl 95 %"] for row in rows)
    assert "| rf8 |" in capsys.readouterr().out


def test_calibrate(recipes, places, capsys):
    model, texts, folder = places
    given = ["--model", model, "--text", texts, "--tokens", "64", "--window", "32", "--out", str(folder / "table")]
    with recipes["calibrate"].main([*given, "--calibrate", texts]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["format"] for row in rows] == ["rf8", "rf8-calibrated"]

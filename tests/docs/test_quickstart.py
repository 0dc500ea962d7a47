"""The quickstart's blocks run in their order, and print what stands below them."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

from hf_gg import data


PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCK = re.compile(r"(<!-- not run: [^>]*-->\n\n)?```(python|bash|text)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which the model's name on the hub is a folder's."""
    model = tf.AutoModelForCausalLM.from_pretrained(
        **data.smollm2(), quantization_config=tf.GgufConfig(dequantize=True), dtype="bfloat16"
    )
    place = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    model.save_pretrained(place)
    tf.AutoTokenizer.from_pretrained(**data.smollm2()).save_pretrained(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_quickstart(folder):
    for package in ("peft", "datasets", "accelerate"):
        pytest.importorskip(package)
    names: dict = {}
    printed, ran = "", 0
    for skipped, kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if skipped or text.startswith("pip install"):
            continue
        if kind == "text":
            assert same(printed, text), f"printed {printed!r}, the page says {text!r}"
            continue
        if kind == "python":
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile(text, str(PAGE), "exec"), names)
            printed = stream.getvalue()
        else:
            run = subprocess.run(text, shell=True, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            printed = run.stdout
        ran += 1
    assert ran > 9


def same(found: str, wanted: str) -> bool:
    """The last lines, word by word; numbers within 2 %."""
    lines = len(wanted.strip().splitlines())
    found, wanted = "\n".join(found.strip().splitlines()[-lines:]), wanted.strip()
    if NUMBER.sub("#", found) != NUMBER.sub("#", wanted):
        return False
    pairs = zip(map(float, NUMBER.findall(found)), map(float, NUMBER.findall(wanted)))
    return all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) for a, b in pairs)


def test_same():
    assert same("x\n100 MB\n", "101 MB") and not same("100 MB", "110 MB") and not same("True", "False")

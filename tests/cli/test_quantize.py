"""`hf-gg quantize`: what it writes is `quantize_` and a save, a killed run goes on, and errors are one line."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_gg import Calibration, GGConfig, quantize_
from hf_gg.cli import main


CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = ("--tokens", "40", "--sequences", "5")


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{k}": k for k in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{k}" for k in torch.randint(3, 128, (60,), generator=generator).tolist()) for _ in range(12)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def run(*words, code: int = 0) -> None:
    assert main(["quantize", *map(str, words)]) == code


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--weight-format", "rf8x"], {"weight_format": "rf8x"}),
        (["--target-bits", "4"], {"weight_format": "grid", "target_bits": 4.0}),
        (["--coding", "rans", "--keep", "o_proj"], {"coding": "rans", "modules_to_not_convert": ["o_proj"]}),
    ],
)
def test_plain(source, tmp_path, capsys, words, options):
    run(source, "-o", tmp_path / "out", "--json", *words)
    printed = json.loads(capsys.readouterr().out)
    model = quantize_(AutoModelForCausalLM.from_pretrained(source), GGConfig(**options))
    model.save_pretrained(tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert printed["weight_format"] == options.get("weight_format", "rf8") and printed["total"]["snr"] > 5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "w2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_calibrated(source, text, tmp_path, capsys):
    run(source, "-o", tmp_path / "out", "--calibrate", text, *SMALL, "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["uncalibrated"] == {} and printed.err == ""
    calibration = Calibration(text, tokens=40, sequences=5)
    model = quantize_(
        AutoModelForCausalLM.from_pretrained(source),
        GGConfig(calibration=calibration),
        AutoTokenizer.from_pretrained(source),
    )
    model.save_pretrained(tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert "w3" not in (tmp_path / "out" / "config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]  # no work is left
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no text"),
        ('"w3"\n{"text"\n', "line 2 of"),
        ('{"words": "w3"}\n', "line 1 of"),
        ('"w3 w4"\n', "2 tokens, and a window takes 40"),
        ('"w3"\n"\\ud83d"\n', "line 2 of .* has half of a character"),
        ("[" * 100_000, "line 1 of .* no JSON"),
    ],
)
def test_bad_texts(source, tmp_path, capsys, lines, message):
    (tmp_path / "text.jsonl").write_text(lines)
    run(source, "-o", tmp_path / "out", "--calibrate", tmp_path / "text.jsonl", *SMALL, code=1)
    error = capsys.readouterr().err
    assert (
        re.search(message, error)
        and error.count("\n") == 1
        and error.startswith("hf-gg quantize: error: calibration:")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_other_errors(source, text, tmp_path, capsys):
    run(source, "-o", tmp_path / "out")
    run(tmp_path / "out", "-o", tmp_path / "again", "--calibrate", text, *SMALL, code=1)
    assert "quantizing twice loses twice" in capsys.readouterr().err
    run(source, "-o", tmp_path / "out", code=1)
    assert "--overwrite" in capsys.readouterr().err
    run(source, "-o", tmp_path / "b", "--calibrate", tmp_path / "none.txt", code=1)
    assert "there is no file" in capsys.readouterr().err
    run(source, "-o", tmp_path / "b", "--calibrate", text, "--damping", "-1", code=1)
    assert "damping must be" in capsys.readouterr().err
    run(source, "-o", tmp_path / "b", "--weight-format", "int3", code=1)
    assert "Unknown weight format" in capsys.readouterr().err
    run(source, code=2)
    (tmp_path / "bare").mkdir()
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "bare")
    run(tmp_path / "bare", "-o", tmp_path / "b", "--calibrate", text, *SMALL, code=1)
    assert "needs the model's tokenizer" in capsys.readouterr().err
    for name in ("user/model", "nobody"):  # the hub is switched off in these tests
        run(name, "-o", tmp_path / "b", code=1)
        assert f"{name} is no folder here and cannot be had from the hub" in capsys.readouterr().err
    run("no name", "-o", tmp_path / "b", code=1)
    assert "'no name' is no folder or file here, and no name on the hub" in capsys.readouterr().err
    for words in (["--sequences", "32"], ["--work", tmp_path / "w"], ["--damping", "0.5"]):
        run(source, "-o", tmp_path / "b", *words, code=1)
        assert "is of a calibration: name its text with --calibrate" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["text.ndjson", "TEXT.JSONL", "text.json"])
def test_lines_by_other_names(source, text, tmp_path, name, capsys):
    """A byte order mark is no text; what does not say that it holds lines is one text."""
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    run(source, "-o", tmp_path / "a", "--calibrate", text, *SMALL)
    run(source, "-o", tmp_path / "b", "--calibrate", tmp_path / name, *SMALL)
    assert same(tmp_path / "a", tmp_path / "b") == (name != "text.json")


def test_a_place_that_cannot_be_written(source, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run(source, "-o", tmp_path / "file" / "out", "--calibrate", text, *SMALL, code=1)
    assert "give another place" in capsys.readouterr().err
    run(source, "-o", tmp_path / "out", "--calibrate", text, *SMALL, "--work", tmp_path / "file" / "w", code=1)
    assert "give another folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_saving(source, text, tmp_path, monkeypatch, capsys):
    """Nothing is half written, and what was calibrated is not lost."""
    from transformers import modeling_utils

    def no_space(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", no_space)
        run(source, "-o", tmp_path / "out", "--calibrate", text, *SMALL, code=1)
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.calibration"]
    from hf_gg.integrations import calibrating

    monkeypatch.setattr(calibrating, "round_weight", lambda *_: pytest.fail("rounded again"))
    run(source, "-o", tmp_path / "out", "--calibrate", text, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_goes_on_after_sigkill(source, text, tmp_path):
    words = [str(source), "-o", str(tmp_path / "out"), "--calibrate", str(text), *SMALL]
    process = subprocess.Popen([sys.executable, "-m", "hf_gg", "quantize", *words], stderr=subprocess.PIPE)
    work = tmp_path / ".out.calibration"
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline and len(list(work.glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and list(work.glob("*.safetensors"))
    run(*words)
    run(source, "-o", tmp_path / "whole", "--calibrate", text, *SMALL)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_no_progress_bar_in_a_pipe(source, text, tmp_path, capsys):
    assert not sys.stderr.isatty()
    run(source, "-o", tmp_path / "out", "--calibrate", text, *SMALL)
    captured = capsys.readouterr()
    assert captured.err == "" and "MB became" in captured.out

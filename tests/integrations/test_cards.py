"""Cards: what they remember, what may be replaced, and the card of a model that is pushed from Python."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gg import Calibration, GGConfig, quantize_
from hf_gg.integrations.cards import Marker, base_of, collect, may_replace, read_license, read_marker, write_card
from hf_gg.integrations.cards.marker import sign


sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # where the small tokenizer is
from toy import TEXTS, tokenizer


@given(st.none() | st.text(), st.dictionaries(st.sampled_from(["license", "license_name"]), st.text()),
       st.lists(st.text()), st.text())  # fmt: skip
def test_markers_come_back_whatever_is_in_them(base, license, commands, text):
    marker = Marker(base, license, commands)
    card = sign(text, marker)
    assert read_marker(card) == marker and card.split("\n", 1)[0].count("-->") == 1
    assert read_marker("---\ntags:\n- x\n---\n" + card.replace("\n", "\r\n")) == marker
    assert may_replace(card) and not may_replace(card + "\nand my own words")


@given(st.text())
def test_any_text_is_a_card_of_somebody(text):
    assert read_marker(text) is None
    assert may_replace(text) is (not text.strip())


@pytest.mark.parametrize(
    "content",
    ["{}", "[", '{"base": 1, "license": {}, "commands": [], "sha256": ""}',
     '{"base": null, "license": {}, "commands": [1], "sha256": ""}'],
)  # fmt: skip
def test_damaged_markers_are_none(content):
    assert read_marker(f"<!-- hf-gg card {content} -->\ntext") is None
    assert not may_replace(f"<!-- hf-gg card {content} -->\ntext")


def test_the_empty_card_of_transformers_may_be_replaced():
    """As `transformers.utils.hub.create_and_tag_model_card` makes it."""
    words = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    card = ModelCard.from_template(ModelCardData(tags=["x"], library_name="transformers"), model_description=words)
    assert may_replace(str(card))
    assert not may_replace(str(card).replace("[More Information Needed]", "by me", 1))


def test_bases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert base_of("user/model") == "user/model" and base_of("gpt2") == "gpt2"
    for name in ("here", "./here", "/a/b", "a/b/c", "a b", "", None, "--x"):
        assert base_of(name) is None, name
    assert read_license("here") == {}
    (tmp_path / "here" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [a]\n---\n"
    )
    assert read_license("here") == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    (tmp_path / "here" / "README.md").write_text("---\n[\n---\n")
    assert read_license("here") == {}


@pytest.mark.parametrize("config", [GGConfig(), GGConfig("rf8x", scale="pow2"), GGConfig("grid", target_bits=5)])
def test_the_python_code_of_a_card_makes_the_same_checkpoint(tmp_path, config):
    """The code is run, with the folder in the place of the base's name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "full")
    LlamaForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config).save_pretrained(tmp_path / "rf8")
    card = write_card(collect(tmp_path / "rf8", Marker("user/base", {"license": "mit"})), "user/tiny")
    code = card.split("this makes such a one:\n\n```python\n")[1].split("```")[0]
    code = code.replace('"user/base"', repr(str(tmp_path / "full"))).replace('"OUT"', repr(str(tmp_path / "again")))
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "rf8" / "config.json").read_bytes()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("rf8", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_python_code_of_a_calibrated_checkpoint_runs_with_texts(tmp_path):
    """The checkpoint has only their hash, with which nothing could be made."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    config = GGConfig(calibration=Calibration(TEXTS, tokens=20, sequences=3, damping=0.3))
    quantize_(model, config, tokenizer=tokenizer()).save_pretrained(tmp_path / "rf8")
    card = write_card(collect(tmp_path / "rf8", Marker("user/base")), "x")
    code = card.split("this makes such a one:\n\n```python\n")[1].split("model = ")[0]
    names = {"TEXTS": TEXTS}
    exec(compile(code, "card", "exec"), names)
    assert names["config"].calibration == config.calibration and "`TEXTS` are the texts" in card


def test_a_title_ends_no_string(tmp_path):
    folder = tmp_path / "rf8"
    quantize_(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                           num_attention_heads=4))).save_pretrained(folder)  # fmt: skip
    code = write_card(collect(folder), 'a"b\\c`|d').split("```python\n")[1].split("```")[0]
    call = ast.parse(code).body[1].value
    assert call.args[0].value == "a\"b\\c'/d"


def test_commands_say_nothing_of_the_machine_they_ran_on(tmp_path):
    quantize_(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                           num_attention_heads=4))).save_pretrained(tmp_path / "rf8")  # fmt: skip
    commands = [
        "hf-gg compress /home/me/base '/home/me/my out' --x https://hf.co/a/b user/model ./c ../d -y=/srv/e,f=1"
    ]
    card = write_card(collect(tmp_path / "rf8", Marker(commands=commands)), "x")
    shown = "hf-gg compress base 'my out' --x https://hf.co/a/b user/model ./c ../d -y=e,f=1"
    assert f"\n{shown}\n" in card and read_marker(card).commands == [shown] and may_replace(card)


@pytest.mark.parametrize(
    ("command", "words"),
    [("a --round", "were rounded to it"), ("a", "decode to the same floats"), (None, "what the files hold was coded")],
)
def test_a_lossless_checkpoint_that_was_rounded_is_not_called_exact(tmp_path, command, words):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=4))  # fmt: skip
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = GGConfig(weight_format="none", coding="rans").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in write_card(collect(tmp_path, Marker(commands=[command] if command else [])), "x")


def test_metadata_and_table(tmp_path):
    folder = tmp_path / "rf8"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    quantize_(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))).save_pretrained(folder)
    card = write_card(collect(folder, Marker("user/base", {"license": "apache-2.0"})), "user/tiny")
    data = yaml.safe_load(card.split("---\n")[1])
    assert data == {
        "base_model": "user/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hf_gg", "rf8"],
    }
    rows = [line for line in card.splitlines() if line.startswith("| ") and "rf8" in line]
    total = next(line for line in card.splitlines() if line.startswith("| all |"))
    assert len(rows) == 7 and "$" not in card
    megabytes = float(total.split("|")[4])
    assert megabytes == pytest.approx((folder / "model.safetensors").stat().st_size / 1e6, abs=0.01)
    assert "The licence of the base" not in card
    bare = write_card(collect(folder), "x")
    assert "base_model" not in bare and "could not be read: look it up" in bare and "Not measured" in bare


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import hf_gg

folder = sys.argv[1]
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LlamaForCausalLM(config).push_to_hub("base")
hub_base = AutoModelForCausalLM.from_pretrained("user/base", quantization_config=hf_gg.GGConfig("rf8x"))
hub_base.push_to_hub("tiny", tags=["mine"])
hub_base.push_to_hub("tiny", private=True)  # again: over our own card
again = AutoModelForCausalLM.from_pretrained("user/tiny")
again.save_pretrained(folder + "/saved", push_to_hub=True, repo_id="user/copy")
again.push_to_hub("hand")
again.dequantize().push_to_hub("plain")
"""


def test_push_to_hub_gives_the_same_card(tmp_path):
    with Hub() as hub:
        hub.files["user/hand"] = {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
            env={**os.environ, **hub.environment(str(tmp_path / "home"))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    cards = {name.removeprefix("user/"): files["README.md"].decode() for name, files in hub.files.items()}
    assert "automatically generated" in cards["base"] and read_marker(cards["base"]) is None
    tiny = ModelCard(cards["tiny"])
    assert may_replace(cards["tiny"]) and tiny.data.base_model == "user/base" and "mine" in tiny.data.tags
    assert tiny.data.to_dict()["base_model_relation"] == "quantized"
    assert "# user/tiny" in cards["tiny"] and "GGConfig(" in cards["tiny"] and "could not be read" in cards["tiny"]
    # a model that was loaded from codes is not its own base
    assert read_marker(cards["copy"]).base == "user/base"
    assert (tmp_path / "saved" / "README.md").read_text() == cards["copy"]
    assert cards["hand"].endswith("# Mine\n") and "written by hand" in run.stderr
    assert read_marker(cards["plain"]) is None
    # the same card by the command, from the folder that was saved
    folder = tmp_path / "saved"
    facts = collect(folder, read_marker(cards["tiny"]))
    ours, theirs = write_card(facts, "user/tiny"), cards["tiny"].replace("- mine\n", "")
    assert ours.split("-->")[1] == theirs.split("-->")[1]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["weight_format"] == "rf8x"

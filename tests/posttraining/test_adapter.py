"""Router adapters: saved, loaded, merged, taken off, pushed, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe import CONFIGS, TEXT, moe

from hf_gg import RouterAdapter
from hf_gg.integrations.transformers import GGConfig, quantize_
from hf_gg.posttraining.adapter import CONFIG, WEIGHTS
from hf_gg.posttraining.roma import choose_routers


sys.path.append(str(Path(__file__).parents[1] / "integrations"))
from hub_server import Hub


IDS = torch.arange(3, 20)[None]


def trained(family: str):
    """A model whose last two routers differ from the base's, and the adapter of them."""
    model = moe(family)
    routers = choose_routers(model, 2)
    with torch.no_grad():
        for router in routers:
            for parameter in router.module.parameters():
                parameter.add_(torch.randn_like(parameter))
    return model, RouterAdapter.from_model(model, routers, {"method": "roma"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(family, tmp_path):
    model, adapter = trained(family)
    adapter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    loaded = RouterAdapter.from_pretrained(tmp_path)
    assert loaded.settings["method"] == "roma"
    assert len(loaded.weights) == (4 if family == "gpt-oss" else 2)
    base = moe(family)
    before = logits(base)
    loaded.load_onto(base)
    assert torch.equal(logits(base), logits(model)) and not torch.equal(before, logits(base))
    with pytest.raises(ValueError, match="on a model already"):
        loaded.load_onto(base)
    loaded.unload(base)
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match="not on a model"):
        loaded.unload(base)
    loaded.merge(base)
    assert torch.equal(logits(base), logits(model))
    base.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(model))


def test_half_precision_base_is_given_back(tmp_path):
    _, adapter = trained("mixtral")
    base = moe("mixtral").bfloat16()
    before = logits(base)
    adapter.load_onto(base)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    adapter.unload(base)
    assert torch.equal(logits(base), before)


def test_other_bases():
    _, adapter = trained("mixtral")
    with pytest.raises(ValueError, match="no router parameter model.layers.1.mlp.gate.weight|another base"):
        adapter.load_onto(moe("gpt-oss"))
    wide = moe("mixtral", num_local_experts=6)
    before = logits(wide)
    with pytest.raises(ValueError, match=r"\[4, 32\] in the adapter and \[6, 32\] in the model"):
        adapter.merge(wide)
    assert torch.equal(logits(wide), before)
    short = moe("mixtral", num_hidden_layers=2)
    with pytest.raises(ValueError, match="no router parameter model.layers.2"):
        adapter.load_onto(short)
    assert TEXT["num_hidden_layers"] == 3


def test_same_sizes_with_other_weights():
    """The base is known by its embeddings, in any precision and with an adapter of PEFT."""
    model, adapter = trained("mixtral")
    other = moe("mixtral", seed=8)
    before = logits(other)
    for put in (adapter.load_onto, adapter.merge):
        with pytest.raises(ValueError, match=r"another base model .*likeness is -?0\.\d\d of 1"):
            put(other)
    assert torch.equal(logits(other), before)
    for base in (moe("mixtral").bfloat16(), quantize_(moe("mixtral"), GGConfig(quantize_embeddings=True))):
        adapter.load_onto(base)
        adapter.unload(base)
    wrapped = peft.get_peft_model(moe("mixtral"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    RouterAdapter.from_model(model, choose_routers(model, 2)).load_onto(wrapped)
    assert torch.equal(logits(wrapped), logits(model))
    assert RouterAdapter.from_model(wrapped, choose_routers(wrapped, 2)).weights.keys() == adapter.weights.keys()
    adapter.settings["base_probe"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="base_probe of the adapter must be 64 numbers"):
        adapter.merge(moe("mixtral"))
    del adapter.settings["base_probe"]
    adapter.merge(other)


def test_on_one_model_at_a_time():
    """What belongs to one model is neither given to another, nor forgotten."""
    _, adapter = trained("mixtral")
    one, two = moe("mixtral"), moe("mixtral")
    with torch.no_grad():
        two.model.layers[2].mlp.gate.weight.mul_(2)
    before = logits(one), logits(two)
    adapter.load_onto(one)
    for wrong in (adapter.unload, adapter.merge):
        with pytest.raises(ValueError, match="on another model"):
            wrong(two)
    assert torch.equal(logits(two), before[1])
    adapter.unload(one)
    assert torch.equal(logits(one), before[0])


def test_a_save_that_dies_leaves_the_old_one(tmp_path, monkeypatch):
    _, adapter = trained("mixtral")
    adapter.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("hf_gg.posttraining.adapter.save_file", fail)
    adapter.settings["method"] = "other"
    with pytest.raises(OSError, match="disk full"):
        adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no router adapter: router_adapter.json is missing"):
        RouterAdapter.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder, and no name of a repository"):
        RouterAdapter.from_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "file").touch()
    _, adapter = trained("mixtral")
    with pytest.raises(OSError, match="file"):
        adapter.save_pretrained(tmp_path / "file")
    adapter.save_pretrained(tmp_path)
    good = json.loads((tmp_path / CONFIG).read_text())
    for change, message in (
        ({"format": 2}, "format must be 1, got 2"),
        ({"parameters": []}, "do not belong together"),
        ({"sha256": None}, "do not belong together, or one is damaged"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            RouterAdapter.from_pretrained(tmp_path)
    adapter.save_pretrained(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="one is damaged"):
        RouterAdapter.from_pretrained(tmp_path)
    adapter.weights = {name: w * torch.nan for name, w in adapter.weights.items()}
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        RouterAdapter.from_pretrained(tmp_path)


@given(st.sampled_from([CONFIG, WEIGHTS]), st.binary(max_size=40), st.integers(0, 5000), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
def test_damaged_files(tmp_path, name, noise, at, cut):
    """A ValueError, or the adapter that was saved."""
    _, adapter = trained("mixtral")
    adapter.save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    at %= len(content)
    (tmp_path / name).write_bytes(content[:at] if cut else content[:at] + noise + content[at + len(noise) :])
    try:
        found = RouterAdapter.from_pretrained(tmp_path)
    except ValueError as error:
        if str(tmp_path) not in str(error):
            raise
    else:
        assert all(torch.equal(w, adapter.weights[key]) for key, w in found.weights.items())


SCRIPT = """
import torch
from moe import moe
from hf_gg import RouterAdapter
from hf_gg.posttraining.roma import choose_routers
model = moe("mixtral")
adapter = RouterAdapter.from_model(model, choose_routers(model, 1))
assert adapter.push_to_hub("tiny-roma") == "user/tiny-roma"
adapter.save_pretrained("too", push_to_hub=True, repo_id="user/tiny-roma-too")
for name in ("user/tiny-roma", "user/tiny-roma-too"):
    loaded = RouterAdapter.from_pretrained(name)
    assert loaded.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(w, adapter.weights[key]) for key, w in loaded.weights.items())
from moe import embedder, rows, tokenizer
from hf_gg import RoMAConfig, RoMATrainer
args = RoMAConfig("trained-roma", push_to_hub=True, max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
trainer = RoMATrainer(model, args, rows(), processing_class=tokenizer(), embedder=embedder)
trainer.train()
trainer.push_to_hub()
loaded = RouterAdapter.from_pretrained("user/trained-roma")
now = dict(model.named_parameters())
assert all(torch.equal(w, now[key]) for key, w in loaded.weights.items()) and len(loaded.weights) == 3
"""


def test_push_and_load_by_name(tmp_path):
    with Hub() as hub:
        path = {"PYTHONPATH": str(Path(__file__).parent)}
        environment = {**os.environ, **hub.environment(str(tmp_path / "home")), **path}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
    assert run.returncode == 0, run.stderr[-3000:]
    assert {CONFIG, WEIGHTS} == set(hub.files["user/tiny-roma"]) - {".gitattributes"}
    trained = set(hub.files["user/trained-roma"])
    assert {CONFIG, WEIGHTS, "tokenizer.json"} <= trained and not any("roma_state" in name for name in trained)

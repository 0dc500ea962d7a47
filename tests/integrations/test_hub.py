"""`push_to_hub` and loading by name, by the real client, from a hub on loopback."""

import json
import os
import subprocess
import sys
import textwrap

from hub_server import Hub


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import hf_gg

folder = sys.argv[1]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)).eval()
hf_gg.quantize_(model)
tokens = torch.arange(12)[None]
with torch.no_grad():
    expected = model(tokens).logits
model.push_to_hub("tiny-rf8", max_shard_size="20KB")
model.save_pretrained(folder + "/tiny-rf8-too", push_to_hub=True)
for name in ("user/tiny-rf8", "user/tiny-rf8-too"):
    loaded = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected), name
    assert sum(type(m).__name__ == "RF8Linear" for m in loaded.modules()) == 14
print(json.dumps(sorted(__import__("os").listdir(folder + "/tiny-rf8-too"))))
"""


def test_push_and_load_by_name(tmp_path):
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    sharded, single = hub.files["user/tiny-rf8"], hub.files["user/tiny-rf8-too"]
    assert "model.safetensors.index.json" in sharded and "model.safetensors" in single
    for files in (sharded, single):
        assert not any("saving" in name for name in files), list(files)
        config = json.loads(files["config.json"])
        assert config["quantization_config"]["quant_method"] == "gg"
    expected = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert json.loads(run.stdout.splitlines()[-1]) == expected

"""Entropy-coded checkpoints: the codes come back bit for bit, however they are loaded; damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, quiet, same_tensors, stored, weight_files
from hub_server import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bad_input import content, die, failing_writer, in_a_child
from test_loading import first_layers_on_disk
from transformers import AutoModel

from hf_gg import GGConfig, coding, get_format, quantize_
from hf_gg.integrations import coded
from hf_gg.integrations.selection import code_parameters


LLAMA, TIED, MIXTRAL = FAMILIES["llama"], FAMILIES["llama-tied"], FAMILIES["mixtral"]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
EMBEDDINGS = {"quantize_embeddings": True, "quantize_lm_head": True}

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A coded Llama in one file."""
    folder = tmp_path_factory.mktemp("coded") / "llama"
    with quiet():
        quantize_(LLAMA.model(), GGConfig(coding="rans")).save_pretrained(folder)
    return folder


def coding_in(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"].get("coding", "none")


def coded_names(folder: Path) -> set[str]:
    return {name for name, tensor in stored(folder).items() if coding.is_coded(tensor)}


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return same_tensors(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("coder", ["rans", "eg0"])
@pytest.mark.parametrize("weight_format", ["rf8", "grid"])
def test_codes_are_not_read_again_to_be_checked(tmp_path, coder, weight_format, monkeypatch):
    """The model in a payload tells which codes can occur: refused ones are found without another pass."""
    options = {"target_bits": 5.0} if weight_format == "grid" else {}
    quantize_(LLAMA.model(), GGConfig(weight_format=weight_format, coding=coder, **options)).save_pretrained(tmp_path)

    def validate(self, codes, name="codes"):
        raise AssertionError(name)

    monkeypatch.setattr(type(get_format(weight_format)), "validate", validate)
    AutoModel.from_pretrained(tmp_path)


def test_on_a_cuda_device_the_payload_is_what_moves(checkpoint, monkeypatch):
    """Without such a device: to which one the loader's slices take their payloads, and that codes are then checked."""
    calls = []

    def decode_symbols(payload, name, device, threads, expected_shape):
        calls.append((name.split()[0], payload.ndim, str(device)))
        return coding.decode(payload, name, threads, expected_shape)

    monkeypatch.setattr(coded, "decode_symbols", decode_symbols)
    model = AutoModel.from_pretrained(checkpoint)
    config = SimpleNamespace(
        weight_mapping=None,
        ignore_mismatched_sizes=False,
        device_map={"layers.0": "cuda:1", "layers.1": "cpu", "": "cuda:0"},
    )
    state = {
        f"model.{n}.weight": stored(checkpoint)[f"model.{n}.weight"]
        for n in ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj")
    }
    slices, _ = coded.with_coded_slices(model, state, config, None)
    for name, slice_ in slices.items():
        codes = slice_[...]
        assert torch.equal(codes, coding.decode(state[name])) and codes.device.type == "cpu"
    assert calls == [("layers.0.mlp.up_proj.weight", 1, "cuda:1")]


# --- round trips ---


@pytest.mark.parametrize("coder", ["rans", "eg0"])
@pytest.mark.parametrize("weight_format", ["rf8", "rf8x", "rf8-e5", "grid"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_round_trip(tmp_path, name, weight_format, coder):
    family = FAMILIES[name]
    model = quantize_(family.model(), GGConfig(weight_format=weight_format, coding=coder))
    model.save_pretrained(tmp_path / "a")
    assert coding_in(tmp_path / "a") == coder
    assert len(coded_names(tmp_path / "a")) == family.quantized
    loaded = family.auto.from_pretrained(tmp_path / "a")
    assert same_state(loaded, model)
    assert torch.equal(family.logits(loaded), family.logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert same_tensors(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert coding_in(tmp_path / "b") == coder


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_in_shards(tmp_path, name):
    family = FAMILIES[name]
    model = quantize_(family.model(), GGConfig(coding="rans"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(coded_names(tmp_path)) == family.quantized
    loaded, info = family.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_state(loaded, model)


def test_shards_are_cut_by_what_is_stored(tmp_path):
    quantize_(LLAMA.model(), GGConfig(coding="rans")).save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_parameters"] == LLAMA.model().num_parameters() + sum(
        t.numel() for name, t in tensors.items() if name.endswith("_scale")
    )
    for file in weight_files(tmp_path):
        sizes = [t.numel() * t.element_size() for t in load_file(file).values()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1


def test_it_is_smaller_and_not_below_the_entropy(tmp_path):
    model = quantize_(LLAMA.model(hidden_size=256, intermediate_size=512), GGConfig(coding="rans"))
    model.save_pretrained(tmp_path)
    files = stored(tmp_path)
    for name, module, weight in code_parameters(model):
        codes = module._parameters[weight]
        bits, entropy = 8 * files[name].numel() / codes.numel(), coding.entropy(codes)
        assert entropy <= bits <= 1.01 * entropy + 8 * 400 / codes.numel(), name  # the table of frequencies


@pytest.mark.parametrize("family", [LLAMA, TIED])
def test_embeddings(tmp_path, family):
    model = quantize_(family.model(), GGConfig(coding="rans", **EMBEDDINGS))
    model.save_pretrained(tmp_path)
    assert "model.embed_tokens.weight" in coded_names(tmp_path)
    loaded = family.auto.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert torch.equal(family.logits(loaded), family.logits(model))


def test_parts_of_a_model(tmp_path, checkpoint):
    whole = LLAMA.auto.from_pretrained(checkpoint)
    base = AutoModel.from_pretrained(checkpoint)
    assert same_state(base, whole.model)
    base.save_pretrained(tmp_path)
    assert coded_names(tmp_path) == {name.removeprefix("model.") for name in coded_names(checkpoint)}
    assert same_state(AutoModel.from_pretrained(tmp_path), whole.model)


def test_dequantize(checkpoint):
    plain = LLAMA.auto.from_pretrained(checkpoint, quantization_config=GGConfig(dequantize=True))
    wanted = LLAMA.auto.from_pretrained(checkpoint).dequantize()
    assert same_state(plain, wanted)
    assert not hasattr(plain.config, "quantization_config")


# --- changing the coding ---


def test_coding_is_kept_and_can_be_changed(tmp_path, checkpoint):
    wanted = LLAMA.auto.from_pretrained(checkpoint)

    model = LLAMA.auto.from_pretrained(checkpoint, quantization_config=GGConfig())
    assert model.config.quantization_config.coding == "rans"

    model = LLAMA.auto.from_pretrained(checkpoint, quantization_config=GGConfig(coding="none"))
    model.save_pretrained(tmp_path / "plain")
    assert coding_in(tmp_path / "plain") == "none" and not coded_names(tmp_path / "plain")
    assert same_state(LLAMA.auto.from_pretrained(tmp_path / "plain"), wanted)

    model = LLAMA.auto.from_pretrained(tmp_path / "plain")
    model.config.quantization_config.coding = "eg0"
    model.save_pretrained(tmp_path / "plain")
    assert coding_in(tmp_path / "plain") == "eg0" and coded_names(tmp_path / "plain") == coded_names(checkpoint)
    assert same_state(LLAMA.auto.from_pretrained(tmp_path / "plain"), wanted)


def test_unknown_coding(tmp_path):
    with pytest.raises(ValueError, match="coding must be one of 'none', 'rans', 'eg0', got 'zip'"):
        GGConfig(coding="zip")
    model = quantize_(LLAMA.model())
    model.config.quantization_config.coding = "zip"
    with pytest.raises(ValueError, match="got 'zip'"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_quantizing_while_loading(tmp_path):
    LLAMA.model().save_pretrained(tmp_path / "float")
    model = LLAMA.auto.from_pretrained(tmp_path / "float", quantization_config=GGConfig(coding="rans"))
    model.save_pretrained(tmp_path / "coded")
    assert same_state(LLAMA.auto.from_pretrained(tmp_path / "coded"), model)
    assert coded_names(tmp_path / "coded")


# --- where the parameters go ---


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("gpt2", {}), ("mixtral", {}), ("llama-tied", EMBEDDINGS)]
)
def test_offload_to_disk(tmp_path, name, options):
    pytest.importorskip("accelerate")
    family = FAMILIES[name]
    reference = quantize_(family.model(), GGConfig(coding="rans", **options))
    reference.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    devices = first_layers_on_disk(reference)
    if options:
        devices.update({"model.embed_tokens": "disk", "lm_head": "disk"})
    model = family.auto.from_pretrained(tmp_path / "a", device_map=devices, offload_folder=tmp_path / "offload")
    assert any(p.is_meta and p.dtype == torch.uint8 for p in model.parameters())
    assert torch.equal(family.logits(model), family.logits(reference))
    model.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    files = stored(tmp_path / "b")
    assert same_tensors(
        stored(tmp_path / "a"), {k: v for k, v in files.items() if not k.startswith("lm_head") or not options}
    )
    assert same_state(family.auto.from_pretrained(tmp_path / "b"), reference)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in stored(tmp_path / "b").values()
    )


def test_device_map(checkpoint):
    pytest.importorskip("accelerate")
    wanted = LLAMA.auto.from_pretrained(checkpoint)
    assert same_state(LLAMA.auto.from_pretrained(checkpoint, device_map="cpu"), wanted)
    assert same_state(LLAMA.auto.from_pretrained(checkpoint, device_map="auto"), wanted)


def test_without_mapping_the_file(checkpoint):
    wanted = LLAMA.auto.from_pretrained(checkpoint)
    assert same_state(LLAMA.auto.from_pretrained(checkpoint, disable_mmap=True), wanted)


SCRIPT = """
import sys, json, torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

folder, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert sum(type(m).__name__ == "RF8Linear" for m in model.modules()) == 14
tokens = torch.arange(3, 15)[None]
with torch.no_grad():
    print(json.dumps(model(tokens).logits.double().sum().item()))

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w1")
text = pipeline("text-generation", model=folder, tokenizer=tokenizer)("w5 w6 w7", max_new_tokens=4, do_sample=False)
assert text[0]["generated_text"].startswith("w5 w6 w7w"), text

tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
tuned.save_pretrained(work + "/adapter")
with torch.no_grad():
    wanted = tuned(tokens).logits
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), work + "/adapter")
    assert torch.equal(again(tokens).logits, wanted)

from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=folder, tokenizer=tokenizer, batch_size=1, device="cpu")
assert sum(type(m).__name__ == "RF8Linear" for m in lm.model.modules()) == 14
"""


def run_script(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_new_process_that_never_heard_of_us(checkpoint, tmp_path):
    done = run_script(SCRIPT, checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = LLAMA.auto.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = wanted(torch.arange(3, 15)[None]).logits
    assert json.loads(done.stdout.splitlines()[0]) == pytest.approx(logits.double().sum().item(), rel=1e-5)


HUB_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from huggingface_hub import HfApi

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("tiny-coded", max_shard_size="30KB")
loaded = AutoModelForCausalLM.from_pretrained("user/tiny-coded")
wanted = model.state_dict()
assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
"""


@pytest.mark.slow
def test_push_to_hub(checkpoint, tmp_path):
    with Hub() as hub:
        done = run_script(HUB_SCRIPT, checkpoint, **hub.environment(str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files["user/tiny-coded"]
    assert json.loads(files["config.json"])["quantization_config"]["coding"] == "rans"
    from safetensors.torch import load

    shards = [load(data) for name, data in files.items() if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert same_tensors({k: v for shard in shards for k, v in shard.items()}, stored(checkpoint))


def test_the_index_of_an_offloaded_model_is_right_before_it_is_pushed(checkpoint, tmp_path, monkeypatch):
    from transformers import modeling_utils

    uploaded = {}

    def upload(self, working_dir, *args, **kwargs):
        uploaded.update(json.loads((Path(working_dir) / "model.safetensors.index.json").read_text()))

    repository = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="user/name"))
    monkeypatch.setattr(modeling_utils, "hf_api", lambda *args, **kwargs: repository)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=len))
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_get_files_timestamps", lambda *args: {})
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_upload_modified_files", upload)
    devices = first_layers_on_disk(LLAMA.auto.from_pretrained(checkpoint))
    model = LLAMA.auto.from_pretrained(checkpoint, device_map=devices, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB", push_to_hub=True, repo_id="user/name")
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored(tmp_path / "out").values())
    assert uploaded["metadata"]["total_size"] == size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["encoding", "first shard", "move"])
def test_a_killed_save_leaves_the_old_checkpoint(checkpoint, tmp_path, monkeypatch, moment):
    from transformers import modeling_utils

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    before = content(folder)
    new = quantize_(LLAMA.model(initializer_range=0.1), GGConfig(coding="eg0"))
    if moment == "encoding":
        monkeypatch.setattr(coding, "encode", die)
    elif moment == "move":
        monkeypatch.setattr(os, "replace", die)
    else:
        writer = failing_writer(modeling_utils.safe_save_file, die, 0)
        monkeypatch.setattr(modeling_utils, "safe_save_file", writer)
    assert in_a_child(lambda: new.save_pretrained(folder, max_shard_size="30KB")) == -signal.SIGKILL
    monkeypatch.undo()
    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    new.save_pretrained(folder, max_shard_size="30KB")
    assert same_state(LLAMA.auto.from_pretrained(folder), new)


# --- bad input ---


def damage(source: Path, target: Path, name: str, change) -> Path:
    """A copy of a checkpoint in one file with another tensor `name`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    [file] = weight_files(target)
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_payloads(checkpoint, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(coded_names(checkpoint))))
    kind = data.draw(st.sampled_from(["flip", "truncate", "extend", "splice"]))

    def change(payload: torch.Tensor) -> torch.Tensor:
        if kind == "flip":
            # the header is small, and half of the damage is for it
            place = data.draw(st.integers(0, data.draw(st.sampled_from([63, payload.numel() - 1]))))
            payload[place] ^= data.draw(st.integers(1, 255))
            return payload
        if kind == "truncate":
            return payload[: data.draw(st.integers(0, payload.numel() - 1))]
        if kind == "extend":
            more = data.draw(st.binary(min_size=1, max_size=20))
            return torch.cat([payload, torch.frombuffer(bytearray(more), dtype=torch.uint8)])
        start = data.draw(st.integers(0, payload.numel() - 2))
        rest = payload[start:].flip(0)
        if torch.equal(rest, payload[start:]):
            rest = rest ^ 1
        return torch.cat([payload[:start], rest])

    folder = damage(checkpoint, tmp_path / "damaged", name, change)
    with pytest.raises(ValueError, match=name):
        LLAMA.auto.from_pretrained(folder)


def test_every_damaged_tensor_is_named(checkpoint, tmp_path):
    other = "model.layers.1.mlp.up_proj.weight"
    folder = damage(checkpoint, tmp_path / "a", WEIGHT, lambda x: x[:-1])
    folder = damage(folder, tmp_path / "b", other, lambda x: x[:100])
    with pytest.raises(ValueError, match=WEIGHT) as error:
        LLAMA.auto.from_pretrained(folder)
    assert other in str(error.value)


def test_damage_is_named_as_in_the_model_and_in_the_file(checkpoint, tmp_path):
    folder = damage(checkpoint, tmp_path / "a", WEIGHT, lambda x: x[:-1])
    name = WEIGHT.removeprefix("model.")
    with pytest.raises(ValueError, match=rf"(?<!model\.){name} \({WEIGHT} in the file\): damaged"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (64, 65), (4096,), (64, 64, 1), ()])
def test_a_payload_of_another_shape(checkpoint, tmp_path, shape):
    """Equal symbols are coded in a few bytes at any size."""

    def change(_):
        if len(shape) == 2 and shape[0] > 1000:
            return lying_payload(shape)
        return coding.encode(torch.zeros(shape, dtype=torch.uint8))

    folder = damage(checkpoint, tmp_path / "a", WEIGHT, change)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{WEIGHT} is coded with shape"):
        LLAMA.auto.from_pretrained(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def lying_payload(shape: tuple[int, int]) -> torch.Tensor:
    """A valid payload of terabytes of zeros."""
    from hf_gg.coding.container import CONSTANT, NO_MODEL, Header, write_header

    header = write_header(Header(CONSTANT, NO_MODEL, shape))
    return torch.frombuffer(bytearray(header), dtype=torch.uint8)


def test_codes_that_no_encoder_writes(checkpoint, tmp_path):
    shape = LLAMA.auto.from_pretrained(checkpoint).get_parameter(WEIGHT).shape
    reserved = torch.full(tuple(shape), 7, dtype=torch.uint8)
    folder = damage(checkpoint, tmp_path / "a", WEIGHT, lambda _: coding.encode(reserved))
    with pytest.raises(ValueError, match=f"{WEIGHT}.*reserved"):
        LLAMA.auto.from_pretrained(folder)


def test_another_shape_may_be_ignored(tmp_path):
    family = FAMILIES["bert-cls"]
    quantize_(family.model(), GGConfig(coding="rans")).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.auto.from_pretrained(tmp_path, num_labels=5)
    model = family.auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (5, 64) and model.classifier.weight.is_floating_point()


def test_a_missing_scale(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "a")
    [file] = weight_files(tmp_path / "a")
    tensors = load_file(file)
    del tensors[f"{WEIGHT}_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{WEIGHT}_scale is missing"):
        LLAMA.auto.from_pretrained(tmp_path / "a")


def test_coded_codes_without_their_config(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LLAMA.auto.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="is stored as U8: the model is quantized already"):
        LLAMA.auto.from_pretrained(tmp_path / "bare", quantization_config=GGConfig())


def test_the_index_is_corrected(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 99}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    coded.correct_index(str(tmp_path))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 12
    data = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    assert len(data) == 8 + struct.unpack("<Q", data[:8])[0] + 12

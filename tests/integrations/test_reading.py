"""Checkpoints of every kind as a stream of tensors, against the libraries that wrote them; damaged ones; names."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_gg
from hf_gg import data
from hf_gg.integrations.reading import locate, open_checkpoint
from hf_gg.integrations.reading.locate import choose


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def read(path, **kwargs):
    with open_checkpoint(str(path), **kwargs) as source:
        return {entry.name: entry.load().clone() for entry in source if entry.reason is None}, source


def write_gguf(path, tensors, kinds=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_safetensors_of_minilm():
    expected = load_file(data.minilm() / "model.safetensors")
    for path in (data.minilm(), data.minilm() / "model.safetensors"):
        found, source = read(path)
        assert source.format == "safetensors" and not source.problems
        assert set(expected) - set(found) == {"embeddings.position_ids"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert source.nbytes == sum(t.numel() * t.element_size() for t in expected.values())


def test_torch_file_of_mgm_and_its_tied_head():
    expected = torch.load(data.mgm_gpt2() / "pytorch_model.bin", map_location="cpu", weights_only=True)
    found, source = read(data.mgm_gpt2())
    assert source.format == "PyTorch"
    reasons = {entry.name: entry.reason for entry in source.entries if entry.reason}
    assert reasons["lm_head.weight"] == "the same values as transformer.wte.weight (tied)"
    assert set(expected) == set(found) | set(reasons)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_gguf_of_smollm2():
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(data.smollm2_gguf()).tensors}
    with open_checkpoint(str(data.smollm2_gguf())) as source:
        assert source.format == "GGUF" and [entry.name for entry in source] == list(expected)
        for entry in source:
            tensor = expected[entry.name]
            assert entry.stored == tensor.tensor_type.name and entry.nbytes == tensor.n_bytes
            if entry.name in ("blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
                assert np.array_equal(entry.load().numpy(), values)


def test_gguf_types(tmp_path):
    kinds = {kind.name: kind for kind in map(gguf.GGMLQuantizationType, (0, 1, 2, 3, 6, 7, 8, 30))}
    tensors = {name: torch.randn(4, 64) for name in kinds}
    write_gguf(tmp_path / "m.gguf", tensors, kinds)
    found, _ = read(tmp_path / "m.gguf")
    for name, values in found.items():
        assert values.dtype == torch.float32 and values.shape == (4, 64)
        assert (values - tensors[name]).abs().max() < 0.4, name
    assert torch.equal(found["F32"], tensors["F32"])


def test_shards(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found, source = read(tmp_path)
    expected = model.state_dict()
    assert set(found) == set(expected) and len(source.files) > 2
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_torch_shards_and_old_format(tmp_path):
    tensors = {"a.weight": torch.randn(4, 5), "b": {"c.weight": torch.randn(3, 3)}, "step": 3}
    torch.save(tensors, tmp_path / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=False)
    torch.save({"d.weight": torch.randn(2, 2).half()}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {
        n: f"pytorch_model-0000{i}-of-00002.bin" for n, i in (("a.weight", 1), ("b.c.weight", 1), ("d.weight", 2))
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    found, source = read(tmp_path)
    assert list(found) == ["a.weight", "b.c.weight", "d.weight"] and not source.problems
    assert torch.equal(found["b.c.weight"], tensors["b"]["c.weight"])


def test_adapter(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    found, _ = read(tmp_path)
    assert len(found) == 4 and all("lora_" in name for name in found)


@pytest.mark.parametrize("weight_format", ["rf8", "rf8x"])
def test_codes_of_this_package_are_decoded(tmp_path, weight_format):
    model = tiny_llama()
    hf_gg.quantize_(model, hf_gg.GGConfig(weight_format=weight_format))
    model.save_pretrained(tmp_path)
    found, source = read(tmp_path)
    module = model.model.layers[1].mlp.down_proj
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], module.dequantize(torch.float32))
    entries = {entry.name: entry for entry in source.entries}
    assert entries["model.layers.1.mlp.down_proj.weight"].stored == weight_format
    assert entries["model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert "scales of the codes" in entries["model.layers.1.mlp.down_proj.weight_scale"].reason


def test_codes_of_an_unknown_format(tmp_path):
    codes = torch.zeros(4, 4, 1, dtype=torch.uint8)
    save_file({"a.weight": codes, "a.weight_scale": torch.ones(4, 1)}, tmp_path / "model.safetensors")
    with open_checkpoint(str(tmp_path)) as source:
        entry = next(entry for entry in source if entry.name == "a.weight")
    assert entry.reason == "codes of a format that neither file nor config names, which this version cannot decode"
    with pytest.raises(ValueError, match="a.weight in model.safetensors cannot be read"):
        entry.load()


@pytest.mark.parametrize("damage", ["reserved", "scale shape", "scale nan"])
def test_damaged_codes_are_named(tmp_path, damage):
    codes, scale = torch.full((4, 4, 1), 0x41, dtype=torch.uint8), torch.ones(4, 1)
    if damage == "reserved":
        codes[2, 1, 0] = 7
    elif damage == "scale nan":
        scale[1] = torch.nan
    else:
        scale = torch.ones(3, 1)
    content = {"a.weight": codes, "a.weight_scale": scale}
    save_file(content, tmp_path / "model.safetensors", metadata={"weight_format": "rf8"})
    with open_checkpoint(str(tmp_path)) as source:
        entry = next(entry for entry in source if entry.name == "a.weight")
        with pytest.raises(ValueError, match=r"a\.weight(_scale)? in model"):
            entry.load()


def test_other_types_have_a_reason(tmp_path):
    content = {
        "integers": torch.zeros(2, 2, dtype=torch.int32),
        "flags": torch.zeros(2, 2, dtype=torch.bool),
        "narrow": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
    }
    save_file(content, tmp_path / "model.safetensors")
    with open_checkpoint(str(tmp_path)) as source:
        reasons = {entry.name: entry.reason for entry in source}
    assert reasons["integers"] == "integers (int32)" and reasons["flags"] == "booleans"
    assert "float8_e4m3fn" in reasons["narrow"] and "complex64" in reasons["complex"]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
        return tmp_path

    def shard(self, folder):
        return sorted(folder.glob("*.safetensors"))[1]

    def names(self, folder, file):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        return [name for name, shard in index.items() if shard == file.name]

    @pytest.mark.parametrize("damage", ["truncated", "missing", "garbage", "empty"])
    def test_other_shards_are_read(self, folder, damage):
        file = self.shard(folder)
        lost = self.names(folder, file)
        content = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes({"truncated": content[:-100], "garbage": b"\xff" * 500, "empty": b""}[damage])
        found, source = read(folder)
        if damage == "truncated":  # what is before the end is read
            lost = [entry.name for entry in source if entry.name in lost and entry.reason]
        assert len(found) == len(source) - len(lost) > 0 and lost
        assert len(source.problems) == 1
        problem = source.problems[0]
        assert problem.file == file.name and file.name in problem.message
        assert problem.tensor in lost and problem.tensor in problem.message
        reasons = {entry.name for entry in source if entry.reason}
        assert reasons == set(lost)

    def test_one_truncated_file_keeps_its_first_tensors(self, folder):
        file = self.shard(folder)
        whole, content = {k: v.clone() for k, v in load_file(file).items()}, file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for length in (len(content) - 1, len(content) - 100, start + 7000, start):
            file.write_bytes(content[:length])
            found, source = read(file)
            assert [p.message.startswith(f"{file.name} is truncated: ") for p in source.problems] == [True]
            assert len(found) + sum(entry.reason is not None for entry in source) == len(whole)
            assert all(torch.equal(found[name], whole[name]) for name in found)
            assert len(found) < len(whole) and (length == start) == (not found)
        file.write_bytes(content[: start - 1])
        with pytest.raises(ValueError, match=f"{file.name} is not a readable safetensors file"):
            open_checkpoint(str(file))

    def test_index_names_what_is_not_there(self, folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.ghost.weight"] = self.shard(folder).name
        path.write_text(json.dumps(index))
        _, source = read(folder)
        assert source.problems[0].tensor == "model.ghost.weight"

    @pytest.mark.parametrize(
        "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}',
                  '{"weight_map": {}}', '{"weight_map": {"a": "/etc/passwd"}}'],
    )  # fmt: skip
    def test_index_that_is_none(self, folder, index):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"index\.json"):
            open_checkpoint(str(folder))

    def test_truncated_gguf_keeps_its_first_tensors(self, tmp_path):
        path = tmp_path / "m.gguf"
        write_gguf(path, {"a.weight": torch.randn(8, 32), "b.weight": torch.randn(8, 32)})
        path.write_bytes(path.read_bytes()[:-500])
        with open_checkpoint(str(path)) as source:
            first, second = source
            assert first.load().shape == (8, 32)
            with pytest.raises(ValueError, match=r"b\.weight in m\.gguf ends at byte .* truncated"):
                second.load()

    def test_pickled_code_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"a": torch.ones(2), "b": Bomb()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a readable PyTorch file"):
            open_checkpoint(str(tmp_path))
        assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(4, 32), "b.weight": torch.randn(2, 32).half()}
    save_file(tensors, folder / "m.safetensors")
    torch.save(tensors, folder / "m.bin")
    write_gguf(folder / "m.gguf", {"a.weight": tensors["a.weight"]}, {"a.weight": gguf.GGMLQuantizationType.Q8_0})
    return {path.suffix: path.read_bytes() for path in folder.glob("m.*")}


@pytest.mark.parametrize("offsets", [[512.64], [512, "640"], [0, True], None, "ab", [1, 2, 3], [512, 1e3]])
def test_a_bad_entry_behind_a_truncated_one(tmp_path, offsets):
    """Of a truncated file all entries are checked, also those after the first that is cut off."""
    entries = {
        "a": {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]},
        "b": {"dtype": "F16", "shape": [2, 32], "data_offsets": offsets},
    }
    header = json.dumps(entries).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with (
        pytest.raises(ValueError, match=r"m\.safetensors .*entry of b has no data_offsets"),
        open_checkpoint(str(tmp_path / "m.safetensors")),
    ):
        pass


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf"])
@settings(max_examples=120, deadline=None)
@given(draw=st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, samples, suffix, draw):
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(samples[suffix])
    if draw.draw(st.booleans()):
        content = content[: draw.draw(st.integers(0, len(content)))]
    for _ in range(draw.draw(st.integers(0, 4))):
        if content:
            content[draw.draw(st.integers(0, min(len(content), 600) - 1))] = draw.draw(st.integers(0, 255))
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        with open_checkpoint(str(path)) as source:
            for entry in source:
                if entry.reason is None:
                    tensor = entry.load()
                    assert tuple(tensor.shape) == entry.shape
    except (ValueError, NotImplementedError):
        pass


def test_huge_counts_take_no_time_or_memory(tmp_path):
    for number, content in enumerate((
        struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 2**63),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**62),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQQIQ", 1, b"t", 2, 2**40, 2**40, 0, 0),
    )):  # fmt: skip
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name), open_checkpoint(str(path)) as source:
            next(iter(source)).load()


class TestLocate:
    def test_rules(self):
        index, shards = "model.safetensors.index.json", [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert choose([index, *shards, "config.json"], None, "x") == [index]
        assert choose(["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"], None, "x") == [
            "model.safetensors"
        ]
        assert choose(["adapter_model.safetensors", "training_args.bin"], None, "x") == ["adapter_model.safetensors"]
        parts = ["m-Q4-00001-of-00002.gguf", "m-Q4-00002-of-00002.gguf"]
        assert choose(parts, None, "x") == parts
        assert choose(["unet/a.safetensors", "vae/b.safetensors"], "unet/*", "x") == ["unet/a.safetensors"]
        assert choose(["m-Q4.gguf", "m-Q8.gguf"], "*Q8.gguf", "x") == ["m-Q8.gguf"]

    def test_choices_and_nothing(self):
        with pytest.raises(ValueError, match="several checkpoints.*--file"):
            choose(["m-Q4.gguf", "m-Q8.gguf"], None, "x")
        with pytest.raises(ValueError, match="x has no weights.*training_args"):
            choose(["training_args.bin", "config.json"], None, "x")
        with pytest.raises(ValueError, match=r"no weights in a file '\*Q2\*'"):
            choose(["m-Q4.gguf"], "*Q2*", "x")

    @pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "nothing.gguf", "a/b/c", "~/nothing"])
    def test_a_path_is_no_hub_name(self, name):
        with pytest.raises(ValueError, match="There is no file or folder"):
            locate(name)

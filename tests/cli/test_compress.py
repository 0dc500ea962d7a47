"""`hf-gg compress`: what it writes opens with the stock call, is what the table says, and is whole or not there."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.utils import logging

from hf_gg import GGConfig, coding, quantize_
from hf_gg.cli import main
from hf_gg.cli.compress import step
from hf_gg.coding.levels import is_levels
from hf_gg.integrations.saving import lock_folder


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def _restore_logging():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder as a training run leaves it."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "rng_state.pth").write_bytes(b"state")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    return folder


def on_grid(model: torch.nn.Module, grid: float) -> torch.nn.Module:
    """Round a model's matrices to a grid, as BackSlash does; zeros keep their signs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((parameter / grid).round() * grid)
    return model


def run(*words, code: int = 0) -> None:
    assert main(["compress", *map(str, words)]) == code


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def left_behind(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


# --- quantized ---


@pytest.mark.parametrize("options", [[], ["--format", "rf8x", "--coding", "eg0"], ["--format", "grid"]])
def test_it_is_quantize_and_save(source, tmp_path, capsys, options):
    run(source, tmp_path / "out", *options)
    weight_format = options[1] if options else "rf8"
    wanted = AutoModelForCausalLM.from_pretrained(source)
    quantize_(wanted, GGConfig(weight_format=weight_format))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["coding"] == ("eg0" if "eg0" in options else "rans") and config["weight_format"] == weight_format
    assert "self_attn.q_proj" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "extra" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "optimizer.pt").exists() and not (tmp_path / "out" / "rng_state.pth").exists()
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES, tie_word_embeddings=True), MixtralConfig(**SIZES)])
def test_the_table_counts_every_byte(tmp_path, capsys, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--json")
    table = json.loads(capsys.readouterr().out)
    files = stored(tmp_path / "out")
    assert table["total"]["bytes_after"] == sum(t.numel() * t.element_size() for t in files.values())
    assert table["total"]["bytes_after"] == sum(kind["bytes_after"] for kind in table["kinds"])
    assert table["total"]["bytes_before"] == sum(t.numel() * 4 for t in stored(tmp_path / "in").values())
    coded = [kind for kind in table["kinds"] if kind["bits"] is not None]
    numbers = sum(kind["numbers"] for kind in coded)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert numbers == sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    for kind in coded:
        assert kind["entropy"] < kind["bits"] < 12 and 25 < kind["snr"] < 35, kind


def test_snr_is_that_of_the_weights(source, tmp_path, capsys):
    run(source, tmp_path / "out", "--json")
    table = json.loads(capsys.readouterr().out)
    wanted = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    signal = noise = 0.0
    for name, parameter in wanted.named_parameters():
        if "_proj" in name:
            signal += float(parameter.detach().double().square().sum())
            noise += float((model.get_parameter(name) - parameter).detach().double().square().sum())
    assert table["total"]["snr"] == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


@pytest.mark.parametrize(("option", "value"), [("--target-bits", 6.0), ("--target-snr", 30.0)])
def test_targets(source, tmp_path, capsys, option, value):
    run(source, tmp_path / "out", option, value, "--json")
    total = json.loads(capsys.readouterr().out)["total"]
    if option == "--target-snr":
        assert total["snr"] == pytest.approx(value, abs=0.3)
    else:
        # tables of frequencies weigh on matrices as small as these
        assert value - 0.3 < total["bits"] < value + 1.2


def test_quantized_models_are_only_coded(source, tmp_path, capsys):
    quantize_(AutoModelForCausalLM.from_pretrained(source)).save_pretrained(tmp_path / "rf8")
    run(tmp_path / "rf8", tmp_path / "out", "--coding", "eg0")
    capsys.readouterr()
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("rf8", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(map(coding.is_coded, stored(tmp_path / "out").values()))
    run(tmp_path / "rf8", tmp_path / "no", "--target-bits", 5, code=1)
    assert "holds rf8 codes already, and quantizing twice loses twice" in capsys.readouterr().err


# --- floats on a grid ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "gpt2"])
def test_lossless_grid(tmp_path, capsys, kind, dtype):
    config = {
        "llama": LlamaConfig(**SIZES),
        "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
        "gpt2": GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    }[kind]
    grid = 2**-8 if dtype == torch.bfloat16 else 2**-13
    model = on_grid(AutoModelForCausalLM.from_config(config), grid).to(dtype).eval()
    model.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    before = stored(tmp_path / "in")
    assert any(bool(((t == 0) & torch.signbit(t)).any()) for t in before.values()), "no negative zero to keep"
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", grid)
    assert "exact" in capsys.readouterr().out
    after = stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(is_levels(after[name]) == (tensor.ndim > 1) for name, tensor in before.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded) is type(model) and not hasattr(loaded, "hf_quantizer")
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded.config, "quantization_config")
    wanted = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert bits_of(tensor) == bits_of(wanted[name]), name
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    assert torch.equal(loaded(TOKENS).logits, stock(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "plain")
    assert {k: bits_of(v) for k, v in stored(tmp_path / "plain").items()} == {k: bits_of(v) for k, v in before.items()}


def test_lossless_index(tmp_path, capsys):
    model = on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10)
    model.save_pretrained(tmp_path / "in", max_shard_size="60KB")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = stored(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("size", ["60KB", "5GB"])
def test_lossless_takes_the_files_that_a_load_would_take(tmp_path, capsys, size):
    model = on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10)
    model.save_pretrained(tmp_path / "in", max_shard_size=size)
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    leftovers = ["model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors", "model-00009-of-00009.safetensors"]
    for name in [*leftovers, "consolidated.safetensors", "pytorch_model.bin"]:
        save_file(other, tmp_path / "in" / name)
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10", "--json")
    assert json.loads(capsys.readouterr().out)["total"]["numbers"] == sum(p.numel() for p in model.parameters())
    assert not set(leftovers) & {file.name for file in (tmp_path / "out").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(bits_of(loaded[name]) == bits_of(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "names model-00001-of-00002.safetensors, which"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "is no index of weights"),
        ({"weight_map": {}}, "is no index of weights"),
        ([], "is no index of weights"),
    ],
)
def test_lossless_index_that_does_not_fit(tmp_path, capsys, index, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "elsewhere.safetensors")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "1", code=1)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_lossless_tensor_in_two_files(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.zeros(2, 2)}, tmp_path / "in" / name)
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "1", code=1)
    assert "w is in a.safetensors and in b.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--lossless-grid", "2^-10"]])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files(tmp_path, capsys, name, options):
    model = on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10)
    model.config.save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / name
    if name.endswith(".bin"):
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    for content in (path.read_bytes()[:50_000], b"no weights at all"):
        path.write_bytes(content)
        run(tmp_path / "in", tmp_path / "out", *options, code=1)
        error = capsys.readouterr().err
        assert error.startswith("hf-gg compress: error: ") and error.count("\n") == 1 and name in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_lossless_bin_of_the_old_kind(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    value = torch.arange(-200.0, 200).view(20, 20) / 8
    torch.save({"w": value}, tmp_path / "in" / "old.bin", _use_new_zipfile_serialization=False)
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "1/8")
    assert is_levels(stored(tmp_path / "out")["w"])


def test_lossless_model_to_disk_offload(tmp_path, capsys):
    pytest.importorskip("accelerate")
    model = on_grid(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), 2**-10).eval()
    model.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10")
    devices = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.0": "disk", "model.layers.1": "cpu"}
    devices.update({"model.norm": "cpu", "model.rotary_emb": "cpu"})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_off_the_grid(tmp_path, capsys):
    model = on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    with torch.no_grad():
        model.get_parameter(names[0])[3, 4] += 0.2 * 2**-10
        model.get_parameter(names[1])[1, 2] += 0.4 * 2**-10
    model.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10", code=1)
    error = capsys.readouterr().err
    assert f"{names[1]} is not on the grid of 0.000976562: a number lies 0.000391 beside it" in error
    assert "1 others are not either" in error
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)

    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10", "--round", "--json")
    captured = capsys.readouterr()
    assert f"{names[1]} was rounded to the grid: changed by 0.000391 at most" in captured.err
    assert json.loads(captured.out)["total"]["snr"] > 60
    wanted = on_grid(model, 2**-10).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)

    run(tmp_path / "in", tmp_path / "kept", "--lossless-grid", "2^-10", "--keep", "mlp")
    assert not any(is_levels(tensor) for name, tensor in stored(tmp_path / "kept").items() if "mlp" in name)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_bare_files(tmp_path, capsys, suffix):
    """Tensors without a model's config."""
    from hf_gg.integrations.lossless import read_files

    tensors = {"a": (torch.randn(30, 40) * 20).round() / 8, "bias": torch.randn(7), "count": torch.arange(5)}
    file = tmp_path / f"checkpoint{suffix}"
    if suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    run(file, tmp_path / "out", "--lossless-grid", "1/8")
    [name] = [path.name for path in (tmp_path / "out").iterdir()]
    assert name == "model.safetensors"
    content = stored(tmp_path / "out")
    assert is_levels(content["a"]) and torch.equal(content["bias"], tensors["bias"])
    back = read_files(tmp_path / "out")
    assert back.keys() == tensors.keys() and all(bits_of(back[k]) == bits_of(tensors[k]) for k in tensors)
    run(tmp_path / "out", tmp_path / "twice", "--lossless-grid", "1/8", code=1)
    assert "a is coded or quantized already" in capsys.readouterr().err


def test_a_pickle_that_runs_code_is_not_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"a": Trap()}, tmp_path / "checkpoint.bin")
    with pytest.raises(ValueError, match="holds other objects, which are not loaded"):
        main(["compress", str(tmp_path / "checkpoint.bin"), str(tmp_path / "out"), "--lossless-grid", "1", "--debug"])
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "out").exists()


def test_lossless_model_asked_for_something_else(tmp_path, capsys):
    on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10")
    with (
        pytest.warns(UserWarning, match="You passed `quantization_config`"),
        pytest.raises(ValueError, match="holds coded floats, and rf8x was asked for: load it without a config"),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=GGConfig("rf8x"))
    for call in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "in", quantization_config=GGConfig("none")),
        lambda: quantize_(LlamaForCausalLM(LlamaConfig(**SIZES)), GGConfig("none")),
    ):
        with pytest.raises(ValueError, match='weight_format "none" is that of checkpoints which'):
            call()
    # what it says works
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantize_(model, GGConfig("rf8x", coding="rans"))
    model.save_pretrained(tmp_path / "rf8x")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rf8x").is_quantized


def test_damaged_lossless_checkpoint(tmp_path, capsys):
    on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "--lossless-grid", "2^-10")
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for change in (
        lambda x: x[:-1],
        lambda x: x ^ (torch.arange(x.numel()) == x.numel() - 9).to(torch.uint8),
        lambda x: x[:5],
    ):
        save_file({**whole, name: change(whole[name]).contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=name):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- folders ---


def test_a_folder_with_something_in_it(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    run(source, out)  # empty
    before = (out / "config.json").read_text()
    run(source, out, "--format", "rf8x", code=1)
    assert "exists and is not empty" in capsys.readouterr().err
    assert (out / "config.json").read_text() == before
    (out / "other").write_text("goes")
    run(source, out, "--format", "rf8x", "--overwrite")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["weight_format"] == "rf8x"
    assert not (out / "other").exists() and not left_behind(tmp_path)
    run(source, source / "config.json", code=1)
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--lossless-grid", "2^-10"]])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys, options):
    from transformers import modeling_utils

    from hf_gg.integrations import lossless

    def no_space(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", *options)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(modeling_utils, "safe_save_file", no_space)
    monkeypatch.setattr(lossless, "save_file", no_space)
    run(tmp_path / "in", tmp_path / "new", *options, code=1)
    assert "No space left" in capsys.readouterr().err
    run(tmp_path / "in", tmp_path / "out", "--overwrite", *options, code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("options", [[], ["--lossless-grid", "2^-10"]])
def test_a_file_that_cannot_be_written_whole(tmp_path, capsys, options):
    """The library of the files has errors of its own kind."""
    on_grid(LlamaForCausalLM(LlamaConfig(**SIZES)), 2**-10).save_pretrained(tmp_path / "in")
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        run(tmp_path / "in", tmp_path / "out", *options, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.startswith("hf-gg compress: error: ") and error.count("\n") == 1 and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_killed_process_left(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    for name, moved in (("a", False), ("b", True)):
        work = tmp_path / f".out.new-{name}"
        (work / "new").mkdir(parents=True)
        (work / "new" / "model.safetensors").write_bytes(b"half")
        if moved:  # killed between two renames: this is the only copy
            (tmp_path / "out").rename(work / "old")
    before = (tmp_path / ".out.new-b" / "old" / "model.safetensors").read_bytes()
    alive = tmp_path / ".out.new-c"
    alive.mkdir()
    lock = lock_folder(str(alive))
    run(source, tmp_path / "out", code=1)
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert left_behind(tmp_path) == [alive.name]
    os.close(lock)
    run(source, tmp_path / "out", "--overwrite", "--coding", "eg0")
    assert not left_behind(tmp_path)


def test_over_itself(tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "model", "--overwrite")
    wanted = quantize_(model).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nothing", "OUT"], "./nothing does not exist"),
        (["EMPTY", "OUT"], "has no config.json"),
        (["EMPTY", "OUT", "--lossless-grid", "1"], "holds no weights"),
        (["SOURCE", "OUT", "--round"], "--round goes with --lossless-grid"),
        (["SOURCE", "OUT", "--lossless-grid", "1", "--format", "rf8"], "do not go with it"),
        (["SOURCE", "OUT", "--lossless-grid", "1", "--keep", "("], "'(' is no regular expression"),
        (["SOURCE", "OUT", "--format", "rf9"], "Unknown weight format 'rf9'"),
        (["SOURCE", "OUT", "--format", "rf8", "--target-bits", "5"], "target_bits is of the grid"),
        (["SOURCE", "OUT", "--target-bits", "nan"], "target_bits must be a positive number"),
        (["FILE", "OUT"], "is no model"),
        (["SOURCE", "OUT", "--max-shard-size", "much"], "much"),
    ],
)
def test_bad_arguments(source, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    names = {"OUT": tmp_path / "out", "SOURCE": source, "EMPTY": tmp_path / "empty", "FILE": source / "config.json"}
    words = [names.get(word, word) for word in words]
    run(*words, code=1)
    error = capsys.readouterr().err
    assert error.startswith("hf-gg compress: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists() and not left_behind(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2^-13", 2**-13),
        ("2**-3", 0.125),
        ("1/8192", 1 / 8192),
        ("0.0001220703125", 2**-13),
        ("1e-3", 1e-3),
        ("2", 2.0),
    ],
)
def test_steps(text, value):
    assert step(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "3^2", "1/0", "2^x", "2^-9999", "2^9999", "1/2/3"])
def test_no_steps(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a step is a positive number"):
        step(text)
    assert main(["compress", "a", "b", "--lossless-grid=" + text]) == 2


def test_no_progress_bar_in_a_pipe(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    assert capsys.readouterr().err == ""
    assert not sys.stderr.isatty()


def test_names_on_a_hub(tmp_path, source, monkeypatch, capsys):
    from hf_gg.integrations import folders

    asked = []

    def snapshot_download(name, **kwargs):
        asked.append(name)
        return str(source)

    monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
    run("user/model", tmp_path / "out")
    assert asked == ["user/model"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_quantized


@pytest.mark.slow
def test_gguf(tmp_path, capsys):
    pytest.importorskip("gguf")
    from hf_gg.data import smollm2_gguf

    run(smollm2_gguf(), tmp_path / "out", "--json")
    table = json.loads(capsys.readouterr().out)
    assert table["total"]["bits"] < 6.6
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_quantized


def test_a_place_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["compress", str(source), str(tmp_path / "file" / "out")]) == 1
    message = capsys.readouterr().err
    assert "no folder can be made in" in message and "give another place" in message and message.count("\n") == 1

"""Bad input gives a clear error that names the tensor or the key, and a save that dies leaves what stood there."""

from __future__ import annotations

import copy
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, quiet, same_tensors, stored, weight_files
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_gg import GGConfig, get_format, quantize_
from hf_gg.integrations.selection import quantized_modules


LLAMA, MIXTRAL, GPT2 = FAMILIES["llama"], FAMILIES["mixtral"], FAMILIES["gpt2"]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.down_proj"  # stored under another name
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folders `NAME` in full precision and `NAME-rf8`."""
    root = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        for name, family in (("llama", LLAMA), ("mixtral", MIXTRAL), ("gpt2", GPT2)):
            family.model().save_pretrained(root / name)
            quantize_(family.model()).save_pretrained(root / f"{name}-rf8")
    return root


@pytest.fixture
def damaged(checkpoints, tmp_path) -> Callable[..., Path]:
    """Make a copy of a checkpoint with other tensors or another config."""

    def make(source: str, tensors: dict | None = None, drop: tuple[str, ...] = (), **config) -> Path:
        """`tensors`: by name, what to make of one. `config`: keys of the quantization config."""
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoints / source, folder)
        [file] = weight_files(folder)
        content = load_file(file)
        for name in content:
            content[name] = (tensors or {}).get(name, lambda x: x)(content[name])
        assert set(drop) | set(tensors or {}) <= set(content)
        save_file({k: v.contiguous() for k, v in content.items() if k not in drop}, file, metadata={"format": "pt"})
        if config:
            text = json.loads((folder / "config.json").read_text())
            text.setdefault("quantization_config", {}).update(config)
            (folder / "config.json").write_text(json.dumps(text))
        return folder

    return make


def load(folder: Path, family=LLAMA, **kwargs):
    return family.auto.from_pretrained(folder, **kwargs)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[5] = value
        return tensor

    return change


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# --- weights in full precision ---


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_or_infinity_at_load(damaged, value, dtype):
    folder = damaged("llama", {WEIGHT: lambda x: with_value(value)(x.to(dtype))})
    before = content(folder)
    with pytest.raises(ValueError, match=f"{WEIGHT}: .*NaN or infinity"):
        load(folder, quantization_config=GGConfig())
    assert content(folder) == before


def test_every_bad_weight_is_named(damaged):
    other = "model.layers.1.mlp.up_proj.weight"
    folder = damaged("llama", {WEIGHT: with_value(NAN), other: with_value(INF)})
    with pytest.raises(ValueError, match="NaN") as error:
        load(folder, quantization_config=GGConfig())
    assert WEIGHT in str(error.value)
    assert other in str(error.value)


def test_nan_in_experts_and_in_conv1d_at_load(damaged):
    folder = damaged("mixtral", {"model.layers.1.block_sparse_moe.experts.2.w2.weight": with_value(NAN)})
    with pytest.raises(ValueError, match=f"{EXPERTS}: .*NaN"):
        load(folder, MIXTRAL, quantization_config=GGConfig())
    shutil.rmtree(folder)
    folder = damaged("gpt2", {"transformer.h.1.mlp.c_fc.weight": with_value(INF)})
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight: .*NaN"):
        load(folder, GPT2, quantization_config=GGConfig())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("family", "name"), [(LLAMA, WEIGHT), (MIXTRAL, EXPERTS), (LLAMA, "lm_head.weight")])
def test_nan_or_infinity_in_place_changes_nothing(family, name, value):
    model = family.model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    modules, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        quantize_(model, GGConfig(quantize_lm_head=True))
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_nan_where_nothing_is_quantized_is_not_looked_for(damaged):
    folder = damaged("llama", {"lm_head.weight": with_value(NAN)})
    assert load(folder, quantization_config=GGConfig()).lm_head.weight.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_weights_that_were_quantized_before(damaged, dtype):
    folder = damaged("llama", {WEIGHT: lambda x: (x * 100).to(dtype)})
    with pytest.raises(ValueError, match=f"{WEIGHT} in model.safetensors is stored as .*quantized already"):
        load(folder, quantization_config=GGConfig())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_modules_that_were_quantized_before(dtype):
    model = LLAMA.model()
    module = model.get_submodule(WEIGHT.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"{WEIGHT} is torch.{str(dtype)[6:]}"):
        quantize_(model)
    assert not any(True for _ in quantized_modules(model))


@pytest.mark.parametrize("cut", [lambda x: x[:60], lambda x: x[:, :60], lambda x: x[:, 0], lambda x: x.T])
def test_weights_of_another_shape(damaged, cut, caplog):
    name = "model.layers.0.mlp.up_proj.weight"
    assert_mismatch(damaged("llama", {name: cut}), name, caplog, quantization_config=GGConfig())


def test_experts_of_another_shape(damaged, caplog):
    names = {f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight": lambda x: x[:, :64] for i in range(4)}
    assert_mismatch(damaged("mixtral", names), EXPERTS, caplog, MIXTRAL, quantization_config=GGConfig())


def assert_mismatch(folder: Path, name: str, caplog, family=LLAMA, **kwargs) -> None:
    """Transformers' own error, with the name in its report."""
    transformers.utils.logging.set_verbosity_warning()
    with (
        caplog.at_level(logging.WARNING),
        listening_to_transformers(caplog),
        pytest.raises(RuntimeError, match="ignore_mismatched_sizes"),
    ):
        load(folder, family, **kwargs)
    # layers of one kind are a line of the report: `layers.{0, 1}` or `layers.0`
    assert name.rpartition(".layers.")[2][2:] in caplog.text
    assert "MISMATCH" in caplog.text


class listening_to_transformers:
    """Transformers' loggers do not reach the root logger by themselves."""

    def __init__(self, caplog):
        self.handler, self.logger = caplog.handler, logging.getLogger("transformers")

    def __enter__(self):
        self.logger.addHandler(self.handler)

    def __exit__(self, *exception):
        self.logger.removeHandler(self.handler)


def test_a_model_quantized_by_another_method(damaged):
    folder = damaged("llama", quant_method="fp8", weight_block_size=[32, 32])
    with pytest.raises(ValueError, match="FineGrainedFP8Config but you are passing a GGConfig"):
        load(folder, quantization_config=GGConfig())
    shutil.rmtree(folder)
    folder = damaged("llama", quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(ValueError, match="BitsAndBytesConfig but you are passing a GGConfig"):
        load(folder, quantization_config=GGConfig())

    model = LLAMA.model()
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    with pytest.raises(ValueError, match=r"quantized already \(method 'bitsandbytes'\)"):
        quantize_(model)


def test_a_model_without_weights_in_memory():
    with torch.device("meta"):
        model = LLAMA.auto.from_config(LLAMA.config())
    with pytest.raises(ValueError, match=f"{WEIGHT} is on the meta device"):
        quantize_(model)


# --- quantizing twice ---


def test_quantizing_twice_in_place():
    model = quantize_(LLAMA.model())
    before = LLAMA.logits(model)
    with pytest.raises(ValueError, match=r"quantized already \(method 'gg'\)"):
        quantize_(model, GGConfig("rf8x"))
    assert torch.equal(LLAMA.logits(model), before)
    model.dequantize()
    quantize_(model)


def test_a_quantized_layer_in_a_model_counts():
    from hf_gg import RF8Linear

    model = LLAMA.model()
    model.model.layers[1].mlp.up_proj = RF8Linear.from_linear(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model)


def test_another_format_than_the_checkpoint_holds(checkpoints):
    with pytest.raises(ValueError, match="holds rf8 codes, and rf8x was asked for"):
        load(checkpoints / "llama-rf8", quantization_config=GGConfig("rf8x"))
    load(checkpoints / "llama-rf8", quantization_config=GGConfig("rf8"))
    load(checkpoints / "llama-rf8", quantization_config=GGConfig())


# --- codes and scales ---


@pytest.mark.parametrize("gone", ["", "_scale"])
@pytest.mark.parametrize(
    ("source", "family", "stored_name", "name"),
    [
        ("llama-rf8", LLAMA, WEIGHT, WEIGHT),
        ("gpt2-rf8", GPT2, "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        ("mixtral-rf8", MIXTRAL, "model.layers.1.block_sparse_moe.experts.down_proj", EXPERTS),
    ],
)
def test_codes_or_scales_missing(damaged, source, family, stored_name, name, gone):
    folder = damaged(source, drop=(f"{stored_name}{gone}",))
    with pytest.raises(ValueError, match=f"{name}{gone} is missing from the checkpoint"):
        load(folder, family)


def test_experts_missing(damaged):
    name = "model.layers.1.block_sparse_moe.experts.down_proj"
    folder = damaged("mixtral-rf8", drop=(name, f"{name}_scale"))
    with pytest.raises(ValueError, match=f"{EXPERTS} is missing from the checkpoint"):
        load(folder, MIXTRAL)


@pytest.mark.parametrize("code", get_format("rf8").reserved[::5])
def test_reserved_codes(damaged, code):
    folder = damaged("llama-rf8", {WEIGHT: with_value(code)})
    with pytest.raises(ValueError, match=f"{WEIGHT}: code 0x{code:02x} at flat index 5 is a reserved state of rf8"):
        load(folder)


def test_reserved_codes_in_experts(damaged):
    folder = damaged("mixtral-rf8", {"model.layers.1.block_sparse_moe.experts.down_proj": with_value(0x07)})
    with pytest.raises(ValueError, match=f"{EXPERTS}: code 0x07 .*reserved"):
        load(folder, MIXTRAL)


@pytest.mark.parametrize(
    "change", [lambda x: x[:60], lambda x: x[:, :60], lambda x: x.transpose(0, 1)[:30], lambda x: x.repeat(1, 1, 2)]
)
def test_codes_of_another_shape(damaged, change, caplog):
    assert_mismatch(damaged("llama-rf8", {WEIGHT: change}), WEIGHT, caplog)


@pytest.mark.parametrize("change", [lambda x: x[:60], lambda x: x[:1], lambda x: x[:, 0], lambda x: x.T])
def test_scales_of_another_shape(damaged, change, caplog):
    assert_mismatch(damaged("llama-rf8", {f"{WEIGHT}_scale": change}), f"{WEIGHT}_scale", caplog)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.int32, torch.bool])
def test_codes_of_another_dtype(damaged, dtype):
    folder = damaged("llama-rf8", {WEIGHT: lambda x: x.to(dtype)})
    with pytest.raises(ValueError, match=f"{WEIGHT} is stored as .* it holds rf8 codes"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8])
def test_scales_of_another_dtype(damaged, dtype):
    folder = damaged("llama-rf8", {f"{WEIGHT}_scale": lambda x: x.to(dtype)})
    with pytest.raises(ValueError, match=f"{WEIGHT}_scale is stored as .*, and scales are F32"):
        load(folder)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, NAN, INF, -INF])
def test_scales_that_are_no_positive_numbers(damaged, value):
    folder = damaged("llama-rf8", {f"{WEIGHT}_scale": with_value(value)})
    with pytest.raises(ValueError, match=f"{WEIGHT}_scale holds a scale that is no positive number"):
        load(folder)


def test_scales_of_experts_that_are_no_positive_numbers(damaged):
    folder = damaged("mixtral-rf8", {"model.layers.1.block_sparse_moe.experts.down_proj_scale": with_value(0.0)})
    with pytest.raises(ValueError, match=f"{EXPERTS}_scale holds a scale that is no positive number"):
        load(folder, MIXTRAL)


def test_codes_of_another_format(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "llama-rf8", tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["quantization_config"]["weight_format"] = "rf8x"
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors holds rf8 codes, and the config says rf8x"):
        load(tmp_path / "mixed")


def test_codes_without_their_config(checkpoints, tmp_path):
    """What stock Transformers, which does not know the method, makes of a checkpoint."""
    shutil.copytree(checkpoints / "llama-rf8", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "bare")
    with pytest.raises(ValueError, match="is stored as U8: the model is quantized already"):
        load(tmp_path / "bare", quantization_config=GGConfig())


# --- configs ---

BAD_VALUES = [
    ("weight_format", "rf9", "Unknown weight format 'rf9'"),
    ("weight_format", ["rf8"], "Unknown weight format"),
    ("scale", "column", "Unknown scale 'column'"),
    ("scale", None, "Unknown scale None"),
    ("rounding", "up", "Unknown rounding 'up'"),
    ("backend", "tpu", "Unknown backend 'tpu'"),
    ("format_version", 3, "format_version 3 is not one that this hf_gg reads"),
    ("format_version", 0, "format_version 0"),
    ("format_version", "2", "format_version '2'"),
    ("format_version", True, "format_version True"),
    ("modules_to_not_convert", "lm_head", "modules_to_not_convert must be a list"),
    ("modules_to_not_convert", 5, "modules_to_not_convert must be a list"),
    ("modules_to_not_convert", {"lm_head": 1}, "modules_to_not_convert must be a list"),
    ("modules_to_not_convert", [1], "modules_to_not_convert must be a list"),
    ("modules_to_not_convert", ["("], r"modules_to_not_convert: '\(' is neither a name nor a regular expression"),
    ("quantize_embeddings", 1, "quantize_embeddings must be True or False"),
    ("quantize_lm_head", "yes", "quantize_lm_head must be True or False"),
    ("experts", None, "experts must be True or False"),
    ("dequantize", 0, "dequantize must be True or False"),
    ("group_size", 128, "Unknown GGConfig key 'group_size': the keys are weight_format, "),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_config_values(checkpoints, tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        GGConfig(**{key: value})
    shutil.copytree(checkpoints / "llama-rf8", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


def test_config_of_another_method():
    with pytest.raises(ValueError, match="quant_method 'gg', got 'fp8'"):
        GGConfig(quant_method="fp8")


def test_a_backend_that_cannot_run_here(checkpoints):
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    model = load(checkpoints / "llama-rf8", quantization_config=GGConfig(backend="triton"))
    with pytest.raises((ValueError, RuntimeError), match="backend 'triton'"):
        LLAMA.logits(model)


# --- files ---


def test_truncated_shards(checkpoints, tmp_path):
    for source, kwargs in (("llama", {"quantization_config": GGConfig()}), ("llama-rf8", {})):
        folder = tmp_path / source
        shutil.copytree(checkpoints / source, folder)
        [file] = weight_files(folder)
        data = file.read_bytes()
        header = 8 + struct.unpack("<Q", data[:8])[0]
        for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            with pytest.raises(ValueError, match=r"model\.safetensors is (truncated|not a readable safetensors file)"):
                load(folder, **kwargs)


def test_shards_that_are_not_there(checkpoints, tmp_path):
    load(checkpoints / "llama-rf8").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = weight_files(tmp_path)[1]
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(tmp_path)
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        load(tmp_path)
    shard.write_bytes(data)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-30])
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        load(tmp_path)


def test_a_pickled_checkpoint_cut_short(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "llama", tmp_path / "bin")
    [file] = weight_files(tmp_path / "bin")
    target = tmp_path / "bin" / "pytorch_model.bin"
    torch.save(load_file(file), target)
    file.unlink()
    target.write_bytes(target.read_bytes()[:-1000])
    with pytest.raises((RuntimeError, OSError), match=r"PytorchStreamReader|pytorch_model\.bin"):
        load(tmp_path / "bin", quantization_config=GGConfig())


class Smallest:
    """The checkpoint of a model of one layer, to be damaged and loaded."""

    def __init__(self, folder: Path):
        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
        model = quantize_(LLAMA.auto.from_config(config).eval())
        model.save_pretrained(folder)
        self.folder, self.logits = folder, LLAMA.logits(model)
        self.data = weight_files(folder)[0].read_bytes()
        self.header_size = struct.unpack("<Q", self.data[:8])[0]
        self.header = json.loads(self.data[8 : 8 + self.header_size])
        self.outcomes = {"refused": 0, "reported": 0, "the same": 0}

    def check(self, data: bytes) -> None:
        """A damaged file is refused, or Transformers reports the tensors that it lost, or nothing was lost."""
        [file] = weight_files(self.folder)
        # a new file: the loaded model may be mapped from the one before
        (self.folder / "other").write_bytes(data)
        os.replace(self.folder / "other", file)
        try:
            model, info = load(self.folder, output_loading_info=True)
        except (ValueError, RuntimeError, OSError) as error:
            outcome = "refused" if len(str(error)) > 20 else "refused without a word"
        else:
            reported = info["missing_keys"] or info["unexpected_keys"]
            same = torch.equal(LLAMA.logits(model), self.logits)
            outcome = "reported" if reported else "the same" if same else "garbage"
        assert outcome in self.outcomes
        self.outcomes[outcome] += 1


@pytest.fixture
def smallest(tmp_path):
    smallest = Smallest(tmp_path)
    smallest.check(smallest.data)
    assert smallest.outcomes["the same"] == 1
    yield smallest
    assert smallest.outcomes["refused"] > 50


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@FUZZ
@given(data=st.data())
def test_damaged_header_bytes(smallest, data):
    end = 8 + smallest.header_size
    changes = data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1, max_size=4))
    damaged = bytearray(smallest.data)
    for position, byte in changes:
        damaged[position] = byte
    smallest.check(bytes(damaged))


@FUZZ
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 4000), cut=st.integers(0, 200))
def test_damaged_header_lengths(smallest, length, cut):
    damaged = struct.pack("<Q", length) + smallest.data[8:]
    smallest.check(damaged[: len(damaged) - cut])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_damaged_header_entries(smallest, data):
    header = copy.deepcopy(smallest.header)
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["", *sorted(header[name])]))
    if key and isinstance(header[name][key], list) and data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(header[name][key]) - 1))
        header[name][key][position] = data.draw(JSON)
    elif key == "dtype" and data.draw(st.booleans()):
        header[name][key] = data.draw(st.sampled_from(["U8", "I8", "F32", "F16", "BF16", "F8_E4M3", "BOOL", "I64"]))
    elif key:
        header[name][key] = data.draw(JSON)
    elif data.draw(st.booleans()):
        header[name] = data.draw(JSON)
    else:
        del header[name]
    text = json.dumps(header).encode()
    smallest.check(struct.pack("<Q", len(text)) + text + smallest.data[8 + smallest.header_size :])


# --- saving ---


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_writer(write: Callable, fail: Callable, shard: int) -> Callable:
    """A writer of shards that fails in the middle of one of them."""
    written = []

    def writer(tensors, filename, *args, **kwargs):
        write(tensors, filename, *args, **kwargs)
        written.append(filename)
        if len(written) > shard:
            data = Path(filename).read_bytes()
            Path(filename).write_bytes(data[: len(data) // 2])
            fail()

    return writer


def in_a_child(function: Callable[[], None]) -> int:
    """Exit code of a process that runs `function`; negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the child hangs")
    return process.exitcode


@pytest.fixture
def old_and_new(tmp_path):
    """A folder with a sharded RF8 checkpoint, and another model to save there."""
    old = quantize_(LLAMA.model())
    old.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    new = LLAMA.model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(-0.7)
    return tmp_path / "model", LLAMA.logits(old), quantize_(new)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["first shard", "last shard", "move"])
def test_a_killed_save_leaves_the_old_checkpoint(old_and_new, monkeypatch, moment):
    from transformers import modeling_utils

    folder, old_logits, new = old_and_new
    before = content(folder)
    if moment == "move":
        monkeypatch.setattr(os, "replace", die)
    else:
        shard = 0 if moment == "first shard" else len(weight_files(folder)) - 1
        writer = failing_writer(modeling_utils.safe_save_file, die, shard)
        monkeypatch.setattr(modeling_utils, "safe_save_file", writer)
    assert in_a_child(lambda: new.save_pretrained(folder, max_shard_size="60KB")) == -signal.SIGKILL
    monkeypatch.undo()

    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    assert len(after) > len(before), "the save died before it wrote anything: the test shows nothing"
    assert torch.equal(LLAMA.logits(load(folder)), old_logits)

    new.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert torch.equal(LLAMA.logits(load(folder)), LLAMA.logits(new))


def save_killed_at(move, model, target, size):
    """The exit code of a process that saves `model`, killed before the rename or removal of that number."""
    steps = []

    def step(function):
        def call(*args, **kwargs):
            steps.append(args)
            if len(steps) > move:
                die()
            return function(*args, **kwargs)

        return call

    def save():
        os.replace, os.remove = step(os.replace), step(os.remove)
        model.save_pretrained(target, max_shard_size=size)

    return in_a_child(save)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("old_size", "new_size"), [("60KB", "60KB"), ("60KB", "1GB"), ("1GB", "60KB")])
@pytest.mark.parametrize("links", [True, False])
def test_a_save_killed_between_two_moves_leaves_one_whole_checkpoint(
    old_and_new, monkeypatch, tmp_path, old_size, new_size, links
):
    folder, old_logits, new = old_and_new
    new_logits, old = LLAMA.logits(new), load(folder)
    if not links:
        monkeypatch.setattr(os, "link", no_space)
    results, moves = [], 0
    while "finished" not in results:
        target = tmp_path / str(moves)
        old.save_pretrained(target, max_shard_size=old_size)
        if save_killed_at(moves, new, target, new_size) == 0:
            results.append("finished")
        logits = LLAMA.logits(load(target))
        results.append("old" if torch.equal(logits, old_logits) else "new" if torch.equal(logits, new_logits) else "?")
        moves += 1
    # old ones, then new ones, and none of neither kind
    results.remove("finished")
    assert results == sorted(results, reverse=True)
    assert set(results) == {"old", "new"}
    assert all(".saving-" not in p.name and "new-" not in p.name for p in target.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("size", ["60KB", "1GB"])
def test_the_old_checkpoint_of_another_format_survives_every_kill(tmp_path, size):
    old, new = quantize_(LLAMA.model()), quantize_(LLAMA.model(), GGConfig("rf8x"))
    expected = [LLAMA.logits(old), LLAMA.logits(new)]
    moves, finished, from_previous = 0, False, 0
    while not finished:
        target = tmp_path / str(moves)
        old.save_pretrained(target, max_shard_size=size)
        finished = save_killed_at(moves, new, target, size) == 0
        try:
            logits = LLAMA.logits(load(target))
        except ValueError:
            [previous] = target.glob(".previous-*")
            logits, from_previous = LLAMA.logits(load(previous)), from_previous + 1
            assert torch.equal(logits, expected[0])
        assert any(torch.equal(logits, wanted) for wanted in expected)
        new.save_pretrained(target)
        assert not list(target.glob(".previous-*")) and not list(target.glob(".saving-*"))
        moves += 1
    assert from_previous  # there is such a moment


def test_a_full_disk_leaves_the_old_checkpoint(old_and_new, monkeypatch):
    from transformers import modeling_utils

    folder, old_logits, new = old_and_new
    before = content(folder)
    monkeypatch.setattr(modeling_utils, "safe_save_file", failing_writer(modeling_utils.safe_save_file, no_space, 1))
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(folder, max_shard_size="60KB")
    assert content(folder) == before
    assert not any(p.is_dir() for p in folder.iterdir())
    assert torch.equal(LLAMA.logits(load(folder)), old_logits)
    monkeypatch.undo()
    new.save_pretrained(folder, max_shard_size="60KB")
    assert torch.equal(LLAMA.logits(load(folder)), LLAMA.logits(new))


def test_folders_of_dead_saves_are_removed_and_never_published(tmp_path):
    model = quantize_(LLAMA.model())
    for name in (f".saving-{os.getpid()}", ".saving-1", ".saving-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00007-of-00009.safetensors").write_bytes(b"half a shard")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_folder_of_a_save_under_way_stays(tmp_path):
    from hf_gg.integrations import saving

    model, context = quantize_(LLAMA.model()), multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def other():
        saving._make_staging(str(tmp_path))
        ready.set()
        done.wait(60)

    process = context.Process(target=other)
    process.start()
    try:
        assert ready.wait(60)
        model.save_pretrained(tmp_path)
        assert len(list(tmp_path.glob(".saving-*"))) == 1
    finally:
        done.set()
        process.join(60)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".saving-*"))


def test_an_overwritten_checkpoint_leaves_no_old_weights(old_and_new, tmp_path):
    folder, _, new = old_and_new
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.fp16.safetensors").write_bytes(b"a variant")
    new.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.fp16.safetensors",
        "model.safetensors",
        "tokenizer.json",
    }
    (folder / "model.fp16.safetensors").unlink()
    assert torch.equal(LLAMA.logits(load(folder)), LLAMA.logits(new))
    single = stored(folder)
    new.save_pretrained(folder, max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()
    assert same_tensors(stored(folder), single)


def test_forms_of_saving_that_would_lose_the_mark(tmp_path):
    model = quantize_(LLAMA.model())
    with pytest.raises(ValueError, match="save_original_format=False"):
        model.save_pretrained(tmp_path, save_original_format=False)
    assert not list(tmp_path.iterdir())

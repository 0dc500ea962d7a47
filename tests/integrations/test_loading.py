"""Sources, placements, dtypes and options of loading, and what one does with a loaded model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import shutil
import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, quiet, same_tensors, stored, weight_files
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_gg import GGConfig, RF8Experts, RF8Linear, quantization_report, quantize_
from hf_gg.data import mgm_gpt2, minilm, smollm2_gguf
from hf_gg.integrations.selection import code_parameters
from hf_gg.nn import RF8Embedding


LLAMA, TIED, GPT2, MIXTRAL = (FAMILIES[name] for name in ("llama", "llama-tied", "gpt2", "mixtral"))
T5, BERT, BERT_CLASSES = (FAMILIES[name] for name in ("t5", "bert-mlm", "bert-cls"))

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By a family's name its checkpoint in full precision, by `NAME-rf8` the quantized one; both made on demand."""
    root = tmp_path_factory.mktemp("checkpoints")

    class Checkpoints:
        def __getitem__(self, name: str) -> Path:
            folder, family = root / name, FAMILIES[name.removesuffix("-rf8")]
            if not folder.exists():
                with quiet():
                    model = family.model()
                    (quantize_(model) if name.endswith("-rf8") else model).save_pretrained(folder)
            return folder

    return Checkpoints()


def plain_linears(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def saved_config(folder: Path) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


# --- sources ---


def test_pickled_source(checkpoints, tmp_path):
    expected = LLAMA.logits(LLAMA.auto.from_pretrained(checkpoints["llama-rf8"]))
    shutil.copytree(checkpoints["llama"], tmp_path / "bin")
    [file] = weight_files(tmp_path / "bin")
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    model = LLAMA.auto.from_pretrained(tmp_path / "bin", quantization_config=GGConfig())
    assert torch.equal(LLAMA.logits(model), expected)

    (tmp_path / "bin" / "pytorch_model.bin").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, tmp_path / "bin" / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = LLAMA.auto.from_pretrained(tmp_path / "bin", quantization_config=GGConfig())
    assert torch.equal(LLAMA.logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "again"), stored(checkpoints["llama-rf8"]))


def test_sharded_source_and_shards_of_a_save(checkpoints, tmp_path):
    LLAMA.model().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert len(weight_files(tmp_path / "source")) > 2
    model = LLAMA.auto.from_pretrained(tmp_path / "source", quantization_config=GGConfig())
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    shards = weight_files(tmp_path / "shards")
    assert len(shards) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert same_tensors(stored(tmp_path / "shards"), stored(checkpoints["llama-rf8"]))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(checkpoints["llama-rf8"]).values())


def write_gguf(path: Path, kind, architecture: str) -> None:
    """A GGUF file of a tiny random model; its matrices are of the quantization type `kind`."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, vocabulary, layers, heads, kv_heads = 64, 96, 128, 2, 4, 2
    random, writer = np.random.default_rng(0), gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    # in this architecture, a layer without heads is a convolution
    writer.add_head_count_kv([0, kv_heads] if architecture == "lfm2" else kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([1] * vocabulary)

    def matrix(name: str, rows: int, columns: int, kind=kind) -> None:
        values = random.normal(0, 0.05, (rows, columns)).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{name}.weight", values)
        else:
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", blocks, raw_shape=blocks.shape, raw_dtype=kind)

    def norm(name: str, size: int = hidden) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", vocabulary, hidden)
    matrix("output", vocabulary, hidden)
    norm("token_embd_norm" if architecture == "lfm2" else "output_norm")
    for layer in range(layers):
        block = f"blk.{layer}"
        if architecture == "lfm2" and layer == 0:
            matrix(f"{block}.shortconv.in_proj", 3 * hidden, hidden)
            matrix(f"{block}.shortconv.out_proj", hidden, hidden)
            matrix(f"{block}.shortconv.conv", hidden, 3, gguf.GGMLQuantizationType.F32)
        else:
            matrix(f"{block}.attn_q", hidden, hidden)
            matrix(f"{block}.attn_k", hidden // heads * kv_heads, hidden)
            matrix(f"{block}.attn_v", hidden // heads * kv_heads, hidden)
            matrix(f"{block}.attn_output", hidden, hidden)
            if architecture == "lfm2":
                norm(f"{block}.attn_q_norm", hidden // heads)
                norm(f"{block}.attn_k_norm", hidden // heads)
        matrix(f"{block}.ffn_gate", inner, hidden)
        matrix(f"{block}.ffn_up", inner, hidden)
        matrix(f"{block}.ffn_down", hidden, inner)
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Transformers has two readers of GGUF files: one for llama among others, one for lfm2 among others
@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_gguf_source(tmp_path, architecture, kind):
    gguf = pytest.importorskip("gguf")
    if architecture == "lfm2":
        pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind], architecture)
    check_gguf(tmp_path, "model.gguf", tmp_path / "rf8", expected=14 if architecture == "llama" else 12)


@pytest.mark.slow
def test_gguf_source_of_a_real_model(tmp_path):
    pytest.importorskip("gguf")
    try:
        file = smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check_gguf(file.parent, file.name, tmp_path, expected=30 * 7)


def check_gguf(folder: Path, name: str, target: Path, expected: int) -> None:
    """Quantizing the file while loading it equals quantizing the model that it holds."""
    plain = transformers.utils.quantization_config.GgufConfig(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=plain, dtype=torch.float32
    )
    reference = quantize_(reference.eval())
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GGConfig(), dtype=torch.float32
    )
    assert sum(isinstance(module, RF8Linear) for module in model.modules()) == expected
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(reference))
    model.save_pretrained(target)
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(LLAMA.logits(again), LLAMA.logits(model))
    reference.save_pretrained(target / "reference")
    assert same_tensors(stored(target), stored(target / "reference"))
    dequantized = AutoModelForCausalLM.from_pretrained(target, quantization_config=GGConfig(dequantize=True))
    torch.testing.assert_close(LLAMA.logits(dequantized), LLAMA.logits(model), rtol=1e-4, atol=1e-4)


def test_gguf_files_that_are_damaged(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0, "llama")
    data = (tmp_path / "model.gguf").read_bytes()
    for size in (0, 3, 40, len(data) // 2, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises((ValueError, IndexError, OSError, struct.error)):  # of the readers in Transformers and gguf
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="cut.gguf", quantization_config=GGConfig())


# --- base models and models with heads ---


def test_a_head_that_the_checkpoint_lacks_is_plain_and_trainable(checkpoints, tmp_path):
    auto = AutoModelForSequenceClassification
    model, info = auto.from_pretrained(checkpoints["bert-mlm-rf8"], num_labels=3, output_loading_info=True)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= info["missing_keys"]
    assert plain_linears(model) == {"classifier", "bert.pooler.dense"}
    assert model.classifier.weight.requires_grad
    assert model.classifier.weight.dtype == torch.float32
    # drawn by the model's initializer: 0.02 for BERT, whatever nn.Linear would take
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert "newly initialized" in quantization_report(model).skipped["classifier"]
    assert sum(1 for _ in code_parameters(model)) == 12
    logits = BERT_CLASSES.logits(model)

    model.save_pretrained(tmp_path / "classes")
    again, info = auto.from_pretrained(tmp_path / "classes", output_loading_info=True)
    assert not any(info.values())
    assert plain_linears(again) == {"classifier", "bert.pooler.dense"}
    assert torch.equal(BERT_CLASSES.logits(again), logits)


def test_new_heads_train(checkpoints):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints["bert-mlm-rf8"], num_labels=3)
    loss = model(**BERT_CLASSES.inputs(), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    before = {name: p.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert model(**BERT_CLASSES.inputs(), labels=torch.tensor([0, 2])).loss < loss
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_head_whose_parent_initializes_it(checkpoints):
    """T5's head draws the weights of its layers itself."""
    model = transformers.T5ForSequenceClassification.from_pretrained(checkpoints["t5-rf8"], num_labels=3)
    assert {"classification_head.dense", "classification_head.out_proj"} <= plain_linears(model)
    # T5 draws with 1 / sqrt(d_model)
    assert 0.1 < model.classification_head.dense.weight.std() < 0.15
    tokens = T5.inputs()["input_ids"]
    tokens[:, -1] = 1  # what T5 classifies by
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens, decoder_input_ids=tokens).logits).all()


def test_base_models_and_back(checkpoints, tmp_path):
    whole = BERT.auto.from_pretrained(checkpoints["bert-mlm-rf8"])
    base, info = AutoModel.from_pretrained(checkpoints["bert-mlm-rf8"], output_loading_info=True)
    assert sum(1 for _ in code_parameters(base)) == 12
    assert info["missing_keys"] >= {"pooler.dense.weight"}
    with torch.no_grad():
        expected = whole.bert(**BERT.inputs()).last_hidden_state
        assert torch.equal(base(**BERT.inputs()).last_hidden_state, expected)

    base.save_pretrained(tmp_path / "base")
    head = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert plain_linears(head) == {"cls.predictions.decoder", "cls.predictions.transform.dense"}
    with torch.no_grad():
        assert torch.equal(head.bert(**BERT.inputs()).last_hidden_state, expected)


def test_a_base_model_of_a_model_with_patterns(checkpoints, tmp_path):
    """Names in the checkpoint's config are those of the model with a head, and must fit the model without."""
    config = GGConfig(modules_to_not_convert=["model.layers.0.mlp", "model.layers.1.self_attn.q_proj"])
    LLAMA.auto.from_pretrained(checkpoints["llama"], quantization_config=config).save_pretrained(tmp_path)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    mlp = {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert plain_linears(base) == {*mlp, "layers.1.self_attn.q_proj"}
    with torch.no_grad():
        whole = LLAMA.auto.from_pretrained(tmp_path)
        expected = whole.model(**LLAMA.inputs()).last_hidden_state
        assert torch.equal(base(**LLAMA.inputs()).last_hidden_state, expected)


@pytest.mark.parametrize("source", ["bert-cls", "bert-cls-rf8"])
def test_a_head_of_another_size(checkpoints, tmp_path, source):
    config = {} if source.endswith("rf8") else {"quantization_config": GGConfig()}
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoints[source], num_labels=5, ignore_mismatched_sizes=True, **config
    )
    assert plain_linears(model) == {"classifier"}
    assert model.classifier.weight.shape == (5, 64)
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert isinstance(model.bert.pooler.dense, RF8Linear)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(BERT_CLASSES.logits(again), BERT_CLASSES.logits(model))


# --- dtypes and devices ---


@pytest.mark.parametrize("weight_format", ["rf8", "grid"])
def test_half_precision_with_quantized_embeddings(checkpoints, tmp_path, weight_format):
    """The first floating-point parameter is a float32 scale, by which Transformers names the model's dtype."""
    family = FAMILIES["llama"]
    options = {"step": 2**-9} if weight_format == "grid" else {}
    config = GGConfig(weight_format=weight_format, quantize_embeddings=True, quantize_lm_head=True, **options)
    model = family.auto.from_pretrained(checkpoints["llama"], quantization_config=config, dtype=torch.bfloat16)
    assert model.dtype == model.model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = family.auto.from_pretrained(tmp_path)
    assert again.dtype == again.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(family.logits(again), family.logits(model))
    assert family.model().dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(checkpoints, tmp_path, name, dtype):
    family = FAMILIES[name]
    reference = family.logits(family.auto.from_pretrained(checkpoints[f"{name}-rf8"]))
    model = family.auto.from_pretrained(checkpoints[name], quantization_config=GGConfig(), dtype=dtype)
    assert model.dtype == dtype
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("_scale")} == {torch.float32}
    logits = family.logits(model)
    assert logits.dtype == dtype
    assert relative(logits, reference) < (0.04 if dtype == torch.bfloat16 else 0.01)

    model.save_pretrained(tmp_path)
    again = family.auto.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(family.logits(again), logits)
    # codes and scales do not depend on the dtype of the rest
    other = family.auto.from_pretrained(checkpoints[f"{name}-rf8"], dtype=dtype)
    assert other.dtype == dtype
    scales = {
        n: p for n, p in family.auto.from_pretrained(checkpoints[f"{name}-rf8"]).named_parameters() if "_scale" in n
    }
    assert all(torch.equal(dict(other.named_parameters())[n], p) for n, p in scales.items())


def test_casts_keep_codes_and_scales(checkpoints):
    model = MIXTRAL.auto.from_pretrained(checkpoints["mixtral-rf8"])
    logits = MIXTRAL.logits(model)
    codes = {n: p.clone() for n, p in model.named_parameters() if "_scale" in n or p.dtype == torch.uint8}
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.to(dtype=torch.float16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float64),
    ):
        other = cast(copy.deepcopy(model))
        parameters = dict(other.named_parameters())
        assert all(p.dtype == parameters[n].dtype and torch.equal(p, parameters[n]) for n, p in codes.items())
        assert relative(MIXTRAL.logits(other), logits) < 0.05
        assert torch.equal(MIXTRAL.logits(other.to(torch.float32)), logits) or other.dtype == torch.float32
    # Transformers' own refusal for quantized models
    for cast in ("half", "float"):
        with pytest.raises(ValueError, match=rf"{cast}\(\)` is not supported for quantized"):
            getattr(model, cast)()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("source", ["llama", "llama-rf8"])
def test_device_maps(checkpoints, source, device_map):
    config = {} if source.endswith("rf8") else {"quantization_config": GGConfig()}
    model = LLAMA.auto.from_pretrained(checkpoints[source], device_map=device_map, **config)
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])))


def first_layers_on_disk(model: torch.nn.Module) -> dict[str, str]:
    """A device map with the first half of each stack of layers on disk and all the rest on the CPU."""
    devices: dict[str, str] = {}

    def place(module: torch.nn.Module, name: str) -> None:
        if isinstance(module, torch.nn.ModuleList):
            for number in range(len(module)):
                devices[f"{name}.{number}"] = "disk" if number < len(module) // 2 else "cpu"
        elif any(isinstance(m, torch.nn.ModuleList) for m in module.modules()):
            for child_name, child in module.named_children():
                place(child, f"{name}.{child_name}" if name else child_name)
        else:
            devices[name] = "cpu"

    place(model, "")
    return devices


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "t5"])
def test_offload_to_disk(checkpoints, tmp_path, name):
    pytest.importorskip("accelerate")
    family = FAMILIES[name]
    reference = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    model = family.auto.from_pretrained(
        checkpoints[f"{name}-rf8"], device_map=first_layers_on_disk(reference), offload_folder=tmp_path / "offload"
    )
    on_disk = [n for n, p in model.named_parameters() if p.is_meta]
    assert any(n.endswith("_scale") for n in on_disk)
    assert torch.equal(family.logits(model), family.logits(reference))
    assert all(dict(model.named_parameters())[n].is_meta for n in on_disk)

    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert same_tensors(stored(tmp_path / "saved"), stored(checkpoints[f"{name}-rf8"]))
    again = family.auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(family.logits(again), family.logits(reference))
    with pytest.raises(ValueError, match="is offloaded: load the model without offload"):
        model.dequantize()
    report = quantization_report(model)
    assert {row.name for row in report.rows if row.snr != row.snr} == {n for n in on_disk if f"{n}_scale" in on_disk}


def test_quantizing_on_the_way_to_disk_is_refused(checkpoints, tmp_path):
    pytest.importorskip("accelerate")
    devices = first_layers_on_disk(LLAMA.model())
    with pytest.raises(ValueError, match="cannot be quantized on their way to disk"):
        LLAMA.auto.from_pretrained(
            checkpoints["llama"],
            quantization_config=GGConfig(),
            device_map=devices,
            offload_folder=tmp_path / "offload",
        )
    assert not list(tmp_path.iterdir())


# --- what is quantized ---


@pytest.mark.parametrize(
    ("name", "embeddings", "lm_head"),
    [
        *((name, *flags) for name in ("llama", "llama-tied") for flags in product((False, True), repeat=2)),
        *((name, True, True) for name in ("gpt2", "t5", "whisper", "gemma3", "mamba")),
    ],
)
def test_embeddings_and_output_embeddings(checkpoints, tmp_path, name, embeddings, lm_head):
    family = FAMILIES[name]
    config = GGConfig(quantize_embeddings=embeddings, quantize_lm_head=lm_head)
    model = family.auto.from_pretrained(checkpoints[name], quantization_config=config)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if name == "llama":
        assert isinstance(inputs, RF8Embedding) == embeddings
        assert isinstance(outputs, RF8Linear) == lm_head
    elif name in ("gemma3", "mamba"):  # an embedding with a factor of its own; a head whose weight the model reads
        assert not isinstance(inputs, RF8Embedding)
        assert not isinstance(outputs, RF8Linear)
    elif name == "whisper":  # its inputs are sounds
        assert isinstance(outputs, RF8Linear)
        assert isinstance(model.model.decoder.embed_tokens, RF8Embedding)
    else:
        assert isinstance(inputs, RF8Embedding) == isinstance(outputs, RF8Linear) == (embeddings and lm_head)
    tied = set(model.all_tied_weights_keys)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameters[k] is parameters[v] for k, v in model.all_tied_weights_keys.items())

    logits = family.logits(model)
    assert relative(logits, family.logits(family.model())) < 0.1
    model.save_pretrained(tmp_path)
    again, info = family.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert set(again.all_tied_weights_keys) == tied
    assert torch.equal(family.logits(again), logits)
    in_place = quantize_(family.model(), GGConfig(quantize_embeddings=embeddings, quantize_lm_head=lm_head))
    assert torch.equal(family.logits(in_place), logits)
    again.dequantize()
    torch.testing.assert_close(family.logits(again), logits, rtol=1e-4, atol=1e-5)


def test_a_tied_head_that_is_excluded_keeps_the_embeddings_plain(checkpoints, tmp_path):
    config = GGConfig(quantize_embeddings=True, quantize_lm_head=True, modules_to_not_convert=["lm_head"])
    model = TIED.auto.from_pretrained(checkpoints["llama-tied"], quantization_config=config)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert quantization_report(model).skipped["model.embed_tokens"] == "tied to lm_head, which is not quantized"
    model.save_pretrained(tmp_path)
    assert torch.equal(TIED.logits(TIED.auto.from_pretrained(tmp_path)), TIED.logits(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_experts_left_as_they_are(checkpoints, tmp_path, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[name], quantization_config=GGConfig(experts=False))
    assert not any(isinstance(module, RF8Experts) for module in model.modules())
    model.save_pretrained(tmp_path)
    plain, tensors = stored(checkpoints[name]), stored(tmp_path)
    experts = [n for n in plain if ".experts." in n]
    assert experts
    assert all(torch.equal(plain[n], tensors[n]) for n in experts)
    again, info = family.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(family.logits(again), family.logits(model))


LAYER_0 = {f"model.layers.0.{n}_proj" for n in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")}
LAYER_0 |= {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
PATTERNS = {
    "name": (["model.layers.0.self_attn.q_proj"], {"model.layers.0.self_attn.q_proj"}),
    "name without the base model's prefix": (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    "beginning": (["model.layers.0"], LAYER_0),
    "beginning in the middle of a word": (["model.layers.0.mlp.up"], set()),
    "end": (["q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
    "any number": (["model.layers.#.mlp.up_proj"], {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}),
    "regular expression": (
        [r".*\.layers\.\d+\.self_attn\.(q|k)_proj"],
        {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qk"},
    ),
    "several": (
        ["model.layers.1.mlp.down_proj", "o_proj"],
        {"model.layers.1.mlp.down_proj", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))},
    ),
    "nothing": ([], set()),
    "no such module": (["encoder.layer.3"], set()),
}


@pytest.mark.parametrize(("patterns", "kept"), PATTERNS.values(), ids=PATTERNS)
def test_modules_to_not_convert(checkpoints, tmp_path, patterns, kept):
    def said():
        idle = bool(patterns) and not kept
        return pytest.warns(UserWarning, match="matches no module") if idle else contextlib.nullcontext()

    with said():
        model = LLAMA.auto.from_pretrained(
            checkpoints["llama"], quantization_config=GGConfig(modules_to_not_convert=patterns)
        )
    assert plain_linears(model) == {*kept, "lm_head"}
    model.save_pretrained(tmp_path)
    again = LLAMA.auto.from_pretrained(tmp_path)
    assert plain_linears(again) == {*kept, "lm_head"}
    assert torch.equal(LLAMA.logits(again), LLAMA.logits(model))
    with said():
        in_place = quantize_(LLAMA.model(), GGConfig(modules_to_not_convert=patterns))
    assert plain_linears(in_place) == {*kept, "lm_head"}


def test_nothing_to_quantize_is_said(checkpoints, caplog):
    import logging

    logger = logging.getLogger("hf_gg.integrations.transformers")
    logger.addHandler(caplog.handler)
    try:
        config = GGConfig(modules_to_not_convert=["model"])
        LLAMA.auto.from_pretrained(checkpoints["llama"], quantization_config=config)
    finally:
        logger.removeHandler(caplog.handler)
    assert "No module of LlamaForCausalLM was quantized" in caplog.text


@pytest.mark.parametrize("weight_format", ["rf8", "rf8x", "rf8-e5"])
@pytest.mark.parametrize("scale", ["absmax", "pow2", "tensor", "tensor-pow2", "unit"])
def test_formats_and_scales(checkpoints, tmp_path, weight_format, scale):
    rounding = "reference" if scale == "pow2" else "nearest"
    for name in ("llama", "gpt-oss"):
        family = FAMILIES[name]
        config = GGConfig(weight_format, scale=scale, rounding=rounding)
        model = family.auto.from_pretrained(checkpoints[name], quantization_config=config)
        model.save_pretrained(tmp_path / name)
        assert saved_config(tmp_path / name)["weight_format"] == weight_format
        assert saved_config(tmp_path / name)["scale"] == scale
        again = family.auto.from_pretrained(tmp_path / name)
        assert torch.equal(family.logits(again), family.logits(model))
        assert {m.format for m in again.modules() if hasattr(m, "format")} == {weight_format}
        in_place = quantize_(family.model(), GGConfig(weight_format, scale=scale, rounding=rounding))
        assert torch.equal(family.logits(in_place), family.logits(model))


def test_the_backend_may_be_chosen_at_any_load(checkpoints):
    plain = LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])
    model = LLAMA.auto.from_pretrained(checkpoints["llama-rf8"], quantization_config=GGConfig(backend="torch"))
    assert {m.backend for m in plain.modules() if isinstance(m, RF8Linear)} == {"auto"}
    assert {m.backend for m in model.modules() if isinstance(m, RF8Linear)} == {"torch"}
    torch.testing.assert_close(LLAMA.logits(model), LLAMA.logits(plain), rtol=1e-4, atol=1e-5)


# --- configs and older checkpoints ---


def test_configs_as_dictionaries_and_text():
    config = GGConfig(
        "rf8x", scale="pow2", rounding="reference", modules_to_not_convert=["lm_head"], experts=False, backend="torch"
    )
    as_dict = config.to_dict()
    assert as_dict["quant_method"] == "gg"
    assert not any(key.startswith("_") for key in as_dict)
    assert GGConfig.from_dict(as_dict).to_dict() == as_dict
    assert GGConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == as_dict
    assert GGConfig(**as_dict).to_dict() == as_dict
    assert copy.deepcopy(config).to_dict() == as_dict
    assert pickle.loads(pickle.dumps(config)).to_dict() == as_dict
    assert "rf8x" in repr(config)
    assert transformers.quantizers.AutoQuantizationConfig.from_dict(as_dict).to_dict() == as_dict


def test_a_config_given_as_a_dictionary(checkpoints):
    model = LLAMA.auto.from_pretrained(checkpoints["llama"], quantization_config={"quant_method": "gg"})
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])))


def test_one_config_for_two_models(checkpoints):
    config = GGConfig()
    for name in ("llama", "gpt2", "mixtral"):
        family = FAMILIES[name]
        model = family.auto.from_pretrained(checkpoints[name], quantization_config=copy.deepcopy(config))
        assert sum(1 for _ in code_parameters(model)) == family.quantized
    assert config.modules_to_not_convert is None


def test_what_is_saved_in_the_config(checkpoints, tmp_path):
    model = LLAMA.auto.from_pretrained(
        checkpoints["llama"],
        quantization_config=GGConfig("rf8x", modules_to_not_convert=["model.layers.0.mlp.up_proj"]),
    )
    model.save_pretrained(tmp_path)
    assert {k: v for k, v in saved_config(tmp_path).items() if k != "backend"} == {
        "quant_method": "gg",
        "weight_format": "rf8x",
        "scale": "row",
        "rounding": "nearest",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
        "quantize_embeddings": False,
        "quantize_lm_head": False,
        "experts": True,
        "dequantize": False,
        "format_version": 2,
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_checkpoints_of_version_1(checkpoints, tmp_path, name):
    """They held codes as [out, in]."""
    family, current = FAMILIES[name], checkpoints[f"{name}-rf8"]
    shutil.copytree(current, tmp_path / "old")
    tensors = {
        k: (v.squeeze(-1) if v.dtype == torch.uint8 else v).contiguous().clone() for k, v in stored(current).items()
    }
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((current / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))

    model, info = family.auto.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(family.logits(model), family.logits(family.auto.from_pretrained(current)))
    model.save_pretrained(tmp_path / "new")
    assert saved_config(tmp_path / "new")["format_version"] == 2
    assert same_tensors(stored(tmp_path / "new"), stored(current))


# --- a loaded model ---


def test_size(checkpoints):
    plain, model = LLAMA.model(), LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])
    quantized = sum(module.weight.numel() for module in model.modules() if isinstance(module, RF8Linear))
    rows = sum(module.weight.shape[0] for module in model.modules() if isinstance(module, RF8Linear))
    assert model.num_parameters() == plain.num_parameters() + rows
    expected = plain.get_memory_footprint(return_buffers=False) - 3 * quantized + 4 * rows
    assert model.get_memory_footprint(return_buffers=False) == expected
    report = quantization_report(model)
    assert report.bytes == expected
    assert report.quantized_parameters == quantized
    assert report.other_parameters == plain.num_parameters() - quantized


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss"])
def test_copies(checkpoints, tmp_path, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    logits = family.logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for number, other in enumerate(
        (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    ):
        assert torch.equal(family.logits(other), logits)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        other.save_pretrained(tmp_path / str(number))
        assert same_tensors(stored(tmp_path / str(number)), stored(checkpoints[f"{name}-rf8"]))
        other.dequantize()
        assert torch.equal(family.logits(model), logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_state_dicts(checkpoints, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    state = model.state_dict()
    other = family.auto.from_config(family.config()).eval()
    quantize_(other)
    assert not torch.equal(family.logits(other), family.logits(model))
    other.load_state_dict(state)
    assert torch.equal(family.logits(other), family.logits(model))
    with pytest.raises(RuntimeError, match="_scale"):
        other.load_state_dict({k: v for k, v in state.items() if not k.endswith("_scale")})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_scale"):
        family.model().load_state_dict(state)


def test_saving_into_the_folder_that_was_loaded(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama-rf8"], tmp_path / "model")
    model = LLAMA.auto.from_pretrained(tmp_path / "model")  # mapped from the file
    logits = LLAMA.logits(model)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(LLAMA.logits(model), logits)
    assert torch.equal(LLAMA.logits(LLAMA.auto.from_pretrained(tmp_path / "model")), logits)


def test_quantizing_into_the_folder_of_the_full_precision_model(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    model = LLAMA.auto.from_pretrained(tmp_path / "model", quantization_config=GGConfig())
    model.save_pretrained(tmp_path / "model")
    assert same_tensors(stored(tmp_path / "model"), stored(checkpoints["llama-rf8"]))
    assert torch.equal(LLAMA.logits(LLAMA.auto.from_pretrained(tmp_path / "model")), LLAMA.logits(model))


def test_variants(checkpoints, tmp_path):
    model = LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])
    LLAMA.model().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="rf8")
    names = {file.name for file in weight_files(tmp_path)}
    assert names == {"model.safetensors", "model.rf8.safetensors"}
    again = LLAMA.auto.from_pretrained(tmp_path, variant="rf8")
    assert torch.equal(LLAMA.logits(again), LLAMA.logits(model))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_more_tokens(checkpoints, tmp_path, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    before = family.logits(model)
    model.resize_token_embeddings(140)
    logits = family.logits(model)
    assert logits.shape[-1] == 140
    assert torch.equal(logits[..., :128], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(family.logits(family.auto.from_pretrained(tmp_path)), logits)


@pytest.mark.parametrize("flag", ["quantize_embeddings", "quantize_lm_head"])
def test_more_tokens_in_codes_are_refused(checkpoints, flag):
    model = LLAMA.auto.from_pretrained(checkpoints["llama"], quantization_config=GGConfig(**{flag: True}))
    before = LLAMA.logits(model)
    for arguments in ((140,), (None, 64), (100,)):
        with pytest.raises(ValueError, match="embeddings are quantized and keep their 128 tokens"):
            model.resize_token_embeddings(*arguments)
    model.resize_token_embeddings(128)
    model.resize_token_embeddings()
    assert torch.equal(LLAMA.logits(model), before)
    model.dequantize()
    model.resize_token_embeddings(140)
    assert LLAMA.logits(model).shape[-1] == 140


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generation(checkpoints, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    plain = family.auto.from_pretrained(checkpoints[f"{name}-rf8"], quantization_config=GGConfig(dequantize=True))
    arguments = {**family.inputs(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**arguments)
    assert tokens.shape == (2, 20)
    assert torch.equal(tokens, plain.generate(**arguments))
    static = model.generate(**arguments, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, static)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_compiled_forward_and_backward(checkpoints, name):
    family = FAMILIES[name]
    model = family.auto.from_pretrained(checkpoints[f"{name}-rf8"])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(family.logits(compiled), family.logits(model), rtol=1e-4, atol=1e-5)

    gradients = []
    for run in (model, compiled):
        hidden = model.get_input_embeddings()(family.inputs()["input_ids"]).detach().requires_grad_()
        run(inputs_embeds=hidden).logits.square().sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_compiled_by_inductor(checkpoints):
    model = LLAMA.auto.from_pretrained(checkpoints["llama-rf8"])
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x), rtol=1e-4, atol=1e-5)


# --- the report ---


def test_report(checkpoints):
    model = MIXTRAL.auto.from_pretrained(checkpoints["mixtral-rf8"])
    report = quantization_report(model)
    rows = {row.name: row for row in report.rows}
    assert len(rows) == MIXTRAL.quantized
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert row.shape == (4, 192, 64)
    assert row.format == "rf8"
    assert row.bits == 8 + 32 / 64
    assert not row.exact
    assert report.skipped["lm_head"] in ("output embeddings (quantize_lm_head=False)", "modules_to_not_convert")
    assert "MixtralTopKRouter" in report.skipped["model.layers.0.mlp.gate"]
    text = str(report)
    assert all(name in text for name in rows)
    assert "not quantized: lm_head" in text

    measured = quantization_report(model, MIXTRAL.model())
    assert all(row.exact for row in measured.rows)
    assert 29 < min(row.snr for row in measured.rows)
    with pytest.raises(ValueError, match="no quantized module"):
        quantization_report(MIXTRAL.model())


@torch.no_grad()
def check_estimates(model: torch.nn.Module, reference: torch.nn.Module, lowest: float) -> None:
    """The estimate from the codes alone comes close to what is measured against the weights.

    It knows nothing of the search for the scale, which finds the one with the least noise: up to 1 dB better.
    """
    estimated, measured = quantization_report(model).rows, quantization_report(model, reference).rows
    assert [row.name for row in estimated] == [row.name for row in measured]
    gains = [b.snr - a.snr for a, b in zip(estimated, measured, strict=True)]
    searched = model.config.quantization_config.scale == "row"
    assert (0.2 if searched else 0) < min(gains) <= max(gains) < (1.3 if searched else 0.3)
    assert min(row.snr for row in measured) > lowest
    parameters, originals = dict(model.named_modules()), dict(reference.named_parameters())
    for row in measured[:: len(measured) // 4]:
        decoded, original = parameters[row.name.removesuffix(".weight")].dequantize(), originals[row.name]
        original = original.T if decoded.shape != original.shape else original
        by_hand = 20 * torch.log10(original.norm() / (decoded - original).norm())
        assert abs(row.snr - float(by_hand)) < 0.01


def real(locate) -> Path:
    try:
        return locate()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("weight_format", ["rf8", "rf8x", "rf8-e5"])
def test_mgm_gpt2(tmp_path, weight_format):
    reference = AutoModelForCausalLM.from_pretrained(real(mgm_gpt2)).eval()
    model = AutoModelForCausalLM.from_pretrained(
        real(mgm_gpt2), quantization_config=GGConfig(weight_format), dtype=torch.float32
    )
    lowest = {"rf8": 28, "rf8x": 29, "rf8-e5": 22}[weight_format]
    check_estimates(model, reference, lowest)
    tokens = torch.randint(5, reference.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
        assert relative(logits, reference(tokens).logits) < (0.12 if weight_format == "rf8-e5" else 0.06)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, logits)


def test_minilm(tmp_path):
    reference = AutoModel.from_pretrained(real(minilm)).eval()
    model = AutoModel.from_pretrained(real(minilm), quantization_config=GGConfig(), dtype=torch.float32)
    check_estimates(model, reference, 28)
    tokens = torch.randint(999, 20000, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = model(tokens).last_hidden_state.mean(1)
        cosine = torch.nn.functional.cosine_similarity(vectors, reference(tokens).last_hidden_state.mean(1))
    assert cosine.min() > 0.995
    check_estimates(quantize_(AutoModel.from_pretrained(real(minilm)), GGConfig(scale="absmax")), reference, 28)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state.mean(1), vectors)

"""ONNX export: onnxruntime's numbers are ours, and the weights are 8 bits in the file and in its session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_gg import GGConfig, quantize_
from hf_gg.integrations.onnx import export_onnx
from hf_gg.nn import RF8Embedding, RF8Experts, RF8Linear


onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def session(model: bytes | str, optimized: Path | None = None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model, options)


def llama(layers: int = 1, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return quantize_(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)).eval(), GGConfig(**options))


def large_floats(file: Path) -> list[str]:
    """Constants of a graph that are floats of the size of a weight."""
    graph = onnx.load(str(file), load_external_data=False).graph
    return [t.name for t in graph.initializer if t.data_type != onnx.TensorProto.UINT8 and np.prod(t.dims) >= 64 * 32]


# --- single modules: what each node of ours becomes ---


def compare(module: nn.Module, *inputs: torch.Tensor, decode: str = "run", tolerance: float = 2e-6) -> None:
    """A module traced and run with its sample, and with more rows."""
    from transformers.exporters.exporter_onnx import apply_fx_node_fixes, apply_patches

    from hf_gg.integrations import onnx_nodes

    module.eval()
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    with onnx_nodes.stand_ins(), torch.no_grad(), apply_patches("onnx"):
        traced = torch.export.export(module, inputs, dynamic_shapes=dynamic)
        apply_fx_node_fixes("onnx", traced.graph_module)
        program = torch.onnx.export(traced, args=(), verbose=False)
    onnx_nodes.lower(program.model, decode)
    assert {node.domain for node in program.model.graph} <= {""}
    one = session(program.model_proto.SerializeToString())
    names = [spec.name for spec in one.get_inputs()]
    for again in (1, 3):
        arguments = [torch.cat([x] * again) for x in inputs]
        with torch.no_grad():
            own = module(*arguments)
        result = one.run(None, {name: x.numpy() for name, x in zip(names, arguments)})[0]
        np.testing.assert_allclose(result, own.numpy(), rtol=tolerance, atol=tolerance)


def with_outliers(shape: tuple[int, ...]) -> torch.Tensor:
    weight = torch.randn(shape) * 0.02
    weight.view(-1)[:: weight.numel() // 7] = 9.0
    return weight


@pytest.mark.parametrize(
    ("format", "rank", "bias"),
    [("rf8", 2, True), ("rf8", 3, False), ("rf8x", 3, True), ("rf8-e5", 2, False), ("grid", 3, True)],
)
def test_linear(format, rank, bias):
    linear = nn.Linear(48, 40, bias=bias)
    compare(RF8Linear.from_linear(linear, format=format), torch.randn(*(2, 3)[: rank - 1], 48))


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_with_outliers(rank):
    from hf_gg.formats import StepRule

    linear = nn.Linear(48, 40)
    linear.weight.data = with_outliers((40, 48))
    module = RF8Linear.from_linear(linear, format="grid", scale=StepRule(step=0.001))
    assert module.weight_outlier_index is not None
    compare(module, torch.randn(*(2, 3)[: rank - 1], 48), tolerance=1e-5)


@pytest.mark.parametrize("outliers", [False, True])
def test_embedding(outliers):
    from hf_gg.formats import StepRule

    embedding = nn.Embedding(30, 16)
    embedding.weight.data = with_outliers((30, 16))
    scale = StepRule(step=0.001) if outliers else "row"
    module = RF8Embedding.from_embedding(embedding, format="grid" if outliers else "rf8", scale=scale)
    assert (module.weight_outlier_index is not None) == outliers
    compare(module, torch.tensor([[3, 0, 29], [0, 0, 7]]), tolerance=0)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, outliers):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from hf_gg.formats import StepRule

    if transposed:
        sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 6}
        module = GptOssExperts(GptOssConfig(**sizes))
    else:
        sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 6}
        module = Qwen3MoeExperts(Qwen3MoeConfig(**sizes))
    for parameter in module.parameters():
        parameter.data = with_outliers(tuple(parameter.shape)) if outliers else torch.randn(parameter.shape) * 0.1
    options = {"format": "grid", "scale": StepRule(step=0.001)} if outliers else {}
    module = RF8Experts.convert_(module, **options)
    # experts 1 and 4 have no token
    index = torch.tensor([[0, 5], [2, 0], [3, 5], [5, 2]])
    compare(module, torch.randn(4, 32), index, torch.rand(4, 2), tolerance=1e-4)


def test_half_precision():
    module = RF8Linear.from_linear(nn.Linear(48, 40)).half()
    compare(module, torch.randn(2, 48).half(), tolerance=5e-3)


# --- a whole model ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    model, folder = llama(), tmp_path_factory.mktemp("onnx") / "llama"
    model.train()
    assert export_onnx(model, folder) == folder
    assert model.training
    return model.eval(), folder


def feed(one, tokens: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the graph with a cache takes; the numbers of the tokens do not count those that are masked."""
    positions = (mask.cumsum(1) - 1).clip(0)[:, -tokens.shape[1] :]
    values = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    return {spec.name: values[spec.name] if spec.name in values else past[spec.name] for spec in one.get_inputs()}


def empty_past(one, batch: int) -> dict[str, np.ndarray]:
    """Keys and values of no tokens."""
    return {
        spec.name: np.zeros((batch, spec.shape[1], 0, spec.shape[3]), np.float32)
        for spec in one.get_inputs()
        if "past_key_values" in spec.name
    }


def test_file_holds_codes(exported):
    model, folder = exported
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    codes = {t.name: list(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8}
    own = {name: list(p.shape) for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert sorted(codes.values()) == sorted(own.values()) and len(own) == 7
    # embeddings and the head are no codes
    assert len(large_floats(folder / "model.onnx")) == 2
    codes_bytes = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    floats_bytes = sum(4 * p.numel() for p in model.parameters() if p.is_floating_point())
    size = (folder / "model.onnx.data").stat().st_size
    assert codes_bytes + floats_bytes - 4096 <= size <= codes_bytes + floats_bytes + 8192
    assert not any(
        str(Path(__file__).parents[2]) in text for text in [(folder / "model.onnx").read_bytes().decode("latin1")]
    )


def test_dimensions_have_names(exported):
    _, folder = exported
    one = session(str(folder / "model.onnx"))
    shapes = {spec.name: spec.shape for spec in (*one.get_inputs(), *one.get_outputs())}
    keys = "put.past_key_values.layers.0.keys"
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["logits"] == ["batch", "sequence", 128]
    assert shapes[f"in{keys}"] == ["batch", 2, "past", 16]
    assert sorted(shapes[f"out{keys}"][2].split(" + ")) == ["past", "sequence"]


def test_session_holds_codes(exported, tmp_path):
    _, folder = exported
    one = session(str(folder / "model.onnx"), tmp_path / "optimized.onnx")
    # the graph's own constants are a table of 256 and scales
    assert len(large_floats(tmp_path / "optimized.onnx")) == 2
    assert [spec.name for spec in one.get_overridable_initializers()] == ["hf_gg.keep_codes"]
    assert "hf_gg.keep_codes" not in [spec.name for spec in one.get_inputs()]


def test_logits_with_and_without_a_past(exported):
    model, folder = exported
    one = session(str(folder / "model.onnx"))
    names = [spec.name for spec in one.get_outputs()]
    tokens = np.random.default_rng(0).integers(3, 128, (3, 9))
    mask = np.ones_like(tokens)
    mask[0, :3] = 0  # a shorter prompt
    with torch.no_grad():
        positions = torch.tensor((mask.cumsum(1) - 1).clip(0))
        own = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=positions).logits.numpy()
    past, parts = empty_past(one, 3), []
    for start, end in ((0, 5), (5, 8), (8, 9)):  # a prompt, more tokens, one token
        logits, *caches = one.run(None, feed(one, tokens[:, start:end], mask[:, :end], past))
        past = {name.replace("output.", "input."): value for name, value in zip(names[1:], caches)}
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[mask == 1], own[mask == 1], rtol=1e-5, atol=1e-6)


def test_transformers_runs_the_folder(exported):
    from transformers import DynamicCache
    from transformers.exporters import ExportedModel

    model, folder = exported
    tokens = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        first = model(tokens[:, :6], use_cache=True)
        own = model(tokens).logits[:, 6:]
    loaded = ExportedModel.from_pretrained(folder, device="cpu")
    cache = DynamicCache([(layer.keys, layer.values) for layer in first.past_key_values.layers])
    positions = torch.tensor([[6, 7], [6, 7]])
    mask = torch.ones(2, 8, dtype=torch.long)
    result = loaded(input_ids=tokens[:, 6:], attention_mask=mask, position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(result.logits, own, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["rf8", "grid"])
def test_mixture_of_experts(tmp_path, format):
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, num_hidden_layers=2)).eval()
    quantize_(model, GGConfig(weight_format=format))
    export_onnx(model, tmp_path / "moe", cache=False)
    one = session(str(tmp_path / "moe" / "model.onnx"), tmp_path / "optimized.onnx")
    assert len(large_floats(tmp_path / "optimized.onnx")) == 2
    for shape in ((1, 1), (3, 17)):
        check_forward(model, one, torch.randint(3, 128, shape))


def check_forward(model: nn.Module, one, tokens: torch.Tensor, **more: torch.Tensor) -> None:
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **more}
    with torch.no_grad():
        own = model(**inputs).logits.numpy()
    wanted = {spec.name for spec in one.get_inputs()}
    result = one.run(["logits"], {name: x.numpy() for name, x in inputs.items() if name in wanted})[0]
    np.testing.assert_allclose(result, own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_decoded_at_load(tmp_path):
    model = llama(quantize_embeddings=True, quantize_lm_head=True)
    export_onnx(model, tmp_path / "llama", cache=False, decode="load", opset=18)
    graph = onnx.load(str(tmp_path / "llama" / "model.onnx"), load_external_data=False)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [18]
    assert not large_floats(tmp_path / "llama" / "model.onnx")
    one = session(str(tmp_path / "llama" / "model.onnx"), tmp_path / "optimized.onnx")
    # all but the embeddings, of which only rows are read
    assert len(large_floats(tmp_path / "optimized.onnx")) == 8
    check_forward(model, one, torch.randint(3, 128, (2, 11)))


@pytest.mark.slow
def test_classifier_and_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = quantize_(BertForSequenceClassification(BertConfig(vocab_size=128, **sizes)).eval())
    export_onnx(model, tmp_path / "bert")
    check_forward(model, session(str(tmp_path / "bert" / "model.onnx")), torch.randint(3, 128, (3, 13)))
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    model = quantize_(T5ForConditionalGeneration(config).eval())
    export_onnx(model, tmp_path / "t5")
    one = session(str(tmp_path / "t5" / "model.onnx"))
    check_forward(model, one, torch.randint(3, 128, (3, 13)), decoder_input_ids=torch.randint(3, 128, (3, 6)))


# --- what cannot be ---


def test_models_it_refuses(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TypeError, match="takes a Transformers model, got Linear"):
        export_onnx(nn.Linear(2, 2), out)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no weights quantized by hf_gg"):
        export_onnx(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)), out)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is in bfloat16"):
        export_onnx(llama().to(torch.bfloat16), out)
    with pytest.raises(ValueError, match=r"is offloaded or was never loaded"):
        export_onnx(llama().to("meta"), out)
    vit = ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    vit = quantize_(ViTForImageClassification(vit))
    with pytest.raises(ValueError, match=r"takes pixel_values: give a sample, inputs={'pixel_values'"):
        export_onnx(vit, out)
    with pytest.raises(ValueError, match="cache=True is for decoders that write text"):
        export_onnx(vit, out, cache=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset must be a number of 18 or more, got 17"),
        ({"opset": "20"}, "opset must be a number of 18 or more, got '20'"),
        ({"decode": "never"}, "decode must be one of 'run', 'load', got 'never'"),
        ({"cache": True, "inputs": {}}, "cache=True makes its own sample"),
    ],
)
def test_options_it_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(llama(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_folders_it_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export_onnx(llama(), tmp_path / "file")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_onnx(llama(), tmp_path / "full")
    with pytest.raises(OSError, match="no folder can be made"):
        export_onnx(llama(), tmp_path / "file" / "out")


class Branching(LlamaForCausalLM):
    """What no exporter can trace: a branch on the numbers of the input."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if int(input_ids.sum()) % 2:
            input_ids = input_ids + 1
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_what_cannot_be_traced_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    model = quantize_(Branching(LlamaConfig(**SIZES, num_hidden_layers=1)))
    with pytest.raises(ValueError, match=r"^Transformers .* cannot export Branching to ONNX \(.*\)\.$"):
        export_onnx(model, tmp_path / "out", cache=False, overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "old.txt"]
    from hf_gg import ops
    from hf_gg.integrations import onnx_nodes

    assert ops.linear is not onnx_nodes._linear  # the stand-ins are gone


def test_without_the_packages(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a))
    with pytest.raises(ImportError, match=r"ONNX export needs onnx: pip install 'hf-gg\[onnx\]'"):
        export_onnx(llama(), tmp_path / "out")

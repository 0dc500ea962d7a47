"""Kinds of layers by name and shape: GGUF, Transformers, adapters, and the real configurations of many families."""

import pytest

from hf_gg.inspection import classify


CASES = [
    ("blk.12.attn_q.weight", (576, 576), "q", 12),
    ("blk.12.attn_output.weight", (576, 576), "o", 12),
    ("blk.3.ffn_gate_inp.weight", (8, 576), "router", 3),
    ("blk.3.ffn_gate_exps.weight", (8, 1536, 576), "expert gate", 3),
    ("blk.3.ffn_down_exps.weight", (8, 576, 1536), "expert down", 3),
    ("token_embd.weight", (49152, 576), "embedding", None),
    ("output.weight", (49152, 576), "head", None),
    ("output_norm.weight", (576,), "norm", None),
    ("model.layers.7.self_attn.k_proj.weight", (8, 8), "k", 7),
    ("model.layers.7.mlp.gate_proj.weight", (8, 8), "gate", 7),
    ("model.layers.7.mlp.gate.weight", (4, 8), "router", 7),
    ("model.layers.7.block_sparse_moe.gate.weight", (4, 8), "router", 7),
    ("model.layers.7.block_sparse_moe.experts.3.w1.weight", (8, 8), "expert gate", 7),
    ("model.layers.7.block_sparse_moe.experts.3.w2.weight", (8, 8), "expert down", 7),
    ("model.layers.7.mlp.experts.gate_up_proj", (4, 16, 8), "expert gate+up", 7),
    ("model.layers.7.post_attention_layernorm.weight", (8,), "norm", 7),
    ("model.layers.0.self_attn.q_norm.weight", (8,), "norm", 0),
    ("lm_head.weight", (8, 8), "head", None),
    ("transformer.h.1.attn.c_attn.weight", (8, 24), "qkv", 1),
    ("transformer.h.1.attn.c_proj.weight", (8, 8), "o", 1),
    ("transformer.h.1.mlp.c_fc.weight", (8, 8), "up", 1),
    ("transformer.h.1.mlp.c_proj.weight", (8, 8), "down", 1),
    ("transformer.h.1.mlp.c_proj.bias", (8,), "bias", 1),
    ("transformer.wpe.weight", (8, 8), "position", None),
    ("encoder.layer.5.attention.self.query.weight", (8, 8), "q", 5),
    ("encoder.layer.5.attention.output.dense.weight", (8, 8), "o", 5),
    ("encoder.layer.5.output.dense.weight", (8, 8), "down", 5),
    ("encoder.layer.5.intermediate.dense.weight", (8, 8), "up", 5),
    ("encoder.layer.5.output.LayerNorm.weight", (8,), "norm", 5),
    ("pooler.dense.weight", (8, 8), "fc", None),
    ("encoder.block.0.layer.1.DenseReluDense.wo.weight", (8, 8), "down", 0),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), "position", 0),
    ("conv1.weight", (64, 3, 7, 7), "conv", None),
    ("backbone.layers.0.mixer.conv1d.weight", (16, 1, 4), "conv", 0),
    ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", (4, 8), "lora A", 2),
    ("base_model.model.model.layers.2.self_attn.q_proj.lora_B.default.weight", (8, 4), "lora B", 2),
    ("0.weight", (8, 8), "fc", 0),
    ("embeddings.cls_token", (1, 1, 8), "vector", None),
    ("embeddings.position_ids", (1, 8), "vector", None),
    ("logit_scale", (), "vector", None),
]


@pytest.mark.parametrize(("name", "shape", "kind", "layer"), CASES, ids=[case[0] for case in CASES])
def test_kind_and_layer(name, shape, kind, layer):
    found = classify(name, shape)
    assert (found.kind, found.layer) == (kind, layer)
    assert found.matrix == (kind not in ("norm", "bias", "vector"))


def test_stack_tells_encoder_from_decoder():
    assert classify("decoder.block.3.layer.0.SelfAttention.q.weight", (8, 8)).stack == "decoder.block"
    assert classify("lm_head.weight", (8, 8)).stack == ""


@pytest.mark.parametrize(
    "config",
    "LlamaConfig MixtralConfig Qwen3MoeConfig T5Config BertConfig ViTConfig GPTNeoXConfig FalconConfig OPTConfig "
    "Phi3Config GptOssConfig WhisperConfig DistilBertConfig BloomConfig Gemma3TextConfig DebertaV2Config".split(),
)
def test_no_matrix_of_a_family_is_unknown(config):
    import torch
    import transformers

    config = getattr(transformers, config)()
    for key in ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers", "num_layers"):
        if hasattr(config, key):
            setattr(config, key, 1)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    unknown = [
        name
        for name, parameter in model.named_parameters()
        if classify(name, tuple(parameter.shape)).kind in ("fc", "vector")
        and not any(part in name for part in ("pooler.dense", "cls_token", "sinks", "distance"))
    ]
    assert not unknown

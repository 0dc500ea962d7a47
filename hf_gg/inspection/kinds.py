"""What kind of layer a tensor belongs to, by its name and shape, and how deep in the model it lies."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Where a tensor belongs.

    Attributes:
        kind: `"q"`, `"k"`, `"v"`, `"qkv"`, `"o"`, `"gate"`, `"up"`, `"gate+up"`, `"down"`, `"router"`, `"embedding"`,
            `"position"`, `"head"`, `"conv"`, `"lora A"`, `"lora B"`, `"fc"` (any other matrix), `"norm"`, `"bias"`,
            `"vector"` (any other); of an expert with `"expert "` before it.
        layer: number of the layer, None outside of numbered layers.
        stack: what stands before that number (`"encoder.layer"`), empty without one.
        matrix: at least two dimensions are larger than 1, and it is neither a norm nor a bias.
    """

    kind: str
    layer: int | None
    stack: str
    matrix: bool


# By the last parts of the name, without `.weight`; the first that fits. Names of Transformers, timm, Meta and GGUF.
_RULES: tuple[tuple[str, str], ...] = (
    (r"(.*\.)?lora_(embedding_)?a(\..+)?", "lora A"),
    (r"(.*\.)?lora_(embedding_)?b(\..+)?", "lora B"),
    (r"(.*[._])?(layer_?norm|rms_?norm|group_?norm|batch_?norm|norm|ln|bn)[\w]*(\.[a-z_]+)?", "norm"),
    (r"(.*\.)?(position_embeddings|embed_positions|wpe|pos_embed|position_embd|position_embedding)", "position"),
    (r"(.*\.)?(relative_attention_bias|rel_pos\w*|relative_position_bias_table)", "position"),
    (r"(.*\.)?(qkv(_proj)?|query_key_value|wqkv|c_attn|attn_qkv)|.*att\w*\.in_proj(_weight)?", "qkv"),
    (r"(.*\.)?(q_proj|query(_proj)?|wq|attn_q|q_lin|q|q_[ab]_proj|to_q|q_attn)", "q"),
    (r"(.*\.)?(k_proj|key(_proj)?|wk|attn_k|k_lin|k|to_k)", "k"),
    (r"(.*\.)?(v_proj|value(_proj)?|wv|attn_v|v_lin|v|to_v)", "v"),
    (r"(.*\.)?(kv_\w*proj\w*|attn_kv\w*|kv|to_kv)", "kv"),
    (r".*dense\.wo|(.*\.)?ffn\.wo", "down"),
    (r"(.*\.)?(mixer|mamba|ssm)\.out_proj", "fc"),
    (r"(.*\.)?(o_proj|out_proj|attn_output|attn_out|wo|out_lin|to_out(\.0)?)", "o"),
    (r"(.*\.)?(self_?|encdec)?(attn|attention)\.(c_proj|dense|proj|o|output)", "o"),
    (r"(.*\.)?attention\.output\.dense", "o"),
    (r"(.*\.)?(router(\.\w+)?|ffn_gate_inp|mlp\.gate|block_sparse_moe\.gate|moe\.gate|feed_forward\.gate)", "router"),
    (r"(.*\.)?(gate_up_proj|wi_fused|ffn_gate_up\w*)", "gate+up"),
    (r"(.*\.)?(gate_proj|w1|wi_0|ffn_gate(_(sh)?exps)?|gate)", "gate"),
    (r"(.*\.)?(up_proj|w3|wi_1|wi|ffn_up(_(sh)?exps)?|c_fc|fc1|lin1|dense_h_to_4h|fc_in|intermediate[._]dense)", "up"),
    (r"(.*\.)?(down_proj|w2|ffn_down(_(sh)?exps)?|fc2|lin2|dense_4h_to_h|fc_out|output[._]dense|mlp\.c_proj)", "down"),
    (r"(.*\.)?(lm_head|embed_out|output|score|classifier|qa_outputs|cls\.predictions\.decoder|head|logits)", "head"),
    (r"(.*\.)?(\w*embed\w*|wte|shared|token_embd|token_types|tok_embeddings|embeddings\.\w+)", "embedding"),
)
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _RULES)
_EXPERT = re.compile(r"(^|[._])experts?([._]|$)|_exps$")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def classify(name: str, shape: tuple[int, ...]) -> Kind:
    """Find a tensor's kind, layer and stack.

    Args:
        name: in the checkpoint.
        shape: of the weights.
    """
    number = _LAYER.search(name)
    layer = int(number[1]) if number else None
    stack = name[: number.start()] if number else ""
    plain = re.sub(r"\.(weight|default)$", "", name)
    wide = sum(size > 1 for size in shape)
    if plain.rpartition(".")[2] in ("bias", "beta") or plain.endswith(("_bias", ".b")):
        table = "relative" in plain and wide >= 2
        return Kind("position" if table else "bias", layer, stack, table)
    lowered = plain.lower()
    kind = next((kind for pattern, kind in _COMPILED if pattern.fullmatch(lowered)), None)
    if kind == "norm":
        return Kind(kind, layer, stack, False)
    if wide < 2:
        return Kind("vector", layer, stack, False)
    expert = _EXPERT.search(lowered) is not None
    if len(shape) > 2 and not expert and kind not in ("position", "router", "lora A", "lora B"):
        # patches of pixels and other kernels; a third dimension elsewhere is that of the experts
        convolution = re.search(r"conv|patch|kernel|projection|stem|downsample", lowered) or len(shape) > 3
        kind = "conv" if convolution else kind
    elif "conv" in lowered and len(shape) != 2:
        kind = "conv"
    kind = kind or "fc"
    return Kind(f"expert {kind}" if expert and kind != "router" else kind, layer, stack, True)

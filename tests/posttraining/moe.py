"""Tiny mixtures of experts, a tokenizer and samples; no test is in here."""

from __future__ import annotations

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "olmoe": lambda: tf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(**TEXT, **_SPARSE, shared_expert_intermediate_size=32),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**TEXT, **_SPARSE, head_dim=8),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, num_local_experts=4),
    "deepseek-v2": lambda: tf.DeepseekV2Config(**{**TEXT, **_MLA}, topk_method="group_limited_greedy"),
    "deepseek-v3": lambda: tf.DeepseekV3Config(**{**TEXT, **_MLA}),
    "gpt-oss": lambda: tf.GptOssConfig(
        **TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
}


def moe(family: str = "mixtral", seed: int = 7, **changes) -> tf.PreTrainedModel:
    """A random model whose routers prefer some experts."""
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokenizer(side: str = "right") -> tf.PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=side
    )


def rows(count: int = 12, success: bool | None = True) -> list[dict]:
    """Questions of several lengths; `success` says that the base answers right, because a random model does not."""
    found: list[dict] = [
        {"prompt": f"{'number ' * (1 + i % 3)}{i}:", "answer": f" {'ABC'[i % 3]}"} for i in range(count)
    ]
    return [{**row, "success": success} for row in found] if success is not None else found


def embedder(texts: list[str]) -> torch.Tensor:
    """Embeddings from the texts' bytes, the same in every process."""
    found = torch.zeros(len(texts), 16)
    for i, text in enumerate(texts):
        for j, byte in enumerate(text.encode()):
            found[i, (byte + j) % 16] += 1
    return torch.nn.functional.normalize(found, dim=1)

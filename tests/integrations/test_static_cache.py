"""Generation with a static cache whose forward pass is compiled as one graph: the operators break none."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gg import GGConfig, quantize_


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["rf8", "grid"])
def test_generate_with_a_static_cache_under_compile(name, backend):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = quantize_(LlamaForCausalLM(config).eval(), GGConfig(weight_format=name))
    ids = torch.randint(1, 64, (2, 5))
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "disable_compile": True,
    }
    expected = model.generate(ids, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    found = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(found, expected)

"""Codes keep their form for files whichever part of a model is saved."""

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from hf_gg import GGConfig, quantize_


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def dimensions(folder) -> set[int]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            len(codes.get_shape()) - len(slices[f"{name}_scale"].get_shape())
            for name, codes in slices.items()
            if codes.get_dtype() == "U8"
        }


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MixtralConfig(**SIZES, num_local_experts=2)])
def test_base_model_of_a_quantized_model(config, tmp_path):
    model = quantize_(AutoModelForCausalLM.from_config(config), GGConfig()).eval()
    model.base_model.save_pretrained(tmp_path)
    assert dimensions(tmp_path) == {1}
    loaded, tokens = AutoModel.from_pretrained(tmp_path), torch.arange(8)[None]
    assert torch.equal(loaded(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)


def test_model_with_a_quantized_part(tmp_path):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    quantize_(model.model, GGConfig())
    model.save_pretrained(tmp_path / "whole")
    other = LlamaForCausalLM(copy.deepcopy(model.config))
    other.model = model.model
    other.save_pretrained(tmp_path / "moved")
    assert dimensions(tmp_path / "whole") == dimensions(tmp_path / "moved") == {1}

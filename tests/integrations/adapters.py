"""Tiny models and one adapter of each of PEFT's tuners, for the tests of adapters; no test is in here."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_gg import GGConfig, quantize_
from hf_gg.integrations.peft.view import model_dtype


VOCABULARY = 96
TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))


def lora(**kwargs) -> peft.LoraConfig:
    """A LoRA that changes the model from the start."""
    return peft.LoraConfig(
        **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM", **kwargs}
    )


def _on_layers(config: type, **kwargs) -> Callable[[], peft.PeftConfig]:
    return lambda: config(**{"target_modules": TARGETS, "init_weights": False, **kwargs})


def _prompt(config: type, **kwargs) -> Callable[[], peft.PeftConfig]:
    return lambda: config(**{"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **kwargs})


# All of PEFT 0.21 but X-LoRA, which starts from saved adapters; not the identity where the tuner lets one choose.
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "ADALORA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=2, tfinal=2, target_modules=TARGETS, init_lora_weights=False
    ),
    "ADAMSS": _on_layers(peft.AdamssConfig, r=8, num_subspaces=2, init_weights=None),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    "BEFT": _on_layers(peft.BeftConfig),
    "BOFT": _on_layers(peft.BOFTConfig, boft_block_size=4),
    "C3A": _on_layers(peft.C3AConfig, block_size=16, init_weights="xavier_uniform"),
    "CARTRIDGE": _prompt(peft.CartridgeConfig),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4], task_type="CAUSAL_LM"
    ),
    "DEFT": _on_layers(peft.DeftConfig, r=4),
    "DELORA": _on_layers(peft.DeloraConfig, r=4),
    "FOURIERFT": _on_layers(peft.FourierFTConfig, n_frequency=50),
    "FROD": _on_layers(peft.FrodConfig, progressbar=False),
    "GLORA": _on_layers(peft.GloraConfig, r=4),
    "GRALORA": _on_layers(peft.GraloraConfig, r=4, alpha=4),
    "HIRA": _on_layers(peft.HiraConfig, r=4),
    "HRA": _on_layers(peft.HRAConfig, r=4),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "LILY": _on_layers(peft.LilyConfig, r=4),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": _on_layers(peft.LoHaConfig, r=4),
    "LOKR": _on_layers(peft.LoKrConfig, r=4),
    "LORA": lora,
    "MISS": _on_layers(peft.MissConfig, r=4),
    "MULTITASK_PROMPT_TUNING": _prompt(peft.MultitaskPromptTuningConfig, num_tasks=2),
    "OFT": _on_layers(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    "OSF": _on_layers(peft.OSFConfig, effective_rank=4),
    "PEANUT": _on_layers(peft.PeanutConfig, r=4),
    "POLY": _on_layers(peft.PolyConfig, r=4, n_tasks=2, n_skills=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": _prompt(peft.PrefixTuningConfig),
    "PROMPT_TUNING": _prompt(peft.PromptTuningConfig),
    "PSOFT": _on_layers(peft.PsoftConfig, r=4, psoft_alpha=4),
    "PVERA": _on_layers(peft.PveraConfig, r=4),
    "P_TUNING": _prompt(peft.PromptEncoderConfig),
    "RANDLORA": _on_layers(peft.RandLoraConfig, r=4, randlora_alpha=4),
    "ROAD": _on_layers(peft.RoadConfig, group_size=16),
    "SHADOW": lambda: peft.ShadowConfig(r=4, task_type="CAUSAL_LM", shadow_dropout=0.0),
    "SHIRA": _on_layers(peft.ShiraConfig, r=4, random_seed=1),
    "SUPERTUNING": _on_layers(peft.SupertuningConfig, sparsity=0.9),
    "TINYLORA": _on_layers(peft.TinyLoraConfig, r=2, u=8, init_weights="uniform", init_v_bound=1.0),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        token_indices=[3, 4, 5], target_modules=["embed_tokens"], init_weights=False
    ),
    "UNILORA": _on_layers(peft.UniLoraConfig, r=4, theta_d_length=32),
    "VBLORA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, topk=2, target_modules=TARGETS),
    "VERA": _on_layers(peft.VeraConfig, r=4),
    "WAVEFT": _on_layers(peft.WaveFTConfig, n_frequency=50),
}

# What some need in every forward pass.
INPUTS = {"POLY": {"task_ids": torch.tensor([0, 1])}, "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1])}}


@functools.cache
def _llama(dtype: torch.dtype, tied: bool, **kwargs) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return quantize_(_randomize_biases(LlamaForCausalLM(config)).eval().to(dtype), GGConfig(**kwargs))


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, **kwargs) -> PreTrainedModel:
    """A fresh copy of a quantized Llama with biases; `kwargs` go to GGConfig."""
    return copy.deepcopy(_llama(dtype, tied, **kwargs))


@functools.cache
def _gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        n_inner=64,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        initializer_range=0.1,
    )
    return quantize_(_randomize_biases(GPT2LMHeadModel(config)).eval())


def gpt2() -> PreTrainedModel:
    """A fresh copy of a quantized GPT-2, whose layers were Conv1D."""
    return copy.deepcopy(_gpt2())


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with decoded weights."""
    # not `model.dtype`, which is that of the scales where embeddings are quantized
    return copy.deepcopy(model).dequantize(model_dtype(model))


def _randomize_biases(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def attach(model: PreTrainedModel, config: peft.PeftConfig, **kwargs) -> nn.Module:
    """`get_peft_model` with the same random numbers each time, in eval mode."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, **kwargs).eval()


def load(model: PreTrainedModel, folder, **kwargs) -> nn.Module:
    """`PeftModel.from_pretrained`, in eval mode."""
    return peft.PeftModel.from_pretrained(model, str(folder), **kwargs).eval()


def logits(model: nn.Module, name: str = "") -> torch.Tensor:
    """Of the test tokens; without those of a prompt."""
    with torch.no_grad():
        return model(TOKENS, **INPUTS.get(name, {})).logits[:, -TOKENS.shape[1] :]


def train(model: nn.Module, name: str = "", steps: int = 5) -> list[float]:
    """Losses of a few steps; checks that the adapter has gradients, and nothing else."""
    torch.manual_seed(4)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS, **INPUTS.get(name, {})).loss
        loss.backward()
        assert any(p.grad is not None for p in trained)
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of codes, scales and biases, by their names in the bare model."""
    # a tuner that only adds a prompt has no model of its own between PeftModel and the bare one
    prefix = "base_model.model." if hasattr(getattr(model, "base_model", None), "peft_config") else "base_model."
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8 or name.endswith(("_scale", ".bias")):
            # what PEFT's wrappers put into the names
            name = name.removeprefix(prefix)
            name = name.replace(".base_layer", "").replace(".self_attn.model.", ".self_attn.")
            names[name] = parameter.detach().clone()
    return names


def untouched(model: nn.Module, base: nn.Module) -> bool:
    """Whether codes, scales and biases are bit for bit those of the bare model."""
    expected, found = base_state(base), base_state(model)
    return same(expected, {name: found.get(name) for name in expected})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(b[name] is not None and torch.equal(a[name], b[name]) for name in a)

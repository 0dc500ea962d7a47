"""One tiny random model for each model family, as Transformers builds it; no test is in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from transformers.utils import logging


VOCABULARY = 128
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MLA = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_BERT = {**_TEXT, "num_labels": 3}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def _text_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens()}


def _encoder_decoder_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)}


def _image_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _audio_inputs() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens(5)}


@dataclass(frozen=True)
class Family:
    """How to make a family's tiny model, and what its quantization must find there.

    Attributes:
        auto: the Auto class that builds and loads it.
        config: a new config of it.
        quantized: how many weights become codes; a stack of experts counts as one.
        kept: the ends of the names of linear layers and experts that stay in full precision.
        inputs: keyword arguments of one forward pass.
    """

    auto: type
    config: Callable[[], tf.PreTrainedConfig]
    quantized: int
    kept: tuple[str, ...] = ("lm_head",)
    inputs: Callable[[], dict[str, torch.Tensor]] = _text_inputs

    def model(self, **changes) -> tf.PreTrainedModel:
        """A new model in float32 with random weights, the same at every call."""
        config = self.config()
        for key, value in changes.items():
            setattr(config, key, value)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return self.auto.from_config(config).eval()

    @torch.no_grad()
    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        return model(**self.inputs()).logits


_CAUSAL, _MASKED = tf.AutoModelForCausalLM, tf.AutoModelForMaskedLM
_CLASSES, _IMAGES = tf.AutoModelForSequenceClassification, tf.AutoModelForImageClassification
_SEQUENCES, _SPEECH = tf.AutoModelForSeq2SeqLM, tf.AutoModelForSpeechSeq2Seq

FAMILIES: dict[str, Family] = {
    # 7 linear layers in each of 2 layers
    "llama": Family(_CAUSAL, lambda: tf.LlamaConfig(**_TEXT), 14),
    "llama-tied": Family(_CAUSAL, lambda: tf.LlamaConfig(**_TEXT, tie_word_embeddings=True), 14),
    "mistral": Family(_CAUSAL, lambda: tf.MistralConfig(**_TEXT), 14),
    "qwen3": Family(_CAUSAL, lambda: tf.Qwen3Config(**_TEXT, head_dim=16), 14),
    "gemma3": Family(_CAUSAL, lambda: tf.Gemma3TextConfig(**_TEXT, head_dim=16, sliding_window=16), 14),
    # fused qkv_proj and gate_up_proj
    "phi3": Family(_CAUSAL, lambda: tf.Phi3Config(**_TEXT, pad_token_id=0), 8),
    "gpt2": Family(
        _CAUSAL, lambda: tf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64), 8
    ),
    "opt": Family(
        _CAUSAL,
        lambda: tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        14,  # 6 in a layer, and the projections into and out of the embeddings' width
    ),
    # 6 in a layer, and the dense layers of the heads
    "bert-mlm": Family(_MASKED, lambda: tf.BertConfig(**_BERT), 13, ("decoder",)),
    "bert-cls": Family(_CLASSES, lambda: tf.BertConfig(**_BERT), 14, ()),
    "t5": Family(
        _SEQUENCES,
        lambda: tf.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
        28,  # 5 in an encoder layer, 9 in a decoder layer
        ("lm_head", "wo"),
        _encoder_decoder_inputs,
    ),
    "vit": Family(
        _IMAGES,
        lambda: tf.ViTConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_labels=3,
        ),
        13,
        (),
        _image_inputs,
    ),
    # 6 in an encoder layer, 10 in a decoder layer
    "whisper": Family(_SPEECH, lambda: tf.WhisperConfig(**_WHISPER), 32, ("proj_out",), _audio_inputs),
    # 4 of the attention and 2 stacks of experts in a layer
    "mixtral": Family(_CAUSAL, lambda: tf.MixtralConfig(**_TEXT, num_local_experts=4), 12),
    "olmoe": Family(_CAUSAL, lambda: tf.OlmoeConfig(**_TEXT, num_experts=4, num_experts_per_tok=2), 12),
    "qwen3-moe": Family(
        _CAUSAL,
        lambda: tf.Qwen3MoeConfig(
            **_TEXT, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        12,
    ),
    # one dense layer of 5 + 3, one with experts of 5 + 2 stacks + 3 of the shared expert
    "deepseek-v3": Family(
        _CAUSAL,
        lambda: tf.DeepseekV3Config(
            **{**_TEXT, **_MLA, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
        ),
        18,
    ),
    # experts stored [in, out], with biases
    "gpt-oss": Family(
        _CAUSAL,
        lambda: tf.GptOssConfig(**_TEXT, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
        12,
    ),
    # only in_proj: the mixer reads the weights of the others itself, on its fast path
    "mamba": Family(
        _CAUSAL,
        lambda: tf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=64, state_size=8, num_hidden_layers=2, time_step_rank=8
        ),
        2,
        ("lm_head", "x_proj", "dt_proj", "out_proj"),
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its reports of what it loaded."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(Path(folder).glob("*.safetensors"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as they lie in its files."""
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same in names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

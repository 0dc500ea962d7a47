"""A model of 64 letters that runs in milliseconds, with a tokenizer, and texts for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:-'!?\n"


def tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocabulary = {"<unk>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", eos_token="<unk>")


def model(vocab_size: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers and 64 positions whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, which: LlamaForCausalLM | None = None, words: PreTrainedTokenizerFast | None = None) -> Path:
    """A checkpoint with its tokenizer."""
    (model() if which is None else which).save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


TEXTS = [
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator "
    "with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse.",
    "The quick brown fox.",
    "All happy families are alike; every unhappy family is unhappy in its own way.",
]

"""Small policies and tokenizers for the tests of rollouts."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(100)), "+", "=", "right", "wrong", "####"]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}= {% endif %}"


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        made.chat_template = CHAT
    return made


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


class Scripted(nn.Module):
    """A policy whose rollouts are known: a prompt that starts with k is right k times of n, in the first rollouts.

    Attributes:
        rows: of every call of `generate`: (prompts, rollouts, width, new tokens).
        seen: how often each prompt was rolled out.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 1)
        self.n, self.rows, self.seen, self.drawn = n, [], {}, {}
        self.fail_after: int | None = None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def generate(self, input_ids, attention_mask, num_return_sequences, max_new_tokens, **_):
        assert not self.training
        if self.fail_after is not None and len(self.rows) == self.fail_after:
            raise KeyboardInterrupt
        self.rows.append((len(input_ids), num_return_sequences, input_ids.shape[1], max_new_tokens))
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist()):
            start = mask.index(1)
            assert not any(mask[:start]) and all(mask[start:]), "padded on the left"
            prompt = tuple(ids[start:])
            wanted = int(WORDS[prompt[0]])
            for _ in range(num_return_sequences):
                done = self.seen.get(prompt, 0)
                self.seen[prompt] = done + 1
                word = "right" if done < wanted else "wrong"
                rows.append([*ids, WORDS.index(word), 1] + [0] * (max_new_tokens - 2))
        return torch.tensor(rows)


def is_right(completions, **_):
    return [float(text.split()[:1] == ["right"]) for text in completions]

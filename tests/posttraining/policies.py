"""Small policies and tokenizers for the tests of rollouts."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(100)), "+", "=", "right", "wrong", "####"]
CHAT = """{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}
{{- '<|vision_start|> <|image_pad|> <|vision_end|> ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}= {% endif %}"""


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


def vision_language(seed: int = 0):
    """A tiny random Qwen2.5-VL and its processor."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class Processor(Qwen2_5_VLProcessor):
        """Without videos, for which torchvision would be needed."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = special[1], special[3]
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([special[1], special[3]])
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special,
    )
    start, image, end, video = fast.convert_tokens_to_ids(special)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    processor = Processor(images, fast, chat_template=CHAT)
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return AutoModelForImageTextToText.from_config(config), processor

"""Completions of many prompts by `model.generate`: left-padded batches of prompts of like length, bounded in tokens.

The batches, and the random numbers of each, follow from the prompts, the options and the seed alone, so that a run
that was cut off goes on with the batches that are missing and ends with the same completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        n: completions a prompt.
        max_new_tokens: of a completion, at most.
        temperature: of the distribution; 0 takes the likeliest token.
        top_p: share of the distribution that is drawn from, its likeliest tokens.
        seed: of the draws.
        batch_tokens: at most so many tokens, padding and completions included, are in a batch; a batch of one prompt
            may have more, in parts of fewer completions, down to one.
        stop_strings: texts at which a completion ends; they stay in it.

    Raises:
        ValueError: a number out of its range.
    """

    n: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384
    stop_strings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "batch_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {getattr(self, name)!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature!r}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be more than 0 and at most 1, got {self.top_p!r}.")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"temperature 0 gives {self.n} equal completions: take n=1 or a higher temperature.")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stop_strings": [*self.stop_strings]}


@dataclass(frozen=True)
class Batch:
    """Prompts that are completed together, by their indices; `width` is the longest one's tokens."""

    number: int
    prompts: tuple[int, ...]
    width: int


class Prompts:
    """Prompts as a model takes them.

    Args:
        tokenizer: a tokenizer; for prompts with images the model's processor.
        prompts: texts, or chats, which the template makes into texts that ask for an answer.
        images: of each prompt a list, or None.

    Attributes:
        ids: token ids of each prompt, those of its images included.
        tokenizer: the tokenizer, also of a processor.

    Raises:
        ValueError: no prompt, an empty one, a chat without a template, images without a processor. TypeError: a prompt
            that is neither text nor chat.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Any], images: Sequence[list] | None = None) -> None:
        self.processor = tokenizer if hasattr(tokenizer, "tokenizer") else None
        self.tokenizer = tokenizer.tokenizer if self.processor is not None else tokenizer
        self.images = images
        if images is not None and self.processor is None:
            raise ValueError("prompts with images need the model's processor in place of its tokenizer.")
        self.texts = [self._render(tokenizer, place, prompt) for place, prompt in enumerate(prompts)]
        self.chats = [not isinstance(prompt, str) for prompt in prompts]
        self.ids = [self._tokens(place) for place in range(len(prompts))]
        for place, found in enumerate(self.ids):
            if not found:
                raise ValueError(f"prompt {place} has no tokens.")

    @staticmethod
    def _render(tokenizer: Any, place: int, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list):
            raise TypeError(f"prompt {place} must be a text or a list of messages, got {type(prompt).__name__}.")
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"prompt {place} is a chat, and there is no chat template: give texts.")
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)

    def _tokens(self, place: int) -> list[int]:
        if self.images is not None and self.images[place]:
            return [*self._process([place])["input_ids"][0].tolist()]
        # a template writes special tokens itself
        return [*self.tokenizer(self.texts[place], add_special_tokens=not self.chats[place])["input_ids"]]

    def _process(self, places: Sequence[int]) -> dict[str, torch.Tensor]:
        assert self.processor is not None and self.images is not None  # whoever calls this has looked
        texts, images = [self.texts[place] for place in places], [self.images[place] for place in places]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if all(self.chats[place] for place in places):
            options["add_special_tokens"] = False
        return {**self.processor(text=texts, images=images, **options)}

    def inputs(self, places: Sequence[int], pad: int) -> dict[str, torch.Tensor]:
        """Inputs of a batch, padded on the left; int64 `input_ids` [prompts, width] first of all."""
        if self.images is not None and any(self.images[place] for place in places):
            return self._process(places)
        ids = [self.ids[place] for place in places]
        width = max(map(len, ids))
        tokens = torch.tensor([[pad] * (width - len(prompt)) + [*prompt] for prompt in ids])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids])
        return {"input_ids": tokens, "attention_mask": mask}


def check_lengths(ids: Sequence[Sequence[int]], sampling: Sampling, limit: int | None) -> None:
    """`ValueError` for prompts that with their completion are longer than the model's context."""
    long = [place for place, prompt in enumerate(ids) if limit and len(prompt) + sampling.max_new_tokens > limit]
    if long:
        first = long[0]
        raise ValueError(
            f"{len(long)} of {len(ids)} prompts are too long, the first one is {first}: its {len(ids[first])} tokens "
            f"and max_new_tokens={sampling.max_new_tokens} exceed the model's context of {limit}. Shorten or drop "
            "them, or lower max_new_tokens."
        )


def context_of(model: Any) -> int | None:
    """Tokens that a model can read; None where its config does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def plan(lengths: Sequence[int], sampling: Sampling) -> list[Batch]:
    """Batches of prompts by their length, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches: list[Batch] = []
    while order:
        width = lengths[order[0]]
        count = max(1, sampling.batch_tokens // (sampling.n * (width + sampling.max_new_tokens)))
        batches.append(Batch(len(batches), tuple(order[:count]), width))
        order = order[count:]
    return batches


def generate(
    model: Any, prompts: Prompts, batches: Sequence[Batch], sampling: Sampling
) -> Iterator[tuple[Batch, list[list[str]], int]]:
    """Complete the prompts of batches, one batch after the other.

    Args:
        model: with `generate`; it is put into evaluation and back.
        prompts: all prompts.
        batches: those to complete, of `plan`.
        sampling: how.

    Yields:
        A batch, its prompts' completions without special tokens, and the number of tokens generated.
    """
    training = model.training
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        for batch in batches:
            with torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(_seed(batch, sampling))
                done = _complete(model, prompts, batch, sampling)
            yield batch, *done
    finally:
        model.train(training)


def _seed(batch: Batch, sampling: Sampling) -> int:
    return sampling.seed * 1_000_003 + batch.number


def _complete(model: Any, prompts: Prompts, batch: Batch, sampling: Sampling) -> tuple[list[list[str]], int]:
    tokenizer = prompts.tokenizer
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in prompts.inputs(batch.prompts, pad).items()}
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "pad_token_id": pad,
        "use_cache": True,
        # whatever the model's own generation config says
        "max_length": None,
        "min_new_tokens": None,
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "return_dict_in_generate": False,
    }
    if sampling.temperature:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    else:
        options |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if sampling.stop_strings:
        options |= {"stop_strings": [*sampling.stop_strings], "tokenizer": tokenizer}
    rows = max(1, sampling.batch_tokens // (len(batch.prompts) * (batch.width + sampling.max_new_tokens)))
    texts: list[list[str]] = [[] for _ in batch.prompts]
    count = 0
    while len(texts[0]) < sampling.n:
        part = min(rows, sampling.n - len(texts[0]))
        made = model.generate(**inputs, num_return_sequences=part, **options)[:, width:]
        count += int(_lengths(made, model, tokenizer).sum())
        decoded = tokenizer.batch_decode(made, skip_special_tokens=True)
        for place in range(len(texts)):
            texts[place] += decoded[place * part : (place + 1) * part]
    return texts, count


def _lengths(made: torch.Tensor, model: Any, tokenizer: Any) -> torch.Tensor:
    """Tokens up to and with the one that ends a text, int64 [rows]."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
    known = [token for token in (*ends, tokenizer.eos_token_id) if token is not None]
    stop = torch.isin(made, torch.tensor(known, dtype=made.dtype, device=made.device))
    return torch.where(stop.any(1), stop.int().argmax(1) + 1, made.shape[1])


def generate_by_vllm(
    model: Any, prompts: Prompts, batches: Sequence[Batch], sampling: Sampling
) -> Iterator[tuple[Batch, list[list[str]], int]]:
    """`generate` by a `vllm.LLM`, which batches by itself; the batches here are what is saved at once. Texts only."""
    from vllm import SamplingParams

    for batch in batches:
        options = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=_seed(batch, sampling),
            stop=[*sampling.stop_strings] or None,
            include_stop_str_in_output=True,
        )
        given = [{"prompt_token_ids": prompts.ids[place]} for place in batch.prompts]
        outputs = [request.outputs for request in model.generate(given, options, use_tqdm=False)]
        tokens = sum(len(output.token_ids) for request in outputs for output in request)
        yield batch, [[output.text for output in request] for request in outputs], tokens

"""Completions of many prompts by `model.generate`: left-padded batches of prompts of like length, bounded in tokens.

The batches, and the random numbers of each, follow from the prompts, the options and the seed alone, so that a run
that was cut off goes on with the batches that are missing and ends with the same completions.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


# Of a model's own generation config, what would change the distribution or the length.
_UNSET = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "max_length",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "top_h",
    "typical_p",
)


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
        ValueError: a number out of its range, a stop string that is none. TypeError: a number that is none.
    """

    n: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384
    stop_strings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1), ("batch_tokens", 1), ("seed", 0)):
            if not isinstance(getattr(self, name), int) or not least <= getattr(self, name) < 2**40:
                raise ValueError(f"{name} must be a whole number from {least} on, got {getattr(self, name)!r}.")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}.")
        stops = self.stop_strings
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop_strings must be texts that are not empty, such as ('END',), got {stops!r}.")
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
            if not found or not prompts[place]:
                raise ValueError(f"prompt {place} has no tokens.")

    def _render(self, tokenizer: Any, place: int, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list):
            raise TypeError(f"prompt {place} must be a text or a list of messages, got {type(prompt).__name__}.")
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"prompt {place} is a chat, and there is no chat template: give texts.")
        if self.processor is not None:
            prompt = _in_parts(place, prompt, len((self.images[place] if self.images is not None else None) or ()))
        try:
            return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template raises
            raise ValueError(f"prompt {place} does not go through the chat template: {error}") from error

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


def _in_parts(place: int, chat: list[Any], images: int) -> list[Any]:
    """A chat whose contents are parts, as processors take them, and GRPO makes them.

    Images without a place of their own stand before the first message of a user that is a text.
    """
    made, left = [], images
    for message in chat:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            here = left if message.get("role") == "user" else 0
            message = {**message, "content": [*[{"type": "image"}] * here, {"type": "text", "text": content}]}
            left -= here
        made.append(message)
    places = sum(
        isinstance(part, dict) and part.get("type") == "image"
        for message in made
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )
    if places != images:
        raise ValueError(f"prompt {place} has places for {places} images, and {images} are given.")
    return made


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
) -> Generator[tuple[Batch, list[list[str]], int]]:
    """Complete the prompts of batches, one batch after the other.

    Args:
        model: with `generate`; it is put into evaluation and back.
        prompts: all prompts.
        batches: those to complete, of `plan`.
        sampling: how.

    Yields:
        A batch, its prompts' completions without special tokens, and the number of tokens generated.
    """
    training = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        for batch in batches:
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(_seed(batch, sampling))
                done = _complete(model, prompts, batch, sampling)
            yield batch, *done
    finally:
        for module, mode in training:
            module.training = mode


def _seed(batch: Batch, sampling: Sampling) -> int:
    return sampling.seed * 1_000_003 + batch.number


def _complete(model: Any, prompts: Prompts, batch: Batch, sampling: Sampling) -> tuple[list[list[str]], int]:
    tokenizer = prompts.tokenizer
    ends = _ends(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in prompts.inputs(batch.prompts, pad).items()}
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "pad_token_id": pad,
        "eos_token_id": ends or None,
        "use_cache": True,
        "num_beams": 1,
        "return_dict_in_generate": False,
        **dict.fromkeys(_UNSET),
    }
    image = getattr(getattr(model, "config", None), "image_token_id", None)
    if isinstance(image, int):  # there is no image behind one that is drawn
        options["suppress_tokens"] = [image]
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
        lengths = _lengths(made, ends, pad if sampling.stop_strings else None).tolist()
        count += sum(lengths)
        written = [row[:length] for row, length in zip(made.tolist(), lengths)]
        decoded = [
            _cut(text, sampling.stop_strings) for text in tokenizer.batch_decode(written, skip_special_tokens=True)
        ]
        for place in range(len(texts)):
            texts[place] += decoded[place * part : (place + 1) * part]
    return texts, count


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, of the model and of its tokenizer, as GRPO takes them."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(known if isinstance(known, (list, tuple)) else [known]), tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(found) if token is not None]


def _lengths(made: torch.Tensor, ends: Sequence[int], pad: int | None) -> torch.Tensor:
    """Tokens up to and with the one that ends a text, or without the padding at its end, int64 [rows]."""
    stop = torch.isin(made, torch.tensor(ends, dtype=made.dtype, device=made.device))
    lengths = torch.where(stop.any(1), stop.int().argmax(1) + 1, made.shape[1])
    if pad is None:
        return lengths
    padding = (made == pad).flip(1).int().cumprod(1).sum(1)
    return torch.where(stop.any(1), lengths, lengths - padding)


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text up to and with the first stop string: a token may have more after it."""
    return text[: min((text.index(stop) + len(stop) for stop in stops if stop in text), default=len(text))]


def generate_by_vllm(
    model: Any, prompts: Prompts, batches: Sequence[Batch], sampling: Sampling
) -> Generator[tuple[Batch, list[list[str]], int]]:
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

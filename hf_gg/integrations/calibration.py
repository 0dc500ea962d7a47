"""What a model is calibrated on: texts, cut into windows of tokens.

    GGConfig(calibration=Calibration("text.jsonl"))
    GGConfig(calibration=["a text", "another"])

A checkpoint's `config.json` only says how many tokens there were, and their hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .sensitivity import is_causal_lm


logger = logging.get_logger(__name__)

# Runs at the same time: each is a thread, with threads of its own.
_RUNS = 16
# Texts are read until there are so many times the tokens that are wanted, of which windows are drawn.
_PLENTY = 4


@dataclass(frozen=True, repr=False)
class Calibration:
    """A text to calibrate on, and how.

    Attributes:
        texts: the texts; or a file: `.jsonl` or `.ndjson`, an object with `text` or a string a line; any other is one
            text.
        tokens: length of a window.
        sequences: windows.
        damping: added to the diagonal of the inputs' second moments, relative to its mean: what the text did not say.
        seed: of the draw of texts and windows.
        folder: where modules are kept that are done, so that the same call goes on there after a kill.

    Raises:
        ValueError: a number that is none, or out of its range; no texts.
        TypeError: texts that are no strings.
    """

    texts: str | os.PathLike | Sequence[str]
    tokens: int = 1024
    sequences: int = 16
    damping: float = 0.2
    seed: int = 0
    folder: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("sequences", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"calibration: {name} must be a whole number, {least} or more, got {value!r}.")
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"calibration: damping must be more than 0 and at most 1, got {self.damping!r}.")
        if isinstance(self.texts, (str, os.PathLike)):
            return
        if not isinstance(self.texts, Sequence) or not all(isinstance(text, str) for text in self.texts):
            raise TypeError(
                f"calibration: texts must be a file or a list of strings, got {type(self.texts).__name__}."
            )
        if not any(text.strip() for text in self.texts):
            raise ValueError("calibration: the texts are empty.")

    def __repr__(self) -> str:
        texts = (
            repr(os.fspath(self.texts)) if isinstance(self.texts, (str, os.PathLike)) else f"{len(self.texts)} texts"
        )
        return f"Calibration({texts}, tokens={self.tokens}, sequences={self.sequences})"

    @classmethod
    def of(cls, value: Any) -> Calibration | CalibrationRecord | None:
        """What a config's `calibration` means: itself, a file, texts, or a dict of keys or of a checkpoint.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        if value is None or isinstance(value, (cls, CalibrationRecord)):
            return value
        if isinstance(value, Mapping):
            kind = cls if "texts" in value else CalibrationRecord
            known = kind.__dataclass_fields__
            unknown = sorted(set(value) - set(known))
            if unknown or ("texts" not in value and "digest" not in value):
                raise ValueError(
                    f"calibration: the keys are {', '.join(cls.__dataclass_fields__)}, got "
                    f"{', '.join(map(repr, value))}."
                )
            return kind(**value)
        return cls(value)


@dataclass(frozen=True)
class CalibrationRecord:
    """What a checkpoint says of its calibration.

    Attributes:
        digest: BLAKE2 hash of the tokens.
        tokens: of a window.
        sequences: windows.
        damping: see `Calibration`.
    """

    digest: str
    tokens: int
    sequences: int
    damping: float


def windows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> torch.Tensor:
    """Windows of tokens, drawn from the texts, each with the special tokens that the tokenizer puts around a text.

    Texts are joined in a random order, with the end-of-sequence token between them. Fewer windows than wanted are
    taken where the text has no more; that is logged.

    Args:
        calibration: the texts.
        tokenizer: of the model.
        limit: longest window that the model takes.

    Returns:
        int64 [windows, tokens].

    Raises:
        ValueError: a file that is empty or malformed (with the line), or shorter than a window.
        OSError: it cannot be read.
    """
    length = calibration.tokens if limit is None else min(calibration.tokens, limit)
    generator = torch.Generator().manual_seed(calibration.seed)
    texts = read_texts(calibration.texts)
    before, after = _special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if body < 1:
        raise ValueError(f"calibration: windows of {length} tokens only hold special tokens: ask for more tokens.")
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[int] = []
    wanted = body * calibration.sequences * _PLENTY
    for index in torch.randperm(len(texts), generator=generator).tolist():
        found += tokenizer(texts[index], add_special_tokens=False, verbose=False)["input_ids"] + between
        if len(found) >= wanted:
            break
    if between:
        found.pop()
    number = len(found) // body
    if number == 0:
        raise ValueError(
            f"calibration: the text has {len(found)} tokens, and a window takes {body}: give more text, or fewer "
            "tokens a window."
        )
    if number < calibration.sequences:
        logger.warning(
            f"The calibration text has {len(found)} tokens, enough for {number} windows and not for "
            f"{calibration.sequences}."
        )
    chosen = torch.randperm(number, generator=generator)[: calibration.sequences].sort().values
    bodies = torch.tensor(found[: number * body]).view(number, body)[chosen]
    sides = [torch.tensor(side, dtype=torch.long).expand(len(bodies), len(side)) for side in (before, after)]
    return torch.cat([sides[0], bodies, sides[1]], 1)


def batches(model, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Keyword arguments of a model's runs on windows of tokens, at most 16.

    An encoder–decoder reads a window and writes the same.

    Raises:
        ValueError: the model takes no tokens, or has no such tokens.
    """
    name = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"{name} takes {model.main_input_name}, and calibration runs models of tokens: leave calibration out."
        )
    embeddings = model.get_input_embeddings()
    if int(tokens.max()) >= embeddings.weight.shape[0]:
        raise ValueError(
            f"The tokenizer gives token {int(tokens.max())}, and {name} has {embeddings.weight.shape[0]}: it is that "
            "of another model."
        )
    result = []
    for part in tokens.to(embeddings.weight.device).split(math.ceil(len(tokens) / _RUNS)):
        inputs: dict[str, Any] = {"input_ids": part}
        if not is_causal_lm(model):
            inputs["attention_mask"] = torch.ones_like(part)
        if getattr(model.config, "is_encoder_decoder", False):
            first = torch.full_like(part[:, :1], _decoder_start(model))
            inputs["decoder_input_ids"] = torch.cat([first, part[:, :-1]], 1)
        if is_causal_lm(model) or getattr(model.config, "is_encoder_decoder", False):
            inputs["use_cache"] = False
        result.append(inputs)
    return result


def _decoder_start(model) -> int:
    """The token that an encoder–decoder begins to write with."""
    for place in (getattr(model, "generation_config", None), model.config):
        for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(place, key, None)
            if isinstance(value, int):
                return value
    return 0


def window_limit(model) -> int | None:
    """The most tokens that a model takes, None if it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # positions of RoBERTa and its kin start after the padding token's
    padding = getattr(model.config, "pad_token_id", None) if not is_causal_lm(model) else None
    return limit - (padding + 1) if padding and limit > padding + 2 else limit


def tokenizer_of(model, given: PreTrainedTokenizerBase | None = None, gguf_file: str | None = None):
    """The tokenizer given, or that of the place that a model was loaded from.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        return given
    name = getattr(model, "name_or_path", "") or ""
    try:
        if not name:
            raise OSError("the model was not loaded from anywhere")
        return AutoTokenizer.from_pretrained(name, **({"gguf_file": gguf_file} if gguf_file else {}))
    except (OSError, ValueError, KeyError, TypeError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"calibration needs the model's tokenizer, and {name or 'the model'} has none ({reason}): give it as "
            "quantize_(model, config, tokenizer=…)."
        ) from error


def digest(tokens: torch.Tensor) -> str:
    """A hash of tokens."""
    return hashlib.blake2b(tokens.to(torch.int64).numpy().tobytes(), digest_size=16).hexdigest()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text."""
    probe = "a"
    plain, full = (tokenizer(probe, add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def read_texts(source: str | os.PathLike | Sequence[str]) -> list[str]:
    """The texts of a file, or the given ones.

    Raises:
        ValueError: no such file, one that is empty, no UTF-8, or malformed (with the line).
        OSError: it cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return list(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"calibration: there is no file {path}. (Texts themselves are given as a list.)")
    try:
        lines = path.suffix.lower() in (".jsonl", ".ndjson")
        texts = list(_lines(path)) if lines else [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration: {path} is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not any(text.strip() for text in texts):
        raise ValueError(f"calibration: {path} holds no text.")
    return texts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"calibration: line {number} of {path} is no JSON ({error}).") from error
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(
                    f"calibration: line {number} of {path} must be a string or an object with a string `text`."
                )
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(
                    f"calibration: line {number} of {path} has half of a character (an escape such as \\ud83d alone)."
                )
            yield text

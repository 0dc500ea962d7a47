"""Rewards that a program can verify, in the form that TRL's `GRPOTrainer` calls them.

A reward is called as `reward(prompts=…, completions=…, <columns of the dataset>=…)` with lists, and returns one float
a completion. A completion is a text, or a list of chat messages, of which the last one counts. Texts are only
searched: nothing in them is ever evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any


Reward = Callable[..., Any]  # list[float | None]
Completion = str | list[dict[str, Any]]

# Longer ones are no answers, and arithmetic with them takes for ever.
_MOST_CHARACTERS, _MOST_EXPONENT = 100, 100
_MINUS = "\u2212"
_DIGITS = r"\d{1,3}(?:,\d{3})+|\d+"
_WRITTEN = rf"(?<![\w.])[-+]?\s?[$€£]?(?:(?:{_DIGITS})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?(?:\s?%)?"
_NUMBER = re.compile(rf"{_WRITTEN}(?!\w)")
_MARKED = re.compile(rf"{_WRITTEN}(?!\d)")  # units may follow at once
_NO_SIGN = re.compile(r"(?:^[ \t]*|(?<=[\d)])[ \t]+)[-+][ \t]+", re.MULTILINE)
_LETTER_AFTER = re.compile(r"(?:answer|choice|option)\b\**\s*(?:(?:is|:|=)\s*)*\**\(?([A-Za-z])\b(?!')", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\s*\**\(?([A-Z])\b(?:[).:*]|\s*$)")
_LETTER_ANYWHERE = re.compile(r"(?<![A-Za-z'])\(?([A-Z])\)?(?![A-Za-z'])")


def described(reward: Reward) -> str:
    """What tells a reward from another one in files: its name, and of `combine` and `matches` what they were given."""
    return str(getattr(reward, "described", getattr(reward, "__name__", type(reward).__name__)))


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last message.

    Raises:
        TypeError: neither a text nor messages with text content.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion and isinstance(completion[-1], dict) else None
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise TypeError(f"a completion must be a text or messages with text content, got {completion!r:.80}.")
    return content


def boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{…}` of a text holds; braces in it are balanced."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[1] is not None))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, brace.start()
    return text[last[0] : last[1]].strip() if last else None


def final_answer(text: str) -> str | None:
    r"""The marked answer of a text: the last `\boxed{…}`, else the line after the last `####`; None without.

    An empty one marks nothing.
    """
    if inside := boxed(text):
        return inside
    _, mark, rest = text.rpartition("####")
    line = rest.strip().split("\n")[0].strip() if mark else ""
    return line or None


def parse_number(text: str) -> Fraction | None:
    r"""The number that a text is: `1,234`, `-0.5`, `3/4`, `2\frac{1}{2}`, `12%`, `$5`, `2e3`; None if it
    is none.

    `%` is dropped, as currencies and a last full stop are: 12% is 12.
    """
    text = unicodedata.normalize("NFKC", text).replace(_MINUS, "-").strip().strip("$").strip()
    text = text.replace("\\$", "").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm)\s*\{[^{}]*\}|\\[,;! ]", "", text).strip().rstrip(".").strip()
    if mixed := re.fullmatch(r"([-+]?)\s?(\d{1,50})\s+(\d{1,50}/\d{1,50})", text):
        whole, part = parse_number(mixed[2]), parse_number(mixed[3])
        return None if whole is None or part is None else (whole + part) * (-1 if mixed[1] == "-" else 1)
    if len(text) > _MOST_CHARACTERS or not _NUMBER.fullmatch(text):
        return None
    text = re.sub(r"[\s,$€£%+]", "", text)
    if (exponent := re.search(r"[eE](-?\d+)", text)) and abs(int(exponent[1])) > _MOST_EXPONENT:
        return None
    top, slash, bottom = text.partition("/")
    if slash and int(bottom) == 0:
        return None
    return Fraction(top) / (int(bottom) if slash else 1)


def number_in(text: str) -> Fraction | None:
    r"""The number that a text answers: in `\boxed{…}`, else the first one after `####`, else the last one in it.

    None without. Among other words, `- 5` at the start of a line, or after a number, is 5: a list's item, or what is
    subtracted; `-5` is -5 everywhere.
    """
    marked = final_answer(text)
    alone = text if marked is None else marked
    if len(alone) <= _MOST_CHARACTERS and (number := parse_number(alone)) is not None:
        return number
    if marked is not None and not boxed(text):
        found = _MARKED.search(marked[:10_000].replace(_MINUS, "-"))
        return parse_number(found[0]) if found else None
    text = (text[-10_000:] if marked is None else marked[-10_000:]).replace(_MINUS, "-")
    numbers = _NUMBER.findall(text if marked is not None else _NO_SIGN.sub(" ", text))
    return parse_number(numbers[-1]) if numbers else None


def choice_in(text: str) -> str | None:
    r"""The letter, upper case, that a text answers a multiple choice with; None without.

    In this order: in `\boxed{…}` or after `####`; the last one after "answer", "choice" or "option"; one that the text
    begins with (`B`, `(B)`, `B. …`); the last capital letter that stands alone, but for `A` and `I` inside sentences.
    """
    marked = final_answer(text)
    if marked is not None and (found := re.fullmatch(r"\W*(?:text\W*)?([A-Za-z])\b.*", marked, re.DOTALL)):
        return found[1].upper()
    if after := _LETTER_AFTER.findall(text):
        return after[-1].upper()
    if first := _LETTER_FIRST.match(text):
        return first[1]
    alone = [found for found in _LETTER_ANYWHERE.finditer(text) if found[0] != found[1] or found[1] not in "AI"]
    return alone[-1][1] if alone else None


def exact_match(completions: Sequence[Completion], answer: Sequence[str], **_: object) -> list[float]:
    """1 where the marked answer, or the whole completion without one, is `answer` but for case and white space."""
    return _graded(completions, answer, lambda text, wanted: _plain(final_answer(text) or text) == _plain(wanted))


def number_match(completions: Sequence[Completion], answer: Sequence[str | float], **_: object) -> list[float]:
    r"""1 where the number that a completion answers (`number_in`) is exactly that of `answer`.

    `answer` is a number, or a text that `number_in` reads, such as a whole solution of GSM8K that ends in `#### 72`.

    Raises:
        ValueError: an answer holds no number.
    """

    def same(text: str, wanted: str) -> bool:
        number = number_in(wanted)
        if number is None:
            raise ValueError(f"the answer {wanted!r:.80} holds no number.")
        return number_in(text) == number

    return _graded(completions, answer, same)


def choice_match(completions: Sequence[Completion], answer: Sequence[str | int], **_: object) -> list[float]:
    """1 where the letter that a completion chooses (`choice_in`) is `answer`: a letter, or an index from 0.

    Raises:
        ValueError: an answer that is neither.
    """

    def same(text: str, wanted: str) -> bool:
        letter = chr(ord("A") + int(wanted)) if re.fullmatch(r"\d{1,2}", wanted) else wanted.strip(" ().").upper()
        if not re.fullmatch("[A-Z]", letter):
            raise ValueError(f"the answer {wanted!r:.80} is no letter and no index of one.")
        return choice_in(text) == letter

    return _graded(completions, answer, same)


def format_match(completions: Sequence[Completion], **_: object) -> list[float]:
    r"""1 where a completion marks its answer, by `\boxed{…}` or `####`."""
    return [float(final_answer(text_of(completion)) is not None) for completion in completions]


def matches(pattern: str) -> Reward:
    """A reward of 1 where the whole completion, without white space around it, matches a regular expression.

    Raises:
        ValueError: the expression is wrong.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}.") from None

    def format_reward(completions: Sequence[Completion], **_: object) -> list[float]:
        return [float(compiled.fullmatch(text_of(completion).strip()) is not None) for completion in completions]

    format_reward.described = f"matches({pattern!r})"  # type: ignore[attr-defined]
    return format_reward


def combine(accuracy: Reward, format: Reward = format_match, weights: tuple[float, float] = (0.9, 0.1)) -> Reward:
    """The weighted sum of a reward for being right and one for the format (0.9 and 0.1 in arXiv 2507.05386).

    A completion that either cannot judge (None) has None. GRPO can also take both rewards apart, with
    `GRPOConfig(reward_weights=[0.9, 0.1])`: it then logs each.
    """

    def combined_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rights = accuracy(completions=completions, **columns)
        forms = format(completions=completions, **columns)
        return [
            None if right is None or form is None else weights[0] * right + weights[1] * form
            for right, form in zip(rights, forms, strict=True)
        ]

    parts = described(accuracy), described(format)
    combined_reward.described = f"combine({', '.join(parts)}, {weights})"  # type: ignore[attr-defined]
    return combined_reward


REWARDS: dict[str, Reward] = {
    "choice": choice_match,
    "exact": exact_match,
    "format": format_match,
    "number": number_match,
}


def _graded(
    completions: Sequence[Completion], answers: Sequence[Any], right: Callable[[str, str], bool]
) -> list[float]:
    if len(completions) != len(answers):
        raise ValueError(f"{len(completions)} completions, but {len(answers)} answers.")
    for place, wanted in enumerate(answers):
        if wanted is None or (isinstance(wanted, str) and not wanted.strip()):
            raise ValueError(f"answer {place} of {len(answers)} is missing.")
    return [float(right(text_of(completion), str(wanted))) for completion, wanted in zip(completions, answers)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()

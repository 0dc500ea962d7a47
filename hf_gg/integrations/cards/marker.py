"""The comment by which a card of ours is known, and what it remembers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData


_LINE = re.compile(r"<!-- hf-gg card (\{.*\}) -->\s*\n")
_FRONT = re.compile(r"\A\ufeff?\s*---\s*\n(.*?)\n---\s*\n", re.DOTALL)
# Transformers' own card: nobody has written it either.
_GENERATED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been"
)


@dataclass(frozen=True)
class Marker:
    """What a card remembers.

    Attributes:
        base: the base model's name on the hub; None if it is not known.
        license: `license`, `license_name` and `license_link` of the base, as far as it has them.
        commands: how the checkpoint was made, in order.
    """

    base: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def sign(text: str, marker: Marker) -> str:
    """The text of a card with its comment before it."""
    content = json.dumps(asdict(marker) | {"sha256": _digest(text)}, ensure_ascii=True)
    # nothing in it may end the comment
    content = content.replace(">", "\\u003e").replace("<", "\\u003c")
    return f"<!-- hf-gg card {content} -->\n{text}"


def read_marker(card: str) -> Marker | None:
    """What a card of ours remembers, edited or not; None of any other card."""
    found = _split(card)
    return found[0] if found else None


def read_metadata(card: str) -> dict[str, Any] | None:
    """The metadata at the top of a card; None if it is no table of keys that the hub's client can read."""
    found = _FRONT.match(_newlines(card))
    if found is None:
        return {}
    try:
        values = ModelCardData(ignore_metadata_errors=True, **(yaml.safe_load(found[1]) or {})).to_dict()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    tags = values.get("tags") or []
    return values if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) else None


def may_replace(card: str) -> bool:
    """Whether nobody's writing is lost with a card: ours, if nobody has edited it, or Transformers' empty one.

    Metadata is kept by who replaces it; a card whose metadata cannot be read is not replaced.
    """
    if read_metadata(card) is None:
        return False
    found = _split(card)
    if found is not None:
        _, digest, text = found
        return _digest(text) == digest
    text = _FRONT.sub("", _newlines(card), count=1)
    return not text.strip() or (_GENERATED in text and _digest(text) == _digest(_generated()))


def _generated() -> str:
    from huggingface_hub import ModelCard

    card = ModelCard.from_template(
        ModelCardData(),
        model_description=f"{_GENERATED} automatically generated.",
    )
    return card.text


def _split(card: str) -> tuple[Marker, str, str] | None:
    text = _FRONT.sub("", _newlines(card), count=1).lstrip()
    found = _LINE.match(text)
    if found is None:
        return None
    try:
        values: dict[str, Any] = json.loads(found[1])
        base, license, commands = values["base"], values["license"], values["commands"]
        digest = values["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    fits = (
        (base is None or isinstance(base, str))
        and isinstance(license, dict)
        and all(isinstance(value, str) for value in license.values())
        and isinstance(commands, list)
        and all(isinstance(command, str) for command in commands)
    )
    return (Marker(base, license, commands), str(digest), text[found.end() :]) if fits else None


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(_newlines(text).strip().encode()).hexdigest()

"""The card of a model that is pushed from Python."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers.utils import logging

from .facts import base_of, collect, marker_of, read_license
from .marker import Marker, may_replace, read_marker
from .writing import write_card


logger = logging.get_logger(__name__)


def card_of_model(model: nn.Module, folder: str | os.PathLike[str], repository: str) -> None:
    """Write our card over the one that Transformers has put beside a model to push; a hand-written one stays.

    Args:
        model: a model of Transformers.
        folder: with its checkpoint, about to be uploaded.
        repository: where to.
    """
    path = Path(folder, "README.md")
    try:
        existing = path.read_text(encoding="utf-8") if path.exists() else None
        if existing is not None and not may_replace(existing):
            logger.warning(f"{repository} has a card that was written by hand: it stays as it is.")
            return
        card = write_card(collect(Path(folder), _remembered(model)), repository, [existing] if existing else [])
    except (ValueError, OSError) as error:  # a model is worth more than its card
        logger.warning(f"No card was written for {repository}: {error}")
        return
    path.write_text(card, encoding="utf-8")


def _remembered(model: nn.Module) -> Marker:
    """What is known of where a model is from."""
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return Marker()
    if not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        return Marker(base_of(name), read_license(name))
    # it was loaded from codes, and is not its own base: the card beside them knows more
    if Path(name).is_dir():
        return marker_of(Path(name)) or Marker()
    try:
        return read_marker(ModelCard.load(name, ignore_metadata_errors=True).content) or Marker()
    except Exception:  # no card, no network, no permission, no YAML: each has errors of its own
        return Marker()

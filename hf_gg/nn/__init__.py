"""Modules whose weights are codes; plain torch, no Hugging Face."""

from .embedding import RF8Embedding
from .experts import RF8Experts
from .linear import RF8Linear


__all__ = ["RF8Embedding", "RF8Experts", "RF8Linear"]

"""Entropy coding of uint8 codes: a tensor of RF8 codes or grid levels becomes a shorter one that describes itself.

A payload is one 1-D uint8 tensor; `docs/coded-checkpoints.md` says what each of its bytes means. Numbers in, numbers
out: torch, numpy and an optional C kernel, no Hugging Face.
"""

from __future__ import annotations

from .codec import CODERS, Info, decode, encode, entropy, info
from .container import is_coded


__all__ = ["CODERS", "Info", "decode", "encode", "entropy", "info", "is_coded"]

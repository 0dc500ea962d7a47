"""Adapters of PEFT on quantized models. Importing this module registers everything.

See `docs/peft.md` for what works with which tuner.
"""

from .injection import install
from .layers import MergeWarning


install()

__all__ = ["MergeWarning"]

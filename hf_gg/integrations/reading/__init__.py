"""Any checkpoint as a stream of tensors: a hub name, a folder or a file; safetensors, `.bin`, GGUF.

    with open_checkpoint("user/model") as source:
        for entry in source:
            tensor = entry.load()

A file is read when a tensor is asked for, and let go of again: what is in memory is the tensor at hand. A new kind of
file is one class in `files.py`, a new way of storing weights as codes one function in `codes.py`.
"""

from .entry import Entry, Problem
from .locate import locate
from .source import TensorSource, open_checkpoint


__all__ = ["Entry", "Problem", "TensorSource", "locate", "open_checkpoint"]

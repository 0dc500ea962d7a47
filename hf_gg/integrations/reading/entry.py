"""What is known of a tensor before it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


# What can be taken for weights as it is stored.
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        shape: of the weights; for codes the shape of what they decode to.
        stored: the type in the file: a torch dtype's name, a GGUF type (`Q4_1`) or a code format (`rf8`).
        file: the name of the file that holds it.
        nbytes: its size in the file.
        reason: why it cannot be read as weights (integers, codes of another quantizer); None if it can.
        read: gives the tensor; called by `load`.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    file: str
    nbytes: int
    reason: str | None = None
    read: Callable[[], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def load(self) -> torch.Tensor:
        """Read the tensor: floating point on the CPU, in the shape above; it may be mapped from the file, read-only.

        Raises:
            ValueError: `reason` is not None, or the file is damaged; file and tensor are named.
        """
        if self.reason is not None or self.read is None:
            raise ValueError(f"{self.name} in {self.file} cannot be read as weights: {self.reason}.")
        return self.read()


@dataclass(frozen=True)
class Problem:
    """A damaged or missing part of a checkpoint.

    Attributes:
        file: its name.
        tensor: the first tensor concerned, None if that is unknown.
        message: one line, which names both and says what to do.
    """

    file: str
    tensor: str | None
    message: str


def why_no_weights(stored: str) -> str | None:
    """Why a stored type is not weights in full precision; None if it is."""
    if stored in FLOATS:
        return None
    if stored == "bool":
        return "booleans"
    if stored.startswith(("int", "uint")):
        return f"integers ({stored})"
    if stored.startswith("complex"):
        return f"complex numbers ({stored})"
    if stored.startswith(("float8", "float4", "float6")):
        return f"codes of another quantizer ({stored}) whose scales are unknown: inspect the full-precision model"
    return f"stored as {stored}, which is no floating point type of weights"

"""What a checkpoint takes on disk, by the kind of its tensors, without decoding it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..formats import FORMATS
from ..inspection import classify
from .reading import open_checkpoint


@dataclass(frozen=True)
class Part:
    """Tensors of one kind.

    Attributes:
        kind: what they are, and how they are stored.
        tensors: how many.
        weights: numbers that they decode to.
        bytes: on disk, with scales and outliers.
        quantized: whether they are codes.
    """

    kind: str
    tensors: int
    weights: int
    bytes: int
    quantized: bool

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class StoredSize:
    """Parts of a checkpoint, the largest first, and all together."""

    parts: list[Part]

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def quantized_weights(self) -> int:
        return sum(part.weights for part in self.parts if part.quantized)

    @property
    def quantized_bytes(self) -> int:
        return sum(part.bytes for part in self.parts if part.quantized)


def stored_size(model: str) -> StoredSize:
    """Sizes of a checkpoint by kind of tensor; of entropy-coded tensors headers are read, not more.

    Args:
        model: a folder, a file, a name on the hub.

    Raises:
        ValueError: no such checkpoint, or a damaged one; the file is named.
    """
    kinds: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    with open_checkpoint(model) as source:
        if source.problems:
            raise ValueError(source.problems[0].message)
        entries = {entry.name: entry for entry in source.entries}
        for entry in source.entries:
            if entry.reason is not None and entry.reason.startswith(("the scales of", "the outliers of")):
                continue  # counted with their codes
            quantized = entry.stored in FORMATS
            beside = sum(
                entries[f"{entry.name}{end}"].nbytes
                for end in ("_outlier_index", "_outlier_value")
                if quantized and f"{entry.name}{end}" in entries
            )
            kind = f"{classify(entry.name, entry.shape).kind}, {entry.stored}"
            kinds.setdefault((kind, quantized), []).append((math.prod(entry.shape), entry.nbytes + beside))
    parts = [
        Part(kind, len(found), sum(count for count, _ in found), sum(size for _, size in found), quantized)
        for (kind, quantized), found in kinds.items()
    ]
    return StoredSize(sorted(parts, key=lambda part: -part.bytes))

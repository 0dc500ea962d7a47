"""Settings of RoMA, with the defaults of its paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .describe import TOKENS
from .neighbourhood import KINDS, positive


NEIGHBOURS = ("nearest", "random", "base")


@dataclass
class RoMAConfig(TrainingArguments):
    """`TrainingArguments` with the settings of RoMA.

    Raises:
        ValueError: a setting that makes no sense.
    """

    learning_rate: float = field(default=7e-5, metadata={"help": "of AdamW, for the routers"})
    manifold_weight: float = field(default=0.8, metadata={"help": "λ; 0 tunes the routers on the task alone"})
    k: int = field(default=3, metadata={"help": "most neighbours of a sample"})
    sigma: float = field(default=0.4, metadata={"help": "width of the Gaussian similarity"})
    similarity: str = field(default="gaussian", metadata={"help": "gaussian (equation 5) or cosine"})
    radius: float | None = field(default=None, metadata={"help": "farthest distance of a neighbour; none for any"})
    neighbours: str = field(
        default="nearest",
        metadata={"help": "nearest (RoMA), random (of the successes) or base (the sample's own routing in the base)"},
    )
    moe_layers: int = field(default=5, metadata={"help": "so many layers with experts are trained, from the last"})
    layers: list[int] | None = field(default=None, metadata={"help": "numbers of the layers instead"})
    tokens: str = field(default="last", metadata={"help": "r at the last prompt token, or the mean over the prompt"})
    mask_top_k: bool = field(default=False, metadata={"help": "r of the chosen experts only, zero for the others"})
    refresh_steps: int = field(default=0, metadata={"help": "steps after which the snapshot is taken anew; 0: never"})
    max_length: int | None = field(default=None, metadata={"help": "tokens; longer prompts lose their beginning"})
    embedder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "model of the embeddings, name or folder"}
    )
    embedding_cache: str | None = field(
        default=None, metadata={"help": "folder of embeddings; by default one in the user's cache, `none` for none"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be off: rows are text"})

    def __post_init__(self) -> None:
        for name, known in (("similarity", KINDS), ("neighbours", NEIGHBOURS), ("tokens", TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name, least in (("k", 1), ("moe_layers", 1), ("refresh_steps", 0), ("max_length", 2)):
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if not (isinstance(self.manifold_weight, (int, float)) and 0 <= self.manifold_weight < math.inf):
            raise ValueError(f"manifold_weight must be 0 or more, got {self.manifold_weight!r}.")
        for name in ("sigma", "radius"):
            value = getattr(self, name)
            if not (value is None and name == "radius") and not positive(value):
                raise ValueError(f"{name} must be positive, got {value!r}.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: rows are text, which becomes tokens later.")
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty: give numbers of layers, or leave it out.")
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        """What an adapter says of its training."""
        names = ("manifold_weight", "k", "sigma", "similarity", "radius", "neighbours", "tokens", "mask_top_k")
        return {"method": "roma", **{name: getattr(self, name) for name in (*names, "learning_rate")}}

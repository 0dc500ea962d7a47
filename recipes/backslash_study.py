"""The methods of the BackSlash recipes: the penalty in two forms, and others that a small model can be made with.

- `backslash`: the decoupled form, ν of each tensor; `l1`, `l2`: the same step with ν = 1 and 2 fixed,
- `straight`: `backslash` to the end, without the second phase; `loose`: with one that does not hold zeros,
- `reference`: the reference form with its ε = 1,
- `decay`: AdamW's weight decay, without any penalty.

See `rate_study.py` for plain training, pruning and what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import transformers as tf
from rate_study import StudyArguments

from hf_gg import BackSlashCallback


@dataclass
class BackSlashArguments(StudyArguments):
    colors: ClassVar[dict[str, str]] = {
        "backslash": "#d62728",
        "l1": "#2ca02c",
        "l2": "#1f77b4",
        "decay": "#8c6d31",
        "reference": "#9467bd",
        "straight": "#ff9896",
        "loose": "#e377c2",
    }
    main: ClassVar[str] = "backslash"

    backslash: list[float] = field(default_factory=list, metadata={"help": "λ of the decoupled form"})
    l1: list[float] = field(default_factory=list, metadata={"help": "λ with ν = 1"})
    l2: list[float] = field(default_factory=list, metadata={"help": "λ with ν = 2"})
    decay: list[float] = field(default_factory=list, metadata={"help": "weight decay of AdamW"})
    reference: list[float] = field(default_factory=list, metadata={"help": "λ of the reference form"})
    straight: list[float] = field(default_factory=list, metadata={"help": "λ without a second phase"})
    loose: list[float] = field(default_factory=list, metadata={"help": "λ with a second phase in which zeros move"})
    warmup: float = field(default=0.1, metadata={"help": "share of the training in which λ rises"})
    cooldown: float = field(default=0.3, metadata={"help": "share of the training at its end without the penalty"})
    eps: float = field(default=0.1, metadata={"help": "ε of the decoupled form"})
    every: int = field(default=20, metadata={"help": "steps between two estimates of ν"})

    def callbacks(self, method: str, value: float) -> list[tf.TrainerCallback]:
        """See `StudyArguments`."""
        if method == "decay":
            return []
        cooldown = 0 if method == "straight" else self.cooldown
        schedule: dict = {
            "modules": self.modules or None,
            "every": self.every,
            "warmup": self.warmup,
            "cooldown": cooldown,
            "hold_support": method != "loose",
        }
        if method == "reference":
            return [BackSlashCallback(value, form="reference", **schedule)]
        return [BackSlashCallback(value, shape={"l1": 1.0, "l2": 2.0}.get(method), eps=self.eps, **schedule)]

    def step_size(self, callbacks: list, model: torch.nn.Module, lr: float) -> str:
        """How far one step moves a weight: λν/N in the reference form, ηλν at the mean |w| otherwise; ν by sizes."""
        if not callbacks:
            return ""
        (callback,) = callbacks
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        fits = callback.saved["fits"]
        shape = sum(shape * sizes[name] for name, (shape, _) in fits.items()) / sum(sizes[name] for name in fits)
        factor = 1 / sum(sizes.values()) if callback.settings["form"] == "reference" else lr
        return f"{callback.settings['lambda_'] * shape * factor:.3g}"

    def check(self) -> None:
        """See `StudyArguments`."""
        super().check()
        BackSlashCallback(warmup=self.warmup, cooldown=self.cooldown, eps=self.eps, every=self.every)

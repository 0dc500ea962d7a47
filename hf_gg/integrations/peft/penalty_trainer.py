"""The penalty in stock trainers: `Trainer.train` gets a callback where the model has a BACKSLASH adapter to train."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from ...coding.levels import nearest_levels
from ..trainer import BackSlashCallback
from .backslash import BackSlashLayer
from .penalty_hook import trained


class BackSlashAdapterCallback(BackSlashCallback):
    """The penalty of a model's `BackSlashConfig`, and exact checkpoints.

    While a training runs, adapters are saved as they are, so that it can be resumed to the bit. At its end ΔW is
    rounded to its grid, and what is saved from then on is coded.

    Args:
        penalty: apply it; False where another `BackSlashCallback` does.
    """

    def __init__(self, penalty: bool = True) -> None:
        super().__init__()
        self.penalty = penalty
        self.model: Any = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**super().state(), "args": {"penalty": self.penalty}}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Take the settings from the adapters that are trained."""
        self.model = model
        config, deltas = trained(_layers(model))
        set_exact(model, True)
        if not self.penalty or not deltas:
            return
        previous, saved = self.backslash, self.saved
        super().__init__(**config.penalty(), **config.schedule(), modules="backslash_delta", embeddings=True)
        self.backslash, self.saved = previous, saved
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """Round ΔW to its grid."""
        super().on_train_end(args, state, control, **kwargs)
        set_exact(self.model, False)
        round_(self.model)

    def _forget(self) -> None:
        """After a training that ended with an error."""
        if self.model is not None:
            set_exact(self.model, False)
        if self.backslash is not None:
            self.backslash.detach()
        self.model = None


def set_exact(model: Any, exact: bool) -> None:
    """Whether adapters are saved as they are, or on their grids."""
    for layer in _layers(model):
        for config in layer.configs.values():
            config.saves_exactly = exact


@torch.no_grad()
def round_(model: Any) -> None:
    """Round each ΔW that is trained to its grid."""
    for layer in _layers(model):
        for adapter, delta in layer.backslash_delta.items():
            grid = layer.configs[adapter].grid
            if delta.requires_grad and grid is not None and not hasattr(delta, "placements"):
                delta.copy_(nearest_levels(delta, grid, f"{layer.name}.backslash_delta.{adapter}")[0])


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BackSlashLayer)]


def install() -> None:
    """Wrap `Trainer.train`; a second call does nothing."""
    train = Trainer.train
    if hasattr(train, "_hf_gg_wrapped"):
        return

    @functools.wraps(train)
    def train_with_penalty(self, *args, **kwargs):
        callbacks: list[TrainerCallback] = self.callback_handler.callbacks
        own = [one for one in callbacks if isinstance(one, BackSlashAdapterCallback)]
        if not own and _layers(self.model):
            # the first one, so that it has rounded ΔW when the others see the end of the training
            own = [BackSlashAdapterCallback(not any(isinstance(one, BackSlashCallback) for one in callbacks))]
            callbacks.insert(0, own[0])
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in own:
                callback._forget()

    train_with_penalty._hf_gg_wrapped = True  # type: ignore[attr-defined]
    Trainer.train = train_with_penalty  # type: ignore[method-assign]


install()

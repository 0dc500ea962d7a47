"""BackSlash in Transformers' `Trainer` and everything built on it, such as TRL's `SFTTrainer`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..training.backslash import BackSlash, check_settings
from ..training.parts import Part, share_of
from ..training.rate import Rate
from ..training.selection import check_number, kind_of, select_matrices
from .zero import zero_parts


class BackSlashCallback(TrainerCallback, ExportableState):
    """The rate penalty of `BackSlash` in a `Trainer`.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[BackSlashCallback(lambda_=0.1)])

    λ rises over the first steps, stays, and is zero for the last part of the training, in which the weights that were
    set to zero stay zero and the others recover. Every training log gets `backslash/…` entries: bits a weight on the
    grid with the code book, sparsity on the grid, exact zeros, the step c, R, and ν of each kind of layer.

    Args:
        lambda_, form, shape, eps, every, seed: see `BackSlash`.
        modules: modules to act on, see `select_matrices`; None for all.
        embeddings: act on embeddings too.
        warmup: steps over which λ rises; below 1, a share of the training.
        cooldown: steps at the end without the penalty; below 1, a share of the training.
        hold_support: keep zeros in those last steps.
        grid: step of the grid on which bits are counted, in the weights' unit.

    Raises:
        TypeError, ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        lambda_: float | None = None,
        form: str = "decoupled",
        shape: str | float | None = None,
        eps: float | None = None,
        every: int = 20,
        modules: str | Sequence[str] | None = None,
        embeddings: bool = False,
        warmup: float = 0.1,
        cooldown: float = 0.3,
        hold_support: bool = True,
        grid: float = 2**-9,
        seed: int = 0,
    ) -> None:
        check_settings(lambda_, form, shape, eps, every)
        check_number("warmup", warmup)
        check_number("cooldown", cooldown)
        if not check_number("grid", grid) > 0:
            raise ValueError(f"grid must be positive, got {grid}.")
        self.settings: dict[str, Any] = {
            "lambda_": lambda_,
            "form": form,
            "shape": shape,
            "eps": eps,
            "every": every,
            "seed": seed,
        }
        self.modules = modules if modules is None or isinstance(modules, str) else list(modules)
        self.embeddings = embeddings
        self.warmup, self.cooldown = warmup, cooldown
        self.hold_support = hold_support
        self.grid = grid
        self.backslash: BackSlash | None = None
        self.saved: dict[str, Any] | None = None
        self._lr = 0.0
        self._others: list[Part] = []
        _log_with_metrics()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in `trainer_state.json`."""
        own = ("modules", "embeddings", "warmup", "cooldown", "hold_support", "grid")
        return {
            "args": {**self.settings, **{name: getattr(self, name) for name in own}},
            "attributes": {"saved": self.saved if self.backslash is None else self.backslash.state_dict()},
        }

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Choose the parameters and follow the innermost optimizer."""
        cooldown = _steps(self.cooldown, state.max_steps)
        if cooldown >= state.max_steps and self.settings["lambda_"] != 0:
            raise ValueError(
                f"cooldown={self.cooldown:g} leaves out the penalty in all of the {state.max_steps} steps: give fewer "
                "steps, or a share below 1."
            )
        if self.backslash is not None:  # a training that was broken off
            self.backslash.detach()
        self.backslash = self._build(model, optimizer)
        self.backslash.attach(optimizer)
        name = type(self).__name__
        if state.global_step > 0:
            entries = state.stateful_callbacks.get(name) or {}
            entries = entries if isinstance(entries, list) else [entries]
            for entry in entries:
                # with several callbacks, the entry of the one that acts on the same modules
                if len(entries) == 1 or entry.get("args", {}).get("modules") == self.modules:
                    self.saved = entry.get("attributes", {}).get("saved") or self.saved
            if self.saved is not None:
                self.backslash.load_state_dict(self.saved)
        self.saved = None
        # Trainer expects an entry there, which a checkpoint that was made without this callback has not
        state.stateful_callbacks.setdefault(name, self.state())

    def on_step_begin(self, args, state, control, **kwargs):
        """Set λ for the step."""
        if self.backslash is not None:
            self.backslash.strength = self.strength_at(state.global_step, state.max_steps)
            first = state.max_steps - _steps(self.cooldown, state.max_steps)
            self.backslash.hold_support = self.hold_support and state.global_step >= first

    def strength_at(self, step: int, max_steps: int) -> float:
        """The factor on λ in step `step`, counted from 0."""
        if step >= max_steps - _steps(self.cooldown, max_steps):
            return 0.0
        return min(1.0, (step + 1) / max(_steps(self.warmup, max_steps), 1))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Note the learning rate for the log."""
        lr = optimizer.param_groups[0]["lr"] if optimizer is not None else None
        self._lr = float(lr) if lr is not None else 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Stop before weights that are not finite are saved."""
        if self.backslash is not None and control.should_save:
            self.backslash.check_finite(self._others)

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the optimizer alone again."""
        if self.backslash is not None:
            self.backslash.detach()
            self.backslash.check_finite(self._others)
            self.saved, self.backslash, self._others = self.backslash.state_dict(), None, []

    def metrics(self) -> dict[str, float]:
        """What is logged. On several processes, each must call it."""
        penalty = self.backslash
        if penalty is None:
            return {}
        if not penalty.fits:  # λ is zero, for comparison
            penalty.estimate()
        rates = penalty.measure(self.grid)
        total = Rate.of(rates.values())
        found = {
            "backslash/bits": total.bits,
            "backslash/sparsity": total.sparsity,
            "backslash/zeros": total.zeros,
            "backslash/step": penalty.step_size(self._lr),
            "backslash/R": penalty.penalty(),
        }
        kinds: dict[str, list[str]] = {}
        for name in rates:
            kinds.setdefault(kind_of(name), []).append(name)
        for kind, names in kinds.items():
            sizes = [rates[name].numel for name in names]
            shapes = [penalty.fits[name].shape for name in names]
            found[f"backslash/shape/{kind}"] = sum(n * v for n, v in zip(sizes, shapes)) / sum(sizes)
        return found

    def _build(self, model: nn.Module, optimizer: Any) -> BackSlash:
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("BackSlash needs FSDP 2, which keeps each parameter's name: set fsdp_version to 2.")
        chosen = select_matrices(model, self.modules, self.embeddings)
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        split = zero_parts(optimizer, chosen)
        own = {id(p) for p in chosen.values()}
        # ZeRO's other parameters are in flat partitions that have no names
        self._others = [
            share_of(name, p)
            for name, p in (model.named_parameters() if split is None else ())
            if p.requires_grad and p.is_floating_point() and id(p) not in own
        ]
        return BackSlash(split or chosen, count=count, **self.settings)


def _steps(value: float, max_steps: int) -> int:
    """A number of steps that may be given as a share."""
    return round(value * max_steps) if value < 1 else int(value)


@functools.cache
def _log_with_metrics() -> None:
    """Let `Trainer.log` add the callbacks' metrics: a callback's own `on_log` comes after the trackers'."""
    log = Trainer.log

    @functools.wraps(log)
    def log_with_metrics(self, logs, *args, **kwargs):
        if "loss" in logs:
            callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, BackSlashCallback)]
            found = [own for own in (callback.metrics() for callback in callbacks) if own]
            for place, own in enumerate(found, 1):
                # a second one, on other modules, has names of its own
                logs.update(own if place == 1 else {k.replace("/", f"_{place}/", 1): v for k, v in own.items()})
        return log(self, logs, *args, **kwargs)

    Trainer.log = log_with_metrics  # type: ignore[method-assign]

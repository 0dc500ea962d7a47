"""BackSlash: a rate penalty on weights during training, λ Σ |w|^ν with ν estimated from the weights as they change.

After "BackSlash: Rate Constrained Optimized Training of Large Language Models" (ICML 2025, arXiv 2504.16968).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ggd import shape_from_ratio
from . import kernels
from .optimizers import innermost
from .parts import BLOCK_DEVICE, Part, blocks, part_of, sum_over_processes
from .penalty import fill_zeros_, moments, pack_zeros, penalty, plain_, round_into_, shrink_, widened
from .rate import Rate, measure
from .selection import check_number, select_matrices


FORMS = ("decoupled", "reference")
SHAPES = ("tensor", "global")
# the name of an adapter's change of a matrix, which starts at zero
DELTA = "backslash_delta"


@dataclass
class Fit:
    """Shape ν and scale (mean |w|) of a tensor, as last estimated."""

    shape: float
    scale: float


class BackSlash:
    """The penalty J = D + λ R on chosen parameters, as a step of its own after each step of the optimizer.

        penalty = BackSlash(model, lambda_=0.1)
        penalty.attach(optimizer)  # every optimizer.step() is now followed by the penalty's

    Two forms. With s the mean |w| of the tensor (unit of the scale) and η the learning rate:

    - `"decoupled"`: |w| falls by η λ ν (|w|/s + ε)^(ν−1), and a weight that would cross zero stops at zero. λ is per
      weight and without a unit: λ = 1 moves weights of the mean size by η ν, as much as one full step of Adam. So it
      means the same for models of any size and scale. ν = 1 is L1 (soft thresholding), ν = 2 is L2.
    - `"reference"`: w −= (λ ν / N) sign(w) (|w| + ε)^(ν−1), whatever the learning rate; N counts all parameters. This
      is what the authors' code does, with λ = 2000 and ε = 1.

    Args:
        params: a model, whose trainable matrices are taken (`select_matrices`); or a dict, or an iterable of
            (name, parameter) pairs, of which all are taken.
        lambda_: λ ≥ 0; by default 0.1, or 2000 in the reference form.
        form: `"decoupled"` or `"reference"`.
        shape: `"tensor"`: ν of each tensor by moments; `"global"`: one ν and one s for all; a number: ν fixed. By
            default `"tensor"`, or `"global"` in the reference form. The decoupled form takes estimates above 2 for 2:
            a fresh uniform initializer has ν = 8, which would act on the largest weights alone.
        eps: ε ≥ 0 in units of s (reference: in the weights' own unit); by default 0.1, or 1 in the reference form.
        every: steps between two estimates of ν and s.
        count: N of the reference form; by default all parameters of the model, or of `params`.
        seed: of the stochastic rounding of bfloat16 parameters, the same on all processes.
        skip_zeros: estimate ν and s from the weights that are not exactly zero: for tensors that start at zero, such
            as an adapter's ΔW. Counted, zeros drag s far below one step of the optimizer and ν to 0.1, and the
            penalty lets go of every weight that leaves zero. Estimates above 1 are taken for 1 then. None: for
            adapters' ΔW only.

    Attributes:
        strength: factor on λ, for schedules.
        hold_support: weights that are zero before the optimizer's step are zero after it.
        steps: steps made.
        fits: ν and s of each tensor, empty before the first step.

    Raises:
        TypeError: an argument or a parameter of a wrong type, such as quantized codes. ValueError: a negative or NaN
            λ, an unknown form or shape, nothing to act on.
    """

    def __init__(
        self,
        params: nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor] | Part],
        lambda_: float | None = None,
        form: str = "decoupled",
        shape: str | float | None = None,
        eps: float | None = None,
        every: int = 20,
        count: int | None = None,
        seed: int = 0,
        skip_zeros: bool | None = None,
    ) -> None:
        settings = check_settings(lambda_, form, shape, eps, every)
        if count is not None and not check_number("count", count) > 0:
            raise ValueError(f"count must be positive, got {count}: it is the number of the model's parameters.")
        self.lambda_, self.form, self.shape, self.eps, self.every = settings
        self.seed = seed
        if isinstance(params, nn.Module):
            count = count or sum(p.numel() for p in params.parameters())
            params = select_matrices(params)
        pairs = params.items() if isinstance(params, Mapping) else params
        self.parts = [pair if isinstance(pair, Part) else _checked_pair(pair) for pair in pairs]
        if not self.parts:
            raise ValueError("params holds no parameter: there is nothing to act on.")
        names = [part.name for part in self.parts]
        self._places = {name: place for place, name in enumerate(names)}
        if len(self._places) < len(names):
            raise ValueError(f"params names {next(n for n in names if names.count(n) > 1)!r} twice.")
        self.count = count or sum(part.numel for part in self.parts)
        self._skips = [DELTA in name.split(".") if skip_zeros is None else skip_zeros for name in names]
        self.strength = 1.0
        self.hold_support = False
        self.steps = 0
        self.fits: dict[str, Fit] = {}
        self._held: dict[str, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._seen: set[int] = set()

    @property
    def active(self) -> bool:
        """Whether a step changes anything but held zeros."""
        return self.lambda_ * self.strength > 0

    def step(self, lr: float) -> None:
        """Apply the penalty once, after the optimizer's step. Not needed after `attach`.

        Args:
            lr: the learning rate of the step that the optimizer made; the reference form does not use it.

        Raises:
            ValueError: a weight is NaN or infinite (the tensor is named), or so is `lr`.
        """
        self._estimate_if_due()
        self._apply(self.parts, lr)
        self.steps += 1

    def remember_zeros(self) -> None:
        """Note which weights are zero, for `hold_support`: before the optimizer's step. Not needed after `attach`."""
        self._remember(self.parts)

    def attach(self, optimizer: Any) -> None:
        """Follow every step of an optimizer by the penalty's. A step that a gradient scaler skips is skipped here too.

        Args:
            optimizer: a torch optimizer, or a wrapper of one (accelerate's, DeepSpeed's) with it as `.optimizer`.

        Raises:
            ValueError: it does not step a chosen parameter. TypeError: it has no hooks, as optimizers that step layer
                by layer during backward.
        """
        self.detach()
        inner = innermost(optimizer)
        known = {id(p) for group in inner.param_groups for p in group["params"]}
        for part in self.parts:
            if part.owner is part.tensor and id(part.owner) not in known:
                raise ValueError(
                    f"the optimizer does not step {part.name}, which the penalty is to act on: add it to the "
                    "optimizer, or name modules without it."
                )
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def measure(self, grid: float = 2**-9) -> dict[str, Rate]:
        """Bits a weight, sparsity and zeros of each tensor on a uniform grid; changes nothing.

        On several processes that share tensors, each must call it.

        Args:
            grid: the step of the grid, in the weights' unit.

        Raises:
            ValueError: a grid that is not positive, or weights that are not finite.
        """
        if not check_number("grid", grid) > 0:
            raise ValueError(f"grid must be positive, got {grid}.")
        return measure(self.parts, grid)

    def penalty(self) -> float:
        """R of the last estimate's ν in the paper's unit, (1/N) Σ s (|w|/s + ε)^ν over the chosen parameters; in the
        reference form s = 1 and N is `count`."""
        if not self.fits:
            self.estimate()
        table = torch.zeros(len(self.parts), 1, dtype=torch.float64)
        for index, part in enumerate(self.parts):
            fit, local = self.fits[part.name], part.local()
            scale = 1.0 if self.form == "reference" else fit.scale
            for block in blocks(local) if local is not None else ():
                table[index] += penalty(block, fit.shape, scale, self.eps).cpu()
        total = float(sum_over_processes(table, self.parts).sum())
        return total / (self.count if self.form == "reference" else sum(part.numel for part in self.parts))

    def step_size(self, lr: float) -> float:
        """The step c of a weight: λν/N in the reference form, η λ ν (at |w| = s) in the decoupled one, with the mean ν
        of the tensors by their sizes."""
        total = sum(part.numel for part in self.parts)
        shape = sum(self.fits[part.name].shape * part.numel for part in self.parts) / total
        factor = 1 / self.count if self.form == "reference" else lr
        return self.lambda_ * self.strength * shape * factor

    def estimate(self) -> None:
        """Estimate ν and s from the weights as they are. Every process must call it.

        Raises:
            ValueError: a weight is NaN or infinite; the tensor is named.
        """
        table = torch.zeros(len(self.parts), 3, dtype=torch.float64)
        for index, part in enumerate(self.parts):
            local = part.local()
            if local is not None and local.numel():
                table[index, :2] = torch.stack([moments(block) for block in blocks(local)]).sum(0).cpu()
                table[index, 2] = int(torch.count_nonzero(local)) if self._skips[index] else 0
        sum_over_processes(table, self.parts)
        self._check_finite(self.parts, table.sum(1))
        skips = torch.tensor(self._skips)
        sizes = torch.tensor([part.numel for part in self.parts], dtype=torch.float64)
        sizes = torch.where(skips, table[:, 2], sizes).clamp_min(1)
        if self.shape == "global":
            table, sizes = table.sum(0, keepdim=True).expand_as(table), sizes.sum().expand_as(sizes)
        scales = table[:, 0] / sizes
        empty = scales == 0  # all weights are zero: nothing to shrink, any shape will do
        ratios = torch.where(empty, 2.0, (table[:, 1] / sizes) / scales.square().clamp_min(1e-300))
        shapes = torch.full_like(scales, self.shape) if isinstance(self.shape, float) else shape_from_ratio(ratios)
        if self.form == "decoupled" and isinstance(self.shape, str):
            # a penalty of ν > 1 vanishes at zero and keeps none: a few survivors of equal size would end the sparsity
            shapes = shapes.minimum(torch.where(skips, 1.0, 2.0).double())
        scales = torch.where(empty, 1.0, scales)
        self.fits = {p.name: Fit(float(v), float(s)) for p, v, s in zip(self.parts, shapes, scales)}

    def check_finite(self, others: Sequence[Part] = ()) -> None:
        """Raise a `ValueError` that names the tensor if a weight is NaN or infinite. Every process must call it.

        Args:
            others: parts that the penalty does not act on, to be looked at too, and first.
        """
        parts = [*others, *self.parts]
        table = torch.zeros(len(parts), 1, dtype=torch.float64)
        for index, part in enumerate(parts):
            local = part.local()
            for block in blocks(local) if local is not None else ():
                table[index] += block.sum(dtype=torch.float32).cpu()
        self._check_finite(parts, sum_over_processes(table, parts)[:, 0])

    def state_dict(self) -> dict[str, Any]:
        """Steps made and the last estimates, as numbers that JSON keeps exactly."""
        steps = self.steps + bool(self._seen)
        return {"steps": steps, "fits": {name: [fit.shape, fit.scale] for name, fit in self.fits.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: it is of other parameters, or damaged.
        """
        fits = state.get("fits") if isinstance(state, Mapping) else None
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if not isinstance(fits, Mapping) or not isinstance(steps, int) or steps < 0:
            raise ValueError("the state of BackSlash is damaged: it needs the entries 'steps' and 'fits'.")
        names = {part.name for part in self.parts}
        if fits and set(fits) != names:
            odd = sorted(set(fits) ^ names)[0]
            raise ValueError(f"the state of BackSlash is of other parameters: {odd!r} is in one of the two only.")
        for name, pair in fits.items():
            if (
                not isinstance(pair, (list, tuple))
                or len(pair) != 2
                or not all(isinstance(x, float) and x > 0 and math.isfinite(x) for x in pair)
            ):
                raise ValueError(f"the state of BackSlash is damaged: fits[{name!r}] is {pair!r}.")
        self._seen = set()
        self.steps, self.fits = steps, {name: Fit(*pair) for name, pair in fits.items()}

    def _estimate_if_due(self) -> None:
        if self.active and (not self.fits or self.steps % self.every == 0):
            self.estimate()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # ZeRO steps one flat partition after the other: the first one seen again begins a new step
        owners = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not self._seen or owners & self._seen:
            if self._seen:
                self._end_step()
            self._estimate_if_due()
        if self.hold_support:
            self._remember([part for part in self.parts if id(part.owner) in owners])

    def _end_step(self) -> None:
        for part in self.parts:
            if id(part.owner) not in self._seen:
                raise ValueError(
                    f"the optimizer made a step without {part.name}, which the penalty is to act on: name modules "
                    "without it, or use another optimizer or parallel mode."
                )
        self.steps += 1
        self._seen = set()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return  # a fused optimizer is called and left everything as it was
        for group in optimizer.param_groups:
            owners = {id(p) for p in group["params"]}
            chosen = [part for part in self.parts if id(part.owner) in owners]
            if chosen:
                self._apply(chosen, group["lr"])
        self._seen |= {id(p) for group in optimizer.param_groups for p in group["params"]}

    def _remember(self, parts: Sequence[Part]) -> None:
        for part in parts:
            local = part.local()
            self._held[part.name] = [pack_zeros(block) for block in blocks(local)] if local is not None else []

    def _apply(self, parts: Sequence[Part], lr: Any) -> None:
        """The penalty on some tensors, and what is held of their zeros."""
        if lr is None:
            raise ValueError(
                "the optimizer has no learning rate of its own (lr=None), and the penalty's step scales with it: give "
                "one, as with Adafactor(relative_step=False, lr=…), or use form='reference'."
            )
        lr = check_number("lr", float(lr))
        totals = []
        for part in parts:
            local = part.local()
            total = torch.zeros((), device=local.device if local is not None else "cpu")
            held = self._held.pop(part.name, None)
            generator = None
            if local is not None and local.dtype == torch.bfloat16 and self.active:
                generator = torch.Generator(local.device)
                # the same on every process, another for each tensor and step
                generator.manual_seed(hash((self.seed, self.steps, self._places[part.name])) & (2**63 - 1))
            # the kernel has threads of its own, and needs no temporaries
            in_c = self.active and local is not None and self._in_c(local, self.fits[part.name], lr)
            size = BLOCK_DEVICE if generator is None and held is None and in_c else None
            for index, block in enumerate(blocks(local, size) if local is not None else ()):
                finite = None
                if self.active:
                    w = widened(block)
                    finite = self._shrink(w, self.fits[part.name], lr)
                    if generator is not None:
                        round_into_(block, w, generator)
                if held:
                    fill_zeros_(block, held[index])
                total += block.sum(dtype=torch.float32) if finite is None else 0.0 if finite else math.nan
            totals.append(total)
        # split tensors are checked where all processes meet, at estimates and before a checkpoint is written; so are
        # those on a GPU, which need not be waited for at every step
        here = [(part, total) for part, total in zip(parts, totals) if not part.groups and total.device.type == "cpu"]
        if here:
            self._check_finite([part for part, _ in here], torch.stack([total for _, total in here]))

    def _shrink(self, w: torch.Tensor, fit: Fit, lr: float) -> bool | None:
        """The step on one block; whether all weights are finite afterwards, None if that was not looked at."""
        reference, step = self.form == "reference", self._step(lr)
        scale = 1.0 if reference else fit.scale
        if w.is_contiguous() and self._in_c(w, fit, lr):
            return kernels.shrink_(w, step, fit.shape, scale, self.eps, stop=not reference)
        if reference:
            plain_(w, step, fit.shape, self.eps)
        else:
            shrink_(w, step, fit.shape, scale, self.eps)
        return None

    def _step(self, lr: float) -> float:
        return self.lambda_ * self.strength * (1 / self.count if self.form == "reference" else lr)

    def _in_c(self, w: torch.Tensor, fit: Fit, lr: float) -> bool:
        return fit.shape != 1 and kernels.applies(w, self._step(lr) * fit.shape)

    def _check_finite(self, parts: Sequence[Part], totals: torch.Tensor) -> None:
        bad = (~totals.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"{parts[int(bad[0])].name} has weights that are NaN or infinite after step {self.steps}: training "
                "has failed, and is stopped before anything is saved. Go on from the last checkpoint with a lower "
                "learning rate, or with gradient clipping."
            )


def check_settings(
    lambda_: float | None, form: str, shape: str | float | None, eps: float | None, every: int
) -> tuple[float, str, str | float, float, int]:
    """The settings of `BackSlash` with the defaults of the form filled in.

    Raises:
        TypeError, ValueError: see `BackSlash`.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}.")
    reference = form == "reference"
    if shape is None:
        shape = "global" if reference else "tensor"
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ValueError(f"shape must be 'tensor', 'global' or a number, got {shape!r}.")
    else:
        shape = check_number("shape", shape, 0.1, 8.0)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a number of steps, at least 1, got {every!r}.")
    lambda_ = check_number("lambda_", (2000.0 if reference else 0.1) if lambda_ is None else lambda_)
    eps = check_number("eps", (1.0 if reference else 0.1) if eps is None else eps)
    return lambda_, form, shape, eps, every


def _checked_pair(pair: Any) -> Part:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
        raise TypeError(
            f"params must give (name, parameter) pairs, got {type(pair).__name__}: use named_parameters()."
        )
    return part_of(*pair)

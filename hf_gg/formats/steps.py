"""Steps of a grid: how wide they must be for a wanted number of bits or a wanted signal-to-noise ratio.

A row's step is in proportion to its root mean square (one step a row) or to that of the whole tensor (one step a
tensor); at equal bits the two are about equally good. The factor is found by bisection on a sample of the weights and
then checked, and mended, on all of them.

Bits are those of an ideal order-0 coder: the entropy of the levels over the tensor, 32 bits a row for its step and
64 an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .base import NOT_FINITE, check_weight, chunk_size


PER = ("row", "tensor")
STEPS_PER_RMS = 8  # without a target: 28.9 dB, about 5 bits a weight
LEVELS = 127

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 256
_SAMPLE = 1 << 17
_STEP_BITS, _OUTLIER_BITS = 32, 64
# Exponents of 2 between which a step lies, relative to the root mean square.
_FINEST, _COARSEST = -12.0, 6.0
_BISECTIONS = 18
_BITS_TOLERANCE, _SNR_TOLERANCE = 0.004, 0.01


@dataclass(frozen=True)
class StepRule:
    """How steps are chosen; at most one of the last three says how wide they are.

    Attributes:
        per: `"row"` (in proportion to the row's root mean square) or `"tensor"` (one step for all rows).
        bits: wanted bits a weight, steps and outliers counted.
        snr: wanted signal-to-noise ratio of the tensor, dB.
        step: the step itself, for every row.
    """

    per: str = "row"
    bits: float | None = None
    snr: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise ValueError(f"Unknown scale {self.per!r} for a grid: use one of {', '.join(map(repr, PER))}.")
        given = [name for name in ("bits", "snr", "step") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"The steps of a grid follow from one target, got {' and '.join(given)}: leave one out.")
        for name in given:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if self.bits is not None and self.bits > 8:
            raise ValueError(f"bits must be at most 8, which the codes have in memory, got {self.bits!r}.")

    @classmethod
    def of(cls, scale: Any) -> StepRule:
        """A rule from itself, or from the name of what has a step.

        Raises:
            ValueError: neither of these.
        """
        if isinstance(scale, cls):
            return scale
        if not isinstance(scale, str):
            raise ValueError(f"scale must be a name or a StepRule for a grid, got {scale!r}.")
        return cls(scale)


def steps_for_bits(weight: torch.Tensor, bits: float, per: str = "row") -> torch.Tensor:
    """The steps at which a weight takes `bits` bits a weight, float32 [..., rows, 1].

    Args:
        weight: floating point [..., rows, columns].
        bits: more than 0 and at most 8; the entropy of the levels, 32 bits a step and 64 an outlier.
        per: `"row"` or `"tensor"`.

    Raises:
        ValueError: NaN or infinity in the weight, fewer bits than the steps take alone, an unknown `per`.
        TypeError: the weight is not floating point.
    """
    return steps_of(weight, StepRule(per, bits=bits))


def steps_for_snr(weight: torch.Tensor, snr: float, per: str = "row") -> torch.Tensor:
    """The steps at which a weight has a signal-to-noise ratio of `snr` dB, float32 [..., rows, 1]. As above."""
    return steps_of(weight, StepRule(per, snr=snr))


def steps_of(weight: torch.Tensor, rule: StepRule) -> torch.Tensor:
    """The steps of a weight by a rule, float32 [..., rows, 1]. Errors as in `Grid.quantize`."""
    return quantize(weight, rule)[1]


def entropy(codes: torch.Tensor) -> float:
    """Order-0 entropy of uint8 codes, bits a code; 0 for none."""
    return _entropy_of_counts(torch.bincount(codes.reshape(-1), minlength=256))


def bits_a_weight(codes: torch.Tensor, steps: int, outliers: int) -> float:
    """Entropy of codes with a number of float32 steps and of outliers, bits a weight."""
    return entropy(codes) + (_STEP_BITS * steps + _OUTLIER_BITS * outliers) / max(codes.numel(), 1)


def quantize(weight: torch.Tensor, rule: StepRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Saturated codes and steps of a weight by a rule. Shapes and errors as in `Grid.quantize`."""
    check_weight(weight)
    shape = (*weight.shape[:-1], 1)
    if weight.numel() == 0:
        return weight.to(torch.uint8), torch.ones(shape, dtype=torch.float32, device=weight.device)
    rms = _root_mean_squares(weight, rule.per)
    if not bool(torch.isfinite(rms).all()):
        raise ValueError(NOT_FINITE)
    if rule.step is not None:
        steps = torch.full(shape, rule.step, dtype=torch.float32, device=weight.device)
        return encode_rows(weight, steps), steps
    if rule.bits is None and rule.snr is None:
        steps = _relative_steps(rms, 1 / STEPS_PER_RMS)
        return encode_rows(weight, steps), steps
    factor = _solve(weight, rms, rule)
    steps = _relative_steps(rms, factor)
    codes = encode_rows(weight, steps)
    if weight.numel() <= _SAMPLE or not bool(rms.any()):
        return codes, steps
    error = _deviation(weight, codes, steps, rule)
    for _ in range(3):
        if abs(error) <= (_BITS_TOLERANCE if rule.snr is None else _SNR_TOLERANCE):
            break
        # a step twice as wide costs one bit, and 6 dB
        mended = factor * min(max(2 ** (error if rule.snr is None else error / 6.02), 0.9), 1.1)
        new_steps = _relative_steps(rms, mended)
        new_codes = encode_rows(weight, new_steps)
        new_error = _deviation(weight, new_codes, new_steps, rule)
        if abs(new_error) >= abs(error):
            break
        factor, steps, codes, error = mended, new_steps, new_codes, new_error
    return codes, steps


def check_given(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Given steps, expanded to float32 [..., rows, 1], for a weight that is finite.

    Raises:
        ValueError: NaN or infinity in the weight; steps of another shape, or that are not positive numbers.
    """
    if weight.numel() and not bool(torch.isfinite(torch.stack([weight.amax(), weight.amin()])).all()):
        raise ValueError(NOT_FINITE)
    shape = (*weight.shape[:-1], 1)
    try:
        expanded = steps.to(device=weight.device, dtype=torch.float32).expand(shape).contiguous()
    except RuntimeError as error:
        raise ValueError(f"steps of shape {tuple(steps.shape)} do not fit a weight {tuple(weight.shape)}.") from error
    if not bool(((expanded > 0) & torch.isfinite(expanded)).all()):
        raise ValueError("a step must be positive and finite.")
    return expanded


def kept_steps(steps: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Steps for a weight that has changed: the ones that it had, but for rows that became much larger or smaller.

    A row whose mean magnitude changed by more than a factor of 2 gets a step that changed as much; one that was all
    zeros has no step worth keeping, and gets the median of the others in proportion to its size.

    Args:
        steps: float32 [..., rows, 1].
        before: the old weight [..., rows, columns].
        after: the new one.

    Returns:
        float32 [..., rows, 1]; None if the old weight is all zeros.

    Raises:
        ValueError: NaN or infinity in the new weight.
    """
    # not root mean squares, which outliers rule
    old, new = (_mean_magnitudes(weight) for weight in (before, after))
    if not bool(torch.isfinite(new).all()):
        raise ValueError(NOT_FINITE)
    known = old > 0
    if not bool(known.any()):
        return None
    ratio = new / old
    same = (ratio >= 0.5) & (ratio <= 2.0)
    fresh = new * (steps[known] / old[known]).median()
    changed = torch.where(known, steps * ratio, fresh)
    changed = torch.where(new > 0, changed.clamp(_TINY, _HUGE), steps)
    return torch.where(same, steps, changed)


def encode_rows(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Saturated codes of a weight [..., rows, columns] with steps [..., rows, 1], contiguous."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    columns = weight.shape[-1]
    flat, source, steps = codes.view(-1, columns), weight.reshape(-1, columns), steps.reshape(-1, 1)
    rows = max(1, chunk_size(weight.device) // columns)
    for start in range(0, source.shape[0], rows):
        part = slice(start, start + rows)
        round_to_codes(source[part].float() / steps[part], out=flat[part])
    return codes


def round_to_codes(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write the codes of float32 numbers of steps into uint8 `out`; saturates. A tie goes to the smaller magnitude."""
    # |x| - 1/2 is exact where it decides
    magnitude = x.abs().sub_(0.5).ceil_().clamp_(0, LEVELS)
    level = torch.copysign(magnitude, x, out=magnitude).to(torch.int8)
    sign = level >> 7
    level.bitwise_xor_(sign).sub_(sign)
    out.view(torch.int8).copy_(level.bitwise_or_(sign.bitwise_and_(-128)))


def _root_mean_squares(weight: torch.Tensor, per: str) -> torch.Tensor:
    """Of each row, or of the tensor for each row; float32 [..., rows, 1]. Not finite where a weight is not."""
    norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True, dtype=torch.float64)
    squares = norms.square() / weight.shape[-1]
    if per == "tensor":
        squares = squares.mean().expand(squares.shape)
    return squares.sqrt().float()


def _mean_magnitudes(weight: torch.Tensor) -> torch.Tensor:
    """Of each row, float32 [..., rows, 1]."""
    sums = torch.linalg.vector_norm(weight, ord=1, dim=-1, keepdim=True, dtype=torch.float64)
    return (sums / max(weight.shape[-1], 1)).float()


def _relative_steps(rms: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.where(rms > 0, (rms * factor).clamp(_TINY, _HUGE), 1.0)


def _solve(weight: torch.Tensor, rms: torch.Tensor, rule: StepRule) -> float:
    """The factor from root mean square to step that meets a rule's target on a sample."""
    sample, power = _sample(weight, rms)
    overhead = 0.0 if rule.bits is None else _STEP_BITS / weight.shape[-1]
    # the noise is that of the weights, which a sample relative to their rows weighs by the row
    measure: Callable[[float], float]
    if rule.bits is not None:
        target = rule.bits
        measure = lambda factor: _bits(sample / factor) + overhead  # noqa: E731
    else:
        target = rule.snr  # type: ignore[assignment]  # one of the two is given
        measure = lambda factor: _snr(sample, factor, power)  # noqa: E731
    fine, coarse = _FINEST, _COARSEST
    if rule.bits is not None and overhead >= target:
        raise ValueError(
            f"{target} bits a weight cannot be reached: the float32 steps of rows of {weight.shape[-1]} weights take "
            f"{overhead:.3g} bits alone. Ask for more, or keep this tensor in full precision with "
            "`modules_to_not_convert`."
        )
    for _ in range(_BISECTIONS):
        middle = (fine + coarse) / 2
        if measure(2.0**middle) > target:
            fine = middle
        else:
            coarse = middle
    # not more bits than wanted, or not less quality
    return 2.0 ** (coarse if rule.bits is not None else fine)


def _sample(weight: torch.Tensor, rms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights relative to the root mean squares of their rows, float32 [n], and the latter squared."""
    columns, flat, rms = weight.shape[-1], weight.reshape(-1), rms.reshape(-1)
    if flat.numel() > _SAMPLE:
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(flat.numel(), (_SAMPLE,), generator=generator).to(weight.device)
    else:
        index = torch.arange(flat.numel(), device=weight.device)
    scale = rms[index // columns]
    relative = torch.where(scale > 0, flat[index].float() / scale, 0.0)
    return relative, (scale / scale.max().clamp_min(_TINY)).square()


def _bits(x: torch.Tensor) -> float:
    """Bits a weight of numbers of steps: entropy and outliers."""
    levels = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    round_to_codes(x, out=levels)
    counts = torch.bincount(levels, minlength=256)
    outliers = int((x.abs() > LEVELS + 0.5).sum()) if counts[LEVELS] or counts[LEVELS + 128] else 0
    if outliers:
        levels[x.abs() > LEVELS + 0.5] = 0
        counts = torch.bincount(levels, minlength=256)
    return _entropy_of_counts(counts) + _OUTLIER_BITS * outliers / x.numel()


def _snr(x: torch.Tensor, factor: float, power: torch.Tensor) -> float:
    """Signal to noise of `x`, each squared error weighed by `power`, dB."""
    steps = x / factor
    error = torch.where(steps.abs() > LEVELS + 0.5, 0.0, x - torch.round(steps) * factor)
    return _decibel(float((x.square() * power).sum(dtype=torch.float64)), _sum(error.square() * power))


def _deviation(weight: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor, rule: StepRule) -> float:
    """By how much a whole weight misses a rule's target: bits, or dB."""
    columns = weight.shape[-1]
    source, levels, steps = weight.reshape(-1, columns), codes.view(-1, columns), steps.reshape(-1, 1)
    counts = torch.zeros(256, dtype=torch.int64, device=weight.device)
    signal = noise = 0.0
    positive = negative = 0  # outliers
    rows = max(1, chunk_size(weight.device) // columns)
    for start in range(0, source.shape[0], rows):
        part = slice(start, start + rows)
        code, step = levels[part], steps[part]
        if rule.bits is not None:
            counts += torch.bincount(code.reshape(-1), minlength=256)
        if rule.snr is not None or int(counts[LEVELS] + counts[LEVELS + 128]) > 0:
            exact = source[part].float()
            beyond = exact.abs() > (LEVELS + 0.5) * step
            below = int((beyond & (exact < 0)).sum())
            positive, negative = positive + int(beyond.sum()) - below, negative + below
            if rule.snr is not None:
                level = (code & 0x7F).float()
                error = torch.where(beyond, 0.0, exact.abs() - level * step)
                signal, noise = signal + _sum(exact.square()), noise + _sum(error.square())
    if rule.snr is not None:
        return _decibel(signal, noise) - rule.snr
    counts[LEVELS] -= positive
    counts[LEVELS + 128] -= negative
    counts[0] += positive + negative
    extra = _STEP_BITS * source.shape[0] + _OUTLIER_BITS * (positive + negative)
    return _entropy_of_counts(counts) + extra / weight.numel() - rule.bits  # type: ignore[operator]  # one of the two is given


def _entropy_of_counts(counts: torch.Tensor) -> float:
    counts = counts[counts > 0].double()
    if counts.numel() < 2:
        return 0.0
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum())


def _sum(x: torch.Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf

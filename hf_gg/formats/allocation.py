"""Allocation: the steps of the grids of a whole model, for a wanted number of bits or a wanted error.

Rounding to a fine grid of step Δ adds noise of variance Δ²/12, and halving Δ costs one bit. So the steps that lose
least at a rate are those where the last bit buys the same everywhere: Δ² ∝ 1 / sensitivity, the sensitivity of a row
being what a unit of squared error in it costs (half the Fisher information, if the cost is a KL divergence). This is
reverse water-filling (Cover and Thomas, section 10.3.3), with two corrections for where grids are coarse or weights do
not fit: bits and errors of a tensor are no formulas but curves, measured at many steps on a sample of its weights,
outliers included; and the tensors' steps are chosen on them by a Lagrange multiplier (Shoham and Gersho, 1988). At
last one factor for all steps puts the mean of the real entropies on the target.

Within a tensor the steps of rows keep Δ² ∝ 1 / sensitivity. Choosing them on curves as well, with the levels of a
tensor coded by one table, was tried and gained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .steps import LEVELS, bits_a_weight, check_given, encode_rows


# Relative sensitivities (those of a weight in units of its tensor's variance) are kept within this factor of their
# geometric mean: beyond it they tell more of too few samples than of the model.
_SPREAD = 2.0**12
# The steps of a curve, octaves relative to the root mean square.
_OCTAVES = torch.arange(-36, 13, dtype=torch.float64) / 4
_SAMPLE = 1 << 14
_CORRECTIONS = 10
_BITS_TOLERANCE, _ERROR_TOLERANCE = 0.002, 0.003
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 256


@dataclass(frozen=True)
class Curve:
    """What a tensor costs at K steps, ascending.

    Attributes:
        count: its weights.
        bits: float64 [K], bits a weight.
        errors: float64 [K], squared error a weight, times the sensitivity.
    """

    count: int
    bits: torch.Tensor
    errors: torch.Tensor


@dataclass(frozen=True)
class Allocation:
    """Steps, and what they give on all weights together.

    Attributes:
        steps: float32 [..., rows, 1] by name.
        bits: bits a weight: order-0 entropies of the levels of each tensor, 32 a step and 64 an outlier.
        error: sum of squared errors, each times its sensitivity. With half the Fisher information for sensitivity, the
            KL divergence to expect, in nats.
        error_share: that sum over the same sum of the squared weights.
        tensor_bits: bits a weight by name.
    """

    steps: dict[str, torch.Tensor]
    bits: float
    error: float
    error_share: float
    tensor_bits: dict[str, float]


def allocate(
    weights: Mapping[str, torch.Tensor],
    target_bits: float | None = None,
    target_error: float | None = None,
    sensitivity: Mapping[str, torch.Tensor] | None = None,
) -> Allocation:
    """The steps at which a model loses least at a wanted size, or is smallest at a wanted error.

    Args:
        weights: floating point [..., rows, columns] by name.
        target_bits: wanted mean of bits a weight, steps and outliers counted, more than 0 and at most 8.
        target_error: wanted share of the squared error in the squared weights, both weighed by the sensitivity.
        sensitivity: what a unit of squared error in a weight of a row costs, [..., rows, 1] or any shape that
            broadcasts to it, by name; not negative. A tensor that is missing, or all zeros, gets the geometric mean of
            the others in proportion to 1 / variance; without any, all tensors then have the same signal to noise.

    Raises:
        ValueError: not one target, a target that is no such number or cannot be reached; NaN, infinity or a negative
            number in weights or sensitivities. The tensor is named.
    """
    if (target_bits is None) == (target_error is None):
        raise ValueError(f"give one of target_bits and target_error, got {target_bits!r} and {target_error!r}.")
    if target_bits is not None and not 0 < target_bits <= 8:
        raise ValueError(f"target_bits must be more than 0 and at most 8, got {target_bits!r}.")
    if target_error is not None and not 0 < target_error < 1:
        raise ValueError(f"target_error must be between 0 and 1, got {target_error!r}.")
    filled = fill_sensitivity(weights, sensitivity or {})
    live = {name: weight for name, weight in weights.items() if name in filled}
    # zeros cost nothing but their steps, which count
    total = max(sum(weight.numel() for weight in weights.values()), 1)
    idle = 32 * sum(_rows(weight) for name, weight in weights.items() if name not in live) / total
    share = sum(weight.numel() for weight in live.values()) / total
    profiles = {name: filled[name].rsqrt() for name in live}
    result = Allocation({}, 0.0, 0.0, 0.0, {})
    if live:
        curves = {name: curve(weight, profiles[name], filled[name]) for name, weight in live.items()}
        if target_bits is not None:
            overhead = sum(32 * _rows(weight) for weight in weights.values()) / total
            if target_bits <= overhead:
                raise ValueError(
                    f"target_bits={target_bits} cannot be reached: the float32 steps of the rows alone take "
                    f"{overhead:.3g} bits a weight. Ask for more."
                )
            wanted = (target_bits - idle) / share
            chosen = choose(curves, lambda bits, _: bits - wanted)
        else:
            wanted = target_error  # type: ignore[assignment]  # one of the two is given
            energy = sum(_energy(weight, filled[name]) for name, weight in live.items())
            chosen = choose(curves, lambda _, error: wanted * energy - error)
        factors = {name: 2.0 ** float(_OCTAVES[k]) * _unit(live[name], profiles[name]) for name, k in chosen.items()}
        result = _correct(live, profiles, filled, factors, wanted, in_bits=target_bits is not None)
    steps = {
        name: result.steps[name]
        if name in live
        else torch.ones(*weight.shape[:-1], 1, dtype=torch.float32, device=weight.device)
        for name, weight in weights.items()
    }
    bits = result.bits * share + idle
    tensor_bits = {name: result.tensor_bits.get(name, 32 / max(w.shape[-1], 1)) for name, w in weights.items()}
    return Allocation(steps, bits, result.error, result.error_share, tensor_bits)


def fill_sensitivity(
    weights: Mapping[str, torch.Tensor], sensitivity: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sensitivities [..., rows, 1], float32 and positive, for all tensors that are not all zeros.

    Missing ones are made up and far ones bounded, as `allocate` says.

    Raises:
        ValueError: NaN or infinity in a weight; sensitivities that do not fit, are not finite or negative.
    """
    variances, known = {}, {}
    for name, weight in weights.items():
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        if not math.isfinite(norm):
            raise ValueError(f"{name} holds NaN or infinity, which no code can represent.")
        if norm == 0:
            continue
        variances[name] = norm**2 / weight.numel()
        given = sensitivity.get(name)
        if given is None:
            continue
        given = torch.as_tensor(given, dtype=torch.float32, device=weight.device)
        try:
            given = given.expand(*weight.shape[:-1], 1)
        except RuntimeError as error:
            raise ValueError(
                f"the sensitivity of {name} has shape {tuple(given.shape)} and must fit {(*weight.shape[:-1], 1)}."
            ) from error
        if not bool((torch.isfinite(given) & (given >= 0)).all()):
            raise ValueError(f"the sensitivity of {name} holds NaN, infinity or a negative number.")
        if bool(given.any()):
            known[name] = given
    # relative to the variance, so that tensors of unlike size compare
    middles = [
        (math.log2(float(given.mean(dtype=torch.float64)) * variances[name]), weights[name].numel())
        for name, given in known.items()
    ]
    count = sum(n for _, n in middles)
    middle = 2.0 ** (sum(value * n for value, n in middles) / count) if count else 1.0
    filled = {}
    for name, variance in variances.items():
        low, high = (min(max(middle / variance * f, _TINY), _HUGE) for f in (1 / _SPREAD, _SPREAD))
        if name in known:
            filled[name] = known[name].clamp(low, high).contiguous()
        else:
            shape = (*weights[name].shape[:-1], 1)
            value = min(max(middle / variance, _TINY), _HUGE)
            filled[name] = torch.full(shape, value, device=weights[name].device)
    return filled


def curve(weight: torch.Tensor, profile: torch.Tensor, sensitivity: torch.Tensor) -> Curve:
    """Bits and errors of a tensor at all steps, on a sample of its weights.

    Args:
        weight: [..., rows, columns].
        profile: steps of the rows relative to each other, [..., rows, 1].
        sensitivity: [..., rows, 1].
    """
    columns, count = weight.shape[-1], weight.numel()
    if count > _SAMPLE:
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(count, (_SAMPLE,), generator=generator).to(weight.device)
    else:
        index = torch.arange(count, device=weight.device)
    rows, unit = index // columns, _unit(weight, profile)
    steps = profile.reshape(-1)[rows].float() * unit
    relative = weight.reshape(-1)[index].float() / steps
    costs = sensitivity.reshape(-1)[rows] * steps.square()
    bits, errors = [], []
    for octave in _OCTAVES.tolist():
        scaled = relative * 2.0**-octave
        levels = scaled.round()
        beyond = scaled.abs() > LEVELS + 0.5
        inside = torch.where(beyond, 0.0, levels)
        counts = torch.bincount((inside + LEVELS).int()).double()
        p = counts[counts > 0] / counts.sum()
        share = float(beyond.float().mean())
        bits.append(float(-(p * p.log2()).sum()) + 64 * share + 32 / columns)
        error = torch.where(beyond, 0.0, scaled - levels).square() * costs
        errors.append(float(error.mean(dtype=torch.float64)) * 4.0**octave)
    return Curve(count, torch.tensor(bits), torch.tensor(errors, dtype=torch.float64))


def choose(curves: Mapping[str, Curve], excess: Callable[[float, float], float]) -> dict[str, int]:
    """The point of each curve that minimizes errors + λ bits in sum, for the λ at which a target is met.

    Args:
        curves: by name, all with the same K.
        excess: from the mean of bits and the sum of errors to a number that falls as the steps grow; its zero is the
            target.

    Returns:
        Index by name. On lower convex hulls this is the optimum: no other choice has a smaller error for its bits.
    """
    names = list(curves)
    counts = torch.tensor([curves[name].count for name in names], dtype=torch.float64)
    bits = torch.stack([curves[name].bits.double() for name in names])
    errors = torch.stack([curves[name].errors for name in names])

    def at(exponent: float) -> tuple[torch.Tensor, float]:
        index = (errors + 2.0**exponent * bits).argmin(1, keepdim=True)
        mean = float((bits.gather(1, index)[:, 0] * counts).sum() / counts.sum())
        return index[:, 0], excess(mean, float((errors.gather(1, index)[:, 0] * counts).sum()))

    scale = math.log2(float(errors.max()))
    low, high = scale - 80, scale + 20
    for _ in range(60):
        middle = (low + high) / 2
        if at(middle)[1] > 0:
            low = middle
        else:
            high = middle
    (fine, above), (coarse, below) = at(low), at(high)
    index = fine if abs(above) < abs(below) else coarse
    return dict(zip(names, index.tolist()))


def _correct(weights, profiles, sensitivity, factors, wanted: float, in_bits: bool) -> Allocation:
    """Multiply all steps by what puts the real figures on the target: false position, kept within its bracket."""
    octave = 0.0
    below, above = -math.inf, math.inf  # too fine, too coarse
    for _ in range(_CORRECTIONS):
        steps = {name: profiles[name] * (factors[name] * 2.0**octave) for name in weights}
        result = _measure(weights, steps, sensitivity)
        if in_bits:
            miss, tolerance = result.bits - wanted, _BITS_TOLERANCE
        else:
            miss = 0.5 * math.log2(wanted / result.error_share) if result.error_share > 0 else 4.0
            tolerance = _ERROR_TOLERANCE
        # never more bits, or a larger error, than asked for
        if (-tolerance <= miss <= 0) if in_bits else (0 <= miss <= tolerance):
            break
        if miss > 0:
            below = octave
        else:
            above = octave
        goal = miss + tolerance / 2 if in_bits else miss - tolerance / 2
        octave += min(max(goal, -4.0), 4.0)
        if not below < octave < above:
            octave = (below + above) / 2
    return result


def _measure(weights, steps, sensitivity) -> Allocation:
    """What steps give on all weights; the steps as float32."""
    total, bits, error, energy = 0, 0.0, 0.0, 0.0
    kept, tensor_bits = {}, {}
    for name, weight in weights.items():
        kept[name] = check_given(weight, steps[name].clamp(_TINY, _HUGE))
        columns, outliers = weight.shape[-1], 0
        rows, step, cost = (
            weight.reshape(-1, columns),
            kept[name].reshape(-1, 1),
            sensitivity[name].reshape(-1),
        )
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
        size = max(1, (1 << 18) // columns)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            block = rows[part].float()
            codes[part] = encode_rows(block, step[part])
            magnitude = (codes[part] & 0x7F).float()
            noise = block.abs().sub_(magnitude.mul_(step[part]))
            if bool(((codes[part] & 0x7F) == LEVELS).any()):
                beyond = block.abs() > (LEVELS + 0.5) * step[part]
                outliers += int(beyond.sum())
                noise.masked_fill_(beyond, 0)
                codes[part].masked_fill_(beyond, 0)
            error += float((noise.square().sum(1, dtype=torch.float64) * cost[part]).sum())
            energy += float((block.square().sum(1, dtype=torch.float64) * cost[part]).sum())
        tensor_bits[name] = bits_a_weight(codes, len(rows), outliers)
        total, bits = total + weight.numel(), bits + tensor_bits[name] * weight.numel()
    return Allocation(kept, bits / max(total, 1), error, error / energy if energy else 0.0, tensor_bits)


def _energy(weight: torch.Tensor, sensitivity: torch.Tensor) -> float:
    """Sum of the squared weights, each times its sensitivity."""
    norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True, dtype=torch.float64)
    return float((norms.square() * sensitivity).sum())


def _unit(weight: torch.Tensor, profile: torch.Tensor) -> float:
    """The factor that makes the steps of a profile as large as the weights, in root mean square over the rows."""
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(weight.numel())
    return norm / float(profile.double().square().mean().sqrt())


def _rows(weight: torch.Tensor) -> int:
    return weight.numel() // max(weight.shape[-1], 1)

"""Codes and scales of a weight for the least error of the layer's outputs.

Three steps, each of which lowers tr((W - Ŵ) H (W - Ŵ)ᵀ): columns are rounded one after the other with feedback (see
`moments`), for each of the scale's candidates, of which every row takes its best; then come passes of coordinate
descent, in which each weight goes to the code that is best while all others stay; between them the scale is fitted
anew, in closed form. At last a row for which plain rounding is better, on these inputs, gets that; a whole weight
where its rows share a scale, or their bits.

Tensors are [columns, rows] here, so that a column of all rows is contiguous, in the order of the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import Grid, StepRule, WeightFormat
from ..formats.rf8 import ResidualFloat, nearest_value
from ..formats.scaling import search_factors
from ..formats.steps import LEVELS, bits_a_weight
from .moments import Metric


# Columns between two matrix products, and numbers of a weight (with the scale's candidates) worked on at once.
_BLOCK = 32
_CHUNK = 1 << 25
# By how much a fitted scale must lower the error: what is exact already keeps its scale.
_WORTH = 1e-6
# How near to the wanted bits a weight's steps are brought, and in how many attempts.
_BITS_TOLERANCE, _ATTEMPTS = 0.004, 8
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 256

Values = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """A weight in codes.

    Attributes:
        codes: uint8 [rows, columns].
        scale: float32 [rows, 1].
        outliers: flat indices and float32 values of what the codes cannot hold; None if there is none.
        error: of the outputs, in units of the mean of the inputs' second moments.
        plain_error: that of plain rounding.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    outliers: tuple[torch.Tensor, torch.Tensor] | None
    error: float
    plain_error: float


def round_weight(
    weight: torch.Tensor,
    metric: Metric,
    fmt: WeightFormat,
    scale: Any = "row",
    rounding: str = "nearest",
    steps: torch.Tensor | None = None,
    keep_bits: bool = False,
    passes: int = 2,
) -> Rounded:
    """Round a weight for the least error of its outputs.

    Args:
        weight: floating point [rows, columns].
        metric: of its inputs.
        fmt: the format.
        scale: as in the format's `quantize`. What fits the weight to the outputs is free to move the scale but for
            `"absmax"`, `"pow2"`, `"tensor-pow2"`, `"unit"` and a given step.
        rounding: as there.
        steps: of a grid, where its `scale` is not to choose them: positive, [rows, 1] or [1, 1].
        keep_bits: of a grid: widen the steps so that the codes take no more bits than those of plain rounding.
        passes: of coordinate descent.

    Raises:
        ValueError, TypeError: as the format's `quantize`.
    """
    plain_codes, plain_scale = fmt.quantize(weight, scale if steps is None else steps, rounding)
    plain_scale = plain_scale.expand(weight.shape[0], 1)
    outliers = fmt.take_outliers_(plain_codes, plain_scale, weight)
    problem = _Problem(weight, metric, fmt, rounding, outliers)
    plain = problem.values_of(plain_codes), plain_scale[:, 0].contiguous()
    per = _fitted_per(scale)
    plain_error = problem.errors(*plain)
    if not isinstance(fmt, ResidualFloat) or scale not in ("row", "tensor"):
        candidates = plain[1][None]
    else:
        peak = weight.abs().amax(1).float()
        peak = peak.amax().expand(peak.shape) if scale == "tensor" else peak
        candidates = (peak / fmt.max).clamp(_TINY, _HUGE) * search_factors(fmt).to(peak.device)[:, None]
        candidates = torch.where(peak > 0, candidates, 1.0)
    if keep_bits:
        wanted = bits_a_weight(plain_codes, len(weight), _count(outliers))
        values, scales = _solve_for_bits(problem, candidates, per, passes, wanted, _count(outliers))
    else:
        values, scales = problem.solve(candidates, per, passes)
    errors = problem.errors(values, scales)
    worse = errors > plain_error
    if keep_bits:  # rows with finer steps would take more of them
        bits = bits_a_weight(problem.codes_of(values), len(weight), _count(outliers))
        worse = torch.full_like(worse, bits > wanted or bool(errors.sum() > plain_error.sum()))
    elif per == "tensor":
        worse = (errors.sum() > plain_error.sum()).expand(worse.shape)
    values, scales = torch.where(worse, plain[0], values), torch.where(worse, plain[1], scales)
    return Rounded(
        problem.codes_of(values),
        scales[:, None].contiguous(),
        outliers,
        float(torch.where(worse, plain_error, errors).sum(dtype=torch.float64)),
        float(plain_error.sum(dtype=torch.float64)),
    )


class _Problem:
    """A weight to be rounded: its numbers in the metric's order, and what of it is fixed."""

    def __init__(self, weight, metric: Metric, fmt: WeightFormat, rounding: str, outliers):
        self.metric, self.fmt, self.shape = metric, fmt, weight.shape
        self.weight = weight.detach().T[metric.order].float()
        self.value_of = _value_function(fmt, rounding)
        # outliers have no error
        self.held: torch.Tensor | None = None
        if outliers is not None:
            held = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            held.view(-1)[outliers[0].long()] = True
            self.held = held.T[metric.order]

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Values at scale 1, [columns, rows], of codes [rows, columns]."""
        return self.fmt.decode(codes).T[self.metric.order]

    def codes_of(self, values: torch.Tensor) -> torch.Tensor:
        ordered = torch.empty_like(values)
        ordered[self.metric.order] = values
        return self.fmt.encode(ordered.T.contiguous())

    def error_of(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        error = self.weight - values * scale
        return error if self.held is None else error.masked_fill_(self.held, 0.0)

    def errors(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Error of the outputs of each row, without damping."""
        error = self.error_of(values, scale)
        return ((self.metric.moments @ error - self.metric.damping[:, None] * error) * error).sum(0)

    def solve(self, candidates: torch.Tensor, per: str | None, passes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [columns, rows] and scales [rows], from candidates of scales [candidates, rows]."""
        values, scale = self._search(candidates, per)
        for _ in range(passes):
            if per is not None:
                scale = self._fit(values, scale, per)
            self._descend_(values, scale)
        return values, self._fit(values, scale, per) if per is not None else scale

    def _search(self, candidates: torch.Tensor, per: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Round with feedback for each candidate, and take the best of each row, or of all rows."""
        columns, rows = self.weight.shape
        number = len(candidates)
        if number == 1:
            return self._with_feedback(slice(None), candidates)[0], candidates[0]
        if per == "tensor":
            found = [self._with_feedback(slice(None), candidate[None]) for candidate in candidates]
            best = min(range(number), key=lambda k: float(found[k][1].sum(dtype=torch.float64)))
            return found[best][0], candidates[best]
        values, scale = torch.empty_like(self.weight), torch.empty_like(candidates[0])
        size = max(1, _CHUNK // (columns * number))
        for start in range(0, rows, size):
            part = slice(start, start + size)
            some, costs = self._with_feedback(part, candidates[:, part])
            least = costs.argmin(0, keepdim=True)
            values[:, part] = some.gather(1, least.expand(columns, 1, -1))[:, 0]
            scale[part] = candidates[:, part].gather(0, least)[0]
        return values, scale

    def _with_feedback(self, part: slice, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [columns, candidates, rows] ([columns, rows] for one) and their damped errors [candidates, rows]."""
        metric, number = self.metric, len(candidates)
        scale = candidates.reshape(-1)
        columns = self.weight.shape[0]
        values = torch.empty(columns, len(scale), device=scale.device)
        errors, costs = torch.empty_like(values), torch.zeros_like(scale)
        for end in range(columns, 0, -_BLOCK):
            start = max(0, end - _BLOCK)
            targets = self.weight[start:end, part].repeat(1, number)
            carried = metric.feedback[end:, start:end].T @ errors[end:]
            for k in range(end - 1, start - 1, -1):
                exact = targets[k - start]
                target = exact + carried[k - start]
                value = self.value_of(target / scale)
                rounded = value * scale
                if self.held is not None:
                    rounded = torch.where(self.held[k, part].repeat(number), exact, rounded)
                values[k] = value
                error = torch.sub(exact, rounded, out=errors[k])
                costs.addcmul_(target.sub_(rounded).square_(), metric.costs[k])
                if k > start:
                    carried[: k - start].addr_(metric.feedback[k, start:k], error)
        if self.held is not None:
            values.masked_fill_(self.held[:, part].repeat(1, number), 0.0)
        shape = (columns, number, -1) if number > 1 else (columns, -1)
        return values.view(shape), costs.view(number, -1)

    def _descend_(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        """One pass of coordinate descent, most active inputs first; changes the values in place."""
        moments = self.metric.moments
        gradient = moments @ self.error_of(values, scale)
        curvature = moments.diagonal()
        for end in range(values.shape[0], 0, -_BLOCK):
            start = max(0, end - _BLOCK)
            slopes, changes = gradient[start:end], torch.empty_like(values[start:end])
            for k in range(end - 1, start - 1, -1):
                before = values[k] * scale
                value = self.value_of((before + slopes[k - start] / curvature[k]) / scale)
                if self.held is not None:
                    value.masked_fill_(self.held[k], 0.0)
                change = torch.sub(before, value * scale, out=changes[k - start])
                values[k] = value
                if k > start:
                    slopes[: k - start].addr_(moments[k, start:k], change)
            gradient[:start].addmm_(moments[start:end, :start].T, changes)

    def _fit(self, values: torch.Tensor, scale: torch.Tensor, per: str) -> torch.Tensor:
        """The scales of least error for given values; those that cannot be bettered stay."""
        error = self.error_of(values, scale)
        pulled = self.metric.moments @ error
        energy = ((self.metric.moments @ values) * values).sum(0)
        gain, lost = (pulled * values).sum(0), (pulled * error).sum(0)
        if per == "tensor":
            energy, gain, lost = (x.sum().expand(x.shape) for x in (energy, gain, lost))
        fitted = scale + torch.where(energy > 0, gain / energy, 0.0)
        better = (gain.square() > _WORTH * energy * lost) & (fitted > 0) & torch.isfinite(fitted)
        return torch.where(better, fitted, scale)


def _solve_for_bits(
    problem: _Problem, candidates: torch.Tensor, per: str | None, passes: int, wanted: float, outliers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve with steps so wide that the codes take no more bits than wanted.

    A step twice as wide costs a bit at first sight; where steps are coarse the error that is fed back grows with them,
    and it costs less. So the second attempt is by that rule, later ones by the line through the last two.
    """
    octave, slope = 0.0, 1.0
    before: tuple[float, float] | None = None
    for _ in range(_ATTEMPTS):
        values, scales = problem.solve(candidates * 2.0**octave, per, passes)
        excess = bits_a_weight(problem.codes_of(values), len(scales), outliers) - wanted
        if -_BITS_TOLERANCE <= excess <= 0:
            break
        if before is not None and octave != before[0]:
            slope = min(max((before[1] - excess) / (octave - before[0]), 0.3), 1.5)
        before = octave, excess
        octave += (excess + _BITS_TOLERANCE / 2) / slope
    return values, scales


def _fitted_per(scale: Any) -> str | None:
    """What has one fitted scale: `"row"`, `"tensor"`; None where the scale is given."""
    if isinstance(scale, StepRule):
        return None if scale.step is not None else scale.per
    return scale if scale in ("row", "tensor") else None


def _value_function(fmt: WeightFormat, rounding: str) -> Values:
    """Nearest values at scale 1 of float32 numbers."""
    if isinstance(fmt, ResidualFloat) and rounding == "nearest":
        return lambda x: nearest_value(fmt, x)
    if isinstance(fmt, Grid):
        return lambda x: x.abs().sub_(0.5).ceil_().clamp_(0, LEVELS).copysign_(x)
    return lambda x: fmt.decode(fmt.encode(x, rounding))


def _count(outliers) -> int:
    return 0 if outliers is None else outliers[0].numel()

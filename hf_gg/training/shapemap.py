"""Monotone maps from one generalized Gaussian to another, and from ranks to one, on magnitudes.

With S the probability that a standard variable's magnitude exceeds z, everything goes through g(ln z) = ln(−ln S): it
neither rounds small probabilities away nor underflows in the tail, and is nearly a line at both ends, with slope 1
towards zero and ν in the tail. So a map between two shapes is one table, and Newton's method inverts g anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ggd.special import log_moment
from ..ggd.tail import log_body, log_tail


KNOTS = 4096
# Ranks are counted by the sign-free leading bits of a float32: 8 of the exponent, 12 of the mantissa.
_SHIFT = 11
_BUCKETS = 1 << 20
# Values counted at once: the counts of a piece are as many as the buckets.
PIECE = 1 << 22


def scale_of(std: float, shape: float) -> float:
    """The scale α of a generalized Gaussian of this standard deviation."""
    return std * math.exp(-float(log_moment(torch.tensor(shape, dtype=torch.float64), 2)) / 2)


def std_of(scale: float, shape: float) -> float:
    """The standard deviation of a generalized Gaussian of scale α."""
    return scale * math.exp(float(log_moment(torch.tensor(shape, dtype=torch.float64), 2)) / 2)


def level(u: torch.Tensor, shape: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g(u) = ln(−ln P(|Z| > e^u)) of a standard generalized Gaussian Z, and its slope; float64, element-wise."""
    z, a = u.exp(), shape.reciprocal()
    body = log_body(z, shape)
    near = body < -16  # there −ln(1 − b) = b + b²/2
    tail = torch.where(near, -body.exp(), log_tail(torch.where(near, 1.0, z), shape))
    value = torch.where(near, body + body.exp() / 2, (-tail).log())
    slope = (u + shape.log() - torch.lgamma(a) - (u * shape).exp() - tail - value).exp()
    return value, slope


def solve(goal: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """The u with g(u) = `goal`, float64."""
    a = shape.reciprocal()
    # the two lines that g approaches
    u = torch.where(goal < 0, goal + torch.lgamma(a + 1), goal * a)
    low, high = torch.full_like(u, -torch.inf), torch.full_like(u, torch.inf)
    for _ in range(40):
        value, slope = level(u, shape)
        excess = value - goal
        low, high = torch.where(excess < 0, u, low), torch.where(excess > 0, u, high)
        step = (excess / slope).clamp(-4.0, 4.0)
        done = step.abs() <= 1e-12 * (1 + u.abs())
        new = u - step
        outside = ~done & ((new <= low) | (new >= high)) & low.isfinite() & high.isfinite()
        u = torch.where(outside, (low + high) / 2, new)
        if bool(done.all()):
            break
    return u


def solve_many(goal: torch.Tensor, shape: float) -> torch.Tensor:
    """The same for many goals, through a table."""
    if len(goal) <= KNOTS:
        return solve(goal, torch.full_like(goal, shape))
    first, last = float(goal.min()) - 1e-6, float(goal.max()) + 1e-6
    knots = torch.linspace(first, last, KNOTS, dtype=torch.float64)
    shapes = torch.full_like(knots, shape)
    u, step = solve(knots, shapes), (last - first) / (KNOTS - 1)
    return Table(first, step, u, step / level(u, shapes)[1]).at(goal.clone())


@dataclass(frozen=True)
class ShapeMap:
    """The map z → z' with P(|Z| > z) = P(|Z'| > z') between two generalized Gaussians about zero, odd in z.

    Attributes:
        scale, shape: α and ν of the weights.
        new_scale, new_shape: α and ν of the result.
    """

    scale: float
    shape: float
    new_scale: float
    new_shape: float

    def inverse(self) -> ShapeMap:
        """The map back."""
        return ShapeMap(self.new_scale, self.new_shape, self.scale, self.shape)

    def magnitude(self, z: float) -> float:
        """What becomes of a single magnitude."""
        if z == 0:
            return 0.0
        u, shape, new = (
            torch.tensor([x], dtype=torch.float64) for x in (math.log(z / self.scale), self.shape, self.new_shape)
        )
        return float(solve(level(u, shape)[0], new).exp()) * self.new_scale

    def table(self, low: float, high: float) -> Table:
        """The map for magnitudes from `low` > 0 to `high`."""
        first, last = math.log(low / self.scale) - 1e-6, math.log(high / self.scale) + 1e-6
        u = torch.linspace(first, last, KNOTS, dtype=torch.float64)
        shape, new = (torch.tensor(x, dtype=torch.float64).expand_as(u) for x in (self.shape, self.new_shape))
        goal, slope = level(u, shape)
        y = solve(goal, new)
        step = (last - first) / (KNOTS - 1)
        slopes = slope / level(y, new)[1] * step
        return Table(math.log(self.scale) + first, step, y + math.log(self.new_scale), slopes)


@dataclass(frozen=True)
class Table:
    """A function on equidistant points, such as ln z' of ln z: a cubic through values and slopes a step."""

    first: float
    step: float
    values: torch.Tensor
    slopes: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """The map of a block, float64 (float32 on a device without); zeros stay zero."""
        return self.log(w).exp_().mul_(torch.sign(w))

    def log(self, w: torch.Tensor) -> torch.Tensor:
        """ln |z'| of a block; of zeros, that of the smallest magnitude in the table."""
        d = w.float() if w.device.type == "mps" else w.double()
        return self.at(d.abs().log_())

    def at(self, u: torch.Tensor) -> torch.Tensor:
        """The cubic at each `u`, or at the nearer end; `u` is changed."""
        place = u.sub_(self.first).div_(self.step).clamp_(0, KNOTS - 1)
        index = place.long().clamp_(max=KNOTS - 2)
        t = place.sub_(index)
        values, slopes = (x.to(u.device, u.dtype) for x in (self.values, self.slopes))
        y0, m0 = values.take(index), slopes.take(index)
        index += 1
        y1, m1 = values.take(index), slopes.take(index)
        rise = y1 - y0
        # Hermite's cubic, by powers of t
        y = m0 + m1 - 2 * rise
        return y.mul_(t).add_(3 * rise - 2 * m0 - m1).mul_(t).add_(m0).mul_(t).add_(y0)


class Ranks:
    """The ranks of magnitudes, counted in one reading and in little memory.

    Magnitudes that agree in their 12 leading bits share a bucket; between the buckets' means, ranks are interpolated.
    Equal magnitudes have the mean of their ranks, so that neither end is favoured.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BUCKETS, dtype=torch.int64)
        self.sums = torch.zeros(_BUCKETS, dtype=torch.float64)
        self.max = 0.0

    def update(self, piece: torch.Tensor) -> None:
        """Count the magnitudes of a flat piece."""
        a = piece.detach().abs()
        index = _bucket(a)
        self.counts += torch.bincount(index, minlength=_BUCKETS).cpu()
        self.sums += torch.bincount(index, a.double(), minlength=_BUCKETS).cpu()
        self.max = max(self.max, float(a.max()))

    def to(self, scale: float, shape: float) -> RankTable:
        """The map that gives the magnitude of rank r (of n, from 1) the quantile of (r − ½) / n of |Z'|."""
        present = self.counts > 0
        counts, n = self.counts[present].double(), int(self.counts.sum())
        x = self.sums[present] / counts
        above = n - (counts.cumsum(0) - counts / 2)  # ranks above, the bucket's own half among them
        if self.max > float(x[-1]) and int(counts[-1]) > 1:
            x, above = torch.cat([x, x.new_tensor([self.max])]), torch.cat([above, above.new_tensor([0.5])])
        share = above / n
        goal = torch.where(share < 0.5, -share.log(), -torch.log1p(-(n - above) / n)).log()
        y = solve_many(goal, shape).exp() * scale
        index = present.cumsum(0) - 1
        if x[0] > 0:
            x, y, index = torch.cat([x.new_zeros(1), x]), torch.cat([y.new_zeros(1), y]), index + 1
        else:
            y[0] = 0.0
        return RankTable(x, y, index.int())


def largest_rank(n: int, shape: float) -> float:
    """The magnitude, at α = 1, that the largest of n gets."""
    goal = torch.tensor([math.log(math.log(2 * n))], dtype=torch.float64)
    return float(solve(goal, torch.full_like(goal, shape)).exp())


@dataclass(frozen=True)
class RankTable:
    """Magnitudes, what becomes of them, and the place of each bucket among them."""

    x: torch.Tensor
    y: torch.Tensor
    index: torch.Tensor

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """The map of a block, float64; odd, and zeros stay zero."""
        a = w.abs().double()
        x, y, place = (t.to(a.device) for t in (self.x, self.y, self.index))
        left = place.take(_bucket(w.abs())).long()
        left = left.sub_((a < x.take(left)).long()).clamp_(0, max(len(x) - 2, 0))
        right = (left + 1).clamp_(max=len(x) - 1)
        x0, y0 = x.take(left), y.take(left)
        width = (x.take(right) - x0).clamp_min_(1e-300)
        t = a.sub_(x0).div_(width).clamp_(0, 1)
        return y.take(right).sub_(y0).mul_(t).add_(y0).mul_(torch.sign(w))


def _bucket(magnitudes: torch.Tensor) -> torch.Tensor:
    """Bucket of each magnitude, int64 flat."""
    return (magnitudes.float().contiguous().view(torch.int32) >> _SHIFT).long()

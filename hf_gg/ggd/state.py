"""The parameters of likelihood fits while they converge: a step from sums that were read, and when to end."""

from __future__ import annotations

import torch

from .location import Profile
from .solve import likelihood_errors
from .special import SHAPE_MAX, SHAPE_MIN


# Derivatives in ν that are read, the sum itself counted.
ORDERS = 5
# Below it the likelihood has cusps.
CUSPED = 1.1
# scales whose powers float32 holds
NARROW = (1e-25, 1e25)
_INVERSE_FACTORIALS = (1.0, 1.0, 0.5, 1 / 6, 1 / 24)


class State:
    """The parameters of some rows while they converge; all tensors float64 [rows] on the CPU."""

    def __init__(
        self, n: torch.Tensor, nu: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, free: torch.Tensor
    ) -> None:
        self.n, self.nu, self.alpha, self.mu, self.free = n, nu, alpha, mu.clone(), free.clone()
        self.clamped = torch.zeros_like(free)
        self.given = ~free
        # the shape for which a location with cusps was found; NaN before, infinite where the location is given
        self.nu_located = torch.where(free, torch.nan, torch.inf).double()
        self.shape_step = torch.full_like(nu, torch.inf)
        # of the likelihood in ν at its maximum
        self.curvature = torch.zeros_like(nu)
        # about what the last step of the location changes in ν, relatively
        self.loc_left = torch.where(free, torch.inf, 0.0).double()
        # where the score changes its sign, at a settled shape
        self.low, self.high = torch.full_like(nu, -torch.inf), torch.full_like(nu, torch.inf)
        self.steps = 0
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def put(self, mu: float, nu: float, row: int) -> None:
        """Settle the location of a row, which is the best one at the shape `nu`; for good if it was found before."""
        again = abs(mu - float(self.mu[row])) <= 1e-12 * float(self.alpha[row]) and not self.nu_located[row].isnan()
        if again:  # its shape is solved for, whatever the search thinks of it
            self.nu_located[row] = torch.inf
            return
        self.mu[row] = mu
        self.free[row] = False
        self.nu_located[row] = nu
        self.loc_left[row] = 0.0
        self.shape_step[row] = torch.inf

    def to_locate(self) -> torch.Tensor:
        """The rows whose location has cusps and is not yet the best one for about this shape."""
        near = (self.nu - self.nu_located).abs() < 0.05 * self.shape_error()
        return (self.nu < CUSPED) & ~near & ~self.nu_located.isinf()

    def profile(self, row: int) -> Profile:
        """What `cusp_location` wants to know of a row."""
        n, nu, alpha, error = (float(t[row]) for t in (self.n, self.nu, self.alpha, self.shape_error()))
        return Profile(n, nu, alpha, error)

    def shape_error(self) -> torch.Tensor:
        """Standard errors of ν by the data's own curvature, which is not the law's where another law is theirs."""
        expected = likelihood_errors(self.nu, self.alpha, self.n)[2]
        return torch.where(self.curvature < 0, self.curvature.abs().rsqrt(), expected)

    def take(self, rows: torch.Tensor) -> State:
        """Some of the rows."""
        new = State(self.n[rows], self.nu[rows], self.alpha[rows], self.mu[rows], self.free[rows])
        new.given = self.given[rows]
        new.clamped, new.shape_step, new.loc_left = self.clamped[rows], self.shape_step[rows], self.loc_left[rows]
        new.nu_located, new.curvature = self.nu_located[rows], self.curvature[rows]
        new.low, new.high, new.steps = self.low[rows], self.high[rows], self.steps
        new.last = None if self.last is None else (self.last[0][rows], self.last[1][rows])
        return new

    def round(self) -> None:
        """Take ν and 1 / α that float32 holds, so that float32 blocks are summed at exactly this point."""
        self.nu = self.nu.float().double()
        ordinary = (self.alpha > NARROW[0]) & (self.alpha < NARROW[1])
        self.alpha = torch.where(ordinary, self.alpha.reciprocal().float().double().reciprocal(), self.alpha)

    def settled(self, tolerance: float, loc_tolerance: float) -> torch.Tensor:
        """Of each row, whether the last step in ν was relatively below `tolerance`, and that of a location which moves
        below `loc_tolerance` n standard errors."""
        left = torch.where(self.free & (self.nu >= CUSPED), self.loc_left, 0.0)
        return (self.shape_step < tolerance) & (left < loc_tolerance)

    def step(self, table: torch.Tensor, score: torch.Tensor) -> None:
        """Move by S and its derivatives [5, rows], of |d| / `alpha`, and by Σ sign(d) |d|^(ν-1) ln^k |d| [2, rows]."""
        old = self.nu
        slope_nu = old / self.alpha  # score is in units of alpha, at the old shape
        mean_power = table[0] / self.n * old  # (α_best / alpha)^ν at the old shape
        gradient = slope_nu * score[0] / mean_power
        error = likelihood_errors(old, self.alpha, self.n)[0]
        expected = error.square().reciprocal()
        curvature = expected
        if self.last is not None:
            change = self.mu - self.last[0]
            measured = (self.last[1] - gradient) / torch.where(change == 0, torch.inf, change)
            secant = (measured > 0.1 * expected) & (measured < 10 * expected)
            curvature = torch.where(secant, measured, expected)
        move = self._within(gradient / curvature, gradient)
        move = torch.where(self.free & (old >= CUSPED), move, 0.0)
        self.last = (self.mu.clone(), gradient)
        self.mu = self.mu + move
        self.loc_left = (move / error).abs() / self.n
        # S and S' at the new location; the square of a small step is nothing beside the rounding of the shape
        u = torch.where(self.loc_left * self.n < 1, move / self.alpha, 0.0)
        moved = torch.cat([(table[0] - u * old * score[0])[None], (table[1] - u * (old * score[1] + score[0]))[None]])
        self.nu, ratio, self.clamped, self.curvature = _solve_profile(self.n, old, torch.cat([moved, table[2:]]))
        self.alpha = self.alpha * ratio
        self.shape_step = (self.nu - old).abs() / old
        # a location that was searched among cusps, and the shape has left them
        released = ~self.given & ~self.free & (self.nu >= CUSPED)
        self.free = self.free | released
        self.nu_located = torch.where(released, torch.nan, self.nu_located)
        self.loc_left = torch.where(released, torch.inf, self.loc_left)

    def _within(self, move: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The step, or half of the bracket's width: secants end slowly where few values make steps of the score."""
        fresh = self.shape_step > 1e-3
        low, high = torch.where(fresh, -torch.inf, self.low), torch.where(fresh, torch.inf, self.high)
        self.low, self.high = torch.where(gradient > 0, self.mu, low), torch.where(gradient < 0, self.mu, high)
        self.steps += 1
        closed = self.low.isfinite() & self.high.isfinite()
        leaves = (self.mu + move <= self.low) | (self.mu + move >= self.high) | (self.steps > 12)
        half = torch.where(closed, (self.low + self.high) / 2, 0.0) - self.mu
        return torch.where(closed & leaves, half, move)

    def stack(self) -> torch.Tensor:
        """ν, α, μ, clamped; [4, rows]."""
        return torch.stack([self.nu, self.alpha, self.mu, self.clamped.double()])


def _solve_profile(
    n: torch.Tensor, start: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shape, the scale in units of the table's, whether the shape is clamped, and the curvature, [rows] each.

    S is a Taylor series about `start`, so that a step is at most a fifth of it.
    """
    low, high = (start * 0.8).clamp_min(SHAPE_MIN), (start * 1.25).clamp_max(SHAPE_MAX)
    nu = start
    for _ in range(8):
        delta = nu - start
        s, s1, s2 = _taylor(table, delta, 0), _taylor(table, delta, 1), _taylor(table, delta, 2)
        a = nu.reciprocal()
        level = torch.digamma(a) + (nu * s / n).log()
        value = 1 + level * a - s1 / s
        slope = -torch.polygamma(1, a) * a**3 - level * a**2 + (a + s1 / s) * a - (s2 / s - (s1 / s).square())
        # value falls through zero at a maximum; elsewhere go uphill
        step = torch.where(slope < 0, -value / slope, value.sign() * nu * 0.1)
        new = torch.minimum(torch.maximum(nu + step, low), high)
        small = bool(((new - nu).abs() <= 1e-13 * nu).all())
        nu = new
        if small:
            break
    s = _taylor(table, nu - start, 0)
    at_end = ((nu <= SHAPE_MIN) & (value < 0)) | ((nu >= SHAPE_MAX) & (value > 0))
    return nu, ((nu * s / n).log() / nu).exp(), at_end, n / nu * slope


def _taylor(table: torch.Tensor, delta: torch.Tensor, derivative: int) -> torch.Tensor:
    """A derivative of S at `delta` from the point of the table, [rows]."""
    value = torch.zeros_like(delta)
    for k in range(ORDERS - 1, derivative - 1, -1):
        value = value * delta + table[k] * (_INVERSE_FACTORIALS[k - derivative])
    return value

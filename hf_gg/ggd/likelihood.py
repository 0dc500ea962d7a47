"""Maximum likelihood: the profile equation in the shape (Do & Vetterli 2002) and the location.

With d = w - μ, S(ν) = Σ|d|^ν and the best scale for a shape, α^ν = ν S / n, the likelihood is greatest in ν where

    1 + (ψ(1/ν) + ln(ν S / n)) / ν - S' / S = 0.

A long row is first fitted on a sample; then one reading gives S and four derivatives in ν, whose Taylor series solves
the equation as exactly as float64 does, as long as the shape was within half a percent. The location: for ν
above 1.1 the score Σ sign(d)|d|^(ν-1) is brought to zero by secant steps in the same readings. Below, the likelihood
has a cusp at every value and its maximum is one of them; `location.py` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from . import kernels
from .location import Profile, cusp_location
from .result import GGDFit
from .scan import BLOCK, BLOCK_DEVICE, Sums, as_rows, blocks, odd_step, scratch
from .solve import likelihood_errors, make_fit, warn_clamped
from .special import SHAPE_MAX, SHAPE_MIN, shape_from_ratio


# Values that the start of a long row is fitted on, and up to which a row counts as short.
_SAMPLE = 8192
# Samples that are fitted together.
_GROUP = 64
# Values whose median starts the location where the likelihood has cusps.
_MEDIAN_SAMPLE = 65536
CUSPED = 1.1
_ORDERS = 5
_MAX_READINGS = 30
_MAX_STEPS = 100
_MAX_LOCATIONS = 10
_CONVERGED = 1e-9
# A step in ν, relative, after which the Taylor series has been exact to 1e-7.
_CLOSE = 4e-3
# scales whose powers float32 holds
_NARROW = (1e-25, 1e25)
# stands for the logarithm of zero where it is multiplied by zero
_LOG_MIN = -1e3
_INVERSE_FACTORIALS = (1.0, 1.0, 0.5, 1 / 6, 1 / 24)


def fit_likelihood(rows: list[torch.Tensor], good: list[int], sums: Sums, loc: float | None) -> GGDFit:
    """The likelihood fit of the rows `good`, counted over all matrices [rows, values] in `rows`.

    `sums` are those of the good rows alone.
    """
    state = torch.empty(4, len(good), dtype=torch.float64)  # ν, α, μ, and 1 where the shape is clamped
    wanted, first, start = set(good), 0, 0
    long: list[_Row] = []
    columns: list[int] = []
    for x in rows:
        own = [i - start for i in range(start, start + len(x)) if i in wanted]
        start += len(x)
        part = slice(first, first + len(own))
        first += len(own)
        if not own:
            continue
        if x.shape[1] > _SAMPLE:
            long += [_Row(x[i]) for i in own]
            columns += range(part.start, part.stop)
        else:
            state[:, part] = _fit_short(x[torch.tensor(own, device=x.device)], loc)
    if long:
        state[:, torch.tensor(columns)] = _fit_long(long, sums.n[torch.tensor(columns)], loc)
    return _result(state, sums.n, loc)


def fit_likelihood_stream(chunks: Callable[[], Iterable[torch.Tensor]], count: int, loc: float | None) -> GGDFit:
    """The likelihood fit of a stream of `count` values."""
    source = _Stream(chunks, count)
    n = torch.tensor([count], dtype=torch.float64)
    if count <= _SAMPLE:
        state = _fit_short(torch.cat([c.double() for c in source()])[None], loc)
    else:
        state = _fit_long([source], n, loc)
    return _result(state, n, loc)


class _Row:
    """A row in memory, as something to read in blocks."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __call__(self) -> Iterator[torch.Tensor]:
        return (block[0] for _, block in blocks(self.x[None]))

    def sample(self, size: int) -> torch.Tensor:
        """About `size` values from everywhere, float64 on the CPU."""
        return self.x[:: odd_step(len(self.x), size)].cpu().double()


class _Stream:
    """Chunks that can be read again, flattened and cut into blocks; every reading must have `count` values."""

    def __init__(self, chunks: Callable[[], Iterable[torch.Tensor]], count: int) -> None:
        self.chunks, self.count = chunks, count

    def __call__(self) -> Iterator[torch.Tensor]:
        seen = 0
        for chunk in self.chunks():
            flat = as_rows(chunk.detach(), None)[0]
            seen += flat.shape[1]
            yield from (block[0] for _, block in blocks(flat))
        if seen != self.count:
            raise ValueError(
                f"chunks gave {self.count} values on the first reading and {seen} on a later one: it must return a "
                "new iterable over the same values each time."
            )

    def sample(self, size: int) -> torch.Tensor:
        step, seen, parts = odd_step(self.count, size), 0, []
        for block in self():
            parts.append(block[-seen % step :: step].cpu().double())
            seen += len(block)
        return torch.cat(parts)


def _fit_long(sources: Sequence[_Row | _Stream], n: torch.Tensor, loc: float | None) -> torch.Tensor:
    """ν, α, μ and whether ν is clamped of each source, [4, sources]; `n` are their counts."""
    start = _start_long(sources, loc)
    result = torch.empty_like(start)
    state = _State(n, start[0], start[1], start[2], torch.full((len(sources),), loc is None))
    left = torch.arange(len(sources))
    for _ in range(_MAX_READINGS):
        state.round()
        table, score = _read_all([sources[i] for i in left.tolist()], state)
        state.step(table, score)
        cusped = state.to_locate() & (state.shape_step < 0.05)
        for row in cusped.nonzero().flatten().tolist():
            source = sources[int(left[row])]
            state.put(*cusp_location(source, state.profile(row), source.sample(_MEDIAN_SAMPLE)), row)
        result[:, left] = state.stack()
        going = ~(state.settled(_CLOSE, 3e-7) & ((state.nu >= CUSPED) | ~state.free | state.clamped))
        if not bool(going.any()):
            break
        left, state = left[going], state.take(going)
    return result


def _start_long(sources: Sequence[_Row | _Stream], loc: float | None) -> torch.Tensor:
    """The fits of samples, a few percent from those of all values; the same rows as `_fit_long`."""
    start = torch.zeros(4, len(sources), dtype=torch.float64)
    group: list[int] = []
    samples: list[torch.Tensor] = []
    for i, source in enumerate(sources):
        sample = source.sample(_SAMPLE)
        if float(sample.min()) < float(sample.max()):
            group.append(i)
            samples.append(sample)
        else:  # nearly all values are equal, for instance zeros
            mu = float(sample[0]) if loc is None else loc
            total = sum(float((block.double() - mu).abs().sum()) for block in source())
            count = sum(len(block) for block in source())
            start[:, i] = torch.tensor([SHAPE_MIN, total / count, mu, 0.0])
        if group and (len(group) == _GROUP or i == len(sources) - 1):
            size = min(len(s) for s in samples)
            stacked = torch.stack([s[:size] for s in samples])
            start[:, torch.tensor(group)] = _solve_block(stacked, loc, locate=False, tolerance=1e-3)
            group, samples = [], []
    return start


def _fit_short(x: torch.Tensor, loc: float | None) -> torch.Tensor:
    """The same for each row of [rows, values], [4, rows]; whole rows in float64, many at once."""
    group = max(1, (BLOCK if x.device.type == "cpu" else BLOCK_DEVICE) // x.shape[1])
    return torch.cat([_solve_block(part.cpu().double(), loc) for part in x.split(group)], dim=1)


def _solve_block(
    w: torch.Tensor, loc: float | None, locate: bool = True, tolerance: float = _CONVERGED
) -> torch.Tensor:
    """ν, α, μ and whether ν is clamped of each row of float64 [rows, values]; ends with a step in ν of `tolerance`."""
    rows, n = w.shape
    mu = w.median(-1).values if loc is None else torch.full((rows,), float(loc), dtype=torch.float64)
    d = w - mu[:, None]
    # of a constant about another given location the ratio is 1, and rounding may take it below
    nu = shape_from_ratio((d.square().mean(-1) / d.abs().mean(-1).square()).clamp_min(1.0))
    state = _State(torch.full((rows,), float(n)).double(), nu, d.abs().mean(-1), mu, torch.full((rows,), loc is None))
    for _ in range(_MAX_LOCATIONS):
        for _ in range(_MAX_STEPS):
            state.step(*_power_sums(w, state.nu, state.alpha, state.mu))
            if bool(state.settled(tolerance, 1e-3 * tolerance).all()):
                break
        cusped = state.to_locate().nonzero().flatten().tolist() if locate else []
        if not cusped:
            break
        for i in cusped:
            state.put(*cusp_location(_Row(w[i]), state.profile(i), w[i], whole=True), i)
    return state.stack()


class _State:
    """The parameters of some rows while they converge; all tensors float64 [rows] on the CPU."""

    def __init__(
        self, n: torch.Tensor, nu: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor, free: torch.Tensor
    ) -> None:
        self.n, self.nu, self.alpha, self.mu, self.free = n, nu, alpha, mu.clone(), free.clone()
        self.clamped = torch.zeros_like(free)
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
        return (self.nu < CUSPED) & ~near & ~self.nu_located.isinf() & ~self.clamped

    def profile(self, row: int) -> Profile:
        """What `cusp_location` wants to know of a row."""
        n, nu, alpha, error = (float(t[row]) for t in (self.n, self.nu, self.alpha, self.shape_error()))
        return Profile(n, nu, alpha, error)

    def shape_error(self) -> torch.Tensor:
        """Standard errors of ν by the data's own curvature, which is not the law's where another law is theirs."""
        expected = likelihood_errors(self.nu, self.alpha, self.n)[2]
        return torch.where(self.curvature < 0, self.curvature.abs().rsqrt(), expected)

    def take(self, rows: torch.Tensor) -> _State:
        """Some of the rows."""
        new = _State(self.n[rows], self.nu[rows], self.alpha[rows], self.mu[rows], self.free[rows])
        new.clamped, new.shape_step, new.loc_left = self.clamped[rows], self.shape_step[rows], self.loc_left[rows]
        new.nu_located, new.curvature = self.nu_located[rows], self.curvature[rows]
        new.low, new.high, new.steps = self.low[rows], self.high[rows], self.steps
        new.last = None if self.last is None else (self.last[0][rows], self.last[1][rows])
        return new

    def round(self) -> None:
        """Take ν and 1 / α that float32 holds, so that float32 blocks are summed at exactly this point."""
        self.nu = self.nu.float().double()
        ordinary = (self.alpha > _NARROW[0]) & (self.alpha < _NARROW[1])
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


def _power_sums(w: torch.Tensor, nu: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Σ z^ν ln^k z, k = 0 … 4, z = |w - μ| / α, [5, rows]; Σ sign(w - μ) z^(ν-1) ln^k z, k = 0, 1, [2, rows]."""
    if kernels.suits(w):
        found = torch.from_numpy(kernels.powers([w], nu, alpha, mu, True)).T
        return found[:_ORDERS], found[_ORDERS:]
    d = w - mu[:, None]
    log = (d.abs() / alpha[:, None]).log_()
    power = (log * nu[:, None]).exp_()
    log.clamp_(min=_LOG_MIN)
    pull = torch.where(d == 0, 0.0, power / d)
    score = torch.stack([pull.sum(-1), (pull * log).sum(-1)]) * alpha
    table = [power.sum(-1)]
    for _ in range(_ORDERS - 1):
        power = power * log
        table.append(power.sum(-1))
    return torch.stack(table), score


def _read_all(sources: Sequence[_Row | _Stream], state: _State) -> tuple[torch.Tensor, torch.Tensor]:
    """`_power_sums` of long rows, one reading of each; all that suit the kernels in one call."""
    table = torch.empty(_ORDERS + 2, len(sources), dtype=torch.float64)
    rows = [s.x[None] if isinstance(s, _Row) and kernels.suits(s.x[None]) else None for s in sources]
    fast = [i for i, x in enumerate(rows) if x is not None]
    if fast:
        at = torch.tensor(fast)
        own = (state.nu[at], state.alpha[at], state.mu[at], state.free[at])
        table[:, at] = torch.from_numpy(kernels.powers([x for x in rows if x is not None], *own)).T
    for i, x in enumerate(rows):
        if x is None:
            own_table, score = _read(sources[i], *(float(t[i]) for t in (state.nu, state.alpha, state.mu, state.free)))
            table[:_ORDERS, i], table[_ORDERS:, i] = own_table, score
    return table[:_ORDERS], table[_ORDERS:]


def _read(
    source: Callable[[], Iterator[torch.Tensor]], nu: float, alpha: float, mu: float, with_score: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_power_sums` of a long row in one reading, [5] and [2]: float32 in a block, or float64 where that overflows."""
    for wide in (False, True):
        found = []
        for stored in source():
            narrow = not wide and stored.dtype != torch.float64 and _NARROW[0] < alpha < _NARROW[1]
            dtype = torch.float32 if narrow else torch.float64
            if kernels.reads(stored):
                at = [torch.tensor([v], dtype=torch.float64) for v in (nu, alpha, mu, with_score)]
                found.append(torch.from_numpy(kernels.powers([stored.contiguous()[None]], *at))[0])
                continue
            found.append(_read_block(stored, dtype, nu, alpha, mu, bool(with_score)))
        sums = torch.stack(found).to("cpu", torch.float64).sum(0)
        if bool(sums.isfinite().all()):
            break
    return sums[:_ORDERS], sums[_ORDERS:]


def _read_block(
    stored: torch.Tensor, dtype: torch.dtype, nu: float, alpha: float, mu: float, with_score: bool
) -> torch.Tensor:
    d, log, power = scratch(3, stored.shape, dtype, stored.device)
    d.copy_(stored)
    if mu:
        # what float32 cannot hold of the location is taken off in a second step
        high = float(torch.tensor(mu, dtype=dtype))
        d.sub_(high)
        if mu != high:
            d.sub_(mu - high)
    torch.abs(d, out=log).mul_(1 / alpha).log_()
    torch.mul(log, nu, out=power).exp_()
    log.clamp_(min=_LOG_MIN)
    sums = [power.sum()]
    score = [power.new_zeros(())] * 2
    if with_score:
        # z^ν / 0 is 0 here, as ν > 1
        torch.div(power, d.add_(torch.finfo(dtype).tiny), out=d)
        score = [d.sum() * alpha, torch.dot(d, log) * alpha]
    power.mul_(log)
    sums += [power.sum(), torch.dot(power, log)]
    power.mul_(log)
    sums.append(torch.dot(power, log))
    power.mul_(log)
    sums.append(torch.dot(power, log))
    return torch.stack([*sums, *score])


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
    for k in range(_ORDERS - 1, derivative - 1, -1):
        value = value * delta + table[k] * (_INVERSE_FACTORIALS[k - derivative])
    return value


def _result(state: torch.Tensor, n: torch.Tensor, loc: float | None) -> GGDFit:
    nu, alpha, mu, clamped = state
    warn_clamped(clamped > 0, nu, "the likelihood still rises at that end, so that its maximum")
    return make_fit("mle", nu, alpha, mu, n, clamped > 0, tuple(nu.shape), loc, likelihood_errors(nu, alpha, n))

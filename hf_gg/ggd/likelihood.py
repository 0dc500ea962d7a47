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
from .location import cusp_location
from .result import GGDFit
from .scan import BLOCK, BLOCK_DEVICE, Sums, as_rows, blocks, odd_step, scratch
from .solve import likelihood_errors, make_fit, warn_clamped
from .special import SHAPE_MIN, shape_from_ratio
from .state import CUSPED, NARROW, ORDERS, State


# Values that the start of a long row is fitted on, and up to which a row counts as short.
_SAMPLE = 8192
# Samples that are fitted together.
_GROUP = 64
# Values whose median starts the location where the likelihood has cusps.
_MEDIAN_SAMPLE = 65536
_MAX_READINGS = 30
_MAX_STEPS = 100
_MAX_LOCATIONS = 10
_CONVERGED = 1e-9
# A step in ν, relative, after which the Taylor series has been exact to 1e-7.
_CLOSE = 4e-3
# stands for the logarithm of zero where it is multiplied by zero
_LOG_MIN = -1e3


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
    state = State(n, start[0], start[1], start[2], torch.full((len(sources),), loc is None))
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
        going = ~(state.settled(_CLOSE, 3e-7) & ((state.nu >= CUSPED) | ~state.free))
        if not bool(going.any()):
            return result
        left, state = left[going], state.take(going)
    for column in left.tolist():
        source = sources[column]
        result[:, column] = _ascend(source, n[column], result[:, column], source.sample(_MEDIAN_SAMPLE), loc)
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
    state = State(torch.full((rows,), float(n)).double(), nu, d.abs().mean(-1), mu, torch.full((rows,), loc is None))
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
    result = state.stack()
    if locate:
        lost = ~state.settled(tolerance, 1e-3 * tolerance) | state.to_locate()
        for i in lost.nonzero().flatten().tolist():
            result[:, i] = _ascend(_Row(w[i]), state.n[i], result[:, i], w[i], loc, whole=True)
    return result


def _ascend(
    source: _Row | _Stream, n: torch.Tensor, start: torch.Tensor, sample: torch.Tensor, loc: float | None, whole=False
) -> torch.Tensor:
    """ν, α, μ and whether ν is clamped, by turns: the best location for a shape, then the best shape there.

    The likelihood never falls. Steps in both at once are quicker, but may go in a circle where values are tied.
    """
    nu, alpha, mu = (start[i : i + 1].clone() for i in range(3))
    state = State(n[None], nu, alpha, mu, torch.tensor([False]))
    for _ in range(_MAX_LOCATIONS):
        before = float(state.nu), float(state.mu)
        if loc is None:
            state.mu[0] = cusp_location(source, state.profile(0), sample, whole)[0]
        for _ in range(_MAX_STEPS):
            state.round()
            state.step(*_read_all([source], state))
            if bool(state.settled(_CONVERGED, 1.0)):
                break
        if loc is not None or (float(state.mu) == before[1] and abs(float(state.nu) - before[0]) < 1e-6 * before[0]):
            break
    return state.stack()[:, 0]


def _power_sums(w: torch.Tensor, nu: torch.Tensor, alpha: torch.Tensor, mu: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Σ z^ν ln^k z, k = 0 … 4, z = |w - μ| / α, [5, rows]; Σ sign(w - μ) z^(ν-1) ln^k z, k = 0, 1, [2, rows]."""
    if kernels.suits(w):
        found = torch.from_numpy(kernels.powers([w], nu, alpha, mu, True)).T
        return found[:ORDERS], found[ORDERS:]
    d = w - mu[:, None]
    log = (d.abs() / alpha[:, None]).log_()
    power = (log * nu[:, None]).exp_()
    log.clamp_(min=_LOG_MIN)
    pull = torch.where(d == 0, 0.0, power / d)
    score = torch.stack([pull.sum(-1), (pull * log).sum(-1)]) * alpha
    table = [power.sum(-1)]
    for _ in range(ORDERS - 1):
        power = power * log
        table.append(power.sum(-1))
    return torch.stack(table), score


def _read_all(sources: Sequence[_Row | _Stream], state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """`_power_sums` of long rows, one reading of each; all that suit the kernels in one call."""
    table = torch.empty(ORDERS + 2, len(sources), dtype=torch.float64)
    rows = [s.x[None] if isinstance(s, _Row) and kernels.suits(s.x[None]) else None for s in sources]
    fast = [i for i, x in enumerate(rows) if x is not None]
    if fast:
        at = torch.tensor(fast)
        own = (state.nu[at], state.alpha[at], state.mu[at], state.free[at])
        table[:, at] = torch.from_numpy(kernels.powers([x for x in rows if x is not None], *own)).T
    for i, x in enumerate(rows):
        if x is None:
            own_table, score = _read(sources[i], *(float(t[i]) for t in (state.nu, state.alpha, state.mu, state.free)))
            table[:ORDERS, i], table[ORDERS:, i] = own_table, score
    return table[:ORDERS], table[ORDERS:]


def _read(
    source: Callable[[], Iterator[torch.Tensor]], nu: float, alpha: float, mu: float, with_score: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_power_sums` of a long row in one reading, [5] and [2]: float32 in a block, or float64 where that overflows."""
    for wide in (False, True):
        found = []
        for stored in source():
            narrow = not wide and stored.dtype != torch.float64 and NARROW[0] < alpha < NARROW[1]
            dtype = torch.float32 if narrow else torch.float64
            if kernels.reads(stored):
                at = [torch.tensor([v], dtype=torch.float64) for v in (nu, alpha, mu, with_score)]
                found.append(torch.from_numpy(kernels.powers([stored.contiguous()[None]], *at))[0])
                continue
            found.append(_read_block(stored, dtype, nu, alpha, mu, bool(with_score)))
        sums = torch.stack(found).to("cpu", torch.float64).sum(0)
        if bool(sums.isfinite().all()):
            break
    return sums[:ORDERS], sums[ORDERS:]


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


def _result(state: torch.Tensor, n: torch.Tensor, loc: float | None) -> GGDFit:
    nu, alpha, mu, clamped = state
    warn_clamped(clamped > 0, nu, "the likelihood still rises at that end, so that its maximum")
    return make_fit("mle", nu, alpha, mu, n, clamped > 0, tuple(nu.shape), loc, likelihood_errors(nu, alpha, n))

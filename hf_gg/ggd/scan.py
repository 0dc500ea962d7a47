"""One reading of a tensor: power sums about a pivot, in blocks that stay in the cache.

On a CPU `kernels.py` sums in float64. In torch, sums inside a block are float32 (float64 for float64 data, and for
values whose squares float32 cannot hold), sums over blocks float64. The pivot is subtracted before anything is
squared, so a mean far from zero costs no digits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from . import kernels


# Values handled at once: a block and its temporaries stay in the cache of a CPU core.
BLOCK = 1 << 16
BLOCK_DEVICE = 1 << 25
# Values that choose the pivot of a long row; its mean is then within about σ/64 of the row's.
SAMPLE = 4096
# A mean below this many standard deviations counts as 0 for the pivot.
_SNAP = 0.05
# Beyond these magnitudes fourth powers leave float32.
_SMALL, _LARGE = 1e-9, 1e9

# The sums about the pivot, in the order of `Sums`: of d, its sign, its magnitude, and its powers.
_SUMMED = ("first", "signs", "absolute", "second", "third", "fourth")
_POWERS = (lambda d: d, torch.sign, torch.abs, torch.square, lambda d: d.pow(3), lambda d: d.pow(4))
_thread = threading.local()


@dataclass
class Sums:
    """Sums over the finite values d = w - pivot of each row; float64 tensors [rows] on the CPU."""

    n: torch.Tensor
    nonfinite: torch.Tensor
    pivot: torch.Tensor
    first: torch.Tensor
    signs: torch.Tensor
    absolute: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor
    fourth: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, pivot: torch.Tensor) -> Sums:
        """Sums of nothing; the smallest value is +inf and the largest -inf."""
        rows = len(pivot)
        parts = {f.name: torch.zeros(rows, dtype=torch.float64) for f in fields(cls)}
        parts |= {"pivot": pivot.double(), "low": parts["low"] + torch.inf, "high": parts["high"] - torch.inf}
        return cls(**parts)

    def add(self, other: Sums) -> None:
        """Add sums about the same pivot."""
        for name in ("n", "nonfinite", *_SUMMED):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    def put(self, rows: slice, other: Sums) -> None:
        """Add sums about the same pivots to some of the rows."""
        for name in ("n", "nonfinite", *_SUMMED):
            getattr(self, name)[rows] += getattr(other, name)
        self.low[rows] = torch.minimum(self.low[rows], other.low)
        self.high[rows] = torch.maximum(self.high[rows], other.high)

    def take(self, rows: torch.Tensor) -> Sums:
        """Some of the rows."""
        return Sums(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def cat(cls, parts: list[Sums]) -> Sums:
        """The rows of several sums, one after the other."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def as_rows(x: torch.Tensor, dim: int | tuple[int, ...] | None) -> tuple[torch.Tensor, tuple[int, ...]]:
    """View `x` as [rows, values] with the dimensions `dim` in the rows, and the shape that the results have.

    With `dim` None the order of the values is the memory's, so that a transposed tensor needs no copy.

    Raises:
        TypeError: `dim` is no number. IndexError: no such dimension. ValueError: a dimension named twice.
    """
    if dim is None:
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        return x.permute(order).reshape(1, -1), ()
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    for d in dims:
        if not isinstance(d, int) or isinstance(d, bool):
            raise TypeError(f"dim must be a dimension's number, several in a tuple, or None, got {dim!r}.")
        if not -x.ndim <= d < x.ndim:
            raise IndexError(f"dim {d} is out of range for a tensor of {x.ndim} dimensions.")
    dims = tuple(d % x.ndim for d in dims)
    if len(set(dims)) != len(dims) or not dims:
        raise ValueError(f"dim must name one or more different dimensions, got {dim}.")
    kept = [d for d in range(x.ndim) if d not in dims]
    shape = tuple(x.shape[d] for d in kept)
    count = 1
    for d in dims:
        count *= x.shape[d]
    rows = 1
    for size in shape:
        rows *= size
    return x.permute(*kept, *dims).reshape(rows, count), shape


def blocks(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut [rows, values] into blocks; yields which rows, and the block as it is stored."""
    rows, count = x.shape
    size = BLOCK if x.device.type == "cpu" else BLOCK_DEVICE
    height = max(1, size // max(count, 1))
    for top in range(0, rows, height):
        part = slice(top, min(top + height, rows))
        for left in range(0, count, size):
            yield part, x[part, left : left + size]


def scratch(count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """`count` temporaries of one block. On a CPU they are this thread's own and kept: fresh pages would cost more than
    the sums."""
    size = shape.numel()
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
    key = f"{dtype}"
    kept = getattr(_thread, key, None)
    if kept is None or kept.numel() < count * size:
        kept = torch.empty(count * max(size, BLOCK), dtype=dtype)
        setattr(_thread, key, kept)
    return [kept[i * size : (i + 1) * size].view(shape) for i in range(count)]


def odd_step(count: int, size: int) -> int:
    """A stride that takes about `size` of `count` values; odd, so that it meets every column of the usual widths."""
    return max(1, count // size) | 1


def choose_pivot(x: torch.Tensor, snap: bool = False) -> torch.Tensor:
    """A location near the mean of each row of [rows, values], float64 [rows] on the CPU.

    Args:
        x: floating point; NaN and infinities are passed over.
        snap: for rows longer than a sample, give 0 where the mean is small beside the spread, as it is for nearly all
            weights; sums of several tensors then share their pivot.
    """
    rows, count = x.shape
    if count == 0 or rows == 0:
        return torch.zeros(rows, dtype=torch.float64)
    step = odd_step(count, SAMPLE) if count > SAMPLE else 1
    pivots = []
    for top in range(0, rows, max(1, BLOCK * step // count)):
        part = x[top : top + max(1, BLOCK * step // count), ::step].detach()
        part = part.float().cpu().double() if part.device.type == "mps" else part.double()
        mean = part.mean(-1)
        if not bool(mean.isfinite().all()):
            mean = part.masked_fill(~part.isfinite(), torch.nan).nanmean(-1).nan_to_num(0.0)
            part = torch.where(part.isfinite(), part, mean[:, None])
        if snap and step > 1:
            mean = torch.where(mean.square() < _SNAP**2 * part.var(-1, correction=0), 0.0, mean)
        pivots.append(mean.cpu())
    pivot = torch.cat(pivots)
    return pivot if x.dtype == torch.float64 else pivot.float().double()


def scan(x: torch.Tensor, pivot: torch.Tensor, higher: bool = False) -> Sums:
    """Power sums of each row of [rows, values] about `pivot` [rows]; third and fourth only with `higher`.

    NaN and infinities are counted and left out of the sums.
    """
    return scan_many([x], pivot, higher)


def scan_many(matrices: list[torch.Tensor], pivot: torch.Tensor, higher: bool = False) -> Sums:
    """`scan` of the rows of several matrices [rows, values], one after the other; pivot [all rows].

    Matrices on the CPU are read in one call.
    """
    matrices = [x.detach() for x in matrices]
    if all(map(kernels.suits, matrices)):
        return _of_table(kernels.moments(matrices, pivot.numpy(), higher), pivot)
    start, found = 0, []
    for x in matrices:
        found.append(_scan_one(x, pivot[start : start + len(x)], higher))
        start += len(x)
    return Sums.cat(found)


def _scan_one(x: torch.Tensor, pivot: torch.Tensor, higher: bool) -> Sums:
    if x.numel() == 0:
        return Sums.empty(pivot)
    if kernels.suits(x):
        return _of_table(kernels.moments([x], pivot.numpy(), higher), pivot)
    if kernels.reads(x):  # a block at a time is made dense
        total = Sums.empty(pivot)
        for part, block in blocks(x):
            table = kernels.moments([block.contiguous()], pivot[part].numpy(), higher)
            total.put(part, _of_table(table, pivot[part]))
        return total
    fast = _scan_flat(x[0], pivot, higher) if len(x) == 1 else _scan_rows(x, pivot, higher)
    return fast or _scan_careful(x, pivot, higher)


def _of_table(table: np.ndarray, pivot: torch.Tensor) -> Sums:
    """The sums in a table of `kernels.moments`."""
    n, nonfinite, *summed, low, high = torch.from_numpy(table).unbind(1)
    return Sums(n=n, nonfinite=nonfinite, pivot=pivot, **dict(zip(_SUMMED, summed)), low=low, high=high)


def _scan_flat(x: torch.Tensor, pivot: torch.Tensor, higher: bool) -> Sums | None:
    """The sums of one row [values] of ordinary values, or None: a value is not finite, or its powers do not fit.

    The calls are few, because on a tensor of a usual size each costs as much as ten thousand values.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    offset = float(pivot)
    size = min(len(x), BLOCK if x.device.type == "cpu" else BLOCK_DEVICE)
    d, e = scratch(2, torch.Size((size,)), dtype, x.device)
    convert, found = x.dtype != dtype, []
    for w in x.split(size):
        if len(w) != size:
            d, e = d[: len(w)], e[: len(w)]
        if convert:
            w = d.copy_(w)
        extremes = torch.aminmax(w)
        if offset:
            w = torch.sub(w, offset, out=d)
        found += [*extremes, w.sum(), torch.sign(w, out=e).sum(), torch.abs(w, out=e).sum()]
        if higher:
            torch.mul(w, w, out=e)
            found += [e.sum(), torch.dot(e, w), torch.dot(e, e)]
        else:
            found.append(torch.dot(w, w))
    table = torch.stack(found).to("cpu", torch.float64).view(-1, 8 if higher else 6)
    values = [table[:, 0].amin(), table[:, 1].amax(), *table[:, 2:].sum(0).unbind()]
    if not higher:
        values += [values[0].new_zeros(())] * 2
    total = Sums.empty(pivot)
    for name, value in zip(("low", "high", *_SUMMED), values):
        setattr(total, name, value.view(1))
    total.n += len(x)
    return total if _ordinary(total.low, total.high, pivot, dtype) else None


def _scan_rows(x: torch.Tensor, pivot: torch.Tensor, higher: bool) -> Sums | None:
    """The same for [rows, values]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    offset = pivot.to(x.device, dtype)[:, None] if bool(pivot.any()) else None
    where, found = [], []
    for part, stored in blocks(x):
        d, e = scratch(2, stored.shape, dtype, x.device)
        w = stored if stored.dtype == dtype else d.copy_(stored)
        low, high = w.amin(-1), w.amax(-1)  # aminmax along a dimension is not vectorized
        if offset is not None:
            w = torch.sub(w, offset[part], out=d)
        values = [low, high, w.sum(-1), torch.sign(w, out=e).sum(-1), torch.abs(w, out=e).sum(-1)]
        values.append(torch.mul(w, w, out=e).sum(-1))
        if higher:
            values += [torch.mul(e, w, out=d).sum(-1), torch.mul(e, e, out=d).sum(-1)]
        where.append(part)
        found.append(torch.stack(values))
    total = Sums.empty(pivot)
    for part, table in zip(where, found):
        table = table.to("cpu", torch.float64)
        total.low[part] = torch.minimum(total.low[part], table[0])
        total.high[part] = torch.maximum(total.high[part], table[1])
        for name, value in zip(_SUMMED, table[2:]):
            getattr(total, name)[part] += value
    total.n += x.shape[1]
    return total if _ordinary(total.low, total.high, pivot, dtype) else None


def _ordinary(low: torch.Tensor, high: torch.Tensor, pivot: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether values with these extremes are finite and have fourth powers in `dtype`."""
    peak = torch.maximum((high - pivot).abs(), (low - pivot).abs())
    small, large = (_SMALL, _LARGE) if dtype == torch.float32 else (_SMALL**8, _LARGE**8)
    # NaN fails every comparison
    return bool((((peak > small) | (peak == 0)) & (peak < large)).all())


def _scan_careful(x: torch.Tensor, pivot: torch.Tensor, higher: bool) -> Sums:
    """The same for values of any size, in float64, with those that are not finite left out."""
    total = Sums.empty(pivot)
    dtype, device = (torch.float64, x.device) if x.device.type != "mps" else (torch.float64, torch.device("cpu"))
    names = _SUMMED[: 6 if higher else 4]
    for part, stored in blocks(x):
        w = stored.to(device).to(dtype)
        finite = w.isfinite()
        d = (w - pivot[part, None].to(device)).masked_fill_(~finite, 0.0)
        for function, name in zip(_POWERS, names):
            getattr(total, name)[part] += function(d).sum(-1).cpu()
        total.n[part] += finite.sum(-1).cpu()
        total.nonfinite[part] += (~finite).sum(-1).cpu()
        total.low[part] = torch.minimum(total.low[part], w.masked_fill(~finite, torch.inf).amin(-1).cpu())
        total.high[part] = torch.maximum(total.high[part], w.masked_fill(~finite, -torch.inf).amax(-1).cpu())
    return total

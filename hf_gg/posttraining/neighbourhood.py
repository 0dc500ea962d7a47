"""Neighbours of samples in the space of their embeddings, and the loss that holds their routing together."""

from __future__ import annotations

import math

import torch


KINDS = ("gaussian", "cosine")
_BLOCK = 1 << 23  # entries of a block of the distance matrix: 32 MiB
_SPARE = 8  # candidates beyond k, among which exact distances decide


def neighbourhood(
    embeddings: torch.Tensor,
    success: torch.Tensor,
    k: int | None = 3,
    sigma: float = 0.4,
    kind: str = "gaussian",
    radius: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The neighbours of every sample among those that the base model answers right, without the sample itself.

    With `kind="gaussian"` they are the nearest ones and sim = exp(−‖E_i − E_j‖² / 2σ²) (equation 5 of arXiv
    2511.07419); with `"cosine"`, the variant of the authors' script, those of the largest cosine, which is also sim
    (negative ones count as 0). W_ij = sim_ij / Σ_j sim_ij. The search goes through the samples in blocks, with memory
    for one block of distances; the distances that order and weigh the chosen ones are exact, and a block where
    rounding could hide nearer ones is searched again in float64. Of many at the same distance, any may be taken.

    Args:
        embeddings: floating point, [samples, dimensions].
        success: bool, [samples].
        k: most neighbours of a sample; None for all within `radius`.
        sigma: width of the similarity, in the unit of the embeddings.
        kind: `"gaussian"` or `"cosine"`.
        radius: farthest distance ‖E_i − E_j‖ of a neighbour (of unit vectors for `"cosine"`), the ε-ball; None for
            any.

    Returns:
        index, int64, and weight W, float32, both [samples, k] (without k, as wide as the largest ball), nearest first.
        Where a sample has fewer neighbours, the rest has index −1 and weight 0.

    Raises:
        TypeError: `success` is not bool, `embeddings` no real numbers.
        ValueError: shapes that do not fit, embeddings that are not finite, no success, fewer than k, or another
            argument that makes no sense.
    """
    _check(embeddings, success, k, sigma, kind, radius)
    points = embeddings.detach()
    if kind == "cosine" or not points.dtype.is_floating_point or points.dtype.itemsize < 4:
        points = points.float()
    if kind == "cosine":
        norms = points.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            row = int((norms[:, 0] == 0).nonzero()[0])
            raise ValueError(f"embeddings[{row}] is zero, which has no cosine: leave the sample out.")
        points = points / norms
    members = success.to(points.device).nonzero()[:, 0]
    unit, centre = _frame(points)
    pool = _moved(points[members], unit, centre)
    squares, rows = pool.square().sum(1), max(1, _BLOCK // len(members))
    found, wide = [], None
    for start in range(0, len(points), rows):
        here = torch.arange(start, min(start + rows, len(points)), device=members.device)
        block, sure = _block(points, here, members, pool, squares, unit, centre, k, radius)
        if not sure and pool.dtype != torch.float64:
            wide = _moved(points[members].double(), unit, centre) if wide is None else wide
            block, _ = _block(points, here, members, wide, wide.square().sum(1), unit, centre, k, radius)
        found.append(block)
    width = k if k is not None else max(index.shape[1] for index, _ in found)
    index = torch.cat([_widened(index, width, -1) for index, _ in found])
    distance = torch.cat([_widened(distance, width, torch.inf) for _, distance in found])
    return index, _weights(index, distance, sigma, kind)


def manifold_loss(r: torch.Tensor, r_neighbours: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of Σ_j W_ij ‖r_i − r_j‖².

    Args:
        r: routing weights of the samples, [batch, features]; gradients flow into them.
        r_neighbours: those of their neighbours, [batch, k, features].
        weight: W, [batch, k]; a sample without neighbours has zeros and adds nothing.

    Returns:
        A scalar, in float32 at least.

    Raises:
        ValueError: shapes that do not fit.
    """
    return manifold_terms(r, r_neighbours, weight).mean()


def manifold_terms(r: torch.Tensor, r_neighbours: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`manifold_loss` of each sample, [batch]."""
    if r.ndim != 2 or r_neighbours.ndim != 3 or not len(r):
        raise ValueError(
            f"r must be [batch, features] and r_neighbours [batch, k, features], got {list(r.shape)} and "
            f"{list(r_neighbours.shape)}."
        )
    wanted = (len(r), r_neighbours.shape[1], r.shape[1])
    if r_neighbours.shape != wanted or weight.shape != wanted[:2]:
        raise ValueError(
            f"r of shape {list(r.shape)} wants r_neighbours {list(wanted)} and weight {list(wanted[:2])}, got "
            f"{list(r_neighbours.shape)} and {list(weight.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(r.dtype, r_neighbours.dtype), torch.float32)
    squares = (r.to(dtype)[:, None] - r_neighbours.to(dtype)).square().sum(2)
    return (weight.to(dtype) * squares).sum(1)


def random_neighbours(success: torch.Tensor, k: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """k successful samples drawn for each sample, each with the weight 1/k: what `neighbourhood` is compared with.

    Raises:
        ValueError: as `neighbourhood`.
    """
    _check_success(success, k)
    generator = torch.Generator().manual_seed(seed)
    members = success.cpu().nonzero()[:, 0]
    index = torch.full((len(success), k), -1)
    for i in range(len(success)):
        # of k + 1 that are drawn, one may be the sample itself
        drawn = members[torch.randperm(len(members), generator=generator)[: k + 1]]
        drawn = drawn[drawn != i][:k]
        index[i, : len(drawn)] = drawn
    here = (index >= 0).float()
    return index, here / here.sum(1, keepdim=True).clamp(min=1)


def _frame(points: torch.Tensor) -> tuple[float, torch.Tensor]:
    """A unit, a power of two, and the centre in it: near the origin, products lose the least of a distance."""
    largest = max(abs(float(x)) for x in points.aminmax())
    unit = 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
    return unit, points.mean(0, dtype=torch.float64) / unit


def _moved(points: torch.Tensor, unit: float, centre: torch.Tensor) -> torch.Tensor:
    return points.div(unit).sub_(centre.to(points.dtype))


def _block(points, here, members, pool, squares, unit, centre, k, radius):
    """Index and squared distance of the neighbours of some samples, [rows, neighbours]; whether they are sure."""
    own = _moved(points[here].to(pool.dtype), unit, centre)
    distance = torch.addmm(squares[None], own, pool.T, alpha=-2).add_(own.square().sum(1, keepdim=True))
    # the sample itself: its place in the pool, if it has one
    places = torch.searchsorted(members, here).clamp_(max=len(members) - 1)
    inside = members[places] == here
    distance[inside.nonzero()[:, 0], places[inside]] = torch.inf
    # sums of products are off by less
    slack = 16 * torch.finfo(pool.dtype).eps * float(squares.max() + own.square().sum(1).max())
    if k is not None:
        count = min(k + _SPARE, len(members))
    else:
        count = max(1, int((distance <= (radius / unit) ** 2 + slack).sum(1).max()))
    chosen = _smallest(distance, count)
    alone = (chosen == places[:, None]) & inside[:, None]
    exact = torch.empty(chosen.shape, dtype=torch.float64, device=points.device)
    for at in range(0, len(own), part := max(1, _BLOCK // (4 * count * points.shape[1]))):
        rows = slice(at, at + part)
        difference = points[members[chosen[rows]]].double() - points[here[rows], None].double()
        exact[rows] = difference.square().sum(2)
    exact.masked_fill_(alone, torch.inf)
    sure = k is None or count == len(members)
    if not sure:
        # what was not chosen is as far as the farthest chosen one, less the slack
        farthest = distance.gather(1, chosen).amax(1).double() - slack
        sure = bool((exact.kthvalue(k, 1).values / unit**2 <= farthest).all())
    if radius is not None:
        exact.masked_fill_(exact > radius**2, torch.inf)
    # by index first, so that of equally near ones the first stands first
    order = chosen.argsort(dim=1)
    chosen, exact = chosen.gather(1, order), exact.gather(1, order)
    exact, order = exact.sort(dim=1, stable=True)
    exact, index = exact[:, :k], members[chosen.gather(1, order)[:, :k]]
    if k is None:
        width = int(exact.isfinite().sum(1).max())
        exact, index = exact[:, :width], index[:, :width]
    return (index.masked_fill(exact.isinf(), -1), exact), sure


def _smallest(x: torch.Tensor, count: int, group: int = 32) -> torch.Tensor:
    """Columns of the smallest entries of each row, in no order; faster than `topk` on wide rows.

    The smallest entries lie in the groups with the smallest minima.
    """
    groups = x.shape[1] // group
    if groups <= 2 * count:
        return x.topk(count, dim=1, largest=False, sorted=False).indices
    least = x[:, : groups * group].unflatten(1, (groups, group)).amin(2)
    columns = least.topk(count, dim=1, largest=False, sorted=False).indices[..., None] * group
    columns = (columns + torch.arange(group, device=x.device)).flatten(1)
    rest = torch.arange(groups * group, x.shape[1], device=x.device).expand(len(x), -1)
    columns = torch.cat([columns, rest], dim=1)
    return columns.gather(1, x.gather(1, columns).topk(count, dim=1, largest=False, sorted=False).indices)


def _widened(x: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)


def _weights(index: torch.Tensor, distance: torch.Tensor, sigma: float, kind: str) -> torch.Tensor:
    """W from squared distances; rows without a neighbour are zero."""
    if kind == "gaussian":
        # the same as sim / Σ sim, and no 0 / 0 where every sim is tiny
        exponent = -distance / (2 * sigma**2)
        if exponent.numel():
            exponent = exponent - exponent.amax(1, keepdim=True).nan_to_num(neginf=0)
        similarity = exponent.exp()
    else:
        similarity = (1 - distance / 2).clamp(min=0)
        index.masked_fill_(similarity == 0, -1)
    similarity = similarity.masked_fill(index < 0, 0)
    total = similarity.sum(1, keepdim=True)
    return (similarity / total.masked_fill(total == 0, 1)).float()


def positive(value: object) -> bool:
    """Whether it is a number above 0 and below infinity."""
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _check(embeddings, success, k, sigma, kind, radius) -> None:
    if not isinstance(embeddings, torch.Tensor) or embeddings.is_complex():
        what = embeddings.dtype if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise TypeError(f"embeddings must be a tensor of real numbers, got {what}.")
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise ValueError(f"embeddings must be [samples, dimensions], got {list(embeddings.shape)}.")
    if success.shape != embeddings.shape[:1]:
        raise ValueError(f"success must be [{len(embeddings)}], one for each embedding, got {list(success.shape)}.")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if not positive(sigma):
        raise ValueError(f"sigma must be positive, got {sigma!r}.")
    if radius is not None and not positive(radius):
        raise ValueError(f"radius must be positive, or None for any distance, got {radius!r}.")
    if k is None and radius is None:
        raise ValueError("k=None takes all neighbours within radius: give radius, or a number.")
    for start in range(0, len(embeddings), 8192):
        finite = embeddings[start : start + 8192].isfinite().all(1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"embeddings[{row}] holds NaN or infinity: look at the embedder and at that sample.")
    _check_success(success, k)


def _check_success(success: torch.Tensor, k: int | None) -> None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}.")
    if success.dtype != torch.bool:
        raise TypeError(f"success must be bool, got {success.dtype}.")
    count = int(success.sum())
    if count == 0:
        raise ValueError(
            "success holds no sample that the base model answers right, so there is no routing to learn from: give "
            "easier samples, or another way to judge answers."
        )
    if k is not None and count < k:
        raise ValueError(f"success holds {count} samples, fewer than k={k}: give more samples, or a smaller k.")

"""Neighbourhoods and the manifold loss against loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_gg.posttraining import neighbourhood as module
from hf_gg.posttraining.roma import manifold_loss, neighbourhood, random_neighbours


def by_loop(embeddings, success, k, sigma, kind="gaussian", radius=None):
    """The neighbours and weights of each sample, as dictionaries."""
    points = embeddings.double().numpy()
    if kind == "cosine":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    found = []
    for i in range(len(points)):
        others = [j for j in range(len(points)) if success[j] and j != i]
        distance = {j: math.sqrt(sum((a - b) ** 2 for a, b in zip(points[i], points[j]))) for j in others}
        near = [j for j in sorted(others, key=lambda j: (distance[j], j)) if radius is None or distance[j] <= radius]
        near = near[:k]
        if kind == "cosine":
            similarity = {j: max(float(points[i] @ points[j]), 0.0) for j in near}
        else:
            similarity = {j: math.exp(-(distance[j] ** 2) / (2 * sigma**2)) for j in near}
        total = sum(similarity.values())
        found.append({j: s / total for j, s in similarity.items() if s > 0})
    return found


def as_dictionaries(index, weight):
    return [{int(j): float(w) for j, w in zip(*row) if j >= 0} for row in zip(index, weight)]


def assert_same(found, wanted):
    for own, expected in zip(as_dictionaries(*found), wanted, strict=True):
        assert own.keys() == expected.keys()
        assert own == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "cosine"])
@pytest.mark.parametrize("radius", [None, 0.9, 1.3])
@pytest.mark.parametrize("k", [1, 3, 7, None])
def test_against_a_loop(kind, radius, k):
    if k is None and radius is None:
        pytest.skip("needs one of them")
    points = torch.nn.functional.normalize(torch.randn(60, 5), dim=1)
    success = torch.rand(60) < 0.6
    found = neighbourhood(points, success, k, 0.4, kind, radius)
    assert_same(found, by_loop(points, success, k, 0.4, kind, radius))


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_blocks_and_groups_change_nothing(monkeypatch, rows):
    """In blocks of some rows, and with a pool that is searched group by group."""
    points, success = torch.randn(200, 6), torch.rand(200) < 0.9
    members = int(success.sum())
    monkeypatch.setattr(module, "_BLOCK", rows * members)
    monkeypatch.setattr(module, "_SPARE", 0)
    assert members // 32 > 2
    assert_same(neighbourhood(points, success, 2, 1.0), by_loop(points, success, 2, 1.0))
    x = torch.randn(9, 333)
    columns = module._smallest(x, 4, group=8).sort(1).values
    assert torch.equal(columns, x.argsort(1)[:, :4].sort(1).values)


@given(st.integers(2, 24), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_grids_with_many_ties(count, k, seed, cosine):
    """Points on a grid are equally near to many; the first ones win."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(1, 4, (count, 2), generator=generator).float()
    success = torch.rand(count, generator=generator) < 0.8
    if int(success.sum()) < k:
        return
    kind = "cosine" if cosine else "gaussian"
    index, weight = neighbourhood(points, success, k, 0.7, kind)
    assert index.shape == weight.shape == (count, k)
    here = index >= 0
    assert not (index == torch.arange(count)[:, None]).any()
    assert success[index[here]].all()
    assert bool(((weight > 0) == here).all())
    sums = weight.sum(1)
    assert bool(((sums - 1).abs() < 1e-5).eq(here.any(1)).all())
    if not cosine:
        assert_same((index, weight), by_loop(points, success, k, 0.7))


def test_never_its_own_neighbour_even_among_twins():
    points = torch.zeros(30, 4)
    index, weight = neighbourhood(points, torch.ones(30, dtype=torch.bool), 3)
    assert not (index == torch.arange(30)[:, None]).any()
    assert torch.allclose(weight, torch.full((30, 3), 1 / 3))


def test_far_apart_weights_are_no_nan():
    points = torch.tensor([[0.0], [100.0], [101.0], [-100.5]])
    index, weight = neighbourhood(points, torch.ones(4, dtype=torch.bool), 2, 0.01)
    assert bool(weight.isfinite().all())
    assert weight[0].tolist() == [1.0, 0.0] and index[0].tolist() == [1, 3]


def test_half_precision_and_float64_embeddings():
    points, success = torch.randn(40, 8), torch.ones(40, dtype=torch.bool)
    exact = neighbourhood(points.double(), success, 3)
    assert torch.equal(exact[0], neighbourhood(points, success, 3)[0])
    half = neighbourhood(points.bfloat16(), success, 3)
    assert torch.equal(half[0], neighbourhood(points.bfloat16().float(), success, 3)[0])


def cloud(seed: int) -> torch.Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "points",
    [
        1000 + 0.01 * cloud(0),
        1e20 * cloud(1),
        1e-25 * cloud(2),
        1e-5 * cloud(3) + (torch.arange(200) % 2)[:, None],  # no shift brings both crowds to the origin
        cloud(4).index_fill(0, torch.tensor([7]), 1e6),
    ],
)
def test_rounding_hides_no_neighbour(points):
    """Embeddings with a common part, of any size, in crowds: what float32 products alone would get wrong."""
    index, weight = neighbourhood(points, torch.ones(200, dtype=torch.bool), 3, float(points.double().std()))
    exact = (points.double()[:, None] - points.double()[None]).square().sum(2).fill_diagonal_(torch.inf)
    assert torch.equal(exact.gather(1, index), exact.sort(1).values[:, :3])
    assert bool(weight.isfinite().all())


def test_loss_against_a_loop():
    r, near = torch.rand(5, 7, requires_grad=True), torch.rand(5, 3, 7)
    weight = torch.rand(5, 3)
    weight[2] = 0
    wanted = 0.0
    for i in range(5):
        for j in range(3):
            wanted += float(weight[i, j]) * sum((float(a) - float(b)) ** 2 for a, b in zip(r[i], near[i, j])) / 5
    loss = manifold_loss(r, near, weight)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    loss.backward()
    gradient = 2 / 5 * (weight[:, :, None] * (r[:, None] - near)).sum(1)
    assert torch.allclose(r.grad, gradient, atol=1e-7)
    assert float(r.grad[2].abs().sum()) == 0
    doubled = r.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: manifold_loss(x, near.double(), weight.double()), (doubled,))


def test_loss_pulls_routing_together():
    """Two groups in E-space whose routing is mixed up: by the loss alone, each takes on its group's routing."""
    points = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [5.0, 5], [5.1, 5], [5, 5.1]])
    index, weight = neighbourhood(points, torch.ones(6, dtype=torch.bool), 2)
    assert [sorted(row) for row in index.tolist()] == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    logits = torch.randn(6, 4, requires_grad=True)
    snapshot = torch.zeros(6, 4)
    snapshot[:3, 0] = snapshot[3:, 1] = 1
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = float(manifold_loss(logits.softmax(1), snapshot[index], weight))
    for _ in range(200):
        optimizer.zero_grad()
        manifold_loss(logits.softmax(1), snapshot[index], weight).backward()
        optimizer.step()
    r = logits.softmax(1).detach()
    assert float(manifold_loss(r, snapshot[index], weight)) < 0.01 * before
    assert r.argmax(1).tolist() == [0, 0, 0, 1, 1, 1]


def test_random_neighbours():
    success = torch.rand(50) < 0.5
    index, weight = random_neighbours(success, 3, seed=1)
    assert success[index].all() and not (index == torch.arange(50)[:, None]).any()
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert torch.allclose(weight, torch.full((50, 3), 1 / 3))
    assert not torch.equal(index, random_neighbours(success, 3, seed=2)[0])
    # a member of a set of k has one less
    index, weight = random_neighbours(torch.tensor([True, True, False]), 2)
    assert index.tolist()[0] == [1, -1] and weight[0].tolist() == [1.0, 0.0] and -1 not in index[2]


YES = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(6), YES), ValueError, "embeddings must be"),
        ((torch.randn(6, 2), YES[:5]), ValueError, "success must be"),
        ((torch.randn(6, 2), YES.float()), TypeError, "success must be bool"),
        ((torch.randn(6, 2), ~YES), ValueError, "no sample that the base model answers right"),
        ((torch.randn(6, 2), YES & (torch.arange(6) < 2)), ValueError, "2 samples, fewer than k=3"),
        ((torch.randn(6, 2), YES, 0), ValueError, "k must be"),
        ((torch.randn(6, 2), YES, 2.5), ValueError, "k must be"),
        ((torch.randn(6, 2), YES, None), ValueError, "give radius"),
        ((torch.randn(6, 2), YES, 3, 0.0), ValueError, "sigma must be positive"),
        ((torch.randn(6, 2), YES, 3, math.nan), ValueError, "sigma must be positive"),
        ((torch.randn(6, 2), YES, 3, 0.4, "dot"), ValueError, "kind must be"),
        ((torch.randn(6, 2), YES, 3, 0.4, "gaussian", -1.0), ValueError, "radius must be positive"),
        ((torch.randn(6, 2), YES, 3, None), ValueError, "sigma must be positive, got None"),
        (([[1.0, 2.0]] * 6, YES), TypeError, "must be a tensor of real numbers, got list"),
        ((torch.zeros(6, 2), YES, 3, 0.4, "cosine"), ValueError, r"embeddings\[0\] is zero"),
        ((torch.tensor([[1.0]] * 4 + [[math.nan]] + [[1.0]]), YES), ValueError, r"embeddings\[4\] holds NaN"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        neighbourhood(*arguments)


def test_bad_shapes_of_the_loss():
    r, near, weight = torch.rand(4, 6), torch.rand(4, 3, 6), torch.rand(4, 3)
    for bad in ((r[0], near, weight), (r, near[:, :, :5], weight), (r, near, weight[:, :2]), (r[:3], near, weight)):
        with pytest.raises(ValueError, match="r must be|wants r_neighbours"):
            manifold_loss(*bad)

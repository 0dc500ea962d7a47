"""Draws in place against scipy's distribution and against torch's own normal draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gg.ggd import sampling
from hf_gg.ggd.sampling import gg_


SHAPES = [0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0]


def law(std: float, shape: float):
    """scipy's distribution of a standard deviation."""
    scale = std * math.exp((special.gammaln(1 / shape) - special.gammaln(3 / shape)) / 2)
    return stats.gennorm(shape, scale=scale)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().flatten().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_follow_the_law(shape, dtype):
    x = gg_(torch.empty(200, 301, dtype=dtype), 0.5, shape)
    assert x.isfinite().all()
    values = numbers(x)
    if shape >= 0.3 or dtype not in (torch.float16,):  # at shape 0.1 most draws are below the smallest float16
        # rounding moves the empirical distribution a little
        limit = 1.63 / math.sqrt(values.size) + (2e-3 if dtype.itemsize == 2 else 0)
        assert stats.kstest(values, law(0.5, shape).cdf).statistic < limit
    if shape >= 0.5:
        kurtosis = law(0.5, shape).stats("k") + 3
        assert values.std() == pytest.approx(0.5, rel=5 * math.sqrt((kurtosis - 1) / 4 / values.size))
    assert values.mean() == pytest.approx(0, abs=5 * 0.5 / math.sqrt(values.size))


@pytest.mark.parametrize("shape", [0.1, 1.0, 8.0])
def test_both_tails_and_the_middle(shape):
    """Moments of the order of the shape itself: E|x|^ν = α^ν / ν, from light to heavy tails; no small draw is lost."""
    x = gg_(torch.empty(1 << 17), 1.0, shape)
    alpha = law(1.0, shape).kwds["scale"]
    powers = (numbers(x.abs()) / alpha) ** shape
    assert powers.mean() == pytest.approx(1 / shape, rel=5 * math.sqrt(shape / x.numel()))
    assert (x != 0).float().mean() > 0.9999
    assert len(x.unique()) > 0.9 * x.numel()
    assert (x > 0).float().mean() == pytest.approx(0.5, abs=5 / 2 / math.sqrt(x.numel()))


@pytest.mark.parametrize("shape", [0.5, 2.0])
def test_neighbours_are_independent(shape):
    x = gg_(torch.empty(1 << 17), 1.0, shape).sign()
    for lag in (1, 2, 7, 16, 1 << 16):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(x.numel() - lag), lag


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000, (1 << 20) + 3, (1 << 20) + 16, (1 << 21) + 5])
def test_shape_2_is_the_draw_of_torch(size):
    torch.manual_seed(3)
    expected = nn.init.normal_(torch.empty(size), 0, 0.02)
    torch.manual_seed(3)
    assert torch.equal(gg_(torch.empty(size), 0.02, 2.0), expected)


@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_seeds_reproduce(shape):
    def draw(**kwargs):
        return gg_(torch.empty(50, 7), 1.0, shape, **kwargs)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(draw(generator=generators[0]), first)
    assert torch.equal(draw(generator=generators[1]), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_strides_do_not_matter():
    torch.manual_seed(1)
    expected = gg_(torch.empty(6, 4), 1.0, 1.0)
    torch.manual_seed(1)
    assert torch.equal(gg_(torch.empty(4, 6).T, 1.0, 1.0), expected)
    whole = torch.zeros(6, 9)
    torch.manual_seed(1)
    gg_(whole[:, 2:6], 1.0, 1.0)
    assert torch.equal(whole[:, 2:6], expected) and not whole[:, :2].any() and not whole[:, 6:].any()


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.numel() * result.element_size())
        return result


def test_memory_is_a_chunk():
    """No tensor is made that is larger than a chunk in float32, whatever is filled."""
    x = torch.empty(4, sampling._CHUNK, dtype=torch.bfloat16)
    flat = x.view(-1)
    with Allocations() as made:
        sampling._fill(flat, 1.0, 1.0, None)
    assert max(made.sizes) == 4 * sampling._CHUNK


def test_leaves_what_cannot_be_drawn():
    meta = torch.empty(3, 4, device="meta")
    assert gg_(meta, 1.0, 1.0) is meta
    empty = torch.empty(0, 4)
    assert gg_(empty, 1.0, 1.0) is empty
    assert gg_(torch.empty(()), 1.0, 1.0).isfinite()
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert gg_(parameter, 1.0, 1.0).requires_grad and parameter.grad_fn is None


def test_never_infinite():
    """A draw beyond the dtype is its largest number: half of these are."""
    x = gg_(torch.empty(20_000, dtype=torch.float16), 65504.0, 2.0)
    assert x.isfinite().all() and 0.2 < float((x.abs() == 65504).float().mean()) < 0.4
    x = gg_(torch.empty(20_000), 3e38, 0.1)
    assert x.isfinite().all()


@pytest.mark.parametrize("shape", [0, -1, 0.09, 8.1, math.nan, math.inf, "1", None, True])
def test_impossible_shapes(shape):
    with pytest.raises(ValueError, match="shape must be a number from 0.1 to 8"):
        gg_(torch.empty(3), 1.0, shape)


@pytest.mark.parametrize("std", [0, -1.0, math.nan, math.inf, "model", None, True])
def test_impossible_deviations(std):
    with pytest.raises(ValueError, match="std must be a positive, finite number"):
        gg_(torch.empty(3), std, 1.0)


def test_impossible_tensors():
    for dtype in (torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=str(dtype)):
            gg_(torch.empty(3, dtype=dtype), 1.0, 1.0)
    with pytest.raises(ValueError, match="largest number of torch.float16"):
        gg_(torch.empty(3, dtype=torch.float16), 1e5, 1.0)

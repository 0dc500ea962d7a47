"""`deepshape_` against scipy's distribution functions: maps, fits, ties, zeros, tails, dtypes, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import hf_gg
from hf_gg.data import mgm_gpt2, minilm
from hf_gg.training.deepshape import fitted
from hf_gg.training.shapemap import ShapeMap


def draws(shape: float, size=(300, 200), scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    values = stats.gennorm.rvs(shape, scale=scale, size=size, random_state=seed)
    return torch.from_numpy(values).float()


def fit_by_scipy(w: torch.Tensor) -> tuple[float, float]:
    """ν from the ratio of moments, solved by scipy, and the deviation."""
    from scipy.optimize import brentq
    from scipy.special import gammaln

    w = w.double().numpy()
    second, first = (w**2).mean(), np.abs(w).mean()

    def excess(s):
        return gammaln(1 / s) + gammaln(3 / s) - 2 * gammaln(2 / s) - math.log(second / first**2)

    return brentq(excess, 0.1, 8), math.sqrt(second)


@pytest.mark.parametrize(("shape_scale", "std_scale"), [(0.8, 1.0), (0.8, 0.6), (1.25, 1.1), (0.5, 2.0), (1.0, 0.7)])
@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("map", ["empirical", "parametric"])
def test_against_scipy(map, shape, shape_scale, std_scale):
    w = draws(shape)
    old_shape, old_std = fit_by_scipy(w)
    new = w.clone()
    report = hf_gg.deepshape_({"w": new}, shape_scale, std_scale, map=map)["w"]
    assert report.before.shape == pytest.approx(old_shape, rel=1e-6)
    assert report.before.std == pytest.approx(old_std, rel=1e-6)
    assert (report.target.shape, report.target.std) == pytest.approx((old_shape * shape_scale, old_std * std_scale))

    wanted, d = stats.gennorm(report.target.shape, scale=report.target.scale), w.abs().double().numpy()
    assert wanted.std() == pytest.approx(old_std * std_scale)
    if map == "empirical":
        tail = 1 - (stats.rankdata(d) - 0.5) / d.size
        atol = 2e-3 * report.target.std  # ranks are interpolated among 12 leading bits
    else:
        tail = 2 * stats.gennorm.sf(d.reshape(-1), old_shape, scale=report.before.scale)
        atol = 0
    expected = np.sign(w.numpy()) * wanted.isf(tail / 2).reshape(w.shape)
    # scipy's isf of about ½ knows a magnitude near zero to 1e-16 of a half only
    np.testing.assert_allclose(new.numpy(), expected, rtol=2e-6 if atol == 0 else 4e-3, atol=atol or 1e-12)

    # the weights are draws: what the fit of the result may differ by
    new_shape, new_std = fit_by_scipy(new)
    tolerance = 0.004 if map == "empirical" else 0.03
    assert new_shape == pytest.approx(old_shape * shape_scale, rel=tolerance)
    assert new_std == pytest.approx(old_std * std_scale, rel=tolerance)
    assert (report.after.shape, report.after.std) == pytest.approx((new_shape, new_std), rel=1e-5)


@pytest.mark.parametrize("map", ["empirical", "parametric"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_order_signs_zeros_and_ties(map, dtype):
    w = draws(1.3, (100, 100)).to(dtype)
    w[:10] = 0.0
    w[10:20] = w[20, 0]  # a thousand ties
    new = w.clone()
    report = hf_gg.deepshape_({"w": new}, 0.8, map=map)["w"]
    assert new.dtype == dtype and torch.equal(new.sign(), w.sign())
    order = w.flatten().double().argsort()
    steps = new.flatten().double()[order].diff()
    assert (steps >= 0).all()
    assert (steps[w.flatten().double()[order].diff() == 0] == 0).all()
    if dtype in (torch.float32, torch.float64):
        assert (steps[w.flatten()[order].diff() > 0] > 0).all()
    if dtype == torch.bfloat16 and map == "parametric":  # half a unit of the last place, and no more
        exact = w.double()
        hf_gg.deepshape_({"w": exact}, 0.8, map=map)
        ok = torch.nextafter(new.abs(), torch.tensor(math.inf, dtype=dtype)) - new.abs()
        assert ((new.double() - exact).abs() <= 0.5001 * ok.double()).all()
    assert report.numel == 10_000


def test_ties_have_their_mean_rank():
    """Three values of each sign, as on a grid: neither end is favoured."""
    w = torch.tensor([0.1, 0.2, 0.3]).repeat_interleave(torch.tensor([50, 30, 20]))
    w = torch.cat([w, -w])[:, None]
    new = w.clone()
    with pytest.warns(UserWarning, match="w is no generalized Gaussian"):
        report = hf_gg.deepshape_({"w": new}, map="empirical")["w"]
    wanted = stats.gennorm(report.target.shape, scale=report.target.scale)
    for value, rank in ((0.1, 25), (0.2, 65), (0.3, 90)):
        got = new[w == value].unique()
        assert got.numel() == 1 and float(got) == pytest.approx(wanted.isf((1 - rank / 100) / 2), rel=1e-5)
        assert torch.equal(new[w == -value].unique(), -got)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.floats(0.15, 8.0),
    factor=st.floats(0.2, 4.0),
    values=st.lists(st.floats(1e-30, 50.0), min_size=2, max_size=20),
)
def test_map_is_monotone_and_its_inverse_inverts(shape, factor, values):
    new_shape = min(max(shape * factor, 0.1), 8.0)
    x = torch.tensor(sorted(set(values)), dtype=torch.float64)
    forward = ShapeMap(1.0, shape, 0.5, new_shape)
    # float64 holds no more
    y = forward.table(float(x[0]), float(x[-1]))(x)
    keep = y.isfinite() & (y > 0)
    x, y = x[keep], y[keep]
    if not len(x):
        return
    assert forward.magnitude(float(x[-1])) == pytest.approx(float(y[-1]), rel=1e-5)
    # neighbours in float64 may have one image
    assert (y.diff() >= 0).all()
    assert (y.diff() > 0)[x.diff() > 1e-13 * x[1:]].all()
    back = forward.inverse().table(float(y[0]), float(y[-1]))(y)
    np.testing.assert_allclose(back.numpy(), x.numpy(), rtol=1e-5)


def test_tails_are_finite_where_probabilities_underflow():
    w = draws(2.0, (100, 100))
    w[0, 0] = 100 * w.std()  # the survival function is 1e-2174 there
    new = w.clone()
    hf_gg.deepshape_({"w": new}, 0.8, map="parametric")
    assert new.isfinite().all() and new.argmax() == 0
    fit = fitted({"w": w}, "moments", "w")
    assert ShapeMap(0.02, 2.0, 0.02, 1.6).magnitude(2.0) == pytest.approx(6.3250939963807120, rel=1e-12)  # by mpmath
    assert fit.shape < 2
    empirical = w.clone()
    report = hf_gg.deepshape_({"w": empirical}, 0.8, map="empirical")["w"]
    largest = stats.gennorm(report.target.shape, scale=report.target.scale).isf(0.25 / w.numel())
    assert float(empirical.max()) == pytest.approx(largest, rel=1e-5)


def test_small_tensors_change_too():
    """There is no threshold on counts: every weight of a small tensor is moved."""
    w = draws(2.0, (5, 4))
    new = w.clone()
    report = hf_gg.deepshape_({"w": new}, 0.8, map="empirical")["w"]
    assert (new != w).all()
    assert report.after.std == pytest.approx(report.target.std, rel=0.1)


@pytest.mark.parametrize("map", ["empirical", "parametric"])
def test_global(map):
    a, b = draws(2.0, scale=0.02), draws(1.0, scale=0.05, seed=1)
    tensors = {"a": a.clone(), "b": b.clone()}
    report = hf_gg.deepshape_(tensors, 0.8, mode="global", map=map)
    together = torch.cat([a, b])
    shape, std = fit_by_scipy(together)
    assert report["a"].before == report["b"].before
    assert (report["a"].before.shape, report["a"].before.std) == pytest.approx((shape, std), rel=1e-6)
    new = together.clone()
    hf_gg.deepshape_({"ab": new}, 0.8, map=map)
    assert torch.allclose(new, torch.cat(list(tensors.values())), rtol=1e-5)
    assert report["a"].after.std < report["b"].after.std


@pytest.mark.parametrize(
    ("load", "method"),
    [
        (lambda: AutoModelForCausalLM.from_pretrained(mgm_gpt2()), "moments"),
        pytest.param(lambda: AutoModelForCausalLM.from_pretrained(mgm_gpt2()), "mle", marks=pytest.mark.slow),
        pytest.param(lambda: AutoModel.from_pretrained(minilm()), "moments", marks=pytest.mark.slow),
    ],
)
def test_real_models(load, method):
    model = load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = hf_gg.deepshape_(model, 0.8, 0.9, map="empirical", method=method)
    for name, p in model.named_parameters():
        if name not in report:
            assert p.ndim < 2 or "embeddings" in name or "wte" in name or "wpe" in name
            assert torch.equal(p, before[name])
            continue
        one = report[name]
        assert one.target.shape == pytest.approx(0.8 * one.before.shape)
        assert one.after.shape == pytest.approx(one.target.shape, rel=1e-3)
        assert one.after.std == pytest.approx(one.target.std, rel=1e-3)
        assert torch.equal(p.sign(), before[name].sign())
    assert len(report) > 30


def test_other_layouts_and_frozen_weights():
    w = draws(1.5, (60, 50))
    expected = w.clone()
    hf_gg.deepshape_({"w": expected})
    transposed = w.T.contiguous().T
    hf_gg.deepshape_({"w": transposed})
    assert torch.allclose(transposed, expected, rtol=1e-5)
    strided = torch.zeros(60, 100)
    strided[:, ::2] = w
    hf_gg.deepshape_({"w": strided[:, ::2]})
    assert torch.allclose(strided[:, ::2], expected, rtol=1e-5) and not strided[:, 1::2].any()
    layer = nn.Linear(50, 60).requires_grad_(False)
    layer.weight.copy_(w)
    assert list(hf_gg.deepshape_(layer)) == ["weight"]
    assert torch.allclose(layer.weight, expected, rtol=1e-5)


def test_modules_and_embeddings():
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"e": nn.Embedding(50, 20), "a": nn.Linear(20, 30), "b": nn.Linear(30, 20), "n": nn.LayerNorm(20)}
        )
        for p in model.parameters():
            nn.init.normal_(p)
        return model

    assert list(hf_gg.deepshape_(build(), 0.5)) == ["a.weight", "b.weight"]
    assert list(hf_gg.deepshape_(build(), 0.5, modules="a")) == ["a.weight"]
    assert list(hf_gg.deepshape_(build(), 0.5, embeddings=True)) == ["e.weight", "a.weight", "b.weight"]
    with pytest.raises(ValueError, match="'c' matches no module of ModuleDict"):
        hf_gg.deepshape_(build(), modules="c")
    with pytest.raises(ValueError, match="none holds a trainable matrix"):
        hf_gg.deepshape_(build(), modules=["n"])


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.numel = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.numel = max(self.numel, result.numel())
        return result


def test_works_in_blocks():
    w = draws(1.5, (2000, 500))
    with Largest(w) as largest:
        hf_gg.deepshape_({"w": w}, map="parametric")
    assert largest.numel <= 1 << 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape_scale": 0}, "shape_scale must be positive"),
        ({"shape_scale": -1.0}, "shape_scale"),
        ({"shape_scale": math.nan}, "shape_scale"),
        ({"std_scale": math.inf}, "std_scale"),
        ({"std_scale": 0.0}, "std_scale must be positive"),
        ({"shape_scale": 6.0}, r"w has shape 1\.\d+, and shape_scale=6 makes it .* Choose shape_scale between"),
        ({"shape_scale": 0.01}, "shapes are 0.1 to 8"),
        ({"mode": "layer"}, "mode must be one of 'tensor', 'global'"),
        ({"map": "linear"}, "map must be one of 'parametric', 'empirical'"),
        ({"method": "median"}, "method"),
        ({"modules": "w"}, "modules is for models"),
    ],
)
def test_bad_arguments(arguments, message):
    w = draws(1.5, (50, 40))
    before = w.clone()
    with pytest.raises(ValueError, match=message):
        hf_gg.deepshape_({"w": w}, **arguments)
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((4, 4), 0.3), "bad is constant, 0.3"),
        (torch.zeros(4, 4), "bad is constant, 0"),
        (torch.empty(0, 4), "bad is empty"),
        (torch.tensor([[1.0, math.nan]]), "bad has weights that are NaN or infinite"),
        (torch.tensor([[1.0, -math.inf]]), "bad has weights that are NaN or infinite"),
        (torch.empty(4, 4, device="meta"), "bad is on the meta device"),
    ],
)
@pytest.mark.parametrize("mode", ["tensor", "global"])
def test_bad_tensors_change_nothing(bad, message, mode):
    good = draws(1.5, (50, 40))
    before = good.clone()
    if mode == "global" and "constant" in message:  # it is a part of what is mapped
        report = hf_gg.deepshape_({"good": good, "bad": bad}, mode=mode)
        assert math.isnan(report["bad"].after.shape) and bad.unique().numel() == 1 and bad.isfinite().all()
        return
    with pytest.raises(ValueError, match=message):
        hf_gg.deepshape_({"good": good, "bad": bad}, mode=mode)
    assert torch.equal(good, before)


def test_bad_types():
    with pytest.raises(TypeError, match="w is torch.uint8: quantized codes cannot be mapped"):
        hf_gg.deepshape_({"w": torch.zeros(3, 3, dtype=torch.uint8)})
    with pytest.raises(TypeError, match="w is torch.float8_e4m3fn"):
        hf_gg.deepshape_({"w": torch.ones(3, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(TypeError, match="model must be a torch module or tensors by name, got Tensor"):
        hf_gg.deepshape_(torch.ones(3, 3))
    with pytest.raises(ValueError, match="holds no tensor"):
        hf_gg.deepshape_({})
    with pytest.raises(TypeError, match="shape_scale must be a number"):
        hf_gg.deepshape_({"w": torch.ones(3, 3)}, "0.8")
    model = hf_gg.RF8Linear.from_linear(nn.Linear(32, 32))
    with pytest.raises(TypeError, match=r"weight is torch.uint8.*dequantize"):
        hf_gg.deepshape_(nn.Sequential(model))


def test_range_of_the_dtype():
    w = draws(2.0, (100, 100), scale=100.0).half()
    before = w.clone()
    for map in ("empirical", "parametric"):
        with pytest.raises(ValueError, match="w would get weights of up to .* torch.float16 cannot hold"):
            hf_gg.deepshape_({"w": w}, 0.3, 200.0, map=map)
        assert torch.equal(w, before)


def test_a_fit_at_the_end_of_the_range_is_told():
    w = torch.rand(50, 50) - 0.5  # uniform: its shape is infinite
    with pytest.warns(UserWarning, match="w is no generalized Gaussian of a shape from 0.1 to 8"):
        report = hf_gg.deepshape_({"w": w}, 0.25, map="empirical")["w"]
    assert report.before.clamped and report.target.shape == 2.0
    assert report.after.shape == pytest.approx(2.0, rel=0.01)


def test_tied_tensors_are_mapped_once():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    alone = x.clone()
    hf_gg.deepshape_({"a": alone}, 0.8)
    report = hf_gg.deepshape_({"a": x, "b": x}, 0.8)
    assert list(report) == ["a"] and torch.equal(x, alone)

"""The sums in C against numpy in float64, mpmath and the same in torch."""

import warnings

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

import hf_gg
from hf_gg.ggd import fit, fit_many, kernels, location
from hf_gg.ggd.scan import Sums, _scan_careful, choose_pivot, scan


pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no C kernels here: {kernels.why_not()}")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["portable", "best"])
def isa(request, monkeypatch):
    library, best = kernels._library()
    if request.param == "portable":
        monkeypatch.setattr(kernels, "_library", lambda: (library, 0))
    elif best == 0:
        pytest.skip("this processor has no more")
    return request.param


@pytest.fixture
def without(monkeypatch):
    """torch alone, as where there is no compiler."""

    def turn_off():
        monkeypatch.setattr(kernels, "available", lambda: False)

    return turn_off


def draws(shape, count, seed=0, loc=0.003):
    return torch.from_numpy(stats.gennorm.rvs(shape, loc=loc, scale=0.02, size=count, random_state=seed))


def same(found: Sums, expected: Sums, size: float = 1.0):
    for name in ("n", "nonfinite", "low", "high", "signs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    for name in ("first", "absolute", "second", "third", "fourth"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-11 * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_length_and_layout(isa, dtype):
    for count in (1, 3, 4, 7, 511, 513, 32_769):
        x = (torch.randn(3, count, dtype=torch.float64) * 0.02 + 0.3).to(dtype)
        for y in (x, x[:1], x.T.contiguous().T, x[:, ::3]):
            pivot = choose_pivot(y)
            same(scan(y, pivot, higher=True), _scan_careful(y, pivot, True))
            lower = scan(y, pivot)
            torch.testing.assert_close(lower.second, scan(y, pivot, True).second, rtol=1e-13, atol=0)
            assert not lower.third.any() and not lower.fourth.any()


def test_every_half_and_what_is_not_finite(isa):
    x = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)[None]
    pivot = torch.tensor([0.25]).double()
    same(scan(x, pivot, True), _scan_careful(x, pivot, True), size=1e17)
    assert scan(x, pivot).nonfinite.tolist() == [2048]
    y = draws(1.0, 40_000).float()[None]
    y[0, 7], y[0, 33_000], y[0, -1] = torch.nan, torch.inf, -torch.inf
    same(scan(y, pivot, True), _scan_careful(y, pivot, True), size=1e3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_equal_numpy(isa, dtype):
    x = draws(0.9, 40_001).to(dtype)
    x[5] = 0.0
    for nu, mu in ((0.1, 0.0), (0.7, 0.0), (1.3, 0.003), (2.0, -0.01), (8.0, 0.003)):
        d = x.double().numpy() - mu
        z = np.abs(d)[d != 0] / 0.02
        p, log = z**nu, np.log(z)
        expected = [(p * log**k).sum() for k in range(5)] + [
            (np.sign(d[d != 0]) * p / z * log**k).sum() for k in range(2)
        ]
        given = [torch.tensor([v], dtype=torch.float64) for v in (nu, 0.02, mu)]
        found = kernels.powers([x[None]], *given, True)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-9)
        assert kernels.powers([x[None]], *given, False)[0, 5:].tolist() == [0, 0]


def test_one_power_is_nearly_exact(isa):
    """The functions ln and exp of the kernel against mpmath."""
    rng = np.random.default_rng(0)
    z = np.concatenate([10 ** rng.uniform(-300, 300, 300), 2.0 ** rng.uniform(-2, 2, 300), [0.5, 1.0, 2.0, np.e]])
    for nu in (0.1, 0.37, 1.0, 2.0):
        small = z[(np.log(z) * nu > -690) & (np.log(z) * nu < 690)]
        x = torch.from_numpy(small)[:, None].contiguous()
        ones = torch.ones(len(x)).double()
        found = kernels.powers([x], ones * nu, ones, ones * 0, False)
        for value, row in zip(small, found):
            exact = mpmath.mpf(float(value)) ** mpmath.mpf(nu)
            assert abs(row[0] / exact - 1) < 1e-12, (value, nu)
            log = mpmath.log(mpmath.mpf(float(value)))
            assert abs(row[1] - exact * log) <= 2e-12 * abs(exact * log) + 1e-13 * exact


def test_near_and_far_values(isa):
    x = draws(0.8, 70_001).float()
    center, half, shapes = 0.0031, 1e-4, (0.8, 0.81)
    z = (x.double().numpy() - center) / half
    near, sums = kernels.near(x, center, half, shapes)
    np.testing.assert_allclose(near, np.sort(z[np.abs(z) <= 6]), rtol=1e-12)
    far = z[np.abs(z) > 6]
    expected = np.array([[(np.abs(far) ** nu * far**-k).sum() for k in range(9)] for nu in shapes])
    expected[1, 5:] = 0
    np.testing.assert_allclose(sums, expected, rtol=1e-9, atol=1e-9)
    gaps, again = kernels.cell(z, 0.0, 1.0, shapes)
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-9)
    inside = np.abs(z[np.abs(z) <= 6])
    assert gaps == pytest.approx((np.maximum(inside - 1, 0) ** 0.8).sum(), rel=1e-11)
    many, _ = kernels.near(x.repeat(3), center, 1.0, shapes)  # more than the first buffer holds
    assert len(many) == 3 * len(x)


def test_threads_change_nothing():
    x, before = draws(0.8, 300_000).float(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            fits = [fit(x), fit(x, "mle"), fit_many([x, x[:70_000]], "mle")]
            found.append([t.tolist() for f in fits for t in (f.loc, f.scale, f.shape)])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("shape", [0.6, 0.9, 1.05, 1.5, 2.0, 5.0])
def test_torch_agrees(shape, without):
    """What runs on other devices: float64 to rounding, float32 to that of its blocks."""
    x = draws(shape, 30_000)
    cases = [(x, 1e-9), (x.float(), 1e-5), (x.bfloat16(), 1e-5)]
    compiled = [fit(y, method) for y, _ in cases for method in ("moments", "mle")]
    without()
    plain = [fit(y, method) for y, _ in cases for method in ("moments", "mle")]
    for one, other, tolerance in zip(compiled, plain, (t for _, t in cases for _ in range(2))):
        assert float(one.shape) == pytest.approx(float(other.shape), rel=tolerance)
        assert float(one.scale) == pytest.approx(float(other.scale), rel=tolerance)
        slack = 1e-9 if tolerance == 1e-9 else 0.02
        assert float(one.loc) == pytest.approx(float(other.loc), abs=slack * float(one.loc_stderr))


def test_locations_agree_without_the_kernel(without):
    z = np.sort(draws(0.7, 5000).numpy())
    expected = location._cell(z, 0.003, 1e-3, (0.7, 0.72))
    without()
    gaps, sums = location._cell(z, 0.003, 1e-3, (0.7, 0.72))
    assert gaps == pytest.approx(expected[0], rel=1e-10)
    expected[1][1, 5:] = sums[1, 5:]
    np.testing.assert_allclose(sums, expected[1], rtol=1e-9, atol=1e-9)


def test_other_dtypes_go_through_torch():
    x = draws(1.5, 20_000).to(torch.float8_e5m2)
    assert not kernels.reads(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(fit(x).shape) == pytest.approx(float(fit(x.float()).shape), rel=1e-5)


def test_only_plain_tensors_are_read_where_they_lie():
    """Others, such as DTensor, say CPU and float32 and may have no memory of their own."""

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    class Other(torch.Tensor):
        pass

    x = torch.randn(50)
    other = torch.Tensor._make_wrapper_subclass(Wrapper, x.shape, dtype=x.dtype)
    assert other.device.type == "cpu" and kernels.reads(x) and not kernels.reads(other)
    assert kernels.reads(torch.nn.Parameter(x).detach())
    split = x.as_subclass(Other)
    split.placements = ()
    with pytest.raises(TypeError, match=r"x is split over processes: fit its \.to_local\(\)"):
        hf_gg.ggd.fit(split, loc=0.0)

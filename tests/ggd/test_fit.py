"""Fits against scipy, brute force and simulation."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import digamma, gammaln

import hf_gg
from hf_gg import data
from hf_gg.ggd import (
    FitError,
    GeneralizedGaussian,
    Moments,
    fit,
    fit_many,
    fit_stream,
    moment_ratio,
    shape_from_ratio,
)


METHODS = ["moments", "mle"]


def draws(shape, count, loc=0.003, scale=0.02, seed=0):
    return torch.from_numpy(stats.gennorm.rvs(shape, loc=loc, scale=scale, size=count, random_state=seed))


def log_likelihood(x, shape, loc, scale):
    return stats.gennorm.logpdf(x.double().numpy(), float(shape), loc=float(loc), scale=float(scale)).sum()


def brute_moments(x, loc=None):
    """ν and α by scipy's root finder on exact float64 moments about the mean."""
    x = x.double().numpy()
    d = x - (x.mean() if loc is None else loc)
    ratio = np.log((d**2).mean() / np.abs(d).mean() ** 2)
    log_ratio = lambda s: gammaln(1 / s) + gammaln(3 / s) - 2 * gammaln(2 / s)  # noqa: E731
    shape = optimize.brentq(lambda s: log_ratio(s) - ratio, 0.1, 8, xtol=1e-13)
    return shape, math.sqrt((d**2).mean() * math.exp(gammaln(1 / shape) - gammaln(3 / shape)))


def test_ratio_and_its_inverse():
    assert float(moment_ratio(2.0)) == pytest.approx(math.pi / 2, rel=1e-14)
    assert float(moment_ratio(1.0)) == pytest.approx(2, rel=1e-14)
    shapes = torch.logspace(-1, math.log10(8), 5001, dtype=torch.float64).clamp(0.1, 8)
    torch.testing.assert_close(shape_from_ratio(moment_ratio(shapes)), shapes, rtol=1e-12, atol=0)
    assert shape_from_ratio(torch.tensor([1.0, 1e9])).tolist() == [8.0, 0.1]
    for bad in (0.5, math.nan):
        with pytest.raises(ValueError, match="at least 1"):
            shape_from_ratio(bad)
    with pytest.raises(ValueError, match="positive"):
        moment_ratio(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("shape", [0.4, 0.8, 1.0, 1.5, 2.0, 4.0, 7.0])
@pytest.mark.parametrize("count", [2000, 40_000])
def test_moment_fit_equals_brute_force(shape, count):
    x = draws(shape, count).float()
    expected_shape, expected_scale = brute_moments(x)
    f = fit(x)
    # values between a sampled pivot and the mean are counted by the fitted density
    slack = 0.05 * (count > 4096)
    assert float(f.shape) == pytest.approx(expected_shape, abs=slack * float(f.shape_stderr) + 1e-5 * shape)
    assert float(f.scale) == pytest.approx(expected_scale, abs=slack * float(f.scale_stderr) + 1e-6)
    assert float(f.loc) == pytest.approx(float(x.double().mean()), abs=1e-9)
    known = fit(x, loc=0.003)
    assert float(known.shape) == pytest.approx(brute_moments(x, 0.003)[0], rel=1e-5)
    assert float(known.loc) == 0.003 and float(known.loc_stderr) == 0
    assert f.method == "moments" and int(f.n) == count and f.shape.dtype == torch.float64 and f.shape.ndim == 0


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.0, 1.3, 2.0, 4.0, 7.0])
@pytest.mark.parametrize("count", [400, 20_000])
def test_likelihood_fit_is_scipys_or_better(shape, count):
    x = draws(shape, count).float()
    f = fit(x, "mle")
    theirs = stats.gennorm.fit(x.double().numpy(), shape, loc=0.003, scale=0.02)
    gain = log_likelihood(x, f.shape, f.loc, f.scale) - log_likelihood(x, *theirs)
    assert gain > -1e-4
    if shape >= 0.7:  # below, scipy's simplex ends in one of many cusps
        assert float(f.shape) == pytest.approx(theirs[0], rel=1e-3)
        assert float(f.scale) == pytest.approx(theirs[2], rel=1e-3)
        assert float(f.loc) == pytest.approx(theirs[1], abs=0.05 * float(f.loc_stderr))
    fixed = fit(x, "mle", loc=0.0)
    theirs = stats.gennorm.fit(x.double().numpy(), shape, scale=0.02, floc=0.0)
    assert float(fixed.shape) == pytest.approx(theirs[0], rel=1e-3)
    assert log_likelihood(x, fixed.shape, 0.0, fixed.scale) - log_likelihood(x, *theirs) > -1e-5


def profile_likelihood(x, loc, shape):
    """The log-likelihood with the best scale; float64 numpy."""
    n, total = len(x), (np.abs(x - loc) ** shape).sum()
    return n * np.log(shape / 2) - n * gammaln(1 / shape) - n / shape * (1 + np.log(shape * total / n))


def exact_optimum(x, start):
    """ν, α, μ where both scores are zero, by scipy's bracketing root finder, on all values in float64."""
    n = len(x)

    def location(shape):
        score = lambda m: (np.sign(x - m) * np.abs(x - m) ** (shape - 1)).sum()  # noqa: E731
        return optimize.brentq(score, x.mean() - x.std() / 5, x.mean() + x.std() / 5, xtol=1e-15, rtol=1e-14)

    def score(shape):
        z = np.abs(x - location(shape))
        z = z[z > 0]
        p = z**shape
        return 1 + (digamma(1 / shape) + np.log(shape * p.sum() / n)) / shape - (p * np.log(z)).sum() / p.sum()

    shape = optimize.brentq(score, start * 0.9, start * 1.1, xtol=1e-12)
    loc = location(shape)
    return shape, (shape * (np.abs(x - loc) ** shape).mean()) ** (1 / shape), loc


@pytest.mark.parametrize("shape", [1.2, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihood_fit_is_the_exact_optimum(shape, dtype):
    for count in (5000, 60_000):  # as a whole, and from a sample by a Taylor series
        x = draws(shape, count).to(dtype)
        f = fit(x, "mle")
        exact = exact_optimum(x.double().numpy(), float(f.shape))
        assert float(f.shape) == pytest.approx(exact[0], rel=2e-7)
        assert float(f.scale) == pytest.approx(exact[1], rel=2e-7)
        assert float(f.loc) == pytest.approx(exact[2], abs=1e-3 * float(f.loc_stderr))


def best_value(x, shape, candidates):
    """The greatest likelihood over some locations, each with its own best shape."""
    at_shape = np.array([profile_likelihood(x, m, shape) for m in candidates])
    best = []
    for m in candidates[np.argsort(-at_shape)[:10]]:
        found = optimize.minimize_scalar(
            lambda s, m=m: -profile_likelihood(x, m, s),
            bounds=(shape * 0.8, shape * 1.25),
            method="bounded",
            options={"xatol": 1e-9},
        )
        best.append(-found.fun)
    return max(best)


@pytest.mark.parametrize("shape", [0.4, 0.7, 0.9, 1.05])
@pytest.mark.parametrize("count", [300, 3000, 20_000])
def test_location_with_cusps_is_the_best_of_all_values(shape, count):
    for seed in range(2):
        x = draws(shape, count, seed=seed).float()
        f = fit(x, "mle")
        ordered = np.unique(x.double().numpy())
        middle = np.searchsorted(ordered, float(f.loc))
        near = ordered[max(middle - 400, 0) : middle + 400]
        gain = best_value(x.double().numpy(), float(f.shape), near) - log_likelihood(x, f.shape, f.loc, f.scale)
        assert gain < 1e-9 * count


@pytest.mark.parametrize("kind", ["skewed", "one-sided", "ties", "two heaps"])
@pytest.mark.parametrize("count", [400, 20_000])
def test_location_of_data_of_another_law(kind, count):
    """Whose best value is not about its median."""
    generator = np.random.default_rng(5)
    draw = {
        "skewed": lambda: stats.lognorm.rvs(1.2, size=count, random_state=3),
        "one-sided": lambda: stats.expon.rvs(size=count, random_state=3),
        "ties": lambda: np.round(stats.gennorm.rvs(0.8, size=count, random_state=4), 2),
        "two heaps": lambda: (
            np.where(generator.random(count) < 0.7, 0.01, 1.0) * stats.laplace.rvs(size=count)
            + 3 * (generator.random(count) < 0.2)
        ),
    }[kind]
    x = draw()
    f = fit(torch.from_numpy(x), "mle")
    assert float(f.shape) < 1.05
    values = np.unique(x)
    sums = lambda places: np.array([(np.abs(x - m) ** float(f.shape)).sum() for m in places])  # noqa: E731
    step = max(1, len(values) // 1000)
    coarse = int(sums(values[::step]).argmin()) * step
    near = values[max(coarse - 3 * step, 0) : coarse + 3 * step]
    if kind == "two heaps":  # the best for its shape; another shape may suit another heap
        own = profile_likelihood(x, float(f.loc), float(f.shape))
        gain = max(profile_likelihood(x, m, float(f.shape)) for m in near) - own
    else:
        gain = best_value(x, float(f.shape), near) - log_likelihood(torch.from_numpy(x), f.shape, f.loc, f.scale)
    assert gain < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [0.6, 0.8, 1.0, 2.0, 4.0])
def test_standard_errors_by_simulation(method, shape):
    x = draws(shape, 300 * 1200).view(300, 1200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a moment fit of shape 4 may end at 8
        f = fit(x, method, dim=1)
    inside = ~f.clamped
    for name in ("scale", "shape", "loc"):
        spread = float(getattr(f, name)[inside].std())
        claimed = float(getattr(f, f"{name}_stderr")[inside].median())
        assert 0.84 < spread / claimed < 1.19, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(method, dtype):
    x = draws(1.5, 30_000).to(dtype)
    expected, f = fit(x.double(), method), fit(x, method)
    for name in ("loc", "scale", "shape", "loc_stderr", "scale_stderr", "shape_stderr"):
        assert float(getattr(f, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_mean_far_from_zero_costs_no_digits(method):
    x = draws(1.5, 50_000, loc=0.0).float()
    moved = x + 100.0  # steps of 7.6e-6 beside a scale of 0.02
    exact = fit(moved.double() - 100.0, method)
    f = fit(moved, method)
    assert float(f.shape) == pytest.approx(float(exact.shape), rel=1e-4)
    assert float(f.loc) - 100.0 == pytest.approx(float(exact.loc), abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_scales_that_squares_overflow(method, factor):
    x = draws(1.5, 20_000).float()
    f, scaled = fit(x, method), fit(x * factor, method)
    assert float(scaled.shape) == pytest.approx(float(f.shape), rel=1e-5)
    assert float(scaled.scale) == pytest.approx(float(f.scale) * factor, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=60, unique=True),
    factor=st.floats(0.01, 100),
    move=st.floats(-10, 10),
    method=st.sampled_from(METHODS),
)
def test_fits_follow_scale_and_shift(values, factor, move, method):
    x = torch.tensor(values, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f, g = fit(x, method), fit(x * factor + move, method)
    assert bool(torch.isfinite(torch.stack([f.loc, f.scale, f.shape])).all())
    assert bool(f.clamped) == (float(f.shape_stderr) == math.inf) and not math.isnan(float(f.shape_stderr))
    if method == "moments":
        assert float(g.shape) == pytest.approx(float(f.shape), rel=1e-3)
        assert float(g.scale) == pytest.approx(float(f.scale) * factor, rel=1e-2, abs=1e-12)


def test_rows_are_fitted_as_each_alone():
    x = draws(1.3, 6 * 5 * 700).float().view(6, 700, 5)
    for method in METHODS:
        rows = fit(x, method, dim=1)
        assert rows.shape.shape == (6, 5) and rows.n.tolist() == [[700] * 5] * 6
        for i, j in ((0, 0), (5, 4)):
            one = fit(x[i, :, j].contiguous(), method)
            assert float(rows.shape[i, j]) == pytest.approx(float(one.shape), rel=1e-5)
            assert float(rows[i][j].loc) == pytest.approx(float(one.loc), abs=1e-7)
        both = fit(x, method, dim=(0, 1))
        assert both.shape.shape == (5,)
        assert float(both.shape[2]) == pytest.approx(float(fit(x[:, :, 2], method).shape), rel=1e-5)
    with pytest.raises(IndexError, match="dim 3"):
        fit(x, dim=3)
    with pytest.raises(ValueError, match="different dimensions"):
        fit(x, dim=(1, -2))


def test_views_need_no_copy_and_give_the_same():
    x = draws(1.2, 90_000).float().view(300, 300)
    for method in METHODS:
        assert float(fit(x.T, method).shape) == float(fit(x, method).shape)
        assert float(fit(x[:, ::2], method).shape) == pytest.approx(
            float(fit(x[:, ::2].contiguous(), method).shape), rel=1e-7
        )
    assert torch.equal(x, draws(1.2, 90_000).float().view(300, 300))  # the data is not written to


@pytest.mark.parametrize("method", METHODS)
def test_streams_and_many_equal_one(method):
    x = draws(1.4, 150_000).float()
    one = fit(x, method)
    pieces = [x[:10], x[10:40_001], x[40_001:].view(-1, 1)]
    stream = fit_stream(lambda: iter(pieces), method)
    many = fit_many({"a": x, "b": x[:500], "c": x.view(300, 500).T}, method)
    for f in (stream, many[0], many[2]):
        for name in ("shape", "scale", "loc", "shape_stderr", "loc_stderr"):
            assert float(getattr(f, name)) == pytest.approx(float(getattr(one, name)), rel=1e-4, abs=1e-8)
    short = fit(x[:500], method)
    assert float(many[1].shape) == pytest.approx(float(short.shape), rel=1e-6)
    assert float(fit_stream(lambda: [x[:500]], method).shape) == pytest.approx(float(short.shape), rel=1e-6)
    assert len(many) == 3 and many.n.tolist() == [150_000, 500, 150_000]
    if method == "mle":
        readings = iter([[x], [x[:9]], [x], [x], [x]])
        with pytest.raises(ValueError, match="the same values each time"):
            fit_stream(lambda: next(readings), method)


def test_moments_equal_scipy():
    x = draws(1.2, 30_000, loc=0.3).float()
    x[7] = math.nan
    x[8] = -math.inf
    m = Moments()
    for part in x.split(777):
        m.update(part)
    y = x[x.isfinite()].double().numpy()
    assert (m.count, m.nonfinite) == (29_998, 2)
    assert m.mean == pytest.approx(y.mean(), rel=1e-7) and m.var == pytest.approx(y.var(), rel=1e-6)
    assert m.kurtosis == pytest.approx(stats.kurtosis(y, fisher=False), rel=1e-5)
    assert m.skewness == pytest.approx(stats.skew(y), abs=1e-5)
    assert (m.min, m.max) == (y.min(), y.max()) and m.absmax == abs(y).max()
    with pytest.raises(FitError, match="2 of 30000 values are NaN or infinite"):
        m.fit()
    with pytest.raises(ValueError, match="higher=True"):
        _ = Moments(higher=False).update(torch.ones(3)).kurtosis


def test_moments_merge():
    parts = [draws(1.5, 9000, loc=loc, seed=i).float() for i, loc in enumerate((0.0, 0.001, 0.3))]
    for used in (parts[:2], parts):
        merged, together = Moments(), Moments()
        for part in used:
            merged.merge(Moments().update(part))
            together.update(part)
        for name in ("count", "mean", "var", "kurtosis", "skewness", "min", "max"):
            assert getattr(merged, name) == pytest.approx(getattr(together, name), rel=1e-6, abs=1e-9)
    assert float(Moments().merge(Moments().update(parts[0])).fit().shape) == pytest.approx(
        float(fit(parts[0]).shape), rel=1e-5
    )
    far = Moments().update(parts[2]).merge(Moments().update(parts[0])).merge(Moments().update(parts[1]))
    with pytest.raises(FitError, match="unlike"):
        far.fit()  # two heaps, and a pivot in one of them
    small = Moments()
    for i in range(0, 60, 6):
        small.merge(Moments().update(parts[0][i : i + 6]))
    assert float(small.fit().shape) == pytest.approx(float(fit(parts[0][:60]).shape), rel=1e-6)
    with pytest.raises(ValueError, match="make both alike"):
        Moments().merge(Moments(loc=0.0))


@pytest.mark.parametrize("method", METHODS)
def test_data_outside_the_range_is_clamped_with_a_warning(method):
    ends = torch.sin(torch.linspace(-1.57, 1.57, 300))  # flatter than flat
    with pytest.warns(UserWarning, match="clamped to 8"):
        f = fit(ends, method)
    assert float(f.shape) == 8 and bool(f.clamped)
    heavy = torch.zeros(20_000)
    heavy[::997] = torch.randn(21)
    with pytest.warns(UserWarning, match="clamped to 0.1"):
        f = fit(heavy, method)
    assert float(f.shape) == pytest.approx(0.1) and math.isfinite(float(f.scale)) and float(f.scale) > 0
    with pytest.warns(UserWarning, match="clamped to 0.1"):
        many = fit_many([heavy, torch.randn(500)], method, errors="nan")
    assert math.isfinite(float(many[1].shape_stderr))
    for g in (f, many[0]):
        assert [float(e) for e in (g.loc_stderr, g.scale_stderr, g.shape_stderr)] == [math.inf] * 3


@pytest.mark.parametrize("method", METHODS)
def test_float64_of_any_size(method):
    x = draws(1.5, 20_000)
    one = fit(x, method)
    for factor in (1e300, 1e-300, 1e-310, 1e100, 1e307):
        f = fit(x * factor, method)
        accuracy = 1e-9 if factor > 1e-307 else 1e-5  # subnormal numbers have fewer digits
        assert float(f.shape) == pytest.approx(float(one.shape), rel=accuracy)
        for name in ("scale", "loc", "loc_stderr", "scale_stderr"):
            assert float(getattr(f, name)) / factor == pytest.approx(float(getattr(one, name)), rel=1e-4)
        assert float(fit(x * factor, method, loc=0.0).loc) == 0
    many = fit_many({"a": x, "b": x * 1e300, "c": torch.zeros(4), "d": x * 1e-200}, method, errors="nan")
    assert many.shape.isnan().tolist() == [False, False, True, False] and list(many.problems) == [2]
    assert float(many[1].scale) == pytest.approx(1e300 * float(one.scale)) and many.n.tolist() == [20_000] * 2 + [
        4,
        20_000,
    ]
    rows = fit(torch.stack([x[:3000], x[:3000] * 1e250]), method, dim=1)
    assert float(rows.shape[0]) == pytest.approx(float(rows.shape[1]), rel=1e-9)
    for call in (lambda: fit_stream(lambda: [x * 1e300], method), lambda: Moments().update(x * 1e-200).fit()):
        with pytest.raises(FitError, match="multiply them by a number"):
            call()
    with pytest.raises(FitError, match="too far from values"):
        fit(x * 1e-300, method, loc=1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.empty(0), "is empty"),
        (torch.empty(0, 4), "is empty"),
        (torch.tensor(3.0), "a single value, 3"),
        (torch.zeros(50), "all 50 values are zero"),
        (torch.full((20_000,), 0.1), "all 20000 values equal 0.1"),
        (torch.tensor([1.0, math.nan, 2.0]), "1 of 3 values are NaN or infinite"),
        (torch.tensor([1.0, math.inf, 2.0, -math.inf]), "2 of 4"),
    ],
)
def test_values_without_a_fit(x, message, method):
    for call in (
        lambda: fit(x, method),
        lambda: fit_stream(lambda: [x], method),
        lambda: fit_many([x], method),
    ):
        with pytest.raises(FitError, match=message):
            call()


def test_wrong_arguments():
    for x in (torch.arange(9), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)):
        for call in (fit, lambda x: fit_many([x]), lambda x: Moments().update(x)):
            with pytest.raises(TypeError, match="must be floating point"):
                call(x)
    with pytest.raises(TypeError, match="torch.Tensor"):
        fit([1.0, 2.0])
    sparse = torch.eye(3).to_sparse()
    for call in (fit, lambda x: fit_many([x]), lambda x: Moments().update(x), lambda x: fit_stream(lambda: [x])):
        with pytest.raises(TypeError, match="to_dense"):
            call(sparse)
    assert "to_dense" in fit_many([sparse], errors="nan").problems[0]
    with pytest.raises(ValueError, match="'moments', 'mle'"):
        fit(torch.randn(9), "ml")
    with pytest.raises(ValueError, match="meta device"):
        fit(torch.randn(9, device="meta"))
    for loc in (math.nan, math.inf):
        with pytest.raises(ValueError, match="loc must be finite"):
            fit(torch.randn(9), loc=loc)
    with pytest.raises(TypeError, match="loc must be a number"):
        Moments(loc="0")
    with pytest.raises(ValueError, match="errors"):
        fit(torch.randn(9), errors="ignore")
    with pytest.raises(ValueError, match="tensors is empty"):
        fit_many([])
    with pytest.raises(TypeError, match="function"):
        fit_stream([torch.randn(9)])


@pytest.mark.parametrize("method", METHODS)
def test_items_without_a_fit_say_why(method):
    tensors = {"a": draws(1.5, 9000), "b": torch.zeros(5), "c": torch.arange(4), "d": draws(1.5, 9000)}
    f = fit_many(tensors, method, errors="nan")
    assert f.shape.isnan().tolist() == [False, True, True, False] and f.n.tolist() == [9000, 5, 0, 9000]
    assert set(f.problems) == {1, 2} and "b has no fit: all 5" in f.problems[1] and "floating" in f.problems[2]
    assert float(f[3].shape) == float(f[0].shape) == pytest.approx(float(fit(tensors["a"], method).shape), rel=1e-9)
    with pytest.raises(ValueError, match="b has no fit"):
        f[1].distribution()
    with pytest.raises(FitError, match="b has no fit"):
        fit_many({"a": tensors["a"], "b": tensors["b"]}, method)
    x = torch.randn(3, 100)
    x[1] = 0.0
    rows = fit(x, method, dim=1, errors="nan")
    assert rows.shape.isnan().tolist() == [False, True, False] and list(rows.problems) == [1]
    with pytest.raises(FitError, match=r"x\[1\] has no fit"):
        fit(x, method, dim=1)
    nothing = fit_many([torch.zeros(3)], method, errors="nan")
    assert bool(nothing.shape.isnan()) and nothing.problems


def test_real_weights():
    from safetensors.torch import load_file

    tensors = load_file(data.minilm() / "model.safetensors")
    matrices = {k: v for k, v in tensors.items() if v.ndim == 2 and v.is_floating_point() and v.numel() < 200_000}
    moments, mle = fit_many(matrices), fit_many(matrices, "mle")
    for i, x in enumerate(matrices.values()):
        sides = [log_likelihood(x, f.shape[i], f.loc[i], f.scale[i]) for f in (mle, moments)]
        assert sides[0] >= sides[1] - 1e-3
        assert float(moments.shape[i]) == pytest.approx(brute_moments(x)[0], rel=1e-4)
    assert 1 < float(mle.shape.median()) < 2.2


def test_the_package_is_lazy_and_the_fit_gives_a_distribution():
    f = hf_gg.ggd.fit(torch.randn(1000))
    assert isinstance(f.distribution(), GeneralizedGaussian)
    assert float(f.distribution().stddev) == pytest.approx(1, abs=0.1)


def test_a_location_that_stays_is_searched_once_more_at_most(monkeypatch):
    """Rounded values have ties, of which the search and the likelihood equation think differently."""
    from hf_gg.ggd import likelihood

    calls = []
    search = likelihood.cusp_location
    monkeypatch.setattr(
        likelihood, "cusp_location", lambda *args, **kwargs: calls.append(1) or search(*args, **kwargs)
    )
    for seed in range(4):
        generator = np.random.default_rng(seed)
        x = torch.from_numpy(stats.gennorm.rvs(0.87, scale=0.02, size=110_592, random_state=generator)).bfloat16()
        calls.clear()
        fit(x, method="mle")
        assert 1 <= len(calls) <= 3


@pytest.mark.parametrize("count", [8_000, 40_000, 200_000])
@pytest.mark.parametrize("share", [0.1, 0.27, 0.3, 0.35])
def test_weights_that_were_pruned_by_magnitude(count, share):
    """A heap of zeros, a gap, and the rest: the location is in the middle, never at the edge of the gap."""
    for seed in range(3):
        x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02
        x[x.abs() <= x.abs().kthvalue(int(share * count)).values] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free, given = fit(x, method="mle"), fit(x, method="mle", loc=0.0)
        likelihood = [float(f.distribution().log_prob(x.double()).mean()) for f in (free, given)]
        assert abs(float(free.loc)) < 5e-4
        assert likelihood[0] >= likelihood[1] - 1e-6
        if bool(free.clamped):
            assert float(free.loc) == 0


def test_steps_that_go_in_a_circle_are_followed_by_ones_that_do_not():
    x = stats.gennorm.rvs(1.5, size=8000, random_state=0)
    x[np.abs(x) < np.quantile(np.abs(x), 0.2)] = 0
    found = fit(torch.from_numpy(x), method="mle")
    best = stats.gennorm.logpdf(x, *stats.gennorm.fit(x)).mean()
    assert float(found.distribution().log_prob(torch.from_numpy(x)).mean()) >= best - 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 1), ((3, 0, 4), 2), ((0, 0), 1)])
def test_no_items(method, shape, dim):
    kept = tuple(size for d, size in enumerate(shape) if d != dim)
    for errors in ("raise", "nan"):
        assert fit(torch.randn(shape), method, dim, errors=errors).shape.shape == kept


def test_arguments_of_odd_types():
    x = torch.randn(8, 3)
    for dim in (1.0, "0", True, (0, 1.0)):
        with pytest.raises(TypeError, match="dim must be a dimension's number"):
            fit(x, dim=dim)
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        fit(torch.nested.nested_tensor([x, x[:2]]))
    with pytest.warns(UserWarning, match="clamped to 8"):
        far = fit(x, loc=1e39)
    assert far.loc == 1e39 and bool(far.clamped) and far.shape == 8


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_moments_of_numbers_whose_powers_float64_lacks(factor):
    moments = Moments()
    moments.update(torch.randn(1000).double() * factor)
    assert math.isfinite(moments.mean) and moments.absmax > 0
    for name in ("var", "std", "skewness", "kurtosis"):
        with pytest.raises(ValueError, match="multiply them by a number"):
            getattr(moments, name)

"""GeneralizedGaussian against scipy, mpmath and numerical derivatives."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import gammaln
from torch.autograd import gradcheck
from torch.distributions import Laplace, Normal, kl_divergence

from hf_gg.ggd import GeneralizedGaussian, tail


SHAPES = [0.1, 0.25, 0.5, 0.8, 1.0, 1.5, 2.0, 3.3, 8.0]


def dist(loc, scale, shape, **kwargs):
    return GeneralizedGaussian(*(torch.as_tensor(v, dtype=torch.float64) for v in (loc, scale, shape)), **kwargs)


def points(shape):
    """Values with (x / scale)^ν from 1e-6 to 700, both signs."""
    t = torch.tensor([0.0, 1e-6, 0.01, 0.3, 1.0, 2.0, 5.0, 15.0, 29.0, 31.0, 100.0, 700.0], dtype=torch.float64)
    x = 0.02 * t.pow(1 / shape)
    return 0.01 + torch.cat([-x, x])


@pytest.mark.parametrize("shape", SHAPES)
def test_values_equal_scipy(shape):
    d, x = dist(0.01, 0.02, shape), points(shape)
    oracle = stats.gennorm(shape, loc=0.01, scale=0.02)
    np.testing.assert_allclose(d.log_prob(x), oracle.logpdf(x), rtol=1e-10)
    np.testing.assert_allclose(d.cdf(x), oracle.cdf(x), rtol=1e-6, atol=1e-300)
    p = torch.tensor([1e-12, 1e-3, 0.2, 0.4, 0.5, 0.6, 0.9, 0.999], dtype=torch.float64)
    np.testing.assert_allclose(d.icdf(p), oracle.ppf(p), rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(d.variance, oracle.var(), rtol=1e-9)
    np.testing.assert_allclose(d.stddev, oracle.std(), rtol=1e-9)
    np.testing.assert_allclose(d.kurtosis - 3, oracle.stats("k"), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d.entropy(), oracle.entropy(), rtol=1e-9)
    assert float(d.mean) == float(d.mode) == 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_tails_in_logs_equal_mpmath(shape):
    x = points(shape)
    ours, below = dist(0.01, 0.02, shape).log_sf(x), dist(0.01, 0.02, shape).log_cdf(0.02 - x)
    with mpmath.workdps(40):
        for value, got in zip(x.tolist(), ours.tolist()):
            z = (mpmath.mpf(value) - mpmath.mpf(0.01)) / mpmath.mpf(0.02)
            tail = mpmath.gammainc(1 / mpmath.mpf(shape), abs(z) ** mpmath.mpf(shape), regularized=True) / 2
            expected = mpmath.log(tail if z >= 0 else 1 - tail)
            assert got == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(ours, below, rtol=1e-9, atol=0)


def test_log_sf_goes_on_where_probabilities_end():
    value = dist(0.0, 1.0, 2.0).log_sf(torch.tensor(1e5, dtype=torch.float64))
    assert float(value) == pytest.approx(-1e10, rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_icdf_inverts_deep_tails(shape):
    p = torch.logspace(-300, -0.31, 200, dtype=torch.float64)
    d = dist(0.0, 1.0, shape)
    torch.testing.assert_close(d.log_cdf(d.icdf(p)), p.log(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(d.isf(p), -d.icdf(p), rtol=1e-14, atol=0)
    ends = d.icdf(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert ends.tolist() == [-math.inf, 0.0, math.inf]


@settings(max_examples=60, deadline=None)
@given(shape=st.floats(0.1, 8), scale=st.floats(1e-6, 1e6), loc=st.floats(-10, 10), p=st.floats(1e-12, 1 - 1e-12))
def test_cdf_of_icdf_is_the_identity(shape, scale, loc, p):
    d = dist(loc, scale, shape)
    x = d.icdf(torch.tensor(p, dtype=torch.float64))
    # x is rounded to a multiple of loc's last digit, and p may lie anywhere between its neighbours
    low, high = (d.cdf(torch.nextafter(x, x.new_tensor(end))) for end in (-math.inf, math.inf))
    assert float(low) * (1 - 1e-9) <= p <= float(high) * (1 + 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_tail_equal_mpmath(shape):
    t = torch.tensor([1e-3, 0.3, 1.9, 2.2, 4.0, 16.9, 17.1, 29.0, 31.0, 200.0], dtype=torch.float64)
    z = t.pow(1 / shape).requires_grad_()
    nu = torch.full_like(z, shape).requires_grad_()
    in_z, in_nu = torch.autograd.grad(tail.log_tail(z, nu).sum(), (z, nu))
    with mpmath.workdps(80):

        def log_tail(value, nu):
            return mpmath.log(mpmath.gammainc(1 / nu, value**nu, regularized=True))

        h, nu = mpmath.mpf(10) ** -12, mpmath.mpf(shape)
        for value, got_z, got_nu in zip(z.tolist(), in_z.tolist(), in_nu.tolist()):
            value = mpmath.mpf(value)
            slope = (log_tail(value, nu + h) - log_tail(value, nu - h)) / (2 * h)
            assert got_nu == pytest.approx(float(slope), rel=1e-9)
            slope = (log_tail(value * (1 + h), nu) - log_tail(value * (1 - h), nu)) / (2 * h * value)
            assert got_z == pytest.approx(float(slope), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_quantile(shape):
    p = torch.tensor([1e-200, 1e-9, 0.1, 0.24, 0.26, 0.45, 0.7, 0.99], dtype=torch.float64, requires_grad=True)
    nu = torch.full_like(p, shape).requires_grad_()
    z = tail.quantile(p, nu)
    in_p, in_nu = torch.autograd.grad(z.sum(), (p, nu))
    torch.testing.assert_close(in_p, (-dist(0.0, 1.0, shape).log_prob(z)).exp(), rtol=1e-8, atol=0)
    h = 1e-4 * shape
    steps = [tail.quantile(p, nu + k * h).detach() for k in (-2, -1, 1, 2)]
    numeric = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
    torch.testing.assert_close(in_nu, numeric, rtol=1e-6, atol=0)


def test_gradcheck_in_every_parameter():
    x = torch.tensor([-1.3, -0.2, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    loc = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 0.8, 1.2], dtype=torch.float64, requires_grad=True)
    shape = torch.tensor([0.4, 1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    for name in ("log_prob", "cdf", "log_sf", "log_cdf"):
        assert gradcheck(lambda v, *q: getattr(GeneralizedGaussian(*q), name)(v), (x, loc, scale, shape))  # noqa: B023
    p = torch.tensor([0.01, 0.3, 0.6, 0.97], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, *q: GeneralizedGaussian(*q).icdf(v), (p, loc, scale, shape))
    assert gradcheck(lambda *q: GeneralizedGaussian(*q).entropy(), (loc, scale, shape))
    assert gradcheck(lambda *q: GeneralizedGaussian(*q).variance, (loc, scale, shape))
    other = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.4, 0.9, 1.3)]
    assert gradcheck(
        lambda *q: kl_divergence(GeneralizedGaussian(*q[:3]), GeneralizedGaussian(*q[3:])), (loc, scale, shape, *other)
    )
    assert gradcheck(
        lambda a, b, c, d, e: kl_divergence(GeneralizedGaussian(a, b, c), GeneralizedGaussian(a, d, e)),
        (loc, scale, shape, other[1], other[2]),
    )


@pytest.mark.parametrize("shape", [0.2, 1.0, 2.0, 6.0])
def test_rsample_has_the_distribution_and_its_gradient(shape):
    q = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.7, shape)]
    x = GeneralizedGaussian(*q).rsample((50_000,))
    assert stats.kstest(x.detach().numpy(), stats.gennorm(shape, loc=0.3, scale=0.7).cdf).pvalue > 1e-3
    # Implicit gradient: a draw is the quantile of a probability that stays.
    p = GeneralizedGaussian(*q).cdf(x).detach()[:300]
    middle = (p > 1e-6) & (p < 1 - 1e-6)
    expected = torch.autograd.grad(GeneralizedGaussian(*q).icdf(p)[middle].sum(), q)
    got = torch.autograd.grad(x[:300][middle].sum(), q)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_sampling_follows_the_seed():
    d = GeneralizedGaussian(0.0, torch.ones(3), 1.2)
    torch.manual_seed(5)
    first = d.sample((4,))
    torch.manual_seed(5)
    assert torch.equal(first, d.sample((4,)))
    assert first.shape == (4, 3) and first.dtype == torch.float32 and not first.requires_grad


def test_divergence_equals_integration():
    def log_density(x, m, a, n):
        return np.log(n / (2 * a)) - gammaln(1 / n) - (abs(x - m) / a) ** n

    for p_shape in (0.1, 0.5, 2.0, 8.0):
        for q_shape in (0.1, 0.8, 2.0, 8.0):
            for move in (0.0, 0.3, 20.0):
                p, q = (0.1, 0.7, p_shape), (0.1 + move, 1.3, q_shape)

                def integrand(y, p=p, q=q):
                    r = math.exp(y)  # in the logarithm of the distance, from p's location
                    sides = [p[0] - r, p[0] + r]
                    logs = [(log_density(x, *p), log_density(x, *q)) for x in sides]
                    return sum(np.exp(a + y) * (a - b) for a, b in logs)

                low, high = math.log(0.7) - 40, math.log(0.7) + math.log(740) / p_shape
                knots = sorted({*np.linspace(low, high, 60), math.log(max(move, 1e-12))})
                knots = [k for k in knots if low <= k <= high]
                pieces = itertools.pairwise(knots)
                expected = sum(
                    integrate.quad(integrand, *pq, epsabs=1e-12, epsrel=1e-9, limit=100)[0] for pq in pieces
                )
                assert float(kl_divergence(dist(*p), dist(*q))) == pytest.approx(expected, rel=1e-7)


def test_special_cases_are_torchs_own():
    x = torch.linspace(-3, 3, 13)
    d, normal = GeneralizedGaussian(0.5, math.sqrt(2) * 0.8, 2.0), Normal(0.5, 0.8)
    torch.testing.assert_close(d.log_prob(x), normal.log_prob(x))
    torch.testing.assert_close(d.cdf(x), normal.cdf(x))
    torch.testing.assert_close(d.entropy(), normal.entropy())
    laplace = Laplace(0.5, 0.8)
    torch.testing.assert_close(GeneralizedGaussian(0.5, 0.8, 1.0).log_prob(x), laplace.log_prob(x))
    other = kl_divergence(GeneralizedGaussian(0.1, math.sqrt(2), 2.0), d)
    torch.testing.assert_close(other, kl_divergence(Normal(0.1, 1.0), normal))


def test_batches_expand_and_dtypes():
    d = GeneralizedGaussian(torch.zeros(3, 1), torch.ones(4), 1.5)
    assert d.batch_shape == (3, 4) and d.event_shape == ()
    wide = d.expand((2, 3, 4))
    assert wide.log_prob(torch.zeros(4)).shape == (2, 3, 4) and wide.entropy().shape == (2, 3, 4)
    assert wide.rsample((5,)).shape == (5, 2, 3, 4)
    assert d.icdf(torch.full((2, 1, 1), 0.3)).shape == (2, 3, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = GeneralizedGaussian(torch.tensor(0.0, dtype=dtype), 1.0, 1.5)
        value = torch.tensor([0.3, -2.0], dtype=dtype)
        for name in ("log_prob", "cdf", "log_sf"):
            got, exact = getattr(low, name)(value), getattr(dist(0.0, 1.0, 1.5), name)(value.double())
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
        assert low.sample((3,)).dtype == dtype and low.icdf(torch.tensor(0.9, dtype=dtype)).dtype == dtype
    meta = GeneralizedGaussian(torch.zeros(2, device="meta"), torch.ones(2, device="meta"), 1.0, validate_args=False)
    assert meta.cdf(torch.zeros(2, device="meta")).shape == meta.rsample().shape == (2,)


def test_the_density_at_the_location_has_a_gradient_without_nan():
    x = torch.zeros(1, requires_grad=True)
    shape = torch.tensor(0.5, requires_grad=True)
    GeneralizedGaussian(0.0, 1.0, shape).log_prob(x).sum().backward()
    assert float(x.grad) == 0 and math.isfinite(float(shape.grad))


def test_vmap():
    x, shapes = torch.linspace(-1, 1, 5), torch.tensor([0.5, 2.0])
    call = lambda s: GeneralizedGaussian(0.0, 1.0, s, validate_args=False).cdf(x)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(call)(shapes), torch.stack([call(s) for s in shapes]))


def test_bad_parameters():
    for arguments in ((0.0, -1.0, 1.0), (0.0, 1.0, 0.0), (math.nan, 1.0, 1.0), (0.0, math.inf, 1.0)):
        with pytest.raises(ValueError, match="loc|scale|shape"):
            GeneralizedGaussian(*arguments)
    with pytest.raises(TypeError, match="shape must be a floating point tensor"):
        GeneralizedGaussian(0.0, 1.0, torch.tensor(2))
    with pytest.raises(ValueError, match="probabilities"):
        GeneralizedGaussian(0.0, 1.0, 1.0).icdf(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="value"):
        GeneralizedGaussian(0.0, 1.0, 1.0).log_prob(torch.tensor(math.nan))


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("name", ["cdf", "log_cdf", "log_sf"])
def test_gradient_at_the_location(name, shape):
    loc = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    law = GeneralizedGaussian(loc, 0.8, shape)
    value = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    getattr(law, name)(value).backward()
    density = float(law.log_prob(value).exp()) * {"cdf": 1, "log_cdf": 2, "log_sf": -2}[name]
    assert float(value.grad) == pytest.approx(density) and float(loc.grad) == pytest.approx(-density)


def test_infinite_values():
    law = GeneralizedGaussian(0.0, 1.0, 1.5)
    ends = torch.tensor([-math.inf, math.inf])
    assert law.cdf(ends).tolist() == [0, 1] and law.log_sf(ends).tolist() == [0, -math.inf]
    assert law.log_cdf(ends).tolist() == [-math.inf, 0]

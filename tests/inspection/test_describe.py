"""The statistics of a tensor against scipy and NumPy, on draws of known laws and on real weights."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from hf_gg import data
from hf_gg.inspection import BINS, describe
from hf_gg.inspection.describe import NoFit
from hf_gg.integrations.reading import open_checkpoint


def draw(shape, n=200_000, scale=0.03, loc=0.0):
    return torch.from_numpy(stats.gennorm.rvs(shape, loc=loc, scale=scale, size=n, random_state=5)).float()


@pytest.fixture(scope="module")
def real():
    with open_checkpoint(str(data.mgm_gpt2())) as source:
        entry = next(entry for entry in source if entry.name == "transformer.h.3.mlp.c_fc.weight")
        return entry.load().clone()


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_known_laws_are_found(shape):
    found = describe(draw(shape, loc=0.004))
    assert found.shape == pytest.approx(shape, rel=0.03)
    assert found.shape_moments == pytest.approx(shape, rel=0.05)
    assert found.scale == pytest.approx(0.03, rel=0.06)
    assert found.ks_ggd < 1.7 / math.sqrt(200_000)
    assert found.entropy == pytest.approx(stats.gennorm(shape, scale=0.03).entropy() / math.log(2), abs=0.02)
    predicted = 2 * stats.gennorm(found.shape, scale=found.scale).sf(6 * found.std)
    assert found.outliers_predicted == pytest.approx(predicted, rel=0.2, abs=1e-12)
    if shape <= 1.0:
        assert found.outliers == pytest.approx(predicted, rel=0.5)
    if shape not in (1.0, 2.0):
        assert found.nearest == "GGD"


def test_figures_of_a_real_tensor_are_scipys(real):
    found, values = describe(real), real.double().flatten().numpy()
    assert found.mean == pytest.approx(values.mean(), rel=1e-4, abs=1e-9)
    assert found.std == pytest.approx(values.std(), rel=1e-5)
    assert found.kurtosis == pytest.approx(stats.kurtosis(values, fisher=False), rel=1e-4)
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.median == pytest.approx(np.median(values), abs=1e-9)
    law = stats.gennorm(found.shape, found.loc, found.scale)
    assert found.ks_ggd == pytest.approx(stats.kstest(values, law.cdf).statistic, abs=1e-7)
    law = stats.gennorm(found.shape_moments, values.mean(), found.scale_moments)
    assert found.ks_ggd_moments == pytest.approx(stats.kstest(values, law.cdf).statistic, abs=1e-4)
    law = stats.norm(values.mean(), values.std())
    assert found.ks_gaussian == pytest.approx(stats.kstest(values, law.cdf).statistic, abs=1e-5)
    law = stats.laplace(*stats.laplace.fit(values))
    assert found.ks_laplace == pytest.approx(stats.kstest(values, law.cdf).statistic, abs=1e-5)
    far = np.abs(values - values.mean()) > 6 * values.std()
    assert found.outliers == pytest.approx(far.mean(), abs=1e-7)
    edges = values.mean() + values.std() * BINS
    assert np.abs(np.histogram(values, edges)[0] - np.array(found.histogram)).sum() <= 20  # edges in float32


@pytest.mark.parametrize("snr", [15.0, 30.0, 45.0])
@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0])
def test_predicted_bits_are_those_of_the_quantized_tensor(shape, snr):
    values = draw(shape)
    found = describe(values, snr=snr)
    levels = torch.round(values.double() / found.step)
    noise = (levels * found.step - values.double()).square().mean()
    assert 10 * math.log10(float(values.double().square().mean() / noise)) == pytest.approx(snr, abs=1.0)
    _, counts = torch.unique(levels, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert found.bits_measured == pytest.approx(entropy, abs=1e-3)
    assert found.bits == pytest.approx(entropy, abs=0.12 if snr > 20 else 0.35)


def test_predicted_bits_of_a_real_tensor(real):
    found = describe(real)
    assert found.bits == pytest.approx(found.bits_measured, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    values = draw(1.3)
    found, full = describe(values.to(dtype)), describe(values)
    assert found.shape == pytest.approx(full.shape, rel=0.01)
    assert found.bits == pytest.approx(full.bits, abs=0.01)


def test_the_tensor_stays_as_it_is():
    values = draw(1.0, n=5000)
    before = values.clone()
    describe(values)
    assert torch.equal(values, before)


def test_order_and_unit_do_not_matter():
    values = draw(1.2, n=50_000)
    found = describe(values)
    other = describe(values.sort().values.view(500, 100).T * 1024)
    for name in ("shape", "kurtosis", "ks_ggd", "ks_laplace", "bits", "bits_measured"):
        assert getattr(other, name) == pytest.approx(getattr(found, name), rel=5e-3), name


REFUSED = {
    "empty": (torch.empty(0), "empty"),
    "empty matrix": (torch.empty(0, 8), "empty"),
    "single": (torch.tensor([0.5]), "a single value, 0.5"),
    "scalar": (torch.tensor(2.0), "a single value, 2"),
    "zeros": (torch.zeros(8, 8), "all zero"),
    "negative zeros": (-torch.zeros(8, 8), "all zero"),
    "constant": (torch.full((8, 8), -0.25), "constant, -0.25"),
    "few": (torch.arange(15.0), "15 values, too few for a fit"),
    "nan": (torch.tensor([1.0, math.nan] * 50), "50 NaN of 100 values"),
    "inf": (torch.cat([torch.randn(99), torch.tensor([math.inf])]), "1 infinite of 100 values"),
    "both": (
        torch.cat([torch.randn(97), torch.tensor([math.inf, -math.inf, math.nan])]),
        "1 NaN and 2 infinite",
    ),
    "all nan": (torch.full((100,), math.nan), "100 NaN of 100 values"),
    "too large": (torch.randn(1000, dtype=torch.float64) * 1e200, "fourth powers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_fit_has_a_reason(case):
    values, reason = REFUSED[case]
    with pytest.raises(NoFit, match=reason):
        describe(values)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        describe(torch.arange(100))


@pytest.mark.parametrize("values", [
    torch.tensor([-1.0, 1.0]).repeat(5000),  # flatter than any law of the family
    torch.cat([torch.zeros(9990), torch.randn(10)]),  # nearly all exact zeros
    torch.cat([torch.randn(9999) * 1e-3, torch.tensor([1e4])]),  # one huge outlier
    torch.randn(4096) * 1e-30,
    torch.randn(4096) * 1e30,
    torch.linspace(0, 1, 16),
], ids=["two values", "sparse", "outlier", "tiny", "huge", "fewest"])  # fmt: skip
def test_odd_tensors_have_finite_figures_or_a_reason(values):
    try:
        found = describe(values)
    except NoFit:
        return
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, float):
            assert math.isfinite(value), name

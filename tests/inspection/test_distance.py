"""Distances, entropies and counts of sorted samples against scipy and NumPy's own counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_gg.inspection.distance import count_outside, grid_entropy, kolmogorov_smirnov


LAWS = {
    "gaussian": stats.norm(0.1, 1.2),
    "laplace": stats.laplace(0.0, 0.8),
    "narrow": stats.norm(0, 0.01),
    "far": stats.norm(50, 1),
    "heavy": stats.gennorm(0.4, 0, 0.2),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [2, 17, 2047, 2049, 300_000])
def test_distance_is_scipys(law, n):
    sample = np.sort(np.random.default_rng(n).standard_normal(n))
    expected = stats.kstest(sample, LAWS[law].cdf).statistic
    assert kolmogorov_smirnov(sample, LAWS[law].cdf) == pytest.approx(expected, abs=1e-15)


def test_distance_looks_at_few_values():
    sample = np.sort(np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32))
    asked = []

    def cdf(x):
        asked.append(len(x))
        return stats.norm.cdf(x)

    distance = kolmogorov_smirnov(sample, cdf)
    assert distance == pytest.approx(stats.kstest(sample.astype(np.float64), stats.norm.cdf).statistic, abs=1e-12)
    assert sum(asked) < 100_000


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.floats(0.3, 3))
def test_distance_of_ties(values, scale):
    """Brute force: the distance on both sides of every jump."""
    sample = np.sort(np.array(values, dtype=np.float64))
    law = stats.norm(0.2, scale)
    jumps = np.unique(sample)
    right = np.searchsorted(sample, jumps, side="right") / len(sample)
    left = np.searchsorted(sample, jumps, side="left") / len(sample)
    expected = max(np.abs(right - law.cdf(jumps)).max(), np.abs(left - law.cdf(jumps)).max())
    assert kolmogorov_smirnov(sample, law.cdf) == pytest.approx(expected, abs=1e-14)


def test_distance_of_many_ties():
    """A grid of 16 levels, as dequantized weights have, longer than the first look."""
    generator = np.random.default_rng(3)
    sample = np.sort(np.rint(generator.standard_normal(50_000) * 3) / 3)
    jumps = np.unique(sample)
    right = np.searchsorted(sample, jumps, side="right") / len(sample)
    left = np.searchsorted(sample, jumps, side="left") / len(sample)
    expected = max(np.abs(right - stats.norm.cdf(jumps)).max(), np.abs(left - stats.norm.cdf(jumps)).max())
    assert kolmogorov_smirnov(sample, stats.norm.cdf) == pytest.approx(expected, abs=1e-14)


def counted(values, step):
    _, counts = np.unique(np.rint(values / step), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("step", [1e-4, 0.1, 1.0, 30.0])
def test_grid_entropy_is_the_counted_one(step):
    values = np.random.default_rng(1).standard_normal(40_000)
    assert grid_entropy(np.sort(values), step) == pytest.approx(counted(values, step), abs=1e-9)


def test_grid_entropy_with_outliers_beyond_all_levels():
    values = np.concatenate([np.random.default_rng(2).standard_normal(5000), [1e9, 1e9 + 1, -3e8]])
    assert grid_entropy(np.sort(values), 0.1) == pytest.approx(counted(values, 0.1), abs=1e-9)


def test_grid_entropy_of_one_level_is_zero():
    assert grid_entropy(np.zeros(10), 0.1) == 0.0


def test_count_outside():
    sample = np.array([-3.0, -2.0, 0.0, 1.0, 2.0, 2.0, 4.0])
    assert count_outside(sample, -2.0, 2.0) == 2
    assert count_outside(sample, -10.0, 10.0) == 0

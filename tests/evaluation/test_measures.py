"""Figures, windows and intervals against independent ones: torch's kl_div, a loop over tokens, scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hf_gg.evaluation import interval, strided, token_figures


@pytest.mark.parametrize("size", [7, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_torchs(size, dtype):
    logits, reference = (8 * torch.randn(150, size)).to(dtype), (8 * torch.randn(150, size)).to(dtype)
    labels = torch.randint(size, (150,))
    figures = token_figures(logits, labels, reference)
    q, p = F.log_softmax(logits.double(), -1), F.log_softmax(reference.double(), -1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(figures.kl, kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(figures.loss, F.cross_entropy(logits.double(), labels, reduction="none"))
    torch.testing.assert_close(figures.reference_loss, F.nll_loss(p, labels, reduction="none"))
    assert torch.equal(figures.flipped, (logits.argmax(-1) != reference.argmax(-1)).double())


def test_a_model_does_not_differ_from_itself():
    logits = 30 * torch.randn(70, 300)
    figures = token_figures(logits, torch.zeros(70, dtype=torch.long), logits)
    assert not figures.kl.any() and not figures.flipped.any()


def test_tokens_without_probability_cost_nothing():
    logits, reference = torch.randn(3, 5), torch.randn(3, 5)
    logits[:, 2] = reference[:, 2] = -torch.inf
    figures = token_figures(logits, torch.zeros(3, dtype=torch.long), reference)
    keep = [0, 1, 3, 4]
    again = token_figures(logits[:, keep], torch.zeros(3, dtype=torch.long), reference[:, keep])
    torch.testing.assert_close(figures.kl, again.kl)
    assert figures.kl.isfinite().all()


def test_shapes_that_do_not_fit():
    logits, labels = torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="logits .positions, vocabulary. and labels"):
        token_figures(logits, labels[:2])
    with pytest.raises(ValueError, match=r"\[3, 4\].*other vocabularies"):
        token_figures(logits, labels, torch.randn(3, 4))


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for begin, end, first in strided(length, window, stride):
        assert 0 <= begin < first < end <= length and end - begin <= window
        assert begin == 0 or first - begin >= window - stride, "too little context"
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8), (8, -1)])
def test_windows_that_make_no_sense(window, stride):
    with pytest.raises(ValueError, match="window must be|stride must be"):
        next(strided(20, window, stride))


@pytest.mark.parametrize("transform", [lambda mean: mean, np.exp])
def test_interval_is_scipys(transform):
    random = np.random.default_rng(0)
    counts = random.integers(5, 400, size=40)
    sums = counts * random.gamma(3.0, 0.5, size=40)
    ours = interval(sums, counts, draws=20_000, transform=transform)

    def statistic(sums, counts, axis=-1):
        return transform(sums.sum(axis) / counts.sum(axis))

    theirs = scipy.stats.bootstrap(
        (sums, counts), statistic, paired=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(transform(sums.sum() / counts.sum()), rel=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)


def test_interval_is_the_same_every_time_and_narrows_with_documents():
    random = np.random.default_rng(0)
    sums, counts = random.gamma(3.0, 1.0, size=400), np.ones(400)
    assert interval(sums, counts) == interval(sums, counts) != interval(sums, counts, seed=1)
    few, many = interval(sums[:25], counts[:25]), interval(sums, counts)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.4)


def test_one_document_gives_no_interval():
    found = interval(np.array([3.0]), np.array([2]))
    assert (found.value, found.low, found.high) == (1.5, None, None)


@pytest.mark.parametrize(
    ("sums", "counts", "options", "words"),
    [
        ([1.0, np.nan], [1, 1], {}, "document 1 is not finite"),
        ([], [], {}, "at least one document"),
        ([1.0], [0], {}, "at least one document"),
        ([1.0, 2.0], [1, 1], {"confidence": 1.0}, "confidence must be"),
        ([1.0, 2.0], [1, 1], {"draws": 0}, "draws must be"),
    ],
)
def test_bad_figures(sums, counts, options, words):
    with pytest.raises(ValueError, match=words):
        interval(np.array(sums), np.array(counts), **options)

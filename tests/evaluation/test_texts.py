"""Perplexity, KL and flips of whole documents against a plain loop, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toy import TEXTS, model, tokenizer

from hf_gg import GGConfig, quantize_
from hf_gg.evaluation import Document, evaluate_texts


DOCUMENTS = [Document(str(number), text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def base():
    return model()


@pytest.fixture(scope="module")
def quantized(base):
    return quantize_(copy.deepcopy(base), GGConfig())


def plain_loop(one, other, texts: list[str], window: int, stride: int) -> dict[str, float]:
    """Each token alone: its context is what the window that scores it has before it."""
    losses, reference, kls, flips = [], [], [], []
    for text in texts:
        ids = tokenizer()(text)["input_ids"]
        for place in range(1, len(ids)):
            # the first window that reaches this token
            begin = 0 if place < window else stride * math.ceil((place + 1 - window) / stride)
            with torch.no_grad():
                q = F.log_softmax(one(torch.tensor([ids[begin:place]])).logits[0, -1].double(), -1)
                p = F.log_softmax(other(torch.tensor([ids[begin:place]])).logits[0, -1].double(), -1)
            losses.append(-q[ids[place]].item())
            reference.append(-p[ids[place]].item())
            kls.append(F.kl_div(q, p, reduction="sum", log_target=True).item())
            flips.append(float(q.argmax() != p.argmax()))
    count = len(losses)
    return {
        "perplexity": math.exp(sum(losses) / count),
        "base_perplexity": math.exp(sum(reference) / count),
        "perplexity_ratio": math.exp((sum(losses) - sum(reference)) / count),
        "kl": sum(kls) / count,
        "flips": sum(flips) / count,
    }


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (24, 7), (12, 11)])
def test_plain_loop(base, quantized, window, stride):
    texts = [text[:45] for text in TEXTS[1:4]]
    documents = [Document(text, text) for text in texts]
    result = evaluate_texts(quantized, tokenizer(), documents, base, window=window, stride=stride)
    expected = plain_loop(quantized, base, texts, window, stride)
    assert result.tokens == sum(map(len, texts)) - len(texts) == sum(result.counts)
    assert set(result.metrics) == set(expected)
    for name, value in expected.items():
        assert result.metrics[name].value == pytest.approx(value, rel=1e-4, abs=1e-9), name
        assert result.metrics[name].low <= value <= result.metrics[name].high
    assert result.metrics["kl"].value > 1e-5 and result.metrics["flips"].value > 0


def test_more_context_is_used_by_a_smaller_stride(base):
    """Not the same numbers, whatever the stride: the oracle above could not tell."""
    found = {s: evaluate_texts(base, tokenizer(), DOCUMENTS, window=32, stride=s).metrics for s in (31, 4)}
    assert found[31]["perplexity"].value != found[4]["perplexity"].value
    assert set(found[4]) == {"perplexity"}


def test_a_model_beside_itself(base):
    metrics = evaluate_texts(base, tokenizer(), DOCUMENTS, base).metrics
    assert metrics["kl"].value == metrics["flips"].value == 0 and metrics["perplexity_ratio"].value == 1


def test_only_what_is_asked_for(base, quantized):
    result = evaluate_texts(quantized, tokenizer(), DOCUMENTS, base, metrics=["kl"], max_tokens=50)
    assert list(result.metrics) == ["kl"] and result.tokens == 4 * 49 + len(TEXTS[3]) - 1
    assert (result.window, result.stride) == (64, 32)


def test_documents_of_one_token_are_left_out(base):
    steps: list[int] = []
    result = evaluate_texts(base, tokenizer(), [*DOCUMENTS, Document("one", "x")], progress=steps.append)
    assert result.skipped == ["one"] and result.documents == len(DOCUMENTS) and sum(steps) == result.tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["perplexety"]}, "'perplexety' is no metric: the metrics are perplexity"),
        ({"metrics": ["kl"]}, "'kl' compares with another model.*--against"),
        ({"metrics": []}, "No metric is asked for"),
        ({"window": 65}, "window is 65 tokens, and the model has 64 positions"),
        ({"window": 10, "stride": 10}, "stride must be from 1 to window - 1 = 9"),
        ({"window": 1}, "window must be at least 2"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"documents": [Document("a", "too short")]}, "9 tokens and a window has 64"),
        ({"documents": [Document("a", "")]}, "0 tokens and a window has 64"),
    ],
)
def test_bad_input(base, options, words):
    options = {"documents": DOCUMENTS, **options}
    with pytest.raises(ValueError, match=words):
        evaluate_texts(base, tokenizer(), **options)


def test_other_vocabularies(base):
    with pytest.raises(ValueError, match="other vocabularies cannot be compared"):
        evaluate_texts(base, tokenizer(), DOCUMENTS, model(vocab_size=80))
    with pytest.raises(ValueError, match="token .* and the model knows 8 tokens"):
        evaluate_texts(model(vocab_size=8), tokenizer(), DOCUMENTS)


def test_nan_is_named(base):
    broken = copy.deepcopy(base)
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="The model gives NaN on 0: its weights are damaged"):
        evaluate_texts(broken, tokenizer(), DOCUMENTS, base)
    with pytest.raises(ValueError, match="The base gives NaN on 0"):
        evaluate_texts(base, tokenizer(), DOCUMENTS, broken)


def test_a_token_without_probability_is_named(base):
    broken = copy.deepcopy(base)
    broken.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([5]), -torch.inf))
    with pytest.raises(ValueError, match=r"loss of token \d+ of 0 is not finite|kl of token"):
        evaluate_texts(broken, tokenizer(), DOCUMENTS, base)

"""Embeddings by the real MiniLM, and the cache."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe import embedder

from hf_gg.data import minilm
from hf_gg.posttraining.roma import SentenceEmbedder, embed


TEXTS = ["The cabinet met today.", "A goal in the last minute.", "The cabinet met today.", "ministers, here " * 9]


class Counting:
    """An embedder that notes what it was asked."""

    def __init__(self, size: int = 16, key: str = "counting"):
        self.size, self.key, self.asked = size, key, []

    def __call__(self, texts):
        self.asked += texts
        return embedder(texts)[:, : self.size]


def test_minilm_is_the_mean_of_its_hidden_states():
    found = embed(TEXTS, str(minilm()))
    assert found.shape == (4, 384) and torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-6)
    tokenizer, model = tf.AutoTokenizer.from_pretrained(minilm()), tf.AutoModel.from_pretrained(minilm()).eval()
    for text, vector in zip(TEXTS, found):
        with torch.no_grad():  # alone, so without padding
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted = hidden.mean(0) / hidden.mean(0).norm()
        assert torch.allclose(vector, wanted, atol=1e-5)
    assert torch.equal(found[0], found[2])
    assert float(found[0] @ found[3]) > float(found[0] @ found[1])


def test_cache_is_by_content(tmp_path):
    one = Counting()
    first = embed(TEXTS, one, tmp_path)
    assert one.asked == TEXTS[:2] + TEXTS[3:]
    again = Counting()
    both = embed([*reversed(TEXTS), "another"], again, tmp_path, chunk=1)
    assert again.asked == ["another"]
    assert torch.equal(both[:4], first.flip(0)) and torch.equal(first, embedder(TEXTS))
    other = Counting(key="other")
    embed(TEXTS, other, tmp_path)
    assert len(other.asked) == 3
    assert embed([], one, tmp_path).shape == (0, 0)
    assert not list(tmp_path.rglob(".new-*"))


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    class Failing(Counting):
        def __call__(self, texts):
            if len(self.asked) >= 2:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with pytest.raises(KeyboardInterrupt):
        embed([f"text {i}" for i in range(6)], Failing(), tmp_path, chunk=2)
    later = Counting()
    embed([f"text {i}" for i in range(6)], later, tmp_path, chunk=2)
    assert later.asked == [f"text {i}" for i in range(2, 6)]


def test_numpy_and_key(tmp_path):
    found = embed(TEXTS, lambda texts: np.asarray(embedder(texts)), tmp_path, key="numpy")
    assert torch.equal(found, embedder(TEXTS))
    model = SentenceEmbedder(minilm())
    assert model.key == SentenceEmbedder(minilm()).key != SentenceEmbedder(minilm(), max_length=8).key


def test_bad_embedders(tmp_path):
    embed(TEXTS, Counting(), tmp_path)
    with pytest.raises(ValueError, match="gives 5 dimensions, but those in the cache .* have 16"):
        embed([*TEXTS, "new"], Counting(5), tmp_path)
    with pytest.raises(ValueError, match="without a name: give key"):
        embed(TEXTS, lambda texts: embedder(texts), tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity for the text 'A goal"):
        embed(TEXTS, lambda texts: embedder(texts) / torch.tensor([[float("goal" not in t)] for t in texts]))
    assert torch.equal(embed(TEXTS, lambda texts: list(embedder(texts))), embedder(TEXTS))
    assert torch.equal(embed(TEXTS, lambda texts: embedder(texts).tolist()), embedder(TEXTS))
    assert torch.equal(embed(TEXTS, lambda texts: embedder(texts).half()), embedder(TEXTS).half().float())
    for bad in (lambda t: None, lambda t: [[1.0] * (1 + i) for i in range(len(t))]):
        with pytest.raises(ValueError, match=r"must give \[3, dimensions\], got"):
            embed(TEXTS, bad)
    with pytest.raises(TypeError, match="embedder must be a name, a folder or a callable, got int"):
        embed(TEXTS, 5)
    for bad in (lambda t: embedder(t)[0], lambda t: embedder(t)[1:], lambda t: embedder(t)[:, :0]):
        with pytest.raises(ValueError, match=r"must give \[3, dimensions\]"):
            embed(TEXTS, bad)


def test_size_changes_between_chunks():
    sizes = iter([4, 5])
    with pytest.raises(ValueError, match="gives 5 dimensions, but the first ones had 4"):
        embed(TEXTS, lambda texts: embedder(texts)[:, : next(sizes)], chunk=2)


@given(st.binary(max_size=64), st.integers(0, 2000), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_damaged_cache(tmp_path, noise, at, cut):
    """Either the right embeddings or a ValueError that names the file."""
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    wanted = embed(TEXTS, Counting(), tmp_path)
    [path] = tmp_path.rglob("*.safetensors")
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] if cut else content[:at] + noise + content[at + len(noise) :])
    try:
        found = embed(TEXTS, Counting(), tmp_path)
    except ValueError as error:
        if path.name not in str(error):
            raise
    else:
        assert torch.equal(found, wanted)


def described(folder, pooling, modules=("Transformer", "Pooling", "Normalize"), most=None):
    """MiniLM with other files of sentence-transformers."""
    folder.mkdir()
    for file in minilm().iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True, "dimension": 384}))
    (folder / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{m}"} for m in modules]))
    if most is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most}))
    return folder


def test_pooling_and_length_are_the_models(tmp_path):
    folder = described(tmp_path / "cls", "cls_token", most=6)
    tokenizer, model = tf.AutoTokenizer.from_pretrained(minilm()), tf.AutoModel.from_pretrained(minilm()).eval()
    for text, vector in zip(TEXTS, embed(TEXTS, folder)):
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, max_length=6, return_tensors="pt")
            first = model(**inputs).last_hidden_state[0, 0]
        assert torch.allclose(vector, first / first.norm(), atol=1e-5)
    assert torch.equal(embed(TEXTS, described(tmp_path / "mean", "mean_tokens")), embed(TEXTS, minilm()))


def test_other_pooling_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="pools by max_tokens"):
        embed(TEXTS, described(tmp_path / "max", "max_tokens"))
    with pytest.raises(ValueError, match="a layer Dense after the encoder"):
        embed(TEXTS, described(tmp_path / "dense", "mean_tokens", ("Transformer", "Pooling", "Dense")))

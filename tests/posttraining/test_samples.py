"""Samples, batches, and the judgement of answers against real decoding."""

import pytest
import torch
from moe import moe, rows, tokenizer
from tokenizers import normalizers

from hf_gg.posttraining.roma import Collator, Samples, choose_routers, describe
from hf_gg.posttraining.samples import LAST, PROMPT


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(side):
    samples = Samples(rows(5), tokenizer(side), max_length=20)
    items = [samples[i] for i in range(5)]
    batch = Collator(samples.tokenizer)(items)
    for i, item in enumerate(items):
        assert len(item["prompt"]) + len(item["answer"]) <= 20
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == item["prompt"] + item["answer"]
        assert batch["input_ids"][i][batch[PROMPT][i]].tolist() == item["prompt"]
        labels = batch["labels"][i]
        assert labels[labels != -100].tolist() == item["answer"]
        assert int(batch["input_ids"][i][batch[LAST][i]]) == item["prompt"][-1]
        assert batch["position_ids"][i][real].tolist() == list(range(int(real.sum())))
    whole = tokenizer()(rows(5)[2]["prompt"])["input_ids"]
    assert items[2]["prompt"] == whole[-18:]  # the beginning is lost


def test_greedy_decoding():
    """A model's own greedy continuations are right answers, in any batch, and others are not."""
    model, encode = moe(seed=3), tokenizer("left")
    data = []
    for row in rows(8):
        ids = torch.tensor([encode(row["prompt"])["input_ids"]])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=-1
        )
        tokens = said[0, ids.shape[1] :].tolist()
        data.append((row["prompt"], tokens))

    class Tokens(Samples):
        def __getitem__(self, i):
            tokens = list(data[i // 2][1])
            if i % 2:
                tokens[-1] = (tokens[-1] + 1) % 300
            return {"prompt": encode(data[i // 2][0])["input_ids"], "answer": tokens, "index": i}

    samples = Tokens([{"prompt": "x", "answer": "y"}] * 16, encode)
    found = describe(model, samples, choose_routers(model), batch_size=5)
    assert found.success.tolist() == [True, False] * 8


def test_candidates():
    """The next token's likeliest candidate, as one looks at the logits."""
    model, encode = moe(seed=3), tokenizer()
    data = [{**row, "choices": ["A", "B", "C"], "answer": row["answer"].strip()} for row in rows(12)]
    found = describe(model, Samples(data, encode), choose_routers(model), batch_size=4)
    letters = encode("ABC")["input_ids"]
    for row, right in zip(data, found.success.tolist()):
        with torch.no_grad():
            logits = model(torch.tensor([encode(row["prompt"])["input_ids"]])).logits[0, -1]
        assert right == ("ABC"[int(logits[letters].argmax())] == row["answer"])
    assert 0 < int(found.success.sum()) < 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train_dataset is empty"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], r"train_dataset\[1\] has no answer"),
        ([{"prompt": "a", "answer": " "}], r"train_dataset\[0\] has no answer"),
        ([{"prompt": "a", "answer": None}], r"has no answer: 'answer' must be text, got None"),
        ([{"answer": "b"}], r"train_dataset\[0\] has no prompt"),
        (iter([]), "must have a length"),
        ([("a", "b")], r"train_dataset\[0\] must be a dictionary with prompt and answer"),
        ({"prompt": ["a"], "answer": ["b"]}, "train_dataset is a dictionary: give a list of rows"),
    ],
)
def test_bad_rows(data, message):
    with pytest.raises(ValueError, match=message):
        Samples(data, tokenizer())


def test_bad_choices_and_lengths():
    model = moe()
    for choices, message in (
        (["B"], "do not hold the answer"),
        (["A", "Ab"], "begin with the same token"),
        (["A", ""], "must be a list of texts"),
        ("AB", "must be a list of texts"),
        (["A"], "hold nothing but the answer"),
    ):
        samples = Samples([{"prompt": "x", "answer": "A", "choices": choices}], tokenizer())
        with pytest.raises(ValueError, match=message):
            describe(model, samples, choose_routers(model))
    long = [{"prompt": "x", "answer": "A"}, {"prompt": "x" * 128, "answer": "A"}]
    with pytest.raises(ValueError, match="sample 1 has 129 tokens, more than the model's context of 128"):
        describe(model, Samples(long, tokenizer()), choose_routers(model))
    assert len(describe(model, Samples(long, tokenizer(), 128), choose_routers(model)).r) == 2
    silent = tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    for row, what in (({"prompt": "?", "answer": "A"}, "prompt"), ({"prompt": "x", "answer": "?"}, "answer")):
        with pytest.raises(ValueError, match=rf"train_dataset\[0\]: the tokenizer makes no token of the {what} '\?'"):
            Samples([row], silent)[0]
    with pytest.raises(ValueError, match="leaves no room for the prompt in max_length=4"):
        Samples([{"prompt": "x", "answer": "long"}], tokenizer(), max_length=4)[0]

import json
import math
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import WORDS, Scripted, is_right, llama, tokenizer, vision_language

from hf_gg import GGConfig, quantize_
from hf_gg.posttraining.rif import AllDropped, Sampling, combine, filter_by_rollouts, keep_mask, number_match, roll_out
from hf_gg.posttraining.rollout_cache import RolloutCache
from hf_gg.posttraining.rollouts import Prompts, generate, plan


def scripted_data(rights, **columns) -> Dataset:
    """Prompts of several lengths, each of which says how often it is right."""
    prompts = [" ".join([str(right), *["+"] * (place % 5), str(place)]) for place, right in enumerate(rights)]
    return Dataset.from_dict({"prompt": prompts, "number": [*range(len(rights))], **columns})


# --- the rule ---


@given(st.data())
def test_keep_mask(data):
    n = data.draw(st.integers(1, 12))
    least = data.draw(st.integers(0, n))
    most = data.draw(st.none() | st.integers(least, n))
    counts = data.draw(st.lists(st.integers(0, n)))
    wanted = [least <= count <= (n if most is None else most) for count in counts]
    assert keep_mask(counts, n, least, most).tolist() == wanted
    assert keep_mask(torch.tensor(counts, dtype=torch.long), n, least, most).tolist() == wanted


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([0, 9], {"n": 8}, "counts must lie between 0 and n=8, got 0 to 9"),
        ([-1], {"n": 8}, "counts must lie"),
        ([1], {"n": 0}, "n must be at least 1"),
        ([1], {"n": 8, "min_correct": 9}, "min_correct must lie between 0 and n=8, got 9"),
        ([1], {"n": 8, "min_correct": 3, "max_correct": 2}, "max_correct must lie between min_correct=3 and n=8"),
    ],
)
def test_keep_mask_of_bad_numbers(counts, options, message):
    with pytest.raises(ValueError, match=message):
        keep_mask(counts, **options)
    with pytest.raises(TypeError, match="whole numbers"):
        keep_mask([0.5], 8)


# --- the filter ---


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 10_000])
@pytest.mark.parametrize(("least", "most"), [(1, None), (0, None), (2, 7), (8, 8)])
def test_a_scripted_policy_gives_the_wanted_instances(batch_tokens, least, most):
    rights = [0, 3, 8, 1, 0, 8, 7, 2, 0, 5, 8, 6]
    policy = Scripted(8).train()
    kept, report = filter_by_rollouts(
        policy,
        tokenizer(),
        scripted_data(rights),
        is_right,
        min_correct=least,
        max_correct=most,
        max_new_tokens=4,
        batch_tokens=batch_tokens,
    )
    wanted = [place for place, right in enumerate(rights) if least <= right <= (8 if most is None else most)]
    assert report.kept == kept["number"][:] == wanted
    assert report.dropped == [place for place in range(12) if place not in wanted]
    assert report.counts == rights and kept["rollouts_correct"][:] == [rights[place] for place in wanted]
    assert report.histogram == [rights.count(k) for k in range(9)] and report.accuracy == sum(rights) / 96
    assert report.tokens == 12 * 8 * 2  # the word and the end of the text
    assert policy.training and set(policy.seen.values()) == {8}
    for prompts, rollouts, width, new in policy.rows:
        assert prompts * rollouts * (width + new) <= batch_tokens or prompts == rollouts == 1
    assert f"{len(wanted)} of 12 instances kept" in str(report)
    json.dumps(report.to_dict())


def test_batches_have_like_lengths_and_the_longest_comes_first():
    lengths = torch.randint(1, 200, (500,)).tolist()
    batches = plan(lengths, Sampling(n=4, max_new_tokens=10, batch_tokens=2000))
    assert sorted(place for batch in batches for place in batch.prompts) == [*range(500)]
    ordered = [lengths[place] for batch in batches for place in batch.prompts]
    assert ordered == sorted(lengths, reverse=True)
    assert all(batch.width == max(lengths[place] for place in batch.prompts) for batch in batches)
    padded = sum(batch.width * len(batch.prompts) for batch in batches)
    assert padded < 1.1 * sum(lengths)


def test_batches_give_what_one_by_one_gives():
    """Greedy decoding, which does not depend on random numbers: padding on the left changes nothing."""
    model, words = llama(), tokenizer()
    texts = ["1 + 2 =", "3 =", "1 + 2 + 3 + 4 =", "7 + 7 ="]
    prompts = Prompts(words, texts)
    sampling = Sampling(n=1, temperature=0, max_new_tokens=6)
    [(batch, found, tokens)] = generate(model, prompts, plan([len(ids) for ids in prompts.ids], sampling), sampling)
    count = 0
    for place, completions in zip(batch.prompts, found):
        ids = torch.tensor([prompts.ids[place]])
        alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert completions == [words.decode(alone, skip_special_tokens=True)]
        count += len(alone)
    assert tokens == count


def test_counts_are_those_of_the_completions():
    """With the completions that the same batches give, counted by hand; the base may be RF8."""
    model, words = quantize_(llama(), GGConfig(quantize_lm_head=True)), tokenizer()
    data = Dataset.from_dict({"prompt": [f"{k} + {k} =" for k in range(9)], "answer": [str(k % 3) for k in range(9)]})
    sampling = Sampling(n=8, max_new_tokens=5, batch_tokens=300, seed=3, temperature=1.5)
    report = roll_out(model, words, data, number_match, sampling)
    prompts, counts = Prompts(words, data["prompt"][:]), [0] * 9
    for batch, texts, _ in generate(model, prompts, plan([4] * 9, sampling), sampling):
        for place, completions in zip(batch.prompts, texts):
            numbers = [[word for word in text.split() if word.isdigit()] for text in completions]
            counts[place] = sum(found[-1:] == [data[place]["answer"]] for found in numbers)
    assert report.counts == counts
    assert report.counts == roll_out(model, words, data, number_match, sampling).counts  # by the seed
    other = Sampling(**{**sampling.to_dict(), "seed": 4, "stop_strings": ()})
    assert any(counts) and report.counts != roll_out(model, words, data, number_match, other).counts
    state = torch.get_rng_state()
    roll_out(model, words, data, number_match, sampling)
    assert torch.equal(state, torch.get_rng_state())


def test_temperature_and_top_p():
    """Shares of the first token, against the softmax; whatever the model's generation config says."""
    model, words = llama(), tokenizer()
    model.generation_config.update(temperature=0.01, top_k=1, repetition_penalty=5.0, max_length=3, min_p=0.9)
    model.generation_config.update(no_repeat_ngram_size=1, typical_p=0.1, suppress_tokens=[5, 6], min_length=9)
    model.generation_config.update(bad_words_ids=[[7]], eta_cutoff=0.1, epsilon_cutoff=0.1, stop_strings=["7"])
    prompts = Prompts(words, ["1 +"])
    logits = model(torch.tensor([prompts.ids[0]])).logits[0, -1].detach().double()
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.4)):
        sampling = Sampling(n=4000, max_new_tokens=1, batch_tokens=10_000, temperature=temperature, top_p=top_p)
        [(_, [texts], _)] = generate(model, prompts, plan([2], sampling), sampling)
        wanted = (logits / temperature).softmax(-1)
        order = wanted.argsort(descending=True)
        nucleus = order[: int((wanted[order].cumsum(0) < top_p).sum()) + 1] if top_p < 1 else order
        share = torch.zeros_like(wanted)
        share[nucleus] = wanted[nucleus] / wanted[nucleus].sum()
        found = torch.zeros_like(wanted)
        for text in texts:
            found[WORDS.index(text) if text else 1] += 1 / 4000
        likely = share > 0.01
        assert likely.any()
        assert float((found - share)[likely].abs().max()) < 4 * math.sqrt(0.25 / 4000)
        if top_p < 1:
            assert float(found[[w for w in range(3, len(WORDS)) if w not in nucleus.tolist()]].sum()) == 0


def test_chats():
    policy, words = Scripted(2), tokenizer(chat=True)
    prompts = [[{"role": "user", "content": f"{k} + 1"}] for k in (0, 1, 2)]
    seen = []

    def reward(prompts, completions, level, **_):
        seen.append((prompts, completions, level))
        return is_right([completion[0]["content"] for completion in completions])

    data = Dataset.from_dict({"prompt": prompts, "level": ["a", "b", "c"]})
    kept, report = filter_by_rollouts(policy, words, data, reward, n=2, max_new_tokens=3)
    assert report.counts == [0, 1, 2] and kept["level"][:] == ["b", "c"]
    assert all(p[0][0]["content"].endswith("+ 1") and c[0][0]["role"] == "assistant" for p, c, _ in seen)
    assert [words.decode(prompt) for prompt in policy.seen] == ["0 + 1 =", "1 + 1 =", "2 + 1 ="]  # asks for an answer


def test_completions_end_where_the_tokenizer_or_a_stop_string_says():
    """Also where the model's own config names no end, and where padding is a word like any other."""
    model, words = llama(), tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    prompts = Prompts(words, ["1 + 2 ="])
    free = torch.tensor([prompts.ids[0]])
    made = model.generate(free, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:]
    texts = words.decode(made).split()
    words.eos_token = texts[2]  # a word that comes
    words.pad_token = None
    sampling = Sampling(n=1, temperature=0, max_new_tokens=6)
    end = texts.index(texts[2]) + 1
    [(_, [[text]], tokens)] = generate(model, prompts, plan([4], sampling), sampling)
    assert text.split() == texts[:end] and tokens == end
    sampling = Sampling(n=1, temperature=0, max_new_tokens=6, stop_strings=(texts[1],))
    for ends in (True, False):
        words = tokenizer()
        words.add_tokens("abcdef")  # what Transformers' search for stop strings needs
        if not ends:
            words.pad_token, words.eos_token = None, None  # pads with token 0
        prompts = Prompts(words, ["1 + 2 =", "3 ="])
        [(batch, found, tokens)] = generate(model, prompts, plan([4, 2], sampling), sampling)
        text = " ".join(texts)
        assert found[batch.prompts.index(0)] == [text[: text.index(texts[1]) + len(texts[1])]]
        # without an end, a text that has stopped is written on until all have
        assert tokens == 12 if not ends else 2 <= tokens < 12


def test_the_model_is_left_as_it_was():
    """Each of its modules in its own mode, also while an exception is kept; no tensors that cannot be trained on."""

    def bad(completions, **_):
        raise KeyError("no such thing")

    for reward in (is_right, bad):
        model = llama().train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        before = {**vars(model.generation_config)}
        words = tokenizer()
        sides = words.padding_side, words.pad_token
        try:
            filter_by_rollouts(model, words, scripted_data([1]), reward, min_correct=0, max_new_tokens=3)
        except RuntimeError as error:
            kept = error
            assert kept.__cause__ is not None
        assert [module.training for module in model.modules()] == modes
        assert {**vars(model.generation_config)} == before and sides == (words.padding_side, words.pad_token)
        model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()


# --- going on ---


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    rights, cache = [0, 3, 8, 1, 0, 8, 7, 2, 0, 5, 8, 6], tmp_path / "deep" / "rollouts.jsonl"
    options = {"max_new_tokens": 4, "batch_tokens": 130, "cache": cache}
    whole, whole_report = filter_by_rollouts(Scripted(8), tokenizer(), scripted_data(rights), is_right, **options)
    cache.unlink()
    policy = Scripted(8)
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    rounds = 0
    while True:
        rounds += 1
        policy.rows, policy.fail_after = [], 2
        try:
            kept, report = filter_by_rollouts(policy, tokenizer(), scripted_data(rights), is_right, **options)
            break
        except KeyboardInterrupt:
            with cache.open("a") as file:
                file.write('{"batch": 7, "cou')  # the kill came while a line was written
            done = [json.loads(line)["batch"] for line in cache.read_text().split("\n")[1:-1]]
            assert len(done) == 2 * rounds
    assert rounds > 2 and set(policy.seen.values()) == {8}  # nothing was rolled out twice
    assert report.counts == whole_report.counts and kept.to_dict() == whole.to_dict()
    assert report.tokens == whole_report.tokens
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())


def same_parity(completions, answer, **_):
    found = [[int(word) for word in text.split() if word.isdigit()] for text in completions]
    return [float(bool(numbers) and numbers[-1] % 2 == int(wanted) % 2) for numbers, wanted in zip(found, answer)]


def test_sampled_counts_are_the_same_after_a_cut(tmp_path):
    model, words = llama(), tokenizer()
    data = Dataset.from_dict({"prompt": [f"{k} + {k} =" for k in range(9)], "answer": [str(k) for k in range(9)]})
    options = {"max_new_tokens": 5, "batch_tokens": 160, "temperature": 2.0, "min_correct": 0}
    whole = filter_by_rollouts(model, words, data, same_parity, **options)[1]
    file = tmp_path / "cache.jsonl"
    filter_by_rollouts(model, words, data, same_parity, cache=file, **options)
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[0], *lines[3:]]))  # any batches may be missing
    again = filter_by_rollouts(model, words, data, same_parity, cache=file, **options)[1]
    assert any(whole.counts) and again.counts == whole.counts


def test_a_cache_of_another_run(tmp_path):
    words, file = tokenizer(), tmp_path / "cache.jsonl"

    def run(policy=None, rights=(1, 2), reward=is_right, **options):
        options = {"n": 8, "max_new_tokens": 4, "cache": file} | options
        return filter_by_rollouts(policy or Scripted(8), words, scripted_data(rights), reward, **options)[1]

    policy = Scripted(8)
    run(policy)
    before = file.read_bytes()
    trained = Scripted(8)
    trained.load_state_dict(policy.state_dict())
    assert run(trained).counts == [1, 2] and not trained.rows  # the same weights
    trained.embedding.weight.data[5] += 1e-3
    for change in (
        {"policy": trained},
        {"policy": policy, "rights": (1, 3)},
        {"policy": policy, "n": 9},
        {"policy": policy, "seed": 1},
        {"policy": policy, "threshold": 0.9},
        {"policy": policy, "reward": number_match},
        {"policy": policy, "reward": combine(is_right)},
    ):
        with pytest.raises(ValueError, match="cache.jsonl holds rollouts of another policy, data set or"):
            run(**change)
    assert file.read_bytes() == before
    file.write_text("notes of mine\n")
    with pytest.raises(ValueError, match="is no cache of rollouts"):
        run(policy)
    assert file.read_text() == "notes of mine\n"


@pytest.mark.parametrize(
    "line",
    [
        "notes of mine",
        "",
        "\0\0",
        "[1]",
        '{"batch": 1}',
        '{"batch": 99, "counts": [1], "failures": [], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [], "failures": [], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [1, 9], "failures": [], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [1, -1], "failures": [], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [1, true], "failures": [], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [1, 1], "failures": [[0, 0]], "tokens": 2, "seconds": 0.1}',
        '{"batch": 1, "counts": [1, 1], "failures": [], "tokens": 2, "seconds": NaN}',
    ],
)
def test_a_damaged_cache(line, tmp_path):
    """It is refused, whatever the damage, and without the damaged line the rest is good."""
    file, rights = tmp_path / "cache.jsonl", [1, 2, 3, 8, 0, 2]
    options = {"max_new_tokens": 4, "batch_tokens": 120, "cache": file}
    policy = Scripted(8)
    whole = filter_by_rollouts(policy, tokenizer(), scripted_data(rights), is_right, **options)[1]
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"cache.jsonl, line 3 is damaged \(.*its batch is rolled out again"):
        filter_by_rollouts(policy, tokenizer(), scripted_data(rights), is_right, **options)
    assert file.read_bytes() == before
    file.write_text("\n".join([*lines[:2], *lines[3:]]))
    policy.rows, policy.seen = [], {}
    again = filter_by_rollouts(policy, tokenizer(), scripted_data(rights), is_right, **options)[1]
    assert len(policy.rows) == 1 and again.counts == whole.counts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cache_with_bytes_flipped_or_cut(data):
    """Counts are right or the file is refused; never anything else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.jsonl"
        cache = RolloutCache(file, "x", [2, 1, 2], 4)
        for number, size in enumerate((2, 1, 2)):
            cache.add(number, {"counts": [1] * size, "failures": [[0, 1, "é"]], "tokens": 3, "seconds": 0.5})
        content = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            found = RolloutCache(file, "x", [2, 1, 2], 4).batches
        except ValueError:
            return
        assert all(0 <= number < 3 and len(found[number]["counts"]) == (2, 1, 2)[number] for number in found)
        assert all(0 <= count <= 4 for record in found.values() for count in record["counts"])
        assert file.read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    """SIGKILL, again and again: the same result, and no instance is rolled out twice.

    The processes are forks of one that has imported everything, which is what takes long.
    """
    script = f"""
import os, signal, sys, json, traceback
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from policies import *
from test_rif import scripted_data, filter_by_rollouts
cache, log = sys.argv[1:]
generate = Scripted.generate
def killing(self, **options):
    if len(self.rows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    made = generate(self, **options)
    print(json.dumps([tokenizer().decode(prompt) for prompt in self.seen]), file=open(log, "a"))
    self.seen.clear()
    return made
Scripted.generate = killing
def work():
    torch.manual_seed(0)
    rights = [0, 3, 8, 1, 0, 8, 7]
    report = filter_by_rollouts(Scripted(8), tokenizer(), scripted_data(rights), is_right, max_new_tokens=4,
        batch_tokens=100, cache=cache, show_progress=False)[1]
    print(json.dumps(report.counts), flush=True)
for _ in range(4):
    if not (child := os.fork()):
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, len(open(cache).read().split("\\n"))]), flush=True)
    if code != -9:
        break
"""
    cache, log = tmp_path / "cache.jsonl", tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", script, cache, log], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    *killed, counts, ended = map(json.loads, done.stdout.splitlines())
    assert len(killed) == 2 and ended[0] == 0, done.stderr
    # the head, two batches a round, and the end
    assert killed == [[-9, 2 + 2 * number] for number in range(1, len(killed) + 1)]
    assert counts == [0, 3, 8, 1, 0, 8, 7]
    rolled = [prompt for line in log.read_text().splitlines() for prompt in json.loads(line)]
    assert len(rolled) == len({*rolled}) == 7


# --- rewards that fail ---


def sometimes(completions, number, **_):
    """Of instance 1 it raises, of instance 2 it is NaN, of instance 3 None for wrong ones."""
    if number[0] == 1 and "wrong" in completions[0]:
        raise KeyError("no such thing")
    right = is_right(completions)
    bad = {2: math.nan, 3: None}
    return [value or bad.get(number[0], 0.0) for value in right]


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (1, RuntimeError, "sometimes failed on instance 1: KeyError: 'no such thing'"),
        (2, ValueError, "sometimes is nan for a rollout of instance 2"),
        (3, ValueError, "sometimes is None for a rollout of instance 3"),
    ],
)
def test_a_reward_that_fails_names_the_instance(number, error, message, tmp_path):
    rights = [8, 8, 8, 8]
    rights[number] = 0
    cache = tmp_path / "cache.jsonl"
    options = {"max_new_tokens": 4, "batch_tokens": 60, "cache": cache}
    with pytest.raises(error, match=message):
        filter_by_rollouts(Scripted(8), tokenizer(), scripted_data(rights), sometimes, **options)
    assert len(cache.read_text().split("\n")) >= 2  # what was done before is kept


def test_failures_that_count_as_wrong():
    rights = [3, 0, 5, 6, 0]
    policy = Scripted(8)
    kept, report = filter_by_rollouts(
        policy, tokenizer(), scripted_data(rights), sometimes, on_error="wrong", max_new_tokens=4
    )
    assert report.counts == rights and kept["number"][:] == [0, 2, 3]
    wanted = [(1, k, "KeyError: 'no such thing'") for k in range(8)]
    wanted += [(2, k, "nan") for k in range(5, 8)] + [(3, k, "None") for k in (6, 7)]
    assert report.failures == wanted and "failed on 13 rollouts" in str(report)


@pytest.mark.parametrize("value", [math.inf, -math.inf, "1.0", [1.0], 1j, torch.ones(2)])
def test_rewards_that_are_no_finite_numbers(value):
    def odd(completions, **_):
        return [value for _ in completions]

    with pytest.raises(ValueError, match=r"odd is .* for a rollout of instance 0, and no finite number"):
        filter_by_rollouts(Scripted(2), tokenizer(), scripted_data([1]), odd, n=2)
    _, report = filter_by_rollouts(
        Scripted(2), tokenizer(), scripted_data([1]), odd, n=2, min_correct=0, on_error="wrong"
    )
    assert report.counts == [0] and report.failures == [(0, k, f"{value!r}") for k in range(2)]


@pytest.mark.parametrize("kind", [torch.ones, np.ones, lambda count: [True] * count])
def test_rewards_may_be_tensors_arrays_and_truth_values(kind):
    def reward(completions, **_):
        return kind(len(completions))

    report = filter_by_rollouts(Scripted(2), tokenizer(), scripted_data([1, 2]), reward, n=2)[1]
    assert report.counts == [2, 2] and all(type(count) is int for count in report.counts)


def test_a_reward_at_the_threshold_is_right():
    def graded(completions, number, **_):
        return [(0.25, 0.5, 0.75)[number[0]] for _ in completions]

    for threshold, wanted in ((0.25, [2, 2, 2]), (0.5, [0, 2, 2]), (0.75, [0, 0, 2])):
        _, report = filter_by_rollouts(
            Scripted(2), tokenizer(), scripted_data([1, 1, 1]), graded, n=2, threshold=threshold
        )
        assert report.counts == wanted


def test_a_reward_of_another_length():
    with pytest.raises(RuntimeError, match="it returned 1 rewards for 8 completions"):
        filter_by_rollouts(Scripted(8), tokenizer(), scripted_data([1]), lambda completions, **_: [1.0])


# --- bad input ---


def test_all_dropped(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(
        AllDropped, match=r"all 3 instances are dropped: of 8 rollouts each, 0\.0% are right"
    ) as caught:
        filter_by_rollouts(Scripted(8), tokenizer(), scripted_data([0, 0, 0]), is_right, cache=cache)
    assert "better policy" in str(caught.value) and caught.value.report.histogram[0] == 3
    assert len(cache.read_text().split("\n")) > 2
    with pytest.raises(AllDropped, match="Widen min_correct and max_correct"):
        filter_by_rollouts(Scripted(8), tokenizer(), scripted_data([8, 8]), is_right, max_correct=7)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ({"prompt": []}, {}, ValueError, "the data set is empty"),
        ({"text": ["1"]}, {}, ValueError, "no column 'prompt', only text"),
        ({"prompt": ["1", ""]}, {}, ValueError, "prompt 1 has no tokens"),
        ({"prompt": [1]}, {}, TypeError, "prompt 0 must be a text or a list of messages, got int"),
        ({"prompt": ["1", "2"], "answer": ["3", None]}, {}, ValueError, "instance 1 has no answer"),
        ({"prompt": ["1"], "answer": [" "]}, {}, ValueError, "instance 0 has no answer"),
        ({"prompt": ["1"], "rollouts_correct": [2]}, {}, ValueError, "has a column 'rollouts_correct' already"),
        ({"prompt": [[{"role": "user", "content": "1"}]]}, {}, ValueError, "prompt 0 is a chat"),
        ({"prompt": ["1"]}, {"n": 0}, ValueError, "n must be at least 1"),
        ({"prompt": ["1"]}, {"min_correct": 9}, ValueError, "min_correct must lie"),
        ({"prompt": ["1"]}, {"temperature": -1.0}, ValueError, "temperature must be 0 or more"),
        ({"prompt": ["1"]}, {"temperature": math.nan}, ValueError, "temperature must be 0 or more"),
        ({"prompt": ["1"]}, {"temperature": 0}, ValueError, "gives 8 equal completions"),
        ({"prompt": ["1"]}, {"top_p": 0.0}, ValueError, "top_p must be more than 0"),
        ({"prompt": ["1"]}, {"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number from 1"),
        ({"prompt": ["1"]}, {"threshold": math.nan}, ValueError, "threshold must be a finite number"),
        ({"prompt": ["1"]}, {"on_error": "skip"}, ValueError, "on_error must be 'fail' or 'wrong'"),
        ({"prompt": ["1"], "completions": ["1"]}, {}, ValueError, "has a column 'completions', which"),
        ({"prompt": ["1"]}, {"seed": 0.5}, ValueError, "seed must be a whole number from 0"),
        ({"prompt": ["1"]}, {"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"prompt": ["1"]}, {"threshold": "1"}, ValueError, "threshold must be a finite number, got '1'"),
        ({"prompt": ["1"]}, {"stop_strings": "END"}, ValueError, r"such as \('END',\), got 'END'"),
        ({"prompt": ["1"], "image": [3]}, {}, ValueError, "prompts with images need the model's processor"),
    ],
)
def test_bad_input(data, options, error, message):
    policy = Scripted(8)
    with pytest.raises(error, match=message):
        filter_by_rollouts(policy, tokenizer(), Dataset.from_dict(data), is_right, **options)
    assert not policy.rows


def test_bad_chats_and_kinds_of_data():
    words = tokenizer(chat=True)
    words.chat_template = "{{ raise_exception('no system') }}"
    data = Dataset.from_dict({"prompt": [[{"role": "system", "content": "1"}]]})
    with pytest.raises(ValueError, match="prompt 0 does not go through the chat template: no system"):
        filter_by_rollouts(Scripted(8), words, data, is_right)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}], []]})
    with pytest.raises(ValueError, match="prompt 1 "):
        filter_by_rollouts(Scripted(8), tokenizer(chat=True), data, is_right)
    with pytest.raises(TypeError, match="must be a datasets.Dataset, got list"):
        filter_by_rollouts(Scripted(8), words, [{"prompt": "1"}], is_right)


def test_prompts_longer_than_the_context():
    model = llama()
    data = Dataset.from_dict({"prompt": ["1 =", "1 " * 50, "2 " * 60]})
    with pytest.raises(ValueError, match=r"2 of 3 prompts are too long, the first one is 1: its 50 tokens"):
        filter_by_rollouts(model, tokenizer(), data, is_right, max_new_tokens=20)


# --- vLLM ---


def test_vllm(monkeypatch):
    """A stand-in with the parts of vLLM's interface that are used: nothing here ran vLLM itself."""
    module = types.ModuleType("vllm")
    seen = []

    class SamplingParams:
        def __init__(self, **options):
            self.__dict__ |= options

    class LLM:
        llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=64, model="tiny"))

        def generate(self, prompts, sampling_params, use_tqdm):
            seen.append((prompts, sampling_params))
            outputs = []
            for prompt in prompts:
                right = int(WORDS[prompt["prompt_token_ids"][0]])
                texts = ["right"] * right + ["wrong"] * (sampling_params.n - right)
                found = [types.SimpleNamespace(text=text, token_ids=[1, 2]) for text in texts]
                outputs.append(types.SimpleNamespace(outputs=found))
            return outputs

    LLM.__module__ = "vllm"
    module.SamplingParams, module.LLM = SamplingParams, LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    rights = [0, 3, 8, 1]
    options = {"temperature": 0.7, "max_new_tokens": 16, "stop_strings": ("\n",), "batch_tokens": 400}
    kept, report = filter_by_rollouts(LLM(), tokenizer(), scripted_data(rights), is_right, **options)
    assert report.counts == rights and kept["number"][:] == [1, 2, 3] and report.tokens == 64
    params = [params for _, params in seen]
    assert {(p.n, p.temperature, p.max_tokens, tuple(p.stop)) for p in params} == {(8, 0.7, 16, ("\n",))}
    assert len({p.seed for p in params}) == len(params) > 1
    with pytest.raises(ValueError, match="context of 64"):
        filter_by_rollouts(LLM(), tokenizer(), scripted_data(rights), is_right, max_new_tokens=64)
    assert np.array_equal(report.kept, [1, 2, 3])


# --- images ---


def test_prompts_with_images():
    """A tiny Qwen2.5-VL: batches of images of several sizes give what one by one gives."""
    from PIL import Image

    model, processor = vision_language()
    image = model.config.image_token_id  # never drawn, as in GRPO
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 255, (16 + 8 * k, 16, 3), dtype=np.uint8)) for k in range(4)]
    prompt = "<|vision_start|><|image_pad|><|vision_end|> {} + 2 ="
    data = Dataset.from_dict({"prompt": [prompt.format(k) for k in range(4)], "image": images, "answer": [*"1234"]})
    prompts = Prompts(processor, data["prompt"][:], [[image] for image in images])
    assert [len(ids) for ids in prompts.ids] == [4 + 2 + 4 + 2 * k for k in range(4)]
    sampling = Sampling(n=1, temperature=0, max_new_tokens=5)
    [(batch, found, _)] = generate(model, prompts, plan([len(ids) for ids in prompts.ids], sampling), sampling)
    for place, completions in zip(batch.prompts, found):
        alone = processor(text=[data["prompt"][place]], images=[[images[place]]], return_tensors="pt")
        made = model.generate(**alone, max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[image])
        made = made[0, alone["input_ids"].shape[1] :]
        assert completions == [processor.tokenizer.decode(made, skip_special_tokens=True)]

    def long(completions, image, **_):
        assert all(value.size[0] == 16 for value in image)
        return [float(len(text) % 2) for text in completions]

    kept, report = filter_by_rollouts(
        model, processor, data, long, n=4, min_correct=0, max_new_tokens=5, batch_tokens=150
    )
    assert len(kept) == 4 and 0 < report.accuracy < 1


def test_chats_with_images():
    """Images get their places as GRPO gives them: before the first text of a user."""
    from PIL import Image
    from trl.data_utils import prepare_multimodal_messages

    _, processor = vision_language()
    images = [Image.new("RGB", (16, 16 + 8 * k), (90 * k, 0, 0)) for k in range(3)]
    chat = [
        {"role": "system", "content": "7 8"},
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4 + 5"},
    ]
    own = [{"role": "user", "content": [{"type": "text", "text": "1 +"}, {"type": "image"}]}]
    given = [(chat, images[:1]), (chat, images[1:]), (chat, []), (own, images[2:])]
    prompts = Prompts(processor, [prompt for prompt, _ in given], [found for _, found in given])
    for place, (prompt, found) in enumerate(given):
        wanted = processor.apply_chat_template(
            prepare_multimodal_messages(prompt, images=found), add_generation_prompt=True, tokenize=False
        )
        assert prompts.texts[place] == wanted and wanted.count("<|image_pad|>") == len(found)
    assert prompts.texts[1].startswith("7 8 <|vision_start|>")
    assert chat[1]["content"] == "1 + 2"  # as it was
    for prompt, found, places in ((own, [], 1), (own, images, 1), (chat[:1], images[:1], 0)):
        with pytest.raises(ValueError, match=f"prompt 0 has places for {places} images, and {len(found)} are given"):
            Prompts(processor, [prompt], [found])

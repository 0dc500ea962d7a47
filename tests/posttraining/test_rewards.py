import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gg.posttraining import rewards
from hf_gg.posttraining.rewards import choice_in, choice_match, combine, exact_match, format_match, number_match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234),
        ("1,234,567.5", Fraction("1234567.5")),
        ("-0.5", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac{-3}{4}", Fraction(-3, 4)),
        (r"5\text{ apples}", 5),
        ("12%", 12),
        (r"12\%", 12),
        ("$5", 5),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"-2\dfrac12", None),
        ("-2 1/2", Fraction(-5, 2)),
        ("2 1/0", None),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        ("1{,}234", 1234),
        ("-0", 0),
        ("\uff11\uff12", 12),
        (r"\$1,000.50", Fraction("1000.5")),
        ("$-5$", -5),
        ("2e3", 2000),
        ("1e-2", Fraction(1, 100)),
        ("\u22127", -7),
        ("7.", 7),
        ("  8 ", 8),
        ("1,23", None),
        ("1 000", None),
        ("12,3456", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 101, None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("__import__('os')", None),
    ],
)
def test_numbers(text, number):
    assert rewards.parse_number(text) == number


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read(number):
    assert rewards.parse_number(str(number)) == number
    assert rewards.number_in(f"so it is {number} then\n#### {number}") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("3 apples and 4 pears", 4),
        ("from 10-20", 20),
        ("so it is \u22127", -7),
        (r"\boxed{} #### 5", 5),
        ("from 10 to -20", -20),
        ("She pays 12.\n#### 72\nnot 5", 72),
        ("#### 5 apples", 5),
        ("#### none", None),
        ("#### 72 (in 3 hours)", 72),
        ("#### $1,200.50 for 2", Fraction("1200.5")),
        ("#### 1 km\n#### 72km and 3", 72),
        ("#### - 5 and 6", -5),
        ("#### - 5", -5),
        (r"\boxed{- 5}", -5),
        ("These are:\n- 5 apples", 5),
        ("- 5", -5),
        ("Choose:\n- 3\n- 5\n", 5),
        ("\n  -5", -5),
        ("it is - 5", -5),
        ("10 - 5", 5),
        ("10 - -5", -5),
        (r"\boxed{12} no, \boxed{\frac{1}{2}} of 9", Fraction(1, 2)),
        (r"\boxed{3", 3),  # not closed: the last number counts
        (r"\boxed{x = 4}", 4),
        ("version v1.2.3", None),
        ("2x", None),
        ("none", None),
        ("The total is $1,200.50 today", Fraction("1200.5")),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert rewards.number_in(text) == number


OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")  # of GSM8K's own evaluation


@given(
    st.text(alphabet="ab 12-.,\n", max_size=30),
    st.integers(-(10**7), 10**7),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(["", " ", " (in 3 hours)", " apples, not 5", "\n7 8", " - 4", "km", " or -3.", " = 6"]),
)
def test_the_number_after_the_mark_is_that_of_the_official_pattern(before, whole, cents, commas, after):
    text = f"{before}#### {whole:{',' if commas else ''}}{f'.{cents:02}' if cents else ''}{after}"
    assert rewards.number_in(text) == Fraction(OFFICIAL.search(text)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (B)", "B"),
        ("B. the cat", "B"),
        ("**B**", "B"),
        ("The answer is (c).", "C"),
        ("Answer: A or rather answer: d", "D"),
        (r"I say \boxed{D}", "D"),
        (r"\boxed{\text{B}}", "B"),
        ("#### C", "C"),
        ("A cat sat. It must be C", "C"),
        ("A cat sat", None),
        ("I do not know", None),
        ("Of all choices, B is best", "B"),
        ("**Answer**: C", "C"),
        ("The answer is: **D**", "D"),
        ("", None),
    ],
)
def test_choices(text, letter):
    assert choice_in(text) == letter


def test_rewards_of_texts_and_chats():
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "#### "}, {"type": "text", "text": "4"}]}]
    assert number_match(completions=["5", chat, parts], answer=["4", 4, "so\n#### 4.0"], prompts=[""] * 3) == [0, 1, 1]
    assert exact_match(completions=[" Paris\n", "#### the  SEINE", "x"], answer=["paris", "The Seine", "y"]) == [
        1,
        1,
        0,
    ]
    assert choice_match(completions=["B", "B", "C", "(a)"], answer=["b", 1, "(D)", 0]) == [1, 1, 0, 0]
    assert format_match(completions=["4", "#### 4", r"\boxed{4}", r"\boxed{}", "####"]) == [0, 1, 1, 0, 0]
    thinks = rewards.matches(r"<think>.*</think>\s*<answer>.*</answer>")
    assert thinks(completions=[" <think>a\nb</think>\n<answer>4</answer> ", "<answer>4</answer>"]) == [1, 0]


def test_combined():
    reward = combine(number_match)
    assert reward(completions=["#### 4", "4", "#### 5", "5"], answer=["4"] * 4) == pytest.approx([1, 0.9, 0.1, 0])
    assert reward.__name__ and all(reward.__name__ for reward in rewards.REWARDS.values())  # TRL logs by it
    none = combine(lambda completions, **_: [None for _ in completions])
    assert none(completions=["4"], answer=["4"]) == [None]


@pytest.mark.parametrize(
    ("function", "answer", "message"),
    [
        (number_match, "many", "'many' holds no number"),
        (number_match, None, "answer 0 of 1 is missing"),
        (exact_match, " ", "answer 0 of 1 is missing"),
        (choice_match, "BC", "no letter"),
        (choice_match, "77", "no letter"),
    ],
)
def test_bad_answers(function, answer, message):
    with pytest.raises(ValueError, match=message):
        function(completions=["4"], answer=[answer])
    with pytest.raises(ValueError, match="2 completions, but 1 answers"):
        function(completions=["4", "4"], answer=["4"])
    with pytest.raises(TypeError, match="must be a text or messages"):
        function(completions=[[]], answer=["4"])


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match=r"pattern '\(' is no regular expression"):
        rewards.matches("(")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="0123456789,./-+%$eE{}\\ #boxedfrac", max_size=300))
def test_no_text_raises(text):
    rewards.number_in(text), rewards.parse_number(text), choice_in(text), rewards.final_answer(text)
    assert exact_match([text], ["x"]) in ([0.0], [1.0])


LONG = {"9": 100_000, "1,": 50_000, "\\boxed{": 20_000, "{": 50_000, "-": 100_000, "1e": 50_000, "####": 20_000}
LONG |= {"answer" + " " * 20_000 + "!": 1, "\\boxed" + " " * 20_000 + "x": 1, "#### " + "!" * 20_000: 1}
LONG |= {"\n- ": 30_000, "9 " + " " * 9_000 + "x": 1, " - 5": 30_000}
LONG |= {"\\frac{": 20_000, "A ": 50_000, "answer ": 20_000, "$ ": 50_000, "1/": 50_000, "1 /": 30_000}


@pytest.mark.parametrize("text", [part * times for part, times in LONG.items()], ids=[part[:12] for part in LONG])
def test_long_texts_take_no_time(text):
    start = time.process_time()
    rewards.number_in(text), rewards.parse_number(text), choice_in(text)
    assert time.process_time() - start < 2

"""Generated tasks: the right size, the answer in the context, and never twice the same."""

from __future__ import annotations

from random import Random

import pytest

from winnow.engine.evaluation.haystack import Haystack
from winnow.engine.evaluation.tasks import TASKS, Sample, sample

TEXT = " ".join(f"This is sentence number {i} about the matter of words{i % 7} and of things." for i in range(400))


def encode(text: str) -> list[int]:
    """A token for every three characters."""
    return list(range(-(-len(text) // 3)))


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(TEXT, encode)


@pytest.mark.parametrize("tokens", [300, 1000, 4000, 20_000])  # the last is longer than the text
@pytest.mark.parametrize("name", TASKS)
def test_samples(haystack: Haystack, name: str, tokens: int) -> None:
    one = sample(name, haystack, tokens, 0)
    assert 0.95 * tokens <= len(encode(one.context)) <= tokens
    assert one == sample(name, haystack, tokens, 0)
    assert one != sample(name, haystack, tokens, 1)
    for answer in one.answers:
        assert answer in one.context
        assert answer not in one.question
    assert one.score(f"They are {', '.join(one.answers)}.") == 1
    assert one.score(one.right) == 1
    assert one.right[0] == " "
    assert one.score("nothing of that") == 0


def test_scores_are_shares_of_whole_words() -> None:
    one = Sample("", "", ("12345", "Oslo"), "")
    assert one.score(" 12345, and 777") == 0.5
    assert one.score(" 123456 in oslo.") == 0.5
    assert one.score("Oslo 12345") == 1


def test_needles_keep_their_order_and_the_text_its_own(haystack: Haystack) -> None:
    needles = [f"Needle {i}." for i in range(5)]
    text = haystack.around(needles, 2000, Random(3))
    places = [text.index(needle) for needle in needles]
    assert places == sorted(places)
    for needle in needles:
        text = text.replace(f"{needle} ", "").replace(f" {needle}", "")
    start = haystack.sentences.index(text.split(". ")[0] + ".")
    assert text.split(". ")[:5] == [sentence.rstrip(".") for sentence in haystack.sentences[start : start + 5]]


def test_code_and_tables_are_no_sentences() -> None:
    prose, table, code = (
        "A sentence with quite enough words.",
        "| a | b | 12 | 13 | == | ++ | -- | 00 |",
        "x = y[3] + z{4} ** 17 - 9",
    )
    assert Haystack(f"{prose}\n\n{table}\n\n{code}", encode).sentences == [prose]

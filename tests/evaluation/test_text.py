"""The real text, and prompts cut out of it."""

from __future__ import annotations

import pytest

from winnow.engine.evaluation.text import PromptBook, corpus


def encode(text: str) -> list[int]:
    return [ord(char) for char in text]


def test_prompts_are_the_same_each_time_and_differ_from_the_start() -> None:
    text = "".join(map(chr, range(100, 400)))
    prompts = PromptBook(encode, text).prompts("together", 50, 64)
    assert prompts == PromptBook(encode, text).prompts("together", 50, 64)
    assert {len(prompt) for prompt in prompts} == {64}
    assert len({tuple(prompt[:10]) for prompt in prompts}) == 50


@pytest.mark.parametrize("tokens", [1, 7, 299, 300, 1500])  # shorter than the key's line; longer than the text
def test_prompts_have_exactly_so_many_tokens(tokens: int) -> None:
    book = PromptBook(encode, "".join(map(chr, range(100, 400))))
    assert len(book.prompt("any", tokens)) == tokens


def test_the_text_is_long_and_repeats_nothing() -> None:
    text = corpus()
    assert text == corpus()
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    assert len(text) > 300_000

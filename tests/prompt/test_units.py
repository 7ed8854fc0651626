"""How a context is cut, and which of its units a budget keeps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.engine.compression.prompt.policy import Context, Unit
from winnow.engine.compression.prompt.units import cut, keep_units, starts_of

UNITS: list[Unit] = ["word", "phrase", "sentence"]


def pieces(text: str, unit: Unit) -> list[str]:
    starts = starts_of(text, unit)
    return [text[first:last] for first, last in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", " Two!", " Three?", " Four"]),
        ("One line\nanother\n\n third", ["One line", "\nanother", "\n\n third"]),
        ("Dr. Finch met J. Lowell, e.g. at 3.14. Yes.", ["Dr. Finch met J. Lowell, e.g. at 3.14.", " Yes."]),
        ('He said "no." Then... nothing', ['He said "no."', " Then...", " nothing"]),
        ("Ende.\nAnfang.  ", ["Ende.", "\nAnfang.  "]),
        ("他来了。他走了！好", ["他来了。", "他走了！", "好"]),
        ("", [""]),
        ("   ", ["   "]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert pieces(text, "sentence") == sentences


def test_phrases_and_words() -> None:
    assert pieces("First, the second; third: 1,000. Dr. F.", "phrase") == [
        "First,",
        " the second;",
        " third:",
        " 1,000.",
        " Dr. F.",
    ]
    assert pieces("It's naïve, 数字 4.5!", "word") == ["It", "'", "s", " naïve", ",", " 数", "字", " 4", ".", "5", "!"]


@given(st.text(alphabet="aB .,!?\n。'\"\t", max_size=60), st.sampled_from(UNITS))
def test_nothing_is_lost(text: str, unit: Unit) -> None:
    starts = starts_of(text, unit)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert "".join(pieces(text, unit)) == text
    assert all(piece.strip() for piece in pieces(text, unit)) or not text.strip()


@pytest.mark.parametrize("run", [".", " ", "\n", "a", '!"', ". ", "。", "\n ", ",", "'"])
def test_long_runs_are_read_in_one_go(run: str) -> None:
    began = time.perf_counter()
    for unit in UNITS:
        starts_of(run * 50_000, unit)
    assert time.perf_counter() - began < 2  # a quadratic pattern takes minutes


def context(parts: list[str], ends: list[list[int]]) -> Context:
    firsts = np.cumsum([0, *map(len, parts)])
    every = np.concatenate([first + np.array(of, np.int64) for first, of in zip(firsts[:-1], ends, strict=True)])
    return Context("".join(parts), firsts[:-1], np.arange(len(every)), every, "")


def test_tokens_go_where_their_text_is() -> None:
    """A token of nothing but space belongs to what follows, one that ends with space to what it says."""
    of = cut(context(["One. Two.\nThree"], [[3, 4, 8, 10, 15]]), "sentence").of  # "One" "." " Two" ".\n" "Three"
    assert of.tolist() == [0, 0, 1, 1, 2]
    of = cut(context(["One.\nTwo"], [[4, 5, 8]]), "sentence").of  # "One." "\n" "Two"
    assert of.tolist() == [0, 1, 1]
    of = cut(context(["No end", "No end. Yes"], [[6], [3, 7, 11]]), "sentence").of
    assert of.tolist() == [0, 1, 1, 2]  # parts are never one unit


def test_tokens_of_one_character_stay_together() -> None:
    units = cut(context(["aé🦊b", "b"], [[1, 2, 2, 3, 3, 3, 4], [1]]), "token")
    assert units.of.tolist() == [0, 1, 1, 2, 2, 2, 3, 4]
    assert units.sizes.tolist() == [1, 2, 3, 1, 1]


def kept_one_by_one(scores: list[float], sizes: list[int], budget: int) -> list[bool]:
    keep = [False] * len(scores)
    spent = 0
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[i] == -np.inf or (spent and spent + sizes[i] > budget):
            break
        keep[i] = True
        spent += sizes[i]
    return keep


@given(
    st.lists(st.tuples(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf]), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 30),
)
def test_keep_units(units: list[tuple[float, int]], budget: int) -> None:
    scores, sizes = [score for score, _ in units], [size for _, size in units]
    keep = keep_units(np.array(scores), np.array(sizes), budget)
    wanted = kept_one_by_one(scores, sizes, budget)
    assert [kept for kept, size in zip(keep, sizes, strict=True) if size] == [
        kept for kept, size in zip(wanted, sizes, strict=True) if size
    ]
    more = keep_units(np.array(scores), np.array(sizes), budget + 1)
    assert not (keep & ~more).any()  # a larger budget never drops what a smaller one keeps

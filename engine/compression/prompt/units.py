"""Cutting a context into units, and filling a budget with the best of them.

    token     a token, or the tokens that share one character
    word      letters and digits in a row; any other sign, and any CJK character, for itself
    phrase    up to a punctuation mark
    sentence  up to the end of a sentence or of a line

The space between two units belongs to the later one, so that what is left reads on. Splitting needs no model of a
language; abbreviations are known for English.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from winnow.engine.compression.prompt.policy import Context, Floats, Ints, Unit, Units

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CLOSING = "[\"'”’»)\\]」』]*+"
# Text comes from callers and may be one long run: each run of signs or of space is looked at once, from its start.
_LINE = "(?P<line>(?<!\\s)[^\\S\\n]*+\\n)"
_SENTENCE = re.compile(f"(?<![.!?…])[.!?…]++{_CLOSING}(?=\\s)|(?<![。！？])[。！？]++{_CLOSING}|{_LINE}")
_PHRASE = re.compile(
    f"(?<![.!?…,;:])[.!?…,;:]++{_CLOSING}(?=\\s)|(?<![。！？，、；：])[。！？，、；：]++{_CLOSING}|{_LINE}"
)
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+|[^\\w\\s]")
_ABBREVIATION = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|No|Fig|Eq|Sec|cf|al|e\.g|i\.e|approx|Inc|Ltd|Co))$"
)


def cut(context: Context, unit: Unit) -> Units:
    """The units of all parts; none crosses from one part to the next."""
    if unit == "token":
        return _tokens(context)
    starts: list[int] = []
    for first, last in pairwise([*context.part_starts.tolist(), len(context.text)]):
        starts += [first + start for start in starts_of(context.text[first:last], unit)]
    units = Units(np.array(starts, np.int64), np.zeros(0, np.int64))
    return Units(units.starts, units.at(_ink_ends(context)))


def starts_of(text: str, unit: Unit) -> list[int]:
    """First characters of a text's words, phrases or sentences, 0 always among them."""
    if unit == "word":
        ends = [match.end() for match in _WORD.finditer(text)]
    else:
        matches = (_PHRASE if unit == "phrase" else _SENTENCE).finditer(text)
        ends = [match.start() if match["line"] else match.end() for match in matches if _is_end(match)]
    last = len(text.rstrip())
    return sorted({0, *(end for end in ends if end < last)})


def _is_end(match: re.Match[str]) -> bool:
    """Whether a full stop is one, and not an abbreviation's."""
    if not match[0].startswith(".") or match[0].startswith(".."):
        return True
    return _ABBREVIATION.search(match.string, max(0, match.start() - 8), match.start()) is None


def _ink_ends(context: Context) -> Ints:
    """[tokens] end of the last character of each token that is no space; of the token itself if all are."""
    is_ink = np.ones(len(context.text) + 1, bool)
    for match in re.finditer(r"\s+", context.text):
        is_ink[match.start() : match.end()] = False
    last_ink = np.maximum.accumulate(np.where(is_ink, np.arange(len(is_ink)), -1))[context.ends - 1]
    begins = np.concatenate(([0], context.ends[:-1]))
    return np.where(last_ink >= begins, last_ink + 1, context.ends)


def _tokens(context: Context) -> Units:
    """Tokens whose text ends at the same character are parts of it: half a character is no text."""
    is_new = np.diff(context.ends, prepend=-1) > 0
    return Units(np.concatenate(([0], context.ends[:-1]))[is_new], np.cumsum(is_new) - 1)


def keep_units(scores: Floats, sizes: Ints, budget: int) -> np.ndarray:
    """[units] bool: the best units, until the next one no longer fits `budget` tokens; the earlier one wins ties.

    The best is kept even where it is larger than the budget, unless its score is -inf, as is no unit's that is kept.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > -np.inf]
    total = np.cumsum(sizes[order])
    first = total[total > 0][:1].max(initial=0)
    keep = np.zeros(len(scores), bool)
    keep[order[total <= max(budget, first)]] = True
    return keep

"""Long contexts: sentences of real text, with sentences of ours between them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'(*`])|\n\s*\n")
_WORD = re.compile(r"[A-Za-z]{2,}")
TRIES = 12


class Haystack:
    """The sentences of a text, to be taken from any place on."""

    def __init__(self, text: str, encode: Callable[[str], list[int]]):
        sentences = dict.fromkeys(" ".join(sentence.split()) for sentence in _END.split(text))
        self.sentences = [sentence for sentence in sentences if _is_prose(sentence)]
        self._encode = encode
        self._ends = list(accumulate(len(sentence) + 1 for sentence in self.sentences))
        """Characters up to the end of each sentence"""

    def around(self, needles: Sequence[str], tokens: int, rng: Random) -> str:
        """A text of at most `tokens` tokens, and little less, with the needles in random places, in their order."""
        start, depths = rng.randrange(len(self.sentences)), sorted(rng.random() for _ in needles)
        chars = 4.0 * tokens
        for _ in range(TRIES):
            text = " ".join(_sprinkled(needles, depths, self._take(start, chars)))
            size = len(self._encode(text))
            if 0.97 * tokens <= size <= tokens:
                break
            chars *= 0.985 * tokens / size
        return text

    def fit(self, lines: Sequence[str], tokens: int) -> str:
        """As many of the lines, from the first on, as take no more than `tokens` tokens."""
        low, high = 1, len(lines)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self._encode("\n".join(lines[:middle]))) <= tokens else (low, middle - 1)
        return "\n".join(lines[:low])

    def _take(self, start: int, chars: float) -> list[str]:
        """Sentences of about `chars` characters, one after another from `start` on; after the last comes the first."""
        begin = self._ends[start - 1] if start else 0
        taken = self.sentences[start : bisect_left(self._ends, begin + chars) + 1]
        while (missing := chars - sum(map(len, taken))) > 0 and start + len(taken) >= len(self.sentences):
            taken += self.sentences[: bisect_left(self._ends, missing) + 1]
        return taken


def _sprinkled(needles: Sequence[str], depths: Sequence[float], sentences: list[str]) -> list[str]:
    text = list(sentences)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        text.insert(round(depth * len(sentences)), needle)
    return text


def _is_prose(sentence: str) -> bool:
    """Most of it is words: no tables, no code."""
    letters = sum(map(len, _WORD.findall(sentence)))
    return 30 <= len(sentence) <= 400 and letters >= 0.7 * len(sentence.replace(" ", ""))

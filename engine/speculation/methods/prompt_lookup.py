"""Prompt lookup: what followed the last time that the text ended like this (Saxena, 2023; LLMA, Yang et al., 2023,
arXiv:2304.04487).

    draft = text[i : i + tokens]   where text[i - n : i] = text[-n:], for the largest n, and of these the latest i

Prompt and output are one text. A draft that would run over the text's end goes on with its own beginning: where a text
repeats itself every p tokens, the guess is that it goes on doing so.

Each n-gram of an order n has a place in a table of that order, found by its hash; the place holds where the n-gram was
last continued. A place is looked at for the end of the text and written for each new token, so the cost of a token does
not depend on how long the text is. N-grams that fall into one place displace each other; what is found is compared with
the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.speculation.method import MethodParams, Tools

if TYPE_CHECKING:
    from winnow.engine.pages import Ints
    from winnow.engine.sequence import Sequence

LONGEST = 8
"""Of n-grams"""

_MULTIPLIERS = np.random.default_rng(0).integers(0, 1 << 63, LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
"""Multiply-shift hashing (Dietzfelbinger et al., 1997): odd factors, products wrap"""


class PromptLookup:
    """Guess what followed the last time that the text ended like this: for answers that repeat their prompt."""

    learns = False
    needs_draft = False

    class Params(MethodParams):
        ngram_max: int = Field(4, ge=1, le=LONGEST, description="tokens at the text's end that are looked up first")
        ngram_min: int = Field(2, ge=1, le=LONGEST, description="fewest tokens that must match")

        @model_validator(mode="after")
        def _in_order(self) -> PromptLookup.Params:
            if self.ngram_min > self.ngram_max:
                raise PydanticCustomError("order", "ngram_min must be at most ngram_max")
            return self

    def __init__(self, tools: Tools) -> None:
        self._texts: WeakKeyDictionary[Sequence, Continuations] = WeakKeyDictionary()

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        return [self._continuations(seq).after(seq.length, count) for seq, count in zip(seqs, most, strict=True)]

    def learn(self, seq: Sequence, read: Ints, likeliest: Ints) -> None:
        """Nothing, and is not called: the text itself says it all."""

    def _continuations(self, seq: Sequence) -> Continuations:
        if (known := self._texts.get(seq)) is None:
            knobs: Any = seq.speculation
            known = self._texts[seq] = Continuations(seq.tokens, knobs.ngram_max, knobs.ngram_min)
        return known


class Continuations:
    """Where each n-gram of a growing text was last continued."""

    def __init__(self, tokens: Ints, longest: int, shortest: int):
        """`tokens`: room for the whole text, written by its owner."""
        self._tokens = tokens
        self._orders = range(longest, shortest - 1, -1)
        self._bits = max(6, (2 * len(tokens) - 1).bit_length())
        self._places = np.zeros((longest + 1, 1 << self._bits), np.int32)
        """[order, place]: index of the token that followed; 0 is none"""
        self._known = 1
        """The n-grams that end before this token have been noted"""

    def after(self, length: int, count: int) -> Ints:
        """Up to `count` tokens that may follow tokens[:length]."""
        self._note(length)
        tokens = self._tokens
        for order in self._orders:
            if order >= length:
                continue
            end = tokens[length - order : length]
            at = int(self._places[order, self._hash(end)])
            if at and np.array_equal(tokens[at - order : at], end):
                return tokens[at + np.arange(count) % (length - at)]
        return tokens[:0]

    def _note(self, length: int) -> None:
        for order in self._orders:
            first = max(self._known, order)
            if first < length:
                ngrams = sliding_window_view(self._tokens[first - order : length - 1], order)
                self._places[order, self._hash(ngrams)] = np.arange(first, length, dtype=np.int32)  # the last one stays
        self._known = length

    def _hash(self, ngrams: Ints) -> NDArray[np.uint64]:
        """[..., order] -> [...] places."""
        mixed = ngrams.astype(np.uint64) * _MULTIPLIERS[: ngrams.shape[-1]]
        hashed: NDArray[np.uint64] = mixed.sum(-1, dtype=np.uint64) >> np.uint64(64 - self._bits)
        return hashed

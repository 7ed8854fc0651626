"""Speculative decoding with a draft model (Leviathan et al., 2023, arXiv:2211.17192).

    draft = d1, d2, ...     di = what the draft model says after text, d1, ..., d(i-1)

The draft model says it as the request is sampled: with its temperature, filters and penalties, and at the very place of
the distribution that the target's own draw of that token will take (`sampling.SamplingBatch.uniform`). Where the two
models agree on a distribution they therefore say the same token, sampled ones too.

All requests guess together: one pass of the draft model for the first token of all of them, one for the second, and so
on. A text's first pass reads what it has not read of it, a whole prompt at first, no more tokens than a step of the
engine has; until it has caught up nothing is guessed for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from winnow.engine.speculation.method import MethodParams, Tools

if TYPE_CHECKING:
    from winnow.engine.draft import Follower
    from winnow.engine.pages import Ints
    from winnow.engine.sequence import Sequence


class DraftModel:
    """Guess what a smaller model says, sampled like the request: for any text, at the cost of running that model."""

    learns = False
    needs_draft = True

    class Params(MethodParams):
        pass

    def __init__(self, tools: Tools) -> None:
        assert tools.draft is not None
        self._draft, self._table, self._sampler = tools.draft, tools.table, tools.sampler
        self._most_rows = tools.draft.engine.settings.max_step_tokens

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        # What the draft model cannot read it cannot continue.
        rooms = {seq: min(count, self._draft.max_len - seq.length + 1) for seq, count in zip(seqs, most, strict=True)}
        followers = self._draft.follow([seq for seq in seqs if rooms[seq] > 0])
        guessing = [follower for follower in followers if follower is not None]
        while guessing:
            guessing = self._guess(guessing)
            guessing = [follower for follower in guessing if len(follower.guess) < rooms[follower.target]]
        guesses = {follower.target: follower.guess for follower in followers if follower is not None}
        return [np.array(guesses.get(seq, []), np.int32) for seq in seqs]

    def learn(self, seq: Sequence, read: Ints, likeliest: Ints) -> None:
        """Nothing, and is not called: the model has learnt what it knows."""

    def _guess(self, followers: list[Follower]) -> list[Follower]:
        """One more token for each; returns those that have one."""
        read, logits = self._draft.read(followers, self._most_rows)
        if not read:
            return []
        slots = np.array([follower.target.slot for follower in read], np.int64)
        batch = self._table.batch(slots, [np.array(follower.guess, np.int32) for follower in read], last_only=True)
        sampled = self._sampler.sample(logits, replace(batch, logprobs=np.full_like(batch.logprobs, -1)))
        for follower, token in zip(read, sampled.tokens.tolist(), strict=True):
            target = follower.target
            target.tokens[target.length + len(follower.guess)] = token  # where the draft model reads it next
            follower.guess.append(token)
        return read

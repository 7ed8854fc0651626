"""The draft model: a small model with the target's vocabulary, in an engine of its own beside the target's.

It says what may come next (`speculation.methods.draft`), goes on with prompts before they are read (policies that look
ahead), and reads prompts that are to be shortened. The last two are requests of its engine. What it has read of a
running text is kept in its arena as well, so that it reads each token once; these pages go when its requests need them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from winnow.engine.answers import Answers
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import prompt_policy
from winnow.engine.errors import PromptTooLong
from winnow.engine.messages import Output, SamplingParams, Shorten, Submit
from winnow.engine.pages import Ints, OutOfPages
from winnow.engine.recital import Recital
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence, reading

if TYPE_CHECKING:
    from winnow.engine.engine import Engine


@dataclass(eq=False)
class Follower:
    """How far the draft model has read a running text, and what it takes for its next tokens."""

    target: Sequence
    reader: Sequence
    """Reads the target's own tokens, and its guesses behind them"""
    known: int = 0
    """Tokens of the text when the guess was made"""
    guess: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that it must read before it can say another one."""
        return self.target.length + len(self.guess) - self.reader.computed

    def rewind(self) -> int:
        """Forgets the guess; returns how many of the tokens that were read did not become the text's, or are its last
        one, which is read again for what follows it."""
        reader, target = self.reader, self.target
        said = target.tokens[self.known : min(target.length, self.known + len(self.guess))]
        is_right = said == np.array(self.guess[: len(said)], np.int32)
        right = len(said) if is_right.all() else int(is_right.argmin())
        surplus = max(0, reader.computed - min(self.known + right, target.length - 1))
        reader.computed -= surplus
        self.known, self.guess = target.length, []
        return surplus


class Draft:
    """Belongs to one engine, whose texts it follows."""

    def __init__(self, engine: Engine):
        """
        Args
            engine: of the draft model
        """
        self.engine = engine
        self.max_len = engine.max_model_len
        """Longest text that it reads"""
        self._arena, self._cache, self._runner = engine.arena, engine.cache, engine.runner
        self._followers: dict[Sequence, Follower] = {}
        self._ahead: dict[str, tuple[Sequence, list[int]]] = {}
        """request id -> who waits, and what was said so far"""
        engine.pressure.spare = self._give_way

    # Its own requests -------------------------------------------------------------------------------------------------

    def look_ahead(self, seq: Sequence, most: int) -> None:
        """Finds out up to `most` tokens that may follow the prompt of a sequence, which waits for them. PromptTooLong
        where it cannot read as much."""
        count = min(most, seq.sampling.max_tokens)
        if seq.prompt_tokens + count > self.max_len:
            path = "compression.kv.evict.policy"
            asked = f"{seq.prompt_tokens} prompt tokens and {count} ahead exceed the draft model's {self.max_len}"
            raise PromptTooLong(path, f"{path}: {asked}")
        sampling = SamplingParams(temperature=0.0, max_tokens=count, stop_token_ids=seq.sampling.stop_token_ids)
        prompt = seq.tokens[: seq.prompt_tokens].tolist()
        self.engine.submit(Submit(seq.request_id, prompt, sampling, cache_salt=seq.salt))
        self._ahead[seq.request_id] = seq, []

    def reads(self, request: Shorten) -> bool:
        """Whether a prompt is shortened by what a model finds in it. RequestError where the plan is wrong."""
        plan = Plan.parse({"prompt": request.plan}).prompt
        return plan is not None and prompt_policy(plan.policy).signal.reads_prompt

    def step(self, scheduler: Scheduler, answers: Answers) -> None:
        """One step of its own requests. Who has waited for them is added to `scheduler`; what there is to tell goes to
        `answers`."""
        self._settle()
        for output in self.engine.step() if self.engine.can_step else ():
            if isinstance(output, Output):
                seq, said = self._ahead[output.request_id]
                said += output.token_ids
                if output.finish_reason is not None:
                    del self._ahead[output.request_id]
                    for choice in (seq, *seq.siblings):
                        choice.recital = Recital([np.array(said, np.int32)])
                    scheduler.add(seq)
            else:
                self._ahead.pop(output.request_id, None)
                answers.tell([output])

    def forget(self, request_id: str) -> None:
        self._ahead.pop(request_id, None)
        self.engine.abort(request_id)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that wait for what comes behind their prompts."""
        return [seq for seq, _ in self._ahead.values()]

    # Texts that run ---------------------------------------------------------------------------------------------------

    def follow(self, seqs: list[Sequence]) -> list[Follower | None]:
        """How far each text is read, its latest tokens known; None for one that there is no room for now."""
        followers = [self._followers.get(seq) or self._begin(seq) for seq in seqs]
        found = [follower for follower in followers if follower is not None]
        surplus = np.array([follower.rewind() for follower in found], np.int32)
        if surplus.any():
            self._arena.truncate(_slots(found), surplus)
        return followers

    def read(self, followers: list[Follower], most: int) -> tuple[list[Follower], Tensor]:
        """One pass of the model over what is unread of these texts, `most` tokens together.

        Returns those that have now been read to their end, and [R, vocab] what may follow each. The newest are let go
        where pages run out.
        """
        chunks: list[tuple[Follower, int]] = []
        for follower in followers:
            count = min(most, follower.left)
            most -= count
            if count:
                chunks.append((follower, count))
        while chunks:
            counts = np.array([count for _, count in chunks], np.int32)
            try:
                self._arena.extend(_slots([follower for follower, _ in chunks]), counts)
                break
            except OutOfPages:
                self._let_go(chunks.pop()[0])
        else:
            return [], torch.empty(0)
        readers = [follower.reader for follower, _ in chunks]
        logits = self._runner.run(ScheduledBatch(readers, counts, np.zeros_like(counts)))
        for follower, count in chunks:
            self._advance(follower, count)
        rows = [row for row, (follower, _) in enumerate(chunks) if not follower.left]
        return [chunks[row][0] for row in rows], logits if len(rows) == len(chunks) else logits[rows]

    def _settle(self) -> None:
        """Lets go of texts that run no longer."""
        for follower in [follower for follower in self._followers.values() if not follower.target.is_running]:
            self._let_go(follower)

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle and not self._followers

    def _begin(self, seq: Sequence) -> Follower | None:
        arena, cache = self._arena, self._cache
        free = arena.free_count + (0 if cache is None else cache.reclaimable())
        if not arena.free_slots or arena.lanes * (arena.layout.pages(seq.length) + 1) > free:
            return None
        reader = reading(seq.request_id, seq.tokens, seq.prompt_tokens, seq.arrival, arena.layout)
        reader.slot = arena.open_slot(reader.timeline.fmt)
        if cache is not None:
            hits = cache.match(seq.block_keys[: (seq.length - 1) // cache.block_tokens])
            if hits is not None:
                reader.computed = hits.shape[-1] * cache.block_tokens
                arena.adopt(reader.slot, hits, reader.computed)
        follower = self._followers[seq] = Follower(seq, reader, seq.length)
        return follower

    def _advance(self, follower: Follower, count: int) -> None:
        reader, before = follower.reader, follower.reader.computed
        reader.advance(count)
        if self._cache is not None and before < reader.prompt_tokens <= reader.computed:
            self._cache.publish(follower.target.block_keys, reader.slot)

    def _let_go(self, follower: Follower) -> None:
        del self._followers[follower.target]
        self._arena.close_slot(follower.reader.slot)

    def _give_way(self) -> bool:
        """Lets go of the text that was begun last; false if there is none."""
        if not self._followers:
            return False
        self._let_go(self._followers[next(reversed(self._followers))])
        return True


def _slots(followers: list[Follower]) -> Ints:
    return np.array([follower.reader.slot for follower in followers], np.int32)

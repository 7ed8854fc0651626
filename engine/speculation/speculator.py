"""Lossless speculative decoding (Leviathan et al., 2023, arXiv:2211.17192): several tokens in one pass of the model.

A sequence's step reads its last token and a guess of what follows. Every row is then sampled as plain decoding would
sample it there: what is drawn depends on the row's logits, the request's seed and the token's number, and on nothing
else (`sampler`), and a row has the same logits however many are read with it (`kernels.dispatch`). So as long as the
guess equals what was drawn, the next row is the one that plain decoding would have computed, to the last bit; behind
the first difference rows mean nothing, and their keys and values are dropped.

    read      last   g1   g2   g3          g1 = d1, g2 != d2: d1 and d2 are said, g2 and g3 are dropped
    drawn      d1    d2   d3   d4

Answers are therefore the same tokens with and without speculation, sampled ones too: there is no rejection sampling,
which would preserve their distribution only.

Guesses go no further than the next event of a sequence's timeline, than the queries that vote at it, than what the
request may still say, and never cost anybody pages: the scheduler drops them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.compression.side_state import SideState
from winnow.engine.pages import Ints, PageArena
from winnow.engine.sampler import Draw, Sampled
from winnow.engine.scheduler import ScheduledBatch
from winnow.engine.sequence import KNOWN, Sequence
from winnow.engine.speculation.method import Drafter, Tools
from winnow.engine.speculation.registry import drafter_class
from winnow.kernels.host import to_device

POSITIONS = 32
"""Places in a guess that are counted one by one"""


@dataclass
class SpeculationCounters:
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * POSITIONS)
    """How often the first, second, ... token of a guess was right"""

    def count(self, draw: Draw) -> None:
        if draw.guessed:
            self.drafts += 1
            self.draft_tokens += draw.guessed
            self.accepted_tokens += draw.accepted
            for place in range(draw.accepted):
                self.accepted_at[place] += 1


class Speculator:
    """Guesses before a step, verifies after it."""

    def __init__(self, arena: PageArena, side: SideState, tools: Tools):
        self._arena = arena
        self._side = side
        self._tools = tools
        self._table, self._sampler = tools.table, tools.sampler
        self._drafters: dict[str, Drafter] = {}
        self.counters = SpeculationCounters()

    def propose(self, running: list[Sequence]) -> None:
        """Writes guesses behind the texts of those that asked for them and have but one token to read, which must be
        known."""
        eager = [seq for seq in running if seq.speculation is not None and seq.is_decoding and seq.unread == KNOWN]
        for method, group in _by_method(eager):
            most = [_room(seq) for seq in group]
            for seq, draft in zip(group, self._drafter(method).propose(group, most), strict=True):
                seq.drafted = len(draft)
                seq.tokens[seq.length : seq.length + seq.drafted] = draft

    def verify(self, batch: ScheduledBatch, logits: Tensor) -> dict[Sequence, Draw]:
        """What the sequences with guesses say. Their other rows leave the lanes and `batch.counts`."""
        where = np.flatnonzero(batch.is_speculative)
        if not len(where):
            return {}
        seqs = [batch.seqs[b] for b in where]
        sizes = batch.counts[where].astype(np.int64)
        starts = sizes.cumsum() - sizes
        place = np.arange(sizes.sum()) - np.repeat(starts, sizes)
        rows = torch.from_numpy(np.repeat(batch.logit_rows[where], sizes) + place)
        logits = logits[to_device(rows, logits.device)]
        read = [seq.tokens[seq.computed : seq.computed + size] for seq, size in zip(seqs, sizes, strict=True)]
        slots = np.array([seq.slot for seq in seqs], np.int32)
        sampled = self._sampler.sample(
            logits, self._table.batch(slots.astype(np.int64), [tokens[1:] for tokens in read])
        )

        # The row after each row is that of the token which was guessed; after a sequence's last row nothing was.
        guess = np.roll(np.concatenate(read), -1)
        is_right = (guess == sampled.tokens) & ~sampled.bad
        is_right[starts + sizes - 1] = False
        right = np.minimum.reduceat(np.where(is_right, len(place), place), starts)
        draws = {
            seq: _draw(seq, sampled, start, int(matches), int(size) - 1)
            for seq, start, matches, size in zip(seqs, starts.tolist(), right, sizes, strict=True)
        }
        self._learn(seqs, read, logits)
        self._drop(batch, where, slots, np.array([len(draw.tokens) for draw in draws.values()], np.int32))
        return draws

    def _drop(self, batch: ScheduledBatch, where: NDArray[np.int64], slots: Ints, said: Ints) -> None:
        """Takes the rows that nobody will hear of out of the lanes."""
        surplus = batch.counts[where] - said
        is_cut = surplus > 0
        if is_cut.any():
            self._arena.truncate(slots[is_cut], surplus[is_cut])
            for b, count in zip(where[is_cut].tolist(), said[is_cut].tolist(), strict=True):
                self._side.truncated(batch.seqs[b], batch.seqs[b].computed + count)
        batch.counts[where] = said

    def _learn(self, seqs: list[Sequence], read: list[Ints], logits: Tensor) -> None:
        learning = [seq.speculation is not None and self._drafter(seq.speculation.method).learns for seq in seqs]
        if not any(learning):
            return
        ends = np.cumsum([len(tokens) for tokens in read])
        likeliest = np.split(logits.argmax(1).cpu().numpy().astype(np.int32), ends[:-1])
        for seq, learns, tokens, after in zip(seqs, learning, read, likeliest, strict=True):
            if learns and seq.speculation is not None:
                self._drafter(seq.speculation.method).learn(seq, tokens, after)

    def _drafter(self, method: str) -> Drafter:
        if method not in self._drafters:
            self._drafters[method] = drafter_class(method)(self._tools)
        return self._drafters[method]


def _by_method(seqs: list[Sequence]) -> Iterator[tuple[str, list[Sequence]]]:
    groups: dict[str, list[Sequence]] = {}
    for seq in seqs:
        if seq.speculation is not None:
            groups.setdefault(seq.speculation.method, []).append(seq)
    yield from groups.items()


def _room(seq: Sequence) -> int:
    """Tokens that may be guessed: see this module's first lines."""
    assert seq.speculation is not None
    behind = seq.computed + 1
    unsaid = seq.sampling.max_tokens - seq.generated - 1
    event = min(seq.chunk_end, seq.vote_start)
    return max(0, min(seq.speculation.tokens, unsaid, event - behind))


def _draw(seq: Sequence, sampled: Sampled, start: int, right: int, guessed: int) -> Draw:
    """From the rows of one sequence, which begin at `start` and of whose guesses the first `right` hold."""
    tokens = sampled.tokens[start : start + right + 1].tolist()
    ends = (i + 1 for i, token in enumerate(tokens) if seq.stops_at(token, seq.generated + i + 1))
    said = next(ends, len(tokens))
    return sampled.draw(start, said, guessed, min(said, right))

"""Who runs in the next step, and with how many tokens.

Decode tokens come first, then prompt chunks in order of arrival; waiting sequences join while there are slots, tokens
and pages. When pages run out the newest sequence is preempted: it loses what was computed, keeps its tokens, and reads
them again later through the same states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from winnow.engine.compression.side_state import SideState
from winnow.engine.compression.timeline import NEVER
from winnow.engine.forced import Span, forced_rows, forced_spans
from winnow.engine.messages import CompressionReport
from winnow.engine.pages import Ints, OutOfPages, PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.sampling import SamplingTable
from winnow.engine.sequence import Sequence


@dataclass
class ScheduledBatch:
    """One step's sequences and the number of tokens that each computes."""

    seqs: list[Sequence]
    counts: Ints
    """[B]"""
    drafts: Ints
    """[B] how many of them, the last ones, were guessed"""
    more_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[M] rows of the step, beside the sequences' last ones, whose logits are wanted"""
    forced: list[Span] = field(default_factory=list)
    """What those are wanted for"""

    @property
    def is_speculative(self) -> NDArray[np.bool_]:
        """[B] sequences whose rows are verified: guesses, or a last token that a guess may learn from."""
        return np.array([seq.speculation is not None and seq.is_decoding and seq.under_way > 0 for seq in self.seqs])

    @property
    def logit_rows(self) -> NDArray[np.int64]:
        """[B] each sequence's first row in the logits of the step: it has one for its last known token and for each
        guess."""
        sizes = self.drafts.astype(np.int64) + 1
        return sizes.cumsum() - sizes

    @property
    def slots(self) -> Ints:
        return np.array([seq.slot for seq in self.seqs], np.int32)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


@dataclass
class SchedulerCounters:
    preemptions: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    document_hit_tokens: int = 0
    document_queried_tokens: int = 0


class Scheduler:
    """Owns the queue and the running set; the arena's pages are taken and given back here and by the compressor."""

    def __init__(
        self,
        arena: PageArena,
        cache: PrefixCache | None,
        table: SamplingTable,
        max_step_tokens: int,
        side: SideState,
        squeeze: Callable[[Iterable[Sequence]], bool],
        propose: Callable[[list[Sequence]], None],
    ):
        """
        Args
            side: has room made for what sequences note of the tokens that they are about to compute
            squeeze: finds out who of the sequences is over, or compresses one of these further; false if neither is
                to be done
            propose: guesses what sequences will say next
        """
        self._arena = arena
        self._cache = cache
        self._table = table
        self._max_step_tokens = max_step_tokens
        self._side = side
        self._squeeze = squeeze
        self._propose = propose
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival"""
        self.counters = SchedulerCounters()

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def sequences(self) -> Iterator[Sequence]:
        """All sequences that are not over, choices that wait for their first one included."""
        for seq in (*self.running, *self.waiting):
            yield seq
            yield from seq.siblings

    def schedule(self) -> ScheduledBatch:
        """Takes the pages of the next step's tokens; an empty batch means that nobody can run."""
        self._propose(self.running)
        self._admit()
        chosen = self._choose()
        while chosen:
            slots = np.array([seq.slot for seq, _ in chosen], np.int32)
            counts = np.array([count for _, count in chosen], np.int32)
            growth = self._growth(chosen)
            beside = sum(self._side.pages_to_extend(seq, count) for seq, count in chosen)
            if self._make_free(int(self._arena.pages_to_extend(slots, growth).sum()) + beside):
                break
            if any(seq.drafted for seq, _ in chosen):
                self._forget_drafts()
            elif not self._squeeze(self.running):
                self.preempt(self.running[-1])
            chosen = self._choose()
        if not chosen:
            return ScheduledBatch([], np.zeros(0, np.int32), np.zeros(0, np.int32))
        self._arena.extend(slots, growth)
        for seq, count in chosen:
            self._side.prepare(seq, count)
            seq.under_way = count
        drafts = np.array([seq.drafted for seq, _ in chosen], np.int32)
        batch = ScheduledBatch([seq for seq, _ in chosen], counts, drafts)
        batch.forced = forced_spans(batch)
        batch.more_rows = forced_rows(batch.forced)
        return batch

    def _choose(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens) of the next step: no chunk crosses an event of its sequence's timeline."""
        left = self._max_step_tokens
        unclaimed = left - sum(seq.remaining == 1 for seq in self.running)
        chosen = []
        for is_decode in (True, False):
            for seq in self.running:
                if seq.remaining and (seq.remaining == 1) is is_decode and left > 0:
                    # Guesses have what nobody's known tokens need.
                    seq.drafted = min(seq.drafted, max(0, unclaimed))
                    unclaimed -= seq.drafted
                    known = seq.chunk(left)
                    chosen.append((seq, known + seq.drafted))
                    left -= known + seq.drafted
        return chosen

    def _forget_drafts(self) -> None:
        for seq in self.running:
            seq.drafted = 0

    def _growth(self, chosen: list[tuple[Sequence, int]]) -> Ints:
        """[B, layers] tokens that lanes gain, or [B, 1] where all layers of all sequences gain alike."""
        return np.stack(np.broadcast_arrays(*(seq.growth(count) for seq, count in chosen)))

    def _admit(self) -> None:
        """Starts waiting sequences, oldest first, while what they will hold at their peak fits beside the others."""
        busy = sum(min(seq.remaining, self._max_step_tokens) for seq in self.running)
        if not self.waiting:
            return
        outstanding = sum(map(self._outstanding, self.running))
        while self.waiting and busy < self._max_step_tokens:
            seq = self.waiting[0]
            promised = sum(len(other.siblings) for other in self.running)
            if self._arena.free_slots - promised < 1 + len(seq.siblings):
                return
            # What is found is in use from here on, so that it does not count as pages that could be given back.
            self._start(seq)
            hit_tokens, found = seq.computed, seq.has_question and seq.computed == seq.document_tokens
            room = self._make_room(outstanding + self._outstanding(seq))
            if not seq.is_running:  # another choice of its request is lost, and it with that
                return
            if room is None:
                self._stop(seq)
                return
            outstanding = room
            self.waiting.popleft()
            if not seq.sampled:
                seq.cached_tokens, seq.found_document = hit_tokens, found
                self.counters.hit_tokens += hit_tokens
                self.counters.queried_tokens += seq.length
                if seq.document_key:
                    self.counters.document_hit_tokens += seq.document_tokens * found
                    self.counters.document_queried_tokens += seq.document_tokens
            busy += min(seq.remaining, self._max_step_tokens)

    def _make_room(self, outstanding: int) -> int | None:
        """Sees to it that those who run can all reach their peak, if need be by compressing some of them further.

        Returns the pages that they will still take, given as `outstanding`; None if there is no room. One alone always
        has room.
        """
        while len(self.running) > 1 and not self._make_free(outstanding):
            if not self._squeeze(self.running):
                return None
            outstanding = sum(map(self._outstanding, self.running))
        return outstanding

    def _outstanding(self, seq: Sequence) -> int:
        """Pages that a sequence will still take to read what it knows, before its plan gives any back."""
        if seq.reciting is None and seq.remaining <= 1:
            return self._arena.lanes + self._side.pages_to_extend(seq, 1)  # the next page of each lane
        if seq.computed >= seq.document_tokens:
            more = min(seq.length, seq.chunk_end) - seq.computed
        else:
            more = seq.timeline.peak_tokens - int(self._arena.kept[seq.slot].max())
        if seq.recital is not None and seq.computed <= seq.document_tokens:
            more += seq.recital.growth
        count = max(1, more)
        growth = np.array([count], np.int32)
        if seq.staging is not None:  # what later stages will read is not known yet: at most what this one does
            count, growth = seq.staging.left, seq.staging.growth(seq.staging.left, len(seq.staging.rows))
        pages = self._arena.pages_to_extend(np.array([seq.slot], np.int32), growth[None])
        return int(pages[0]) + self._side.pages_to_extend(seq, count, growth) + self._arena.lanes

    def _make_free(self, pages: int) -> bool:
        """Sees to it that so many pages are free; if that cannot be, the prefix cache keeps what it has."""
        missing, ranks = pages - self._arena.free_count, self._arena.ranks
        if ranks.most(missing) <= 0:
            return True
        if self._cache is None or ranks.most(missing - self._cache.reclaimable()) > 0:
            return False
        self._arena.reclaim(missing)
        return True

    def _start(self, seq: Sequence) -> None:
        """Begins with what the prefix cache has: the compressed document, or blocks of the prompt."""
        seq.restart()  # also sets where its queries begin to vote
        seq.slot = self._arena.open_slot(seq.timeline.fmt, seq.timeline.rest)
        if not self._adopt_document(seq) and (blocks := self._match(seq)) is not None:
            seq.computed = blocks.shape[-1] * self._arena.layout.page_tokens
            self._arena.adopt(seq.slot, blocks, seq.computed)
        self._admit_sampling(seq)
        self.running.append(seq)
        self.running.sort(key=lambda other: (other.arrival, other.index))

    def _adopt_document(self, seq: Sequence) -> bool:
        """False where it is not cached, or no pages are there for a copy of its side state."""
        document = self._cache.document(seq.document_key) if self._cache is not None and seq.document_key else None
        if document is None:
            return False
        try:
            self._arena.restore(seq.slot, document.lanes)
        except OutOfPages:
            return False
        seq.begin_behind_document(document.positions_known, document.turned_back)
        return True

    def _match(self, seq: Sequence) -> Ints | None:
        """Cached pages that the sequence may start with: at least one token is left to compute, and every query that
        a policy or a probe must see. None for a prompt read in stages: what its lower layers hand on is in no page."""
        if self._cache is None or not seq.block_keys or seq.stages is not None:
            return None
        return self._cache.match(seq.block_keys[: seq.first_needed // self._cache.block_tokens])

    def _admit_sampling(self, seq: Sequence) -> None:
        prompt, output = seq.tokens[: seq.prompt_tokens], seq.tokens[seq.prompt_tokens : seq.length]
        self._table.admit(seq.slot, seq.sampling, seq.seed, prompt.tolist(), output.tolist())

    def fork(self, seq: Sequence) -> list[Sequence]:
        """Starts the other choices of a request at the state that the first has reached; admission kept their slots.

        A choice for whose side state there are no pages waits, as if it had been preempted. Returns those that started.
        """
        siblings, seq.siblings = seq.siblings, []
        if not siblings:
            return []
        started = [sibling for sibling in siblings if self._fork(seq, sibling)]
        late = [sibling for sibling in siblings if not sibling.is_running]
        self.waiting.extendleft(reversed(late))
        self.counters.preemptions += len(late)
        self.running.sort(key=lambda other: (other.arrival, other.index))
        return started

    def _fork(self, seq: Sequence, sibling: Sequence) -> bool:
        if self._make_free(self._arena.ballast(seq.slot)):
            sibling.slot = self._arena.open_slot(sibling.timeline.fmt, sibling.timeline.rest)
            self._arena.fork(seq.slot, sibling.slot)
            sibling.computed, sibling.vote_start = seq.computed, seq.vote_start
            sibling.plan, sibling.timeline = seq.plan, seq.timeline
            sibling.squeezed_at, sibling.calm = seq.squeezed_at, seq.calm
            if sibling.recital is not None:
                sibling.recital.skip()
            sibling.positions_known, sibling.turned_back = seq.positions_known, seq.turned_back
            sibling.cached_tokens, sibling.found_document = seq.cached_tokens, seq.found_document
            self._admit_sampling(sibling)
            self.running.append(sibling)
        return sibling.is_running

    def with_pages(self, compress: Callable[[Sequence], None], seq: Sequence) -> None:
        """Compresses a sequence; where that takes pages that are not there, others give way, or at last it itself."""
        while seq.is_running:
            try:
                return compress(seq)
            except OutOfPages:
                others = [other for other in self.running if other is not seq]
                # Whoever stands at an event may not have come to it yet: a squeeze would come before it.
                calm = [other for other in others if not other.timeline.acts_at(other.computed)]
                if not self._squeeze(calm):
                    self.preempt(others[-1] if others else seq)

    def report(self, seq: Sequence) -> CompressionReport:
        """What a running sequence holds now. Tokens of pictures that it does not read are seen, and not kept."""
        image_tokens, kept = (0, 0) if seq.sight is None else (seq.sight.tokens, len(seq.sight.rows))
        dropped = image_tokens - kept
        return msgspec.structs.replace(
            self._arena.report(seq.slot, seq.computed + dropped),
            squeezed_at=None if seq.squeezed_at == NEVER else seq.squeezed_at,
            document_tokens=seq.document_tokens if seq.has_question else 0,
            found_document=seq.found_document,
            image_tokens=image_tokens,
            image_tokens_kept=kept,
        )

    def withdraw(self, seq: Sequence) -> None:
        """Takes a sequence out of the step that is under way, if it is in it: its rows leave its lanes."""
        if seq.under_way:
            self._arena.truncate(np.array([seq.slot], np.int32), np.array([seq.under_way], np.int32))
            self._side.withdrawn(seq)
            seq.under_way = 0

    def preempt(self, seq: Sequence) -> None:
        """Takes a running sequence's pages; it is the next to be admitted again."""
        if seq.generated:  # it may end before it runs again, by a stop string
            seq.last_report = self.report(seq)
        self._stop(seq)
        self.waiting.appendleft(seq)
        self.counters.preemptions += 1

    def remove(self, seq: Sequence) -> None:
        """Ends a sequence wherever it is; a first choice that ends before its prompt was read leaves no heir."""
        if seq.is_running:
            self._stop(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        else:
            for first in (*self.running, *self.waiting):
                if seq in first.siblings:
                    first.siblings.remove(seq)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._table.release(seq.slot)
        self._arena.close_slot(seq.slot)
        seq.restart()

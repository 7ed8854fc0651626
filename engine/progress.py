"""How far a step has brought its sequences, before any of them says what comes next."""

from __future__ import annotations

import logging

from torch import Tensor

from winnow.engine.answers import Answers
from winnow.engine.compression.apply import Compressor
from winnow.engine.compression.pressure import Pressure
from winnow.engine.forced import Observer, forced_outputs
from winnow.engine.pages import PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.recital import end_parts
from winnow.engine.sampler import Draw
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence
from winnow.engine.speculation.speculator import Speculator

log = logging.getLogger(__name__)


class Progress:
    """Verifies guesses, publishes prompts that were read, and carries out the plans that are due."""

    def __init__(
        self,
        scheduler: Scheduler,
        arena: PageArena,
        cache: PrefixCache | None,
        compressor: Compressor,
        pressure: Pressure,
        speculator: Speculator,
        answers: Answers,
    ):
        self._scheduler = scheduler
        self._arena = arena
        self._cache = cache
        self._compressor = compressor
        self._pressure = pressure
        self._speculator = speculator
        self._answers = answers
        self.on_forced: Observer | None = None

    def note(self, batch: ScheduledBatch, logits: Tensor) -> dict[Sequence, Draw]:
        """After a step's rows have been computed. Returns what those say whose guesses were verified."""
        self._answers.tell(forced_outputs(batch.forced, logits[len(logits) - len(batch.more_rows) :], self.on_forced))
        said = self._speculator.verify(batch, logits)
        members = [(seq, count) for seq, count in zip(batch.seqs, batch.counts.tolist(), strict=True) if seq.under_way]
        for seq, count in members:
            before = seq.computed
            seq.advance(count)
            intact = seq.timeline.intact_tokens
            if before < intact <= seq.computed and self._cache is not None and seq.stages is None:
                self._cache.publish(seq.block_keys[: intact // self._cache.block_tokens], seq.slot)
        end_parts([seq for seq, _ in members], self._arena)
        for seq, _ in members:
            try:
                self._carry_out(seq)
            except Exception:  # one plan's failure is its own request's
                if self._arena.ranks.size > 1:
                    raise  # and maybe not the other ranks'
                log.exception("the plan of request %s failed", seq.request_id)
                self._answers.lose(seq.request_id, "the engine failed to compress this request")
        return said

    def _carry_out(self, seq: Sequence) -> None:
        """A sequence that is preempted here loses its place in this step; it will sample the same token later."""
        while seq.is_running and seq.ends_a_stage:
            self._scheduler.with_pages(self._compressor.end_stage, seq)
        if seq.is_running and seq.stands_at_an_event:
            self._scheduler.with_pages(self._compressor.apply, seq)
        if seq.is_running and seq.is_to_be_squeezed and seq.reciting is None:
            self._scheduler.with_pages(self._pressure.squeeze, seq)

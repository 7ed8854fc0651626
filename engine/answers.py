"""What there is to tell of requests: tokens as they are said, how choices ended, what was lost."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

from winnow.engine.facts import Totals
from winnow.engine.messages import Output, Rejected, Shortened
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.probe import Probe
from winnow.engine.sampler import Draw
from winnow.engine.sampling import SamplingTable
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence
from winnow.engine.shortener import Shortener
from winnow.engine.speculation.speculator import SpeculationCounters

StepOutput = Output | Shortened | Rejected


class Answers:
    """Collects what a step has to tell; who has said all leaves the engine here."""

    def __init__(
        self,
        scheduler: Scheduler,
        cache: PrefixCache | None,
        table: SamplingTable,
        shortener: Shortener,
        totals: Totals,
        guesses: SpeculationCounters,
    ):
        self._scheduler = scheduler
        self._cache = cache
        self._table = table
        self._shortener = shortener
        self._totals = totals
        self._guesses = guesses
        self._untold: list[StepOutput] = []

    def tell(self, outputs: Iterable[StepOutput]) -> None:
        self._untold += outputs

    def take(self) -> list[StepOutput]:
        """What was to be told since the last call."""
        taken, self._untold = self._untold, []
        return taken

    def commit(self, draws: dict[Sequence, Draw]) -> None:
        """Appends the sampled tokens, ends what is over, and says so."""
        slots = [seq.slot for seq, draw in draws.items() for _ in draw.tokens if seq.is_running]
        tokens = [token for seq, draw in draws.items() for token in draw.tokens if seq.is_running]
        self._table.record(np.array(slots, np.int64), np.array(tokens, np.int64))
        for seq, draw in draws.items():
            if seq.is_running:  # not preempted, nor lost with another choice of its request
                self._commit(seq, draw)

    def _commit(self, seq: Sequence, draw: Draw) -> None:
        if draw.is_bad:
            if self._cache is not None:  # whoever begins alike must not begin with these pages
                self._cache.drop([*seq.block_keys, seq.document_key])
            return self.lose(seq.request_id, "the model's output for this prompt is not a number")
        seq.append(draw)
        self._totals.generated_tokens += len(draw.tokens)
        self._guesses.count(draw)
        output = Output(request_id=seq.request_id, index=seq.index, token_ids=draw.tokens, logprobs=draw.logprobs)
        reason = _finish_reason(seq)
        self._untold.append(self.end(seq, output, reason) if reason else output)

    def answer_probes(self, batch: ScheduledBatch) -> None:
        """Says what was found out by sequences that have been read, and ends them."""
        for seq in batch.seqs:
            if seq.probe is not None and seq.is_running and not seq.remaining:
                self._answer_probe(seq, seq.probe)

    def _answer_probe(self, seq: Sequence, probe: Probe) -> None:
        answers = self._shortener.close(seq.request_id, probe)
        if self._cache is not None and any(isinstance(answer, Rejected) for answer in answers):
            self._cache.drop(seq.block_keys)
        self._scheduler.remove(seq)
        self._untold += answers

    def end(self, seq: Sequence, output: Output, reason: str) -> Output:
        """The choice's last output, with what it held; its pages are given back."""
        self._scheduler.withdraw(seq)  # behind its last token it has nothing to read
        last = msgspec.structs.replace(
            output,
            finish_reason=reason,
            stop_token=output.token_ids[-1] if reason == "stop" and output.token_ids else None,
            cached_tokens=seq.cached_tokens,
            accepted_tokens=seq.accepted_tokens,
            rejected_tokens=seq.rejected_tokens,
            compression=self._scheduler.report(seq) if seq.is_running else seq.last_report,
        )
        if seq.is_running and self._cache is not None and seq.timeline.never_acts and seq.stages is None:
            # The next turn of a conversation begins with this one's tokens.
            self._cache.publish(self._cache.keys(seq.tokens[: seq.computed], seq.salt, seq.sight), seq.slot)
        self._scheduler.remove(seq)
        return last

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request without a word and gives their pages back."""
        self._shortener.forget(request_id)
        for seq in [seq for seq in self._scheduler.sequences() if seq.request_id == request_id]:
            self._scheduler.remove(seq)

    def lose(self, request_id: str, message: str) -> None:
        """Ends a request with an error that is not its sender's; said once, however many choices it had."""
        if any(seq.request_id == request_id for seq in self._scheduler.sequences()):
            self.abort(request_id)
            self._untold.append(Rejected(request_id, "internal", message))


def _finish_reason(seq: Sequence) -> str | None:
    if seq.stops_at(int(seq.tokens[seq.length - 1]), seq.generated):
        return "stop"
    return "length" if seq.generated >= seq.sampling.max_tokens else None

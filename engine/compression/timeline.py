"""When a plan acts on a sequence: fixed positions of its text, whatever the schedule.

A sequence is compressed when it has reached an event: the end of its document, then every `interval` tokens behind it
(eviction) and every full page of them (sealing). The document is the whole prompt unless the request says otherwise.
With compact positions the document has events too: where budget and block have been read, and every block from there
on. No chunk crosses an event, so a sequence that is preempted and read again goes through the same states as one that
was not.
"""

from __future__ import annotations

from dataclasses import dataclass

from winnow.engine.compression.channels import WINDOW
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.read import STEP_ROWS
from winnow.kernels.layout import PageFormat, PageLayout

NEVER = 1 << 62
"""A position that no text reaches"""


@dataclass(frozen=True)
class Timeline:
    """The events of one sequence."""

    plan: Plan
    prompt_tokens: int
    document_tokens: int
    """Those that are compressed at once when they have been read; the rest of the prompt is read over what they left"""
    fmt: PageFormat
    """Format of sealed pages"""
    rest: PageFormat | None
    """Format of the pages behind them, for plans that mix two"""
    seal_every: int
    """Tokens behind the document between two sealings; 0 where nothing is sealed"""

    @classmethod
    def of(cls, plan: Plan, prompt_tokens: int, layout: PageLayout, document_tokens: int | None = None) -> Timeline:
        """`document_tokens`: the whole prompt if None."""
        fmt = plan.sealed_format(layout.compute)
        seal_every = 0 if fmt is layout.compute else layout.capacity(fmt)
        document_tokens = prompt_tokens if document_tokens is None else document_tokens
        return cls(plan, prompt_tokens, document_tokens, fmt, plan.rest_format, seal_every)

    @property
    def channel_window(self) -> tuple[int, int]:
        """Positions, from the first up to the second, whose queries choose the channels that stay; none if all do."""
        first = max(0, self.document_tokens - WINDOW) if self.plan.drops_channels else NEVER
        return first, self.document_tokens

    @property
    def never_acts(self) -> bool:
        """Lanes hold every token, uncompressed, to the end, and as an engine without plans computes it."""
        return self.plan.evict is None and not self.seal_every and self.plan.read is None

    @property
    def intact_tokens(self) -> int:
        """Tokens of the prompt that lanes hold, as they are without a plan, when the first event comes. They never hold
        more while the document is read."""
        return self.next_event(0)

    @property
    def peak_tokens(self) -> int:
        """The most that lanes hold while the prompt is read, about: heads and layers may share a budget out."""
        question = self.prompt_tokens - self.document_tokens
        behind = min(question, self.plan.interval or question)
        return max(self.intact_tokens, self.plan.budget_tokens(self.document_tokens) + behind)

    def most_tokens(self, text_tokens: int) -> int:
        """The most that a lane may hold of a text of so many tokens."""
        evict = self.plan.evict
        if evict is None or not evict.is_compact:
            return text_tokens
        return min(text_tokens, max(self.intact_tokens, evict.budget_tokens(text_tokens) + evict.interval))

    def evicts_at(self, position: int) -> bool:
        """Whether policies choose when `position` tokens have been read."""
        if position < self.document_tokens:
            return position == self._next_block(position - 1)
        if position == self.document_tokens:
            return self.plan.evicts_at_prefill_end
        interval = self.plan.interval
        return interval > 0 and (position - self.document_tokens) % interval == 0

    def evicts_after(self, position: int) -> bool:
        """Whether an eviction is to come when `position` tokens have been read."""
        return self.plan.interval > 0 or (position < self.document_tokens and self.plan.evicts_at_prefill_end)

    def acts_at(self, position: int) -> bool:
        if self.evicts_at(position):
            return True
        behind = position - self.document_tokens
        return self.seal_every > 0 and behind >= 0 and behind % self.seal_every == 0

    def next_event(self, position: int) -> int:
        """The first position after this one where a chunk must end."""
        if position < self.document_tokens:
            return min(self.document_tokens, self._next_block(position))
        behind = position - self.document_tokens
        steps = [every for every in (self.plan.interval, self.seal_every) if every]
        return min((position + every - behind % every for every in steps), default=NEVER)

    def chunk_end(self, position: int) -> int:
        """The first position after this one that a step may not go beyond."""
        end = self.next_event(position)
        if position < (newest := self.newest_start(position)):
            end = min(end, newest)
        if self.plan.read is None:
            return end
        return min(end, self.prompt_tokens if position < self.prompt_tokens else position + STEP_ROWS)

    def _next_block(self, position: int) -> int:
        """The first place after this one where blocks of the prompt end, wherever the prompt does."""
        evict = self.plan.evict
        if evict is None or not evict.block_tokens:
            return NEVER
        budget = evict.budget_tokens(NEVER)
        return budget + evict.block_tokens * (max(0, position - budget) // evict.block_tokens + 1)

    def vote_start(self, position: int) -> int:
        """First position whose query votes in the eviction that follows `position` tokens; far away if none does."""
        evict, (last, event) = self.plan.evict, self._evictions_around(position)
        if evict is None or event == NEVER:
            return NEVER
        if evict.recital_chunk:
            return event  # the rows of the recital, which stand behind the prompt
        voters = evict.voters(event)
        if voters is None:
            return evict.first_voter
        return max(last, event - voters) if voters else NEVER

    def newest_start(self, position: int) -> int:
        """First position whose query is heard apart in the eviction that follows `position` tokens; far away if none
        is."""
        evict, (last, event) = self.plan.evict, self._evictions_around(position)
        newest = 0 if evict is None or event == NEVER else evict.newest_voters(event)
        return max(last, event - newest) if newest else NEVER

    def _evictions_around(self, position: int) -> tuple[int, int]:
        """Where the last eviction was when `position` tokens have been read, 0 for none, and where the next one is."""
        if position < self.document_tokens and self.plan.evicts_at_prefill_end:
            return 0, self.document_tokens
        if not self.plan.interval:
            return 0, NEVER
        done = max(0, position - self.document_tokens) // self.plan.interval
        event = self.document_tokens + (done + 1) * self.plan.interval
        return event - self.plan.interval if done or self.plan.evicts_at_prefill_end else 0, event

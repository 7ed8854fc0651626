"""One sequence: the tokens of one choice of one request, and how far it has got."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.timeline import NEVER, Timeline
from winnow.engine.messages import CompressionReport, SamplingParams
from winnow.engine.pages import Ints
from winnow.engine.picture_rows import Sight
from winnow.engine.probe import Probe
from winnow.engine.recital import Recital
from winnow.engine.sampler import Draw
from winnow.engine.speculation.speculation import Speculation
from winnow.engine.staging import Stages, Staging
from winnow.kernels.layout import PageLayout

NO_SLOT = -1
KNOWN = -1


@dataclass(eq=False)
class Sequence:
    """Mutable state of one choice.

    `computed` counts the tokens whose keys and values have been written (a position); what a lane still holds of them
    is its kept length, in the arena.
    """

    request_id: str
    index: int
    """Which of the request's n choices"""
    arrival: int
    sampling: SamplingParams
    plan: Plan
    timeline: Timeline
    tokens: Ints
    """[prompt + max_tokens] with room for what will be generated"""
    length: int
    """Tokens known so far: the prompt and what was sampled"""
    prompt_tokens: int
    seed: int
    """Of this choice's random draws, 64 bits"""
    plan_seed: int
    """Of its policies' random draws: that of the request's first choice, since choices share a compressed prompt, or
    of the document, which requests share"""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix cache keys of the prompt's full blocks"""
    document_key: bytes = b""
    """Prefix cache key of the compressed document; empty where there is none to be shared"""
    salt: str = ""
    sight: Sight | None = None
    """What it reads of pictures"""
    forced: int = 0
    """How many tokens after the prompt are the caller's"""
    told: int = 0
    """How many of these have been reported"""
    stages: Stages | None = None
    """For plans that act amid the prefill"""
    slot: int = NO_SLOT
    unread: int = KNOWN
    """Its row in what the last step has drawn, while nobody has read which token is there: one more than `length`
    says"""
    under_way: int = 0
    """Tokens that the step under way reads: lanes count them already, and `computed` does not"""
    computed: int = 0
    staging: Staging | None = None
    """While the prompt is read in stages; `computed` is 0 until it is over"""
    distilled: Ints | None = None
    """Positions of the prompt that the layers of the last stage have read, from then on"""
    vote_start: int = NEVER
    """First position whose query votes in the next eviction"""
    positions_known: int = 0
    """Positions before this one, if the text gets so far, are noted lane by lane, for plans that evict"""
    turned_back: int = 0
    """Places by which the newest tokens stand before their position in the text (compact positions)"""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had when the sequence first ran"""
    found_document: bool = False
    """Whether these are the document, compressed"""
    last_report: CompressionReport | None = None
    """What it held when it was last preempted"""
    speculation: Speculation | None = None
    drafted: int = 0
    """Tokens behind the known ones that were guessed for the next step"""
    accepted_tokens: int = 0
    """Guesses that became part of the answer"""
    rejected_tokens: int = 0
    recital: Recital | None = None
    """For plans that are told by one"""
    probe: Probe | None = None
    """What is to be found out by reading the tokens; a sequence that has one generates none"""
    squeezed_at: int = NEVER
    """Tokens it had read when pages ran out and its plan for that came into force; it does so there again when it is
    read anew"""
    calm: tuple[Plan, Timeline] | None = None
    """The plan and the timeline that ruled before; None if they rule still"""
    siblings: list[Sequence] = field(default_factory=list)
    """The other choices, on the first one until they are forked from it"""

    @property
    def remaining(self) -> int:
        """Tokens that have not been computed; of a recital's part, where it is in one. One that is still unread counts
        if there may be another one behind it."""
        if self.unread != KNOWN:
            return int(self.generated + 1 < self.sampling.max_tokens)
        return self.length - self.computed if self.reciting is None else self.reciting.left

    @property
    def document_tokens(self) -> int:
        return self.timeline.document_tokens

    @property
    def has_question(self) -> bool:
        """Part of the prompt is read over what its plan has left of the document."""
        return self.document_tokens < self.prompt_tokens

    @property
    def reciting(self) -> Recital | None:
        """The recital, from the document's end on until it is over."""
        if self.recital is None or self.computed != self.document_tokens or self.recital.is_over:
            return None
        return self.recital

    @property
    def stands_at_an_event(self) -> bool:
        return self.reciting is None and self.timeline.acts_at(self.computed)

    def chunk(self, most: int) -> int:
        """Tokens of its next chunk: none crosses an event of the timeline, a stage or a recital's part."""
        if self.reciting is not None:
            return min(most, self.reciting.left)
        if self.staging is not None:
            return min(most, self.staging.left)
        return min(most, self.remaining, self.chunk_end - self.computed)

    def growth(self, count: int) -> Ints:
        """[1] or [layers] tokens that its lanes gain by a chunk."""
        return np.array([count], np.int32) if self.staging is None else self.staging.growth(count, 0)

    def next_tokens(self, count: int) -> Ints:
        """Of its next chunk."""
        if self.reciting is not None:
            return self.reciting.next_tokens(count)
        return self.tokens[self.computed : self.computed + count]

    def advance(self, count: int) -> None:
        """Notes that a chunk was computed."""
        self.under_way = 0
        if self.reciting is not None:
            self.reciting.done += count
        elif self.staging is not None:
            self.staging.done += count
        else:
            self.computed += count

    @property
    def rows_read(self) -> int:
        """Tokens that the layers which come next have read."""
        if self.staging is not None:
            return self.staging.done
        return self.computed if self.reciting is None else self.computed + self.reciting.done

    @property
    def first_vote(self) -> int:
        """Which of the rows that those layers read is the first whose query votes."""
        if self.staging is None:
            return self.vote_start
        return int(np.searchsorted(self.staging.rows, self.vote_start))

    @property
    def reads_from(self) -> int:
        """Where in the text its next rows stand: with the last of the prompt's, it has been read by all layers."""
        if self.staging is None:
            return self.computed
        return (self.prompt_tokens if self.staging.is_last else 0) - self.staging.left

    @property
    def ends_a_stage(self) -> bool:
        return self.staging is not None and not self.staging.left

    @property
    def ahead(self) -> int:
        """Places by which RoPE has the rows behind its prompt elsewhere, because of its pictures."""
        return 0 if self.sight is None else self.sight.ahead

    @property
    def is_looking(self) -> bool:
        """Reads a prompt with pictures."""
        return self.sight is not None and self.computed < self.prompt_tokens

    @property
    def generated(self) -> int:
        return self.length - self.prompt_tokens

    @property
    def sampled(self) -> int:
        """Generated tokens that the model chose."""
        return self.generated - self.forced

    @property
    def reports_logprobs(self) -> bool:
        return self.sampling.logprobs is not None

    @property
    def is_running(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def is_decoding(self) -> bool:
        """Reads its own last token next, and says another one."""
        return self.is_running and self.remaining == 1 and self.sampled > 0 and self.reciting is None

    @property
    def can_read_ahead(self) -> bool:
        """Whether its token may be read one step late: nobody guesses from it."""
        return self.speculation is None

    @property
    def leaves_traces(self) -> bool:
        """Whether its next row leaves something behind when it is taken out of its lanes again, what it voted or chose
        to read, so that only who has ended may be."""
        return self.plan.read is not None or self.computed >= self.vote_start

    @property
    def first_needed(self) -> int:
        """The first position whose row must be computed, whatever the prefix cache has."""
        timeline = self.timeline
        first = min(timeline.intact_tokens - 1, timeline.vote_start(0), timeline.channel_window[0])
        return first if self.probe is None else min(first, self.probe.first_row)

    @property
    def chunk_end(self) -> int:
        """The first position after this one that a step may not go beyond."""
        end = self.timeline.chunk_end(self.computed)
        return min(end, self.squeezed_at) if self.computed < self.squeezed_at else end

    @property
    def can_be_squeezed(self) -> bool:
        """Its caller allows it, its prompt is read, and it has not been done or is not to be done later anyway."""
        is_due = self.squeezed_at == NEVER or self.is_to_be_squeezed
        is_read = self.computed >= self.prompt_tokens and self.reciting is None
        return self.plan.on_pressure is not None and is_read and is_due

    @property
    def is_to_be_squeezed(self) -> bool:
        """Read anew, it has come to where pages ran out."""
        return self.calm is None and self.computed == self.squeezed_at

    def squeeze(self, layout: PageLayout) -> None:
        """From here on the plan for when pages run out rules."""
        plan = self.plan.under_pressure
        assert plan is not None
        self.squeezed_at, self.drafted, self.calm = self.computed, 0, (self.plan, self.timeline)
        self.plan, self.timeline = plan, Timeline.of(plan, self.prompt_tokens, layout, self.document_tokens)

    def relax(self) -> None:
        """The plan that ruled before `squeeze` rules again."""
        if self.calm is not None:
            (self.plan, self.timeline), self.calm = self.calm, None

    def stops_at(self, token: int, generated: int) -> bool:
        """Whether this token, the `generated`-th one, ends the text."""
        return token in self.sampling.stop_token_ids and generated >= self.sampling.min_tokens

    @property
    def accumulates_votes(self) -> bool:
        """Votes count since the request began, through evictions (h2o)."""
        evict = self.plan.evict
        return evict is not None and evict.voters(self.document_tokens) is None

    def restart(self) -> None:
        """Forgets what was computed; the tokens stay."""
        self.relax()
        self.slot, self.unread, self.under_way = NO_SLOT, KNOWN, 0
        self.computed = self.positions_known = self.turned_back = self.drafted = 0
        self.staging = None if self.stages is None else Staging.begin(self.stages, self.prompt_tokens)
        self.distilled = None
        if self.recital is not None:
            self.recital.restart()
        self.vote_start = self.timeline.vote_start(0)

    def begin_behind_document(self, positions_known: int, turned_back: int) -> None:
        """For a sequence whose lanes hold its document, compressed already; the numbers are as another left them."""
        self.computed = self.document_tokens
        self.positions_known, self.turned_back = positions_known, turned_back
        self.vote_start = self.timeline.vote_start(self.computed)
        if self.recital is not None:
            self.recital.skip()

    def append(self, draw: Draw) -> None:
        count, self.unread = len(draw.tokens), KNOWN
        self.tokens[self.length : self.length + count] = draw.tokens
        self.length += count
        self.accepted_tokens += draw.accepted
        self.rejected_tokens += draw.guessed - draw.accepted


def reading(
    request_id: str, tokens: Ints, length: int, arrival: int, layout: PageLayout, probe: Probe | None = None
) -> Sequence:
    """A sequence that reads the first `length` of some tokens, for a probe if there is one, and generates none."""
    plan = Plan()
    return Sequence(
        request_id=request_id,
        index=0,
        arrival=arrival,
        sampling=SamplingParams(),
        plan=plan,
        timeline=Timeline.of(plan, length, layout),
        tokens=tokens,
        length=length,
        prompt_tokens=length,
        seed=0,
        plan_seed=0,
        probe=probe,
    )


def room_for(prompt: list[int], max_tokens: int, forced: list[int]) -> Ints:
    """The token array of a new sequence; forced tokens are among the `max_tokens` that follow its prompt."""
    tokens = np.zeros(len(prompt) + max_tokens, np.int32)
    tokens[: len(prompt)] = prompt
    tokens[len(prompt) : len(prompt) + len(forced)] = forced
    return tokens

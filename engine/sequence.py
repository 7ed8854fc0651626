"""One sequence: the tokens of one choice of one request, and how far it has got."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.timeline import NEVER, Timeline
from winnow.engine.messages import CompressionReport, SamplingParams
from winnow.engine.pages import Ints

NO_SLOT = -1


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
    """Of its policies' random draws: that of the request's first choice, since choices share a compressed prompt"""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix cache keys of the prompt's full blocks"""
    salt: str = ""
    slot: int = NO_SLOT
    computed: int = 0
    vote_start: int = NEVER
    """First position whose query votes in the next eviction"""
    positions_known: int = 0
    """Tokens whose positions are noted lane by lane, for plans that evict"""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had when the sequence first ran"""
    last_report: CompressionReport | None = None
    """What it held when it was last preempted"""
    siblings: list[Sequence] = field(default_factory=list)
    """The other choices, on the first one until they are forked from it"""

    @property
    def remaining(self) -> int:
        """Known tokens that have not been computed."""
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return self.length - self.prompt_tokens

    @property
    def is_running(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def accumulates_mass(self) -> bool:
        """Attention mass counts since the request began, through evictions (h2o)."""
        evict = self.plan.evict
        return evict is not None and evict.voters(self.prompt_tokens) is None

    def restart(self) -> None:
        """Forgets what was computed; the tokens stay."""
        self.slot = NO_SLOT
        self.computed = self.positions_known = 0
        self.vote_start = self.timeline.vote_start(0)

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1


def room_for(prompt: list[int], max_tokens: int) -> Ints:
    """The token array of a new sequence."""
    tokens = np.zeros(len(prompt) + max_tokens, np.int32)
    tokens[: len(prompt)] = prompt
    return tokens

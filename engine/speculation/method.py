"""What a method of speculative decoding is: it guesses the next tokens of a sequence, and the model checks the guess.

A wrong guess costs the rows that it was checked with and nothing else: see `speculator`. Methods therefore may remember
what they like. Their knobs are read by the server too, which must not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from winnow.engine.draft import Draft
    from winnow.engine.pages import Ints
    from winnow.engine.sampler import Sampler
    from winnow.engine.sampling import SamplingTable
    from winnow.engine.sequence import Sequence


class MethodParams(BaseModel):
    """The knobs that all methods have, and the base of a method's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: int = Field(4, ge=1, le=32, description="tokens guessed at once, at most")


@dataclass(frozen=True)
class Tools:
    """What an engine has for its methods to guess with."""

    table: SamplingTable
    """How the running sequences are sampled"""
    sampler: Sampler
    draft: Draft | None
    """Its draft model, for methods that need one"""


class Drafter(Protocol):
    """One named method. The engine makes one instance when a request first asks for it."""

    Params: ClassVar[type[MethodParams]]
    learns: ClassVar[bool]
    """Whether `learn` is to be called"""
    needs_draft: ClassVar[bool]
    """Whether it is there only where the server has a draft model"""

    def __init__(self, tools: Tools) -> None: ...

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        """For each sequence, whose text is `tokens[:length]`, up to `most` tokens that may come next; none at all where
        the method has no idea."""

    def learn(self, seq: Sequence, read: Ints, likeliest: Ints) -> None:
        """Tokens that the model has just read, wrong guesses included, and what it holds for the likeliest token after
        each of them."""

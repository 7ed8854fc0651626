"""What a method of speculative decoding is: it guesses the next tokens of a sequence, and the model checks the guess.

A wrong guess costs the rows that it was checked with and nothing else: see `speculator`. Methods therefore may remember
what they like. Their knobs are read by the server too, which must not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from winnow.engine.pages import Ints
    from winnow.engine.sequence import Sequence


class MethodParams(BaseModel):
    """The knobs that all methods have, and the base of a method's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokens: int = Field(4, ge=1, le=32, description="tokens guessed at once, at most")


class Drafter(Protocol):
    """One named method. The engine makes one instance when a request first asks for it."""

    Params: ClassVar[type[MethodParams]]
    learns: ClassVar[bool]
    """Whether `learn` is to be called"""

    def __init__(self, vocab_size: int) -> None: ...

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        """For each sequence, whose text is `tokens[:length]`, up to `most` tokens that may come next; none at all where
        the method has no idea."""

    def learn(self, seq: Sequence, read: Ints, likeliest: Ints) -> None:
        """Tokens that the model has just read, wrong guesses included, and what it holds for the likeliest token after
        each of them."""

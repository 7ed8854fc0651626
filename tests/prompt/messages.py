"""Prompts for a tiny vocabulary: each character of a context is a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from winnow.engine.messages import ContextPart, Shorten

from ..models.checkpoints import SIZES, prompt_of

TEXT = (
    "The lighthouse at the cape was built in 1871. It is 43 m tall, and its lamp burned oil. Dr. Finch kept it!\n"
    "The village has a harbour. Who knows the code? The code of the lamp room is 7342.\n\nThe village has a harbour."
)
QUESTION = "the code of the light"


def tokens_of(text: str) -> list[int]:
    return [ord(char) % SIZES["vocab_size"] for char in text]


def message(
    plan: dict[str, Any], texts: Sequence[str] = (TEXT,), name: str = "p", lead: int = 5, question: str = QUESTION
) -> Shorten:
    """`lead` other tokens stand before each part, and seven behind the last one."""
    prompt: list[int] = []
    parts = []
    for i, text in enumerate(texts):
        prompt += prompt_of(lead, i)
        parts.append(ContextPart(text, len(prompt), list(range(1, len(text) + 1))))
        prompt += tokens_of(text)
    return Shorten(name, prompt + prompt_of(7, 99), parts, plan, question)


def context_positions(request: Shorten) -> list[int]:
    return [part.first + i for part in request.parts for i in range(len(part.ends))]


def without(request: Shorten, dropped: Sequence[int]) -> list[int]:
    """The prompt without the tokens at these positions."""
    gone = set(dropped)
    return [token for i, token in enumerate(request.prompt) if i not in gone]

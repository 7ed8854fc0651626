"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.engine.messages import TokenLogprob

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have (OpenAI's number)."""


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One generated token, its probabilities and where its text begins in the choice's text."""

    token: int
    offset: int
    logprob: TokenLogprob


def chat_logprobs(entries: list[TokenEntry], tokenizer: Tokenizer, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion, or of one of its chunks."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}

    content = [
        one(entry.token, entry.logprob.logprob)
        | {"top_logprobs": [one(token, logprob) for token, logprob in entry.logprob.top[:top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: list[TokenEntry], tokenizer: Tokenizer, top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion, or of one of its chunks; `text_offset` counts in the choice's text."""
    return {
        "tokens": [tokenizer.token_text(entry.token) for entry in entries],
        "token_logprobs": [max(entry.logprob.logprob, LEAST) for entry in entries],
        "top_logprobs": [_alternatives(entry, tokenizer, top) for entry in entries] if top else None,
        "text_offset": [entry.offset for entry in entries],
    }


def _alternatives(entry: TokenEntry, tokenizer: Tokenizer, top: int) -> dict[str, float]:
    """By text, as OpenAI has it. Of tokens that look the same (parts of characters) the likeliest is shown."""
    shown: dict[str, float] = {}
    for token, logprob in entry.logprob.top[:top]:
        shown.setdefault(tokenizer.token_text(token), max(logprob, LEAST))
    shown.setdefault(tokenizer.token_text(entry.token), max(entry.logprob.logprob, LEAST))
    return shown

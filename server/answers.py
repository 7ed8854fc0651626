"""Pieces of choices in OpenAI's shapes: chunks of a stream, or the whole answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from winnow.server import __version__
from winnow.server.choice import Piece
from winnow.server.logprobs import TokenEntry, chat_logprobs, completion_logprobs

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer


@dataclass
class Whole:
    """All pieces of one choice."""

    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.entries += piece.entries
        self.finish_reason = piece.finish_reason or self.finish_reason


class Answer(Protocol):
    """The shape of one endpoint's answers."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a choice's stream begins with, if anything."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """`choices[0]` of a chunk."""

    def whole(self, index: int, choice: Whole) -> dict[str, Any]:
        """One of `choices` of the whole answer."""

    def envelope(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]: ...


class Envelope:
    def __init__(self, model: str, kind: str, chunk_kind: str, prefix: str):
        self.kinds = {False: kind, True: chunk_kind}
        self.head = {"id": f"{prefix}-{uuid4().hex}", "object": "", "created": int(time.time()), "model": model}

    def __call__(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]:
        fingerprint = {"system_fingerprint": f"winnow-{__version__}"}
        return {**self.head, "object": self.kinds[is_chunk], "choices": choices, **fingerprint}


class ChatAnswer:
    def __init__(self, model: str, tokenizer: Tokenizer, top_logprobs: int | None):
        self.envelope = Envelope(model, "chat.completion", "chat.completion.chunk", "chatcmpl")
        self.tokenizer = tokenizer
        self.top_logprobs = top_logprobs

    def opening(self, choice: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.entries) if piece.entries else None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, index: int, choice: Whole) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.entries),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        return None if self.top_logprobs is None else chat_logprobs(entries, self.tokenizer, self.top_logprobs)


class CompletionAnswer:
    def __init__(self, model: str, tokenizer: Tokenizer, top_logprobs: int | None):
        self.envelope = Envelope(model, "text_completion", "text_completion", "cmpl")
        self.tokenizer = tokenizer
        self.top_logprobs = top_logprobs

    def opening(self, choice: int) -> None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.choice, piece.text, piece.entries, piece.finish_reason)

    def whole(self, index: int, choice: Whole) -> dict[str, Any]:
        return self._choice(index, choice.text, choice.entries, choice.finish_reason)

    def _choice(self, index: int, text: str, entries: list[TokenEntry], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.top_logprobs is not None:
            logprobs = completion_logprobs(entries, self.tokenizer, self.top_logprobs)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

"""One choice of an answer while it grows: text, stop strings, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from winnow.engine.messages import CompressionReport, Output
from winnow.server.logprobs import TokenEntry
from winnow.server.stops import StopStrings

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one choice. The last piece has the finish reason."""

    choice: int
    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    report: CompressionReport | None = None

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.entries and self.finish_reason is None


class Choice:
    """Turns the engine's outputs of one sequence into pieces.

    Text that may be the start of a stop string is held back, and so are the log-probabilities of its tokens. Stop
    strings count from `min_tokens` on. The token that ends the sequence (an end token, a stop token) is counted but
    neither shown nor reported, unless `include_stop_str_in_output` is set.
    """

    def __init__(self, index: int, stream: TextStream, stops: StopStrings, min_tokens: int = 0):
        self.index = index
        self.stream = stream
        self.stops = stops
        self.min_tokens = min_tokens
        self.tokens = 0
        self.is_over = False
        self.seen = 0
        """Characters detokenized"""
        self.shown = 0
        """Characters passed on"""
        self.held: list[tuple[TokenEntry, int]] = []
        """Entries not yet passed on, each with the end of its text"""

    @property
    def was_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stops.found

    def push(self, output: Output) -> Piece:
        text = ""
        if not self.was_stopped:
            for i, token in enumerate(output.token_ids):
                self.tokens += 1
                is_end = output.stop_token == token and i == len(output.token_ids) - 1
                if is_end and not self.stops.include:
                    break
                entry = TokenEntry(token, self.seen, output.logprobs[i]) if output.logprobs else None
                text += self._add(self.stream.push((token,)), entry)
                if self.was_stopped:
                    break
        if output.finish_reason is not None:
            self.is_over = True
            if not self.was_stopped:
                text += self._add(self.stream.finish(), None)
                text += self.stops.flush()
        self.shown += len(text)
        reason = output.finish_reason
        if reason is not None and self.was_stopped:
            reason = "stop"
        return Piece(self.index, text, self._release(), reason, output.compression)

    def _add(self, text: str, entry: TokenEntry | None) -> str:
        self.seen += len(text)
        if entry is not None:
            self.held.append((entry, self.seen))
        return self.stops.push(text) if self.tokens >= self.min_tokens else text

    def _release(self) -> list[TokenEntry]:
        """Entries whose whole text was passed on; at a stop string also the one that it cuts."""
        if self.was_stopped:
            ready = [entry for entry, _ in self.held if entry.offset < self.shown]
            self.held = []
        elif self.is_over:
            ready = [entry for entry, _ in self.held]
        else:
            ready = [entry for entry, end in self.held if end <= self.shown]
            self.held = self.held[len(ready) :]
        return ready

"""Where a stop string ends a text that is still growing."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, up to the first stop string; holds back what may turn out to be the start of one.

    The first is the one that is complete first, so the result does not depend on how the text is split.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self.stops = tuple(stops)
        self.include = include
        """Whether the stop string itself is passed on"""
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain. After a stop string was found there is no more."""
        if self.found or not self.stops:
            return "" if self.found else text
        text = self.held + text
        hits = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            end, start = min(hits)
            self.found, self.held = True, ""
            return text[:end] if self.include else text[:start]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """At the end: what was held back was no stop string after all."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""The text that models are calibrated with unless the user brings one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from winnow.engine.errors import ModelError

TEXT_NAME = "Python's language reference (pydoc_data.topics), PSF-2.0"


def default_text() -> str:
    """Python's language reference as Python ships it for `help()`, under the PSF License 2."""
    return "\n\n".join(topics.values())


def read_text(file: Path | None) -> tuple[str, str]:
    """A text and its name: of a UTF-8 file, or the default one. ModelError if the file cannot be read."""
    if file is None:
        return default_text(), TEXT_NAME
    try:
        return file.read_text(encoding="utf-8"), file.name
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def excerpts(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """At most `count` parts of `length` tokens, spread evenly over a text; one shorter part if the text is shorter."""
    if len(tokens) <= length:
        return [list(tokens)]
    count = min(count, len(tokens) // length)
    last = len(tokens) - length
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return [list(tokens[start : start + length]) for start in starts]

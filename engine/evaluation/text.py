"""Real text that is there without a download, and prompts of it.

The text is Python's language reference (PSF License) and what the packages that Winnow needs say of themselves in their
metadata, readmes and notices, under the licenses that they come with: MIT, BSD or Apache 2.0, all of which allow
that the text be read, and none of which is passed on here: results hold figures and a digest, no text.

A prompt depends on its key and length only, so that runs with other scenarios or rounds read the same text. Prompts
differ from their first tokens on: no server can take one for the beginning of another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pydoc_data.topics import topics

PACKAGES = (
    "pydantic",
    "fastapi",
    "numpy",
    "transformers",
    "torch",
    "typer",
    "rich",
    "uvicorn",
    "httpx",
    "msgspec",
    "prometheus-client",
    "safetensors",
    "tokenizers",
    "jinja2",
)
SOURCE = (
    "Python's language reference (PSF License 2), and the readmes, notices and licences that come with the packages "
    f"{', '.join(PACKAGES)} (MIT, BSD and Apache 2.0)"
)
"""As results name it"""
_TEXT = re.compile(r"LICEN[SC]E|NOTICE|COPYING|METADATA|README|\.md$")
_LINK = re.compile(r"\[([^\]]*)\]\(https?://[^)]*\)")
_BLANK = re.compile(r"\n\s*\n")


def corpus() -> str:
    """The texts in a fixed order, each paragraph once: licenses repeat each other."""
    texts = [*topics.values(), *_package_texts()]
    paragraphs: dict[str, str] = {}
    for text in texts:
        for paragraph in _BLANK.split(_LINK.sub(r"\1", text.strip())):
            paragraphs.setdefault(" ".join(re.findall(r"\w+", paragraph.lower())), paragraph)
    return "\n\n".join(paragraphs.values())


def _package_texts() -> Iterator[str]:
    for package in PACKAGES:
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            path = file.locate()
            if _TEXT.search(file.name) and not file.name.endswith(".py") and path.is_file():  # type: ignore[attr-defined]
                text = file.read_text(encoding="utf-8")
                yield text.partition("\n\n")[2] if file.name == "METADATA" else text


def digest(text: str) -> str:
    """Tells which text a result was measured with."""
    return sha256(text.encode()).hexdigest()[:16]


class PromptBook:
    """Cuts prompts of exact lengths out of a text."""

    def __init__(self, encode: Callable[[str], list[int]], text: str):
        self._encode = encode
        self._tokens = encode(text)

    def prompt(self, key: str, tokens: int) -> list[int]:
        """`tokens` token ids: a line with the key, and then a part of the text that the key chooses."""
        number = int.from_bytes(sha256(key.encode()).digest()[:8], "big")
        head = self._encode(f"{number % 10**9}: excerpt for {key}\n\n")[:tokens]
        size = len(self._tokens)
        start = number % size
        text = self._tokens[start:] + self._tokens * (1 + tokens // size)
        return head + text[: tokens - len(head)]

    def prompts(self, key: str, count: int, tokens: int) -> list[list[int]]:
        return [self.prompt(f"{key}/{i}", tokens) for i in range(count)]

"""Pictures with questions about them, each with one right answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str

    def score(self, said: str) -> float:
        """1 if that is the answer and nothing else, but for case, spaces and a full stop; else 0."""
        return float(_plain(said) == _plain(self.answer))


@dataclass(frozen=True)
class Scene:
    image: bytes
    """A PNG file"""
    questions: tuple[Question, ...]
    """One of each kind"""


Scenes = Callable[[int], Scene]
"""The scene of a number: the same one each time"""


def blank(image: bytes) -> bytes:
    """A grey picture of the size of another."""
    from PIL import Image as Pillow

    with Pillow.open(BytesIO(image)) as shown:
        return png(Pillow.new("RGB", shown.size, GREY))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def png(image: Image) -> bytes:
    """A file of it."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

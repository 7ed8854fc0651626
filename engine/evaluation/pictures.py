"""Pictures with questions about them, each with one right answer."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import numpy as np
from PIL import Image

from winnow.engine.errors import EvalError
from winnow.engine.models.mosaic.questions import Asker
from winnow.engine.models.mosaic.scenes import Mosaic, load_bank

SEED = 20_000
"""Of the pictures and the questions"""
QUESTIONS = 4
"""About each picture"""
GREY = (128, 128, 128)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    index: int = 0
    """How many of its kind are asked before it"""

    def score(self, said: str) -> float:
        """1 if that is the answer and nothing else, but for case, spaces and a full stop; else 0."""
        return float(_plain(said) == _plain(self.answer))


@dataclass(frozen=True)
class Scene:
    image: bytes
    """A PNG file"""
    questions: tuple[Question, ...]


class Scenes(Protocol):
    def scene(self, index: int) -> Scene:
        """The same one each time."""

    def fresh(self, seed: int) -> Scene:
        """One that `scene` does not give, of one question; the same for a seed."""


class Mosaics:
    """Of the shapes that the model that ships was not trained on. EvalError where they are not installed."""

    def __init__(self) -> None:
        try:
            self._bank = load_bank("test")
        except ImportError as error:
            raise EvalError("the pictures are inside a PyPI package: pip install easy-vqa") from error
        self._rng = np.random.default_rng(SEED)
        self._asker = Asker(random.Random(SEED))
        self._asked: Counter[str] = Counter()
        self._scenes: list[Scene] = []

    def scene(self, index: int) -> Scene:
        # In order: which questions are asked depends on the answers before.
        while len(self._scenes) <= index:
            self._scenes.append(self._next())
        return self._scenes[index]

    def _next(self) -> Scene:
        mosaic = self._bank.draw(self._rng)
        questions = []
        for asked in (self._asker.ask(mosaic) for _ in range(QUESTIONS)):
            questions.append(Question(asked.kind, asked.text + "?", asked.answer, self._asked[asked.kind]))
            self._asked[asked.kind] += 1
        return Scene(self._shown(mosaic), tuple(questions))

    def fresh(self, seed: int) -> Scene:
        mosaic = self._bank.draw(np.random.default_rng((SEED, seed)))
        asked = Asker(random.Random(seed)).ask(mosaic)
        return Scene(self._shown(mosaic), (Question(asked.kind, asked.text + "?", asked.answer),))

    def _shown(self, mosaic: Mosaic) -> bytes:
        return png(Image.fromarray(self._bank.render([mosaic])[0]))


def blank(image: bytes) -> bytes:
    """A grey picture of the size of another."""
    with Image.open(BytesIO(image)) as shown:
        return png(Image.new("RGB", shown.size, GREY))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def png(image: Image.Image) -> bytes:
    """A file of it."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

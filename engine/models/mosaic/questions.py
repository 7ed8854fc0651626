"""Questions about mosaics, and their answers.

Answers are balanced: of a few questions that could be asked next, the one whose answer was given least so far is asked.
Who does not look at the image then does little better than chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from winnow.engine.models.mosaic.scenes import COLOURS, KINDS, SHAPES, Mosaic

ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
SYNONYMS = {"top": "upper", "bottom": "lower", "middle": "centre"}


class Question(NamedTuple):
    kind: str
    text: str
    answer: str
    cells: tuple[int, ...] = ()
    """Places of the cells that show the answer; none where all or nothing does."""


CELL_COLOUR = (
    "what colour is the shape in the {}",
    "which colour is the shape in the {}",
    "what is the colour of the shape in the {}",
    "what colour is the {} shape",
    "what colour is in the {} cell",
)
CELL_SHAPE = (
    "what shape is in the {}",
    "which shape is in the {}",
    "what is the shape in the {}",
    "what shape is in the {} cell",
    "which shape is shown in the {}",
)
CELL = (
    "what is in the {}",
    "what do you see in the {}",
    "describe the {} cell",
    "what is shown in the {}",
    "what is in the {} cell",
)
COUNT = (
    "how many {} are there",
    "how many {} do you see",
    "how many {} are in the image",
    "count the {}",
    "what is the number of {}",
    "how many {} does the picture show",
)
WHERE = (
    "where is the {}",
    "in which cell is the {}",
    "which cell shows the {}",
    "where do you see the {}",
    "where in the image is the {}",
)
PRESENCE = (
    "is there a {}",
    "is there a {} in the image",
    "do you see a {}",
    "does the image show a {}",
    "is a {} in the picture",
)
GRID = (
    "how many cells are there",
    "how many cells does the image have",
    "how many cells do you see",
    "what is the number of cells",
    "count the cells",
)

PHRASES = CELL_COLOUR + CELL_SHAPE + CELL + COUNT + WHERE + PRESENCE + GRID

CANDIDATES = 4


class Asker:
    """Asks about mosaics, one question after the other; repeatable for the same `rng`.

    `kinds`: what is asked, each as often as any other; by default all.
    """

    def __init__(self, rng: random.Random, kinds: Sequence[str] = ()):
        self._rng, self._kinds = rng, kinds or KIND_NAMES
        self._given: Counter[tuple[str, str, str]] = Counter()
        self._makers: dict[str, Callable[[Mosaic], tuple[str, Question]]] = {
            "cell colour": self._cell_colour,
            "cell shape": self._cell_shape,
            "cell": self._cell,
            "count shapes": self._count_shapes,
            "count colours": self._count_colours,
            "count all": self._count_all,
            "where": self._where,
            "presence": self._presence,
            "grid": self._grid,
        }

    def ask(self, mosaic: Mosaic) -> Question:
        """A question of any kind. Answers are balanced by kind, and by what a presence question is about."""
        make = self._makers[self._rng.choice(self._kinds)]
        candidates = [make(mosaic) for _ in range(CANDIDATES)]
        about, question = min(candidates, key=lambda each: self._given[each[0], each[1].kind, each[1].answer])
        self._given[about, question.kind, question.answer] += 1
        return question

    def _said(self, phrases: tuple[str, ...], what: str = "") -> str:
        return self._rng.choice(phrases).format(what)

    def _filled(self, mosaic: Mosaic) -> int:
        return self._rng.choice([place for place, kind in enumerate(mosaic.cells) if kind >= 0])

    def _place(self, mosaic: Mosaic, place: int) -> str:
        """Words for a cell: its name, a synonym of it, or row and column."""
        way = self._rng.random()
        if way < 0.15:
            return f"row {place // mosaic.grid + 1} column {place % mosaic.grid + 1}"
        name = cell_name(mosaic.grid, place)
        return " ".join(SYNONYMS.get(word, word) for word in name.split()) if way < 0.3 else name

    def _cell_colour(self, mosaic: Mosaic) -> tuple[str, Question]:
        place = self._filled(mosaic)
        text = self._said(CELL_COLOUR, self._place(mosaic, place))
        return "", Question("cell colour", text, COLOURS[mosaic.cells[place] % len(COLOURS)], (place,))

    def _cell_shape(self, mosaic: Mosaic) -> tuple[str, Question]:
        place = self._filled(mosaic)
        text = self._said(CELL_SHAPE, self._place(mosaic, place))
        return "", Question("cell shape", text, SHAPES[mosaic.cells[place] // len(COLOURS)], (place,))

    def _cell(self, mosaic: Mosaic) -> tuple[str, Question]:
        place = self._rng.randrange(len(mosaic.cells))
        text = self._said(CELL, self._place(mosaic, place))
        return "", Question("cell", text, kind_name(mosaic.cells[place]), (place,))

    def _count_shapes(self, mosaic: Mosaic) -> tuple[str, Question]:
        shape = self._rng.randrange(len(SHAPES))
        found = _showing(mosaic, SHAPES[shape])
        return "", Question("count shapes", self._said(COUNT, SHAPES[shape] + "s"), str(len(found)), found)

    def _count_colours(self, mosaic: Mosaic) -> tuple[str, Question]:
        shown = [kind % len(COLOURS) for kind in mosaic.cells if kind >= 0]
        # Of eight colours most are not there: every second candidate is one that is.
        colour = self._rng.choice(shown) if self._rng.random() < 0.5 else self._rng.randrange(len(COLOURS))
        text = self._said(COUNT, COLOURS[colour] + " shapes")
        found = _showing(mosaic, COLOURS[colour] + " shape")
        return "", Question("count colours", text, str(len(found)), found)

    def _count_all(self, mosaic: Mosaic) -> tuple[str, Question]:
        found = tuple(place for place, kind in enumerate(mosaic.cells) if kind >= 0)
        return "", Question("count all", self._said(COUNT, "shapes"), str(len(found)), found)

    def _where(self, mosaic: Mosaic) -> tuple[str, Question]:
        """Where something is that is there once; how many shapes there are where nothing is."""
        names: Counter[str] = Counter()
        for kind in mosaic.cells:
            if kind >= 0:
                names.update(_names(kind).values())
        found = [
            (place, name)
            for place, kind in enumerate(mosaic.cells)
            if kind >= 0
            for name in _names(kind).values()
            if names[name] == 1
        ]
        if not found:
            return self._count_all(mosaic)
        place, name = self._rng.choice(found)
        return "", Question("where", self._said(WHERE, name), cell_name(mosaic.grid, place), (place,))

    def _presence(self, mosaic: Mosaic) -> tuple[str, Question]:
        about = self._rng.choice(("kind", "colour", "shape"))
        shown = {_names(kind)[about] for kind in mosaic.cells if kind >= 0}
        name = _names(self._rng.randrange(KINDS))[about]
        if self._rng.random() < 0.5:
            name = self._rng.choice(sorted(shown))
        answer = "yes" if name in shown else "no"
        return about, Question("presence", self._said(PRESENCE, name), answer, _showing(mosaic, name))

    def _grid(self, mosaic: Mosaic) -> tuple[str, Question]:
        return "", Question("grid", self._said(GRID), str(len(mosaic.cells)))


KIND_NAMES = (
    "cell colour",
    "cell shape",
    "cell",
    "count shapes",
    "count colours",
    "count all",
    "where",
    "presence",
    "grid",
)


def cell_name(grid: int, place: int) -> str:
    """What answers call a cell; the middle of nine is just "middle"."""
    row, column = ROWS[grid][place // grid], COLUMNS[grid][place % grid]
    return row if row == column else f"{row} {column}"


def kind_name(kind: int) -> str:
    return "nothing" if kind < 0 else f"{COLOURS[kind % len(COLOURS)]} {SHAPES[kind // len(COLOURS)]}"


def _names(kind: int) -> dict[str, str]:
    """What a filled cell may be called, by how much that tells."""
    return {
        "kind": kind_name(kind),
        "colour": f"{COLOURS[kind % len(COLOURS)]} shape",
        "shape": SHAPES[kind // len(COLOURS)],
    }


def _showing(mosaic: Mosaic, name: str) -> tuple[int, ...]:
    """Places of the cells that show what may be called so."""
    return tuple(place for place, kind in enumerate(mosaic.cells) if kind >= 0 and name in _names(kind).values())


def words() -> list[str]:
    """Every word that questions and answers are made of, sorted."""
    said = " ".join(PHRASES).replace("{}", " ").split()
    placed = [word for names in (*ROWS.values(), *COLUMNS.values(), SYNONYMS.values()) for word in names]
    shapes = [name + end for name in (*SHAPES, "shape") for end in ("", "s")]
    said += [*placed, *COLOURS, *shapes, *map(str, range(10)), "row", "column", "yes", "no", "nothing"]
    return sorted(set(said))

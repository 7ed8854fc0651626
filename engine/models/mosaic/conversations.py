"""Conversations about mosaics as tensors, written as the chat template writes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from winnow.engine.models.mosaic.checkpoint import (
    ASSISTANT,
    BEGIN,
    END,
    IMAGE,
    PAD,
    PATCHES,
    SYSTEM,
    UNKNOWN,
    USER,
    VOCABULARY,
    word_ids,
)
from winnow.engine.models.mosaic.questions import KIND_NAMES, Asker, Question, cell_name, kind_name
from winnow.engine.models.mosaic.scenes import GRIDS, KINDS, SIDE, Bank, Mosaic

_NO_TARGET = -100
_WORDS = range(UNKNOWN + 5, len(VOCABULARY))
_SYSTEM_PART, _TEXT_FIRST_PART, _LONGEST_SYSTEM = 0.1, 0.1, 12
_TURNS = (1, 1, 1, 1, 2, 6)
"""Of a conversation; those with the question before the image have the most."""
_ASKED = (*KIND_NAMES, "count shapes", "count colours", "where", "presence")
"""What is looked for among all cells is learnt last, and asked twice as often as the rest."""


class Batch(NamedTuple):
    pixels: Tensor
    """[mosaics, 96, 96, 3] uint8."""
    tokens: Tensor
    """[mosaics, longest] int64, padded behind the end."""
    targets: Tensor
    """[mosaics, longest] int64: the next token where it belongs to an answer, else -100."""
    branches: Tensor
    """[mosaics, longest] int64: 0 for what all conversations about a mosaic begin with, else which of them it is."""
    positions: Tensor
    """[mosaics, longest] int64: in the conversation."""
    patches: Tensor
    """[mosaics, 144] int64: 0 where a patch shows background, else 1 + kind."""
    cells: Tensor
    """[mosaics, 144] int64: 0 where a patch is in an empty cell, else 1 + the cell's kind."""
    places: Tensor
    """[mosaics, 144] int64: which of all grids' cells a patch is in."""
    presence: Tensor
    """[mosaics, kinds] f32: 1 where the mosaic shows the kind."""
    looks: Tensor
    """[mosaics, longest, 9] bool: the cells that show the next token, where it belongs to an answer."""


class _Written(NamedTuple):
    """Conversations about one mosaic, token by token as `Batch` has them; `cells` are those that `looks` names."""

    tokens: list[int]
    targets: list[int]
    branches: list[int]
    positions: list[int]
    cells: list[tuple[int, ...]]

    def add(self, branch: int, position: int, tokens: Sequence[int], cells: Sequence[tuple[int, ...] | None]) -> None:
        """`cells`: of each token of an answer; None for all other tokens. Targets and cells are those of the next."""
        following = [*zip(tokens[1:], cells[1:], strict=True), (_NO_TARGET, None)]
        self.tokens.extend(tokens)
        self.targets.extend(_NO_TARGET if shown is None else token for token, shown in following)
        self.branches.extend([branch] * len(tokens))
        self.positions.extend(range(position, position + len(tokens)))
        self.cells.extend(shown or () for _, shown in following)


def conversations(bank: Bank, seed: Sequence[int], mosaics: int, questions: int) -> Batch:
    """As many new mosaics, and as many questions about each, in several conversations; and a description of each.

    Most conversations about a mosaic begin alike, with its image: they are branches of one sequence, each of which sees
    only itself and their beginning, so that an image is read once for all of them. Some begin with a system message (of
    words that mean nothing here), some name the question before the image, and the images' brightness differs.
    """
    rng, choices = np.random.default_rng(seed), random.Random(str(list(seed)))
    scenes = [bank.draw(rng) for _ in range(mosaics)]
    asker = Asker(choices, _ASKED)
    asked = [[asker.ask(scene) for _ in range(questions)] for scene in scenes]
    written = [_branched(*each, choices) for each in zip(scenes, asked, strict=True)]
    brightness = rng.uniform(0.85, 1.1, (mosaics, 1, 1, 1)).astype(np.float32)
    noise = rng.normal(0, 3, (mosaics, SIDE, SIDE, 1)).astype(np.float32)
    pixels = np.clip(bank.render(scenes) * brightness + noise, 0, 255).astype(np.uint8)
    presence = torch.zeros(mosaics, KINDS)
    for row, scene in enumerate(scenes):
        presence[row, [kind for kind in scene.cells if kind >= 0]] = 1.0
    tokens = _padded([each.tokens for each in written], PAD)
    looks = torch.zeros(*tokens.shape, max(GRIDS) ** 2, dtype=torch.bool)
    for row, each in enumerate(written):
        for place, cells in enumerate(each.cells):
            looks[row, place, list(cells)] = True
    patches, places = (torch.from_numpy(of(scenes)) for of in (bank.patch_kinds, bank.patch_places))
    within = places - places.amin(1, keepdim=True)
    return Batch(
        pixels=torch.from_numpy(pixels),
        tokens=tokens,
        targets=_padded([each.targets for each in written], _NO_TARGET),
        branches=_padded([each.branches for each in written], -1),
        positions=_padded([each.positions for each in written], 0),
        patches=patches,
        cells=torch.stack([torch.tensor(scene.cells)[row] + 1 for scene, row in zip(scenes, within, strict=True)]),
        places=places,
        presence=presence,
        looks=looks,
    )


def _branched(scene: Mosaic, questions: Sequence[Question], choices: random.Random) -> _Written:
    written = _Written([], [], [], [], [])
    begun, image = [BEGIN], [IMAGE] * PATCHES
    if choices.random() < _SYSTEM_PART:
        length = choices.randint(1, _LONGEST_SYSTEM)
        begun += [SYSTEM, *(choices.choice(_WORDS) if choices.random() < 0.5 else UNKNOWN for _ in range(length))]
    text_first = choices.random() < _TEXT_FIRST_PART
    if not text_first:
        begun += [USER, *image]
    written.add(0, 0, begun, [None] * len(begun))
    asked = 0
    while asked < len(questions):
        turns = _TURNS[-1] if text_first else choices.choice(_TURNS)
        tokens: list[int] = []
        cells: list[tuple[int, ...] | None] = []
        for turn, question in enumerate(questions[asked : asked + turns]):
            said, answer = word_ids(question.text), [*word_ids(question.answer), END]
            if turn or text_first:
                said = [USER, *said]
            if not turn and text_first:
                said += image
            tokens += [*said, ASSISTANT, *answer]
            cells += [*[None] * (len(said) + 1), *[question.cells] * (len(answer) - 1), ()]
        asked += turns
        written.add(asked, len(begun), tokens, cells)
        if text_first:
            return written  # each conversation would hold the image anew
    for branch, is_place_told in enumerate((True, False), asked + 1):
        written.add(branch, len(begun), *_described(scene, is_place_told, choices))
    return written


def _described(
    scene: Mosaic, is_place_told: bool, choices: random.Random
) -> tuple[list[int], list[tuple[int, ...] | None]]:
    """Tokens, and the cells of those that are learnt: what each cell shows, or where what is there once is.

    In any order, which is not learnt. Here what is looked for stands right before what is to be said: from questions
    alone, whose words say it in many ways, models came late to find a cell of nine.
    """
    tokens = [ASSISTANT]
    cells: list[tuple[int, ...] | None] = [None]
    once = [place for place, kind in enumerate(scene.cells) if kind >= 0 and scene.cells.count(kind) == 1]
    places = list(range(len(scene.cells))) if is_place_told else once
    for place in choices.sample(places, len(places)):
        names = cell_name(scene.grid, place), kind_name(scene.cells[place])
        told, learnt = (word_ids(name) for name in (names if is_place_told else reversed(names)))
        tokens += [*told, *learnt]
        cells += [*[None] * len(told), *[(place,)] * len(learnt)]
    return tokens, cells


def write_ids(questions: Sequence[Question]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and for each the next token where that belongs to an answer."""
    tokens, is_answer = [BEGIN], [False]
    for turn, question in enumerate(questions):
        said, answer = word_ids(question.text), [*word_ids(question.answer), END]
        tokens += [USER, *([] if turn else [IMAGE] * PATCHES), *said, ASSISTANT, *answer]
        is_answer += [False] * (len(tokens) - len(is_answer) - len(answer)) + [True] * len(answer)
    return tokens, _targets(tokens, is_answer)


def _targets(tokens: Sequence[int], is_answer: Sequence[bool]) -> list[int]:
    """The next token where that belongs to an answer."""
    following = zip(tokens[1:], is_answer[1:], strict=True)
    return [token if answers else _NO_TARGET for token, answers in following] + [_NO_TARGET]


def padded(written: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens and targets of several conversations, [conversations, longest] each."""
    return _padded([tokens for tokens, _ in written], PAD), _padded([targets for _, targets in written], _NO_TARGET)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
